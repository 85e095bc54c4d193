"""The two passes over the rows that everything else in a report is computed from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from subspan.base import Progress, normalize_rows
from subspan.datasets import Rows
from subspan.geometry import Subspace
from subspan.statistics import Moments

from .inputs import not_finite

MINIMUM_ROWS = 20
QUERIES = 1000
BASE_ROWS = 100_000
MAIN_DIRECTIONS = 0.9
_BOOTSTRAP_BLOCKS = 128


@dataclass(frozen=True)
class Survey:
    """Moments, norms and repeated rows of all rows, and a sample of unit rows to search in.

    unit_mean: mean of the rows scaled to unit length. first_copy: for each row the first row equal to it. base: unit
    rows to search in (all, or a sample of BASE_ROWS), base_index their row numbers. queries: positions in the base.
    """

    moments: Moments
    unit_mean: Float[Tensor, " d"]
    norms: Float[np.ndarray, " n"]
    first_copy: Int[np.ndarray, " n"]
    base: Float[Tensor, "m d"]
    base_index: Int[np.ndarray, " m"]
    queries: Int[np.ndarray, " q"]

    @property
    def zero(self) -> Bool[np.ndarray, " n"]:
        """Rows that are all zeros and so have no direction."""
        return self.norms == 0


def survey(data: Rows, *, seed: int = 0, progress: Progress) -> Survey:
    """Read all rows once. Raises ValueError for too few rows, NaN or infinity, constant rows, or only zero rows."""
    n, d = data.shape
    if n < MINIMUM_ROWS:
        raise ValueError(f"{data.name}: a report needs at least {MINIMUM_ROWS} rows, got {n}")
    if d < 2:
        raise ValueError(f"{data.name}: a report needs at least 2 columns, got {d}")
    rng = np.random.default_rng(seed)
    base_index = np.arange(n) if n <= BASE_ROWS else np.sort(rng.choice(n, BASE_ROWS, replace=False))
    moments, unit_sum = Moments(d), torch.zeros(d, dtype=torch.float64)
    norms, digests = np.empty(n), np.empty(n, dtype="V16")
    base = torch.empty(len(base_index), d, dtype=torch.float32)
    for start, block in data.blocks(finite=False):
        stop = start + len(block)
        rows = torch.from_numpy(block)
        try:
            moments.update(rows)
        except ValueError as error:
            finite = data.finite()
            raise ValueError(f"{data.name}: {error}") if finite.all() else not_finite(data, finite) from None
        digests[start:stop] = _digests(block)
        norms[start:stop] = torch.linalg.vector_norm(rows.double(), dim=1).numpy()
        unit = normalize_rows(rows)
        unit_sum += unit.sum(0, dtype=torch.float64)
        first, last = np.searchsorted(base_index, (start, stop))
        base[first:last] = unit[base_index[first:last] - start]
        progress("reading the rows", stop / n)
    scale = float(moments.mean.square().sum())
    if not moments.total_variance > 1e-24 * scale or moments.total_variance == 0:
        raise ValueError(f"{data.name}: all rows are equal, so there is no variance to describe")
    usable = np.flatnonzero(norms[base_index] > 0)
    queries = np.sort(rng.choice(usable, min(QUERIES, len(usable)), replace=False))
    return Survey(moments, unit_sum / n, norms, _first_of_equals(digests), base, base_index, queries)


def first_copies(data: Rows) -> Int[np.ndarray, " n"]:
    """For each row the number of the first row that equals it."""
    return _first_of_equals(np.concatenate([_digests(block) for _, block in data.blocks()]))


def _digests(block: Float[np.ndarray, "m d"]) -> Shaped[np.ndarray, " m"]:
    # Adding zero turns -0.0, which equals 0.0, into the same bytes.
    return np.array([hashlib.blake2b(row, digest_size=16).digest() for row in block + 0.0], dtype="V16")


def _first_of_equals(digests: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    return first[which]


@dataclass(frozen=True)
class Measured:
    """Where each row lies with respect to the principal directions, of which the first `rank` are the main ones.

    leverage: leverage on the main directions. block_energy: sums of squares along each direction over blocks of rows,
    every b-th row in a block.
    """

    directions: Subspace
    rank: int
    leverage: Float[np.ndarray, " n"]
    block_energy: Float[np.ndarray, "b d"]

    @property
    def main(self) -> Subspace:
        """The main directions, which explain MAIN_DIRECTIONS of the variance."""
        return self.directions.truncate(self.rank)


def measure(data: Rows, seen: Survey, *, progress: Progress) -> Measured:
    """Read all rows a second time, in the coordinates of their principal directions."""
    n = len(data)
    directions = seen.moments.subspace(1.0)
    rank = seen.moments.subspace(MAIN_DIRECTIONS).dim
    assert directions.center is not None
    assert directions.variances is not None
    count = min(_BOOTSTRAP_BLOCKS, n)
    energy = torch.zeros(count, directions.dim, dtype=torch.float64)
    leverage = np.empty(n)
    scale = (directions.variances[:rank] * (n - 1)).float()
    for start, block in data.blocks():
        stop = start + len(block)
        rows = torch.from_numpy(block)
        squares = ((rows - directions.center.to(rows.dtype)) @ directions.basis.to(rows.dtype)).square()
        energy.index_add_(0, torch.arange(start, stop) % count, squares.double())
        leverage[start:stop] = (squares[:, :rank] / scale.to(squares.dtype)).sum(1).numpy()
        progress("measuring the directions", stop / n)
    return Measured(directions, rank, leverage, energy.numpy())
