"""A mean over positions of feature maps, weighted by where a small network looks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class AttentionPool2d(nn.Module):
    """Feature maps (b, c, h, w) → the mean of maps times attention (b, c), and the attention (b, h, w) in (0, 1).

    Three convolutions of 3 x 3 with ReLU between them and a sigmoid behind; the mean is over all positions, so that
    attention that is low everywhere makes the mean small.

    Parameters
    ----------
    channels
        c.
    reduction
        c over the channels between the convolutions.

    Raises
    ------
    ValueError
        For sizes below 1.

    References
    ----------
    Adiga et al. (2022), arXiv 2206.09068: reductions 8 and 32.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import AttentionPool2d
    >>> pooled, attention = AttentionPool2d(64)(torch.randn(2, 64, 7, 7))
    >>> pooled.shape, attention.shape
    (torch.Size([2, 64]), torch.Size([2, 7, 7]))
    """

    def __init__(self, channels: int, reduction: tuple[int, int] = (8, 32)) -> None:
        super().__init__()
        if channels < 1 or min(reduction) < 1:
            raise ValueError(f"channels, reduction: must be at least 1, got {channels} and {reduction}")
        first, second = (max(1, channels // by) for by in reduction)
        sizes = ((channels, first), (first, second), (second, 1))
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in sizes]
        self.network = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def attention(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
        """Where it looks."""
        return torch.sigmoid(self.network(maps))[:, 0]

    def forward(self, maps: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b h w"]]:
        """Pooled maps and attention."""
        attention = self.attention(maps)
        return (maps * attention[:, None]).mean((2, 3)), attention
