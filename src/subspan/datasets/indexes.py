"""Stored collections of vectors behind one interface: rows with their ids, read in blocks, whatever holds them.

FAISS index files, tables (.npy, .safetensors, .parquet, …), folders of such tables as shards, and Qdrant collections.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from subspan.base import read_table
from subspan.base.array_files import ArrayRows
from subspan.base.reading import reading, regular_file, text_lines
from subspan.base.rows import Rows, text_array
from subspan.base.tables import read_entries

from .faiss_files import FAISS_SUFFIXES, open_faiss
from .qdrant import is_qdrant, open_qdrant
from .qdrant_folder import point_id

Metric = Literal["inner", "euclidean", "cosine"]
ID_COLUMNS = ("id", "ids", "_id")
UNIT_TOLERANCE = 1e-3
NEARLY_UNIT = 0.02
"""How far lengths may lie from one where unit vectors were quantised or rounded."""
_SHARD_SUFFIXES = (".npy", ".safetensors", ".parquet")
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredVectors:
    """An opened collection of n vectors (n, d); nothing but its ids is in memory where the format allows that.

    kind: "faiss", "table", "shards" or "qdrant"; form: the same in words ("IndexFlatIP in IndexIDMap"). ids: int64 or
    text, unique; numbered: they are the row
    numbers (of an inverted file: in another order). metric: what the collection ranks by, None for a table. exact:
    False where the vectors are stored as codes, so that rows are reconstructions. Rows come as float32, or as float64
    where they are stored so.
    """

    source: str
    kind: str
    form: str
    values: Rows = field(repr=False)
    ids: Shaped[np.ndarray, " n"] = field(repr=False)
    metric: Metric | None = None
    exact: bool = True
    numbered: bool = False
    details: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(vectors, dimensions)."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """As stored; rows of float16 and integers are given as float32."""
        return self.values.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self, size: int | None = None, *, start: int = 0) -> Iterator[tuple[int, Float[np.ndarray, "b d"]]]:
        """(position of its first row, rows) of consecutive blocks of `size` rows (default: 16 MB), from `start` on.

        Raises ValueError, naming the first, for rows with NaN or infinity.
        """
        size = size or self.block_rows
        for first, stored in self._stored(size, start):
            rows = _working(stored)
            self._check_finite(rows, range(first, first + len(rows)))
            yield first, rows

    def _stored(self, size: int, start: int) -> Iterator[tuple[int, np.ndarray]]:
        streamed = getattr(self.values, "stream", None)
        firsts = range(start, len(self), size)
        if streamed is not None:
            yield from zip(firsts, streamed(size, start))
            return
        for first in firsts:
            yield first, self.values.read(first, min(first + size, len(self)))

    @property
    def block_rows(self) -> int:
        """Rows in a block of 16 MB."""
        return max(1, _BLOCK_BYTES // (4 * self.shape[1]))

    def take(self, positions: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
        """The rows at these positions, in this order."""
        order = np.argsort(positions, kind="stable")
        rows = np.empty((len(positions), self.shape[1]), np.float64 if self.dtype == np.float64 else np.float32)
        size = self.block_rows
        if hasattr(self.values, "stream"):
            # One pass: single rows of such a file cost as much as the row group that they are in.
            ordered = positions[order]
            for start, stored in self._stored(size, 0):
                first, last = np.searchsorted(ordered, (start, start + len(stored)))
                rows[order[first:last]] = _working(stored[ordered[first:last] - start])
        else:
            for first in range(0, len(order), size):
                part = order[first : first + size]
                rows[part] = _working(self.values.take(positions[part]))
        self._check_finite(rows, positions)
        return rows

    def positions(self, ids: Shaped[np.ndarray, " k"], *, name: str = "ids") -> Int[np.ndarray, " k"]:
        """Where the vectors of these ids are. Raises ValueError for repeated and for unknown ids."""
        place, known = self.look_up(ids, name=name)
        unknown = np.flatnonzero(~known)
        if len(unknown):
            raise ValueError(
                f"{name}: {len(unknown)} of {len(ids)} ids are not in {self.source} (the first is "
                f"{str(ids[unknown[0]])!r})"
            )
        return place

    def look_up(
        self, ids: Shaped[np.ndarray, " k"], *, name: str = "ids"
    ) -> tuple[Int[np.ndarray, " k"], Bool[np.ndarray, " k"]]:
        """Where the vectors of these ids are, and which of the ids there are. Raises ValueError for repeated ids."""
        own, wanted = self.ids, np.asarray(ids)
        if self.kind == "qdrant" and wanted.dtype.kind == "U":
            wanted = np.array([point_id(text) for text in wanted.tolist()], dtype=str)
        check_unique(wanted, name)
        if own.dtype.kind != wanted.dtype.kind:
            own, wanted = own.astype(str), wanted.astype(str)
        order = np.argsort(own, kind="stable")
        place = np.minimum(np.searchsorted(own, wanted, sorter=order), len(own) - 1)
        found = order[place]
        return found, own[found] == wanted

    def norms(self) -> tuple[float, float]:
        """(smallest, largest) length of a vector: one pass over all of them."""
        low, high = np.inf, 0.0
        for _, rows in self.blocks():
            lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
            low, high = min(low, float(lengths.min())), max(high, float(lengths.max()))
        return low, high

    def facts(self) -> dict[str, Any]:
        """What there is, with one pass for the lengths: n, d, metric, dtype, ids, exact, lengths, unit_length."""
        low, high = self.norms()
        return {
            "source": self.source,
            "kind": self.kind,
            "form": self.form,
            "n": len(self),
            "d": self.shape[1],
            "metric": self.metric,
            "dtype": str(self.dtype),
            "ids": "row numbers" if self.numbered else "whole numbers" if self.ids.dtype.kind in "iu" else "texts",
            "exact": self.exact,
            "lengths": [low, high],
            "unit_length": is_unit(low, high),
        }

    def _check_finite(self, rows: np.ndarray, positions: Any) -> None:
        if np.isfinite(rows.sum()):
            return
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            name = self.ids[positions[bad[0]]]
            raise ValueError(f"{self.source}: the vector with id {str(name)!r} contains NaN or infinity")


def in_memory(rows: Float[np.ndarray, "n d"], source: str, ids: Any = None) -> StoredVectors:
    """Rows in memory, or memory-mapped, as a collection; without ids those are the row numbers."""
    names = np.arange(len(rows)) if ids is None else as_ids(np.asarray(ids))
    return StoredVectors(source, "rows", "rows", ArrayRows(rows), names, numbered=ids is None)


def is_stored(source: str) -> bool:
    """Whether `open_index` alone reads it: a FAISS file, Qdrant, or a folder of tables."""
    path = Path(source)
    if is_qdrant(source) or path.suffix.lower() in FAISS_SUFFIXES:
        return True
    return path.is_dir() and any(entry.suffix.lower() in _SHARD_SUFFIXES for entry in path.iterdir())


def is_unit(low: float, high: float, *, tolerance: float = UNIT_TOLERANCE) -> bool:
    """Whether lengths from `low` to `high` are all one, by default to the precision of stored vectors."""
    return abs(low - 1) <= tolerance and abs(high - 1) <= tolerance


def check_unique(ids: np.ndarray, name: str) -> np.ndarray:
    """`ids`, or ValueError naming the first that is repeated."""
    ordered = np.sort(ids)
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(repeated):
        raise ValueError(f"{name}: the id {str(ordered[repeated[0]])!r} occurs more than once")
    return ids


def open_index(
    source: str | os.PathLike[str] | Any,
    *,
    ids: str | os.PathLike[str] | None = None,
    column: str | None = None,
    id_column: str | None = None,
    collection: str | None = None,
) -> StoredVectors:
    """Open stored vectors: a FAISS file, a table, a folder of tables (shards), or a Qdrant folder, address or client.

    ids: a file with one id a row (.npy of whole numbers or texts, or .txt), for formats that hold none. column: the
    vectors (a named vector in Qdrant); id_column: their ids (default: a column named id, else the row numbers).
    collection: which one of Qdrant, where there are several. Raises ValueError, in one line, for what is damaged,
    ragged, empty or ambiguous.
    """
    if is_qdrant(source):
        if ids is not None or id_column is not None:
            raise ValueError("ids: a Qdrant collection has its own ids")
        found: dict[str, Any] = open_qdrant(source, collection, column)
        found["ids"] = as_ids(found["ids"])
        opened = StoredVectors(kind="qdrant", **found)
    else:
        path = Path(source)
        if collection is not None:
            raise ValueError(f"collection: {str(path)!r} is no Qdrant folder, address or client")
        if not path.exists():
            raise ValueError(f"{str(path)!r} does not exist")
        if path.is_dir():
            opened = _open_shards(path, column, id_column)
        elif path.suffix.lower() in FAISS_SUFFIXES:
            if column is not None or id_column is not None:
                raise ValueError(f"column: {str(path)!r} is a FAISS index without columns")
            opened = StoredVectors(kind="faiss", **open_faiss(path))
        else:
            opened = _open_table(path, column, id_column)
    if ids is not None:
        opened = _with_ids(opened, Path(ids))
    try:
        check_unique(opened.ids, opened.source)
    except ValueError as error:
        raise ValueError(
            f"{error}: {len(np.unique(opened.ids))} ids for {len(opened)} vectors; number the vectors themselves, and "
            "keep beside which item each is of"
        ) from error
    return opened


def read_ids(path: str | os.PathLike[str]) -> Shaped[np.ndarray, " n"]:
    """Ids of a file, one a row: .npy (whole numbers or texts) or lines of text."""
    source = regular_file(path, "ids")
    with reading(source, "ids"):
        if source.suffix.lower() != ".npy":
            return text_array([line.rstrip("\n") for _, line in text_lines(source)], f"ids: {str(source)!r}")
        names = text_array(read_entries(source, "ids"), f"ids: {str(source)!r}")
        return _whole(names) if np.load(source, allow_pickle=False).dtype.kind in "iu" else names


def as_ids(values: np.ndarray) -> Shaped[np.ndarray, " n"]:
    """Whole numbers as int64, everything else as text."""
    if values.dtype.kind in "iu":
        if values.dtype == np.uint64 and len(values) and values.max() > np.iinfo(np.int64).max:
            return values.astype(str)
        return values.astype(np.int64)
    return values.astype(str)


def _with_ids(opened: StoredVectors, path: Path) -> StoredVectors:
    if not opened.numbered:
        raise ValueError(f"ids: {opened.source} has ids of its own")
    ids = read_ids(path)
    if len(ids) != len(opened):
        raise ValueError(f"ids: {str(path)!r} has {len(ids)} ids for {len(opened)} vectors of {opened.source}")
    # The file has them by row number; an inverted file gives its rows in another order.
    return dataclasses.replace(opened, ids=ids[opened.ids], numbered=False)


def _working(rows: np.ndarray) -> np.ndarray:
    """Contiguous float32, or float64 where the rows are that."""
    return np.ascontiguousarray(rows, dtype=np.float64 if rows.dtype == np.float64 else np.float32)


# ---------------------------------------------------------------------- tables


def _open_table(path: Path, column: str | None, id_column: str | None) -> StoredVectors:
    columns = column_names(path)
    if id_column is None:
        id_column = next((name for name in ID_COLUMNS if name in columns and name != column), None)
    table = read_table(path, column=column, id_column=id_column)
    if table.ids is None:
        ids: np.ndarray = np.arange(len(table))
    else:
        id_column = table.id_column or id_column
        ids = text_array(table.ids, f"the ids of {str(path)!r}")
        if id_column is not None and columns.get(id_column, False):
            ids = _whole(ids)
    stored = table.values.dtype
    return StoredVectors(
        str(path), "table", f"{path.suffix.lower()} table", table.values, ids, numbered=table.ids is None,
        details={"column": column, "id_column": id_column, "dtype": str(stored)},
    )  # fmt: skip


def _whole(names: np.ndarray) -> np.ndarray:
    """Names of whole numbers as int64, or as they are where one is missing or beyond it."""
    try:
        return names.astype(np.int64)
    except (ValueError, OverflowError):
        return names


def column_names(path: Path) -> dict[str, bool]:
    """Names of the columns of a file that has any, and whether each holds whole numbers."""
    from subspan.base import require

    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
            return {entry.name: arrow.types.is_integer(entry.type) for entry in parquet.read_schema(path)}
        if suffix in (".arrow", ".feather"):
            arrow, ipc = require("pyarrow", extra="tables"), require("pyarrow.ipc", extra="tables")
            with ipc.open_file(arrow.memory_map(str(path))) as file:
                return {entry.name: arrow.types.is_integer(entry.type) for entry in file.schema}
        if suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as archive:
                return {name: archive.get_slice(name).get_dtype() == "I64" for name in archive.keys()}  # noqa: SIM118
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name].dtype.kind in "iu" for name in archive.files if name in ID_COLUMNS}
        if suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as stream:
                line = stream.readline().strip()
            return dict.fromkeys(line.split("," if suffix == ".csv" else "\t"), False)
    except ImportError:
        raise
    except Exception:  # the reader of the table says what is wrong with the file
        return {}
    return {}


@dataclass(frozen=True)
class _Shards:
    """Tables one after the other."""

    parts: tuple[Rows, ...]
    starts: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.starts[-1]), self.parts[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        first, last = (int(np.searchsorted(self.starts, place, "right")) - 1 for place in (start, stop - 1))
        return np.concatenate(
            [
                self.parts[part].read(
                    max(0, start - int(self.starts[part])),
                    min(stop, int(self.starts[part + 1])) - int(self.starts[part]),
                )
                for part in range(first, last + 1)
            ]
        )

    def take(self, indices: np.ndarray) -> np.ndarray:
        taken = np.empty((len(indices), self.shape[1]), self.dtype)
        owner = np.searchsorted(self.starts, indices, "right") - 1
        for part in np.unique(owner):
            here = owner == part
            taken[here] = self.parts[part].take(indices[here] - self.starts[part])
        return taken


def _open_shards(folder: Path, column: str | None, id_column: str | None) -> StoredVectors:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SHARD_SUFFIXES and path.is_file())
    files = [path for path in files if not path.name.startswith(".")]
    if not files:
        raise ValueError(f"{str(folder)!r} is a folder without {', '.join(_SHARD_SUFFIXES)} files")
    parts = [_open_table(path, column, id_column) for path in files]
    first = parts[0]
    for part in parts[1:]:
        if part.shape[1] != first.shape[1] or part.dtype != first.dtype:
            raise ValueError(
                f"{part.source}: {part.shape[1]} columns of {part.dtype}, while {first.source} has {first.shape[1]} "
                f"of {first.dtype}; the vectors of one collection must be alike"
            )
        if part.numbered != first.numbered:
            raise ValueError(f"{part.source}: all shards must have ids, or none")
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    numbered = first.numbered
    ids = np.arange(int(starts[-1])) if numbered else np.concatenate([part.ids for part in parts])
    values = _Shards(tuple(part.values for part in parts), starts)
    return StoredVectors(str(folder), "shards", f"{len(parts)} shards", values, ids, numbered=numbered)
