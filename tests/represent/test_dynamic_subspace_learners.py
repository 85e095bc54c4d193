"""Learners whose number grows, on rows with two attributes, and maps with a place to look at."""

import numpy as np
import pytest
import torch

from subspan.edit import SpectralSteering
from subspan.represent import DynamicSubspaceLearners
from subspan.represent.learner_growth import GrowthController
from subspan.represent.learner_training import LearnerEpochs, LearnerNetwork

pytest.importorskip("lightning")
QUICK = {"out_dim": 16, "epochs": 12, "final_epochs": 2, "learning_rate": 1e-2, "random_state": 0}


def two_attributes(n=192):
    """Rows of two groups, far apart; in each the classes differ in a block of three coordinates of its own."""
    generator = np.random.default_rng(0)
    group, value = np.arange(n) % 2, np.arange(n) // 2 % 3
    x = 0.6 * generator.normal(size=(n, 8))
    x[:, 0] += np.where(group, 6, -6)
    first = np.where(group, 4, 1)
    x[np.arange(n), first + value] += 3
    return x, 3 * group + value


def test_learners_read_the_attribute_of_their_rows():
    x, y = two_attributes()
    model = DynamicSubspaceLearners(n_learners=2, weight_decay=0.01, **QUICK).fit(x, y)
    assert model.blocks_.sizes == {"0": 8, "1": 8}
    # The clusters are the groups, and each learner has one.
    assert all(len(set(model.learner_of_[y // 3 == group])) == 1 for group in (0, 1))
    assert model.losses_[-1] < model.losses_[0]
    for group in (0, 1):
        learner = int(model.learner_of_[y // 3 == group][0])
        z = model.transform(x, learners=[learner])
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-6)
        means = np.stack([z[y == 3 * group + value].mean(0) for value in range(3)])
        inside = z[y // 3 == group]
        right = ((inside[:, None] - means) ** 2).sum(-1).argmin(1) == y[y // 3 == group] % 3
        assert right.mean() > 0.9
    assert model.separation(x).angle > 0
    # What another room does with a learner: prototypes of the classes are steered in what it reads.
    rows = torch.from_numpy(x)
    means = torch.stack([rows[torch.from_numpy(y) == c].mean(0) for c in range(6)])
    steering = SpectralSteering(means, 10.0, subspace=model.subspaces_[1].truncate(3), keep=0.5)
    assert steering.explain(rows[:8]).coefficients.shape == (1, 3)


def test_it_grows_and_keeps_a_history():
    x, y = two_attributes()
    options = {**QUICK, "epochs": 8, "patience": 1, "max_learners": 2, "top_share": 0.5}
    model = DynamicSubspaceLearners(**options).fit(x, y)
    assert model.n_learners_ == 2
    counts = [learners for _, learners in model.growth_history_]
    assert len(counts) == 6
    assert counts[0] == 1
    assert counts[-1] == 2
    assert (model.learner_of_ == -1).mean() == pytest.approx(0.2, abs=0.05)
    assert set(model.learner_of_) == {-1, 0, 1}
    assert sum(model.blocks_.sizes.values()) == 16
    by_chance = DynamicSubspaceLearners(growth="random", **options).fit(x, y)
    assert by_chance.n_learners_ == 2
    assert by_chance.growth_history_[0] == model.growth_history_[0]
    assert not np.allclose(by_chance.transform(x), model.transform(x))


def epochs(x, y, learners=1, policy=None, **options):
    network = LearnerNetwork(torch.as_tensor(x).float(), 16, n_learners=learners)
    given = {"by_chance": False, "validation": 0.2, "epochs": 3, "recluster": 2, "batch_size": 8, "per_class": 4}
    random = np.random.RandomState(0)
    return LearnerEpochs(
        network, torch.as_tensor(x).float(), torch.as_tensor(y), policy=policy, random=random, **{**given, **options}
    )


def test_clusters_take_turns_and_batches_are_balanced():
    x, y = two_attributes(96)
    small = np.r_[np.flatnonzero(y < 3), np.flatnonzero(y >= 3)[:24]]  # groups of 48 and of 24
    loader = epochs(x[small], y[small], learners=2)
    batches = list(loader)
    assert [learner for _, _, learner in batches] == [0, 1] * (len(batches) // 2)
    assert len(batches) == 2 * 6  # the larger has 48 / 8; the smaller starts again
    for items, labels, learner in batches:
        assert labels.bincount()[labels.unique()].tolist() == [4, 4]
        assert len({int(label) // 3 for label in labels}) == 1
        assert items.shape == (8, 8)
        assert learner in (0, 1)
    list(loader)
    list(loader)
    assert {learner for _, _, learner in loader} == {-1}  # the last epochs are of all


def test_a_cluster_of_one_class_gives_no_batch():
    x = np.r_[np.tile([5.0, 0.0], (12, 1)), np.tile([0.0, 5.0], (12, 1))] + 0.1 * np.random.default_rng(0).normal(
        size=(24, 2)
    )
    y = np.r_[np.zeros(12, int), np.arange(12) % 2 + 1]
    loader = epochs(x, y, learners=2)
    found = list(loader)
    assert loader.skipped == 1
    assert len({learner for _, _, learner in found}) == 1


def test_nothing_grows_where_all_neurons_are_alike():
    x, y = two_attributes(48)
    loader = epochs(x, y, policy=GrowthController(patience=1))
    for _ in range(4):
        list(loader)  # no backward pass: importances are zero
    assert [learners for _, learners in loader.history] == [1, 1, 1]


def test_attention_finds_where_the_class_is():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 4
    maps = torch.randn(96, 8, 5, 5, generator=generator)
    place = torch.randint(0, 25, (96,), generator=generator)
    maps.flatten(2)[torch.arange(96), y, place] += 8
    options = {**QUICK, "n_learners": 1, "epochs": 15}
    model = DynamicSubspaceLearners(**options).fit(maps, y)
    attention = model.attention(maps).flatten(1)
    there = attention[torch.arange(96), place]
    assert float(there.mean()) > 1.2 * float(attention.mean())
    assert model.transform(maps).shape == (96, 16)
    with pytest.raises(ValueError, match="as in fit"):
        model.transform(maps[:, :, :4])
    with pytest.raises(ValueError, match="fitted to vectors"):
        DynamicSubspaceLearners(**{**options, "epochs": 2}).fit(maps.mean((2, 3)), y).attention(maps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 30}, "batch_size: must be a multiple of per_class = 8"),
        ({"batch_size": 8}, "batch_size: 2 items of 2 classes"),
        ({"epochs": 3, "final_epochs": 4}, "final_epochs: must be at most epochs"),
        ({"out_dim": 4, "n_learners": 3}, "n_learners: slices need at least 2 of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicSubspaceLearners(**options).fit(*two_attributes(48))


def test_a_class_of_one_item_is_named():
    x, y = two_attributes(48)
    names = np.array([f"class {each}" for each in y])
    names[0] = "alone"
    with pytest.raises(ValueError, match="class 'alone' has 1 item"):
        DynamicSubspaceLearners(**QUICK).fit(x, names)
