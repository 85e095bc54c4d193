"""Losses that pull one set of vectors towards another, row by row."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def cosine_matching_loss(x: Float[Tensor, "*b d"], y: Float[Tensor, "*c e"]) -> Float[Tensor, ""]:
    """Minus the mean cosine of paired vectors, in [-1, 1]; zero vectors count as orthogonal to everything.

    Parameters
    ----------
    x, y
        Vectors (…, d) in pairs.

    Returns
    -------
    Tensor, scalar, in float32 or wider.

    Raises
    ------
    ValueError
        For shapes that differ or hold nothing.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import cosine_matching_loss
    >>> cosine_matching_loss(torch.eye(2), 3 * torch.eye(2)).item()
    -1.0
    """
    if x.shape != y.shape or not x.numel():
        raise ValueError(
            f"y: the shape of x, {tuple(x.shape)}, with at least one vector is needed, got {tuple(y.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return -F.cosine_similarity(x.to(wide), y.to(wide), dim=-1).mean()
