"""What verbs say and write of each row, and the checks that several of them make."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from subspan.base.files import atomic_write, write_array, write_rows
from subspan.datasets import Rows

Columns = dict[str, list[Any]]


class Found(NamedTuple):
    """What a verb found: columns with an entry for each row (or each chosen one), and the facts."""

    columns: Columns
    facts: dict[str, Any]

    def highest(self, count: int, by: str = "score") -> list[dict[str, Any]]:
        """The rows with the highest values of a column."""
        order = sorted(range(len(self.columns[by])), key=lambda row: -self.columns[by][row])[:count]
        return [{name: values[row] for name, values in self.columns.items()} for row in order]

    def write(self, path: Path, numbers: str) -> None:
        """Columns as .csv or .json, all but the row numbers as arrays of an .npz, or one of them as .npy."""
        suffix = path.suffix.lower()
        if suffix == ".npy":
            write_array(path, self.columns[numbers])
        elif suffix == ".npz":
            arrays: dict[str, Any] = {name: np.asarray(self.columns[name]) for name in self.columns if name != "row"}
            with atomic_write(path) as unfinished:
                np.savez(unfinished, **arrays)
        else:
            write_rows(path, self.columns)


@contextlib.contextmanager
def calling(data: Rows, target: Rows | None = None) -> Iterator[None]:
    """Errors and warnings of the library begin with the name of its argument: here with what the user named instead."""
    names = dict.fromkeys(("X", "x", "rows", "moments"), data.source) | {"Y": (target or data).source}

    def said(message: object) -> str:
        name, colon, reason = str(message).partition(": ")
        return f"{names[name]}: {reason}" if colon and name in names else str(message)

    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    except ValueError as error:
        raise ValueError(said(error)) from error
    finally:
        for one in caught:
            warnings.warn(said(one.message), one.category, stacklevel=3)


def naming(data: Rows, rows: Iterable[Any]) -> Columns:
    """The columns that say which rows these are."""
    places = [int(row) for row in rows]
    columns: Columns = {"row": places}
    if not data.numbered:
        columns["id"] = [str(data.ids[row]) for row in places]
    if data.labels is not None:
        columns["label"] = [str(data.labels[row]) for row in places]
    return columns


def check_rank(rank: int | float | str, data: Rows) -> None:
    """Raises ValueError for more directions than the rows can span."""
    most = min(len(data) - 1, data.dim)
    if isinstance(rank, int) and rank > most:
        shape = f"{len(data)} rows of {data.dim} columns"
        raise ValueError(f"--rank: {rank} directions asked for, {shape} span at most {most}")
