"""Small auto-encoders that give every layer: convolutions with TensorFlow's SAME padding, and plain linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class SamePadding(NamedTuple):
    """Positions of a strided convolution along an axis, and the zeros before and after it."""

    positions: int
    before: int
    after: int


def same_padding(size: int, kernel: int, stride: int) -> SamePadding:
    """TensorFlow's SAME: ceil(size / stride) positions; the odd zero comes after."""
    positions = math.ceil(size / stride)
    total = max((positions - 1) * stride + kernel - size, 0)
    return SamePadding(positions, total // 2, total - total // 2)


def _phases(weight: Float[Tensor, "o c k l"], stride: int) -> Float[Tensor, "o q r s"]:
    """A strided kernel as a kernel of stride 1 on the channels of `pixel_unshuffle`, which is many times faster."""
    o, c, *kernel = weight.shape
    rows, columns = (math.ceil(size / stride) for size in kernel)
    padded = F.pad(weight, (0, columns * stride - kernel[1], 0, rows * stride - kernel[0]))
    split = padded.reshape(o, c, rows, stride, columns, stride).permute(0, 1, 3, 5, 2, 4)
    return split.reshape(o, c * stride**2, rows, columns)


class SameConv2d(nn.Conv2d):
    """Strided convolution (b, c, h, w) → (b, o, ceil(h / stride), ceil(w / stride)), padded as TensorFlow's SAME.

    Parameters
    ----------
    in_channels, out_channels
        c and o.
    kernel_size
        Side of the kernel, in pixels.
    stride
        Of both axes.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SameConv2d
    >>> SameConv2d(3, 8, kernel_size=3)(torch.randn(2, 3, 7, 6)).shape
    torch.Size([2, 8, 4, 3])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 2) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o p q"]:
        """The convolution."""
        stride = self.stride[0]
        weight = _phases(self.weight, stride)
        pads: list[int] = []
        for size, kernel, steps in zip(input.shape[:1:-1], self.weight.shape[:1:-1], weight.shape[:1:-1]):
            positions, before, _ = same_padding(size, kernel, stride)
            pads += [before, stride * (positions - 1 + steps) - size - before]
        return F.conv2d(F.pixel_unshuffle(F.pad(input, pads), stride), weight, self.bias)


class SameConvTranspose2d(nn.ConvTranspose2d):
    """The adjoint of `SameConv2d` (with its own weights and a bias): (b, o, p, q) → (b, c, *size).

    Parameters
    ----------
    in_channels, out_channels
        o and c: of the code that comes in, and of the images that come out.
    kernel_size
        Side of the kernel, in pixels.
    size
        (height, width) of the images; p and q are these over the stride, rounded up.
    stride
        Of both axes.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SameConvTranspose2d
    >>> SameConvTranspose2d(8, 3, kernel_size=3, size=(7, 6))(torch.randn(2, 8, 4, 3)).shape
    torch.Size([2, 3, 7, 6])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, size: tuple[int, int], stride: int = 2
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.size = size

    def forward(self, input: Float[Tensor, "b o p q"], output_size: list[int] | None = None) -> Tensor:
        """The images that a convolution of this kernel would read, added up where windows overlap."""
        size = self.size if output_size is None else tuple(output_size)
        stride, kernel = self.stride[0], self.weight.shape[2:]
        weight = _phases(self.weight, stride).transpose(0, 1).flip(2, 3)
        rows, columns = weight.shape[2] - 1, weight.shape[3] - 1
        full = F.pixel_shuffle(F.conv2d(F.pad(input, (columns, columns, rows, rows)), weight), stride)
        top, left = (same_padding(length, width, stride).before for length, width in zip(size, kernel))
        cut = full[:, :, top : top + size[0], left : left + size[1]]
        return cut if self.bias is None else cut + self.bias[:, None, None]


class ConvAutoencoder(nn.Module):
    """Images (b, c, h, w) → the output of each stride-2 convolution with ReLU, and back by their adjoints.

    The last layer of the decoder has no ReLU, so that images may have negative values.

    Parameters
    ----------
    shape
        (c, h, w) of the images.
    channels
        Output channels of each encoder layer; for the ORL faces (3, 3, 5) in the literature.
    kernels
        Side of the kernel of each layer; for the ORL faces (3, 3, 3).

    Raises
    ------
    ValueError
        Where `channels` and `kernels` differ in length or are empty.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import ConvAutoencoder
    >>> model = ConvAutoencoder((1, 8, 6), channels=(3, 5), kernels=(3, 3))
    >>> first, code = model.encode(torch.randn(2, 1, 8, 6))
    >>> code.shape, model.decode(code).shape
    (torch.Size([2, 5, 2, 2]), torch.Size([2, 1, 8, 6]))
    """

    def __init__(self, shape: tuple[int, int, int], channels: Sequence[int], kernels: Sequence[int]) -> None:
        super().__init__()
        if len(channels) != len(kernels) or not channels:
            raise ValueError(f"channels, kernels: one of each a layer, got {len(channels)} and {len(kernels)}")
        encoder, decoder = [], []
        before, size = shape[0], (shape[1], shape[2])
        for after, kernel in zip(channels, kernels):
            encoder.append(SameConv2d(before, after, kernel))
            decoder.insert(0, SameConvTranspose2d(after, before, kernel, size))
            before, size = after, (math.ceil(size[0] / 2), math.ceil(size[1] / 2))
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)

    def encode(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """The output of each layer, the code last."""
        return _through(self.encoder, x)

    def decode(self, code: Float[Tensor, "b o p q"]) -> Float[Tensor, "b c h w"]:
        """Images of codes."""
        return _back(self.decoder, code)


class LinearAutoencoder(nn.Module):
    """Vectors (b, sizes[0]) → the output of each linear layer with ReLU, of `sizes[1:]`, and back.

    The last layer of the decoder has no ReLU.

    Parameters
    ----------
    sizes
        Width of the vectors, then of each layer, the code last: at least two.

    Raises
    ------
    ValueError
        For fewer than two sizes.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import LinearAutoencoder
    >>> model = LinearAutoencoder((16, 8, 2))
    >>> hidden, code = model.encode(torch.randn(5, 16))
    >>> code.shape, model.decode(code).shape
    (torch.Size([5, 2]), torch.Size([5, 16]))
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes: at least that of the vectors and one layer, got {tuple(sizes)}")
        pairs = list(pairwise(sizes))
        self.encoder = nn.ModuleList(nn.Linear(before, after) for before, after in pairs)
        self.decoder = nn.ModuleList(nn.Linear(after, before) for before, after in reversed(pairs))

    def encode(self, x: Float[Tensor, "b d"]) -> list[Tensor]:
        """The output of each layer, the code last."""
        return _through(self.encoder, x)

    def decode(self, code: Float[Tensor, "b q"]) -> Float[Tensor, "b d"]:
        """Vectors of codes."""
        return _back(self.decoder, code)


def _through(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    found = []
    for layer in layers:
        x = F.relu(layer(x))
        found.append(x)
    return found


def _back(layers: nn.ModuleList, code: Tensor) -> Tensor:
    for place, layer in enumerate(layers):
        code = layer(F.relu(code) if place else code)
    return code
