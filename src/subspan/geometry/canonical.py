"""Canonical correlations of two spaces and linear alignment, from covariances."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base.arrays import as_tensor

from .covariance import inverse_sqrt, oas_shrinkage, shrink_covariance
from .subspace import Subspace


@dataclass(frozen=True)
class CanonicalCorrelation:
    """Canonical directions of two spaces: columns with unit variance and cross-correlation diag(correlations).

    Attributes
    ----------
    x_directions, y_directions
        (d_x, k) and (d_y, k), one pair of directions a column, strongest first.
    correlations
        (k,) in [0, 1], descending.
    mean_x, mean_y
        (d_x,) and (d_y,), taken from rows before the directions are applied.
    shrinkage
        Weights in [0, 1] of the scaled identity in the covariances of x and of y.
    """

    x_directions: Float[Tensor, "d_x k"]
    y_directions: Float[Tensor, "d_y k"]
    correlations: Float[Tensor, " k"]
    mean_x: Float[Tensor, " d_x"]
    mean_y: Float[Tensor, " d_y"]
    shrinkage: tuple[float, float] = (0.0, 0.0)

    def transform_x(self, x: Any) -> Float[Tensor, "n k"]:
        """Canonical variables of rows x (n, d_x)."""
        rows = as_tensor(x, "x")
        return (rows - self.mean_x.to(rows)) @ self.x_directions.to(rows)

    def transform_y(self, y: Any) -> Float[Tensor, "n k"]:
        """Canonical variables of rows y (n, d_y)."""
        rows = as_tensor(y, "y")
        return (rows - self.mean_y.to(rows)) @ self.y_directions.to(rows)

    def truncate(self, k: int) -> CanonicalCorrelation:
        """The first k pairs."""
        return dataclasses.replace(
            self,
            x_directions=self.x_directions[:, :k],
            y_directions=self.y_directions[:, :k],
            correlations=self.correlations[:k],
        )

    def subspaces(self) -> tuple[Subspace, Subspace]:
        """Spans of the directions in x and in y (Euclidean orthonormal bases, centred at the means)."""
        return (
            Subspace.span(self.x_directions, center=self.mean_x),
            Subspace.span(self.y_directions, center=self.mean_y),
        )

    def shared_dimensions(self, threshold: float = 0.5) -> int:
        """Number of pairs with a correlation above `threshold`."""
        return int((self.correlations > threshold).sum())


def cca(
    cov_xx: Float[Tensor, "d_x d_x"],
    cov_xy: Float[Tensor, "d_x d_y"],
    cov_yy: Float[Tensor, "d_y d_y"],
    *,
    count: float,
    mean_x: Tensor | None = None,
    mean_y: Tensor | None = None,
    k: int | None = None,
    shrinkage: float | str = "oas",
    dimensions: tuple[int, int] | None = None,
) -> CanonicalCorrelation:
    """Canonical correlation analysis from covariances.

    The joint covariance is shrunk, so the cross-covariance shrinks with its two sides and correlations stay below one.
    Where the shrinkage is so strong that nothing of the data is left, correlations are zero. Where nothing is shrunk,
    directions without variance (constant or dependent columns, fewer rows than columns) are left out.

    Parameters
    ----------
    cov_xx, cov_xy, cov_yy
        Covariances (d_x, d_x), (d_x, d_y) and (d_y, d_y).
    count
        Number of rows behind them.
    mean_x, mean_y
        Means (d_x,) and (d_y,); None: zero.
    k
        Pairs of directions to keep; None: all that there are.
    shrinkage
        "oas" (a weight for each side by `oas_shrinkage`), or one weight in [0, 1] for both sides.
    dimensions
        Of the two spaces, where the covariances are in coordinates of parts with all the variance; None: their own.

    Returns
    -------
    CanonicalCorrelation, k pairs by descending correlation.

    Raises
    ------
    ValueError
        For a side that is constant, k above the pairs that there are, and unknown shrinkage.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import cca
    >>> eye, cross = torch.eye(2).double(), torch.tensor([[0.0, 0.9], [0.0, 0.0]]).double()
    >>> found = cca(eye, cross, eye, count=100, shrinkage=0.0)
    >>> found.correlations.round(decimals=4).tolist(), found.shared_dimensions()
    ([0.9, 0.0], 1)
    """
    for name, covariance in (("cov_xx", cov_xx), ("cov_yy", cov_yy)):
        if not float(covariance.diagonal().sum()) > 0:
            raise ValueError(f"{name}: is zero: the rows are constant and have no directions")
    d_x, d_y = dimensions or (len(cov_xx), len(cov_yy))
    if isinstance(shrinkage, str):
        if shrinkage != "oas":
            raise ValueError(f"shrinkage: expected 'oas' or a number in [0, 1], got {shrinkage!r}")
        weights = (oas_shrinkage(cov_xx, count, d_x), oas_shrinkage(cov_yy, count, d_y))
    else:
        weights = (float(shrinkage), float(shrinkage))
    regular = [shrink_covariance(*side) for side in zip((cov_xx, cov_yy), weights, (d_x, d_y))]
    white_x, white_y = map(inverse_sqrt, regular)
    # The trace of a whitened covariance is its rank.
    available = min(round(float((white @ side @ white).trace())) for white, side in zip((white_x, white_y), regular))
    kept = ((1 - weights[0]) * (1 - weights[1])) ** 0.5
    u, s, vh = torch.linalg.svd(white_x @ cov_xy @ white_y * kept, full_matrices=False)
    k = available if k is None else k
    if not 1 <= k <= available:
        raise ValueError(f"k: must lie in [1, {available}], got {k}")
    return CanonicalCorrelation(
        white_x @ u[:, :k],
        white_y @ vh.mT[:, :k],
        s[:k].clamp(0, 1),
        cov_xx.new_zeros(len(cov_xx)) if mean_x is None else mean_x,
        cov_yy.new_zeros(len(cov_yy)) if mean_y is None else mean_y,
        weights,
    )


def linear_cka(
    cov_xx: Float[Tensor, "d_x d_x"], cov_xy: Float[Tensor, "d_x d_y"], cov_yy: Float[Tensor, "d_y d_y"]
) -> float:
    """Linear centred kernel alignment of two spaces, from covariances.

    Parameters
    ----------
    cov_xx, cov_xy, cov_yy
        Covariances (d_x, d_x), (d_x, d_y) and (d_y, d_y).

    Returns
    -------
    Alignment in [0, 1]; 1 where one space is a rotation of the other, up to a scale.

    Raises
    ------
    ValueError
        Where `cov_xx` or `cov_yy` is zero.

    References
    ----------
    Kornblith, Norouzi, Lee & Hinton (2019), arXiv 1905.00414.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import linear_cka
    >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> round(linear_cka(torch.eye(2), turn, torch.eye(2)), 4)
    1.0
    """
    norm = torch.linalg.matrix_norm(cov_xx) * torch.linalg.matrix_norm(cov_yy)
    if not float(norm) > 0:
        raise ValueError("cov_xx, cov_yy: one of them is zero, so the alignment is not defined")
    return float(torch.linalg.matrix_norm(cov_xy).square() / norm)
