"""Arms under seeds: what is run, in which order, and what is said about it."""

from __future__ import annotations

import numpy as np
import pytest

from subspan.reproduce import Column, Trials, spread


def test_trials_run_every_arm_under_every_seed_in_order() -> None:
    asked, said = [], []

    def measure(arm: str, seed: int) -> dict[str, float]:
        asked.append((arm, seed))
        return {"x": seed + (arm == "b"), **({"only": 1.0} if arm == "b" else {})}

    trials = Trials("ab", range(3, 6), measure, progress=lambda what, part: said.append((what, part)), span=(0.5, 1))
    assert asked == [(arm, seed) for seed in (3, 4, 5) for arm in "ab"]
    assert said[:2] == [("a, seed 3", 0.5), ("b, seed 3", 0.5 + 0.5 / 6)]
    assert trials.values("a", "x") == [3, 4, 5]
    assert trials.means("x") == {"a": 4, "b": 5}
    assert trials.means("only") == {"b": 1}
    assert trials.means("x", but="a", of=max) == {"b": 6}
    assert trials.gap("a", "b", "x") == -1


def test_gaps_are_paired_by_seed() -> None:
    table = {"a": [1.0, 5.0, 3.0], "b": [0.0, 2.0, 3.5]}
    trials = Trials(table, range(3), lambda arm, seed: table[arm][seed])
    assert trials.gap("a", "b", of=min) == -0.5
    assert trials.gap("a", "b", of=max) == 3
    assert trials.gap("a", "b") == pytest.approx(3.5 / 3)
    low, high = trials.interval("a", "b")
    assert (low, high) == (-0.5, 3)
    with pytest.raises(ValueError, match="at least 2"):
        Trials("ab", [0], lambda arm, seed: 0.0).interval("a", "b")


def test_arms_that_are_left_out_have_no_row_and_tables_are_rounded() -> None:
    arms = [("SimVQ", 8), ("plain", 8), ("plain", 9)]
    trials = Trials(
        arms, range(2), lambda arm, seed: {"x": arm[1] + seed / 3}, where=lambda arm, seed: arm != ("plain", 9)
    )
    columns = {"size": {arms[0]: 4}, **spread("x"), "whole": Column("x", np.mean, 0), "none": "y"}
    found = trials.table("t", ["quantiser", "codes"], columns, digits=1)
    assert found.columns == ["quantiser", "codes", "size", "mean", "lowest", "highest", "whole", "none"]
    assert found.rows == [["SimVQ", 8, 4, 8.2, 8.0, 8.3, 8, None], ["plain", 8, None, 8.2, 8.0, 8.3, 8, None]]
