"""Concept erasure in closed form: what a linear probe could read of the groups is taken out, and little else."""

from __future__ import annotations

import torch

from subspan.geometry import AffineMap, inverse_sqrt
from subspan.statistics import GroupedMoments


def leace(moments: GroupedMoments) -> AffineMap:
    """The affine map after which all groups have one mean, and which moves rows least in the mean square.

    No linear classifier is better than a constant then. With W the whitening of the rows and P the projection onto the
    whitened differences of the means, x → x - W⁺ P W (x - mean).

    Parameters
    ----------
    moments
        Of the rows by group, at least two groups.

    Returns
    -------
    AffineMap from d to d dimensions.

    Raises
    ------
    ValueError
        For fewer than two groups, or means that are all the same.

    References
    ----------
    Belrose et al. (2023), LEACE, arXiv 2306.03819.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import leace
    >>> from subspan.statistics import GroupedMoments
    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.arange(200) % 2
    >>> x[:, 0] += 3 * labels
    >>> erased = leace(GroupedMoments(3).update(x, labels)).map(x)
    >>> bool((erased[labels == 0].mean(0) - erased[labels == 1].mean(0)).abs().max() < 1e-5)
    True
    """
    if len(moments.groups) < 2:
        raise ValueError(f"moments: at least two groups are needed, got {len(moments.groups)}")
    pooled = moments.pooled()
    covariance, mean = pooled.covariance(), pooled.mean
    white = inverse_sqrt(covariance)
    directions = (moments.means - mean) @ white
    _, sizes, vh = torch.linalg.svd(directions, full_matrices=False)
    kept = vh[sizes > torch.finfo(sizes.dtype).eps * max(directions.shape) * max(1.0, float(sizes.max()))]
    if not len(kept):
        raise ValueError("moments: the groups have one mean already; there is nothing to erase")
    back = covariance @ white
    return AffineMap.through(torch.eye(len(mean)).to(back) - back @ kept.mT @ kept @ white, mean, mean)
