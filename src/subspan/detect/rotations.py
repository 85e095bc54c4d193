"""Rotated views of a few normal images, so that a fit on them covers every orientation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class RandomRotations:
    """`count` copies of an image, each turned about its centre by an angle drawn uniformly from `degrees`.

    Parameters
    ----------
    count
        Copies of an image.
    degrees
        Lowest and highest angle.
    padding
        What comes into the corners: "reflect" (the image mirrored at its border) or "zeros" (black, as the authors'
        code has it, together with interpolation="nearest": black corners then count as normal).
    interpolation
        "bilinear" or "nearest".

    Raises
    ------
    ValueError
        For another setting.

    Examples
    --------
    >>> import torch
    >>> from subspan.detect import RandomRotations
    >>> views = list(RandomRotations(2).views(torch.rand(3, 8, 8), torch.Generator().manual_seed(0)))
    >>> len(views), tuple(views[0].shape)
    (2, (3, 8, 8))
    """

    count: int = 30
    degrees: tuple[int | float, int | float] = (0.0, 345.0)
    padding: Literal["reflect", "zeros"] = "reflect"
    interpolation: Literal["bilinear", "nearest"] = "bilinear"

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count: 0 or more rotations, got {self.count}")
        if self.padding not in ("reflect", "zeros"):
            raise ValueError(f"padding: 'reflect' or 'zeros', got {self.padding!r}")
        if self.interpolation not in ("bilinear", "nearest"):
            raise ValueError(f"interpolation: 'bilinear' or 'nearest', got {self.interpolation!r}")
        if not self.degrees[0] <= self.degrees[1]:
            raise ValueError(f"degrees: (low, high), got {self.degrees}")

    def views(
        self, image: Float[Tensor, "c h w"], generator: torch.Generator | None = None
    ) -> Iterator[Float[Tensor, "c h w"]]:
        """The rotated copies, one after another."""
        low, high = self.degrees
        for _ in range(self.count):
            angle = low + (high - low) * float(torch.rand((), generator=generator))
            yield rotate(image, angle, padding=self.padding, interpolation=self.interpolation)


def rotate(
    image: Float[Tensor, "c h w"],
    degrees: int | float,
    *,
    padding: Literal["reflect", "zeros"] = "reflect",
    interpolation: Literal["bilinear", "nearest"] = "bilinear",
) -> Float[Tensor, "c h w"]:
    """The image turned counter-clockwise about its centre, same size."""
    height, width = image.shape[-2:]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Where each output pixel comes from, in units of half the width and half the height.
    source = image.new_tensor([[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]])
    grid = F.affine_grid(source[None], [1, image.shape[0], height, width], align_corners=False)
    mode = "reflection" if padding == "reflect" else "zeros"
    turned = F.grid_sample(image[None], grid, mode=interpolation, padding_mode=mode, align_corners=False)
    # Interpolation weights add up to 1 only to rounding.
    return turned[0].clamp(image.amin(), image.amax()) if padding == "reflect" else turned[0]
