"""Numbers in fewer bits: to the nearest of a few levels, or as the files of factors hold them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.models import LowRankLinear, SparseDictLinear

GROUP = 32


def round_to_bits(x: Float[Tensor, "n d"], bits: int = 4, *, group: int = GROUP) -> Float[Tensor, "n d"]:
    """Numbers rounded to 2^bits levels, zero among them, from the least to the largest of each group of a row.

    Parameters
    ----------
    x
        (n, d).
    bits
        Of a number, 1 to 16; a group takes 32 more for its least level and its step (bfloat16).
    group
        Neighbours in a row with one scale.

    Returns
    -------
    Tensor as x.

    Examples
    --------
    >>> import torch
    >>> from subspan.weights import round_to_bits
    >>> round_to_bits(torch.tensor([[0.0, 0.9, 2.1, 3.0]]), bits=2)
    tensor([[0., 1., 2., 3.]])
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits: from 1 to 16, got {bits}")
    parts = nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    low, high = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True).clamp(min=0)
    exact = (high - low) / (2**bits - 1)
    step = exact.to(torch.bfloat16)
    step = torch.where(step < exact, (step.view(torch.int16) + 1).view(torch.bfloat16), step).to(x)
    unit = torch.where(step > 0, step, 1)
    least = (low / unit).round()
    return (step * (parts / unit).round().clamp(least, least + 2**bits - 1)).flatten(1)[:, : x.shape[1]]


def round_stored(layer: LowRankLinear | SparseDictLinear) -> None:
    """Numbers as they are stored: bfloat16, and codes with 5 bits of mantissa, to the nearest."""
    for name, value in layer.named_parameters():
        half = value.data.to(torch.bfloat16)
        if name == "values":
            half = ((half.view(torch.int16) + 2) & ~3).view(torch.bfloat16)
        value.data = half.to(value.dtype)
