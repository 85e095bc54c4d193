"""Compatible training through Lightning: one process, two, and from a checkpoint."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DistributedSampler

pytest.importorskip("lightning", reason="compatible models train with Lightning (extra: train)")

from lightning import Trainer

from subspan.align import BackwardCompatibleModule, BT2Head, BT2Loss, TeacherDataset, old_class_means
from subspan.measures.retrieval import retrieval_scores

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning")

N, D, CLASSES = 256, 24, 8


def generation(seed=0):
    """Inputs of eight classes, an old model that separates them poorly and a new one that does so well."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(9)
    centers, view = torch.randn(CLASSES, D, generator=fixed), torch.randn(D, 6, generator=fixed)
    labels = torch.arange(N) % CLASSES
    inputs = centers[labels] + 0.7 * torch.randn(N, D, generator=generator)
    old = F.normalize(inputs[:, :6] @ view[:6], dim=1)
    new = F.normalize(inputs @ centers.mT, dim=1)
    return inputs, labels, old, new


def module(means, **options):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(D, 32), torch.nn.ReLU(), torch.nn.Linear(32, CLASSES + 6))
    head = BT2Head(CLASSES + 6, CLASSES, 6, 2, num_classes=CLASSES)
    return BackwardCompatibleModule(backbone, head, BT2Loss(means), **({"learning_rate": 1e-2} | options))


@pytest.fixture(scope="module")
def data():
    inputs, labels, old, new = generation()
    return TeacherDataset(inputs, labels, old, new), old_class_means(old, labels)


def trainer(epochs, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, **(quiet | {"enable_checkpointing": False} | options))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_makes_the_new_model_searchable_in_the_old_gallery_and_better_than_it(data, tmp_path):
    dataset, means = data
    model = module(means)
    before = copy.deepcopy(model)
    trainer(15).fit(model, dataset.loader(64))
    inputs, labels, old, _ = generation(1)

    def found(queries, gallery):
        return retrieval_scores(queries, gallery, labels, labels, exclude_self=True).mean_average_precision

    own = found(old, old)
    assert found(model.encode(inputs, "compatible"), old) > own + 0.05
    assert found(before.encode(inputs, "compatible"), old) < own
    assert found(model.encode(inputs), model.encode(inputs)) > own + 0.2
    lengths = model.encode(inputs, "compatible").norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(N))
    torch.testing.assert_close(model.encode(inputs).norm(dim=1), torch.full((N,), 5**0.5))
    for basis in (model.head.transform.new_basis, model.head.transform.old_basis):
        assert float((basis.weight @ basis.weight.mT - torch.eye(basis.d)).abs().max()) < 1e-5
    model.save_weights(tmp_path / "model.safetensors")
    before.load_weights(tmp_path / "model.safetensors")
    torch.testing.assert_close(before.encode(inputs), model.encode(inputs))
    with pytest.raises(ValueError, match="space"):
        model.encode(inputs, "old")
    other = BackwardCompatibleModule(torch.nn.Linear(D, 3), model.head, model.loss)
    with pytest.raises(ValueError, match="does not fit"):
        other.load_weights(tmp_path / "model.safetensors")


def test_a_loss_that_is_no_number_names_the_step(data):
    dataset, means = data
    model = module(means, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"the loss is .* at step [1-9]"):
        trainer(3).fit(model, dataset.loader(64))


def test_the_recipe_is_the_published_one(data, monkeypatch):
    model = module(data[1], learning_rate=1e-3)
    monkeypatch.setattr(BackwardCompatibleModule, "trainer", SimpleNamespace(estimated_stepping_batches=100))
    options = model.configure_optimizers()
    optimizer, schedule = options["optimizer"], options["lr_scheduler"]["scheduler"]
    assert type(optimizer) is torch.optim.Adam
    assert options["lr_scheduler"]["interval"] == "step"
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 2**-15
    rates = []
    for _ in range(100):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    # A linear start over 5 of 100 steps, then a cosine to zero.
    assert rates[:6] == pytest.approx([1e-3 * step / 6 for step in range(1, 7)])
    assert rates[5 + 19] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 19 / 95)) / 2)
    assert group["lr"] == pytest.approx(0, abs=1e-12)


def test_a_stopped_run_resumes_where_it_was(data, tmp_path):
    dataset, means = data
    whole, first, resumed = module(means), module(means), module(means)
    trainer(4).fit(whole, dataset.loader(64, shuffle=False))
    # The schedule needs the number of steps that the whole run has; the first run is stopped half-way.
    stopped = trainer(4)
    first.on_train_epoch_end = lambda: setattr(stopped, "should_stop", first.current_epoch == 1)
    stopped.fit(first, dataset.loader(64, shuffle=False))
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    assert not torch.equal(weights(first), weights(whole))
    trainer(4).fit(resumed, dataset.loader(64, shuffle=False), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=1e-6)


def test_two_processes_take_the_same_steps_as_one(data):
    dataset, means = data
    one, two = module(means), module(means)
    start = weights(one)
    # In one order of the epoch each of two processes takes every second row: two halves of 32 make a batch of 64.
    order = DistributedSampler(dataset, num_replicas=1, rank=0)
    trainer(2).fit(one, dataset.loader(64, shuffle=False, sampler=order))
    trainer(2, strategy="ddp_fork", devices=2).fit(two, dataset.loader(32))
    # Adam divides by the root of its second moment, so rounding shows where a gradient is nearly zero.
    moved, apart = (float((weights(one) - other).norm()) for other in (start, weights(two)))
    assert apart < 2e-3 * moved


def test_the_rate_warms_up_and_falls(data, monkeypatch):
    dataset, means = data
    rates = []
    model = module(means, warmup=0.25)
    monkeypatch.setattr(
        BackwardCompatibleModule,
        "on_train_batch_start",
        lambda self, *_: rates.append(self.optimizers().param_groups[0]["lr"]),
    )
    trainer(4).fit(model, dataset.loader(64))
    assert len(rates) == 16
    assert rates.index(max(rates)) == 4
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 2e-4
    with pytest.raises(ValueError, match="warmup"):
        module(means, warmup=1.0)
    with pytest.raises(ValueError, match="learning_rate"):
        module(means, learning_rate=0.0)


def test_encoding_leaves_every_mode_as_it_was(data):
    model = module(torch.zeros(CLASSES, CLASSES))
    model.backbone.append(torch.nn.BatchNorm1d(CLASSES + 6).eval())
    model.encode(torch.randn(4, D))
    assert model.training
    assert model.backbone[0].training
    assert not model.backbone[-1].training
