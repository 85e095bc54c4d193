"""A model that is trained to be compatible with an older one, and its two spaces."""

import copy

import pytest
import torch
from torch.nn import functional as F

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


def module(means):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(D, 32), torch.nn.ReLU(), torch.nn.Linear(32, CLASSES + 6))
    head = BT2Head(CLASSES + 6, CLASSES, 6, 2, num_classes=CLASSES)
    return BackwardCompatibleModule(backbone, head, BT2Loss(means))


@pytest.fixture(scope="module")
def data():
    inputs, labels, old, new = generation()
    return TeacherDataset(inputs, labels, old, new), old_class_means(old, labels)


def trainer(epochs, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, **(quiet | {"enable_checkpointing": False} | options))


def test_training_makes_the_new_model_searchable_in_the_old_gallery_and_better_than_it(data, tmp_path):
    dataset, means = data
    model = module(means)
    before = copy.deepcopy(model)
    trainer(15).fit(model.objective(learning_rate=1e-2), dataset.loader(64))
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


def test_encoding_leaves_every_mode_as_it_was(data):
    model = module(torch.zeros(CLASSES, CLASSES))
    model.backbone.append(torch.nn.BatchNorm1d(CLASSES + 6).eval())
    model.encode(torch.randn(4, D))
    assert model.training
    assert model.backbone[0].training
    assert not model.backbone[-1].training
