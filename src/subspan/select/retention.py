"""How much of a pool's dominant subspace a subset of its rows keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base import check_matrix
from subspan.geometry import RankRule, Subspace


class RetentionCurve(NamedTuple):
    """`retention` and `reconstruction_error` of the first `sizes` rows of an order."""

    sizes: np.ndarray
    retention: np.ndarray
    reconstruction_error: np.ndarray


def retention(X: Any, indices: Any, k: int | float | str | RankRule = 0.9) -> float:
    """Share, in [0, 1], of the pool's dominant-subspace energy that the selected rows' own dominant subspace keeps.

    With V_k the k leading directions of the centred pool X (n, d) and W_k those of its rows `indices` (seen from the
    pool's mean), |X V_k V_k' W_k|_F^2 / |X V_k|_F^2. `k`: a dimension or a rank rule for the pool. Fewer rows than k
    span fewer directions and keep less. Raises ValueError for positions outside the pool.
    """
    return _Pool(X, k).retention(_positions(indices, len(X)))


def reconstruction_error(X: Any, indices: Any, k: int | float | str | RankRule | None = 0.9) -> float:
    """Share, in [0, 1], of the centred pool's energy outside the leading k-dimensional row space of selected rows.

    `k=None` takes the whole row space. The pool's own k directions leave the least: 1 - explained variance.
    """
    return _Pool(X, 0.9 if k is None else k).reconstruction_error(_positions(indices, len(X)), whole=k is None)


def retention_curve(
    X: Any, order: Any, k: int | float | str | RankRule = 0.9, *, sizes: Sequence[int] | None = None
) -> RetentionCurve:
    """Retention and reconstruction error as an order (such as `LeverageSelector.ranking_`) is followed.

    `sizes`: how many rows of the order to take, default 2, 4, 8, 16, 32, 64 and 100 % of it.
    """
    pool = _Pool(X, k)
    rows = _positions(order, len(X))
    steps = [max(1, round(share * len(rows))) for share in (0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)]
    chosen = sorted(set(steps)) if sizes is None else list(sizes)
    if not all(1 <= size <= len(rows) for size in chosen):
        raise ValueError(f"sizes: must lie in [1, {len(rows)}], got {chosen}")
    return RetentionCurve(
        np.asarray(chosen),
        np.asarray([pool.retention(rows[:size]) for size in chosen]),
        np.asarray([pool.reconstruction_error(rows[:size]) for size in chosen]),
    )


class _Pool:
    """Centred pool rows with their dominant subspace."""

    def __init__(self, X: Any, k: int | float | str | RankRule):
        rows = check_matrix(X, "X", min_rows=2).to(torch.float64)
        self.dominant = Subspace.fit(rows, rank=k)
        assert self.dominant.center is not None
        self.rows = rows - self.dominant.center
        self.energy = float(self.rows.square().sum())

    def directions(self, indices: np.ndarray, k: int) -> Float[Tensor, "d m"]:
        """Leading directions of the selected rows, m = min(k, their rank)."""
        rows = self.rows[torch.as_tensor(indices, device=self.rows.device)]
        _, s, vh = torch.linalg.svd(rows, full_matrices=False)
        rank = int((s > s[0] * max(rows.shape) * torch.finfo(s.dtype).eps).sum())
        return vh[: min(k, rank)].mT

    def retention(self, indices: np.ndarray) -> float:
        directions = self.directions(indices, self.dominant.dim)
        assert self.dominant.variances is not None
        kept = self.dominant.variances.sqrt().unsqueeze(1) * (self.dominant.basis.mT @ directions)
        return float(kept.square().sum() / self.dominant.variances.sum())

    def reconstruction_error(self, indices: np.ndarray, *, whole: bool = False) -> float:
        directions = self.directions(indices, self.rows.shape[1] if whole else self.dominant.dim)
        residual = self.rows - (self.rows @ directions) @ directions.mT
        return float(residual.square().sum()) / self.energy


def _positions(indices: Any, n: int) -> np.ndarray:
    positions = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
    if positions.ndim != 1 or positions.size == 0 or positions.dtype.kind not in "iu":
        raise ValueError(f"indices: expected positions of rows, got {positions.dtype} of shape {positions.shape}")
    if positions.min() < 0 or positions.max() >= n:
        raise ValueError(f"indices: must lie in [0, {n - 1}], got {positions.min()} to {positions.max()}")
    return positions
