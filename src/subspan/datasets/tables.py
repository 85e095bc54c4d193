"""Tables of embeddings in files, read row block by row block where the format allows it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Integer
from safetensors import SafetensorError, safe_open

from subspan.geometry.extras import require

MAX_UNPACKED_BYTES = 16 * 2**30
_UNPACKED_AT_ONCE = 2**30
_SUSPICIOUS_RATIO = 200
_EXTENSIONS = ".npy, .npz, .safetensors, .parquet, .arrow, .feather, .csv, .csv.gz, .tsv"


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

    ids, labels, texts: one entry a row, or None. Rows come as float32, or float64 where the file holds float64.
    """

    source: Path
    values: Rows = field(repr=False)
    ids: tuple[str, ...] | None = field(default=None, repr=False)
    labels: tuple[str, ...] | None = field(default=None, repr=False)
    texts: tuple[str, ...] | None = field(default=None, repr=False)

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
        for start in range(0, len(self), size):
            yield self.values.read(start, min(start + size, len(self))).astype(self.dtype, copy=False)

    def rows(self, indices: Iterable[int] | Integer[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
        """The rows at these indices, in this order. Raises IndexError for one that is not there."""
        wanted = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64)
        if len(wanted) and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"indices: from 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}")
        return self.values.take(wanted % len(self)).astype(self.dtype, copy=False)

    def array(self) -> Float[np.ndarray, "n d"]:
        """All rows, in memory."""
        return np.concatenate(list(self.batches()))


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
    """Open a table of embeddings: .npy, .npz, .safetensors, .parquet, .arrow, .feather, .csv, .tsv (also .gz).

    column: the array of an archive, or the list column of a Parquet or Arrow table (in CSV: a column of JSON lists);
    where None, the only one that fits, or all numeric columns beside the others named here. id_, label_, text_column:
    columns, or one-axis arrays of an archive, with an entry a row. Raises ValueError, in one line, for what is
    missing, cut off, empty, ragged, not numeric, not two-dimensional, pickled, or unpacks to far more than it should.
    """
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"path: {str(source)!r} {'is a folder' if source.is_dir() else 'does not exist'}")
    names = {"ids": id_column, "labels": label_column, "texts": text_column}
    suffixes = [suffix.lower() for suffix in source.suffixes]
    suffix = "".join(suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:])
    if suffix == ".npy":
        table = _open_npy(source, column, names)
    elif suffix == ".npz":
        table = _open_npz(source, column, names)
    elif suffix == ".safetensors":
        table = _open_safetensors(source, column, names)
    elif suffix in (".parquet", ".arrow", ".feather"):
        table = _open_arrow(source, suffix, column, names)
    elif suffix in (".csv", ".tsv"):
        table = _open_separated(source, "," if suffix == ".csv" else "\t", column, names)
    else:
        raise ValueError(f"path: {str(source)!r} is not one of {_EXTENSIONS}")
    if 0 in table.shape:
        raise ValueError(f"path: {str(source)!r} is empty: {table.shape[0]} rows of {table.shape[1]} values")
    return table


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
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"format version {version}")
        shape, _, dtype = readers[version](stream)
    except (ValueError, EOFError, SyntaxError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"path: {where!r} is not an .npy array ({error})") from error
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
    chosen = _choose(column, headers, source)
    _check_matrix(*headers[chosen], f"{source}: {chosen}")
    try:
        with np.load(source, allow_pickle=False) as archive:
            values = archive[chosen]
            others = {kind: archive[_named(name, headers, source)] for kind, name in names.items() if name is not None}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"path: {str(source)!r} cannot be read ({error})") from error
    return Table(source, ArrayRows(values), **_entries(others, len(values), source))


def _npz_headers(source: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array, read without unpacking; sizes that do not agree with them are refused."""
    headers = {}
    try:
        with zipfile.ZipFile(source) as archive:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                with archive.open(entry) as stream:
                    shape, dtype = _npy_header(stream, f"{source}: {name}")
                    declared = stream.tell() + math.prod(shape) * dtype.itemsize
                if not dtype.hasobject and declared != entry.file_size:
                    size = f"{entry.file_size} bytes, its shape {shape} makes {declared}"
                    raise ValueError(f"path: {str(source)!r} is damaged: {name!r} unpacks to {size}")
                ratio = entry.file_size / max(entry.compress_size, 1)
                if entry.file_size > MAX_UNPACKED_BYTES or (
                    entry.file_size > _UNPACKED_AT_ONCE and ratio > _SUSPICIOUS_RATIO
                ):
                    size = f"{entry.file_size} bytes from {entry.compress_size}"
                    raise ValueError(f"path: {str(source)!r} is refused: {name!r} would unpack to {size}")
                headers[name] = (shape, dtype)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"path: {str(source)!r} is not a whole .npz archive ({error})") from error
    return headers


@dataclass(frozen=True)
class _Safetensors:
    """One tensor of a safetensors file; each read opens the file."""

    source: Path
    name: str
    shape: tuple[int, int]
    dtype: np.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        with safe_open(self.source, framework="pt") as archive:
            return _as_numpy(archive.get_slice(self.name)[start:stop])

    def take(self, indices: np.ndarray) -> np.ndarray:
        with safe_open(self.source, framework="pt") as archive:
            rows = archive.get_slice(self.name)
            taken = [_as_numpy(rows[int(index) : int(index) + 1]) for index in indices]
        return np.concatenate(taken) if taken else np.empty((0, self.shape[1]), self.dtype)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    numpy_has_it = tensor.dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return (tensor if numpy_has_it else tensor.float()).numpy()


def _open_safetensors(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    try:
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
    except SafetensorError as error:
        raise ValueError(f"path: {str(source)!r} is not a whole safetensors file ({error})") from error
    (n, d), dtype = headers[chosen]
    return Table(source, _Safetensors(source, chosen, (n, d), dtype), **_entries(others, n, source))


def _safetensors_dtype(rows: Any) -> np.dtype:
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
             "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip
    return np.dtype(kinds.get(rows.get_dtype(), np.float32))


@dataclass(frozen=True)
class _ArrowColumns:
    """The list column, or the numeric columns, of row groups that are read one at a time."""

    source: Path
    columns: tuple[str, ...]
    is_list: bool
    starts: np.ndarray
    load: Any = field(repr=False)
    width: int = 0
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))

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
        if self.source.suffix.lower() != ".parquet":
            yield from (self.read(at, min(at + size, self.shape[0])) for at in range(start, self.shape[0], size))
            return
        arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        waiting, row = [], int(self.starts[first])
        with parquet.ParquetFile(self.source, pre_buffer=False, buffer_size=1 << 20) as file:
            groups = list(range(first, len(self.starts) - 1))
            for batch in file.iter_batches(min(size, 8192), row_groups=groups, columns=list(self.columns)):
                values = self._matrix(arrow.Table.from_batches([batch]).combine_chunks(), row)
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
        return self._matrix(self.load(index, list(self.columns)), int(self.starts[index]))

    def _matrix(self, table: Any, start: int) -> np.ndarray:
        if not self.is_list:
            for name in self.columns:
                if table[name].null_count:
                    row = start + int(np.flatnonzero(table[name].is_null().to_numpy())[0])
                    raise ValueError(f"column: row {row} of {name!r} in {str(self.source)!r} is empty")
            return np.column_stack([table[name].to_numpy() for name in self.columns]).astype(self.dtype)
        return _list_matrix(table[self.columns[0]], self.width, start, self.columns[0], self.source).astype(self.dtype)


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
        raise ValueError(f"column: row {start + row} of {name!r} in {str(source)!r} {what}")
    values = compute.list_flatten(column)
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy())[0]) // width
        raise ValueError(f"column: row {start + row} of {name!r} in {str(source)!r} has an empty value")
    return values.to_numpy().reshape(len(column), width)


def _open_arrow(source: Path, suffix: str, column: str | None, names: dict[str, str | None]) -> Table:
    arrow = require("pyarrow", extra="tables")
    try:
        schema, sizes, load = _parquet_groups(source) if suffix == ".parquet" else _arrow_groups(source)
        types = {entry.name: entry.type for entry in schema}
        for name in (column, *names.values()):
            if name is not None:
                _named(name, types, source)
        others = [name for name in names.values() if name is not None]
        columns, is_list, dtype = _numeric_columns(arrow, types, column, others, source)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        width = _list_width(load, columns[0], sizes) if is_list else len(columns)
        values = _ArrowColumns(source, tuple(columns), is_list, starts, load, width, dtype)
        entries: dict[str, np.ndarray] = {}
        for kind, name in names.items():
            if name is not None:
                blocks = [load(group, [name])[name].to_pylist() for group in range(len(sizes))]
                entries[kind] = np.array([entry for block in blocks for entry in block], dtype=object)
    except arrow.ArrowException as error:
        raise ValueError(
            f"path: {str(source)!r} is not a whole {suffix} file ({str(error).splitlines()[0]})"
        ) from error
    return Table(source, values, **_entries(entries, int(starts[-1]), source))


def _parquet_groups(source: Path) -> tuple[Any, list[int], Any]:
    parquet = require("pyarrow.parquet", extra="tables")
    with parquet.ParquetFile(source) as file:
        schema = file.schema_arrow
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]

    def load(index: int, columns: list[str]) -> Any:
        with parquet.ParquetFile(source) as file:
            return file.read_row_group(index, columns=columns).combine_chunks()

    return schema, sizes, load


def _arrow_groups(source: Path) -> tuple[Any, list[int], Any]:
    arrow, ipc = require("pyarrow", extra="tables"), require("pyarrow.ipc", extra="tables")
    file = ipc.open_file(arrow.memory_map(str(source)))
    sizes = [file.get_batch(index).num_rows for index in range(file.num_record_batches)]

    def load(index: int, columns: list[str]) -> Any:
        return arrow.Table.from_batches([file.get_batch(index)]).select(columns)

    return file.schema, sizes, load


def _numeric_columns(
    arrow: Any, types: dict[str, Any], column: str | None, others: list[str], source: Path
) -> tuple[list[str], bool, np.dtype]:
    """(columns that make the matrix, whether it is one column of lists, dtype)."""

    def numeric(kind: Any) -> bool:
        return arrow.types.is_floating(kind) or arrow.types.is_integer(kind)

    def double(kind: Any) -> bool:
        return arrow.types.is_float64(kind)

    lists = {
        name: kind.value_type
        for name, kind in types.items()
        if (arrow.types.is_list(kind) or arrow.types.is_large_list(kind) or arrow.types.is_fixed_size_list(kind))
        and numeric(kind.value_type)
    }
    candidates = [name for name in lists if name not in others]
    if column is not None and column not in lists:
        raise ValueError(f"column: {column!r} of {str(source)!r} is {types[column]}, lists of numbers are needed")
    if column is not None or len(candidates) == 1:
        chosen = column or candidates[0]
        return [chosen], True, np.dtype(np.float64 if double(lists[chosen]) else np.float32)
    if candidates:
        raise ValueError(f"column: choose one of {', '.join(candidates)} of {str(source)!r}")
    plain = [name for name, kind in types.items() if numeric(kind) and name not in others]
    if not plain:
        raise ValueError(f"column: {str(source)!r} has no numeric column; it has {', '.join(types)}")
    return plain, False, np.dtype(np.float64 if any(double(types[name]) for name in plain) else np.float32)


def _list_width(load: Any, name: str, sizes: list[int]) -> int:
    """Length of the first row's list."""
    group = next((index for index, size in enumerate(sizes) if size), None)
    if group is None:
        return 0
    first = load(group, [name])[name][0].as_py()
    return len(first) if first is not None else 0


def _open_separated(source: Path, delimiter: str, column: str | None, names: dict[str, str | None]) -> Table:
    header, blocks, others = None, [], {kind: [] for kind, name in names.items() if name is not None}
    picked: list[int] = []
    waiting: list[list[float]] = []
    width = 0
    for line, row in _separated_rows(source, delimiter):
        if header is None:
            header = row
            if _is_number(row[0]) and all(map(_is_number, row)):
                raise ValueError(f"path: {str(source)!r} has no header line; name the columns in the first line")
            known = dict.fromkeys(header)
            for name in (column, *names.values()):
                if name is not None:
                    _named(name, known, source)
            continue
        if not picked:
            picked = _picked_columns(header, row, column, names, source)
        if len(row) != len(header):
            raise ValueError(
                f"path: line {line} of {str(source)!r} has {len(row)} fields, the header has {len(header)}"
            )
        for kind, entries in others.items():
            entries.append(row[header.index(str(names[kind]))])
        numbers = _numbers(row, picked, column, line, header, source)
        width = width or len(numbers)
        if len(numbers) != width:
            raise ValueError(f"column: line {line} of {str(source)!r} has {len(numbers)} values, the first has {width}")
        waiting.append(numbers)
        if len(waiting) == 4096:
            blocks.append(np.array(waiting, dtype=np.float64).astype(np.float32))
            waiting = []
    if waiting:
        blocks.append(np.array(waiting, dtype=np.float64).astype(np.float32))
    if not blocks:
        raise ValueError(f"path: {str(source)!r} holds no rows")
    values = np.concatenate(blocks)
    return Table(source, ArrayRows(values), **{kind: tuple(entries) for kind, entries in others.items()})


def _separated_rows(source: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line that is not blank."""
    opener = gzip.open if source.suffix.lower() == ".gz" else open
    csv.field_size_limit(2**24)
    line = 0
    with opener(source, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                line = reader.line_num
                if row:
                    yield line, row
        except UnicodeDecodeError as error:
            raise ValueError(f"path: {str(source)!r} is not UTF-8 text after line {line}") from error
        except (csv.Error, OSError, EOFError) as error:
            raise ValueError(f"path: {str(source)!r} is broken after line {line} ({error})") from error


def _picked_columns(
    header: list[str], row: list[str], column: str | None, names: dict[str, str | None], source: Path
) -> list[int]:
    """Places of the columns with the numbers."""
    if column is not None:
        return [header.index(column)]
    others = set(names.values())
    picked = [place for place, name in enumerate(header) if name not in others and place < len(row)]
    numeric = [place for place in picked if _is_number(row[place])]
    if not numeric:
        raise ValueError(f"column: {str(source)!r} has no numeric column; it has {', '.join(header)}")
    if len(numeric) < len(picked):
        texts = [header[place] for place in picked if place not in numeric]
        raise ValueError(
            f"column: {', '.join(texts)} of {str(source)!r} is not numeric; name it as the id, label or text column"
        )
    return picked


def _numbers(
    row: list[str], picked: list[int], column: str | None, line: int, header: list[str], source: Path
) -> list[float]:
    try:
        if column is not None:
            entry = row[picked[0]]
            values = json.loads(entry) if entry.lstrip().startswith("[") else [float(entry)]
            return [float(value) for value in values]
        return [float(row[place]) for place in picked]
    except (ValueError, TypeError, json.JSONDecodeError) as error:
        wrong = next((place for place in picked if not _is_number(row[place])), picked[0])
        what = f"{row[wrong]!r} in column {header[wrong]!r}"
        raise ValueError(f"path: line {line} of {str(source)!r} has {what}, a number is needed") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _choose(column: str | None, headers: dict[str, tuple[tuple[int, ...], np.dtype]], source: Path) -> str:
    """The array that is asked for, or the only table of numbers."""
    if column is not None:
        return _named(column, headers, source)
    if len(headers) == 1:
        return next(iter(headers))
    fit = [name for name, (shape, dtype) in headers.items() if len(shape) == 2 and dtype.kind in "fiu"]
    if len(fit) != 1:
        have = ", ".join(f"{name} {shape}" for name, (shape, _) in headers.items()) or "nothing"
        raise ValueError(f"column: say which array of {str(source)!r} is the table; it has {have}")
    return fit[0]


def _named(name: str, known: Iterable[str], source: Path) -> str:
    if name not in known:
        raise ValueError(f"column: {str(source)!r} has no {name!r}; it has {', '.join(known) or 'nothing'}")
    return name


def _entries(arrays: dict[str, np.ndarray], n: int, source: Path) -> dict[str, tuple[str, ...]]:
    """ids, labels, texts as texts, one a row."""
    for kind, entries in arrays.items():
        if entries.shape != (n,):
            raise ValueError(
                f"column: the {kind} of {str(source)!r} have shape {entries.shape}, one a row ({n}) is needed"
            )
    return {kind: tuple("" if entry is None else str(entry) for entry in entries) for kind, entries in arrays.items()}
