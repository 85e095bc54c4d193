"""Tables of embeddings in files, read row block by row block where the format allows it."""

from __future__ import annotations

import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Integer
from safetensors import safe_open

from .columns import Columns, Kind, Progressions, choose_columns, listed
from .extras import require
from .kinds import LINES, SEPARATED, TABLES, check_input, suffix_of
from .reading import characters, check_memory, json_records, parse_json, quoted, reading, regular_file, separated_rows

MAX_UNPACKED_BYTES = 16 * 2**30
_UNPACKED_AT_ONCE = 2**30
_SUSPICIOUS_RATIO = 200
_MAX_HEADER = 2**20
_BLOCK_NUMBERS = 2**20
_WHOLE = re.compile(r"[+-]?\d+")


@runtime_checkable
class Rows(Protocol):
    """Where the numbers are: blocks and single rows of a matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, dimensions)."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """As stored."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop."""
        ...

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Rows at these places."""
        ...


@dataclass(frozen=True)
class Table:
    """Embeddings of a file, one row each; only what is asked for is read where the format allows it.

    ids, labels, texts: one entry a row, or None; id_column: where the ids are from. Rows come as float32, or float64
    where the file holds that (or, in Parquet and Arrow, wide integers).
    """

    source: Path
    values: Rows = field(repr=False)
    ids: tuple[str, ...] | None = field(default=None, repr=False)
    labels: tuple[str, ...] | None = field(default=None, repr=False)
    texts: tuple[str, ...] | None = field(default=None, repr=False)
    id_column: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, dimensions)."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the rows that are given: float32, or float64 where the file holds float64."""
        return np.dtype(np.float64) if self.values.dtype == np.float64 else np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int = 8192) -> Iterator[Float[np.ndarray, "b d"]]:
        """The rows in order, `size` at a time."""
        if size < 1:
            raise ValueError(f"size: at least 1 row, got {size}")
        for block in stored_blocks(self.values, size):
            yield block.astype(self.dtype, copy=False)

    def rows(self, indices: Iterable[int] | Integer[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
        """The rows at these indices, in this order. Raises IndexError for one that is not there."""
        wanted = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64)
        if len(wanted) and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"indices: from 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}")
        return self.values.take(wanted % len(self)).astype(self.dtype, copy=False)

    def array(self) -> Float[np.ndarray, "n d"]:
        """All rows, in memory. Raises ValueError where the machine has less than they take."""
        check_memory(math.prod(self.shape) * self.dtype.itemsize, f"path: {str(self.source)!r}")
        return np.concatenate(list(self.batches()))


def stored_blocks(values: Rows, size: int, start: int = 0) -> Iterator[np.ndarray]:
    """The rows from `start` on as they are stored, `size` at a time, in one pass over the file."""
    streamed: Any = getattr(values, "stream", None)
    if streamed is not None:
        yield from streamed(size, start)
        return
    n = values.shape[0]
    for first in range(start, n, size):
        yield values.read(first, min(first + size, n))


class FiniteCheck:
    """Passes batches on unchanged and counts NaN and infinite values: `n_values`, `n_rows`, `first_row` (or None)."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self._batches = batches
        self.n_values = self.n_rows = 0
        self.first_row: int | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        """The batches; the counts are complete at the end."""
        self.n_values = self.n_rows = start = 0
        self.first_row = None
        for batch in self._batches:
            wrong = ~np.isfinite(batch)
            rows = np.flatnonzero(wrong.any(axis=1))
            if len(rows):
                self.n_values += int(wrong.sum())
                self.n_rows += len(rows)
                self.first_row = start + int(rows[0]) if self.first_row is None else self.first_row
            start += len(batch)
            yield batch


def read_table(
    path: str | os.PathLike[str],
    *,
    column: str | None = None,
    id_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
) -> Table:
    """Open a table of embeddings: .npy, .npz, .safetensors, .parquet, .arrow, .feather, .csv, .tsv or .jsonl.

    column: the array of an archive, or the column of vectors: lists of numbers, or texts of JSON lists. Where None, the
    only one that fits, or all numeric columns beside the others named here, without ids, pandas' index, whole numbers
    that only rise, and constant whole numbers (a warning names those). id_, label_, text_column: columns, or one-axis
    arrays of an archive, with an entry a row; ids default to a column called id, else to one of those left out. Raises
    ValueError, in one line, for what is missing, cut off, empty, ragged, not numeric, not two-dimensional, pickled, or
    unpacks to far more than it should.
    """
    source = regular_file(path)
    names = {"ids": id_column, "labels": label_column, "texts": text_column}
    check_input(str(source), TABLES, folders=False)
    suffix = suffix_of(source)
    openers: dict[str, Callable[..., Table]] = {
        **dict.fromkeys(SEPARATED, _open_separated), **dict.fromkeys(LINES, _open_json_lines),
        ".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors,
    }  # fmt: skip
    with reading(source, problem=f"is not a whole {suffix} file"):
        table = openers.get(suffix, _open_arrow)(source, column, names)
    if 0 in table.shape:
        raise ValueError(f"path: {str(source)!r} is empty: {table.shape[0]} rows of {table.shape[1]} values")
    return table


def read_arrays(path: str | os.PathLike[str], name: str = "path") -> dict[str, np.ndarray]:
    """All arrays of an .npz archive. Raises ValueError for one that is damaged or larger than the memory."""
    source = regular_file(path, name)
    sizes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in _npz_headers(source).values())
    check_memory(sizes, f"{name}: {str(source)!r}")
    with reading(source, name), np.load(source, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def read_entries(path: str | os.PathLike[str], name: str = "path") -> tuple[str, ...]:
    """The entries of a one-axis .npy array of texts or whole numbers, as texts. Raises ValueError for another."""
    source = regular_file(path, name)
    with reading(source, name):
        with source.open("rb") as stream:
            shape, dtype = _npy_header(stream, str(source))
        if len(shape) != 1 or dtype.kind not in "iubUS":
            what = "pickled objects" if dtype.hasobject else f"{dtype} of shape {shape}"
            raise ValueError(f"{name}: {str(source)!r} holds {what}; one label or id a row is needed")
        values = np.load(source, mmap_mode="r" if math.prod(shape) * dtype.itemsize else None, allow_pickle=False)
        return entry_texts(values, f"{name}: row {{}} of {str(source)!r}")


@dataclass(frozen=True)
class ArrayRows:
    """A matrix in memory, or mapped from a file."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, dimensions)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """As stored."""
        return self.values.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Copy of rows start to stop."""
        return np.array(self.values[start:stop])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Copy of the rows at these places."""
        return np.array(self.values[indices])


def _open_npy(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    for name in (column, *names.values()):
        if name is not None:
            raise ValueError(f"column: {str(source)!r} is a single array without columns, so there is no {name!r}")
    with source.open("rb") as stream:
        shape, dtype = _npy_header(stream, str(source))
        expected = stream.tell() + math.prod(shape) * dtype.itemsize
    _check_matrix(shape, dtype, str(source))
    if source.stat().st_size < expected:
        raise ValueError(f"path: {str(source)!r} is cut off: {source.stat().st_size} of {expected} bytes")
    mapped = np.load(source, mmap_mode="r", allow_pickle=False) if math.prod(shape) else np.empty(shape, dtype)
    return Table(source, ArrayRows(mapped))


def _npy_header(stream: Any, where: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an .npy stream, which stands at its data afterwards."""
    with reading(where, problem="is not an .npy array"):
        start = stream.read(10)
        version = tuple(start[6:8])
        if start[:6] != b"\x93NUMPY" or version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError("its first bytes are others")
        start += stream.read(2) if version > (1, 0) else b""
        length = int.from_bytes(start[8:], "little")
        if length > _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        # Version 3 is version 2 with names of fields in UTF-8, and the headers of matrices have no fields.
        header = io.BytesIO(start[8:] + stream.read(length))
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(header)
        if any(size < 0 for size in shape):
            raise ValueError(f"shape {shape}")
    return shape, dtype


def _check_matrix(shape: tuple[int, ...], dtype: np.dtype, where: str) -> None:
    if dtype.hasobject:
        raise ValueError(f"path: {where!r} holds pickled Python objects, which are not read; store numbers instead")
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise ValueError(f"path: {where!r} holds {dtype}, real numbers are needed")
    if len(shape) != 2:
        raise ValueError(f"path: {where!r} has shape {shape}; a table (rows, dimensions) is needed")


def _open_npz(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    headers = _npz_headers(source)
    if {"indices", "indptr", "format", "data"} <= headers.keys():
        raise ValueError(f"path: {str(source)!r} is a sparse matrix of SciPy; a table is dense: save X.toarray()")
    if {"adj_indptr", "attr_indptr"} <= headers.keys():
        raise ValueError(f"path: {str(source)!r} is a graph, not a table; `subspan cluster` and read_graph read it")
    chosen = _choose(column, headers, source)
    _check_matrix(*headers[chosen], f"{source}: {chosen}")
    wanted = {kind: _named(name, headers, source) for kind, name in names.items() if name is not None}
    sizes = sum(math.prod(headers[name][0]) * headers[name][1].itemsize for name in {chosen, *wanted.values()})
    check_memory(sizes, f"path: {str(source)!r}")
    with np.load(source, allow_pickle=False) as archive:
        others = {kind: archive[name] for kind, name in wanted.items()}
        return Table(source, ArrayRows(archive[chosen]), **_entries(others, headers[chosen][0][0], source))


def _npz_headers(source: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array, read without unpacking; sizes that do not agree with them are refused."""
    headers: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    with reading(source, problem="is not a whole .npz archive"), zipfile.ZipFile(source) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name in headers:
                raise ValueError(f"path: {str(source)!r} has several arrays called {quoted(name)}")
            with archive.open(entry) as stream:
                shape, dtype = _npy_header(stream, f"{source}: {name}")
                declared = stream.tell() + math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and declared != entry.file_size:
                size = f"{entry.file_size} bytes, its shape {shape} makes {declared}"
                raise ValueError(f"path: {str(source)!r} is damaged: {quoted(name)} unpacks to {size}")
            ratio = entry.file_size / max(entry.compress_size, 1)
            if entry.file_size > MAX_UNPACKED_BYTES or (
                entry.file_size > _UNPACKED_AT_ONCE and ratio > _SUSPICIOUS_RATIO
            ):
                size = f"{entry.file_size} bytes from {entry.compress_size}"
                raise ValueError(f"path: {str(source)!r} is refused: {quoted(name)} would unpack to {size}")
            headers[name] = (shape, dtype)
    return headers


@dataclass(frozen=True)
class _Safetensors:
    """One tensor of a safetensors file; each read opens the file."""

    source: Path
    name: str
    shape: tuple[int, int]
    dtype: np.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        with reading(self.source), safe_open(self.source, framework="pt") as archive:
            return _as_numpy(archive.get_slice(self.name)[start:stop])

    def take(self, indices: np.ndarray) -> np.ndarray:
        with reading(self.source), safe_open(self.source, framework="pt") as archive:
            rows = archive.get_slice(self.name)
            taken = [_as_numpy(rows[int(index) : int(index) + 1]) for index in indices]
        return np.concatenate(taken) if taken else np.empty((0, self.shape[1]), self.dtype)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    numpy_has_it = tensor.dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return (tensor if numpy_has_it else tensor.float()).numpy()


def _open_safetensors(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    with safe_open(source, framework="pt") as archive:
        slices = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118
        headers = {name: (tuple(rows.get_shape()), _safetensors_dtype(rows)) for name, rows in slices.items()}
        chosen = _choose(column, headers, source)
        _check_matrix(*headers[chosen], f"{source}: {chosen}")
        others = {
            kind: _as_numpy(archive.get_tensor(_named(name, headers, source)))
            for kind, name in names.items()
            if name is not None
        }
    (n, d), dtype = headers[chosen]
    return Table(source, _Safetensors(source, chosen, (n, d), dtype), **_entries(others, n, source))


def _safetensors_dtype(rows: Any) -> np.dtype:
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
             "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip
    return np.dtype(kinds.get(rows.get_dtype(), np.float32))


# ---------------------------------------------------------------------- Parquet and Arrow


class _Parquet:
    """The row groups of a Parquet file, which is opened for each reading."""

    def __init__(self, source: Path) -> None:
        self.source = source
        with self._opened() as file:
            self.schema = file.schema_arrow
            self.sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]

    def _opened(self) -> Any:
        parquet: Any = require("pyarrow.parquet", extra="tables")
        return parquet.ParquetFile(self.source, pre_buffer=False, buffer_size=1 << 20)

    def load(self, index: int, columns: list[str]) -> Any:
        check_memory(8 * self.sizes[index] * len(columns), f"path: row group {index} of {str(self.source)!r}")
        with reading(self.source), self._opened() as file:
            return file.read_row_group(index, columns=columns).combine_chunks()

    def first(self, name: str) -> Any:
        """The first value of a column that is not empty in its first row."""
        with self._opened() as file:
            batch = next(file.iter_batches(1, columns=[name]), None)
            return None if batch is None or not len(batch) else batch.column(0)[0].as_py()

    def stream(self, size: int, columns: list[str], first: int) -> Iterator[Any]:
        """Tables of at most `size` rows, from row group `first` on."""
        arrow: Any = require("pyarrow", extra="tables")
        with self._opened() as file:
            batches = file.iter_batches(size, row_groups=list(range(first, len(self.sizes))), columns=columns)
            while True:
                with reading(self.source):
                    batch = next(batches, None)
                    if batch is None:
                        return
                    table = arrow.Table.from_batches([batch]).combine_chunks()
                yield table


class _Arrow:
    """The record batches of an Arrow (Feather) file, mapped into memory."""

    def __init__(self, source: Path) -> None:
        arrow, ipc = require("pyarrow", extra="tables"), require("pyarrow.ipc", extra="tables")
        self.source = source
        self._file = ipc.open_file(arrow.memory_map(str(source)))
        self.schema = self._file.schema
        self.sizes = [self._file.get_batch(index).num_rows for index in range(self._file.num_record_batches)]

    def load(self, index: int, columns: list[str]) -> Any:
        arrow: Any = require("pyarrow", extra="tables")
        with reading(self.source):
            table = arrow.Table.from_batches([self._file.get_batch(index)]).select(columns)
            # Its buffers are taken from the file as they are: offsets that lead out of them would end the process.
            table.validate(full=True)
        return table

    def first(self, name: str) -> Any:
        """The first value of a column."""
        group = next((index for index, size in enumerate(self.sizes) if size), None)
        return None if group is None else self.load(group, [name])[name][0].as_py()

    def stream(self, size: int, columns: list[str], first: int) -> Iterator[Any]:
        """The record batches from `first` on."""
        for index in range(first, len(self.sizes)):
            table = self.load(index, columns)
            for start in range(0, len(table), size):
                yield table.slice(start, size)


@dataclass(frozen=True)
class _ArrowColumns:
    """The column of vectors, or the columns of numbers, of row groups that are read one at a time."""

    groups: _Parquet | _Arrow
    chosen: Columns
    starts: np.ndarray
    width: int
    dtype: np.dtype

    @property
    def columns(self) -> tuple[str, ...]:
        """Names in the file."""
        return self.chosen.names

    @property
    def is_list(self) -> bool:
        """Whether one column holds the vectors."""
        return self.chosen.kind != "real"

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.starts[-1]), self.width

    def read(self, start: int, stop: int) -> np.ndarray:
        first, last = (int(np.searchsorted(self.starts, place, "right")) - 1 for place in (start, stop - 1))
        blocks = []
        for group in range(first, last + 1):
            offset = int(self.starts[group])
            blocks.append(self.group(group)[max(0, start - offset) : stop - offset])
        return np.concatenate(blocks)

    def stream(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Blocks of `size` rows from `start` on, in one pass, however large the row groups are."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        waiting, row = [], int(self.starts[first])
        for table in self.groups.stream(min(size, 8192), list(self.columns), first):
            values = self._matrix(table, row)
            skipped = max(0, start - row)
            row += len(values)
            waiting.append(values[skipped:])
            while sum(map(len, waiting)) >= size:
                joined = np.concatenate(waiting)
                yield joined[:size]
                waiting = [joined[size:]]
        rest = np.concatenate(waiting) if waiting else np.empty((0, self.width), self.dtype)
        if len(rest):
            yield rest

    def take(self, indices: np.ndarray) -> np.ndarray:
        taken = np.empty((len(indices), self.width), self.dtype)
        groups = np.searchsorted(self.starts, indices, "right") - 1
        for group in np.unique(groups):
            here = groups == group
            taken[here] = self.group(int(group))[indices[here] - self.starts[group]]
        return taken

    def group(self, index: int) -> np.ndarray:
        """The matrix of one row group; ValueError naming the first row that is null or of another length."""
        return self._matrix(self.groups.load(index, list(self.columns)), int(self.starts[index]))

    def _matrix(self, table: Any, start: int) -> np.ndarray:
        source, name = self.groups.source, self.columns[0]
        check_memory(table.num_rows * self.width * 8, f"path: {str(source)!r}")
        with reading(source):
            if self.chosen.kind == "list":
                return _list_matrix(table[name], self.width, start, name, source).astype(self.dtype)
            if self.chosen.kind == "text list":
                place = f"column: row {{}} of {quoted(name)} in {str(source)!r}"
                rows = [_vector(text, self.width, place.format(start + row))
                        for row, text in enumerate(table[name].to_pylist())]  # fmt: skip
                return np.array(rows, dtype=self.dtype).reshape(len(rows), self.width)
            for name in self.columns:
                if table[name].null_count:
                    row = start + int(np.flatnonzero(table[name].is_null().to_numpy())[0])
                    raise ValueError(f"column: row {row} of {quoted(name)} in {str(source)!r} is empty")
            return np.column_stack([table[name].to_numpy().astype(self.dtype) for name in self.columns])


def _list_matrix(column: Any, width: int, start: int, name: str, source: Path) -> np.ndarray:
    """A column of lists as a matrix."""
    compute = require("pyarrow.compute", extra="tables")
    if not len(column):
        return np.empty((0, width), np.float32)
    lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.float64)
    wrong = np.flatnonzero(lengths != width)
    if len(wrong):
        row = int(wrong[0])
        what = "is empty" if np.isnan(lengths[row]) else f"has {int(lengths[row])} values, row 0 has {width}"
        raise ValueError(f"column: row {start + row} of {quoted(name)} in {str(source)!r} {what}")
    values = compute.list_flatten(column)
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy())[0]) // width
        raise ValueError(f"column: row {start + row} of {quoted(name)} in {str(source)!r} has an empty value")
    return values.to_numpy().reshape(len(column), width)


def _open_arrow(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    groups = _Parquet(source) if source.suffix.lower() == ".parquet" else _Arrow(source)
    types = _unrepeated([(entry.name, entry.type) for entry in groups.schema], source)
    for name in (column, *names.values()):
        if name is not None:
            _named(name, types, source)
    kinds: dict[str, Kind] = {name: _arrow_kind(kind) for name, kind in types.items()}
    taken = {name for name in names.values() if name is not None}
    for name, kind in types.items():
        if _is_text(kind) and name not in taken and (column is None or name == column):
            kinds[name] = "text list" if _is_json_vector(groups.first(name)) else "other"
    if column is not None and kinds[column] not in ("list", "text list"):
        raise ValueError(f"column: {column!r} of {str(source)!r} is {types[column]}, lists of numbers are needed")

    def progressions(whole: list[str]) -> Progressions:
        found = Progressions(whole)
        for index in range(len(groups.sizes)):
            if found.open:
                table = groups.load(index, found.open)
                found.update({name: table[name].to_numpy() for name in found.open})
        return found

    columns = choose_columns(kinds, repr(str(source)), column=column, named=taken, progressions=progressions)
    starts = np.concatenate([[0], np.cumsum(groups.sizes)]).astype(np.int64)
    first = groups.first(columns.names[0])
    if columns.kind == "text list":
        first = json.loads(first)
    width = len(columns.names) if columns.kind == "real" else len(first or ())
    values = _ArrowColumns(groups, columns, starts, width, _arrow_dtype([types[name] for name in columns.names]))
    entries: dict[str, np.ndarray] = {}
    for kind, name in names.items():
        if name is not None:
            entries[kind] = _arrow_entries(groups, name)
    id_column = names["ids"] or columns.id_column
    if id_column is not None and "ids" not in entries:
        entries |= _unique_ids(_arrow_entries(groups, id_column))
    columns.say_left_out(str(source))
    found = _entries(entries, int(starts[-1]), source)
    return Table(source, values, **found, id_column=id_column if "ids" in found else None)


def _arrow_entries(groups: _Parquet | _Arrow, name: str) -> np.ndarray:
    blocks = [groups.load(index, [name])[name].to_pylist() for index in range(len(groups.sizes))]
    return _objects([entry for block in blocks for entry in block])


def _arrow_kind(kind: Any) -> Kind:
    types: Any = require("pyarrow.types", extra="tables")
    if types.is_floating(kind):
        return "real"
    if types.is_integer(kind):
        return "integer"
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return "list" if is_list and _arrow_kind(kind.value_type) in ("real", "integer") else "other"


def _is_text(kind: Any) -> bool:
    types: Any = require("pyarrow.types", extra="tables")
    return types.is_string(kind) or types.is_large_string(kind)


def _arrow_dtype(kinds: list[Any]) -> np.dtype:
    """float64 where float32 would lose digits that the file holds."""
    numbers = [str(getattr(kind, "value_type", kind)) for kind in kinds]
    return np.dtype(np.float64 if {"double", "int64", "uint64", "int32", "uint32"} & set(numbers) else np.float32)


# ---------------------------------------------------------------------- lines of text


def _open_separated(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    rows = separated_rows(source, "\t" if ".tsv" in source.suffixes[-2:] else ",")
    _, header = next(rows, (0, None))
    if header is None:
        raise ValueError(f"path: {str(source)!r} holds no rows")
    # pandas numbers columns that have no names.
    if all(map(_is_number, header)) and header != [str(place) for place in range(len(header))]:
        raise ValueError(f"path: {str(source)!r} has no header line; name the columns in the first line")
    _unrepeated([(name, None) for name in header], source)
    return _open_rows(source, header, rows, column, names, texts=True)


def _open_json_lines(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    def rows(header: list[str]) -> Iterator[tuple[int, list[Any]]]:
        for line, record in json_records(source):
            missing = [name for name in header if name not in record]
            if missing:
                raise ValueError(
                    f"path: line {line} of {str(source)!r} has no {quoted(missing[0])}, the first line has"
                )
            yield line, [record[name] for name in header]

    _, first = next(json_records(source), (0, None))
    if first is None:
        raise ValueError(f"path: {str(source)!r} holds no rows")
    return _open_rows(source, list(first), rows(list(first)), column, names, texts=False)


def _open_rows(
    source: Path,
    header: list[str],
    rows: Iterator[tuple[int, list[Any]]],
    column: str | None,
    names: dict[str, str | None],
    *,
    texts: bool,
) -> Table:
    """A table of rows by lines, held in memory: fields of CSV (`texts`), or values of JSON."""
    for name in (column, *names.values()):
        if name is not None:
            _named(name, header, source)
    rows = _checked_rows(rows, header, source)
    head = next(rows, None)
    if head is None:
        raise ValueError(f"path: {str(source)!r} holds no rows")
    where, taken = repr(str(source)), {name for name in names.values() if name is not None}
    kinds: dict[str, Kind] = {name: _value_kind(value, texts) for name, value in zip(header, head[1])}
    if column is not None and kinds[column] == "other":
        kinds[column] = "text list"  # that it is none is said with its line
    # Which columns of numbers are dimensions shows in the rows; until then all of them are read.
    columns = choose_columns(kinds, where, column=column, named=taken)
    vectors = columns.kind in ("list", "text list")
    numbers = [name for name, kind in kinds.items() if kind in ("real", "integer") and name not in taken]
    read = list(columns.names) if vectors or column is not None else numbers
    words = [name for name, kind in kinds.items() if kind == "other" and name not in {*taken, columns.id_column}]
    if texts and words and read is numbers:
        raise ValueError(f"column: {listed(words)} of {where} is not numeric; name it as the id, label or text column")
    kept = {kind: name for kind, name in names.items() if name is not None}
    if columns.id_column is not None:
        kept.setdefault("ids", columns.id_column)
    entries: dict[str, list[Any]] = {kind: [] for kind in kept}
    places, width = [header.index(name) for name in read], 0
    blocks: list[np.ndarray] = []
    waiting: list[Any] = []
    for line, row in chain([head], rows):
        for kind, name in kept.items():
            entries[kind].append(row[header.index(name)])
        if vectors:
            waiting.append(_vector(row[places[0]], width, f"column: line {line} of {where}"))
        else:
            waiting.append(_numbers(row, places, header, f"path: line {line} of {where}", texts))
        width = len(waiting[0])
        if len(waiting) * width >= _BLOCK_NUMBERS:
            blocks.append(np.array(waiting, dtype=np.float64))
            check_memory(sum(block.nbytes for block in blocks), f"path: {where}")
            waiting = []
    if waiting:
        blocks.append(np.array(waiting, dtype=np.float64))
    if read is numbers:
        place = {name: index for index, name in enumerate(read)}
        for name in numbers:
            if kinds[name] == "integer" and not all(_whole(block[:, place[name]]) for block in blocks):
                kinds[name] = "real"

        def progressions(whole: list[str]) -> Progressions:
            found = Progressions(whole)
            for block in blocks:
                found.update({name: block[:, place[name]] for name in found.open})
            return found

        columns = choose_columns(kinds, where, named=taken, progressions=progressions)
        if columns.id_column is not None and "ids" not in entries:
            own = place[columns.id_column]
            entries["ids"] = [f"{number:.0f}" for block in blocks for number in block[:, own]]
        if len(columns.names) < len(read):
            blocks = [block[:, [place[name] for name in columns.names]] for block in blocks]
    values = _narrowed(blocks)
    named = {kind: _objects(values) for kind, values in entries.items()}
    if names["ids"] is None and "ids" in named:
        named |= _unique_ids(named.pop("ids"))
    columns.say_left_out(str(source))
    id_column = names["ids"] or columns.id_column if "ids" in named else None
    return Table(source, ArrayRows(values), **_entries(named, len(values), source), id_column=id_column)


def _checked_rows(
    rows: Iterator[tuple[int, list[Any]]], header: list[str], source: Path
) -> Iterator[tuple[int, list[Any]]]:
    for line, row in rows:
        if len(row) != len(header):
            place = f"line {line} of {str(source)!r}"
            raise ValueError(f"path: {place} has {len(row)} fields, the header has {len(header)}")
        yield line, row


def _value_kind(value: Any, texts: bool) -> Kind:
    """What a column holds by its first value."""
    if isinstance(value, str):
        if texts and _is_number(value):
            return "integer" if _WHOLE.fullmatch(value.strip()) else "real"
        return "text list" if _is_json_vector(value) else "other"
    if isinstance(value, list):
        return "list" if _is_vector(value) else "other"
    return "integer" if type(value) is int else "real" if type(value) is float else "other"


def _whole(values: np.ndarray) -> bool:
    return bool((np.floor(values) == values).all())


def _narrowed(blocks: list[np.ndarray]) -> np.ndarray:
    """The blocks below each other, as float32 where its range holds them; the list is emptied."""
    most = np.finfo(np.float32).max
    wide = any(np.any((np.abs(block) > most) & np.isfinite(block)) for block in blocks)
    n, width = sum(map(len, blocks)), blocks[0].shape[1]
    values = np.empty((n, width), np.float64 if wide else np.float32)
    stop = n
    while blocks:
        block = blocks.pop()
        values[stop - len(block) : stop] = block
        stop -= len(block)
    return values


def _vector(value: Any, width: int, place: str) -> np.ndarray:
    """A list of numbers, or the JSON text of one, of this width (0: any); ValueError that starts with its place."""
    numbers = parse_json(value, place) if isinstance(value, str) else value
    if not _is_vector(numbers):
        raise ValueError(f"{place} has {quoted(value)}, a list of numbers is needed")
    if width and len(numbers) != width:
        raise ValueError(f"{place} has {len(numbers)} values, the first has {width}")
    try:
        return np.array(numbers, dtype=np.float64)
    except OverflowError as error:
        raise ValueError(f"{place} has a number that no float holds") from error


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and set(map(type, value)) <= {int, float}


def _is_json_vector(text: Any) -> bool:
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return False
    try:
        return _is_vector(json.loads(text))
    except (ValueError, RecursionError):
        return False


def _numbers(row: list[Any], places: list[int], header: list[str], where: str, texts: bool) -> list[float]:
    try:
        if not texts and not all(type(row[place]) in (int, float) for place in places):
            raise TypeError
        return [float(row[place]) for place in places]
    except (ValueError, TypeError, OverflowError) as error:
        kinds = (str,) if texts else (int, float)
        wrong = next((at for at in places if type(row[at]) not in kinds or not _is_number(row[at])), places[0])
        what = f"{quoted(row[wrong])} in column {quoted(header[wrong])}"
        raise ValueError(f"{where} has {what}, a number is needed") from error


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True


# ---------------------------------------------------------------------- names


def _unrepeated(columns: list[tuple[str, Any]], source: Path) -> dict[str, Any]:
    """Columns by name; ValueError where two have one name."""
    seen = [name for name, _ in columns]
    repeated = sorted({name for name in seen if seen.count(name) > 1}) if len(set(seen)) < len(seen) else []
    if repeated:
        raise ValueError(f"path: {str(source)!r} has several columns called {listed(map(quoted, repeated))}")
    return dict(columns)


def _choose(column: str | None, headers: dict[str, tuple[tuple[int, ...], np.dtype]], source: Path) -> str:
    """The array that is asked for, or the only table of numbers."""
    if column is not None:
        return _named(column, headers, source)
    if len(headers) == 1:
        return next(iter(headers))
    fit = [name for name, (shape, dtype) in headers.items() if len(shape) == 2 and dtype.kind in "fiu"]
    if len(fit) != 1:
        have = listed(f"{name} {shape}" for name, (shape, _) in headers.items()) or "nothing"
        raise ValueError(f"column: say which array of {str(source)!r} is the table; it has {have}")
    return fit[0]


def _named(name: str, known: Iterable[str], source: Path) -> str:
    if name not in known:
        raise ValueError(f"column: {str(source)!r} has no {quoted(name)}; it has {listed(known) or 'nothing'}")
    return name


def _objects(values: list[Any]) -> np.ndarray:
    entries = np.empty(len(values), dtype=object)
    entries[:] = values
    return entries


def _unique_ids(entries: np.ndarray) -> dict[str, np.ndarray]:
    """Entries as the names of rows where each has one of its own; else there are none."""
    return {"ids": entries} if None not in entries and len(set(map(str, entries))) == len(entries) else {}


def _entries(arrays: dict[str, np.ndarray], n: int, source: Path) -> dict[str, Any]:
    """ids, labels, texts as texts, one a row."""
    for kind, entries in arrays.items():
        if entries.shape != (n,):
            raise ValueError(
                f"column: the {kind} of {str(source)!r} have shape {entries.shape}, one a row ({n}) is needed"
            )
    return {
        kind: entry_texts(entries, f"column: row {{}} of the {kind} of {str(source)!r}")
        for kind, entries in arrays.items()
    }


def entry_texts(entries: np.ndarray, where: str) -> tuple[str, ...]:
    """Entries as texts, None as an empty one; ValueError with the row in `where` for what cannot be written."""
    texts = []
    for row, entry in enumerate(entries):
        text = entry.decode("utf-8") if isinstance(entry, bytes) else "" if entry is None else str(entry)
        texts.append(text if text.isascii() else characters(text, where.format(row)))
    return tuple(texts)


def text_array(texts: Sequence[str], where: str) -> np.ndarray:
    """Texts as a numpy array, which gives each the room of the longest; ValueError where that is too much."""
    check_memory(4 * len(texts) * max(map(len, texts), default=0), where)
    return np.array(texts, dtype=str)
