"""Two embeddings of the same rows: maps are judged on rows they have not seen, and the verdict follows the numbers."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from subspan.base import silent
from subspan.commands import describe
from subspan.commands.comparison import fit_map, paired
from subspan.commands.switching import verdict_of_maps
from subspan.datasets import Rows
from subspan.report import render


def embeddings(rows: np.ndarray, name: str = "old", **known: Any) -> Rows:
    return Rows(rows, name=name, argument=f"{name}.npy", **known)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    old = rng.normal(size=(800, 16)) * np.linspace(2, 0.5, 16) + 1
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    return old, old @ turn + 0.01 * rng.normal(size=old.shape)


def test_a_rotation_is_a_yes(pair: tuple[np.ndarray, np.ndarray]) -> None:
    old, new = pair
    found = describe(embeddings(old), embeddings(new, "new"))["against"]
    assert found["cka"] == pytest.approx(1.0, abs=1e-3)
    assert found["shared_dimensions"]["count"] == 16
    assert found["retrieval"]["Procrustes"]["recall@1"]["value"] > 0.99
    assert found["retrieval"]["no map"]["recall@10"]["value"] < 0.3
    assert found["verdict"]["answer"] == "yes"
    assert found["verdict"]["method"] in ("procrustes", "ridge", "cca")
    assert found["rows_fitted"] == found["rows_held_out"] == 400


def test_unrelated_rows_are_a_no() -> None:
    rng = np.random.default_rng(1)
    found = describe(embeddings(rng.normal(size=(400, 12))), embeddings(rng.normal(size=(400, 20)), "new"))["against"]
    assert found["verdict"]["answer"] == "no"
    # With 200 held-out rows and 10 looked at, chance finds 5 %.
    assert found["retrieval"]["affine (ridge)"]["recall@10"]["value"] < 0.15
    assert abs(np.array(found["canonical_correlations"])).max() < 0.5
    assert "CCA-projected" not in found["retrieval"]


def test_unrelated_wide_rows_are_not_called_alike() -> None:
    rng = np.random.default_rng(1)
    pair = [embeddings(rng.normal(size=(120, 384)).astype(np.float32), name) for name in ("old", "new")]
    facts = describe(*pair)
    found = facts["against"]
    assert found["cka"] > 0.8
    assert found["cka_by_chance"] == pytest.approx(found["cka"], abs=0.02)
    assert abs(found["cka_debiased"]) < 0.05
    assert found["neighbours_in_common"]["chance"] == pytest.approx(10 / 59)
    assert found["neighbours_in_common"]["share"] == pytest.approx(10 / 59, abs=0.05)
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", render(facts, pair[0])))
    assert f"paired at random would reach {found['cka_by_chance']:.2f}, without that chance it is" in text
    assert "by chance)" in text
    _, aligned = fit_map(*pair, "procrustes", seed=0, progress=silent)
    assert aligned["cka_by_chance"] == pytest.approx(found["cka_by_chance"], abs=0.02)


def test_shared_part_of_two_spaces_is_counted() -> None:
    rng = np.random.default_rng(2)
    common = rng.normal(size=(2000, 5))
    old = np.concatenate([common, rng.normal(size=(2000, 6))], axis=1)
    new = np.concatenate([common @ rng.normal(size=(5, 5)), rng.normal(size=(2000, 9))], axis=1)
    found = describe(embeddings(old), embeddings(new, "new"))["against"]
    assert found["shared_dimensions"] == {"count": 5, "of": 11, "correlation_above": 0.5}


def test_rows_are_paired_by_id() -> None:
    rng = np.random.default_rng(0)
    rows, order = rng.normal(size=(40, 6)), rng.permutation(40)
    ids = [f"row-{i}" for i in range(40)]
    old = embeddings(rows, ids=ids)
    shuffled = embeddings(rows[order], "new", ids=[ids[i] for i in order])
    assert np.array_equal(paired(old, shuffled)[1].array(), rows)
    same = embeddings(rows, "new", ids=ids)
    assert paired(old, same)[1] is same


@pytest.mark.parametrize("named", [True, False])
def test_rows_left_out_of_one_are_left_out_of_both(named: bool) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 6))
    whole = embeddings(rows, ids=[f"r{i}" for i in range(40)] if named else None)
    first, second = np.delete(np.arange(40), 7), np.delete(np.arange(40), [2, 9])
    one = dataclasses.replace(whole.subset(first), dropped=1)
    two = dataclasses.replace(whole.subset(second), dropped=2, name="new")
    common = np.delete(np.arange(40), [2, 7, 9])
    for left, right, kept in ((one, two, common), (two, one, common), (whole, one, first), (two, whole, second)):
        pair = paired(left, right)
        assert all(np.array_equal(part.array(), rows[kept]) for part in pair)
    with pytest.raises(ValueError, match="has 40 rows"):
        paired(dataclasses.replace(one if named else one.named(None), dropped=0), whole)


@pytest.mark.parametrize(
    ("rows", "ids", "message"),
    [
        (39, None, "has 39 rows, old has 40"),
        (40, [f"r{i}" for i in range(1, 41)], "39 ids in common; 'r0' is missing"),
        (41, [f"r{i}" for i in range(41)], "has 41 rows, old 40"),
        (40, ["same"] * 40, "not unique"),
    ],
)
def test_other_rows_are_refused(rows: int, ids: list[str] | None, message: str) -> None:
    old = embeddings(np.random.default_rng(0).normal(size=(40, 6)), ids=[f"r{i}" for i in range(40)] if ids else None)
    other = embeddings(np.random.default_rng(1).normal(size=(rows, 6)), "new", ids=ids)
    with pytest.raises(ValueError, match=message):
        paired(old, other)


def test_fit_map_judges_on_the_other_half_and_fits_on_all(pair: tuple[np.ndarray, np.ndarray]) -> None:
    old, new = pair
    fitted, facts = fit_map(embeddings(old), embeddings(new, "new"), "procrustes", seed=0, progress=silent)
    assert facts["rows_fitted"] == facts["rows_held_out"] == 400
    assert facts["held_out"]["procrustes"]["recall@10"]["value"] > 0.99
    assert fitted.moments_.count == 800


def _retrieval(found: float, kept: float) -> dict[str, Any]:
    def entry(value: float) -> dict[str, Any]:
        return {"value": value, "share": value, "interval": [value - 0.01, value + 0.01]}

    low = {"recall@1": entry(0.0), "recall@10": entry(0.0), "neighbours_kept": entry(0.0)}
    best = {"recall@1": entry(0.5), "recall@10": entry(found), "neighbours_kept": entry(kept)}
    return {"no map": {**low, "neighbours_kept": entry(1.0)}, "Procrustes": low, "affine (ridge)": best}


@pytest.mark.parametrize(
    ("found", "kept", "answer"),
    [
        (0.97, 0.92, "yes"),
        (0.97, 0.905, "as a bridge"),
        (0.955, 0.95, "as a bridge"),  # the interval's lower end is what counts
        (0.97, 0.7, "as a bridge"),
        (0.97, 0.4, "no"),
        (0.6, 0.85, "no"),
    ],
)
def test_verdict_follows_its_bars(found: float, kept: float, answer: str) -> None:
    decided = verdict_of_maps(_retrieval(found, kept))
    assert decided["answer"] == answer
    assert decided["map"] == "affine (ridge)"
