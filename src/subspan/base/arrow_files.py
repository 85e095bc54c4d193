"""Rows in columns of Parquet and Arrow files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .columns import Columns, Kind, Progressions, choose_columns
from .extras import require
from .reading import check_memory, quoted, reading
from .rows import Parts, Table, as_objects, entry_arrays, known_name, unique_ids, unrepeated
from .text_files import as_vector, is_json_vector


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


def _row_groups(source: Path) -> _Parquet | _Arrow:
    return _Parquet(source) if source.suffix.lower() == ".parquet" else _Arrow(source)


def arrow_kinds(source: Path) -> dict[str, Kind]:
    """What each column of a file holds."""
    return {entry.name: _arrow_kind(entry.type) for entry in _row_groups(source).schema}


def arrow_columns(source: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Whole columns: numbers as float64, NaN where they are null; times as datetime64; anything else as objects."""
    arrow, types = require("pyarrow", extra="tables"), require("pyarrow.types", extra="tables")
    groups = _row_groups(source)
    kinds = unrepeated([(entry.name, entry.type) for entry in groups.schema], source)
    parts: dict[str, list[np.ndarray]] = {known_name(name, kinds, source): [] for name in names}
    for index in range(len(groups.sizes)):
        table = groups.load(index, list(parts))
        for name, found in parts.items():
            if _arrow_kind(kinds[name]) in ("real", "integer"):
                found.append(table[name].cast(arrow.float64(), safe=False).to_numpy())
            elif types.is_temporal(kinds[name]):
                found.append(table[name].cast(arrow.timestamp("us"), safe=False).to_numpy().astype("datetime64[us]"))
            else:
                found.append(as_objects(table[name].to_pylist()))
    return {name: np.concatenate(found) if found else np.empty(0) for name, found in parts.items()}


@dataclass(frozen=True)
class _ArrowColumns(Parts):
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

    def part(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Rows of one row group; ValueError naming the first that is null or of another length."""
        return self._matrix(self.groups.load(number, list(self.columns)), int(self.starts[number]))[rows]

    def _matrix(self, table: Any, start: int) -> np.ndarray:
        source, name = self.groups.source, self.columns[0]
        check_memory(table.num_rows * self.width * 8, f"path: {str(source)!r}")
        with reading(source):
            if self.chosen.kind == "list":
                return _list_matrix(table[name], self.width, start, name, source).astype(self.dtype)
            if self.chosen.kind == "text list":
                place = f"column: row {{}} of {quoted(name)} in {str(source)!r}"
                rows = [as_vector(text, self.width, place.format(start + row))
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


def open_arrow(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    """The rows of a Parquet or Arrow file."""
    groups = _row_groups(source)
    types = unrepeated([(entry.name, entry.type) for entry in groups.schema], source)
    for name in (column, *names.values()):
        if name is not None:
            known_name(name, types, source)
    kinds: dict[str, Kind] = {name: _arrow_kind(kind) for name, kind in types.items()}
    taken = {name for name in names.values() if name is not None}
    for name, kind in types.items():
        if _is_text(kind) and name not in taken and (column is None or name == column):
            kinds[name] = "text list" if is_json_vector(groups.first(name)) else "other"
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
        entries |= unique_ids(_arrow_entries(groups, id_column))
    columns.say_left_out(str(source))
    found = entry_arrays(entries, int(starts[-1]), source)
    return Table(source, values, **found, id_column=id_column if "ids" in found else None)


def _arrow_entries(groups: _Parquet | _Arrow, name: str) -> np.ndarray:
    blocks = [groups.load(index, [name])[name].to_pylist() for index in range(len(groups.sizes))]
    return as_objects([entry for block in blocks for entry in block])


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
