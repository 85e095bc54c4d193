"""The answer to "can I switch encoders without embedding everything anew?", the same wherever it is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

K = 10
ENOUGH = 0.9
"""The share of the recall of embedding everything anew that is good enough."""
MOST_BACKFILL = 0.8
"""A larger share than this is embedding everything anew in all but name."""
METHODS = {"Procrustes": "procrustes", "affine (ridge)": "ridge", "CCA-projected": "cca"}
_OWN_ROW = 0.95
_BRIDGE = {"recall@10": 0.8, "neighbours_kept": 0.5}
_ANSWERS = {
    "map queries": "Map the queries and keep the index as it is.",
    "migrate vectors": "Migrate: map the stored vectors into the new space.",
    "partial backfill": "Migrate, and embed a part of the items anew.",
    "re-embed": "Embed everything anew.",
    "keep": "Keep the old encoder: on this sample the new one finds no more.",
}


def good_enough(ways: Mapping[str, Mapping[str, Any]], best: float, target: float = ENOUGH) -> str | None:
    """The first of these ways to serve new queries that keeps the target share of the recall of embedding anew.

    ways: recall@10 of each, of what embedding everything anew finds, with its `interval`, the cheapest way first; it
    is the lower end that has to reach. best: the recall of embedding everything anew. None: no way is good enough.
    """
    return next((name for name, found in ways.items() if found["interval"][0] >= target * best), None)


def verdict_of_maps(retrieval: Mapping[str, Any]) -> dict[str, Any]:
    """The answer for two embeddings of the same rows: yes, as a bridge, or no, from the best map between them.

    retrieval: of each map, on rows that it was not fitted to, recall@10 of the row itself and the share of the ten
    neighbours by the new encoder that new queries find in the mapped vectors (what `upgrade` calls new/migrated).
    """
    maps = {name: found for name, found in retrieval.items() if name != "no map"}
    best = max(maps, key=lambda name: maps[name]["neighbours_kept"]["share"])
    found, kept = retrieval[best]["recall@10"], retrieval[best]["neighbours_kept"]
    own = found["interval"][0]
    if own >= _OWN_ROW and good_enough({best: kept}, 1.0):
        answer, text = "yes", "Yes: map the stored vectors and search them with the new encoder."
    elif own >= _BRIDGE["recall@10"] and good_enough({best: kept}, 1.0, _BRIDGE["neighbours_kept"]):
        answer = "as a bridge"
        text = "As a bridge only: mapped vectors serve while the rows are embedded anew in the background."
    else:
        answer, text = "no", "No: a map between the two loses too much; the rows have to be embedded anew."
    return {
        "answer": answer,
        "map": best,
        "method": METHODS[best],
        "text": text,
        "reason": (
            f"With the best map ({best}), {found['value']:.0%} of the queries find their own row among the first {K}, "
            f"and {kept['share']:.0%} of the {K} neighbours that embedding everything anew would give are found."
        ),
        "bars": {"yes": {"recall@10": _OWN_ROW, "neighbours_kept": ENOUGH}, "as a bridge": dict(_BRIDGE)},
    }


def verdict_of_upgrade(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The answer for a stored collection: the cheapest way that keeps the target share of the recall."""
    retrieval = {name: found for name, found in facts["retrieval"].items() if found is not None}
    value = {name: found["value"] for name, found in retrieval.items()}
    share, items, target = facts["backfill"]["share_needed"]["ordered"], facts["items"], facts["target"]
    count = None if share is None else math.ceil(share * items)
    ways = {"map queries": retrieval["new/old mapped"], "migrate vectors": retrieval["new/migrated"]}
    if "old/old" in retrieval and retrieval["new/new"]["interval"][1] < retrieval["old/old"]["interval"][0]:
        answer = "keep"
    elif (way := good_enough(ways, value["new/new"], target)) is not None:
        answer = way
    else:
        answer = "partial backfill" if share is not None and share <= MOST_BACKFILL else "re-embed"
    text = _ANSWERS[answer]
    if answer == "partial backfill":
        text = f"Migrate, and embed {count} of the {items} items ({share:.0%}) anew, in the order given."
    reason = (
        f"Embedding everything anew gives recall@{K} {value['new/new']:.3f}; good enough is {target:.0%} of "
        f"it, {target * value['new/new']:.3f}. Mapped queries reach {value['new/old mapped']:.3f} on the old index, "
        f"the migrated vectors {value['new/migrated']:.3f}, and unmapped queries {value['new/old unmapped']:.3f}."
    )
    bridge = _bridge(retrieval) if "old/old" in value and answer in ("re-embed", "partial backfill") else None
    return {"answer": answer, "text": text, "reason": reason, "bridge": bridge, "items": count, "share": share}


def _bridge(retrieval: Mapping[str, Any]) -> str:
    """What serves until enough is embedded anew, held against today."""
    today = retrieval["old/old"]["value"]
    best = max(("new/old mapped", "new/migrated"), key=lambda name: retrieval[name]["value"])
    found, (low, high) = retrieval[best]["value"], retrieval[best]["interval"]
    way = "mapped queries on the old index" if best == "new/old mapped" else "migrated vectors"
    holds = "find no less than today" if low >= today else "find less than today"
    if low < today <= high:
        holds = "cannot be told from today"
    return f"Until that is done, {way} {holds} ({found:.3f} against {today:.3f} old/old)."
