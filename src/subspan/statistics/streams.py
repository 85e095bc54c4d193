"""Rows from anywhere: arrays, memory maps, Parquet files, iterables, DataLoaders and Dask arrays, batch by batch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.arrays import is_sparse, refuse_sparse
from ..base.files import remove_unfinished
from ..geometry.arrays import as_tensor
from ..geometry.extras import require
from ..geometry.files import load_arrays
from .moments import Moments


def is_dask(source: Any) -> bool:
    """Whether `source` is a Dask array (without importing Dask)."""
    return type(source).__module__.split(".")[0] == "dask" and hasattr(source, "to_delayed")


def is_stream(source: Any) -> bool:
    """Whether `source` must be read batch by batch: it is no array in memory, or it is a list of arrays (n, d).

    Sparse matrices are no streams: whether they are read is up to the door of arrays.
    """
    if is_sparse(source):
        return False
    if isinstance(source, list | tuple):
        return bool(source) and getattr(source[0], "ndim", 0) == 2
    return isinstance(source, np.memmap | str | os.PathLike) or not (
        isinstance(source, Tensor) or hasattr(source, "__array__")
    )


def is_one_shot(source: Any) -> bool:
    """Whether `source` can be read only once (a generator or another iterator)."""
    return isinstance(source, Iterator)


def batches(source: Any, batch_size: int = 8192, *, skip: int = 0) -> Iterator[Tensor]:
    """Yield `source` as tensors (n, d), after skipping `skip` rows.

    source: an array or tensor (n, d); a memory map; a path to a .npy or .parquet file; an iterable (or DataLoader) of
    batches, where of a tuple or dict the first entry is taken; a Dask array. Raises ValueError for other files,
    TypeError for sparse matrices.
    """
    refuse_sparse(source, "source")
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
    if skip < 0:
        raise ValueError(f"skip: must be >= 0, got {skip}")
    if isinstance(source, str | os.PathLike):
        source = _open(Path(source), batch_size)
    if is_dask(source):
        source = (np.asarray(block.compute()) for block in source.rechunk({1: -1}).to_delayed().ravel())
    if isinstance(source, Tensor) or hasattr(source, "__array__"):
        rows = as_tensor(source, "source", ndim=2)
        for start in range(skip, rows.shape[0], batch_size):
            yield rows[start : start + batch_size]
        return
    if not isinstance(source, Iterable):
        raise TypeError(f"source: cannot read rows from a {type(source).__name__}")
    for batch in source:
        first = next(iter(batch.values())) if isinstance(batch, dict) else batch
        first = first[0] if isinstance(first, tuple | list) and len(first) and not np.isscalar(first[0]) else first
        rows = as_tensor(first, "batch", ndim=2)
        if skip >= rows.shape[0]:
            skip -= rows.shape[0]
            continue
        yield rows[skip:]
        skip = 0


def _open(path: Path, batch_size: int) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"source: no file {str(path)!r}")
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"source: {str(path)!r} is not a readable .npy file ({error})") from error
    if path.suffix == ".parquet":
        return _parquet(path, batch_size)
    raise ValueError(f"source: cannot stream {path.suffix or 'a file without suffix'!r}; expected .npy or .parquet")


def _parquet(path: Path, batch_size: int) -> Iterator[np.ndarray]:
    parquet: Any = require("pyarrow.parquet", extra="tables")
    arrow: Any = require("pyarrow", extra="tables")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise ValueError(f"source: {str(path)!r} is not a readable Parquet file ({error})") from error

    def is_vector(kind: Any) -> bool:
        return arrow.types.is_fixed_size_list(kind) or arrow.types.is_list(kind)

    def is_number(kind: Any) -> bool:
        return arrow.types.is_floating(kind) or arrow.types.is_integer(kind)

    schema = file.schema_arrow
    vectors = [field.name for field in schema if is_vector(field.type) and is_number(field.type.value_type)]
    numbers = [field.name for field in schema if is_number(field.type)]
    if not vectors and not numbers:
        raise ValueError(f"source: {str(path)!r} has no column of vectors and no numeric columns")
    for batch in file.iter_batches(batch_size, columns=vectors[:1] or numbers):
        if batch.num_rows == 0:
            continue
        if any(column.null_count for column in batch.columns):
            raise ValueError(f"source: {str(path)!r} has missing values; remove or impute them")
        if vectors:
            column = batch.column(0)
            flat = column.flatten().to_numpy(zero_copy_only=False)
            if len(flat) % batch.num_rows:
                raise ValueError(f"source: the vectors in column {vectors[0]!r} have unequal lengths")
            yield flat.reshape(batch.num_rows, -1)
        else:
            yield np.column_stack([column.to_numpy(zero_copy_only=False) for column in batch.columns])


def fit_moments(
    source: Any,
    *,
    batch_size: int = 8192,
    dtype: torch.dtype = torch.float64,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = False,
) -> Moments:
    """Moments of all rows of `source` (anything that `batches` takes) in one pass.

    `checkpoint`: a file that is rewritten every `checkpoint_seconds`; when it exists the rows that it covers are
    skipped, and it is removed at the end, so a killed run resumes to the same result. `progress` shows a bar on a
    terminal. Dask arrays are reduced by the scheduler, which recomputes what a lost worker held.
    """
    if is_dask(source):
        return _dask_moments(source, dtype)
    moments: Moments | None = None
    done = 0
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        remove_unfinished(path)
    if path is not None and path.exists():
        state, facts = load_arrays(path, "moments")
        moments = Moments.from_state(state)
        if "rows" not in facts or facts.get("batch_size") != batch_size:
            raise ValueError(f"checkpoint: {str(path)!r} is not of this run (batch_size={batch_size}); remove it")
        done = int(facts["rows"])
    last = time.monotonic()
    bar = _bar(source, done) if progress else None
    try:
        for batch in batches(source, batch_size, skip=done):
            if moments is None:
                moments = Moments(batch.shape[1], dtype=dtype, device=batch.device)
            moments.update(batch)
            done += batch.shape[0]
            if bar is not None:
                bar.update(batch.shape[0])
            if path is not None and time.monotonic() - last >= checkpoint_seconds:
                moments.save(path, rows=done, batch_size=batch_size)
                last = time.monotonic()
    finally:
        if bar is not None:
            bar.close()
    if moments is None:
        raise ValueError("source: holds no rows (an iterator that was already read?)")
    if path is not None:
        path.unlink(missing_ok=True)
    return moments


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
