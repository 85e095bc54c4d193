"""Checks and outcomes: one bound for text and verdict, and what a quick run can judge."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import pytest

from subspan.reproduce import Check, Outcome, Table
from subspan.reproduce.protocol import status, tally, verdict

HOLDS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def outcome(main: Check, *checks: Check) -> Outcome:
    return Outcome("c", "d", "m", "accuracy", 0.9, {"chance": 0.1}, main=main, checks=list(checks))


@pytest.mark.parametrize("value", [-1.0, 0.25, 1 / 3, 0.5, 2.0])
@pytest.mark.parametrize("made", [Check.at_least, Check.at_most, Check.above, Check.below])
def test_the_verdict_is_that_of_the_bar_as_it_is_written(made: Any, value: float) -> None:
    check = made("effect", "gap", value, 0.5)
    sign, bound = check.bar.split()
    assert check.holds is HOLDS[sign](value, float(bound))


@pytest.mark.parametrize(("value", "holds"), [(0.9, False), (1, True), (1.5, True), (2, True), (2.1, False)])
def test_within_has_two_ends(value: float, holds: bool) -> None:
    check = Check.within("effect", "ratio", value, 1, 2)
    assert (check.bar, check.holds) == ("1 to 2", holds)


@pytest.mark.parametrize(
    ("claim", "effect", "required", "expected"),
    [(1, 1, True, True), (0, 1, True, False), (1, 0, True, False), (1, 0, False, True)],
)
def test_the_whole_holds_only_with_every_required_check(
    claim: float, effect: float, required: bool, expected: bool
) -> None:
    made = outcome(
        Check.at_least("claim", "x", claim, 0.5), Check.at_least("effect", "y", effect, 0.5, required=required)
    )
    assert made.holds is (claim == 1)
    assert made.all_hold is expected
    assert made.facts()["holds"] is expected


def test_numbers_must_be_finite_and_tables_rectangular() -> None:
    with pytest.raises(ValueError, match="ours: a measured number must be finite"):
        Outcome("c", "d", "m", "x", math.nan, {}, main=Check.above("a", "m", 1, 0))
    with pytest.raises(ValueError, match="effect: a measured number must be finite"):
        Check.at_least("effect", "gap", math.inf, 0)
    with pytest.raises(ValueError, match="expected 2 cells"):
        Table("t", ["a", "b"], [[1]])
    assert Table.rounded("t", "ab", {"x": 1.23456}.items(), 2).rows == [["x", 1.23]]
    assert Table.rounded("t", "abc", [[7, None, np.float64(0.00015)]]).rows == [[7, None, 0.0001]]


def test_a_bar_says_of_what_it_is() -> None:
    same = outcome(Check.at_least("claim", "accuracy", 0.9, 0.8))
    other = outcome(Check.above("claim", "gap on every seed", 0.0123, 0))
    assert (same.bar, other.bar) == (">= 0.8", "gap on every seed > 0 (measured 0.0123)")
    assert other.facts()["main"]["name"] == "claim"


def test_a_status_counts_the_claim_and_the_required_checks() -> None:
    record = outcome(
        Check.above("claim", "m", 1, 0),
        Check.above("a", "m", 1, 0),
        Check.above("b", "m", 0, 0),
        Check.above("c", "m", 0, 0, required=False),
    ).facts()
    assert tally(record) == (True, 2, 3)
    assert status(record) == "main claim yes · 2 of 3 checks"
    assert status({**record, "main_bar_holds": False}) == "main claim no · 1 of 3 checks"
    assert [verdict(check) for check in record["checks"]] == ["holds", "does not hold", "does not hold (reported)"]


def test_a_quick_run_judges_what_it_can_and_says_what_it_cannot() -> None:
    made = outcome(
        Check.above("claim", "m", 0, 0), Check.above("a", "m", 1, 0, quick=True), Check.above("b", "m", 0, 0)
    )
    quick, full = made.facts(quick=True), made.facts()
    assert [check["judged"] for check in quick["checks"]] == [True, False]
    assert [check["holds"] for check in quick["checks"]] == [True, None]
    assert (quick["holds"], tally(quick)) == (True, (None, 1, 1))
    assert status(quick) == "main claim not judged · 1 of 1 checks"
    assert verdict(quick["checks"][1]) == "too small a run to judge"
    assert (full["holds"], tally(full)) == (False, (False, 1, 3))
    assert all(check["judged"] for check in full["checks"])
