"""Covariances: shrinkage, roots, and maps to unit covariance."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .affine import AffineMap


def oas_shrinkage(covariance: Float[Tensor, "p p"], count: float, d: int | None = None) -> float:
    """Weight in [0, 1] of the scaled identity by oracle approximating shrinkage (Chen et al., 2010).

    d: dimension of the space, where the covariance is in coordinates of a part that has all the variance.
    """
    trace, square = float(covariance.diagonal().sum()), float(covariance.square().sum())
    return oas_weight(trace, square, d or covariance.shape[0], count)


def oas_weight(trace: float, square: float, d: int, count: float) -> float:
    """The same from the sum of the d eigenvalues and that of their squares."""
    top = (1 - 2 / d) * square + trace**2
    bottom = (count + 1 - 2 / d) * (square - trace**2 / d)
    return 1.0 if bottom <= 0 else float(min(1.0, top / bottom))


def shrink_covariance(covariance: Float[Tensor, "p p"], weight: float, d: int | None = None) -> Float[Tensor, "p p"]:
    """(1 - weight) covariance + weight (tr covariance / d) I; d as for `oas_shrinkage`."""
    if not 0 <= weight <= 1:
        raise ValueError(f"shrinkage: must lie in [0, 1], got {weight}")
    p = covariance.shape[0]
    eye = torch.eye(p, dtype=covariance.dtype, device=covariance.device)
    return (1 - weight) * covariance + weight * covariance.diagonal().sum() / (d or p) * eye


def inverse_sqrt(covariance: Float[Tensor, "d d"], *, tolerance: float = 1e-12) -> Float[Tensor, "d d"]:
    """Symmetric inverse square root on the range of the covariance; smaller eigenvalues map to zero."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > tolerance * values[-1].clamp_min(0)
    scale = torch.where(kept, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), torch.zeros_like(values))
    return (vectors * scale) @ vectors.mT


def whitening(
    covariance: Float[Tensor, "d d"],
    mean: Float[Tensor, " d"] | None = None,
    *,
    method: str = "zca",
    shrinkage: float = 0.0,
    tolerance: float = 1e-12,
) -> AffineMap:
    """Map to unit covariance: "zca" (symmetric), "pca" (rotated to the axes, by variance) or "cholesky"."""
    regular = shrink_covariance(covariance, shrinkage)
    if method == "zca":
        matrix = inverse_sqrt(regular, tolerance=tolerance)
    elif method == "pca":
        values, vectors = torch.linalg.eigh(regular)
        values, vectors = values.flip(-1), vectors.flip(-1)
        kept = values > tolerance * values[0]
        matrix = vectors[:, kept].mT / values[kept].sqrt().unsqueeze(-1)
    elif method == "cholesky":
        factor, failed = torch.linalg.cholesky_ex(regular)
        if int(failed):
            raise ValueError("covariance: is not positive definite; use shrinkage > 0 or method='zca'")
        matrix = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
    else:
        raise ValueError(f"method: expected 'zca', 'pca' or 'cholesky', got {method!r}")
    return AffineMap.through(matrix, mean, None if mean is None else mean.new_zeros(matrix.shape[0]))
