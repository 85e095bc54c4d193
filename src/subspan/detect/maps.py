"""From patch scores to a pixel map and one score an image: upsampling, smoothing, aggregation, windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def gaussian_blur(
    maps: Float[Tensor, "b h w"], sigma: int | float, *, radius: int | None = None
) -> Float[Tensor, "b h w"]:
    """Gaussian smoothing with standard deviation `sigma` (pixels), kernel radius ceil(3 sigma), mirrored borders."""
    radius = math.ceil(3 * sigma) if radius is None else radius
    # A mirrored border can be no wider than the map.
    radius = min(radius, maps.shape[-2] - 1, maps.shape[-1] - 1)
    if sigma <= 0 or radius < 1:
        return maps
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).reshape(1, 1, 1, -1)
    padded = F.pad(maps[:, None], (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel), kernel.mT)[:, 0]


def smooth(maps: Float[Tensor, "b h w"], blur: int | float | str) -> Float[Tensor, "b h w"]:
    """Smoothing by a standard deviation in pixels, or "official": the authors' 3 × 3 kernel with sigma 4."""
    if isinstance(blur, str):
        if blur != "official":
            raise ValueError(f"blur: pixels, or 'official', got {blur!r}")
        return gaussian_blur(maps, 4.0, radius=1)
    return gaussian_blur(maps, blur)


def upsample(scores: Float[Tensor, "b h w"], size: tuple[int, int]) -> Float[Tensor, "b height width"]:
    """Patch scores as pixel maps of `size` (height, width), bilinear."""
    return F.interpolate(scores[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def tail_mean(scores: Float[Tensor, "*b n"], fraction: int | float = 0.01) -> Float[Tensor, "*b"]:
    """Mean of the largest `fraction` of the scores, at least one: max(1, int(fraction * n)) of them.

    Parameters
    ----------
    scores
        (*b, n).
    fraction
        In (0, 1].

    Returns
    -------
    Tensor, (*b).

    Raises
    ------
    ValueError
        For another fraction.

    Examples
    --------
    >>> import torch
    >>> from subspan.detect import tail_mean
    >>> tail_mean(torch.tensor([1.0, 5.0, 2.0, 7.0]), 0.5).item()
    6.0
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"tail: a fraction in (0, 1], got {fraction}")
    return scores.topk(max(1, int(fraction * scores.shape[-1])), dim=-1).values.mean(-1)


def aggregate(scores: Float[Tensor, "*b n"], how: str = "tail", *, tail: int | float = 0.01) -> Float[Tensor, "*b"]:
    """One score an image from its patch or pixel scores: "tail" mean, "max", "mean", "p99" or mean of the "top5"."""
    if how == "tail":
        return tail_mean(scores, tail)
    if how == "max":
        return scores.amax(-1)
    if how == "mean":
        return scores.mean(-1)
    if how == "p99":
        # Sorted rather than torch.quantile, which takes no more than 2^24 values.
        ordered = scores.sort(-1).values
        position = 0.99 * (scores.shape[-1] - 1)
        below = int(position)
        above = min(below + 1, scores.shape[-1] - 1)
        return torch.lerp(ordered[..., below], ordered[..., above], position - below)
    if how == "top5":
        return scores.topk(min(5, scores.shape[-1]), dim=-1).values.mean(-1)
    raise ValueError(f"image_score: 'tail', 'max', 'mean', 'p99' or 'top5', got {how!r}")


def window_boxes(height: int, width: int, size: int, overlap: int | float = 0.0) -> list[tuple[int, int, int, int]]:
    """Boxes (top, left, bottom, right) of windows that cover an image; those at an edge are moved inward, not cut.

    overlap: share of a window that its neighbour covers too, in [0, 1). An image smaller than a window is one window.
    """
    if size < 1:
        raise ValueError(f"window: at least 1 pixel, got {size}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: in [0, 1), got {overlap}")
    stride = max(1, int(size * (1 - overlap)))

    def starts(length: int) -> list[int]:
        return sorted({max(0, min(start, length - size)) for start in range(0, length, stride)})

    return [
        (top, left, min(top + size, height), min(left + size, width))
        for top in starts(height)
        for left in starts(width)
    ]


def stitch(
    maps: Sequence[Float[Tensor, "_h _w"]], boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int]
) -> Float[Tensor, "height width"]:
    """One map of `size` from the maps of windows, averaged where they overlap."""
    total, count = maps[0].new_zeros(size), maps[0].new_zeros(size)
    for window, (top, left, bottom, right) in zip(maps, boxes):
        total[top:bottom, left:right] += window
        count[top:bottom, left:right] += 1
    return total / count.clamp_min(1)
