"""Moments of rows from anywhere in one pass: resumable, and by Dask's scheduler where the rows are a Dask array."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subspan.base import require
from subspan.base.files import remove_unfinished
from subspan.base.reading import reading
from subspan.base.streams import batches, is_dask, is_one_shot, is_stream

from .moments import Moments

__all__ = ["batches", "fit_moments", "is_dask", "is_one_shot", "is_stream"]


def _naming(source: Any) -> contextlib.AbstractContextManager[None]:
    """What is wrong with the rows of a file is said with its name."""
    return reading(source, "source") if isinstance(source, str | os.PathLike) else contextlib.nullcontext()


def fit_moments(
    source: Any,
    *,
    batch_size: int = 8192,
    dtype: torch.dtype = torch.float64,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = False,
) -> Moments:
    """Moments of all rows of a source in one pass, resumable after a stop.

    Dask arrays are reduced by the scheduler, which recomputes what a lost worker held.

    Parameters
    ----------
    source
        Anything that `batches` takes.
    batch_size
        Rows that are read at once.
    dtype
        Of the sums; a complex one for complex rows.
    checkpoint
        A file that is rewritten as the rows come; when it exists the rows that it covers are skipped, and it is removed
        at the end, so that a killed run resumes to the same result. None: none.
    checkpoint_seconds
        Time between two writings.
    progress
        Whether a terminal shows a bar.

    Returns
    -------
    Moments.

    Raises
    ------
    ValueError
        For a source without rows, or a checkpoint of another source or of one that has changed since: its size and
        time, and the first and last row of every batch.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.statistics import fit_moments
    >>> found = fit_moments(iter([np.zeros((3, 2)), np.ones((1, 2))]))
    >>> found.count, found.mean.tolist()
    (4.0, [0.25, 0.25])
    """
    if is_dask(source):
        return _dask_moments(source, dtype)
    moments: Moments | None = None
    done, seen, known = 0, "", None
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        remove_unfinished(path)
        known = _source_facts(source)
    if path is not None and path.exists():
        moments, done, seen, rows = _resumed(path, source, batch_size)
    else:
        rows = batches(source, batch_size)
    last = time.monotonic()
    bar = _bar(source, done) if progress else None
    try:
        for batch in rows:
            if moments is None:
                moments = Moments(batch.shape[1], dtype=dtype, device=batch.device)
            with _naming(source):
                moments.update(batch)
            done += batch.shape[0]
            if path is not None:
                seen = _seen(seen, batch)
            if bar is not None:
                bar.update(batch.shape[0])
            if path is not None and time.monotonic() - last >= checkpoint_seconds:
                moments.save(path, rows=done, batch_size=batch_size, source=known, seen=seen)
                last = time.monotonic()
    finally:
        if bar is not None:
            bar.close()
    if moments is None:
        raise ValueError("source: holds no rows (an iterator that was already read?)")
    if path is not None:
        path.unlink(missing_ok=True)
    return moments


def _resumed(path: Path, source: Any, batch_size: int) -> tuple[Moments, int, str, Iterator[Tensor]]:
    """What a checkpoint holds: moments, rows, what was seen of them; and the batches that follow."""
    moments, facts = Moments.load_resumable(path)
    foreign = ValueError(
        f"checkpoint: {str(path)!r} is not of this run (batch_size={batch_size}), or its source has changed since; "
        "remove it"
    )
    if (
        None in (facts["rows"], facts["seen"])
        or facts["batch_size"] != batch_size
        or facts["source"] != _source_facts(source)
    ):
        raise foreign
    done, count, seen = facts["rows"], 0, ""
    if isinstance(source, str | os.PathLike) and Path(source).suffix != ".npy":
        # A table is known by its size and time: to see its rows again would take as long as the run did.
        return moments, done, facts["seen"], batches(source, batch_size, skip=done)
    rows = batches(source, batch_size)
    for batch in rows:
        count, seen = count + batch.shape[0], _seen(seen, batch)
        if count >= done:
            break
    if count != done or seen != facts["seen"]:
        raise foreign
    return moments, done, seen, rows


def _source_facts(source: Any) -> list[Any]:
    """Size and time of a file, shape of an array; nothing is known of other sources before they are read."""
    file = getattr(source, "filename", None) if isinstance(source, np.memmap) else source
    if isinstance(file, str | os.PathLike) and Path(file).is_file():
        stat = Path(file).stat()
        return [stat.st_size, stat.st_mtime_ns]
    return [*source.shape, str(source.dtype)] if isinstance(source, Tensor | np.ndarray) else []


def _seen(before: str, batch: Tensor) -> str:
    """Digest of what was seen before and of the first and last row of a batch."""
    if not len(batch):
        return before
    ends = batch[[0, -1]].detach().cpu().contiguous()
    return hashlib.sha256(before.encode() + ends.view(torch.uint8).numpy().tobytes()).hexdigest()


class _Bar:
    """A rich progress bar on stderr; silent where stderr is no terminal."""

    def __init__(self, total: int | None, done: int):
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._progress.start()
        self._task = self._progress.add_task("rows", total=total, completed=done)

    def update(self, rows: int) -> None:
        self._progress.advance(self._task, rows)

    def close(self) -> None:
        self._progress.stop()


def _bar(source: Any, done: int) -> _Bar:
    shape = getattr(source, "shape", None)
    return _Bar(int(shape[0]) if shape else None, done)


def _dask_moments(array: Any, dtype: torch.dtype) -> Moments:
    dask: Any = require("dask", extra="distributed")
    if array.ndim != 2:
        raise ValueError(f"source: expected 2 dimensions, got shape {array.shape}")
    one = dask.delayed(_block_moments, pure=True)
    two = dask.delayed(Moments.__add__, pure=True)
    level = [one(block, array.shape[1], dtype) for block in array.rechunk({1: -1}).to_delayed().ravel()]
    while len(level) > 1:
        level = [two(*level[i : i + 2]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    return level[0].compute()


def _block_moments(block: Any, d: int, dtype: torch.dtype) -> Moments:
    return Moments(d, dtype=dtype).update(np.ascontiguousarray(block))
