"""New collections of vectors out of stored ones: whole or absent, resumed after a kill, the original untouched.

Rows go, a block at a time, into an unfinished file in a folder beside the destination, and how many are safely there
into a record beside that. A run that finds both, made from the same source by the same map, goes on where the record
ends; blocks lie at the same rows in every run, so the result is the same to the bit. What is read back is checked
before the unfinished file gets its name.

Flat FAISS indexes (with or without ids), .npy and .safetensors are written as a stream and need a block of memory.
Parquet is put together from the unfinished rows, row group by row group. IVF and HNSW are built by FAISS, which holds
the finished index in memory; a new Qdrant folder is held in memory by its client.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subspan.base import Progress, normalize_rows, require, silent
from subspan.base.files import Target, empty, naming, remove_unfinished, reserve, write_text, written_together
from subspan.base.kinds import INDEXES
from subspan.base.reading import read_json

from .faiss_files import flat_header, flat_tail, write_faiss
from .index_checking import CHECKED, Map, verify
from .qdrant import QdrantRows
from .qdrant_folder import QdrantFolder
from .rows import Rows

WRITTEN = (".npy", ".safetensors", ".parquet", *INDEXES)
_TRAINED_ON = 100_000
_ROW_GROUP = 65_536


def check_destination(source: Rows, destination: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The path, or ValueError where it is the source, exists, or is of a kind that cannot hold these vectors."""
    path = Path(destination)
    if str(destination).startswith(("http://", "https://")):
        raise ValueError(f"{str(destination)!r}: give the address of a server as a client, with its collection")
    origin = _origin(source)
    if origin.exists() and path.resolve() == origin.resolve():
        raise ValueError(f"{str(path)!r} is the original, which is never overwritten; choose another name")
    if path.is_dir() or (path.exists() and not overwrite):
        remove_unfinished(path)  # of a run that was killed when it had all but tidied up
        raise ValueError(f"{str(path)!r} exists; remove it or choose another name")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} does not exist")
    if not os.access(path.resolve().parent, os.W_OK):
        raise ValueError(f"the folder {str(path.parent)!r} cannot be written to")
    suffix = path.suffix.lower()
    if suffix not in WRITTEN and not (suffix == "" and source.kind == "qdrant"):
        folder = " or a new folder for Qdrant" if source.kind == "qdrant" else ""
        raise ValueError(f"{str(path)!r} must end in {', '.join(WRITTEN)}{folder}")
    counted = np.array_equal(source.ids, np.arange(len(source)))
    if suffix == ".npy" and not counted:
        raise ValueError(
            f"{str(path)!r}: .npy holds no ids, and these are no row numbers; use .safetensors or .parquet"
        )
    if suffix in INDEXES and source.ids.dtype.kind not in "iu":
        raise ValueError(f"{str(path)!r}: FAISS ids are whole numbers, {source.source} has texts; use .parquet")
    if suffix == ".safetensors" and source.ids.dtype.kind not in "iu":
        raise ValueError(f"{str(path)!r}: .safetensors holds no texts as ids; use .parquet")
    return path


def write_index(
    source: Rows,
    destination: str | os.PathLike[str],
    transform: Map,
    columns: int,
    *,
    key: str,
    metric: str | None = None,
    block: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write every vector of `source`, mapped by `transform` to `columns` dimensions, under its own id.

    The kind follows the suffix: .npy, .safetensors, .parquet, or FAISS (.faiss, .index): IVF-Flat and HNSW-Flat stay
    what they were, every other index becomes a flat one. Without a suffix: a folder of Qdrant's local mode. key: names
    the map; a run that was killed is resumed by one with the same source and key. metric: of a FAISS index or Qdrant
    collection ("inner", "euclidean", "cosine"; default: that of the source, else "inner"). FAISS knows no cosine: rows
    get unit length then, and the index ranks by inner product. overwrite: a file of that name that is not the source.
    Returns what was written and how it
    was verified. Raises ValueError for a destination that exists or is the source, and for rows that do not come out
    finite; nothing is left then.
    """
    path = check_destination(source, destination, overwrite=overwrite)
    with written_together([Target(path, resumable=True, overwrite=overwrite)]) as (unfinished,):
        facts = write_unfinished(
            source, unfinished, transform, columns, key=key, metric=metric, block=block, progress=progress
        )
    return {"output": str(path), **facts}


def write_unfinished(
    source: Rows,
    unfinished: Path,
    transform: Map,
    columns: int,
    *,
    key: str,
    metric: str | None = None,
    block: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The work of `write_index` at a path in a resumable temporary folder, which its caller renames.

    What an earlier run has left in that folder, of the same source and key, is gone on with.
    """
    metric = metric or source.metric or "inner"
    if metric == "cosine" and unfinished.suffix.lower() in INDEXES:
        transform = _to_unit(transform)
    kind = _Qdrant if unfinished.suffix == "" else _File
    try:
        with contextlib.closing(kind(source, unfinished, columns, metric, key, block or source.block_rows)) as target:
            resumed = target.done
            for start, rows in source.blocks(target.block, start=target.done):
                mapped = _finite(transform(rows), columns, source, start)
                with naming(unfinished):
                    target.append(start, mapped)
                progress("writing", 0.8 * target.done / len(source))
            with naming(unfinished):
                target.finish()
        progress("reading back", 0.8)
        verified = verify(source, unfinished, transform, metric, progress)
    except Exception:
        empty(unfinished.parent)  # the next run would meet the same
        raise
    return {"form": target.form, "rows": len(source), "columns": columns, "resumed_at": resumed, "verified": verified}


def digest_of(source: Rows, transform: Map) -> str:
    """What a map does to a few vectors: the same digest, the same map."""
    rows = transform(source.take(np.arange(min(16, len(source)))))
    return hashlib.sha256(np.ascontiguousarray(rows, np.float32).tobytes()).hexdigest()


def _to_unit(transform: Map) -> Map:
    return lambda rows: normalize_rows(torch.from_numpy(np.ascontiguousarray(transform(rows)))).numpy()


def _finite(rows: np.ndarray, columns: int, source: Rows, start: int) -> np.ndarray:
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ValueError(f"transform: expected {columns} columns, got shape {rows.shape}")
    rows = np.ascontiguousarray(rows, "<f4")
    if not np.isfinite(rows.sum()) and not np.isfinite(rows).all():
        bad = start + int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise ValueError(f"transform: the vector with id {str(source.ids[bad])!r} is mapped to NaN or infinity")
    return rows


def _origin(source: Rows) -> Path:
    """The file or folder that holds a collection; a path that leads nowhere for what is in memory or on a server."""
    return Path(source.details.get("file", source.source).removesuffix(f" ({source.details.get('collection')})"))


def _fingerprint(source: Rows, columns: int, metric: str, key: str, block: int, form: str) -> str:
    """What must be the same for a run to be resumed."""
    digest = hashlib.sha256()
    stamp: list[Any] = [source.source, source.form, *source.shape, str(source.dtype), columns, metric, key, block, form]
    path = _origin(source)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        hidden = path.is_dir() and any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden:  # hidden: locks, and what this run itself is writing beside the shards
            stat = file.stat()
            stamp += [file.name, stat.st_size, stat.st_mtime_ns]
    digest.update(json.dumps(stamp).encode())
    digest.update(np.ascontiguousarray(source.ids).tobytes())
    if not hasattr(source.values, "stream"):  # files that are read as a stream have a time; one row costs a pass
        digest.update(source.take(np.linspace(0, len(source) - 1, CHECKED).astype(np.int64)).tobytes())
    return digest.hexdigest()


def _recorded_rows(record: Path, key: str) -> int:
    """Rows that an earlier run left, and 0 where there was none or it was of another source or map."""
    try:
        found = read_json(record)
    except ValueError:
        return 0
    if found.get("key") != key or type(found.get("rows")) is not int:
        warnings.warn(
            "what an earlier run had begun to write is of other vectors or by another map; it is begun anew",
            stacklevel=2,
        )
        return 0
    return found["rows"]


# ---------------------------------------------------------------------- files


class _File:
    """An unfinished file and the record of its rows."""

    def __init__(self, source: Rows, path: Path, columns: int, metric: str, key: str, block: int) -> None:
        self.source, self.unfinished, self.columns, self.metric, self.block = source, path, columns, metric, block
        self.suffix = path.suffix.lower()
        self.form, self._header, self._tail = self._layout()
        self.record = path.with_name("progress.json")
        built = self._header is None
        self.rows = path.with_name("rows") if built else self.unfinished
        self._offset = len(self._header or b"")
        self._key = _fingerprint(source, columns, metric, key, block, self.form)
        self.done = _recorded_rows(self.record, self._key)
        size = self._offset + 4 * columns * len(source)
        if not self.done or not self.rows.is_file() or self.rows.stat().st_size < size:
            self.record.unlink(missing_ok=True)
            with naming(self.unfinished):
                self.rows.write_bytes(self._header or b"")
                reserve(self.rows, size)
                self._note(0)

    def _layout(self) -> tuple[str, bytes | None, bytes]:
        """(what is written, what stands before the rows or None where they are only collected, what stands after)."""
        source, d = self.source, self.columns
        n = len(source)
        counted = np.array_equal(source.ids, np.arange(n))
        if self.suffix == ".npy":
            return ".npy", _npy_header(n, d), b""
        if self.suffix == ".safetensors":
            return ".safetensors", _safetensors_header(n, d, ids=not counted), b"" if counted else _int64(source.ids)
        if self.suffix == ".parquet":
            return ".parquet", None, b""
        if source.details.get("kind") in ("ivf", "hnsw"):
            name = "IndexIVFFlat" if source.details["kind"] == "ivf" else "IndexHNSWFlat"
            require("faiss", extra="index")
            return name + (" in IndexIDMap" if name == "IndexHNSWFlat" and not counted else ""), None, b""
        metric = "euclidean" if self.metric == "euclidean" else "inner"
        id_map = None if counted else source.details.get("id_map") or "IndexIDMap2"
        name = "IndexFlatL2" if metric == "euclidean" else "IndexFlatIP"
        tail = flat_tail(source.ids, id_map=id_map)
        return f"{name} in {id_map}" if id_map else name, flat_header(n, d, metric, id_map=id_map), tail

    def _note(self, rows: int) -> None:
        self.done = rows
        write_text(self.record, json.dumps({"key": self._key, "rows": rows}))

    def append(self, start: int, rows: np.ndarray) -> None:
        """Put rows in their place and record them once they are on the disk."""
        with self.rows.open("r+b") as stream:
            stream.seek(self._offset + 4 * self.columns * start)
            rows.tofile(stream)
            stream.flush()
            os.fsync(stream.fileno())
        self._note(start + len(rows))

    def finish(self) -> None:
        """Make the unfinished file a complete one, still under its own name."""
        if self.rows == self.unfinished:
            with self.rows.open("r+b") as stream:
                stream.seek(self._offset + 4 * self.columns * len(self.source))
                stream.truncate()
                stream.write(self._tail)
                stream.flush()
                os.fsync(stream.fileno())
        elif self.suffix == ".parquet":
            _write_parquet(self.source, self._collected, self.columns, self.unfinished, self.block)
        else:
            _build_faiss(self.source, self._collected, self.columns, self.metric, self.unfinished)

    def _collected(self, start: int, stop: int) -> np.ndarray:
        count = (stop - start) * self.columns
        return np.fromfile(self.rows, "<f4", count, offset=4 * self.columns * start).reshape(stop - start, -1)

    def close(self) -> None:
        """Nothing is held open between blocks."""


def _npy_header(n: int, d: int) -> bytes:
    import io

    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (n, d)})
    return stream.getvalue()


def _safetensors_header(n: int, d: int, *, ids: bool) -> bytes:
    end = 4 * n * d
    entries: dict[str, Any] = {"vectors": {"dtype": "F32", "shape": [n, d], "data_offsets": [0, end]}}
    if ids:
        entries["ids"] = {"dtype": "I64", "shape": [n], "data_offsets": [end, end + 8 * n]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _int64(ids: np.ndarray) -> bytes:
    return ids.astype("<i8").tobytes()


def _write_parquet(source: Rows, collected: Any, columns: int, target: Path, block: int) -> None:
    """The rows with their ids or, where the source is a Parquet file, with all its other columns."""
    arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
    kept = _parquet_columns(source)
    # A single column of lists keeps its name; many columns of numbers become one of lists.
    lists = kept is not None and getattr(source.values, "is_list", False)
    name = source.values.columns[0] if lists else "vector"  # pyright: ignore
    writer = None
    try:
        start = 0
        for others in kept if kept is not None else _id_columns(source, arrow, block):
            for first in range(0, others.num_rows, _ROW_GROUP):
                part = others.slice(first, _ROW_GROUP)
                stop = start + part.num_rows
                values = arrow.array(collected(start, stop).reshape(-1), arrow.float32())
                vectors = arrow.FixedSizeListArray.from_arrays(values, columns)
                table = part.append_column(name if name not in part.column_names else "vector", vectors)
                writer = writer or parquet.ParquetWriter(target, table.schema)
                writer.write_table(table, row_group_size=_ROW_GROUP)
                start = stop
    finally:
        if writer is not None:
            writer.close()


def _id_columns(source: Rows, arrow: Any, block: int) -> Iterator[Any]:
    for start in range(0, len(source), max(block, 1)):
        yield arrow.table({"id": arrow.array(source.ids[start : start + max(block, 1)])})


def _parquet_columns(source: Rows) -> Iterator[Any] | None:
    """What a Parquet file has beside its vectors, row group by row group; None where the source is no such file."""
    if (
        source.kind != "table"
        or not source.source.lower().endswith(".parquet")
        or not (source.numbered or source.details["id_column"])
    ):
        return None
    values: Any = source.values
    names = [name for name in values.groups.schema.names if name not in values.columns]
    return (values.groups.load(group, names) for group, size in enumerate(values.groups.sizes) if size)


def _build_faiss(source: Rows, collected: Any, columns: int, metric: str, target: Path) -> None:
    """An IVF or HNSW index like that of the source, trained anew, as the cells of the old space mean nothing now."""
    faiss = require("faiss", extra="index")
    kind = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    n, details, step = len(source), source.details, source.block_rows
    counted = np.array_equal(source.ids, np.arange(n))
    if details["kind"] == "ivf":
        flat = faiss.IndexFlatL2(columns) if metric == "euclidean" else faiss.IndexFlatIP(columns)
        index = faiss.IndexIVFFlat(flat, columns, details["nlist"], kind)
        index.cp.seed = 1234
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.choice(n, min(n, _TRAINED_ON, max(256 * details["nlist"], 1)), replace=False))
        training = np.empty((len(chosen), columns), np.float32)
        for start in range(0, n, step):
            stop = min(start + step, n)
            first, last = np.searchsorted(chosen, (start, stop))
            training[first:last] = collected(start, stop)[chosen[first:last] - start]
        index.train(training)
        index.nprobe = details["nprobe"]
    else:
        index = faiss.IndexHNSWFlat(columns, details["m"], kind)
        index.hnsw.efConstruction = details["ef"]
        if not counted:
            index = faiss.IndexIDMap(index)
    threads = faiss.omp_get_max_threads()
    # The links of HNSW depend on the order in which threads come; one thread gives the same index each time.
    faiss.omp_set_num_threads(1)
    try:
        for start in range(0, n, step):
            stop = min(start + step, n)
            if counted and details["kind"] == "hnsw":
                index.add(collected(start, stop))
            else:
                index.add_with_ids(collected(start, stop), source.ids[start:stop].astype(np.int64))
    finally:
        faiss.omp_set_num_threads(threads)
    write_faiss(index, target)


# ---------------------------------------------------------------------- Qdrant


class _Qdrant:
    """A folder of Qdrant's local mode, filled point by point under the ids of the source.

    Payloads and all other vectors are copied, and so are points without the vector that is mapped.
    """

    def __init__(self, source: Rows, path: Path, columns: int, metric: str, key: str, block: int) -> None:
        client = require("qdrant_client", extra="qdrant")
        self._models = require("qdrant_client.models", extra="qdrant")
        self.source, self.unfinished, self.block = source, path, block
        self.form = "Qdrant folder"
        self.record = path.with_name("progress.json")
        self._key = _fingerprint(source, columns, metric, key, block, self.form)
        self.done = _recorded_rows(self.record, self._key) if path.is_dir() else 0
        if not self.done and path.exists():
            shutil.rmtree(path)
        if (path / "meta.json").exists():
            QdrantFolder(path).check()  # what the client is to open may be of anybody
        self._client = client.QdrantClient(path=str(self.unfinished))
        self._rows: QdrantRows = source.values  # pyright: ignore
        if not self._client.collection_exists(self._rows.collection):
            names = {"cosine": "Cosine", "inner": "Dot", "euclidean": "Euclid"}
            dense = {name: dict(params) for name, params in self._rows.dense.items()}
            # Mapped vectors are no whole numbers.
            dense[self._rows.vector] |= {"size": columns, "distance": names[metric], "datatype": None}
            config = {name: self._models.VectorParams(**params) for name, params in dense.items()}
            sparse = {name: self._models.SparseVectorParams(**params) for name, params in self._rows.sparse.items()}
            self._client.create_collection(
                self._rows.collection, vectors_config=config.get("", config), sparse_vectors_config=sparse or None
            )

    def append(self, start: int, rows: np.ndarray) -> None:
        """Put points in; one that a killed run had put in already is the same again."""
        stop = start + len(rows)
        self._put(self._rows.points[start:stop], rows)
        self.done = stop
        write_text(self.record, json.dumps({"key": self._key, "rows": stop}))

    def _put(self, ids: Sequence[Any], rows: np.ndarray | None) -> None:
        points = []
        for place, (name, (vectors, payload)) in enumerate(zip(ids, self._rows.whole(ids))):
            copied = {key: self._models.SparseVector(**one) if isinstance(one, dict) else one
                      for key, one in vectors.items() if one is not None}  # fmt: skip
            if rows is not None:
                copied[self._rows.vector] = rows[place].tolist()
            points.append(self._models.PointStruct(id=name, vector=copied, payload=payload))
        try:
            self._client.upsert(self._rows.collection, points=points)
        except sqlite3.OperationalError as error:  # a full disk
            raise OSError(str(error)) from error

    def finish(self) -> None:
        """Copy the points without the vector."""
        others = self._rows.others
        for start in range(0, len(others), self.block):
            self._put(others[start : start + self.block], None)

    def close(self) -> None:
        """Let go of the folder."""
        self._client.close()
