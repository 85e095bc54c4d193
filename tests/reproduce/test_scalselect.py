"""The parts of ScalSelect's protocol, and the protocol in small."""

import email
from pathlib import Path

import numpy as np
import pytest

from subspan.datasets import stdlib_docstrings
from subspan.reproduce import scalselect
from subspan.select import LeverageSelector


def test_without_a_data_folder_the_pool_is_the_standard_library(monkeypatch):
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)
    # One package of the library instead of all of it, to be quick.
    part = stdlib_docstrings(folder=Path(email.__file__).parent)
    monkeypatch.setattr(scalselect, "stdlib_docstrings", lambda: part)
    source, train, test, instructions = scalselect._records(np.random.default_rng(0), 60, 30)
    assert source == "docstrings of the standard library"
    assert (len(train), len(test), len(instructions)) == (60, 30, 3)
    sample = scalselect._sample(train[0], instructions, 1)
    asked, answer = sample.messages
    assert [part["type"] for part in asked["content"]] == ["context", "text"]
    assert asked["content"][0]["text"] == train[0]["text"].strip()
    assert answer["content"] in ("yes", "no")


def test_answers_are_read_off_the_text():
    record = {"text": "Shares fell 3 percent on Tuesday.", "label": "Business"}
    plain = {"text": "A mondayish tale.", "label": "World"}
    assert [scalselect._sample(record, scalselect.NEWS, kind).answer for kind in range(3)] == ["Business", "yes", "yes"]
    assert [scalselect._sample(plain, scalselect.NEWS, kind).answer for kind in range(3)] == ["World", "no", "no"]


def test_parity_notices_another_ranking():
    rows = np.random.default_rng(0).normal(size=(80, 10)).astype(np.float32)
    scores = LeverageSelector().fit(rows).scores_
    assert all(check.holds for check in scalselect.parity(rows, scores, 12))
    assert not any(check.holds for check in scalselect.parity(rows, scores[::-1], 12))
    assert [check.holds for check in scalselect.parity(rows, scores + 1e-6, 12)] == [False, True]


def test_collapse_needs_a_mean_that_is_large_against_the_spread():
    rows = np.random.default_rng(1).normal(size=(200, 30))
    k = LeverageSelector().fit(rows).k_
    for shift, expected in ((20, True), (0, False)):
        found = scalselect.collapse(LeverageSelector(center=False).fit(rows + shift), k)
        assert [check.holds for check in found] == [expected] * 2


@pytest.mark.long
def test_scaling_reads_the_same_rows_in_both_passes():
    source = scalselect._Synthetic(4000, 8)
    first, second = ([batch.clone() for batch in source] for _ in range(2))
    assert sum(len(batch) for batch in first) == 4000
    assert all((a == b).all() for a, b in zip(first, second))


@pytest.mark.slow
def test_scaling_is_measured_in_processes_of_their_own():
    table, ratio, growth = scalselect._scaling((2000, 4000), 8)
    assert [row[0] for row in table.rows] == [2000, 4000]
    assert ratio > 0
    assert abs(growth) < 32


def test_the_probe_learns_separable_classes():
    random = np.random.default_rng(2)
    x = np.repeat(4 * np.eye(3), 40, axis=0) + random.normal(size=(120, 3))
    y = np.repeat(list("abc"), 40)
    penalty = scalselect._penalty(x, y, 0)
    assert penalty in (0.001, 0.01, 0.1, 1.0)
    assert scalselect._probe(penalty).fit(x, y).score(x, y) > 0.95
