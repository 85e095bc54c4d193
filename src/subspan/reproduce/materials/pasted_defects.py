"""Photographs of textures with defects pasted into them, and masks of where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from subspan.detect.rotations import rotate
from subspan.models import image_tensor

CROP, QUADRANT = 128, 256
# So many crops of each kind are turned, too.
_TURNED = 20


@dataclass(frozen=True)
class Scene:
    """A reference image, and test crops with their masks: upright, and turned by random angles."""

    reference: Float[Tensor, "3 h w"]
    crops: list[Tensor]
    masks: list[np.ndarray]
    turned: list[Tensor]
    turned_masks: list[np.ndarray]

    @property
    def labels(self) -> Bool[np.ndarray, " n"]:
        """Which crops have a defect."""
        return np.array([mask.any() for mask in self.masks])


def pasted_defects(textures: dict[str, np.ndarray], name: str, *, per_kind: int, seed: int) -> Scene:
    """One quadrant of a photograph as reference; normal and defective crops of the other three.

    Defects in turn: a patch of another texture, a scratch, a blot, a blurred spot; masks are where pixels were changed.
    """
    rng = np.random.default_rng([seed, list(textures).index(name)])
    quadrants = [textures[name][y : y + QUADRANT, x : x + QUADRANT] for y in (0, 256) for x in (0, 256)]
    reference = quadrants.pop(int(rng.integers(4)))
    others = [texture for other, texture in textures.items() if other != name]
    crops, masks, turned, turned_masks = [], [], [], []
    for index in range(2 * per_kind):
        whole = quadrants[int(rng.integers(3))].astype(np.float64)
        mask = np.zeros_like(whole, dtype=bool)
        if index >= per_kind:
            # Near the middle, so that it stays in view when the crop is turned.
            centre = rng.integers(QUADRANT // 2 - 40, QUADRANT // 2 + 40, 2)
            whole, mask = DEFECTS[index % len(DEFECTS)](whole, centre, rng, others)
        else:
            centre = rng.integers(CROP // 2, QUADRANT - CROP // 2, 2)
        # Anywhere in the crop, but 16 pixels from its border at least.
        top, left = np.clip(centre - rng.integers(16, CROP - 16, 2), 0, QUADRANT - CROP)
        window = np.s_[top : top + CROP, left : left + CROP]
        image = image_tensor(whole.round().clip(0, 255).astype(np.uint8))
        crops.append(image[:, window[0], window[1]])
        masks.append(mask[window])
        angle = float(rng.uniform(0, 360))
        inner = np.s_[64 : 64 + CROP]
        turned.append(rotate(image, angle)[:, inner, inner])
        turned_mask = rotate(torch.from_numpy(mask[None].astype(np.float32)), angle, padding="zeros")[0]
        turned_masks.append(turned_mask.numpy()[inner, inner] > 0.5)
    kept = [*range(min(_TURNED, per_kind)), *range(per_kind, per_kind + min(_TURNED, per_kind))]
    turned, turned_masks = [turned[index] for index in kept], [turned_masks[index] for index in kept]
    return Scene(image_tensor(reference), crops, masks, turned, turned_masks)


Changed = tuple[np.ndarray, np.ndarray]
"""The picture, and where it was changed."""


def _pasted_patch(image: np.ndarray, centre: np.ndarray, rng: np.random.Generator, others: Sequence) -> Changed:
    half = int(rng.integers(8, 17))
    source = others[int(rng.integers(len(others)))]
    y, x = rng.integers(0, source.shape[0] - 2 * half, 2)
    patch = source[y : y + 2 * half, x : x + 2 * half].astype(np.float64)
    box = np.s_[centre[0] - half : centre[0] + half, centre[1] - half : centre[1] + half]
    # Brightness is matched, so that only the texture tells.
    changed, mask = image.copy(), np.zeros_like(image, dtype=bool)
    changed[box], mask[box] = patch - patch.mean() + image[box].mean(), True
    return changed, mask


def _scratch(image: np.ndarray, centre: np.ndarray, rng: np.random.Generator, others: Sequence) -> Changed:
    angle, length, width = rng.uniform(0, np.pi), rng.uniform(16, 32), rng.uniform(1.5, 3)
    y, x = np.indices(image.shape) - centre[:, None, None]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    mask = (np.abs(along) < length) & (np.abs(across) < width)
    changed = image.copy()
    changed[mask] = rng.choice([30.0, 225.0])
    return changed, mask


def _blot(image: np.ndarray, centre: np.ndarray, rng: np.random.Generator, others: Sequence) -> Changed:
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape), 4)
    y, x = np.indices(image.shape) - centre[:, None, None]
    radius = rng.uniform(8, 16)
    mask = np.hypot(y, x) < radius * (1 + 1.5 * noise / noise.std() * 0.2)
    changed = image.copy()
    changed[mask] = 0.25 * changed[mask] + 0.75 * rng.choice([40.0, 215.0])
    return changed, mask


def _blurred_spot(image: np.ndarray, centre: np.ndarray, rng: np.random.Generator, others: Sequence) -> Changed:
    y, x = np.indices(image.shape) - centre[:, None, None]
    mask = np.hypot(y, x) < rng.uniform(10, 18)
    return np.where(mask, ndimage.gaussian_filter(image, 4), image), mask


DEFECTS: tuple[Callable[..., Changed], ...] = (_pasted_patch, _scratch, _blot, _blurred_spot)
