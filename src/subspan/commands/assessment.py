"""A new encoder for a stored collection: what mapping its vectors or the queries is worth, and the files that do it.

Old vectors and new ones of a sample of the same items are split: maps are fitted on one part and measured on the other,
whose items are the collection that is searched. Truth is what embedding everything anew would find (the ten nearest by
the new encoder), or items with the label of the query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from subspan.align import backfill_order
from subspan.base import Progress, normalize_rows, silent
from subspan.datasets import Rows
from subspan.datasets.rows import NEARLY_UNIT, is_unit
from subspan.measures import recall_at_k
from subspan.solvers import nearest

from .recall import fitted_width, summary
from .switching import ENOUGH, K, verdict_of_upgrade

FEWEST_PAIRS = 60
MOST_SEARCHED = 10_000
MOST_QUERIES = 1000
Fit = Callable[..., Any]
_SHARES = tuple(share / 10 for share in range(11))


@dataclass(frozen=True)
class Pairs:
    """Old and new vectors of the same items: the sample of an upgrade.

    positions: where the items are in the collection. labels: one an item, or None. left_out: items of the sample that
    the collection does not have.
    """

    positions: Int[np.ndarray, " m"]
    old: Float[np.ndarray, "m d"]
    new: Float[np.ndarray, "m e"]
    labels: Shaped[np.ndarray, " m"] | None = None
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Queries:
    """New vectors of queries and, where there are, old ones of the same queries and their labels."""

    new: Float[np.ndarray, "q e"]
    old: Float[np.ndarray, "q d"] | None = None
    labels: Shaped[np.ndarray, " q"] | None = None


@dataclass(frozen=True)
class Upgrade:
    """The maps fitted to all pairs, and the facts measured on pairs that maps like them were not fitted to.

    queries: from the new space to the old. vectors: from the old to the new. unit: migrated vectors are scaled to
    length one, as the new encoder's are or the cosine asks for.
    """

    queries: Any
    vectors: Any
    facts: dict[str, Any]
    pairs: Pairs = field(repr=False)
    unit: bool = False

    def migrated(self, rows: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b e"]:
        """Old vectors in the new space."""
        return _unit(self.vectors.transform(rows), self.unit)


def pair(index: Rows, sample: Rows, *, labels: np.ndarray | None = None, most: int = 50_000, seed: int = 0) -> Pairs:
    """The items of the sample, found in the index by id; by row where neither has ids and both have as many rows.

    most: a larger sample is drawn from at random. Items that the index no longer has are left out. Raises ValueError
    where those are more than half, for another number of rows where there are no ids, and for fewer than 60 pairs.
    """
    if sample.numbered and len(sample) != len(index):
        raise ValueError(
            f"{sample.source}: {len(sample)} rows without ids for {len(index)} vectors of {index.source}; give their "
            "ids, or as many rows in the same order"
        )
    if sample.numbered and not index.numbered:
        if index.details.get("kind") == "ivf":
            raise ValueError(f"{sample.source}: an inverted file keeps no order of rows; give the ids of the sample")
        # By row: the sample has what the index has, in its order.
        positions, known = np.arange(len(index)), np.ones(len(index), bool)
    else:
        positions, known = index.look_up(sample.ids, name=sample.source)
        if 2 * known.sum() < len(sample):
            index.positions(sample.ids, name=sample.source)
    if labels is not None and len(labels) != len(sample):
        raise ValueError(f"--labels: {len(labels)} labels for {len(sample)} rows of {sample.source}")
    chosen = np.flatnonzero(known)
    if len(chosen) < FEWEST_PAIRS:
        raise ValueError(
            f"{sample.source}: {len(chosen)} pairs; at least {FEWEST_PAIRS} are needed to fit and to judge"
        )
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, most, replace=False))
    positions = positions[chosen]
    return Pairs(
        positions, index.take(positions), sample.take(chosen), None if labels is None else labels[chosen],
        int(np.sum(~known)),
    )  # fmt: skip


def choose_metric(index: Rows, metric: str | None, lengths: tuple[float, float]) -> str:
    """What vectors are ranked by: as the index does, where it says so.

    Vectors of nearly unit length are ranked alike by all metrics. Raises ValueError where others are to be ranked by
    another metric than their index does.
    """
    unit = is_unit(*lengths, tolerance=NEARLY_UNIT)
    if metric is None:
        return index.metric or ("cosine" if unit else "euclidean")
    if unit or index.metric in (None, metric):
        return metric
    raise ValueError(
        f"--metric: {index.source} ranks by {index.metric}, which is {metric} for vectors of unit length alone; their "
        f"lengths go from {lengths[0]:.4g} to {lengths[1]:.4g}"
    )


def assess(
    pairs: Pairs,
    fit: Fit,
    *,
    items: int,
    metric: str,
    index_metric: str | None = None,
    queries: Queries | None = None,
    target: float = ENOUGH,
    held_out: float = 0.3,
    seed: int = 0,
    progress: Progress = silent,
) -> Upgrade:
    """Fit both maps, measure recall@10 on held-out items, the curve of partial backfilling, and decide.

    fit(X, Y, metric, chosen): a fitted map of rows X to rows Y with `transform`, good for search by `metric`; chosen:
    an earlier map whose method is kept. items: how many the collection has. metric: what new and migrated vectors are
    ranked by. index_metric: what the old ones are, where that is another. target: the share of new/new recall that is
    good enough.
    """
    m = len(pairs)
    order = np.random.default_rng(seed).permutation(m)
    judged = np.sort(order[: min(max(round(held_out * m), FEWEST_PAIRS // 3), MOST_SEARCHED)])
    fitted = np.sort(order[len(judged) :])
    unit = metric == "cosine" or is_unit(*_lengths(pairs.new), tolerance=NEARLY_UNIT)
    index_metric = index_metric or metric
    # What is scaled afterwards is ranked by its directions alone.
    ways = ((pairs.new, pairs.old, index_metric), (pairs.old, pairs.new, "cosine" if unit else metric))
    progress("fitting the maps", 0.1)
    to_old, to_new = (fit(a[fitted], b[fitted], ranked) for a, b, ranked in ways)
    progress("searching", 0.4)
    bench = _Bench(pairs, judged, queries, metric, seed)
    mapped = np.asarray(_unit(to_new.transform(bench.old), unit))
    base_old, base_new = bench.old, bench.new
    found: dict[str, Any] = {
        "old/old": None if bench.queries_old is None else bench.recall(bench.queries_old, base_old, index_metric),
        "new/old unmapped": bench.recall(
            fitted_width(torch.from_numpy(bench.queries_new), base_old.shape[1]).numpy(), base_old, index_metric
        ),
        "new/old mapped": bench.recall(np.asarray(to_old.transform(bench.queries_new)), base_old, index_metric),
        "new/migrated": bench.recall(bench.queries_new, mapped),
        "new/new": bench.recall(bench.queries_new, base_new),
    }
    retrieval: dict[str, Any] = {name: None if hits is None else summary(hits, seed) for name, hits in found.items()}
    curves = _backfill(bench, mapped, pairs.new[fitted], metric, seed, progress)
    need = target * retrieval["new/new"]["value"]
    shares = {name: _share_needed(curve, need) for name, curve in curves.items()}
    progress("fitting to all pairs", 0.9)
    whole = tuple(fit(a, b, ranked, chosen) for (a, b, ranked), chosen in zip(ways, (to_old, to_new)))
    facts: dict[str, Any] = {
        "metric": metric,
        "k": K,
        "truth": bench.truth_in_words,
        "pairs": m,
        "fitted_to": len(fitted),
        "searched": len(bench.old),
        "queries": len(bench.queries_new),
        "own_queries": queries is not None,
        "dimensions": {"old": pairs.old.shape[1], "new": pairs.new.shape[1]},
        "few_pairs": len(fitted) < max(pairs.old.shape[1], pairs.new.shape[1]),
        "target": target,
        "maps": {"queries": _describe(to_old), "vectors": _describe(to_new)},
        "retrieval": retrieval,
        "backfill": {"curves": curves, "share_needed": shares, "need": need},
        "items": items,
        "migrated_unit_length": unit,
    }
    facts["verdict"] = verdict_of_upgrade(facts)
    return Upgrade(whole[0], whole[1], facts, pairs, unit)


# ---------------------------------------------------------------------- measuring


class _Bench:
    """Held-out items to search in, queries, and what they should find."""

    def __init__(
        self, pairs: Pairs, judged: Int[np.ndarray, " j"], queries: Queries | None, metric: str, seed: int
    ) -> None:
        self.metric = metric
        self.old, self.new = pairs.old[judged], pairs.new[judged]
        labels = None if pairs.labels is None else pairs.labels[judged]
        self.own: Int[np.ndarray, " q"] | None = None
        if queries is None:
            rng = np.random.default_rng(seed)
            self.own = np.sort(rng.choice(len(judged), min(len(judged), MOST_QUERIES), replace=False))
            self.queries_new, self.queries_old = self.new[self.own], self.old[self.own]
            asked = None if labels is None else labels[self.own]
        else:
            self.queries_new, self.queries_old = queries.new[:MOST_QUERIES], queries.old
            if self.queries_old is not None:
                self.queries_old = self.queries_old[:MOST_QUERIES]
            asked = None if queries.labels is None else queries.labels[:MOST_QUERIES]
        if labels is not None and asked is not None:
            relevant: Bool[np.ndarray, "q j"] = asked[:, None] == labels[None, :]
            if self.own is not None:
                relevant[np.arange(len(self.own)), self.own] = False
            self.relevant: Bool[np.ndarray, "q j"] | None = relevant
            self._kept = relevant.any(axis=1)
            if not self._kept.any():
                raise ValueError("--labels: no query shares its label with a held-out item")
            self.truth_in_words = "held-out items with the label of the query (share of them among the first 10)"
        else:
            self.relevant = None
            self.truth = self.search(self.queries_new, self.new, metric)
            self.truth_in_words = "the 10 nearest held-out items by the new encoder, exact search"

    def search(self, queries: np.ndarray, base: np.ndarray, metric: str) -> Int[Tensor, "q k"]:
        """Places of the nearest items, the query itself left out."""
        k = min(K, len(base) - 1)
        q, b = torch.from_numpy(np.ascontiguousarray(queries)), torch.from_numpy(np.ascontiguousarray(base))
        own = None if self.own is None else torch.from_numpy(self.own)
        return nearest(q, b, k, metric=metric, exclude=own)[1]

    def recall(self, queries: np.ndarray, base: np.ndarray, metric: str | None = None) -> Float[np.ndarray, " q"]:
        """Recall@10 of each query, by the metric of the new vectors or another."""
        found = self.search(queries, base, metric or self.metric)
        if self.relevant is None:
            return recall_at_k(found, self.truth).numpy()
        hits = np.take_along_axis(self.relevant, found.numpy(), axis=1).sum(axis=1)
        possible = np.minimum(self.relevant.sum(axis=1), found.shape[1])
        return (hits / np.maximum(possible, 1))[self._kept]


def _backfill(
    bench: _Bench, mapped: np.ndarray, expected: np.ndarray, metric: str, seed: int, progress: Progress
) -> dict[str, Any]:
    """Recall@10 of new queries while more and more of the migrated vectors are replaced by new ones.

    expected: new vectors of other items, which stand for the queries in the order.
    """
    n = len(mapped)
    similarity = "cosine" if metric == "cosine" else "euclidean"
    orders = {
        "ordered": backfill_order(mapped, metric=similarity, queries=expected, random_state=seed),
        "random": np.random.default_rng(seed).permutation(n),
    }
    curves: dict[str, Any] = {}
    for step, (name, order) in enumerate(orders.items()):
        curves[name] = []
        for share in _SHARES:
            base = mapped.copy()
            replaced = order[: round(share * n)]
            base[replaced] = bench.new[replaced]
            curves[name].append({"share": share, **summary(bench.recall(bench.queries_new, base), seed)})
            progress("backfilling", 0.5 + 0.2 * (step + share))
    return curves


def _share_needed(curve: list[dict[str, Any]], need: float) -> float | None:
    """Smallest share whose interval's lower end reaches `need`, between two points by the straight line."""
    before = None
    for point in curve:
        low = point["interval"][0]
        if low >= need:
            if before is None or low == before["interval"][0]:
                return point["share"]
            part = (need - before["interval"][0]) / (low - before["interval"][0])
            return before["share"] + part * (point["share"] - before["share"])
        before = point
    return None


def _describe(fitted: Any) -> dict[str, Any]:
    """Which method was chosen, and what each had in the inner cross-validation."""
    scores = [{name: row[name] for name in ("method", "recall", "low", "high", "note")} for row in fitted.scores_]
    return {"method": fitted.method_, "parameters": fitted.parameters_, "scores": scores}


def unit_length(pairs: Pairs) -> bool:
    """Whether old and new vectors all have nearly length one."""
    return all(is_unit(*_lengths(rows), tolerance=NEARLY_UNIT) for rows in (pairs.old, pairs.new))


def _lengths(rows: np.ndarray) -> tuple[float, float]:
    lengths = np.linalg.norm(rows, axis=1)
    return float(lengths.min()), float(lengths.max())


def _unit(rows: Any, wanted: bool) -> np.ndarray:
    if not wanted:
        return np.asarray(rows)
    return normalize_rows(torch.as_tensor(np.asarray(rows))).numpy()


# ---------------------------------------------------------------------- order of re-embedding


class _Migrated:
    """The mapped vectors of a collection, as often as they are asked for, a block in memory at a time."""

    def __init__(self, index: Rows, upgrade: Upgrade, progress: Progress) -> None:
        self.index, self.upgrade, self.progress = index, upgrade, progress

    def __iter__(self) -> Iterator[Tensor]:
        done = 0
        for _, rows in self.index.blocks():
            self.progress("ordering", done / len(self.index))
            done += len(rows)
            yield torch.from_numpy(np.ascontiguousarray(self.upgrade.migrated(rows)))


def order_of_backfill(
    index: Rows, upgrade: Upgrade, *, seed: int = 0, progress: Progress = silent
) -> Int[np.ndarray, " n"]:
    """Positions in the order in which to embed items anew: those first that lie, once mapped, nearest to new vectors.

    The new vectors of the sample stand for the queries to come. Streams the collection once.
    """
    similarity = "cosine" if upgrade.facts["metric"] == "cosine" else "euclidean"
    migrated = _Migrated(index, upgrade, progress)
    return backfill_order(migrated, metric=similarity, queries=upgrade.pairs.new, random_state=seed)
