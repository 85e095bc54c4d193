"""Small convolutional networks that differ in their seed alone, trained on real pictures and kept in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..training import kept, one_cycle, shuffled, train

_BATCH, _RATE = 128, 2e-3


def small_network(channels: int, classes: int, seed: int, widths: tuple[int, int, int] = (32, 64, 128)) -> nn.Module:
    """Three convolutions, each with a ReLU and a pooling, and two linear layers; untrained, from a seed.

    Layers by name: conv1, relu1, …, relu3, fc, relu4, head; pictures of 28 to 32 pixels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second, third = widths
        parts: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(channels, first, 5, padding=2),
            "relu1": nn.ReLU(),
            "pool1": nn.MaxPool2d(2),
            "conv2": nn.Conv2d(first, second, 3, padding=1),
            "relu2": nn.ReLU(),
            "pool2": nn.MaxPool2d(2),
            "conv3": nn.Conv2d(second, third, 3, padding=1),
            "relu3": nn.ReLU(),
            "pool3": nn.AdaptiveAvgPool2d(3),
            "flat": nn.Flatten(),
            "fc": nn.Linear(9 * third, third),
            "relu4": nn.ReLU(),
            "head": nn.Linear(third, classes),
        }
        network = nn.Sequential()
        for name, part in parts.items():
            network.add_module(name, part)
    return network


def pixels(images: np.ndarray) -> Float[Tensor, "n c h w"]:
    """Pictures (n, h, w) or (n, h, w, 3) of bytes as floats about 0, of unit deviation over the set."""
    rows = torch.from_numpy(np.ascontiguousarray(images)).float()
    rows = rows[:, None] if rows.ndim == 3 else rows.movedim(-1, 1)
    return ((rows - rows.mean()) / rows.std()).contiguous()


def trained_network(images: Float[Tensor, "n c h w"], labels: np.ndarray, *, seed: int, epochs: int) -> nn.Module:
    """A `small_network` trained from `seed` (start and order of batches) by Adam, one cycle of the rate; cached."""
    network = small_network(images.shape[1], int(labels.max()) + 1, seed)
    # The format is faster on a processor.
    last: Any = torch.channels_last
    targets = torch.from_numpy(labels.astype(np.int64))

    def fit() -> None:
        network.to(memory_format=last)  # pyright: ignore[reportCallIssue]
        batches = shuffled(images.contiguous(memory_format=last), targets, batch_size=_BATCH, seed=seed)
        options: Any = {"epochs": epochs, "learning_rate": _RATE, "schedule": one_cycle()}
        train(network, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batches, **options)
        network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]

    key = {"start": network, "images": images, "labels": labels, "seed": seed, "epochs": epochs}
    return kept(network, "small-networks", key, fit)


@torch.no_grad()
def accuracy(network: nn.Module, images: Float[Tensor, "n c h w"], labels: np.ndarray) -> float:
    """Share of pictures that are classified rightly."""
    found = torch.cat([network(part).argmax(1) for part in images.split(500)])
    return float((found.numpy() == labels).mean())


def parameter_count(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(part.numel() for part in network.parameters())
