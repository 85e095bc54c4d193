"""The work of `subspan upgrade`: input is opened and checked, measured, and written; on an error nothing is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from subspan.align import UpgradeMap
from subspan.base import Progress, require, silent
from subspan.base.files import write_array, write_text
from subspan.base.kinds import INDEXES
from subspan.base.outputs import Output, Outputs
from subspan.base.tables import table_columns
from subspan.datasets import Rows, open_index
from subspan.datasets.faiss_files import write_faiss, write_pretransform
from subspan.datasets.index_writing import check_destination, digest_of, write_unfinished
from subspan.datasets.indexes import read_ids
from subspan.datasets.qdrant import is_qdrant

from .assessment import Fit, Queries, Upgrade, assess, choose_metric, order_of_backfill, pair, unit_length
from .origin import origin
from .switching import ENOUGH

_ADAPTERS = (".safetensors", ".onnx", ".faiss")
_LINEAR = ("translation", "procrustes", "scaled", "low-rank", "cca", "ridge")
METHODS = ("linear", "auto", *_LINEAR, "mlp")


@dataclass(frozen=True)
class UpgradeInputs:
    """What to read: the vectors in use and new ones of a sample of the items, by path, with their ids and labels."""

    index: str
    sample: str
    index_ids: Path | None = None
    sample_ids: Path | None = None
    queries_new: str | None = None
    queries_old: str | None = None
    labels: str | None = None
    query_labels: str | None = None
    column: str | None = None
    id_column: str | None = None
    collection: str | None = None

    @property
    def paths(self) -> tuple[str | Path | None, ...]:
        """Everything that is read."""
        return (self.index, self.sample, self.index_ids, self.sample_ids, self.queries_new, self.queries_old,
                self.labels, self.query_labels)  # fmt: skip


@dataclass(frozen=True)
class UpgradeFiles:
    """What to write: maps of queries, the old index behind one, the migrated index, the order of ids, the page."""

    adapters: tuple[Path, ...] = ()
    wrapped: Path | None = None
    migrated: Path | None = None
    order: Path | None = None
    page: Path | None = None
    render: Callable[[dict[str, Any]], str] = field(default=str, repr=False)
    """Makes the page of the facts."""

    def named(self) -> dict[str, str]:
        """Each file by what it is."""
        files: dict[str, Path | None] = {f"adapter_{path.suffix[1:]}": path for path in self.adapters}
        files |= {"wrapped_index": self.wrapped, "migrated_index": self.migrated, "backfill_order": self.order,
                  "report": self.page}  # fmt: skip
        return {name: str(path) for name, path in files.items() if path is not None}

    def outputs(self, inputs: UpgradeInputs) -> Outputs:
        """The files under temporary names, apart from each other and from all that is read."""
        return Outputs(
            *(Output("-o", path, _ADAPTERS) for path in self.adapters),
            Output("--wrap", self.wrapped, INDEXES),
            Output("--backfill-order", self.order, (".txt", ".npy")),
            Output("--report", self.page, (".html", ".htm")),
            Output("--migrate", self.migrated, resumable=True, overwrite=False),
            inputs=inputs.paths,
        )

    def check(self, stored: Rows) -> None:
        """Raises ValueError for what cannot be written of these vectors."""
        if any(path.suffix.lower() == ".onnx" for path in self.adapters):
            require("onnx", extra="onnx")
        if self.wrapped is not None and stored.kind != "faiss":
            raise ValueError(f"--wrap: {stored.source} is no FAISS index; use -o, or --migrate OUT.faiss")
        if self.migrated is not None:
            check_destination(stored, self.migrated)


@dataclass(frozen=True)
class Opened:
    """The vectors in use, those of the sample with its labels, and the queries."""

    stored: Rows
    sample: Rows
    labels: Shaped[np.ndarray, " n"] | None = None
    queries: Queries | None = None


def run_upgrade(
    inputs: UpgradeInputs,
    files: UpgradeFiles,
    *,
    metric: str | None = None,
    method: str = "linear",
    target: float = ENOUGH,
    dry_run: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Facts of an upgrade (see `assess`), and its files. Raises ValueError for input that cannot be used."""
    started = time.perf_counter()
    if method not in METHODS:
        raise ValueError(f"--method: one of {', '.join(METHODS)}, got {method!r}")
    faiss_wanted = files.wrapped is not None or any(path.suffix.lower() == ".faiss" for path in files.adapters)
    if faiss_wanted and method in ("auto", "mlp"):
        raise ValueError(f"--method: FAISS runs linear maps alone, and {method} may be a network; use linear")
    outputs = files.outputs(inputs)
    opened = open_inputs(inputs)
    stored, new = opened.stored, opened.sample
    files.check(stored)
    progress("reading the index", 0.02)
    about = stored.facts()
    ranked = choose_metric(stored, metric, (about["lengths"][0], about["lengths"][1]))
    pairs = pair(stored, new, labels=opened.labels, seed=seed)
    if ranked == "cosine" and (np.linalg.norm(pairs.new, axis=1) == 0).any():
        raise ValueError(f"{new.source}: has rows of zeros, which have no cosine")
    if pairs.new.std(axis=0).max() == 0 or pairs.old.std(axis=0).max() == 0:
        raise ValueError(f"{new.source}: all rows are the same, old or new; there is nothing to map")
    facts: dict[str, Any] = {
        "index": about,
        "sample": {"source": new.source, "n": len(new), "d": new.dim, "form": new.form},
        "metric": ranked,
        "pairs": len(pairs),
        "left_out": pairs.left_out,
        "seed": seed,
    }
    if dry_run:
        return {**facts, "files": files.named()}
    fit = _fitter(method, unit_length(pairs), seed)
    with outputs:
        found = assess(
            pairs, fit, items=len(stored), metric=ranked, index_metric=stored.metric, queries=opened.queries,
            target=target, seed=seed, progress=progress,
        )  # fmt: skip
        facts |= found.facts
        facts["written"] = _write(stored, found, files, outputs, stored.metric or ranked, seed, progress)
        facts["files"] = files.named()
        facts |= origin(started, seed, "torch", "numpy")
        if files.page is not None:
            write_text(outputs[files.page], files.render(facts))
    return facts


def _fitter(method: Any, unit: bool, seed: int) -> Fit:
    """Fits maps between the two spaces; the second time a map is fitted, with the method that the first one chose."""

    def fit(x: np.ndarray, y: np.ndarray, metric: str, chosen: Any = None) -> UpgradeMap:
        options: dict[str, Any] = {"metric": metric, "normalize": unit, "random_state": seed}
        if chosen is not None:
            fixed = {name: value for name, value in chosen.parameters_.items() if name in ("alpha", "rank", "k")}
            model = UpgradeMap(chosen.method_, **options, **fixed)
        elif method == "linear":
            model = UpgradeMap("auto", candidates=_LINEAR, **options)
        else:
            model = UpgradeMap(method, **options)
        return model.fit(x, y)

    return fit


# ---------------------------------------------------------------------- reading


def open_inputs(inputs: UpgradeInputs) -> Opened:
    """Everything that an upgrade reads. Raises ValueError for what does not belong together."""
    column, id_column = inputs.column, inputs.id_column
    stored = open_index(
        inputs.index, ids=inputs.index_ids, collection=inputs.collection, **_columns(inputs.index, column, id_column)
    )
    known = table_columns(inputs.sample)
    if is_qdrant(inputs.index) and column not in known:
        column = None  # the name of a vector of the collection, and of no column of the sample
    label_file = inputs.labels if inputs.labels is not None and Path(inputs.labels).is_file() else None
    if inputs.labels is not None and label_file is None and not known:
        raise ValueError(f"--labels: there is no file {inputs.labels!r}, and {inputs.sample} has no columns")
    named = _columns(inputs.sample, column, id_column)
    if inputs.labels is not None and label_file is None:
        named["label_column"] = inputs.labels
    new = open_index(inputs.sample, ids=inputs.sample_ids, **named)
    if new.kind == "qdrant":
        raise ValueError(f"{new.source}: the sample must be a table or an index file")
    labels = new.labels if label_file is None else read_ids(label_file).astype(str)
    return Opened(stored, new, labels, _queries(inputs, new.dim, stored.dim, column))


def _columns(source: str, column: str | None, id_column: str | None) -> dict[str, Any]:
    """The names of columns, for sources that have any."""
    if Path(source).suffix.lower() in (*INDEXES, ".npy"):
        return {}
    if is_qdrant(source):
        return {"column": column}
    return {"column": column, "id_column": id_column}


def _queries(inputs: UpgradeInputs, d_new: int, d_old: int, column: str | None) -> Queries | None:
    new, old = inputs.queries_new, inputs.queries_old
    if new is None:
        if old is not None or inputs.query_labels is not None:
            raise ValueError("--queries-old, --query-labels: need --queries-new")
        return None
    rows = open_index(new, **_columns(new, column, None))
    if rows.dim != d_new:
        raise ValueError(f"--queries-new: {new} has {rows.dim} columns, the sample has {d_new}")
    before = None
    if old is not None:
        before = open_index(old, **_columns(old, column, None))
        if before.shape != (len(rows), d_old):
            raise ValueError(
                f"--queries-old: {old} has shape {before.shape}; {(len(rows), d_old)} is needed, as {new} and the index"
            )
    names = None if inputs.query_labels is None else read_ids(inputs.query_labels).astype(str)
    if names is not None and len(names) != len(rows):
        raise ValueError(f"--query-labels: {len(names)} labels for {len(rows)} queries")
    every = np.arange(len(rows))
    return Queries(rows.take(every), None if before is None else before.take(every), names)


# ---------------------------------------------------------------------- writing


def _write(
    stored: Rows,
    found: Upgrade,
    files: UpgradeFiles,
    outputs: Outputs,
    metric: str,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    for path in files.adapters:
        _write_adapter(found.queries, outputs[path])
    if files.wrapped is not None:
        write_pretransform(Path(stored.source), found.queries.to_faiss(), outputs[files.wrapped])
    if files.order is not None:
        order = order_of_backfill(stored, found, seed=seed, progress=progress)
        _write_ids(stored.ids[order], outputs[files.order])
    if files.migrated is None:
        return {}
    key = f"{found.vectors!r} {digest_of(stored, found.migrated)}"
    written = write_unfinished(
        stored, outputs[files.migrated], found.migrated, found.pairs.new.shape[1], key=key, metric=metric,
        progress=progress,
    )  # fmt: skip
    return {"migrated_index": {"output": str(files.migrated), **written}}


def _write_adapter(fitted: Any, path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        fitted.save(path)
    elif suffix == ".onnx":
        fitted.to_onnx(path)
    else:
        faiss = require("faiss", extra="index")
        transforms = fitted.to_faiss()
        wrapper = faiss.IndexPreTransform(faiss.IndexFlatL2(transforms[-1].d_out))
        for transform in reversed(transforms):
            wrapper.prepend_transform(transform)
        write_faiss(wrapper, path)


def _write_ids(ids: np.ndarray, path: Path) -> None:
    if path.suffix.lower() == ".npy":
        write_array(path, ids)
    else:
        write_text(path, "".join(f"{name}\n" for name in ids))
