"""Which columns of a table are its dimensions: one of vectors, or several of numbers that do not name or count rows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .reading import printable, quoted

Kind = Literal["list", "text list", "real", "integer", "other"]
"""What a column holds: lists of numbers, texts of JSON lists, numbers, whole numbers, or something else."""

_ID_NAMES = frozenset({"id", "ids", "_id"})
_LABEL_NAMES = frozenset({"label", "labels", "class", "target"})
# What pandas makes of an index: in CSV a column without a name, read back and written again "Unnamed: 0".
INDEX_NAMES = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
_FEW_ROWS, _FEW_WHOLE_ROWS = 3, 8


@dataclass(frozen=True)
class Columns:
    """The columns that make the matrix, what they hold, the one that names the rows, and why others are left out."""

    names: tuple[str, ...]
    kind: Kind
    id_column: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def say_left_out(self, where: str) -> None:
        """Warn, in one line, where columns of numbers are taken for no dimensions."""
        if self.left_out:
            said = ", ".join(f"{quoted(name)} ({why})" for name, why in list(self.left_out.items())[:10])
            more = f" and {len(self.left_out) - 10} more" if len(self.left_out) > 10 else ""
            warnings.warn(f"{where}: no dimensions, left out: {said}{more}", stacklevel=4)


class Progressions:
    """Which columns of whole numbers only rise from row to row, and which are the same in all of them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.rising = list(names)
        self.constant = list(self.rising)
        self.rows = 0
        self._last: dict[str, float] = {}

    def update(self, columns: Mapping[str, np.ndarray]) -> None:
        """Go on with the next rows of the columns that are still `open`."""
        for name, values in columns.items():
            if not len(values):
                continue
            before = self._last.get(name)
            if name in self.rising and not (
                (values[1:] > values[:-1]).all() and (before is None or values[0] > before)
            ):
                self.rising.remove(name)
            if name in self.constant and (values != (values[0] if before is None else before)).any():
                self.constant.remove(name)
            self._last[name] = values[-1]
        self.rows += max(map(len, columns.values()), default=0)

    @property
    def open(self) -> list[str]:
        """Columns that may still be either."""
        return list(dict.fromkeys([*self.rising, *self.constant]))


def choose_columns(
    kinds: Mapping[str, Kind],
    where: str,
    *,
    column: str | None = None,
    named: Iterable[str] = (),
    progressions: Callable[[list[str]], Progressions] = Progressions,
) -> Columns:
    """The columns of `kinds` that are the table's dimensions.

    column: asked for; `named`: taken for something else. Else the only column of vectors, or all numbers but ids (by
    name, or whole numbers that only rise), whole numbers called a label, pandas' index and, beside other numbers,
    constant whole ones.
    Raises ValueError, which calls the table `where`, for none or several columns of vectors, or no numbers.
    """
    others = set(named)
    ids = [name for name in kinds if name.casefold() in _ID_NAMES and name not in others and name != column]
    indexes = [name for name in kinds if INDEX_NAMES.fullmatch(name) and name not in others and name != column]
    by_name = next(iter([*ids, *indexes]), None)
    if column is not None:
        return Columns((column,), kinds[column], by_name)
    vectors = [name for name, kind in kinds.items() if kind in ("list", "text list") and name not in others]
    if len(vectors) > 1:
        raise ValueError(f"column: choose one of {listed(vectors)} of {where}")
    if vectors:
        return Columns((vectors[0],), kinds[vectors[0]], by_name)
    numbers = [name for name, kind in kinds.items() if kind in ("real", "integer") and name not in others]
    left = {name: "an id" for name in ids if name in numbers}
    left |= {name: "an index" for name in indexes if name in numbers}
    left |= {name: "a label" for name in numbers if kinds[name] == "integer" and name.casefold() in _LABEL_NAMES}
    whole = [name for name in numbers if kinds[name] == "integer" and name not in left]
    mixed = any(kinds[name] == "real" and name not in left for name in numbers)
    found = progressions(whole)
    if found.rows >= (_FEW_ROWS if mixed else _FEW_WHOLE_ROWS):
        rising = dict.fromkeys(found.rising, "whole numbers that only rise")
        if len(rising) + len(left) < len(numbers):
            by_name = by_name or next(iter(rising), None)
            left |= rising
            if mixed:
                left |= dict.fromkeys(found.constant, "one whole number in every row")
    kept = tuple(name for name in numbers if name not in left)
    if not kept:
        beside = f" beside {listed(left)}" if left else ""
        raise ValueError(f"column: {where} has no numeric column{beside}; it has {listed(kinds)}")
    return Columns(kept, "real", by_name, left)


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first twenty, each shortened."""
    every = [name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}" for name in map(str, names)]
    return printable(", ".join(every[:20]) + (f" and {len(every) - 20} more" if len(every) > 20 else ""))
