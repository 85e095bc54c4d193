"""Grids of patch features from vision networks, convolutional or token based."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.modules import evaluation

from .capture import Capture
from .layers import Layers, layer_names
from .layout import Layout, channels_last
from .preprocessing import ImagePreprocessing

Aggregate = Literal["mean", "concat", "group"]


class FeatureGrid:
    """Images → patch features (b, h, w, d) of some layers of a frozen vision network.

    The forward pass ends after the last of the layers. Coarser maps are upsampled (bilinear) to the finest one.
    Features are float32 on the model's device; no gradients, evaluation mode. A call takes images or a batch (b, 3, h,
    w) that is already prepared.

    Parameters
    ----------
    model
        Any torch module.
    layers
        As in `layer_names`.
    aggregate
        "mean": mean over the layers of equal width, the widths concatenated (SubspaceAD, 2026, for tokens of one width:
        the plain mean). "concat": all layers concatenated. "group": mean inside each of `groups`, the groups
        concatenated.
    groups
        Lists of layers, with "group".
    preprocessing
        None: `ImagePreprocessing()`. Where its `resize` is None, the whole image is squashed to the size.
    drop_tokens
        Leading tokens that are no patches (CLS, registers); None infers it from the patch size, else from the largest
        square grid.
    layout
        As in `iterate_representations`.
    forward
        `forward(model, batch)`, how to call the model otherwise.

    Raises
    ------
    ValueError
        For another aggregate, groups without "group", and groups of layers that are not asked for.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from subspan.models import FeatureGrid, ImagePreprocessing
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.ReLU())
    >>> features = FeatureGrid(model, "1", preprocessing=ImagePreprocessing(16))
    >>> features([np.zeros((20, 30), np.uint8)] * 2).shape
    torch.Size([2, 4, 4, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        *,
        aggregate: Aggregate = "mean",
        groups: Sequence[Layers] | None = None,
        preprocessing: ImagePreprocessing | None = None,
        drop_tokens: int | None = None,
        layout: Layout = "auto",
        forward: Callable[[nn.Module, Any], object] | None = None,
    ) -> None:
        if aggregate not in ("mean", "concat", "group"):
            raise ValueError(f"aggregate: 'mean', 'concat' or 'group', got {aggregate!r}")
        if (groups is not None) != (aggregate == "group"):
            raise ValueError("groups: needed with aggregate='group', and only there")
        self.model = model
        self.aggregate = aggregate
        self.groups = [layer_names(model, group) for group in groups] if groups is not None else None
        named = layer_names(model, layers)
        self.layers = list(dict.fromkeys(name for group in self.groups for name in group)) if self.groups else named
        if set(self.layers) - set(named):
            raise ValueError(f"groups: {sorted(set(self.layers) - set(named))} are not among the layers")
        self.preprocessing = (preprocessing or ImagePreprocessing()).whole()
        self.drop_tokens = drop_tokens
        self.layout: Layout = layout
        self.forward = forward

    def __call__(self, images: Iterable[Any]) -> Float[Tensor, "b h w d"]:
        """Features of images (whatever `ImagePreprocessing` takes), or of a batch (b, 3, h, w) already prepared."""
        prepared = images if isinstance(images, Tensor) and images.ndim == 4 else self.preprocessing.batch(images)
        with torch.no_grad(), evaluation(self.model), Capture(self.model, self.layers) as states:
            states.run(prepared, forward=self.forward)
            found = {name: states.by_sample(name, self.layout) for name in self.layers}
            maps = {name: self._map(value, prepared.shape[-2:]).float() for name, value in found.items()}
        return self._aggregated(maps).movedim(1, -1).contiguous()

    def iterate(self, images: Iterable[Any], batch_size: int = 16) -> Iterator[Float[Tensor, "b h w d"]]:
        """Features of a stream of images, batch after batch."""
        stream = iter(images)
        while batch := list(islice(stream, batch_size)):
            yield self(batch)

    def rows(self, images: Iterable[Any], batch_size: int = 16) -> Iterator[Float[Tensor, "n d"]]:
        """The same as rows, one a patch: what a fit over patches takes."""
        for grid in self.iterate(images, batch_size):
            yield grid.flatten(0, 2)

    def _map(self, states: Tensor, size: Sequence[int]) -> Tensor:
        """States of one layer as a map (b, d, h, w)."""
        if states.ndim == 4:
            return channels_last(states, self.layout).movedim(-1, 1)
        if states.ndim != 3:
            raise ValueError(f"layers: tokens (b, t, d) or a map (b, d, h, w) are needed, got {tuple(states.shape)}")
        height, width, drop = token_grid(self.model, states.shape[1], size, self.drop_tokens)
        return states[:, drop:].movedim(1, -1).unflatten(-1, (height, width))

    def _aggregated(self, maps: dict[str, Tensor]) -> Tensor:
        if self.groups is not None:
            members = [[maps[name] for name in group] for group in self.groups]
        elif self.aggregate == "concat":
            members = [[value] for value in maps.values()]
        else:
            widths = dict.fromkeys(value.shape[1] for value in maps.values())
            members = [[value for value in maps.values() if value.shape[1] == width] for width in widths]
        finest = max((value.shape[-2:] for value in maps.values()), key=math.prod)
        means = [torch.stack([_resized(value, finest) for value in group]).mean(0) for group in members]
        return torch.cat(means, dim=1)


def token_grid(
    model: nn.Module, n_tokens: int, size: Sequence[int], drop_tokens: int | None = None
) -> tuple[int, int, int]:
    """Grid of a token model: rows, columns, and leading tokens to drop.

    Parameters
    ----------
    model
        Its patch size is read where transformers' configuration or timm's patch embedding states it.
    n_tokens
        Tokens of an image.
    size
        (height, width) of the input, in pixels.
    drop_tokens
        Leading tokens that are no patches; None infers it.

    Returns
    -------
    (rows, columns, leading tokens to drop)

    Raises
    ------
    ValueError
        Where the tokens do not make a grid.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import token_grid
    >>> token_grid(torch.nn.Identity(), 50, (224, 224))
    (7, 7, 1)
    """
    patch = _patch_size(model)
    if patch is not None:
        height, width = size[-2] // patch[0], size[-1] // patch[1]
        drop = n_tokens - height * width if drop_tokens is None else drop_tokens
    else:
        patches = n_tokens if drop_tokens is None else n_tokens - drop_tokens
        aspect = size[-2] / size[-1]
        height = max(1, math.floor(math.sqrt(max(patches, 1) * aspect) + 1e-9))
        width = max(1, round(height / aspect))
        drop = n_tokens - height * width
    if drop < 0 or height * width + drop != n_tokens or (drop_tokens is not None and drop != drop_tokens):
        raise ValueError(
            f"drop_tokens: {n_tokens} tokens do not make a grid for a {size[-2]}×{size[-1]} input"
            f" ({height}×{width} patches and {n_tokens - height * width} others); give drop_tokens"
        )
    return height, width, drop


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Patch size in pixels as transformers' configuration or timm's patch embedding states it."""
    for holder in (getattr(model, "config", None), getattr(model, "patch_embed", None)):
        size = getattr(holder, "patch_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, tuple | list) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def _resized(value: Tensor, size: torch.Size) -> Tensor:
    if value.shape[-2:] == size:
        return value
    return F.interpolate(value, size=list(size), mode="bilinear", align_corners=False)
