"""The work of `subspan shorten`: fewer dimensions for any stored vectors, and what that costs in recall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from subspan.base import Progress, normalize_rows, silent
from subspan.base.outputs import Outputs
from subspan.datasets import Rows, open_index
from subspan.datasets.index_writing import Map, check_destination, digest_of, write_unfinished
from subspan.datasets.indexes import is_stored
from subspan.datasets.rows import NEARLY_UNIT, is_unit
from subspan.geometry import Subspace
from subspan.represent import Matryoshka
from subspan.statistics import Moments

from .columns import calling, check_rank
from .inputs import read_rows
from .recall import recall_curve, sizes_up_to

SEARCHED = 10_000
_QUERIES = 1000
_TRAINED_ON = 20_000


def read_stored(argument: str | None, *, collection: str | None = None, **reading: Any) -> Rows:
    """The vectors that `argument` names: a collection, or what `read_rows` reads, under its ids where those are named.

    reading: `column`, `id_column` and, for what is no collection, the other options of `read_rows`.
    """
    if argument is not None and is_stored(argument):
        named = {name: reading.get(name) for name in ("column", "id_column")}
        return open_index(argument, collection=collection, **named)
    data = read_rows(argument, **reading)
    return data.named(None) if reading.get("id_column") is None else data


def shorten_to(
    source: Rows,
    rank: int | float | str,
    output: Path,
    outputs: Outputs,
    *,
    method: str = "pca",
    center: bool = False,
    subspace: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Shorten by "pca", "matryoshka" or "prefix" and write the vectors, and the subspace where asked for."""
    check_destination(source, output, overwrite=True)
    if method == "pca":
        head = pca_head(source, rank, center=center, progress=progress)
    elif method == "matryoshka":
        head = matryoshka_head(source, rank, seed=seed, progress=progress)
    else:
        head = prefix_head(source, rank)
    drawn = None if subspace is None else outputs[subspace]
    facts = shorten(source, head, outputs[output], subspace=drawn, seed=seed, progress=progress)
    return facts | {"output": str(output), **({} if subspace is None else {"map": str(subspace)})}


@dataclass(frozen=True)
class Head:
    """A way to shorten: `apply` maps rows (n, d) to (n, columns), of which the first k serve for every smaller k.

    subspace: whose coordinates these are, None for a plain prefix.
    """

    name: str
    columns: int
    apply: Map
    subspace: Subspace | None = None


def pca_head(source: Rows, rank: int | float | str, *, center: bool, progress: Progress = silent) -> Head:
    """Coordinates in the leading principal directions, from one pass over the vectors.

    How many a rule or a share of the variance asks for is counted about the mean, as in the report, with `center` and
    without: otherwise a mean that is large against the spread would be all of the variance.
    """
    check_rank(rank, source)
    moments = Moments(source.dim)
    for start, rows in source.blocks():
        moments.update(torch.from_numpy(rows))
        progress("reading", 0.3 * (start + len(rows)) / len(source))
    with calling(source):
        found = moments.subspace(rank)
        if not center:
            found = moments.subspace(found.dim, center=False)
    return Head("pca", found.dim, lambda rows: found.coordinates(torch.from_numpy(rows)).numpy(), found)


def prefix_head(source: Rows, rank: int | float | str) -> Head:
    """The first columns as they are: for encoders that were trained to be cut."""
    columns = _columns(source, rank, "a prefix is")
    return Head("prefix", columns, lambda rows: np.ascontiguousarray(rows[:, :columns]))


def matryoshka_head(source: Rows, rank: int | float | str, *, seed: int, progress: Progress = silent) -> Head:
    """A rotation of the leading principal directions, trained so that every prefix keeps the cosines (extra: train).

    It is trained on at most 20 000 of the vectors.
    """
    columns = _columns(source, rank, "--method matryoshka takes")
    progress("training a rotation", 0.05)
    chosen = np.random.default_rng(seed).choice(len(source), min(len(source), _TRAINED_ON), replace=False)
    sizes = [2**power for power in range(3, columns.bit_length()) if 2**power < columns]
    model = Matryoshka([*sizes, columns], "rotation", normalize=False, random_state=seed)
    model.fit(source.take(np.sort(chosen)))
    return Head("matryoshka", columns, model.transform, model.subspace_)


def _columns(source: Rows, rank: int | float | str, what: str) -> int:
    if not isinstance(rank, int):
        raise ValueError(f"--rank: {what} a number of columns, got {rank!r}")
    if not 1 <= rank <= source.dim:
        raise ValueError(f"--rank: {rank} columns asked for of {source.dim}")
    return rank


def shorten(
    source: Rows,
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
    curve = columns_curve(source, head, metric=metric, unit=unit, seed=seed, progress=progress)
    apply = (lambda rows: _scaled(head.apply(rows))) if unit else head.apply
    if subspace is not None:
        if head.subspace is None:
            raise ValueError("--map: a plain prefix needs no map")
        head.subspace.save(subspace)
    key = f"{head.name} {head.columns} {digest_of(source, apply)}"
    written = write_unfinished(source, unfinished, apply, head.columns, key=key, metric=metric, progress=progress)
    facts = {"rows": len(source), "columns": source.dim, "kept": head.columns, "method": head.name,
             "metric": metric, "unit_length": unit}  # fmt: skip
    if head.subspace is not None and head.subspace.spectrum is not None:
        facts["explained"] = float(head.subspace.explained_ratio)
    return {**facts, "form": written["form"], "verified": written["verified"], "curve": curve}


def columns_curve(
    source: Rows,
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
    whole, short = torch.from_numpy(rows), torch.from_numpy(np.ascontiguousarray(head.apply(rows)))
    ways: dict[str, Callable[[int], torch.Tensor]] = {head.name: lambda size: short[:, :size]}
    ways |= {} if head.name == "prefix" else {"prefix": lambda size: whole[:, :size]}
    curves = recall_curve(
        whole, ways, sizes_up_to(head.columns), queries, metric=metric, unit=unit, seed=seed,
        progress=lambda message, fraction: progress(message, 0.3 + 0.2 * fraction),
    )  # fmt: skip
    return [
        {"columns": points[0]["dims"], "bytes": 4 * points[0]["dims"]}
        | {name: {"recall": point["recall"], "interval": point["interval"]} for name, point in zip(ways, points)}
        for points in zip(*curves.values())
    ]


def _scaled(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return normalize_rows(torch.from_numpy(np.ascontiguousarray(rows))).numpy()
