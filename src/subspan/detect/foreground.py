"""Which patches show the object: background masks, and the confidence that a pixel is no specular highlight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.modules import evaluation
from subspan.geometry import Subspace
from subspan.models import ImagePreprocessing
from subspan.models.capture import to_device_of

from .maps import gaussian_blur


@dataclass(frozen=True)
class NormalityForeground:
    """Foreground by the first principal component of each image's own patches.

    A patch is foreground where its component exceeds `threshold`; then 3 × 3 dilation and closing. Call with the images
    (not looked at) and their features (b, h, w, d).

    Parameters
    ----------
    threshold
        On the component, in the unit of the features.
    minimum
        The component's sign is flipped when no more than this share of the central window would be foreground.
    border
        Share cut off each side for the central window.

    References
    ----------
    AnomalyDINO, 2025.

    Examples
    --------
    >>> import torch
    >>> from subspan.detect import NormalityForeground
    >>> features = torch.zeros(1, 10, 10, 4)
    >>> features[:, 3:7, 3:7] = 20.0
    >>> mask = NormalityForeground(minimum=0.3)([], features)
    >>> bool(mask[0, 3:7, 3:7].all()), bool(mask[0, 0].any())
    (True, False)
    """

    threshold: int | float = 10.0
    minimum: int | float = 0.35
    border: int | float = 0.2

    def __call__(self, images: Sequence[Tensor], features: Float[Tensor, "b h w d"]) -> Bool[Tensor, "b h w"]:
        """Foreground patches of each image."""
        return torch.stack([self._foreground(grid) for grid in features])

    def _foreground(self, grid: Float[Tensor, "h w d"]) -> Bool[Tensor, "h w"]:
        height, width = grid.shape[:2]
        component = Subspace.fit(grid.flatten(0, 1), rank=1).coordinates(grid.flatten(0, 1)).reshape(height, width)
        rows = slice(int(height * self.border), int(height * (1 - self.border)))
        columns = slice(int(width * self.border), int(width * (1 - self.border)))
        mask = component > self.threshold
        centre = mask[rows, columns]
        if centre.sum() <= self.minimum * centre.numel():
            mask = -component > self.threshold
        dilated = _dilate(mask[None, None].float())
        return _erode(_dilate(dilated))[0, 0] > 0.5


@dataclass(frozen=True)
class AttentionForeground:
    """Foreground by the attention that register tokens (CLS where there are none) pay to each patch in one layer.

    Averaged over heads and registers. Costs a second forward pass.

    Parameters
    ----------
    model
        A transformers vision transformer with attn_implementation="eager".
    preprocessing
        What the model's images go through.
    layer
        Index of the block whose attention is taken.
    threshold
        "percentile": background is what lies under the `percentile` share of the image's patches; or "otsu", Otsu's
        threshold.
    percentile
        A share in [0, 1).

    Raises
    ------
    ValueError
        For another threshold or share; on call for a model without attention weights, another grid or block.

    Examples
    --------
    >>> from subspan.detect import AttentionForeground, SubspaceAD
    >>> foreground = AttentionForeground(vit, preprocessing, layer=6)  # doctest: +SKIP
    >>> detector = SubspaceAD(vit, [-3, -2], mask=foreground)  # doctest: +SKIP
    """

    model: nn.Module
    preprocessing: ImagePreprocessing
    layer: int = 6
    threshold: Literal["percentile", "otsu"] = "percentile"
    percentile: int | float = 0.15

    def __post_init__(self) -> None:
        if self.threshold not in ("percentile", "otsu"):
            raise ValueError(f"threshold: 'percentile' or 'otsu', got {self.threshold!r}")
        if not 0 <= self.percentile < 1:
            raise ValueError(f"percentile: a share in [0, 1), got {self.percentile}")

    def __call__(self, images: Sequence[Tensor], features: Float[Tensor, "b h w d"]) -> Bool[Tensor, "b h w"]:
        """Foreground patches of each image."""
        saliency = self.saliency(images, (features.shape[1], features.shape[2]))
        if self.threshold == "percentile":
            limit = saliency.flatten(1).quantile(self.percentile, dim=1)
            return saliency >= limit[:, None, None]
        return torch.stack([one > otsu_threshold(one) for one in saliency])

    def saliency(self, images: Sequence[Tensor], grid: tuple[int, int]) -> Float[Tensor, "b h w"]:
        """Mean attention to each patch."""
        pixels = to_device_of(self.model, self.preprocessing.whole().batch(images))
        with torch.no_grad(), evaluation(self.model):
            attentions = getattr(self.model(pixel_values=pixels, output_attentions=True), "attentions", None)
        if not attentions or attentions[0] is None:
            raise ValueError("mask: the model gives no attention weights; load it with attn_implementation='eager'")
        if not -len(attentions) <= self.layer < len(attentions):
            raise ValueError(f"layer: index {self.layer} is out of range, the model has {len(attentions)} blocks")
        attention = attentions[self.layer]
        first_patch = attention.shape[-1] - grid[0] * grid[1]
        if first_patch < 1:
            raise ValueError(f"mask: {attention.shape[-1]} tokens are no CLS token and a {grid[0]}×{grid[1]} grid")
        observers = slice(1, first_patch) if first_patch > 1 else slice(0, 1)
        return attention[:, :, observers, first_patch:].float().mean(dim=(1, 2)).unflatten(-1, grid)


def otsu_threshold(values: Tensor, bins: int = 256) -> float:
    """Threshold with the largest variance between the two sides of a histogram (Otsu, 1979)."""
    counts, edges = np.histogram(values.detach().cpu().double().numpy(), bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    above = total - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1 + int(np.nanargmax(between[:-1]))])


def specular_confidence(image: Float[Tensor, "3 h w"]) -> Float[Tensor, "h w"]:
    """1 - how much each pixel of an RGB image in [0, 1] looks like a specular highlight, as the authors' code has it.

    Bright (luminance), colourless (saturation), curved (Laplacian of a Gaussian) and clipped pixels look like one.
    """
    linear = image.clamp(1e-6, 1.0) ** 2.2
    luminance = (linear * linear.new_tensor([0.2126, 0.7152, 0.0722]).reshape(3, 1, 1)).sum(0)
    highest, lowest = image.amax(0), image.amin(0)
    saturation = (highest - lowest) / (highest + 1e-8)
    laplace = torch.ones(3, 3, dtype=image.dtype, device=image.device)
    laplace[1, 1] = -8.0
    padded = F.pad(gaussian_blur(luminance[None], 1.0, radius=1)[None], (1, 1, 1, 1), mode="reflect")
    curvature = F.conv2d(padded, laplace[None, None] / 16)[0, 0]
    ordered = curvature.flatten().sort().values
    scale = ordered[int(0.95 * (len(ordered) - 1))] + 1e-6
    highlight = (
        0.5 * torch.sigmoid(15.0 * (luminance - 0.85))
        + 0.3 * torch.sigmoid(10.0 * (0.25 - saturation))
        + 0.2 * torch.sigmoid(4.0 * (curvature - scale) / scale)
        + 0.3 * (highest > 0.985)
    )
    return 1.0 - highlight.clamp(0.0, 1.0)


def suppress_specular(
    anomaly_map: Float[Tensor, "h w"], confidence: Float[Tensor, "h w"], *, sigma: int | float = 5.0
) -> Float[Tensor, "h w"]:
    """Damp scores on highlights, the less the more their surroundings without highlights are anomalous too."""
    radius = int(sigma * 4 + 0.5)
    around = gaussian_blur((anomaly_map * confidence)[None], sigma, radius=radius)[0]
    around = around / (gaussian_blur(confidence[None], sigma, radius=radius)[0] + 1e-6)
    context = (around / (anomaly_map + 1e-6)).clamp(0.0, 1.0)
    return anomaly_map * torch.lerp(confidence, torch.ones_like(confidence), context)


def _dilate(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask, 3, stride=1, padding=1)


def _erode(mask: Tensor) -> Tensor:
    return -F.max_pool2d(-mask, 3, stride=1, padding=1)


def foreground_mask(mask: Any, backbone: Any) -> Any:
    """What `mask=` of `SubspaceAD` stands for: None, "normality", "attention" (of a `FeatureGrid`), or a callable."""
    if mask is None or callable(mask):
        return mask
    if mask == "normality":
        return NormalityForeground()
    if mask == "attention":
        model, preprocessing = getattr(backbone, "model", None), getattr(backbone, "preprocessing", None)
        if model is None or preprocessing is None:
            raise ValueError("mask: 'attention' needs a transformer as backbone; give an AttentionForeground instead")
        return AttentionForeground(model, preprocessing)
    raise ValueError(f"mask: None, 'normality', 'attention' or a callable, got {mask!r}")
