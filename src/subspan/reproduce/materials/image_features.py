"""Pooled features of pictures by the installed vision networks, kept in the cache folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from subspan.base.modules import evaluation
from subspan.datasets import cached_features, image_preprocessing, is_available, load, load_model
from subspan.models import ImageEncoder, ImagePreprocessing


def image_encoder(size: int, model: str = "efficientnet-lite0") -> ImageEncoder:
    """An installed network up to its pooled features (n, 1280), for images prepared at `size` pixels."""
    # The whole short side is kept: small pictures have no margin to cut away.
    options = {**image_preprocessing(model), "size": size, "crop_fraction": 1.0}
    return ImageEncoder(load_model(model), ImagePreprocessing(**options), forward=_pooled)


def _pooled(model: Any, batch: Tensor) -> Tensor:
    return model.extract_features(batch).mean((2, 3))


def pooled_features(images: Any, encoder: ImageEncoder, size: int) -> Float[Tensor, "n p"]:
    """Features of images, from the cache where they were computed before."""
    found = cached_features(
        lambda start: encoder.iterate(images[start:]),
        model=encoder.model,
        data=images,
        options={"output": "mean of the last feature map", "size": size, "crop_fraction": 1.0},
    )
    return torch.from_numpy(np.array(found))


def cached_maps(
    model: Any,
    prepare: ImagePreprocessing,
    maps: Callable[[Tensor], Sequence[Tensor]],
    images: Any,
    *,
    batch: int,
    about: dict[str, Any],
) -> list[Tensor]:
    """Maps (n, d, h, w) that a function makes of prepared batches of images, in half precision, from the cache.

    about: what they depend on beside the model, the images and their size.
    """

    def compute(start: int) -> Iterator[Tensor]:
        for first in range(start, len(images), batch):
            prepared = prepare.batch(images[row] for row in range(first, min(first + batch, len(images))))
            yield torch.cat([each.flatten(1) for each in maps(prepared)], 1).half()

    options = {**about, "size": prepare.size, "dtype": "float16"}
    with torch.no_grad(), evaluation(model):
        rows = cached_features(compute, model=model, data=images, options=options)
        shapes = [each.shape[1:] for each in maps(torch.zeros(1, 3, *prepare.height_width))]
    parts = torch.from_numpy(np.array(rows)).split([shape.numel() for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]


@dataclass(frozen=True)
class LabelledImages:
    """Pictures with class numbers, split into the rows for training and for testing; `name` says which data set."""

    name: str
    images: Any
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray
    classes: tuple[str, ...]

    def first(self, train: int, test: int) -> LabelledImages:
        """The first pictures of each part alone, so that no others need features."""
        rows = np.concatenate([self.train[:train], self.test[:test]])
        count = min(train, len(self.train))
        index = np.arange(len(rows))
        return replace(
            self, images=self.images[rows], labels=self.labels[rows], train=index[:count], test=index[count:]
        )

    def split(self, values: Any) -> dict[str, Any]:
        """Values a picture (features, labels, …) as those of the training and of the test pictures."""
        return {"train": values[self.train], "test": values[self.test]}

    def features(self, model: str = "efficientnet-lite0", size: int = 128) -> Float[Tensor, "n p"]:
        """Pooled features (n, 1280) by an installed network, cached."""
        return pooled_features(self.images, image_encoder(size, model), size)


def labelled_images(source: str = "cifar100") -> LabelledImages:
    """A labelled image set: "cifar100", "cifar10" or "fashion_mnist" of the data folder, or "digits".

    Where the data folder lacks it, scikit-learn's handwritten digits take its place.
    """
    if source == "digits" or not is_available(source):
        data = load("digits")
        index = np.arange(len(data["y"]))
        return LabelledImages(
            "digits",
            data["x"] * 15,
            data["y"],
            index[index % 10 < 8],
            index[index % 10 >= 8],
            tuple(str(digit) for digit in range(10)),
        )
    data = load(source)
    count = len(data["x_train"])
    total = count + len(data["x_test"])
    return LabelledImages(
        source,
        np.concatenate([data["x_train"], data["x_test"]]),
        np.concatenate([data["y_train"], data["y_test"]]).astype(np.int64),
        np.arange(count),
        np.arange(count, total),
        tuple(str(name) for name in data["classes"]),
    )


class PooledFeatures(nn.Module):
    """Pixels in [0, 1] (b, 3, h, w) → pooled features (b, 1280) of EfficientNet-Lite0, frozen: a map with a gradient.

    Batch norms are folded into the convolutions before them: the same function, several times faster to differentiate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = load_model("efficientnet-lite0").requires_grad_(False)
        for module in list(self.network.modules()):
            for (name, convolution), (follower, norm) in pairwise(list(module.named_children())):
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                    setattr(module, follower, nn.Identity())
        self.network.to(memory_format=torch.channels_last)
        self.normalization = image_preprocessing("efficientnet-lite0")

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Normalise, run the convolutions, average over positions."""
        x = (x - self.normalization["mean"]) / self.normalization["std"]
        return self.network.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))
