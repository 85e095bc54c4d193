"""Series as they lie in files: values by trajectory, and what the file says of time, channels and ids."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from subspan.base.array_files import npy_header, npz_headers
from subspan.base.arrow_files import arrow_columns, arrow_kinds
from subspan.base.columns import INDEX_NAMES, listed
from subspan.base.kinds import SEPARATED, suffix_of
from subspan.base.reading import check_memory, quoted, reading, separated_rows
from subspan.base.rows import BLOCK_NUMBERS, known_name
from subspan.base.tables import read_arrays

SERIES_FILES = (".csv", ".tsv", ".npy", ".npz", ".parquet", ".arrow", ".feather")
"""What series are read from; .csv and .tsv also with .gz behind."""
_TIME_NAMES = frozenset({"time", "times", "timestamp", "date", "datetime", "ds", "t"})
_ID_NAMES = frozenset({"id", "unique_id", "series_id", "item_id", "trajectory"})
_MISSING = frozenset({"", "nan", "na", "n/a", "null", "none", "?"})


class Wanted(NamedTuple):
    """What of a file is asked for: columns, or one array (or those of a pattern) of an archive."""

    channels: Sequence[str] | None = None
    time_column: str | None = None
    id_column: str | None = None
    array: str | None = None
    channels_first: bool = False


class Stored(NamedTuple):
    """Values (n, channels) of each trajectory as they are stored, with times (n,) where the file has them."""

    values: list[np.ndarray]
    channels: tuple[str, ...]
    ids: tuple[str, ...]
    times: list[np.ndarray] | None = None
    time_step: float | None = None


def stored_series(source: Path, wanted: Wanted) -> Stored:
    """The trajectories of a file, memory-mapped where it is one array."""
    suffix = suffix_of(source)
    if suffix == ".npy":
        return _from_npy(source, wanted)
    if suffix == ".npz":
        return _from_npz(source, wanted)
    return _from_separated(source, wanted) if suffix in SEPARATED else _from_arrow(source, wanted)


# ---------------------------------------------------------------------- tables


class _Roles(NamedTuple):
    channels: list[str]
    time: str | None
    id: str | None


def _roles(header: Sequence[str], wanted: Wanted, source: Path) -> _Roles:
    """Which columns are channels, time and id: as asked for, else by their names."""
    if wanted.array is not None:
        raise ValueError(f"array: {str(source)!r} is a table, which has columns; name them as channels")
    for name in (*(wanted.channels or ()), wanted.time_column, wanted.id_column):
        if name is not None:
            known_name(name, header, source)
    free = [name for name in header if name not in (wanted.channels or ())]
    by_name = [next((name for name in free if name.casefold() in names), None) for names in (_TIME_NAMES, _ID_NAMES)]
    time, ids = wanted.time_column or by_name[0], wanted.id_column or by_name[1]
    channels = list(wanted.channels or (name for name in header if not INDEX_NAMES.fullmatch(name)))
    channels = [name for name in channels if name not in (time, ids)]
    if not channels:
        raise ValueError(f"channels: {str(source)!r} has no column of numbers beside time and id: {listed(header)}")
    return _Roles(channels, time, ids)


def _from_separated(source: Path, wanted: Wanted) -> Stored:
    rows = separated_rows(source, "\t" if ".tsv" in source.suffixes[-2:] else ",")
    _, header = next(rows, (0, [""]))
    if all(_number(name) is not None for name in header):
        raise ValueError(f"path: {str(source)!r} has no header line; name the columns in the first line")
    roles = _roles(header, wanted, source)
    places = [header.index(name) for name in roles.channels]
    beside = [None if name is None else header.index(name) for name in (roles.time, roles.id)]
    blocks: list[np.ndarray] = []
    waiting: list[list[float]] = []
    entries: tuple[list[str], list[str]] = ([], [])
    for line, row in rows:
        if len(row) != len(header):
            place = f"line {line} of {str(source)!r}"
            raise ValueError(f"path: {place} has {len(row)} fields, the header has {len(header)}")
        waiting.append([_value(row[place], header[place], line, source) for place in places])
        for kept, place in zip(entries, beside):
            if place is not None:
                kept.append(row[place])
        if len(waiting) * len(places) >= BLOCK_NUMBERS:
            blocks.append(np.array(waiting))
            check_memory(sum(block.nbytes for block in blocks), f"path: {str(source)!r}")
            waiting = []
    values = np.concatenate([*blocks, np.array(waiting).reshape(-1, len(places))])
    times = None if roles.time is None else _times(entries[0], roles.time, source)
    return _by_id(values, roles, times, None if roles.id is None else np.array(entries[1], dtype=str))


def _from_arrow(source: Path, wanted: Wanted) -> Stored:
    kinds = arrow_kinds(source)
    roles = _roles(list(kinds), wanted, source)
    for name in roles.channels:
        if kinds[name] not in ("real", "integer"):
            raise ValueError(f"column: {quoted(name)} of {str(source)!r} holds no numbers; {_HINT}")
    columns = arrow_columns(source, [*roles.channels, *(name for name in (roles.time, roles.id) if name is not None)])
    times = None if roles.time is None else columns[roles.time]
    if times is not None and times.dtype == object:
        times = _times([str(entry) for entry in times], str(roles.time), source)
    ids = None if roles.id is None else _id_texts(columns[roles.id])
    return _by_id(np.column_stack([columns[name] for name in roles.channels]), roles, times, ids)


_HINT = "name texts as the time or id column, or list the channels that are wanted"


def _value(text: str, column: str, line: int, source: Path) -> float:
    number = _number(text)
    if number is not None:
        return number
    if text.strip().casefold() in _MISSING:
        return math.nan
    raise ValueError(f"path: line {line} of {str(source)!r} has {quoted(text)} in column {quoted(column)}; {_HINT}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _times(entries: Sequence[str], column: str, source: Path) -> np.ndarray:
    """Numbers, or ISO dates and times (UTC where they name a zone)."""
    numbers = [_number(entry) for entry in entries]
    if None not in numbers:
        return np.array(numbers, dtype=np.float64)
    found = np.empty(len(entries), dtype="datetime64[us]")
    for row, entry in enumerate(entries):
        try:
            moment = datetime.fromisoformat(entry.strip())
            found[row] = np.datetime64(moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment)
        except ValueError:
            try:
                found[row] = np.datetime64(entry.strip(), "us")  # years and months alone: 2024-03
            except ValueError as error:
                place = f"row {row} of column {quoted(column)} in {str(source)!r}"
                raise ValueError(f"time: {place} has {quoted(entry)}, a number or an ISO date is needed") from error
    return found


def _id_texts(entries: np.ndarray) -> np.ndarray:
    """Ids as texts; whole numbers without a decimal point."""
    whole = entries.dtype.kind == "f" and bool((np.floor(entries) == entries).all())
    return (entries.astype(np.int64) if whole else entries).astype(str)


def _by_id(values: np.ndarray, roles: _Roles, times: np.ndarray | None, ids: np.ndarray | None) -> Stored:
    """Rows of a long table taken apart, in the order in which the ids first come."""
    if ids is None:
        return Stored([values], tuple(roles.channels), ("0",), None if times is None else [times])
    names, first, owner = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(owner))[:-1])
    turn = np.argsort(first)
    return Stored(
        [values[parts[index]] for index in turn],
        tuple(roles.channels),
        tuple(str(names[index]) for index in turn),
        None if times is None else [times[parts[index]] for index in turn],
    )


# ---------------------------------------------------------------------- arrays


def _from_npy(source: Path, wanted: Wanted) -> Stored:
    _refuse_columns(source, wanted)
    with reading(source), source.open("rb") as stream:
        shape, dtype = npy_header(stream, str(source))
        expected = stream.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or source.stat().st_size < expected:
        what = "holds pickled Python objects, which are not read" if dtype.hasobject else "is cut off"
        raise ValueError(f"path: {str(source)!r} {what}")
    mapped = np.load(source, mmap_mode="r", allow_pickle=False) if math.prod(shape) else np.empty(shape, dtype)
    values = _trajectories(mapped, str(source), wanted.channels_first)
    return Stored(values, _numbered(values), tuple(map(str, range(len(values)))))


def _from_npz(source: Path, wanted: Wanted) -> Stored:
    """One array, one with `offsets` of its trajectories beside it, or all arrays of a pattern as trajectories."""
    _refuse_columns(source, wanted)
    headers = npz_headers(source)
    pattern = "*" if wanted.array is None else wanted.array
    chosen = [
        name for name, (_, dtype) in headers.items() if fnmatch.fnmatchcase(name, pattern) and dtype.kind in "fiu"
    ]
    if wanted.array is None:
        widest = max((len(headers[name][0]) for name in chosen), default=0)
        chosen = [name for name in chosen if len(headers[name][0]) == widest and widest > 0]
    if not chosen or (wanted.array is None and len(chosen) > 1):
        have = listed(f"{name} {shape}" for name, (shape, _) in headers.items()) or "nothing"
        raise ValueError(
            f"array: say which array of {str(source)!r} holds the series, or a pattern for several; it has {have}"
        )
    arrays = read_arrays(source)
    values: list[np.ndarray] = []
    ids: list[str] = []
    for name in chosen:
        found = _trajectories(arrays[name], f"{source}: {name}", wanted.channels_first)
        if len(chosen) == len(found) == 1 and "offsets" in arrays:
            found = _split(found[0], arrays["offsets"], source)
        values += found
        ids += [name] if len(found) == 1 else [f"{name}/{index}" if len(chosen) > 1 else str(index)
                                              for index in range(len(found))]  # fmt: skip
    widths = {array.shape[1] for array in values}
    if len(widths) > 1:
        raise ValueError(f"array: the arrays {listed(chosen)} of {str(source)!r} have {sorted(widths)} channels")
    named = arrays.get("channels")
    fits = named is not None and named.dtype.kind == "U" and named.shape == (values[0].shape[1],)
    rate = arrays.get("fs")
    step = 1 / float(rate) if rate is not None and rate.size == 1 and rate.dtype.kind in "fiu" and rate > 0 else None
    channels = tuple(map(str, named)) if named is not None and fits else _numbered(values)
    return Stored(values, channels, tuple(ids), None, step)


def _refuse_columns(source: Path, wanted: Wanted) -> None:
    for name in (wanted.time_column, wanted.id_column):
        if name is not None:
            raise ValueError(f"column: {str(source)!r} holds arrays without columns, so there is no {name!r}")


def _numbered(values: list[np.ndarray]) -> tuple[str, ...]:
    return tuple(f"channel {index}" for index in range(values[0].shape[1] if values else 0))


def _trajectories(array: np.ndarray, where: str, channels_first: bool) -> list[np.ndarray]:
    """An array (n,), (n, channels) or (trajectories, n, channels) as a list of (n, channels)."""
    if array.dtype.kind not in "fiub" or array.ndim not in (1, 2, 3) or 0 in array.shape:
        what = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"path: {where!r} holds {what}; numbers (n,), (n, channels) or (trajectories, n, channels)")
    if array.ndim == 1:
        array = array[:, None]
    elif channels_first:
        array = array.swapaxes(-1, -2)
    return list(array) if array.ndim == 3 else [array]


def _split(values: np.ndarray, offsets: np.ndarray, source: Path) -> list[np.ndarray]:
    """The trajectories that lie one behind the other in one array."""
    good = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 1 and (np.diff(offsets) > 0).all()
    if not good or offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError(f"array: the offsets of {str(source)!r} do not rise from 0 to its {len(values)} rows")
    return np.split(values, offsets[1:-1])


# ---------------------------------------------------------------------- labels


def channels_but(source: Path, left_out: str, wanted: Wanted) -> list[str] | None:
    """The channels of a table without one column; None for arrays, whose channels have no columns."""
    suffix = suffix_of(source)
    if suffix in (".npy", ".npz"):
        return None
    if suffix in SEPARATED:
        header = next(separated_rows(source, "\t" if ".tsv" in source.suffixes[-2:] else ","), (0, [""]))[1]
    else:
        header = list(arrow_kinds(source))
    known_name(left_out, header, source)
    return [name for name in _roles(header, wanted, source).channels if name != left_out]


def stored_labels(source: Path, column: str, wanted: Wanted) -> list[np.ndarray]:
    """Of each trajectory, the texts of a column (n,), or of an archive's array (one for each, or one a row)."""
    suffix = suffix_of(source)
    if suffix in (".npy", ".npz"):
        return _array_labels(source, column, wanted)
    if suffix in SEPARATED:
        rows = separated_rows(source, "\t" if ".tsv" in source.suffixes[-2:] else ",")
        header = next(rows, (0, [""]))[1]
    else:
        rows, header = None, list(arrow_kinds(source))
    known_name(column, header, source)
    # The label may be the only column beside time and id: it is asked for as a channel.
    roles = _roles(header, wanted._replace(channels=[column]), source)
    if rows is not None:
        place, beside = header.index(column), None if roles.id is None else header.index(roles.id)
        kept = [(row[place], "" if beside is None else row[beside]) for _, row in rows]
        texts, ids = np.array([text for text, _ in kept]), np.array([name for _, name in kept])
    else:
        found = arrow_columns(source, [column] if roles.id is None else [column, roles.id])
        texts = _id_texts(found[column])
        ids = np.zeros(len(texts), dtype=str) if roles.id is None else _id_texts(found[roles.id])
    order = {name: number for number, name in enumerate(dict.fromkeys(ids.tolist()))}
    owner = np.array([order[name] for name in ids.tolist()])
    return [texts[owner == number] for number in range(len(order))]


def _array_labels(source: Path, name: str, wanted: Wanted) -> list[np.ndarray]:
    arrays = read_arrays(source) if suffix_of(source) == ".npz" else {}
    if name not in arrays or arrays[name].ndim != 1:
        raise ValueError(
            f"label: {str(source)!r} has no array {name!r} (n,) beside the series; it has {listed(arrays)}"
        )
    lengths = [len(part) for part in stored_series(source, wanted).values]
    labels = arrays[name].astype(str)
    if len(labels) == len(lengths):
        return [np.repeat(label, length) for label, length in zip(labels, lengths)]
    if len(labels) == sum(lengths):
        return np.split(labels, np.cumsum(lengths)[:-1])
    raise ValueError(f"label: {name!r} has {len(labels)} entries for {len(lengths)} series of {sum(lengths)} rows")
