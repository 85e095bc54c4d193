"""Images to vectors and back by convolutions that halve and double their sides three times."""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ConvBlock, ResidualConvBlock

_HALVINGS = 3


def _block(kind: str, channels: int) -> nn.Module:
    if kind == "residual":
        return ResidualConvBlock(channels, channels)
    if kind == "plain":
        return ConvBlock(channels, channels, activation="leaky_relu")
    raise ValueError(f"block: expected 'residual' or 'plain', got {kind!r}")


def _smallest(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Sides after the halvings."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"image_shape: expected (channels, height, width), got {tuple(shape)}")
    return math.ceil(shape[1] / 2**_HALVINGS), math.ceil(shape[2] / 2**_HALVINGS)


class ConvEncoder(nn.Sequential):
    """Images (b, c, h, w) → vectors (b, out_dim): convolutions of stride 2 with blocks between them, and a linear map.

    Channels are `width`, twice and four times that.

    Parameters
    ----------
    image_shape
        (c, h, w).
    out_dim
        Numbers that come out; of an encoder of means and log variances, twice the dimensions.
    width
        Channels of the first convolution.
    block
        "residual", or "plain": a convolution, batch normalisation and a leaky ReLU.

    Raises
    ------
    ValueError
        For a shape or a block that there is not.

    References
    ----------
    The encoder of XFactors, arXiv 2601.21688.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import ConvEncoder
    >>> ConvEncoder((1, 16, 24), 10, width=4)(torch.rand(2, 1, 16, 24)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        out_dim: int,
        *,
        width: int = 48,
        block: Literal["residual", "plain"] = "residual",
    ) -> None:
        height, breadth = _smallest(image_shape)
        super().__init__(
            ConvBlock(image_shape[0], width, stride=2, activation="leaky_relu"),
            _block(block, width),
            ConvBlock(width, 2 * width, stride=2, activation="leaky_relu"),
            _block(block, 2 * width),
            ConvBlock(2 * width, 4 * width, stride=2, activation="leaky_relu"),
            ConvBlock(4 * width, 4 * width, norm=False, activation="leaky_relu"),
            nn.Flatten(),
            nn.Linear(4 * width * height * breadth, out_dim),
        )


class ConvDecoder(nn.Module):
    """Vectors (b, in_dim) → images (b, c, h, w): the mirror of `ConvEncoder`.

    Parameters
    ----------
    in_dim
        Numbers that come in.
    image_shape, width, block
        As in `ConvEncoder`.
    resize
        Sides that are no multiples of 8 are made from the next larger ones, bilinearly; without it they are refused.
    unit_range
        Values in [0, 1], by a sigmoid; False: any values, as of standardised fields.

    Raises
    ------
    ValueError
        For sides that are no multiples of 8 without `resize`, and a shape or a block that there is not.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import ConvDecoder
    >>> ConvDecoder(10, (3, 28, 28), width=4, resize=True)(torch.randn(2, 10)).shape
    torch.Size([2, 3, 28, 28])
    """

    def __init__(
        self,
        in_dim: int,
        image_shape: tuple[int, int, int],
        *,
        width: int = 48,
        block: Literal["residual", "plain"] = "residual",
        resize: bool = False,
        unit_range: bool = True,
    ) -> None:
        super().__init__()
        self.unit_range = unit_range
        height, breadth = _smallest(image_shape)
        channels, *self.size = image_shape
        if not resize and any(side % 2**_HALVINGS for side in self.size):
            raise ValueError(f"image_shape: sides must be multiples of 8 without resize, got {tuple(self.size)}")
        self.layers = nn.Sequential(
            nn.Linear(in_dim, 4 * width * height * breadth),
            nn.Unflatten(1, (4 * width, height, breadth)),
            ConvBlock(4 * width, 4 * width, activation="leaky_relu"),
            ConvBlock(4 * width, 2 * width, stride=2, upwards=True, activation="leaky_relu"),
            _block(block, 2 * width),
            ConvBlock(2 * width, width, stride=2, upwards=True, activation="leaky_relu"),
            _block(block, width),
            ConvBlock(width, channels, stride=2, upwards=True, norm=False, activation="leaky_relu"),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b c h w"]:
        """Images."""
        images = self.layers(z)
        if list(images.shape[2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear", align_corners=False)
        return images.sigmoid() if self.unit_range else images
