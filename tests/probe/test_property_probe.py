"""Planted properties are found in their layer and rank, absent ones and those of the words are judged so."""

import numpy as np
import pytest
import torch

from subspan.edit import erase_subspace
from subspan.geometry import Subspace
from subspan.models import TextStates
from subspan.probe import PropertyProbe, property_subspace, target_of
from subspan.probe.linear_readings import filters_and_patterns, folds_of, read_by_rank, read_held_out, shuffled

N, D = 240, 20


def states_of(*layers, words=None):
    stacked = torch.stack(layers)
    return TextStates(stacked, stacked[0] if words is None else words, tuple(range(len(layers))), tuple(range(N)))


def noise(seed, d=D):
    return torch.randn(N, d, generator=torch.Generator().manual_seed(seed))


def planted(seed, labels, rank, size=3.0, d=D):
    """Noise whose class means lie in a random plane of `rank` dimensions, on a circle or a line."""
    space = Subspace.random(d, rank, generator=torch.Generator().manual_seed(99), dtype=torch.float32)
    angles = labels * 2 * torch.pi / (int(labels.max()) + 1)
    places = torch.stack([angles.cos(), angles.sin()], 1)[:, :2] if rank == 2 else (2.0 * labels - 1).unsqueeze(1)
    return noise(seed, d) + size * places.float() @ space.basis.mT, space


@pytest.mark.parametrize(("classes", "rank"), [(2, 1), (5, 2)])
def test_a_planted_property_is_found_in_its_layer_and_rank(classes, rank):
    labels = torch.arange(N) % classes
    middle, space = planted(2, labels, rank)
    weak, _ = planted(3, labels, rank, size=0.8)
    probe = PropertyProbe(random_state=0).fit(states_of(noise(0), noise(1), middle, weak), labels)
    assert (probe.verdict_, probe.layer_, probe.first_layer_, probe.last_layer_) == ("kept", 2, 2, 2)
    assert probe.rank_ == rank
    assert float(space.overlap(probe.subspace_.truncate(rank))) > 0.9
    assert float(space.overlap(probe.subspace_)) > 0.97
    assert probe.score_.value > 0.9
    assert probe.score_.low < probe.score_.value < probe.score_.high
    assert probe.chance_ == pytest.approx(1 / classes, abs=0.03)
    assert probe.shuffled_ == pytest.approx(1 / classes, abs=0.1)
    assert f"kept in layer 2, in {rank} dimension" in probe.reason_
    own = {row.rank: row for row in probe.ranks_}
    assert own[rank].score > own[rank].random + 0.15
    assert own[rank].score > own[rank].shuffled + 0.3
    assert own[16].score is None
    assert max(own) == 16
    # The mean coordinates of a class are where its states lie.
    name = probe.target_.names[0]
    expected = probe.subspace_.coordinates(middle[labels == 0].mean(0, keepdim=True))[0]
    assert torch.allclose(torch.tensor(probe.coordinates_[name]), expected, atol=1e-4)


def test_numbers_are_read_with_their_share_of_the_variance():
    values = noise(7)[:, 0]
    direction = torch.nn.functional.normalize(noise(8)[0], dim=0)
    layer = noise(2) + 2 * values.unsqueeze(1) * direction
    probe = PropertyProbe(numeric=True, random_state=0).fit(states_of(noise(0), layer), values)
    assert (probe.verdict_, probe.layer_, probe.rank_, probe.chance_) == ("kept", 1, 1, pytest.approx(0, abs=0.02))
    assert probe.score_.value == pytest.approx(0.8, abs=0.08)  # 4 of 4 + 1 parts of the variance along it
    slope = torch.tensor(probe.coordinates_["one standard deviation more"])
    moved = probe.subspace_.basis @ slope
    assert torch.allclose(moved, 2 * direction * values.std(), atol=0.5)


def test_what_is_in_the_words_is_not_the_models_own():
    labels = torch.arange(N) % 2
    words, _ = planted(2, labels, 1, size=2)
    again, _ = planted(4, labels, 1, size=2)
    for states in (states_of(noise(0), noise(1), again, words=words), states_of(words, again, words=noise(5))):
        probe = PropertyProbe(random_state=0).fit(states, labels)
        assert probe.verdict_ == "in the words"
        assert "not found beyond the words" in probe.reason_
        assert probe.words_.value > 0.9


@pytest.mark.parametrize("numeric", [False, True])
def test_an_absent_property_is_not_found_in_many_layers(numeric):
    """The best of thirty layers of noise looks good; the score of the finding does not follow it."""
    random = np.random.default_rng(5)
    values = random.normal(size=N) if numeric else random.integers(2, size=N)
    probe = PropertyProbe(numeric=numeric, random_state=0).fit(states_of(*map(noise, range(30))), values)
    assert probe.verdict_ == "not found"
    assert "no layer reads it above chance" in probe.reason_
    best = max(row.score for row in probe.layers_)
    assert numeric or best > probe.chance_ + 0.02
    assert probe.score_.value < best - 0.02


def test_erasing_the_subspace_brings_probes_to_chance():
    labels = torch.arange(N) % 5
    layer, _ = planted(2, labels, 2)
    loud = layer * torch.cat([torch.full((3,), 30.0), torch.ones(D - 3)])  # columns of very different size
    probe = PropertyProbe(random_state=0).fit(states_of(noise(0), loud), labels)
    # By another room, in the states that it was learnt from: all class means are one.
    erased = erase_subspace(probe.subspace_).map(loud)
    means = torch.stack([erased[labels == label].mean(0) for label in range(5)])
    assert float((means - means.mean(0)).abs().max()) < 1e-3
    assert PropertyProbe(random_state=0).fit(states_of(noise(0), erased), labels).verdict_ == "not found"
    other = target_of(np.where(np.arange(N) % 2, "odd", "even"))
    rows = probe.erased(loud, {"all": lambda *_: torch.zeros_like}, {"parity": other})
    found = {(row.name, row.way): row for row in rows}
    assert found["", "nothing"].score > 0.85
    assert found["", "nothing"].neighbours > found["", "all"].neighbours
    # Learnt from half as many texts, and tried on the others.
    assert found["", "subspace"].score < 0.45
    assert found["", "random subspace"].score > 0.65  # of 20 dimensions 8 are gone
    assert found["", "all"].score == pytest.approx(found["", "all"].chance)
    assert found["parity", "nothing"].score == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(("n", "d"), [(60, 12), (40, 90)])
def test_filters_solve_the_shrunk_equations_in_either_form(n, d):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator) * torch.linspace(0.1, 5, d) + 3
    target = target_of(torch.arange(n).remainder(3).numpy())
    filters, patterns = filters_and_patterns(x, target, 0.3)
    centred = x.double() - x.double().mean(0)
    covariance = centred.mT @ centred / n
    shrunk = 0.7 * covariance + 0.3 * torch.diag(covariance.diagonal())
    y = target.columns() - target.columns().mean(0)
    expected = torch.linalg.solve(shrunk, centred.mT @ y / n)
    spans = [Subspace.span(each) for each in (filters, expected[:, :2])]
    assert filters.shape == patterns.shape == (d, 2)
    assert float(spans[0].angles(spans[1]).max()) < 1e-3
    means = torch.stack([centred[target.values == code].mean(0) for code in range(3)], 1)
    assert float(Subspace.span(means, tolerance=1e-9).angles(Subspace(patterns)).max()) < 1e-6
    space = property_subspace(x, target, 0.3)
    assert float(space.to(torch.float64).residual(means.mT + x.double().mean(0)).abs().max()) < 1e-4


def test_readings_are_those_of_each_layer_and_target_alone_and_learn_nothing_from_the_rows_held_out():
    labels = torch.arange(N) % 3
    layers = torch.stack([planted(seed, labels, 2, size=1)[0] for seed in range(3)])
    target = target_of(labels)
    random = np.random.RandomState(0)
    folds, other = folds_of(target, 4, random), shuffled(target, random)
    assert torch.equal(other.values.sort().values, target.values.sort().values)
    together = read_held_out(layers, [target, other], folds, shrinkages=[0.3], layers_at_once=2)
    for layer in range(3):
        for row, each in enumerate((target, other)):
            alone = read_held_out(layers[layer : layer + 1], [each], folds, shrinkages=[0.3])
            assert torch.equal(together.losses[row, layer], alone.losses[0, 0])
    by_rank = read_by_rank(layers[1], target, folds, [1, 2], 0.3)
    assert torch.equal(by_rank[1], together.losses[0, 1])
    # Labels of held-out rows change nothing but their own losses.
    learnt, held = folds.split(1)
    changed = target_of(labels)
    changed.values[held] = (changed.values[held] + 1) % 3
    again = read_held_out(layers, [changed], folds, shrinkages=[0.3])
    assert not bool(((together.losses[0][:, held] == 0) & (again.losses[0][:, held] == 0)).any())
    assert len(learnt) + len(held) == N


def test_folds_hold_like_shares_of_every_class():
    target = target_of(np.repeat(["a", "b", "c"], [100, 33, 7]))
    folds = folds_of(target, 5, np.random.RandomState(1))
    counts = torch.stack([torch.bincount(target.values[folds.part == number], minlength=3) for number in range(5)])
    assert int((counts.max(0).values - counts.min(0).values).max()) <= 2
    assert counts[:, 2].min() >= 1


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (["a"] * N, {}, "all are 'a'"),
        (["a"] * (N - 3) + ["b"] * 3, {}, "fewer have 'b' \\(3\\)"),
        ([0, 1], {}, f"{N} are needed, one a text, got 2"),
        ([1.0] * N, {"numeric": True}, "all are 1"),
        ([*np.arange(N - 1.0), np.nan], {"numeric": True}, "finite"),
        (np.arange(N) % 2, {"folds": 1}, "folds: at least 2"),
        (np.arange(N) % 2, {"draws": 0}, "draws"),
    ],
)
def test_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        PropertyProbe(**options).fit(states_of(noise(0), noise(1)), values)


def test_states_that_are_not_finite_are_refused():
    broken = noise(0)
    broken[3, 4] = torch.nan
    with pytest.raises(ValueError, match="states"):
        PropertyProbe().fit(states_of(broken), np.arange(N) % 2)


def test_erasing_is_tried_on_other_texts_and_neighbours_only_where_classes_have_some():
    labels = torch.arange(N) % 2
    layer, _ = planted(2, labels, 1)
    probe = PropertyProbe(random_state=0).fit(states_of(noise(0), layer), labels)
    other = target_of(["rare" if place < 2 else "common" for place in range(N)])
    apart = []

    def watching(rows, target):
        def unchanged(tried):
            apart.append(len(rows) == len(target) and not bool((rows.unsqueeze(1) == tried).all(2).any()))
            return tried

        return unchanged

    read = probe.erased(layer, {"watched": watching}, {"other": other})
    assert apart == [True, True]  # learnt on one half, tried on the other
    found = {(row.name, row.way): row.neighbours for row in read}
    assert found["other", "nothing"] is None
    assert found["", "nothing"] > 0.7
