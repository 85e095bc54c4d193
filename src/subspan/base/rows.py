"""Rows of numbers on disk, what stands beside them, and the checks of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Integer

from .columns import listed
from .reading import characters, check_memory, quoted

MAX_UNPACKED_BYTES = 16 * 2**30
UNPACKED_AT_ONCE = 2**30
SUSPICIOUS_RATIO = 200
BLOCK_NUMBERS = 2**20


@runtime_checkable
class Matrix(Protocol):
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

    Rows come as float32, or float64 where the file holds that (or, in Parquet and Arrow, wide integers).

    Attributes
    ----------
    source
        Path of the file.
    values
        The rows (n, d), read where they are asked for.
    ids, labels, texts
        One entry a row, or None.
    id_column
        Where the ids are from.
    """

    source: Path
    values: Matrix = field(repr=False)
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
        return all_rows(self.values, f"path: {str(self.source)!r}")


def stored_blocks(values: Matrix, size: int, start: int = 0) -> Iterator[np.ndarray]:
    """The rows from `start` on as they are stored, `size` at a time, in one pass over the file."""
    streamed: Any = getattr(values, "stream", None)
    if streamed is not None:
        yield from streamed(size, start)
        return
    n = values.shape[0]
    for first in range(start, n, size):
        yield values.read(first, min(first + size, n))


def all_rows(values: Matrix, where: str) -> np.ndarray:
    """All rows in memory, as float64 where they are stored so, else float32; ValueError where there is less memory."""
    dtype = np.dtype(np.float64 if values.dtype == np.float64 else np.float32)
    check_memory(math.prod(values.shape) * dtype.itemsize, where)
    return np.concatenate([block.astype(dtype, copy=False) for block in stored_blocks(values, 8192)])


class Parts:
    """Rows that lie one part after the other: part i has those from `starts[i]` to `starts[i + 1]`."""

    starts: np.ndarray
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, dimensions)."""
        raise NotImplementedError

    def part(self, number: int, rows: np.ndarray) -> np.ndarray:
        """The rows at these places of one part, counted from its first."""
        raise NotImplementedError

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop."""
        return self.take(np.arange(start, stop))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Rows at these places."""
        taken = np.empty((len(indices), self.shape[1]), self.dtype)
        owner = np.searchsorted(self.starts, indices, "right") - 1
        for number in np.unique(owner):
            here = owner == number
            taken[here] = self.part(int(number), indices[here] - self.starts[number])
        return taken


class FiniteCheck:
    """Passes batches on unchanged and counts NaN and infinite values.

    The counts are complete when all batches were read.

    Parameters
    ----------
    batches
        Arrays (b, d); read again where it is iterated again.

    Attributes
    ----------
    n_values, n_rows
        Values that are not finite, and rows that hold one.
    first_row
        The first of these rows, or None.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.base import FiniteCheck
    >>> check = FiniteCheck([np.ones((3, 2)), np.array([[1.0, np.nan]])])
    >>> len(list(check)), check.n_values, check.first_row
    (2, 1, 3)
    """

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


def unrepeated(columns: list[tuple[str, Any]], source: Path) -> dict[str, Any]:
    """Columns by name; ValueError where two have one name."""
    seen = [name for name, _ in columns]
    repeated = sorted({name for name in seen if seen.count(name) > 1}) if len(set(seen)) < len(seen) else []
    if repeated:
        raise ValueError(f"path: {str(source)!r} has several columns called {listed(map(quoted, repeated))}")
    return dict(columns)


def known_name(name: str, known: Iterable[str], source: Path) -> str:
    """The name, or a ValueError that lists the names that there are."""
    if name not in known:
        raise ValueError(f"column: {str(source)!r} has no {quoted(name)}; it has {listed(known) or 'nothing'}")
    return name


def as_objects(values: list[Any]) -> np.ndarray:
    """Values as a one-dimensional array of objects."""
    entries = np.empty(len(values), dtype=object)
    entries[:] = values
    return entries


def unique_ids(entries: np.ndarray) -> dict[str, np.ndarray]:
    """Entries as the names of rows where each has one of its own; else there are none."""
    return {"ids": entries} if None not in entries and len(set(map(str, entries))) == len(entries) else {}


def entry_arrays(arrays: dict[str, np.ndarray], n: int, source: Path) -> dict[str, Any]:
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
