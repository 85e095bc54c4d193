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
    """`retention` and `reconstruction_error` of the first `sizes` rows of an order.

    Attributes
    ----------
    sizes
        Numbers of rows (m,).
    retention, reconstruction_error
        The two shares (m,) at each size.
    """

    sizes: np.ndarray
    retention: np.ndarray
    reconstruction_error: np.ndarray


def retention(X: Any, indices: Any, k: int | float | str | RankRule = 0.9) -> float:
    """Share, in [0, 1], of the pool's dominant-subspace energy that the selected rows' own dominant subspace keeps.

    With V_k the k leading directions of the centred pool X and W_k those of its selected rows (seen from the pool's
    mean), |X V_k V_k' W_k|_F^2 / |X V_k|_F^2. Fewer rows than k span fewer directions and keep less.

    Parameters
    ----------
    X
        The pool (n, d).
    indices
        Positions of the selected rows.
    k
        Dimension, or rank rule for the pool.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        For positions outside the pool.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.select import retention
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 6))  # a plane, which a few rows span
    >>> round(retention(x, [3, 8, 21], k=2), 6)
    1.0
    """
    return _Pool(X, k).retention(_positions(indices, len(X)))


def reconstruction_error(X: Any, indices: Any, k: int | float | str | RankRule | None = 0.9) -> float:
    """Share, in [0, 1], of the centred pool's energy outside the leading k-dimensional row space of selected rows.

    The pool's own k directions leave the least: 1 - explained variance.

    Parameters
    ----------
    X
        The pool (n, d).
    indices
        Positions of the selected rows.
    k
        Dimension, or rank rule for the pool; None takes the whole row space of the selected rows.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        For positions outside the pool.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.select import reconstruction_error
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 6))  # a plane, which a few rows span
    >>> reconstruction_error(x, [3, 8, 21], k=2) < 1e-9
    True
    """
    return _Pool(X, 0.9 if k is None else k).reconstruction_error(_positions(indices, len(X)), whole=k is None)


def retention_curve(
    X: Any, order: Any, k: int | float | str | RankRule = 0.9, *, sizes: Sequence[int] | None = None
) -> RetentionCurve:
    """Retention and reconstruction error as an order (such as `LeverageSelector.ranking_`) is followed.

    Parameters
    ----------
    X
        The pool (n, d).
    order
        Positions of rows, first the ones that are taken first.
    k
        Dimension, or rank rule for the pool.
    sizes
        How many rows of the order to take; None: 2, 4, 8, 16, 32, 64 and 100 % of it.

    Returns
    -------
    RetentionCurve

    Raises
    ------
    ValueError
        For positions outside the pool and sizes outside [1, length of the order].

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.select import retention_curve
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 6))
    >>> curve = retention_curve(x, range(50), k=2, sizes=[1, 25, 50])
    >>> np.round(curve.retention[1:], 6).tolist(), bool(curve.retention[0] < 1)
    ([1.0, 1.0], True)
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
