"""Concept erasure in closed form: what a linear probe could read of the groups is taken out, and little else."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

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
    return erase_differences(moments.means - pooled.mean, pooled.covariance(), pooled.mean)


def erase_differences(
    directions: Float[Tensor, "m d"], covariance: Float[Tensor, "d d"], mean: Float[Tensor, " d"]
) -> AffineMap:
    """The affine map that takes some directions out of rows and moves rows of this covariance least.

    Parameters
    ----------
    directions
        (m, d): differences of group means, or covariances with numbers, which no linear probe reads afterwards.
    covariance
        Of the rows, maybe shrunk: the directions are taken out whatever it is, only how far rows move depends on it.
    mean
        Of the rows, which stays where it is.

    Returns
    -------
    AffineMap from d to d dimensions.

    Raises
    ------
    ValueError
        For directions that are all zero.

    References
    ----------
    Belrose et al. (2023), LEACE, arXiv 2306.03819.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import erase_differences
    >>> map = erase_differences(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2))
    >>> map.map(torch.tensor([[1.0, 1.0]])).abs().max() < 1e-6
    tensor(True)
    """
    white = inverse_sqrt(covariance)
    whitened = directions @ white
    _, sizes, vh = torch.linalg.svd(whitened, full_matrices=False)
    # In units of the spread: less is rounding, which would take out a direction that says nothing.
    kept = vh[sizes > torch.finfo(sizes.dtype).eps ** 0.5 * max(1.0, float(sizes.max()))]
    if not len(kept):
        raise ValueError("moments: the groups have one mean already; there is nothing to erase")
    back = covariance @ white
    return AffineMap.through(torch.eye(len(mean)).to(back) - back @ kept.mT @ kept @ white, mean, mean)
