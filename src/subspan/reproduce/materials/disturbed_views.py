"""Features of random views of disturbed pictures (Hendrycks & Dietterich, 2019), kept in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from subspan.base import save_arrays, saved_object
from subspan.datasets import fingerprint, load
from subspan.datasets.cache import entry_folder, whole_folder
from subspan.edit import gaussian_blur
from subspan.models import ImageEncoder, image_tensor
from subspan.models.views import random_views

from .image_features import image_encoder, labelled_images
from .shared_space import DIGIT_NAMES

SHIFTS = ("noise", "contrast", "pixelate", "blur")

# Strengths at severity 3, 4, 5: CIFAR-10-C for small pictures, ImageNet-C for large.
_SMALL = {
    "noise": (0.08, 0.09, 0.10),
    "contrast": (0.4, 0.3, 0.15),
    "pixelate": (0.85, 0.75, 0.65),
    "blur": (0.7, 0.8, 1.0),
}
_LARGE = {
    "noise": (0.18, 0.26, 0.38),
    "contrast": (0.2, 0.1, 0.05),
    "pixelate": (0.4, 0.3, 0.25),
    "blur": (3.0, 4.0, 6.0),
}


@dataclass(frozen=True)
class Views:
    """Pooled features of the views of some pictures (b, n, d), the original first, with the pictures' classes (b,)."""

    features: Float[Tensor, "b n d"]
    labels: Int[Tensor, " b"]


@dataclass(frozen=True)
class Draw:
    """Which pictures, how disturbed, and how they are seen; all that the features depend on."""

    source: str
    split: str
    shift: str
    images: int
    views: int
    seed: int
    size: int = 128
    crop_scale: tuple[float, float] = (0.08, 1.0)


def corrupt(image: Float[Tensor, "3 h w"], shift: str, severity: int, generator: torch.Generator) -> Tensor:
    """A picture in [0, 1] under one of SHIFTS at severity 3, 4 or 5; "clean" leaves it as it is."""
    if shift == "clean":
        return image
    strength = (_SMALL if min(image.shape[1:]) < 64 else _LARGE)[shift][severity - 3]
    if shift == "noise":
        changed = image + strength * torch.randn(image.shape, generator=generator)
    elif shift == "contrast":
        mean = image.mean((1, 2), keepdim=True)
        changed = (image - mean) * strength + mean
    elif shift == "pixelate":
        height, width = image.shape[-2:]
        small = F.interpolate(image[None], size=(int(height * strength), int(width * strength)), mode="area")
        changed = F.interpolate(small, size=(height, width), mode="nearest")[0]
    else:
        changed = gaussian_blur(image[None], sigma=strength)[0]
    return changed.clamp(0, 1)


def named_pictures(source: str, split: str) -> tuple[Any, Tensor, list[str]]:
    """Pictures, their classes, and the class names; "imagenet1k_sample" has one picture a class and no splits."""
    if source == "imagenet1k_sample":
        data = load(source)
        names = [f"{', '.join(record['synonyms'])}: {record['gloss']}" for record in data.records]
        return data.images, torch.arange(len(names)), names
    data = labelled_images(source)
    rows = getattr(data, split)
    names = list(DIGIT_NAMES) if source == "digits" else [name.replace("_", " ") for name in data.classes]
    return data.images[rows], torch.from_numpy(data.labels[rows]).long(), names


def drawn_views(draw: Draw, progress: Callable[[float], None] = lambda fraction: None) -> Views:
    """Features of the views of a stratified draw of pictures, from the cache where they are there."""
    folder = entry_folder("sts-views", fingerprint(draw))
    with whole_folder(folder) as unfinished:
        if unfinished is not None:
            save_arrays(unfinished / "views.safetensors", "views", _encode(draw, progress), **asdict(draw))
    schema = {"features": Float[Tensor, "n v d"], "labels": Int[Tensor, " n"]}
    with saved_object(folder / "views.safetensors", "views", schema, get_type_hints(Draw)) as (arrays, _):
        return Views(arrays["features"], arrays["labels"])


def _encode(draw: Draw, progress: Callable[[float], None]) -> dict[str, Tensor]:
    images, y, names = named_pictures(draw.source, draw.split)
    # The same seed gives every shift other pictures, so that the union over shifts is as varied as it is large.
    place = ("clean", *SHIFTS).index(draw.shift)
    generator = torch.Generator().manual_seed(1000 * draw.seed + place)
    order = torch.randperm(len(y), generator=generator)
    each = -(-draw.images // len(names))
    chosen = torch.cat([order[y[order] == label][:each] for label in range(len(names))])
    chosen = chosen[torch.randperm(len(chosen), generator=generator)][: draw.images]
    whole = image_encoder(draw.size)
    preprocessing: Any = whole.preprocessing
    whole.model.to(memory_format=torch.channels_last)
    encoder = ImageEncoder(whole.model, lambda view: view, forward=whole.forward)
    features = []
    for number, index in enumerate(chosen.tolist()):
        image = corrupt(image_tensor(images[index]), draw.shift, 3 + number % 3, generator)
        views = random_views(image, draw.views, preprocessing, scale=draw.crop_scale, generator=generator)
        # Small batches stay in the cache of the processor, which is three times faster here.
        views = views.contiguous(memory_format=torch.channels_last)
        features.append(torch.from_numpy(encoder.encode(views, 16)).half())
        progress((number + 1) / len(chosen))
    return {"features": torch.stack(features), "labels": y[chosen]}
