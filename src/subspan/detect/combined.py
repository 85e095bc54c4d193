"""Two distances of a row on one scale: inside and outside the subspace by their spread, and from the mean as a whole.

The first is Mahalanobis', sum z_i²/λ_i + residual/σ² with σ² the mean variance outside, of variances that are shrunk
towards their mean as far as so few rows ask for (oracle approximating shrinkage, Chen et al., 2010). A crowd of strange
rows hides itself from it, by the variance that they add to the direction in which they lie; the second, |x - μ|², still
sees them. The cube root of either is nearly Gaussian for Gaussian rows (Wilson & Hilferty, 1931).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import owens_t
from scipy.stats import chi2, norm
from torch import Tensor

from subspan.geometry import Subspace
from subspan.geometry.covariance import oas_weight

# In standard deviations: three interquartile ranges above the upper quartile of a Gaussian.
FENCE = 7 * float(norm.isf(0.25))


def column_scale(variances: Float[Tensor, " d"], mean: Float[Tensor, " d"], dtype: torch.dtype) -> Float[Tensor, " d"]:
    """Standard deviations of columns that were read in `dtype`; one that is constant counts as the others typically do.

    So no unit of a column decides, nor a common unit of them all.
    """
    scale = variances.clamp_min(0).sqrt()
    varies = scale > torch.finfo(dtype).eps * mean.abs()
    return torch.where(varies, scale, scale[varies].median() if bool(varies.any()) else 1.0)


def distance_roots(subspace: Subspace, rows: Float[Tensor, "n d"], drop_k: int = 0) -> Float[Tensor, "n 2"]:
    """Cube roots of both distances; the first `drop_k` directions count as outside."""
    inside, outside = _denominators(subspace, drop_k)
    z, residual = subspace.energies(rows)
    squares = z.square()
    # Not negative but for rounding.
    both = torch.stack([(squares / inside).sum(-1) + residual / outside, squares.sum(-1) + residual], dim=-1)
    return both.clamp_min(0) ** (1 / 3)


def _denominators(subspace: Subspace, drop_k: int) -> tuple[Float[Tensor, " k"], float]:
    assert subspace.variances is not None
    assert subspace.spectrum is not None
    assert subspace.count is not None
    d, rank = subspace.ambient_dim, subspace.dim
    trace, square = float(subspace.spectrum.sum()), float(subspace.spectrum.square().sum())
    weight = oas_weight(trace, square, d, subspace.count)
    # Rows that are fewer than the columns vary in fewer directions.
    others = max(1.0, min(subspace.count - 1, d) - rank)
    outside = (1 - weight) * float(subspace.spectrum[rank:].sum()) / others + weight * trace / d
    inside = (1 - weight) * subspace.variances + weight * trace / d
    inside[:drop_k] = outside
    return inside, outside


def gaussian_null(subspace: Subspace, drop_k: int = 0) -> tuple[Float[Tensor, "2 2"], float]:
    """((centre, spread) of the roots of both distances, their correlation) for Gaussian rows.

    Sums of weighted chi-squares are taken as one scaled chi-square with their mean and variance (Box, 1954).
    """
    assert subspace.spectrum is not None
    inside, outside = _denominators(subspace, drop_k)
    spectrum = subspace.spectrum.double()
    weights = spectrum / torch.cat([inside, inside.new_full((len(spectrum) - len(inside),), outside)])
    both = torch.stack([weights, spectrum])
    first, second = both.sum(1), both.square().sum(1)
    narrow = 2 / 9 * second / first.square()
    null = torch.stack([first ** (1 / 3) * (1 - narrow), first ** (1 / 3) * narrow.sqrt()])
    return null, float((weights * spectrum).sum() / second.prod().sqrt())


def counted_null(found: Float[Tensor, "n 2"]) -> Float[Tensor, "2 2"]:
    """(centre, spread) of the roots of both distances of most rows: from quartiles, which strange rows hardly move."""
    values = found.cpu().numpy()
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    spread = (high - low) / (2 * norm.isf(0.25))
    # Where half of the rows are alike.
    spread = np.where(spread > 1e-9 * middle, spread, values.std(0))
    spread = np.where(spread > 0, spread, np.where(middle > 0, middle, 1.0))
    return torch.from_numpy(np.stack([middle, spread])).to(found.device)


def combined_score(found: Float[Tensor, "n 2"], null: Float[Tensor, "2 2"]) -> Float[Tensor, " n"]:
    """The larger of both distances, in standard deviations beyond what is usual."""
    return ((found - null[0]) / null[1]).amax(-1)


def combined_limit(correlation: float, level: float) -> float:
    """What the larger of two standard Gaussians exceeds with probability `level` (Owen, 1956)."""
    slope = ((1 - correlation) / (1 + correlation)) ** 0.5 if correlation < 1 else 0.0
    # Equal to that of one where they correlate fully, or, but for rounding, to that of two apart.
    low, high = norm.isf(level) - 1e-6, norm.isf(level / 2) + 1e-6
    found = brentq(lambda t: norm.sf(t) + 2 * owens_t(t, slope) - level, low, high)
    return float(found)  # pyright: ignore[reportArgumentType]


def chi_square_limit(weights: Float[np.ndarray, " m"], level: float) -> float:
    """What a sum of chi-squares with these weights exceeds with probability `level` (Box, 1954)."""
    first, second = weights.sum(), np.square(weights).sum()
    return float(second / first * chi2.isf(level, first**2 / second)) if second > 0 else 0.0
