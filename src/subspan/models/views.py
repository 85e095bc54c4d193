"""Random views of one image, for test-time augmentation and view-based learning."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .preprocessing import ImagePreprocessing

_ATTEMPTS = 10


def random_views(
    image: Float[Tensor, "3 h w"],
    count: int,
    preprocessing: ImagePreprocessing,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n 3 h2 w2"]:
    """The image as `preprocessing` gives it, followed by count - 1 random resized crops, some of them mirrored.

    image: pixel values in [0, 1]; scale, ratio: area share and aspect ratio of the crops; flip: chance of a mirror
    image. Crops are drawn as in Szegedy et al. (2015): ten tries to fit, else the largest centre crop.
    """
    if count < 1:
        raise ValueError(f"count: at least 1 view is needed, got {count}")
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0 < low <= high:
            raise ValueError(f"{name}: needs 0 < low <= high, got {(low, high)}")
    size = preprocessing.height_width
    # All numbers at once, so that the stream does not depend on how many tries a crop takes.
    draws = torch.rand(count - 1, _ATTEMPTS, 4, generator=generator, dtype=torch.float64)
    mirrored = torch.rand(count - 1, generator=generator, dtype=torch.float64) < flip
    views = [preprocessing.resized(image)]
    for draw, mirror in zip(draws.tolist(), mirrored.tolist()):
        top, left, height, width = _crop_box(image.shape[-2], image.shape[-1], draw, scale, ratio)
        crop = image[None, :, top : top + height, left : left + width]
        view = F.interpolate(crop, size=size, mode=preprocessing.interpolation, align_corners=False, antialias=True)[0]
        views.append((view.flip(-1) if mirror else view).clamp(0, 1))
    return preprocessing.normalize(torch.stack(views))


def _crop_box(
    height: int, width: int, draws: list[list[float]], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    for area_draw, ratio_draw, top_draw, left_draw in draws:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * ratio_draw)
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - h) // 2, (width - w) // 2, h, w
