"""One answer to "can I switch encoders?": the report's and the upgrade's verdicts go by one bar."""

from __future__ import annotations

from typing import Any

import pytest

from subspan.commands.switching import good_enough, verdict_of_maps, verdict_of_upgrade


def entry(low: float) -> dict[str, Any]:
    return {"value": low, "share": low, "interval": [low, low]}


@pytest.mark.parametrize(("low", "good"), [(0.9, True), (0.899, False), (0.95, True), (0.8, False)])
def test_the_report_and_the_upgrade_say_the_same_of_one_map(low: float, good: bool) -> None:
    maps = {"no map": entry(0), "Procrustes": {"recall@10": entry(1.0), "neighbours_kept": entry(low)}}
    names = ("new/old unmapped", "new/old mapped", "new/migrated", "new/new")
    retrieval = dict(zip(names, map(entry, (0.1, 0.1, low, 1.0))))
    upgrade = {"retrieval": retrieval, "items": 9, "target": 0.9, "backfill": {"share_needed": {"ordered": None}}}
    assert (verdict_of_maps(maps)["answer"] == "yes") is good
    assert verdict_of_upgrade(upgrade)["answer"] == ("migrate vectors" if good else "re-embed")


def test_the_first_way_that_is_good_enough_is_taken() -> None:
    ways = {"cheap": entry(0.44), "dear": entry(0.46), "dearest": entry(0.5)}
    assert good_enough(ways, 0.5) == "dear"
    assert good_enough(ways, 0.5, 0.8) == "cheap"
    assert good_enough(ways, 0.6) is None
