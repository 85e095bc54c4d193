"""Rows of numbers, read lazily, and what is known of each: the one form in which the verbs take what they work on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from subspan.base.array_files import ArrayRows
from subspan.base.rows import all_rows, stored_blocks

from .qdrant_folder import point_id

Metric = Literal["inner", "euclidean", "cosine"]
UNIT_TOLERANCE = 1e-3
NEARLY_UNIT = 0.02
"""How far lengths may lie from one where unit vectors were quantised or rounded."""
_BLOCK_BYTES = 16 << 20
_BATCH_ROWS = 4096


@dataclass(frozen=True)
class Rows:
    """n rows (n, d) with their ids and, where there are any, labels, texts and images.

    Nothing but those is in memory where the format allows that. Rows come as float32, or as float64 where they are
    stored so.

    Parameters
    ----------
    values
        Where the numbers are: an array, in memory or mapped, or what gives blocks of a file, an index or a server.
    name
        What headings call the rows; default the last part of `source`.
    source
        What messages call them, as the user named it: a path or an address; default `name`.
    ids
        One a row, int64 or text (n,); default the row numbers.
    numbered
        Whether the ids are the row numbers (of an inverted file: in another order).
    labels, label_name
        One a row (n,), and what they are labels of.
    texts, images
        One a row.
    kind, form
        "rows", "table", "shards", "faiss" or "qdrant"; and in words ("IndexFlatIP in IndexIDMap").
    metric
        What a collection ranks by: "inner", "euclidean", "cosine"; None for a table.
    exact
        False where vectors are stored as codes, so that rows are reconstructions.
    details
        What else the format says.
    origin
        Where the rows come from, in a sentence.
    argument, label_argument, reading, pairing
        How the command line names the rows and the labels, and its options that say which columns hold the rows and
        which their ids.
    dropped
        Rows with NaN or infinity that were left out on request.
    stored_dtype
        Where it is not that of `values`.

    Raises
    ------
    ValueError
        Where labels, texts, images or ids are not one a row.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.datasets import Rows
    >>> rows = Rows(np.eye(3, dtype=np.float32), "axes", ids=["x", "y", "z"])
    >>> rows.take(rows.positions(np.array(["z"])))
    array([[0., 0., 1.]], dtype=float32)
    """

    values: Any
    name: str = ""
    source: str = ""
    ids: Any = field(default=None, repr=False)
    numbered: bool = False
    labels: Shaped[np.ndarray, " n"] | None = field(default=None, repr=False)
    label_name: str = "label"
    texts: Sequence[str] | None = field(default=None, repr=False)
    images: Sequence[Any] | None = field(default=None, repr=False)
    kind: str = "rows"
    form: str = "rows"
    metric: Metric | None = None
    exact: bool = True
    details: dict[str, Any] = field(default_factory=dict, repr=False)
    origin: str = ""
    argument: str = ""
    label_argument: str = ""
    reading: tuple[str, ...] = ()
    pairing: tuple[str, ...] = ()
    dropped: int = 0
    stored_dtype: str = ""

    def __post_init__(self) -> None:
        settle = object.__setattr__
        if isinstance(self.values, np.ndarray):
            settle(self, "values", ArrayRows(self.values))
        settle(self, "name", self.name or Path(self.source).name or "rows")
        settle(self, "source", self.source or self.argument or self.name)
        settle(self, "stored_dtype", self.stored_dtype or str(self.values.dtype))
        settle(self, "numbered", self.numbered or self.ids is None)
        settle(self, "ids", np.arange(len(self)) if self.ids is None else as_ids(np.asarray(self.ids)))
        for name in ("labels", "texts", "images", "ids"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self):
                raise ValueError(f"{name}: {len(value)} entries for {len(self)} rows of {self.name}")

    # ------------------------------------------------------------------ numbers

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.values.shape

    @property
    def dim(self) -> int:
        """Number of columns."""
        return int(self.shape[1])

    @property
    def dtype(self) -> np.dtype:
        """Of the rows that are given: float64 where they are stored so, else float32."""
        return _working(self.values.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def block_rows(self) -> int:
        """Rows in a block of 16 MB."""
        return max(1, _BLOCK_BYTES // (4 * self.dim))

    def blocks(
        self, size: int | None = None, *, start: int = 0, finite: bool = True
    ) -> Iterator[tuple[int, Float[np.ndarray, "b d"]]]:
        """(position of its first row, copy) of consecutive blocks of `size` rows (default: 16 MB), from `start` on.

        finite: raise ValueError, naming the first, for rows with NaN or infinity.
        """
        size = size or self.block_rows
        for first, stored in zip(range(start, len(self), size), stored_blocks(self.values, size, start)):
            rows = np.ascontiguousarray(stored, dtype=_working(stored.dtype))
            if finite:
                self._check_finite(rows, range(first, first + len(rows)))
            yield first, rows

    def batches(self, chosen: Bool[np.ndarray, " n"] | None = None) -> Iterator[Float[Tensor, "b d"]]:
        """The rows, or those of a mask, as tensors; of two collections of the same rows in batches of equal sizes."""
        for start, block in self.blocks(_BATCH_ROWS):
            yield torch.from_numpy(block if chosen is None else block[chosen[start : start + len(block)]])

    def take(self, positions: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
        """The rows at these positions, in this order; they are read in the order in which they lie in the file."""
        positions = np.asarray(positions)
        order = np.argsort(positions, kind="stable")
        rows, ordered, size = np.empty((len(positions), self.dim), self.dtype), positions[order], self.block_rows
        if hasattr(self.values, "stream"):
            # One pass: single rows of such a file cost as much as the row group that they are in.
            for start, stored in zip(range(0, len(self), size), stored_blocks(self.values, size)):
                first, last = np.searchsorted(ordered, (start, start + len(stored)))
                rows[order[first:last]] = stored[ordered[first:last] - start]
        else:
            for first in range(0, len(order), size):
                rows[order[first : first + size]] = self.values.take(ordered[first : first + size])
        self._check_finite(rows, positions)
        return rows

    def array(self) -> Float[np.ndarray, "n d"]:
        """All rows: the array itself, as it is stored, where they are one; else in memory, as far as there is any."""
        return self.values.values if isinstance(self.values, ArrayRows) else all_rows(self.values, self.source)

    def finite(self) -> Bool[np.ndarray, " n"]:
        """Which rows hold neither NaN nor infinity: one pass over all."""
        return np.concatenate([np.isfinite(block).all(axis=1) for _, block in self.blocks(finite=False)])

    def _check_finite(self, rows: np.ndarray, positions: Any) -> None:
        if np.isfinite(rows.sum()):
            return
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            name = self.ids[positions[bad[0]]]
            raise ValueError(f"{self.source}: the vector with id {str(name)!r} contains NaN or infinity")

    def norms(self) -> tuple[float, float]:
        """(smallest, largest) length of a row: one pass over all."""
        low, high = np.inf, 0.0
        for _, rows in self.blocks():
            lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
            low, high = min(low, float(lengths.min())), max(high, float(lengths.max()))
        return low, high

    # ------------------------------------------------------------------ names

    def row_name(self, index: int) -> str:
        """The id of a row, else its number."""
        return f"row {index}" if self.numbered else str(self.ids[index])

    def named(self, ids: Any) -> Rows:
        """The same under other ids; None: under the row numbers."""
        return replace(self, ids=ids, numbered=False)

    def subset(self, kept: Int[np.ndarray, " k"]) -> Rows:
        """Some rows alone, in memory; rows without ids are called by their old numbers."""
        places = kept.tolist()

        def chosen(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[row] for row in places]

        ids = np.array([self.row_name(row) for row in places], dtype=str) if self.numbered else self.ids[kept]
        return replace(
            self, values=ArrayRows(self.take(kept)), ids=ids, numbered=False,
            labels=None if self.labels is None else self.labels[kept], texts=chosen(self.texts),
            images=chosen(self.images),
        )  # fmt: skip

    def positions(self, ids: Shaped[np.ndarray, " k"], *, name: str = "ids") -> Int[np.ndarray, " k"]:
        """Where the rows of these ids are. Raises ValueError for repeated and for unknown ids."""
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
        """Where the rows of these ids are, and which of the ids there are. Raises ValueError for repeated ids."""
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

    def facts(self) -> dict[str, Any]:
        """What there is, with one pass for the lengths: n, d, metric, dtype, ids, exact, lengths, unit_length."""
        low, high = self.norms()
        return {
            "source": self.source, "kind": self.kind, "form": self.form, "n": len(self), "d": self.dim,
            "metric": self.metric, "dtype": self.stored_dtype,
            "ids": "row numbers" if self.numbered else "whole numbers" if self.ids.dtype.kind in "iu" else "texts",
            "exact": self.exact, "lengths": [low, high], "unit_length": is_unit(low, high),
        }  # fmt: skip


def is_unit(low: float, high: float, *, tolerance: float = UNIT_TOLERANCE) -> bool:
    """Whether lengths from `low` to `high` are all one, by default to the precision of stored vectors."""
    return abs(low - 1) <= tolerance and abs(high - 1) <= tolerance


def as_ids(values: np.ndarray) -> Shaped[np.ndarray, " n"]:
    """Whole numbers as int64, everything else as text."""
    if values.dtype.kind not in "iu" or (
        values.dtype == np.uint64 and len(values) and values.max() > np.iinfo(np.int64).max
    ):
        return values.astype(str)
    return values.astype(np.int64)


def check_unique(ids: np.ndarray, name: str) -> np.ndarray:
    """`ids`, or ValueError naming the first that is repeated."""
    ordered = np.sort(ids)
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(repeated):
        raise ValueError(f"{name}: the id {str(ordered[repeated[0]])!r} occurs more than once")
    return ids


def _working(dtype: np.dtype) -> np.dtype:
    """float64 for floats of eight bytes, in native order; else float32."""
    return np.dtype(np.float64 if dtype.kind == "f" and dtype.itemsize >= 8 else np.float32)
