"""Rows from anywhere, batch by batch: arrays, memory maps, tables in files, iterables, DataLoaders, Dask arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .array_files import ArrayRows
from .arrays import as_tensor, is_sparse, refuse_sparse
from .rows import stored_blocks
from .tables import read_table


def is_dask(source: Any) -> bool:
    """Whether `source` is a Dask array (without importing Dask).

    Parameters
    ----------
    source
        Anything.

    Returns
    -------
    bool.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.statistics import is_dask
    >>> is_dask(np.zeros((3, 2)))
    False
    """
    return type(source).__module__.split(".")[0] == "dask" and hasattr(source, "to_delayed")


def is_stream(source: Any) -> bool:
    """Whether `source` must be read batch by batch: it is no array in memory, or it is a list of arrays (n, d).

    Sparse matrices are no streams: whether they are read is up to the door of arrays.

    Parameters
    ----------
    source
        Anything that may hold rows.

    Returns
    -------
    bool.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.statistics import is_stream
    >>> is_stream(np.zeros((3, 2))), is_stream([np.zeros((3, 2)), np.ones((3, 2))]), is_stream("rows.npy")
    (False, True, True)
    """
    if is_sparse(source):
        return False
    if is_dask(source):
        return True
    if isinstance(source, list | tuple):
        return bool(source) and getattr(source[0], "ndim", 0) == 2
    return isinstance(source, np.memmap | str | os.PathLike) or not (
        isinstance(source, Tensor) or hasattr(source, "__array__")
    )


def is_one_shot(source: Any) -> bool:
    """Whether `source` can be read only once (a generator or another iterator).

    Parameters
    ----------
    source
        Anything.

    Returns
    -------
    bool.

    Examples
    --------
    >>> from subspan.statistics import is_one_shot
    >>> is_one_shot([1, 2]), is_one_shot(iter([1, 2]))
    (False, True)
    """
    return isinstance(source, Iterator)


def batches(source: Any, batch_size: int = 8192, *, skip: int = 0) -> Iterator[Tensor]:
    """Yield rows from anywhere as tensors (n, d).

    Parameters
    ----------
    source
        An array or tensor (n, d); a memory map; a path to a table (see `subspan.datasets.read_table`); an iterable (or
        DataLoader) of batches, where of a tuple or dict the first entry is taken; a Dask array.
    batch_size
        Rows of a yielded tensor at most; batches of an iterable and blocks of a Dask array stay as they are.
    skip
        Rows that are passed over first.

    Yields
    ------
    Tensors (n, d).

    Raises
    ------
    ValueError
        For other files.
    TypeError
        For what holds no rows, such as a graph, and for sparse matrices.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.statistics import batches
    >>> [len(rows) for rows in batches(np.zeros((5, 2)), batch_size=2, skip=1)]
    [2, 2]
    """
    refuse_sparse(source, "source")
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
    if skip < 0:
        raise ValueError(f"skip: must be >= 0, got {skip}")
    if isinstance(source, str | os.PathLike):
        source, skip = _opened(Path(source), batch_size, skip)
    if is_dask(source):
        source = (np.asarray(block.compute()) for block in source.rechunk({1: -1}).to_delayed().ravel())
    if isinstance(source, Tensor) or hasattr(source, "__array__"):
        rows = as_tensor(source, "source", ndim=2)
        for start in range(skip, rows.shape[0], batch_size):
            yield rows[start : start + batch_size]
        return
    if not isinstance(source, Iterable) or hasattr(source, "adj"):
        graph = (
            "; a graph is no table (its adjacency is one: networkx.to_numpy_array)" if hasattr(source, "adj") else ""
        )
        raise TypeError(f"source: cannot read rows from a {type(source).__name__}{graph}")
    for batch in source:
        first: Any = next(iter(batch.values())) if isinstance(batch, dict) else batch
        first = first[0] if isinstance(first, tuple | list) and len(first) and not np.isscalar(first[0]) else first
        rows = as_tensor(first, "batch", ndim=2)
        if skip >= rows.shape[0]:
            skip -= rows.shape[0]
            continue
        yield rows[skip:]
        skip = 0


def _opened(path: Path, batch_size: int, skip: int) -> tuple[Any, int]:
    """The rows of a table as they are stored, mapped or in blocks, and how many of them are still to be skipped."""
    if not path.exists():
        raise FileNotFoundError(f"source: no file {str(path)!r}")
    values = read_table(path).values
    if isinstance(values, ArrayRows):
        return values.values, skip
    return stored_blocks(values, batch_size, min(skip, values.shape[0])), 0
