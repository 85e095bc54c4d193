"""Probes read what was planted and nothing else; code lengths are those of the formula at both ends."""

import numpy as np
import pytest
import torch

from subspan.geometry import Blocks
from subspan.measures import leakage, make_probe, online_code_length, probe_score

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(3, size=600)
ROWS = RANDOM.standard_normal((600, 6))
ROWS[:, 0] += 6 * (LABELS == 0)
ROWS[:, 1] += 6 * (LABELS == 1)


@pytest.mark.parametrize("kind", ["logistic", "ridge", "knn", "centroid"])
def test_probes_read_planted_labels_and_no_others(kind):
    names = np.array(["a", "b", "c"])[LABELS]
    found = probe_score(ROWS, names, kind=kind)
    assert found.score > 0.88
    assert 0.25 < found.chance < 0.45
    assert abs(probe_score(ROWS[:, 3:], names, kind=kind).score - 1 / 3) < 0.1
    given = probe_score(torch.from_numpy(ROWS[:400]), LABELS[:400], kind=kind, test=(ROWS[400:], LABELS[400:]))
    assert given.score == make_probe(kind).fit(ROWS[:400], LABELS[:400]).score(ROWS[400:], LABELS[400:])
    assert given.chance == (LABELS[400:] == np.bincount(LABELS[:400]).argmax()).mean()


def test_neighbours_of_a_probe_are_near_in_angle():
    # Along two directions at any distance from the origin: by distance the short rows of both lie together.
    rows = np.array([[1.0, 0.1], [0.1, 1.0]])[np.arange(200) % 2] * np.geomspace(1e-3, 1e3, 200)[:, None]
    given = {"kind": "knn", "test": (rows[::-1] * 1e-4, np.arange(200)[::-1] % 2)}
    assert probe_score(rows, np.arange(200) % 2, **given).score == 1
    assert probe_score(rows, np.arange(200) % 2, **given, metric="euclidean").score < 0.8


def test_regression_scores_numbers():
    target = ROWS[:, 2] * 3 - 1
    assert probe_score(ROWS, target, kind="regression").score > 0.99
    assert probe_score(ROWS[:, :2], target, kind="regression").score < 0.05


def test_a_planted_copy_leaks_and_independent_parts_do_not():
    other = RANDOM.integers(2, size=600)
    latents = np.column_stack([RANDOM.standard_normal((600, 3)), LABELS == 0, LABELS == 1, other])
    found = leakage(Blocks({"s": 3, "t": 2, "u": 1}).split(latents), {"label": LABELS, "other": other})
    assert found["t"]["label"].score > 0.97
    assert found["u"]["other"].score > 0.97
    for part, factor in (("s", "label"), ("s", "other"), ("t", "other"), ("u", "label")):
        assert abs(found[part][factor].score - found[part][factor].chance) < 0.12


@pytest.mark.parametrize("kind", ["logistic", "knn"])
def test_code_lengths_of_labels_that_can_and_cannot_be_read(kind):
    easy = online_code_length(ROWS, LABELS, kind=kind)
    hard = online_code_length(ROWS, RANDOM.integers(3, size=600), kind=kind)
    assert easy.uniform == hard.uniform == pytest.approx(600 * np.log2(3))
    assert easy.compression > 3
    assert easy.compression == pytest.approx(easy.uniform / easy.bits)
    assert 0.75 < hard.compression < 1.02


def test_a_code_of_one_block_is_uniform_and_one_of_two_is_by_hand():
    assert online_code_length(ROWS, LABELS, fractions=(1.0,)).compression == 1
    found = online_code_length(ROWS, LABELS, fractions=(0.5, 1.0), random_state=4)
    order = np.random.RandomState(4).permutation(600)
    first, second = order[:300], order[300:]
    chance = make_probe().fit(ROWS[first], LABELS[first]).predict_proba(ROWS[second])
    own = (300 * chance[np.arange(300), LABELS[second]] + 1) / 303
    assert found.bits == pytest.approx(300 * np.log2(3) - np.log2(own).sum())
    # A class that is first met late costs what one count among n + classes does.
    labels = np.arange(4) == np.random.RandomState(0).permutation(4)[-1]
    late = online_code_length(np.ones((4, 1)), labels, fractions=(0.5, 0.75, 1.0), random_state=0)
    assert late.bits == pytest.approx(2 + np.log2(4 / 3) + np.log2(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probe_score(ROWS, LABELS[:5]), "600"),
        (lambda: probe_score(ROWS, np.zeros(600)), "same"),
        (lambda: probe_score(ROWS * np.nan, LABELS), "x"),
        (lambda: probe_score(ROWS, ROWS[:, 0] * np.inf, kind="regression"), "NaN or infinity"),
        (lambda: probe_score(ROWS, LABELS, kind="svm"), "'svm'"),
        (lambda: online_code_length(ROWS, LABELS, kind="ridge"), "probabilities"),
        (lambda: online_code_length(ROWS, LABELS, fractions=(0.5, 0.2, 1.0)), "ascend"),
        (lambda: online_code_length(ROWS, np.ones(600)), "same"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
