"""Images to network inputs: colour, size, normalisation, with torch alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ImagePreprocessing:
    """Image(s) → float32 network input (3, h, w): resized and normalised.

    Images may be PIL images, uint8 or uint16 arrays (h, w), (h, w, 1|3|4), uint8 tensors (3, h, w), or floats in [0,
    1].

    Parameters
    ----------
    size
        Side length or (height, width), in pixels.
    mean, std
        Of pixel values in [0, 1], one number or three.
    resize
        "squash" to the size whatever the shape; "crop": short side to size / crop_fraction, then centre crop; "none"
        leaves the size. None is "crop" for a vector of the whole picture, but "squash" where patches are told apart
        (`FeatureGrid`, `SubspaceAD`), so that its border is seen too.
    crop_fraction
        In (0, 1].
    interpolation
        "bilinear" or "bicubic", both antialiased.

    Raises
    ------
    ValueError
        For values out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.models import ImagePreprocessing
    >>> white = np.full((4, 6, 3), 255, np.uint8)
    >>> prepared = ImagePreprocessing(8, mean=0.5, std=0.5, resize="squash")(white)
    >>> prepared.shape, prepared.unique()
    (torch.Size([3, 8, 8]), tensor([1.]))
    """

    size: int | tuple[int, int] = 224
    mean: float | tuple[float, float, float] = 0.5
    std: float | tuple[float, float, float] = 0.5
    resize: Literal["squash", "crop", "none"] | None = None
    crop_fraction: float = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.resize not in ("squash", "crop", "none", None):
            raise ValueError(f"resize: 'squash', 'crop', 'none' or None, got {self.resize!r}")
        if min(self.height_width) < 1:
            raise ValueError(f"size: at least 1 pixel, got {self.size}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction: in (0, 1], got {self.crop_fraction}")
        if not all(value > 0 for value in np.atleast_1d(self.std)):
            raise ValueError(f"std: positive, got {self.std}")

    @property
    def height_width(self) -> tuple[int, int]:
        """The size as (height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def whole(self) -> ImagePreprocessing:
        """The same with "squash" where `resize` is None: nothing of the image is cut away unless that was asked for."""
        return replace(self, resize="squash") if self.resize is None else self

    def __call__(self, image: Any) -> Float[Tensor, "3 h w"]:
        """One image, resized and normalised."""
        return self.normalize(self.resized(image_tensor(image)))

    def batch(self, images: Iterable[Any]) -> Float[Tensor, "b 3 h w"]:
        """Several images of any sizes, resized, normalised and stacked. Raises ValueError for none."""
        prepared = [self(image) for image in images]
        if not prepared:
            raise ValueError("images: at least one image is needed, got none")
        if len({image.shape for image in prepared}) > 1:
            raise ValueError("images: of several sizes, which cannot be stacked with resize='none'")
        return torch.stack(prepared)

    def resized(self, image: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h2 w2"]:
        """Resize (and crop) pixel values in [0, 1] without normalising them."""
        if self.resize == "none":
            return image
        height, width = self.height_width
        if self.resize == "squash":
            return self._interpolate(image, (height, width))
        short_height, short_width = round(height / self.crop_fraction), round(width / self.crop_fraction)
        scale = max(short_height / image.shape[-2], short_width / image.shape[-1])
        whole = self._interpolate(
            image,
            (max(height, round(image.shape[-2] * scale)), max(width, round(image.shape[-1] * scale))),
        )
        top, left = (whole.shape[-2] - height) // 2, (whole.shape[-1] - width) // 2
        return whole[..., top : top + height, left : left + width]

    def normalize(self, image: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
        """(image − mean) / std for pixel values in [0, 1]."""
        mean, std = self._channel(self.mean, image), self._channel(self.std, image)
        return (image - mean) / std

    def denormalize(self, image: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
        """Pixel values in [0, 1] from a normalised input."""
        return image * self._channel(self.std, image) + self._channel(self.mean, image)

    def _interpolate(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(image.shape[-2:]) == size:
            return image
        batch = image.reshape(-1, *image.shape[-3:])
        resized = F.interpolate(batch, size=size, mode=self.interpolation, align_corners=False, antialias=True)
        return resized.clamp(0, 1).reshape(*image.shape[:-2], *size)

    @staticmethod
    def _channel(values: float | Sequence[float], image: Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=image.dtype, device=image.device).reshape(-1, 1, 1)


def image_tensor(image: Any) -> Float[Tensor, "3 h w"]:
    """An image as float32 RGB in [0, 1]; grey is repeated, alpha is composited on white, 16 bit is scaled.

    Parameters
    ----------
    image
        A PIL image, an array (h, w) or (h, w, 1|3|4), or a tensor (h, w) or (1|3|4, h, w).

    Returns
    -------
    Tensor, (3, h, w)

    Raises
    ------
    TypeError
        For what is not an image.
    ValueError
        For a wrong shape, NaN or floats outside [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.models import image_tensor
    >>> image_tensor(np.array([[0, 255]], np.uint8)).tolist()
    [[[0.0, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]]]
    """
    if isinstance(image, Tensor):
        tensor = image if image.ndim == 3 else image[None] if image.ndim == 2 else None
    elif isinstance(image, np.ndarray):
        array = image if image.ndim == 3 else image[..., None] if image.ndim == 2 else None
        tensor = None if array is None else torch.from_numpy(_native(array)).movedim(-1, 0)
    elif hasattr(image, "convert") and hasattr(image, "mode"):
        tensor = torch.from_numpy(_native(_pil_array(image))).movedim(-1, 0)
    else:
        raise TypeError(f"image: a PIL image, an array or a tensor is needed, got {type(image).__name__}")
    if tensor is None or tensor.shape[0] not in (1, 3, 4) or 0 in tensor.shape:
        order = "(3, h, w)" if isinstance(image, Tensor) else "(h, w) or (h, w, 3)"
        raise ValueError(f"image: shape {order} is needed, got {tuple(image.shape)}")
    if tensor.is_floating_point():
        pixels = tensor.float()
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError("image: floating-point pixels must lie in [0, 1] (and be finite)")
    else:
        pixels = tensor.float() / _white(tensor.dtype)
    if pixels.shape[0] == 4:
        alpha = pixels[3:]
        pixels = pixels[:3] * alpha + (1 - alpha)
    return pixels.expand(3, -1, -1).contiguous()


def _white(dtype: torch.dtype) -> float:
    whites = {torch.bool: 1.0, torch.uint8: 255.0, torch.uint16: 65535.0, torch.int32: 65535.0}
    if dtype not in whites:
        raise ValueError(f"image: pixels of type uint8, uint16 or float are needed, got {dtype}")
    return whites[dtype]


def _native(array: np.ndarray) -> np.ndarray:
    """Contiguous, writable, native byte order: what torch.from_numpy takes."""
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _pil_array(image: Any) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode == "I":
        return np.asarray(image).astype(np.uint16)[..., None]
    if image.mode == "F":
        return np.asarray(image)[..., None]
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if transparent else "RGB"))
