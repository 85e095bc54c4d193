"""Encoders of series and of their views, each to a vector, and the small map from one such vector to another."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ConvBlock, ResidualConvBlock

_BLOCKS = 8


class SeriesEncoder(nn.Module):
    """Series (b, c, l) of any length → vectors (b, out_dim): eight residual blocks and a mean over time.

    Normalisation comes before each convolution (He et al., 2016b); every second block halves the length, and channels
    double once, in the middle.

    Parameters
    ----------
    channels
        c.
    out_dim
        Numbers that come out.
    width
        Channels of the first four blocks.
    kernel
        Odd.
    dropout
        Inside each block, in [0, 1).

    References
    ----------
    The time encoder of Demirel & Holz (2025), arXiv 2510.22655. The shortcut of a block that changes its shape is a
    convolution of one place; theirs takes a maximum and adds channels of zeros.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SeriesEncoder
    >>> encoder = SeriesEncoder(3, 16, width=4)
    >>> encoder(torch.randn(2, 3, 50)).shape, encoder(torch.randn(2, 3, 17)).shape
    (torch.Size([2, 16]), torch.Size([2, 16]))
    """

    def __init__(
        self, channels: int, out_dim: int = 128, *, width: int = 32, kernel: int = 5, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.stem = ConvBlock(channels, width, kernel=kernel, dims=1)
        sizes = [width, *(width * 2 ** (block // (_BLOCKS // 2)) for block in range(_BLOCKS))]
        self.strides = [1 + block % 2 for block in range(_BLOCKS)]
        options = {"kernel": kernel, "dims": 1, "dropout": dropout, "preactivation": True}
        self.blocks = nn.ModuleList(
            ResidualConvBlock(before, after, stride=stride, **options)
            for (before, after), stride in zip(pairwise(sizes), self.strides)
        )
        self.norm = nn.BatchNorm1d(sizes[-1])
        self.linear = nn.Linear(sizes[-1], out_dim)

    def forward(self, x: Float[Tensor, "b c l"], mask: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b d"]:
        """Vectors; mask: False where a series was filled up, places that the mean leaves out."""
        x = self.stem(x)
        for block, stride in zip(self.blocks, self.strides):
            x = block(x)
            mask = mask if mask is None else mask[:, ::stride]
        x = self.norm(x).relu()
        if mask is None:
            return self.linear(x.mean(-1))
        kept = mask.unsqueeze(1).to(x.dtype)
        return self.linear((x * kept).sum(-1) / kept.sum(-1))


class SpectrumEncoder(nn.Module):
    """Views along one axis (b, k, c, f), such as spectra, → vectors (b, out_dim).

    The first of the k parts (amplitudes) has a branch of its own, all others (phases) have another; with one part
    there is one branch. A branch is a convolution and two residual blocks, which halve the axis without normalisation,
    and a weighted sum over what is left of it.

    Parameters
    ----------
    shape
        (k, c, f).
    out_dim
        Numbers that come out.
    width
        Channels of the first convolution; the blocks have twice and four times as many.

    Raises
    ------
    ValueError
        In use for views of another shape.

    References
    ----------
    The Fourier encoder of Demirel & Holz (2025), arXiv 2510.22655; there four times the width is half of `out_dim` and
    nothing follows, here a linear map does where it is not.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import FourierView, SpectrumEncoder
    >>> SpectrumEncoder((2, 3, 26), 16, width=4)(FourierView()(torch.randn(5, 3, 50))).shape
    torch.Size([5, 16])
    """

    def __init__(self, shape: tuple[int, int, int], out_dim: int = 128, *, width: int = 16) -> None:
        super().__init__()
        parts, channels, length = shape
        self.shape = tuple(shape)
        left = _halved(_halved(length))
        sizes = [channels] if parts == 1 else [channels, (parts - 1) * channels]
        self.branches = nn.ModuleList(_branch(size, width, left) for size in sizes)
        joined = 4 * width * len(sizes)
        self.linear = nn.Identity() if joined == out_dim else nn.Linear(joined, out_dim)

    def forward(self, x: Float[Tensor, "b k c f"]) -> Float[Tensor, "b d"]:
        """Vectors."""
        _check_shape(x, self.shape)
        parts = [x[:, 0], x[:, 1:].flatten(1, 2)]
        return self.linear(torch.cat([branch(part) for branch, part in zip(self.branches, parts)], 1))


def _branch(channels: int, width: int, left: int) -> nn.Sequential:
    return nn.Sequential(
        ConvBlock(channels, width, dims=1, norm=False),
        *(
            ResidualConvBlock(n * width, 2 * n * width, stride=2, dims=1, norm=False, preactivation=True)
            for n in (1, 2)
        ),
        nn.Linear(left, 1),
        nn.Flatten(),
    )


class ScalogramEncoder(nn.Module):
    """Views along two axes (b, c, s, t), such as scalograms, → vectors (b, out_dim).

    Four convolutions, of which three halve both axes; the last two also see the view itself, averaged to their size.
    Then a weighted sum over time, and one over scales.

    Parameters
    ----------
    shape
        (c, s, t).
    out_dim
        Numbers that come out.
    width
        Channels of the first convolution; the others have twice, three and four times as many.
    kernel
        Odd.

    Raises
    ------
    ValueError
        In use for views of another shape.

    References
    ----------
    The wavelet encoder of Demirel & Holz (2025), arXiv 2510.22655; there four times the width is `out_dim` and nothing
    follows, here a linear map does where it is not. Averages at the end of an odd axis are over what there is.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import MorletView, ScalogramEncoder
    >>> view = MorletView(12, (1, 25))
    >>> ScalogramEncoder((3, 12, 50), 16, width=4)(view(torch.randn(5, 3, 50))).shape
    torch.Size([5, 16])
    """

    def __init__(self, shape: tuple[int, int, int], out_dim: int = 128, *, width: int = 32, kernel: int = 5) -> None:
        super().__init__()
        channels, scales, times = shape
        self.shape = tuple(shape)
        self.first = ConvBlock(channels, width, kernel=kernel)
        self.second = ConvBlock(width, 2 * width, kernel=kernel, stride=2)
        self.third = ConvBlock(2 * width + channels, 3 * width, kernel=kernel, stride=2)
        self.fourth = ConvBlock(3 * width + channels, 4 * width, kernel=kernel, stride=2)
        left = [_halved(_halved(_halved(size))) for size in (scales, times)]
        self.over_time, self.over_scales = nn.Linear(left[1], 1), nn.Linear(left[0], 1)
        self.linear = nn.Identity() if 4 * width == out_dim else nn.Linear(4 * width, out_dim)

    def forward(self, x: Float[Tensor, "b c s t"]) -> Float[Tensor, "b d"]:
        """Vectors."""
        _check_shape(x, self.shape)
        half, quarter = (F.avg_pool2d(x, n, ceil_mode=True, count_include_pad=False) for n in (2, 4))
        found = self.third(torch.cat([self.second(self.first(x)), half], 1))
        found = self.fourth(torch.cat([found, quarter], 1))
        return self.linear(self.over_scales(self.over_time(found).squeeze(-1)).squeeze(-1))


class LatentMapper(nn.Module):
    """A vector (b, d) → another one (b, d), by a convolution along its coordinates and back: about 7 h parameters.

    Parameters
    ----------
    dim
        d, any size.
    hidden
        h, channels between the two.

    References
    ----------
    The mappers of Demirel & Holz (2025), arXiv 2510.22655; their code has 64 channels in training and 1 at the end.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import LatentMapper
    >>> LatentMapper(7)(torch.randn(2, 7)).shape, sum(p.numel() for p in LatentMapper(128).parameters())
    (torch.Size([2, 7]), 449)
    """

    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.inward = nn.Conv1d(1, hidden, 3, stride=2, padding=1)
        self.outward = nn.ConvTranspose1d(hidden, 1, 3, stride=2, padding=1, output_padding=1 - dim % 2)

    def forward(self, h: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """What the other vector is guessed to be."""
        return self.outward(self.inward(h.unsqueeze(1)).relu()).squeeze(1)


def _halved(size: int) -> int:
    return -(-size // 2)


def _check_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"x: expected views of shape {shape}, got {tuple(x.shape[1:])}")
