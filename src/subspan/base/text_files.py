"""Rows in text: separated values and JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .array_files import ArrayRows
from .columns import Kind, Progressions, choose_columns, listed
from .reading import check_memory, json_records, parse_json, quoted, separated_rows
from .rows import BLOCK_NUMBERS, Table, as_objects, entry_arrays, known_name, unique_ids, unrepeated

_WHOLE = re.compile(r"[+-]?\d+")


def open_separated(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    """The rows of a file of values separated by commas or tabs."""
    rows = separated_rows(source, "\t" if ".tsv" in source.suffixes[-2:] else ",")
    _, header = next(rows, (0, None))
    if header is None:
        raise ValueError(f"path: {str(source)!r} holds no rows")
    # pandas numbers columns that have no names.
    if all(map(_is_number, header)) and header != [str(place) for place in range(len(header))]:
        raise ValueError(f"path: {str(source)!r} has no header line; name the columns in the first line")
    unrepeated([(name, None) for name in header], source)
    return _open_rows(source, header, rows, column, names, texts=True)


def open_json_lines(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    """The rows of a file of JSON lines."""

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
            known_name(name, header, source)
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
            waiting.append(as_vector(row[places[0]], width, f"column: line {line} of {where}"))
        else:
            waiting.append(_numbers(row, places, header, f"path: line {line} of {where}", texts))
        width = len(waiting[0])
        if len(waiting) * width >= BLOCK_NUMBERS:
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
    named = {kind: as_objects(values) for kind, values in entries.items()}
    if names["ids"] is None and "ids" in named:
        named |= unique_ids(named.pop("ids"))
    columns.say_left_out(str(source))
    id_column = names["ids"] or columns.id_column if "ids" in named else None
    return Table(source, ArrayRows(values), **entry_arrays(named, len(values), source), id_column=id_column)


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
        return "text list" if is_json_vector(value) else "other"
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


def as_vector(value: Any, width: int, place: str) -> np.ndarray:
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


def is_json_vector(text: Any) -> bool:
    """Whether a cell is a vector written as JSON."""
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
