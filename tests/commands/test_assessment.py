"""The verdict of an upgrade: what is chosen from planted figures, and how much is to be embedded anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from subspan.commands.assessment import _share_needed, choose_metric
from subspan.commands.switching import verdict_of_upgrade
from subspan.datasets import Rows


def facts(share: float | None = None, **values: float) -> dict[str, Any]:
    """Recalls by name, each with an interval of 0.02 to both sides; nine tenths of new/new is good enough."""
    names = {"old": "old/old", "none": "new/old unmapped", "mapped": "new/old mapped", "migrated": "new/migrated",
             "new": "new/new"}  # fmt: skip
    values = {"none": 0.05, "new": 1.0, **values}
    retrieval = {names[key]: {"value": one, "interval": [one - 0.02, one + 0.02]} for key, one in values.items()}
    need = 0.9 * values["new"]
    return {"retrieval": retrieval, "items": 1000, "target": 0.9,
            "backfill": {"need": need, "share_needed": {"ordered": share}}}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"mapped": 0.93, "migrated": 0.97}, "map queries"),
        ({"mapped": 0.91, "migrated": 0.97}, "migrate vectors"),  # the lower end of the interval counts
        ({"mapped": 0.5, "migrated": 0.91, "share": 0.312}, "partial backfill"),
        ({"mapped": 0.5, "migrated": 0.6, "share": 0.8}, "partial backfill"),
        ({"mapped": 0.5, "migrated": 0.6, "share": 0.81}, "re-embed"),
        ({"mapped": 0.5, "migrated": 0.6, "share": None}, "re-embed"),
        ({"mapped": 0.95, "migrated": 0.95, "new": 0.5, "old": 0.55}, "keep"),
        ({"mapped": 0.95, "migrated": 0.95, "new": 0.5, "old": 0.53}, "map queries"),  # not certainly worse
    ],
)
def test_the_cheapest_way_that_is_good_enough_is_chosen(given: dict[str, Any], answer: str) -> None:
    found = verdict_of_upgrade(facts(**given))
    assert found["answer"] == answer
    if answer == "partial backfill":
        assert found["items"] == int(np.ceil(1000 * given["share"]))


@pytest.mark.parametrize(
    ("old", "said"), [(0.55, "find no less than today"), (0.6, "cannot be told"), (0.7, "find less than today")]
)
def test_what_serves_meanwhile_is_held_against_today(old: float, said: str) -> None:
    bridge = verdict_of_upgrade(facts(mapped=0.5, migrated=0.59, old=old))["bridge"]
    assert "migrated vectors" in bridge
    assert said in bridge


def test_the_share_needed_lies_where_the_lower_end_reaches_it() -> None:
    curve = [{"share": share, "interval": [low, 1.0]} for share, low in ((0.0, 0.2), (0.1, 0.4), (0.2, 0.8))]
    assert _share_needed(curve, 0.1) == 0
    assert _share_needed(curve, 0.6) == pytest.approx(0.15)
    assert _share_needed(curve, 0.4) == pytest.approx(0.1)
    assert _share_needed(curve, 0.81) is None


@pytest.mark.parametrize("own", [None, "inner", "euclidean", "cosine"])
@pytest.mark.parametrize("asked", [None, "inner", "euclidean", "cosine"])
@pytest.mark.parametrize("lengths", [(1.0, 1.0), (0.985, 1.015), (0.97, 1.0), (1.0, 9.0)])
def test_a_metric_is_a_way_of_searching(own: Any, asked: Any, lengths: tuple[float, float]) -> None:
    index = Rows(np.eye(3, dtype=np.float32), "x", metric=own)
    nearly = lengths[0] > 0.98 and lengths[1] < 1.02
    if asked is None:
        assert choose_metric(index, None, lengths) == (own or ("cosine" if nearly else "euclidean"))
    elif nearly or own in (None, asked):
        assert choose_metric(index, asked, lengths) == asked
    else:
        with pytest.raises(ValueError, match=f"x ranks by {own}.*their lengths go from"):
            choose_metric(index, asked, lengths)
