"""Tasks, memory and replacement of models under the fixed simplex."""

import pytest
import torch
from torch.utils.data import TensorDataset

pytest.importorskip("lightning", reason="StationaryModule trains with Lightning (extra: train)")

from lightning import Trainer

from subspan.align import BalancedBatches, Rehearsal, StationaryModule, make_stationary
from subspan.nn import SimplexClassifier

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*no negatives")

CENTERS = 3 * torch.randn(8, 10, generator=torch.Generator().manual_seed(7))


def task(classes, n=24, seed=0):
    labels = torch.tensor(classes).repeat_interleave(n)
    noise = torch.randn(len(labels), 10, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(CENTERS[labels] + 0.5 * noise, labels), labels


def backbone(seed=0, width=15):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, width))


def fit(module, data, labels, epochs=30, learning_rate=0.02):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, **quiet)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer.fit(module.objective(learning_rate=learning_rate), module.loader(data, labels))


def test_balanced_batches_are_half_memory_and_cover_what_is_new():
    sampler = BalancedBatches(50, 7, 16)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 7
    assert sorted(row for batch in batches for row in batch if row < 50) == list(range(50))
    for batch in batches:
        assert sum(row >= 50 for row in batch) == sum(row < 50 for row in batch)
    remembered = [row for batch in batches for row in batch if row >= 50]
    counts = torch.bincount(torch.tensor(remembered) - 50)
    assert int(counts.max()) - int(counts.min()) <= 1
    alone = list(BalancedBatches(10, 0, 4))
    assert [len(batch) for batch in alone] == [4, 4, 2]


def test_processes_share_the_batches(monkeypatch):
    whole = list(BalancedBatches(50, 7, 16))
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr("subspan.align.compatible.stationary_simplex._process", lambda rank=rank: (rank, 2))
        sampler = BalancedBatches(50, 7, 16)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == 4
    assert [batch for pair in zip(*parts) for batch in pair][:7] == whole
    assert parts[1][-1] == whole[0]


def test_the_memory_keeps_so_many_of_every_class_once():
    memory = Rehearsal(5)
    data, labels = task([0, 1])
    memory.remember(data, labels)
    memory.remember(*task([1, 2], n=3, seed=1))
    kept = [int(memory.joined(data)[len(data) + i][1]) for i in range(len(memory))]
    assert sorted(kept) == [0] * 5 + [1] * 5 + [2] * 3
    assert len(memory.joined(data)) == len(data) + 13


def test_the_teacher_is_the_model_that_the_task_starts_from():
    module = StationaryModule(backbone(), SimplexClassifier(4, preallocated=16), batch_size=16)
    data, labels = task([0, 1, 2, 3])
    module.start_task(4)
    assert module.teacher is None
    fit(module, data, labels, epochs=2, learning_rate=0.05)
    module.end_task(data, labels)
    module.start_task(5)
    start = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    fit(module, *task([4]), epochs=2)
    for name, value in module.teacher["backbone"].state_dict().items():
        assert torch.equal(value, start[name])
    assert not torch.equal(module.backbone[0].weight, start["0.weight"])
    other = backbone(5)
    module.start_task(6, replace_with=other)
    assert torch.equal(module.teacher["backbone"][0].weight, other[0].weight)
    assert torch.equal(module.backbone[0].weight, other[0].weight)
    assert module.backbone is not other
    assert not module.train().teacher["backbone"].training
    assert module.tasks == 3
    fit(module, *task([5]), epochs=1)
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())


def test_an_untrained_start_teaches_nothing():
    """The published share of cross entropy would hold the first task to where its random weights put the classes."""
    module = StationaryModule(backbone(), SimplexClassifier(4, preallocated=16), batch_size=16)
    module.start_task(4)
    fit(module, *task([0, 1, 2, 3]), epochs=20)
    data, labels = task([0, 1, 2, 3], seed=9)
    with torch.no_grad():
        found = module.head.logits(module.embed(data.tensors[0])).argmax(1)
    assert float((found == labels).double().mean()) > 0.9


def test_embeddings_of_a_model_in_training_are_those_that_it_will_be_searched_by():
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(10), torch.nn.Linear(10, 15), torch.nn.Dropout(0.5))
    module = StationaryModule(network, SimplexClassifier(3, preallocated=16)).train()
    x = task([0, 1, 2])[0].tensors[0]
    statistics = network[0].running_mean.clone()
    with torch.no_grad():
        found = module(x)
        assert module.training
        assert network[2].training
        torch.testing.assert_close(module(x[:1]), found[:1])
        torch.testing.assert_close(found, torch.nn.functional.normalize(module.eval().embed(x), dim=1))
    assert torch.equal(network[0].running_mean, statistics)


def test_replaced_models_of_another_width_stay_comparable():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        # A head of another width has a layer to learn, which is drawn here.
        head = SimplexClassifier(4, 6, preallocated=16, index="back")
    elsewhere = StationaryModule(backbone(3, width=6), head, batch_size=16)
    elsewhere.loss.lam = 1.0
    data, labels = task([0, 1, 2, 3], seed=3)
    elsewhere.start_task(4)
    fit(elsewhere, data, labels, epochs=60)
    here = StationaryModule(backbone(4), SimplexClassifier(4, preallocated=16, index="back"), lam=1.0, batch_size=16)
    here.start_task(4)
    fit(here, data, labels, epochs=60)
    old = here(data.tensors[0]).detach()
    here.end_task(data, labels)
    here.start_task(4, replace_with=(elsewhere.backbone, elsewhere.head))
    new = here(data.tensors[0]).detach()
    assert new.shape == old.shape
    means = [torch.stack([z[labels == c].mean(0) for c in range(4)]) for z in (old, new)]
    cross = torch.nn.functional.normalize(means[1], dim=1) @ torch.nn.functional.normalize(means[0], dim=1).mT
    assert cross.argmax(1).tolist() == [0, 1, 2, 3]
    # Sixty epochs bring every class near its vertex, and nearer to it than to that of any other class.
    others = cross.masked_fill(torch.eye(4, dtype=torch.bool), -1)
    assert float(cross.diagonal().min()) > 0.5
    assert float((cross.diagonal() - others.amax(1)).min()) > 0.1
    with pytest.raises(ValueError, match="vertices"):
        here.start_task(4, replace_with=(backbone(), SimplexClassifier(4, preallocated=8)))


def test_labels_without_a_vertex_are_refused_before_training():
    module = StationaryModule(backbone(), SimplexClassifier(2, preallocated=16))
    with pytest.raises(ValueError, match="labels"):
        module.loader(*task([0, 5]))


def test_a_model_is_made_stationary_in_place():
    model = torch.nn.Sequential()
    model.add_module("features", torch.nn.Linear(4, 6))
    model.add_module("classifier", torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(6, 5)))
    head = make_stationary(model, "classifier.1", 5, preallocated=32)
    assert model.classifier[1] is head
    assert model(torch.zeros(2, 4)).shape == (2, 32)
    assert "classifier.1.projection.weight" in model.state_dict()
    with pytest.raises(ValueError, match=r"'fc'.*features"):
        make_stationary(model, "fc", 5)
    with pytest.raises(ValueError, match="Dropout"):
        make_stationary(model, "classifier.0", 5)


def test_a_replacement_is_trained_but_for_its_frozen_parts():
    module = StationaryModule(backbone(), SimplexClassifier(2, preallocated=16))
    whole, partly = backbone(1).requires_grad_(False), backbone(2)
    partly[0].requires_grad_(False)
    module.start_task(2, whole)
    assert all(parameter.requires_grad for parameter in module.backbone.parameters())
    module.start_task(3, partly)
    assert [p.requires_grad for p in module.backbone.parameters()] == [False, False, True, True]
