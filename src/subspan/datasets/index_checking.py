"""What was written is read back: ids, rows against the mapped originals, and queries against exact search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from subspan.base import Progress, silent

from .faiss_files import read_index
from .indexes import open_index
from .qdrant import QdrantRows
from .rows import Rows

Map = Callable[[Float[np.ndarray, "b d"]], Float[np.ndarray, "b e"]]
CHECKED = 64
_QUERIED = 16
_SEARCHED_BYTES = 1 << 30


def verify(
    source: Rows,
    written: Path,
    transform: Map,
    metric: str,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Read a written collection back: ids, rows against the mapped originals, and queries against exact search.

    Raises ValueError where anything differs from what should have been written.
    """
    name: str | None = getattr(source.values, "vector", None) or None
    back = open_index(written, column=name if written.is_dir() else None)
    if len(back) != len(source):
        raise ValueError(f"{written}: {len(back)} vectors came back of {len(source)}")
    places = _places(source, back)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(source), min(CHECKED, len(source)), replace=False))
    wanted = np.ascontiguousarray(transform(source.take(chosen)), np.float32)
    found = back.take(places[chosen])
    if back.metric == "cosine":
        # Qdrant ranks by directions alone, and gives lengths back or not.
        wanted, found = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (wanted, found))
    scale = float(np.abs(wanted).max()) or 1.0
    if not np.allclose(found, wanted, rtol=0, atol=1e-4 * scale):
        raise ValueError(f"{written}: rows do not come back as they were mapped")
    queries, names = wanted[:_QUERIED], source.ids[chosen[:_QUERIED]]
    exact = _streamed_neighbours(back, queries, "inner" if metric == "cosine" else metric, progress)
    facts = {"rows_compared": len(chosen), "ids_compared": len(back), "queries": len(queries),
             "search": "exact, over all rows read back"}  # fmt: skip
    if back.kind == "faiss" and (written.stat().st_size <= _SEARCHED_BYTES or "Flat" not in back.form):
        index, owner = read_index(written)
        if back.details.get("kind") == "ivf":
            # All cells, to see that the vectors are there; how many to visit in use is the index's own setting.
            index.nprobe = index.nlist
        answers = index.search(queries, exact.shape[1])[1]
        facts["search"] = f"{back.form}.search against exact search"
        facts["agreement"] = float(
            np.mean([len(np.intersect1d(one, other)) / len(other) for one, other in zip(answers, exact)])
        )
        if facts["agreement"] < (0.5 if back.details.get("kind") == "hnsw" else 0.95):
            raise ValueError(f"{written}: the index does not find what is in it")
        del index, owner
    elif metric != "inner":
        facts["own_row_first"] = float(np.mean(exact[:, 0] == names))
    if back.kind == "qdrant":
        _verify_copied(source.values, back.values, chosen)  # pyright: ignore
    return facts


def _verify_copied(source: QdrantRows, back: QdrantRows, chosen: np.ndarray) -> None:
    """What stands beside the mapped vector, and the points that have none."""
    sample = [source.points[int(place)] for place in chosen] + list(source.others[:CHECKED])
    for name, one, other in zip(sample, source.whole(sample), back.whole(sample)):
        if one[1] != other[1] or one[0].keys() != other[0].keys():
            raise ValueError(f"collection: the payload or the other vectors of point {name!r} did not come back")
    if set(back.others) != set(source.others):
        raise ValueError(f"collection: {len(source.others)} points without the vector are {len(back.others)} now")


def _places(source: Rows, back: Rows) -> np.ndarray:
    """Where each row of the source is in what was written."""
    if back.ids.dtype.kind == source.ids.dtype.kind and np.array_equal(source.ids, back.ids):
        return np.arange(len(source))
    try:
        return back.positions(source.ids)
    except ValueError as error:
        raise ValueError(f"{back.source}: ids were not kept ({error})") from error


def _streamed_neighbours(back: Rows, queries: np.ndarray, metric: str, progress: Any) -> np.ndarray:
    """Ids of the ten nearest of all rows, which pass by in blocks."""
    k = min(10, len(back))
    best = np.full((len(queries), k), -np.inf)
    ids = np.empty((len(queries), k), back.ids.dtype)
    for start, rows in back.blocks():
        scores = queries @ rows.T
        if metric == "euclidean":
            scores = 2 * scores - np.einsum("ij,ij->i", rows, rows)
        both = np.concatenate([best, scores], axis=1)
        names = np.concatenate([ids, np.broadcast_to(back.ids[start : start + len(rows)], scores.shape)], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :k]
        best, ids = np.take_along_axis(both, order, 1), np.take_along_axis(names, order, 1)
        progress("reading back", 0.8 + 0.2 * (start + len(rows)) / len(back))
    return ids
