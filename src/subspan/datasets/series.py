"""Series: trajectories of several channels at equal steps of time, read and checked once for all that work on them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from subspan.base.columns import listed
from subspan.base.kinds import check_input
from subspan.base.reading import check_memory, quoted, regular_file

from .series_files import SERIES_FILES, Stored, Wanted, stored_series

_BLOCK_ROWS = 1 << 16
_JITTER = 0.05
"""How far a step of time may lie from a whole number of the usual one, as a share of it."""


@dataclass(frozen=True)
class Series:
    """Trajectories of several channels, at equal steps of time and without gaps.

    Parameters
    ----------
    trajectories
        Arrays (n_i, channels), in memory or mapped from a file, of unequal lengths.
    channels
        Names; default "channel 0", "channel 1", ….
    time_step
        Between two rows, in `time_unit`.
    time_unit
        "s" where the times are dates, "month" where they are months of a calendar, else "" for the unit of the time
        column, or for steps.
    ids
        A name for each trajectory; default its number.
    times
        Of each trajectory, numbers or dates (n_i,), where they are known.
    source
        What messages call the series.
    filled
        Values that were filled in on request.

    Raises
    ------
    ValueError
        Where names, ids or widths do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.datasets import Series
    >>> series = Series((np.zeros((5, 2)), np.ones((3, 2))))
    >>> series.lengths, series.channels
    ((5, 3), ('channel 0', 'channel 1'))
    >>> [(trajectory, start, block.shape) for trajectory, start, block in series.batches(4)]
    [(0, 0, (4, 2)), (0, 4, (1, 2)), (1, 0, (3, 2))]
    """

    trajectories: tuple[np.ndarray, ...]
    channels: tuple[str, ...] = ()
    time_step: float = 1.0
    time_unit: str = ""
    ids: tuple[str, ...] = ()
    times: tuple[np.ndarray, ...] | None = None
    source: str = "series"
    filled: int = 0

    def __post_init__(self) -> None:
        settle = object.__setattr__
        if not self.trajectories:
            raise ValueError(f"{self.source}: holds no trajectory")
        widths = {part.shape[1] if part.ndim == 2 else -1 for part in self.trajectories}
        if len(widths) > 1 or -1 in widths:
            shapes = listed(map(str, (part.shape for part in self.trajectories)))
            raise ValueError(f"{self.source}: trajectories (n, channels) of one width are needed, got {shapes}")
        settle(self, "channels", self.channels or tuple(f"channel {index}" for index in range(self.dim)))
        settle(self, "ids", self.ids or tuple(map(str, range(len(self)))))
        for name, have, need in (("channels", len(self.channels), self.dim), ("ids", len(self.ids), len(self))):
            if have != need:
                raise ValueError(f"{name}: {have} names for {need} of {self.source}")

    def __len__(self) -> int:
        """Number of trajectories."""
        return len(self.trajectories)

    @property
    def dim(self) -> int:
        """Number of channels."""
        return int(self.trajectories[0].shape[1])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each trajectory."""
        return tuple(map(len, self.trajectories))

    @property
    def dtype(self) -> np.dtype:
        """Of the rows that are given: float64 where they are stored so or as wide integers, else float32."""
        kept = self.trajectories[0].dtype
        return np.dtype(np.float64 if kept.itemsize >= 4 and kept != np.float32 else np.float32)

    def batches(self, size: int = 8192) -> Iterator[tuple[int, int, Float[np.ndarray, "b c"]]]:
        """(trajectory, its first row, copy) of blocks of at most `size` rows, one trajectory after the other."""
        if size < 1:
            raise ValueError(f"size: at least 1 row, got {size}")
        for index, part in enumerate(self.trajectories):
            for start in range(0, len(part), size):
                yield index, start, np.array(part[start : start + size], dtype=self.dtype)

    def between(self, start: int, stop: int) -> Series:
        """The same trajectories from row `start` to `stop` (from the end where negative, 0: the end itself)."""
        parts = [slice(*slice(start, stop or None).indices(length)) for length in self.lengths]
        times = None if self.times is None else tuple(time[part] for time, part in zip(self.times, parts))
        return replace(self, trajectories=tuple(x[part] for x, part in zip(self.trajectories, parts)), times=times)

    def times_after(self, trajectory: int, steps: int) -> np.ndarray:
        """Times of the `steps` rows that would follow a trajectory: dates or numbers (of rows where none are known)."""
        ahead = np.arange(1, steps + 1)
        if self.times is None:
            return (self.lengths[trajectory] - 1 + ahead) * self.time_step
        last = self.times[trajectory][-1]
        if self.time_unit == "month":
            months = last.astype("datetime64[M]") + (ahead * round(self.time_step)).astype("timedelta64[M]")
            into = last - last.astype("datetime64[M]")
            # The last day of a month is followed by the last day of the next.
            ends = (months + 1).astype("datetime64[us]") - np.timedelta64(1, "D")
            at_end = (last + np.timedelta64(1, "D")).astype("datetime64[M]") != last.astype("datetime64[M]")
            return ends if at_end else months.astype("datetime64[us]") + into
        if self.time_unit == "s":
            return last + np.rint(ahead * self.time_step * 1e6).astype("timedelta64[us]")
        return last + ahead * self.time_step


def read_series(
    path: str | os.PathLike[str],
    *,
    channels: Sequence[str] | None = None,
    time_column: str | None = None,
    id_column: str | None = None,
    array: str | None = None,
    channels_first: bool = False,
    time_step: float | None = None,
    gaps: str = "refuse",
    equally_spaced: bool = False,
) -> Series:
    r"""Open series in a file: .csv, .tsv, .npy, .npz, .parquet, .arrow or .feather.

    Parameters
    ----------
    path
        A table with a row for each moment (several trajectories one below the other, told apart by an id column), an
        array (n,), (n, channels) or (trajectories, n, channels), which stays on disk, or an archive of arrays.
    channels
        Columns of the table; None: all but time, id and pandas' index.
    time_column, id_column
        None: by name (time, timestamp, date, datetime, ds, t; id, unique_id, series_id, item_id, trajectory).
    array
        Of an archive: the array, or a pattern such as "run_*" where each array is a trajectory. None: the only one
        with most axes. One array beside `offsets` is cut at these; `channels` and `fs` beside it are read too.
    channels_first
        Whether arrays are (channels, n).
    time_step
        Between two rows; None: what the file says, else 1.
    gaps
        What is done with missing values and missing rows: "refuse"; "fill" (linear between the neighbours, the nearest
        value at an end); "cut" (a trajectory ends there and another begins, pieces of one row are left out).
    equally_spaced
        Take rows as equally spaced, whatever the time column says.

    Returns
    -------
    Series

    Raises
    ------
    ValueError
        In one line, for texts among the numbers, gaps (channel and row), irregular times, times that do not rise, fewer
        than two rows, channels that are all constant, and files that are none.

    Examples
    --------
    >>> from pathlib import Path
    >>> from subspan.datasets import read_series
    >>> text = "date,sun,rain\n2024-01-01,3,0\n2024-01-02,,2\n2024-01-03,5,1\n"
    >>> _ = Path("weather.csv").write_text(text)
    >>> series = read_series("weather.csv", gaps="fill")
    >>> series.channels, series.time_step, series.trajectories[0][:, 0].tolist()
    (('sun', 'rain'), 86400.0, [3.0, 4.0, 5.0])
    """
    if gaps not in ("refuse", "fill", "cut"):
        raise ValueError(f"gaps: expected 'refuse', 'fill' or 'cut', got {gaps!r}")
    if time_step is not None and not time_step > 0:
        raise ValueError(f"time_step: must be > 0, got {time_step}")
    check_input(os.fspath(path), SERIES_FILES, folders=False)
    source = regular_file(path)
    stored = stored_series(source, Wanted(channels, time_column, id_column, array, channels_first))
    if len(stored.values) == sum(map(len, stored.values)) > 1:
        raise ValueError(f"id: each of the {len(stored.values)} ids of {str(source)!r} has one row; a series has many")
    step, unit = time_step or stored.time_step or 1.0, ""
    if stored.times is not None and not equally_spaced:
        stored, found, unit = _on_one_grid(stored, gaps, str(source))
        step = time_step or found
    stored, filled = _without_gaps(stored, gaps, str(source))
    for name, values in zip(stored.ids, stored.values):
        if len(values) < 2:
            raise ValueError(f"path: trajectory {quoted(name)} of {str(source)!r} has {len(values)} row; 2 are needed")
    _check_constant(stored, str(source))
    times = None if stored.times is None else tuple(stored.times)
    return Series(tuple(stored.values), stored.channels, step, unit, stored.ids, times, str(source), filled)


# ---------------------------------------------------------------------- time


def _on_one_grid(stored: Stored, gaps: str, source: str) -> tuple[Stored, float, str]:
    """Rows at equal steps of time, with NaN where a row is missing; (those, step, unit)."""
    assert stored.times is not None
    dated = stored.times[0].dtype.kind == "M"
    for name, times in zip(stored.ids, stored.times):
        wrong = np.flatnonzero(~(np.diff(times) > np.zeros(1, np.diff(times).dtype)))
        if len(wrong) or (np.isnat(times) if dated else ~np.isfinite(times)).any():
            row = int(wrong[0]) + 1 if len(wrong) else 0
            hint = "" if len(stored.ids) > 1 else " (several trajectories need an id column)"
            raise ValueError(
                f"time: the times of {quoted(name)} in {source!r} do not rise: {times[max(row - 1, 0)]} is followed by "
                f"{times[min(row, len(times) - 1)]} in row {row}{hint}"
            )
    seconds = [(t - t[0]) / np.timedelta64(1, "s") if dated else t - t[0] for t in stored.times if len(t)]
    steps = np.concatenate([np.diff(t) for t in seconds]) if seconds else np.empty(0)
    if not len(steps):
        return stored, 1.0, ""
    usual, unit = float(np.median(steps)), "s" if dated else ""
    if dated and not _whole(steps / usual):
        months = [_month_numbers(t) for t in stored.times]
        if all(part is not None for part in months):
            seconds = [part - part[0] for part in months if part is not None]
            steps = np.concatenate([np.diff(t) for t in seconds])
            usual, unit = float(np.median(steps)), "month"
    if not _whole(steps / usual):
        name, row, step = _first_uneven(stored.ids, seconds, usual)
        raise ValueError(
            f"time: {source!r} is sampled irregularly: the step before row {row} of {quoted(name)} is {step:g}, the "
            f"usual one {usual:g}; resample it to equal steps, or take the rows as equally spaced"
        )
    places = [np.concatenate([[0], np.rint(np.diff(t) / usual).cumsum()]).astype(np.int64) for t in seconds]
    values, times = list(stored.values), list(stored.times)
    for index, place in enumerate(places):
        if len(place) and place[-1] + 1 > len(place):
            if gaps == "refuse":
                row = int(np.flatnonzero(np.diff(place) > 1)[0]) + 1
                raise ValueError(
                    f"gaps: {place[-1] + 1 - len(place)} rows of {quoted(stored.ids[index])} in {source!r} are "
                    f"missing, the first before row {row} ({times[index][row]}); fill them, or cut the series there"
                )
            check_memory(8 * int(place[-1] + 1) * values[index].shape[1], f"gaps: {source!r}, filled,")
            grid = np.full((place[-1] + 1, values[index].shape[1]), np.nan)
            grid[place] = values[index]
            values[index], times[index] = grid, _at(np.arange(place[-1] + 1), place, times[index])
    return stored._replace(values=values, times=times), usual, unit


def _whole(ratios: np.ndarray) -> bool:
    """Whether all steps are whole numbers of the usual one, to what clocks are off."""
    return bool((np.abs(ratios - np.maximum(np.rint(ratios), 1)) <= _JITTER).all())


def _month_numbers(times: np.ndarray) -> np.ndarray | None:
    """Months since the first, where all dates are the same day of a month, or all the last one."""
    months = times.astype("datetime64[M]")
    ends = (times + np.timedelta64(1, "D")).astype("datetime64[M]") != months
    same = len(np.unique(times - months)) == 1
    return months.astype(np.int64).astype(np.float64) if same or bool(ends.all()) else None


def _first_uneven(ids: Sequence[str], seconds: list[np.ndarray], usual: float) -> tuple[str, int, float]:
    for name, times in zip(ids, seconds):
        for row, step in enumerate(np.diff(times), start=1):
            if not _whole(np.array([step / usual])):
                return name, row, float(step)
    raise AssertionError("every step is even")


def _at(rows: np.ndarray, known: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Times of all rows, linear between those that are known."""
    if times.dtype.kind != "M":
        return np.interp(rows, known, times)
    since = np.interp(rows, known, (times - times[0]) / np.timedelta64(1, "us"))
    return times[0] + np.rint(since).astype("timedelta64[us]")


# ---------------------------------------------------------------------- gaps


def _without_gaps(stored: Stored, gaps: str, source: str) -> tuple[Stored, int]:
    """Finite values alone: refused, filled or cut."""
    values: list[np.ndarray] = []
    ids: list[str] = []
    times: list[np.ndarray] | None = None if stored.times is None else []
    filled = 0
    for index, (name, part) in enumerate(zip(stored.ids, stored.values)):
        missing = _missing(part)
        if missing is not None and gaps == "refuse":
            row, channel = np.argwhere(missing)[0]
            raise ValueError(
                f"gaps: channel {quoted(stored.channels[int(channel)])} has no finite value in row {row} of "
                f"{quoted(name)} in {source!r} ({int(missing.sum())} values in all); fill them, or cut the series there"
            )
        pieces = [slice(0, len(part))]
        if missing is not None and gaps == "fill":
            part = _filled(part, missing, stored.channels, f"{name!r} in {source!r}")
            filled += int(missing.sum())
        elif missing is not None:
            pieces = _runs(~missing.any(axis=1))
        for number, piece in enumerate(pieces):
            values.append(part[piece])
            ids.append(name if len(pieces) == 1 else f"{name} part {number + 1}")
            if times is not None and stored.times is not None:
                times.append(stored.times[index][piece])
    if not values:
        raise ValueError(f"gaps: {source!r} has no two rows on end without a gap")
    return stored._replace(values=values, ids=tuple(ids), times=times), filled


def _check_constant(stored: Stored, source: str) -> None:
    """Warn of channels that are constant; ValueError where all are."""
    blocks = [part[at : at + _BLOCK_ROWS] for part in stored.values for at in range(0, len(part), _BLOCK_ROWS)]
    least, most = (np.array([getattr(block, end)(axis=0) for block in blocks]) for end in ("min", "max"))
    still = np.flatnonzero(least.min(axis=0) == most.max(axis=0))
    constant = listed(quoted(stored.channels[channel]) for channel in still.tolist())
    if len(still) == len(stored.channels):
        raise ValueError(f"channels: {source!r} is constant in every channel: {constant}")
    if len(still):
        warnings.warn(f"{source}: constant channels: {constant}", stacklevel=3)


def _missing(part: np.ndarray) -> Bool[np.ndarray, "n c"] | None:
    """Which values are not finite; None where all are."""
    if part.dtype.kind != "f":
        return None
    blocks = (part[start : start + _BLOCK_ROWS] for start in range(0, len(part), _BLOCK_ROWS))
    return None if all(np.isfinite(block).all() for block in blocks) else ~np.isfinite(part)


def _filled(part: np.ndarray, missing: np.ndarray, channels: Sequence[str], where: str) -> np.ndarray:
    whole = np.array(part)
    for channel in np.flatnonzero(missing.any(axis=0)):
        known = np.flatnonzero(~missing[:, channel])
        if not len(known):
            raise ValueError(f"gaps: channel {quoted(channels[int(channel)])} of {where} has no value at all")
        gap = np.flatnonzero(missing[:, channel])
        whole[gap, channel] = np.interp(gap, known, whole[known, channel])
    return whole


def _runs(kept: Any) -> list[slice]:
    """Stretches of at least two rows that are kept."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2]) if b - a > 1]
