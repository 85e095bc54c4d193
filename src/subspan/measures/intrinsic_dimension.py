"""How many parameters points have, also where the set that they lie on is curved."""

from __future__ import annotations

from typing import Any

import torch

from subspan.base import check_matrix


def two_nn(x: Any, *, most: int = 2000, discard: float = 0.1) -> float:
    """Intrinsic dimension by the ratio of the distances to the second and the first neighbour (TwoNN).

    On a d-dimensional set the ratio r has P(r > t) = t^-d, whatever the density; d is the slope of -log(1 - F(r)) on
    log r through the origin.

    Parameters
    ----------
    x
        (n, p) points; copies of a point count once.
    most
        Only the first so many.
    discard
        Share of the largest ratios that are left out, which outliers make.

    Returns
    -------
    float; 0 where there are fewer than 4 different points.

    Raises
    ------
    ValueError
        For NaN, and a share outside [0, 1).

    References
    ----------
    Facco, d'Errico, Rodriguez & Laio (2017), Estimating the intrinsic dimension of datasets by a minimal neighborhood
    information.

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import two_nn
    >>> angle = 6.28 * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    >>> round(two_nn(torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)))
    1
    """
    if not 0 <= discard < 1:
        raise ValueError(f"discard: must lie in [0, 1), got {discard}")
    points = torch.unique(check_matrix(x, "x").double()[:most], dim=0)
    if len(points) < 4:
        return 0.0
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    two = distances.topk(2, dim=1, largest=False).values
    ratio = (two[:, 1] / two[:, 0]).log().sort().values
    n = len(ratio)
    kept = max(2, round((1 - discard) * n))
    # The largest ratio has F = 1, whose logarithm is infinite.
    kept = min(kept, n - 1)
    height = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64) / n)
    along = ratio[:kept]
    return float((along * height).sum() / along.square().sum().clamp_min(1e-300))
