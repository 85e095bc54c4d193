"""The work of `subspan upgrade`: input is opened and checked, measured, and written; on an error nothing is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from subspan.align import UpgradeMap
from subspan.base import read_table, require
from subspan.base.files import write_array, write_text
from subspan.base.outputs import Output, Outputs
from subspan.datasets.faiss_files import FAISS_SUFFIXES, write_faiss, write_pretransform
from subspan.datasets.index_writing import check_destination, write_unfinished
from subspan.datasets.indexes import StoredVectors, column_names, open_index, read_ids
from subspan.datasets.qdrant import is_qdrant

from .assessment import Fit, Queries, Upgrade, assess, choose_metric, order_of_backfill, pair, unit_length
from .embeddings import Progress, silent

_ADAPTERS = (".safetensors", ".onnx", ".faiss")
_LINEAR = ("translation", "procrustes", "scaled", "low-rank", "cca", "ridge")
METHODS = ("linear", "auto", *_LINEAR, "mlp")


@dataclass(frozen=True)
class UpgradeFiles:
    """What to write: maps of queries, the old index behind one, the migrated index, the order of ids, the page."""

    adapters: tuple[Path, ...] = ()
    wrapped: Path | None = None
    migrated: Path | None = None
    order: Path | None = None
    page: Path | None = None

    def named(self) -> dict[str, Path]:
        """Each file by what it is."""
        files = {f"adapter_{path.suffix[1:]}": path for path in self.adapters}
        others = {"wrapped_index": self.wrapped, "migrated_index": self.migrated, "backfill_order": self.order,
                  "report": self.page}  # fmt: skip
        return files | {name: path for name, path in others.items() if path is not None}


def run_upgrade(
    index: str,
    sample: str,
    files: UpgradeFiles,
    *,
    index_ids: Path | None = None,
    sample_ids: Path | None = None,
    queries_new: str | None = None,
    queries_old: str | None = None,
    labels: str | None = None,
    query_labels: str | None = None,
    metric: str | None = None,
    method: str = "linear",
    target: float = 0.9,
    column: str | None = None,
    id_column: str | None = None,
    collection: str | None = None,
    dry_run: bool = False,
    seed: int = 0,
    render: Callable[[dict[str, Any]], str] = str,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Facts of an upgrade (see `assess`), and its files, of which `render` makes the page. ValueError for bad input."""
    started = time.monotonic()
    if method not in METHODS:
        raise ValueError(f"--method: one of {', '.join(METHODS)}, got {method!r}")
    faiss_wanted = files.wrapped is not None or any(path.suffix.lower() == ".faiss" for path in files.adapters)
    if faiss_wanted and method in ("auto", "mlp"):
        raise ValueError(f"--method: FAISS runs linear maps alone, and {method} may be a network; use linear")
    outputs = _outputs(files, (index, sample, index_ids, sample_ids, queries_new, queries_old, labels, query_labels))
    stored = open_index(index, ids=index_ids, collection=collection, **_columns(index, column, id_column))
    if is_qdrant(index) and column not in column_names(Path(sample)):
        column = None  # the name of a vector of the collection, and of no column of the sample
    new = open_index(sample, ids=sample_ids, **_columns(sample, column, id_column))
    _check_files(stored, new, files)
    label_names = _labels(sample, labels, id_column)
    progress("reading the index", 0.02)
    about = stored.facts()
    ranked = choose_metric(stored, metric, (about["lengths"][0], about["lengths"][1]))
    pairs = pair(stored, new, labels=label_names, seed=seed)
    if ranked == "cosine" and (np.linalg.norm(pairs.new, axis=1) == 0).any():
        raise ValueError(f"{sample}: has rows of zeros, which have no cosine")
    if pairs.new.std(axis=0).max() == 0 or pairs.old.std(axis=0).max() == 0:
        raise ValueError(f"{sample}: all rows are the same, old or new; there is nothing to map")
    queries = _queries(queries_new, queries_old, query_labels, pairs.new.shape[1], pairs.old.shape[1], column)
    facts: dict[str, Any] = {
        "index": about,
        "sample": {"source": new.source, "n": len(new), "d": new.shape[1], "form": new.form},
        "metric": ranked,
        "pairs": len(pairs),
        "left_out": pairs.left_out,
        "seed": seed,
    }
    named = {name: str(path) for name, path in files.named().items()}
    if dry_run:
        return {**facts, "files": named}
    fit = _fitter(method, unit_length(pairs), seed)
    with outputs:
        found = assess(
            pairs, fit, items=len(stored), metric=ranked, index_metric=stored.metric, queries=queries, target=target,
            seed=seed, progress=progress,
        )  # fmt: skip
        facts |= found.facts
        facts["written"] = _write(stored, found, files, outputs, stored.metric or ranked, seed, progress)
        facts["files"] = named
        facts |= {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": time.monotonic() - started,
            "versions": {name: version(name) for name in ("subspan", "torch", "numpy")},
        }
        if files.page is not None:
            write_text(outputs[files.page], render(facts))
    return facts


def _fitter(method: str, unit: bool, seed: int) -> Fit:
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


def _columns(source: str, column: str | None, id_column: str | None) -> dict[str, Any]:
    """The names of columns, for sources that have any."""
    if Path(source).suffix.lower() in (*FAISS_SUFFIXES, ".npy"):
        return {}
    if is_qdrant(source):
        return {"column": column}
    return {"column": column, "id_column": id_column}


def _outputs(files: UpgradeFiles, inputs: tuple[str | Path | None, ...]) -> Outputs:
    return Outputs(
        *(Output("-o", path, _ADAPTERS) for path in files.adapters),
        Output("--wrap", files.wrapped, FAISS_SUFFIXES),
        Output("--backfill-order", files.order, (".txt", ".npy")),
        Output("--report", files.page, (".html", ".htm")),
        Output("--migrate", files.migrated, resumable=True, overwrite=False),
        inputs=inputs,
    )


def _check_files(stored: StoredVectors, new: StoredVectors, files: UpgradeFiles) -> None:
    if any(path.suffix.lower() == ".onnx" for path in files.adapters):
        require("onnx", extra="onnx")
    if files.wrapped is not None and stored.kind != "faiss":
        raise ValueError(f"--wrap: {stored.source} is no FAISS index; use -o, or --migrate OUT.faiss")
    if files.migrated is not None:
        check_destination(stored, files.migrated)
    if new.kind == "qdrant":
        raise ValueError(f"{new.source}: the sample must be a table or an index file")


def _labels(sample: str, labels: str | None, id_column: str | None) -> np.ndarray | None:
    if labels is None:
        return None
    if Path(labels).is_file():
        return read_ids(labels).astype(str)
    if Path(sample).suffix.lower() in (*FAISS_SUFFIXES, ".npy") or Path(sample).is_dir():
        raise ValueError(f"--labels: there is no file {labels!r}, and {sample} has no columns")
    return np.array(read_table(sample, label_column=labels, id_column=id_column).labels)


def _queries(
    new: str | None, old: str | None, labels: str | None, d_new: int, d_old: int, column: str | None
) -> Queries | None:
    if new is None:
        if old is not None or labels is not None:
            raise ValueError("--queries-old, --query-labels: need --queries-new")
        return None
    rows = open_index(new, **_columns(new, column, None))
    if rows.shape[1] != d_new:
        raise ValueError(f"--queries-new: {new} has {rows.shape[1]} columns, the sample has {d_new}")
    before = None
    if old is not None:
        before = open_index(old, **_columns(old, column, None))
        if before.shape != (len(rows), d_old):
            raise ValueError(
                f"--queries-old: {old} has shape {before.shape}; {(len(rows), d_old)} is needed, as {new} and the index"
            )
    names = None if labels is None else read_ids(labels).astype(str)
    if names is not None and len(names) != len(rows):
        raise ValueError(f"--query-labels: {len(names)} labels for {len(rows)} queries")
    every = np.arange(len(rows))
    return Queries(rows.take(every), None if before is None else before.take(every), names)


# ---------------------------------------------------------------------- writing


def _write(
    stored: StoredVectors,
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
    key = f"{found.vectors!r} {_digest(found, stored)}"
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


def _digest(found: Upgrade, stored: StoredVectors) -> str:
    """What the map does to a few vectors: the same digest, the same map."""
    import hashlib

    rows = found.migrated(stored.take(np.arange(min(16, len(stored)))))
    return hashlib.sha256(np.ascontiguousarray(rows, np.float32).tobytes()).hexdigest()
