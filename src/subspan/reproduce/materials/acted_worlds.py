"""Worlds whose hidden state is moved by actions: bent vectors, and windows of a photograph seen by a real network."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional as F

from subspan.datasets import load
from subspan.geometry import Subspace

from .image_features import image_encoder, pooled_features

# Slope of what bends vectors where they are negative; half the side of a window, and pixels a unit of the state.
_SLOPE, _HALF, _PIXELS = 0.2, 48, 4.0
# Noises that the truth is a mean over.
_DRAWS = 20_000


class ActedWorld(NamedTuple):
    """Rows of a world Z = M A + V, X = g(Z), Y = l(Z) + U with U and V dependent.

    Attributes
    ----------
    x, a, y, z
        Observations (n, p), actions (n, d_a), outcomes (n,) and the hidden state (n, d).
    effect
        The truth E[Y | do(A = a)] of actions (m, d_a).
    """

    x: Float[np.ndarray, "n p"]
    a: Float[np.ndarray, "n k"]
    y: Float[np.ndarray, " n"]
    z: Float[np.ndarray, "n d"]
    effect: Callable[[Float[np.ndarray, "m k"]], Float[np.ndarray, " m"]]


class _State(NamedTuple):
    """What is common to both worlds: actions, the state, the noise behind it, outcomes, and the truth."""

    a: np.ndarray
    z: np.ndarray
    y: np.ndarray
    effect: Callable[[np.ndarray], np.ndarray]


def _outcome(z: np.ndarray) -> np.ndarray:
    return 2 * np.sin(z[:, 0]) + 0.3 * z[:, -1] ** 2


def _noise(count: int, dim: int, random: np.random.Generator) -> np.ndarray:
    """Normal, of standard deviation 0.5 and correlation 0.4."""
    covariance = 0.25 * (0.6 * np.eye(dim) + 0.4)
    return random.normal(size=(count, dim)) @ np.linalg.cholesky(covariance).T


def _state(count: int, dim: int, strength: float, quadratic: float, random: np.random.Generator) -> _State:
    matrix = strength * np.linalg.qr(random.normal(size=(dim, dim)))[0]
    a, v = random.uniform(-1, 1, size=(count, dim)), _noise(count, dim, random)

    def mean(actions: np.ndarray) -> np.ndarray:
        return (actions + quadratic * (actions**2 - 1 / 3)) @ matrix.T

    z = mean(a) + v
    hidden = 2 * np.tanh(2 * v[:, 0]) + 1.5 * v[:, -1] + 0.1 * random.normal(size=count)
    draws = _noise(_DRAWS, dim, np.random.default_rng(0))
    return _State(a, z, _outcome(z) + hidden, lambda q: np.array([_outcome(each + draws).mean() for each in mean(q)]))


def acted_vectors(
    count: int,
    dim: int,
    seed: int,
    *,
    strength: float = 2.0,
    quadratic: float = 0.0,
    noise: float = 0.0,
    width: int = 10,
) -> ActedWorld:
    """Vectors (n, width) of a state that three layers of leaky rectifiers bend.

    strength: of the actions, uniform in [-1, 1]. quadratic: of a part of the state's mean that is quadratic in them.
    noise: standard deviation of what is added to vectors, over theirs.
    """
    random = np.random.default_rng(seed)
    state = _state(count, dim, strength, quadratic, random)
    x = state.z
    for layer in range(3):
        x = x @ (random.normal(size=(x.shape[1], width)) / np.sqrt(x.shape[1]))
        x = np.where(x > 0, x, _SLOPE * x) if layer < 2 else x
    x = x + noise * x.std(0) * random.normal(size=x.shape)
    return ActedWorld(x, state.a, state.y, state.z, state.effect)


def acted_windows(count: int, seed: int, *, size: int = 64, components: int = 64) -> ActedWorld:
    """Windows of a photograph whose centre is the state (d = 2), as principal components of a real network's features.

    The camera is moved by the actions, and shaken. Without the network's package the windows' own pixels, on a grid of
    16 x 16, are what the components are taken of.
    """
    random = np.random.default_rng(seed)
    state = _state(count, 2, 2.0, 0.0, random)
    photograph = torch.from_numpy(load("photographs")["coffee"]).permute(2, 0, 1)[None].float()
    height, breadth = photograph.shape[2:]
    step = (2 * torch.arange(size, dtype=torch.float32) + 1) / size - 1
    down, across = torch.meshgrid(step * _HALF, step * _HALF, indexing="ij")
    inside = torch.stack([across, down], -1)
    windows = []
    for centre in torch.from_numpy(state.z).float().split(256):
        places = inside + _PIXELS * centre[:, None, None]
        grid = places / torch.tensor([breadth / 2, height / 2])
        image = photograph.expand(len(grid), -1, -1, -1)
        windows.append(F.grid_sample(image, grid, padding_mode="reflection", align_corners=False))
    pictures = torch.cat(windows).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    try:
        found = pooled_features(pictures, image_encoder(size), size).double()
    except ModuleNotFoundError:
        found = F.adaptive_avg_pool2d(torch.cat(windows), 16).flatten(1).double()
    leading = Subspace.fit(found, rank=components)
    return ActedWorld(leading.coordinates(found).numpy(), state.a, state.y, state.z, state.effect)
