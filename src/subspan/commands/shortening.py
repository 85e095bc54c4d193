"""The work of `subspan shorten`: fewer dimensions for any stored vectors, and what that costs in recall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from subspan.base import normalize_rows
from subspan.datasets.index_writing import Map, write_unfinished
from subspan.datasets.indexes import NEARLY_UNIT, StoredVectors, is_unit
from subspan.geometry import Subspace
from subspan.measures import recall_at_k
from subspan.represent import Matryoshka
from subspan.solvers import nearest
from subspan.statistics import Moments

from .description import NEIGHBOURS, mean_interval
from .embeddings import Progress, silent

SEARCHED = 10_000
_QUERIES = 1000
_TRAINED_ON = 20_000


@dataclass(frozen=True)
class Head:
    """A way to shorten: `apply` maps rows (n, d) to (n, columns), of which the first k serve for every smaller k.

    subspace: whose coordinates these are, None for a plain prefix.
    """

    name: str
    columns: int
    apply: Map
    subspace: Subspace | None = None


def pca_head(source: StoredVectors, rank: int | float | str, *, center: bool, progress: Progress = silent) -> Head:
    """Coordinates in the leading principal directions, from one pass over the vectors."""
    most = min(len(source) - 1, source.shape[1])
    if isinstance(rank, int) and rank > most:
        shape = f"{len(source)} rows of {source.shape[1]} columns"
        raise ValueError(f"--rank: {rank} directions asked for, {shape} span at most {most}")
    moments = Moments(source.shape[1])
    for start, rows in source.blocks():
        moments.update(torch.from_numpy(rows))
        progress("reading", 0.3 * (start + len(rows)) / len(source))
    found = moments.subspace(rank, center=center)
    return Head("pca", found.dim, lambda rows: found.coordinates(torch.from_numpy(rows)).numpy(), found)


def prefix_head(source: StoredVectors, rank: int | float | str) -> Head:
    """The first columns as they are: for encoders that were trained to be cut."""
    if not isinstance(rank, int):
        raise ValueError(f"--rank: a prefix is a number of columns, got {rank!r}")
    if not 1 <= rank <= source.shape[1]:
        raise ValueError(f"--rank: {rank} columns asked for of {source.shape[1]}")
    return Head("prefix", rank, lambda rows: np.ascontiguousarray(rows[:, :rank]))


def matryoshka_head(source: StoredVectors, rank: int | float | str, *, seed: int, progress: Progress = silent) -> Head:
    """A rotation of the leading principal directions, trained so that every prefix keeps the cosines (extra: train).

    It is trained on at most 20 000 of the vectors.
    """
    if not isinstance(rank, int):
        raise ValueError(f"--rank: --method matryoshka takes a number of columns, got {rank!r}")
    if not 1 <= rank <= source.shape[1]:
        raise ValueError(f"--rank: {rank} columns asked for of {source.shape[1]}")
    progress("training a rotation", 0.05)
    chosen = np.random.default_rng(seed).choice(len(source), min(len(source), _TRAINED_ON), replace=False)
    sizes = [*_sizes(rank), rank]
    model = Matryoshka(sizes, "rotation", normalize=False, random_state=seed).fit(source.take(np.sort(chosen)))
    return Head("matryoshka", rank, model.transform, model.subspace_)


def shorten(
    source: StoredVectors,
    head: Head,
    unfinished: Path,
    *,
    subspace: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the shortened vectors under their ids, and say what recall@10 each number of columns leaves.

    The vectors are read block by block and written as `write_index` does; what was of unit length is so again.
    unfinished, subspace: temporary paths, which the caller renames. The curve is measured on at most 10 000 of them, as
    what is written ranks them: as the collection does, tables by cosine.
    """
    metric = source.metric or "cosine"
    unit = is_unit(*source.norms(), tolerance=NEARLY_UNIT)
    curve = recall_curve(source, head, metric=metric, unit=unit, seed=seed, progress=progress)
    apply = (lambda rows: _scaled(head.apply(rows))) if unit else head.apply
    if subspace is not None:
        if head.subspace is None:
            raise ValueError("--map: a plain prefix needs no map")
        head.subspace.save(subspace)
    key = f"{head.name} {head.columns} {_digest(source, apply)}"
    written = write_unfinished(source, unfinished, apply, head.columns, key=key, metric=metric, progress=progress)
    facts = {"rows": len(source), "columns": source.shape[1], "kept": head.columns, "method": head.name,
             "metric": metric, "unit_length": unit}  # fmt: skip
    if head.subspace is not None and head.subspace.spectrum is not None:
        facts["explained"] = float(head.subspace.explained_ratio)
    return {**facts, "form": written["form"], "verified": written["verified"], "curve": curve}


def recall_curve(
    source: StoredVectors,
    head: Head,
    *,
    metric: str = "cosine",
    unit: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Recall@10 of each number of columns: of what was shortened, and of the plain prefix beside it.

    unit: shorter rows are scaled to length one before they are searched.
    """
    rng = np.random.default_rng(seed)
    n = len(source)
    if n < 3:
        raise ValueError(f"{source.source}: {n} vectors have no neighbours to keep")
    rows = source.take(np.sort(rng.choice(n, min(n, SEARCHED), replace=False)))
    queries = np.sort(rng.choice(len(rows), min(len(rows), _QUERIES), replace=False))
    truth = _neighbours(rows, queries, metric)
    short = head.apply(rows)
    sizes = [k for k in _sizes(head.columns) if k < head.columns] + [head.columns]
    curve = []
    for step, k in enumerate(sizes):
        entry: dict[str, Any] = {"columns": k, "bytes": 4 * k}
        ways: dict[str, Callable[[], np.ndarray]] = {head.name: lambda k=k: short[:, :k]}
        ways |= {} if head.name == "prefix" else {"prefix": lambda k=k: rows[:, :k]}
        for name, cut in ways.items():
            found = _neighbours(_scaled(cut()) if unit else cut(), queries, metric)
            recall = recall_at_k(found, truth).numpy()
            entry[name] = {"recall": float(recall.mean()), "interval": mean_interval(recall, seed)}
        curve.append(entry)
        progress("measuring", 0.3 + 0.2 * (step + 1) / len(sizes))
    return curve


def _scaled(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return normalize_rows(torch.from_numpy(np.ascontiguousarray(rows))).numpy()


def _neighbours(rows: Float[np.ndarray, "n d"], queries: np.ndarray, metric: str) -> torch.Tensor:
    base = torch.from_numpy(np.ascontiguousarray(rows))
    chosen = torch.from_numpy(queries)
    k = min(NEIGHBOURS, len(rows) - 1)
    found = nearest(base[chosen], base, k + 1, metric=metric)[1]
    own = found == chosen.unsqueeze(1)
    own[~own.any(1), -1] = True
    return found[~own].reshape(len(queries), -1)


def _sizes(most: int) -> list[int]:
    return [2**power for power in range(3, most.bit_length()) if 2**power < most]


def _digest(source: StoredVectors, apply: Map) -> str:
    import hashlib

    rows = apply(source.take(np.arange(min(16, len(source)))))
    return hashlib.sha256(np.ascontiguousarray(rows, np.float32).tobytes()).hexdigest()
