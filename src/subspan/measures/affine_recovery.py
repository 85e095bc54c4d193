"""How much of a hidden state an affine map of latents gives back."""

from __future__ import annotations

from typing import Any

from subspan.base import check_matrix
from subspan.statistics import JointMoments


def affine_recovery(truth: Any, found: Any) -> float:
    """R² of the least-squares affine map from what was found to the truth, mean over coordinates of the truth.

    Parameters
    ----------
    truth, found
        Rows (n, d) and (n, p); n must be large against p.

    Returns
    -------
    Share in [0, 1]; it does not change with an invertible affine map of `found`.

    Raises
    ------
    ValueError
        For NaN, other shapes, and a coordinate of the truth that is constant.

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import affine_recovery
    >>> z = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    >>> turned = z @ torch.tensor([[1.0, 2.0], [0.0, -3.0]]) + 5
    >>> round(affine_recovery(z, turned), 4), affine_recovery(z, z.sign()) < 0.8
    (1.0, True)
    """
    y, x = check_matrix(truth, "truth", min_rows=2), check_matrix(found, "found", min_rows=2)
    if len(y) != len(x):
        raise ValueError(f"found: expected {len(y)} rows, one for each of truth, got {len(x)}")
    moments = JointMoments(x.shape[1], y.shape[1]).update(x, y)
    variances = moments.cov_yy.diagonal()
    if not bool((variances > 0).all()):
        raise ValueError(f"truth: coordinate {int(variances.argmin())} is constant")
    told = (moments.ridge(0.0).matrix * moments.cov_xy.mT).sum(1)
    return float((told / variances).clamp(0, 1).mean())
