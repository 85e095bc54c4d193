"""Pictures whose factors are known exactly: dSprites where it is at hand, else real digits that are rendered anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from subspan.datasets import is_available, load

_SIDE, _HANDS = 16, 8
# Of a digit: side of its 8 x 8 pixels on the canvas, shift of its centre of mass in pixels, brightness.
_SCALES, _SHIFTS, _INKS = (7.0, 9.0, 11.0), (-2.55, -0.85, 0.85, 2.55), (0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class FactorPictures:
    """Pictures (n, 1, h, w) in [0, 1] and their factors by name, in a part to train and one to test."""

    name: str
    x: dict[str, Float[Tensor, "n 1 h w"]]
    factors: dict[str, dict[str, Int[np.ndarray, " n"]]]

    def sizes(self) -> dict[str, int]:
        """Values of each factor."""
        return {name: int(values.max()) + 1 for name, values in self.factors["train"].items()}


def factor_pictures(train: int, test: int, seed: int) -> FactorPictures:
    """So many pictures to train and to test on, with every factor drawn evenly and on its own."""
    counts = {"train": train, "test": test}
    return _dsprites(counts, seed) if is_available("dsprites") else _digits(counts, seed)


def _digits(counts: dict[str, int], seed: int) -> FactorPictures:
    """Digits of scikit-learn in a few hands each: digit, scale, x, y and ink, every combination once at most."""
    random = np.random.default_rng(seed)
    source = load("digits")
    hands = torch.from_numpy(source["x"]).float() / float(source["x"].max())
    sizes = {"digit": 10, "scale": len(_SCALES), "x": len(_SHIFTS), "y": len(_SHIFTS), "ink": len(_INKS)}
    of_digit = np.stack([random.permutation(np.flatnonzero(source["y"] == digit))[:_HANDS] for digit in range(10)])
    every = np.indices((*sizes.values(), _HANDS)).reshape(len(sizes) + 1, -1)
    places = random.permutation(every.shape[1])
    if sum(counts.values()) > len(places):
        raise ValueError(f"train, test: {len(places)} pictures at most, got {sum(counts.values())}")
    x, factors = {}, {}
    for part, at in zip(counts, np.split(places[: sum(counts.values())], [counts["train"]])):
        values = dict(zip(sizes, every[:-1, at]))
        x[part], factors[part] = _rendered(hands[of_digit[values["digit"], every[-1, at]]], values), values
    return FactorPictures("digits, rendered", x, factors)


def _rendered(hands: Float[Tensor, "n 8 8"], values: dict[str, np.ndarray]) -> Float[Tensor, "n 1 h w"]:
    """Digits on a canvas, their centres of mass shifted from its middle."""
    share = hands / hands.sum((1, 2), keepdim=True)
    places = (torch.arange(8) + 0.5) / 4 - 1
    middle = torch.stack([(share.sum(1) * places).sum(1), (share.sum(2) * places).sum(1)], 1)
    grow = _SIDE / torch.tensor(_SCALES)[values["scale"]]
    shift = torch.stack([torch.tensor(_SHIFTS)[values[axis]] for axis in ("x", "y")], 1) * 2 / _SIDE
    # Of each place of the canvas, where it lies in the digit: grown about the shifted centre.
    map_back = torch.zeros(len(hands), 2, 3)
    map_back[:, 0, 0] = map_back[:, 1, 1] = grow
    map_back[:, :, 2] = middle - grow[:, None] * shift
    grid = F.affine_grid(map_back, [len(hands), 1, _SIDE, _SIDE], align_corners=False)
    drawn = F.grid_sample(hands[:, None], grid, align_corners=False)
    return drawn.clamp(0, 1) * torch.tensor(_INKS)[values["ink"]][:, None, None, None]


def _dsprites(counts: dict[str, int], seed: int) -> FactorPictures:
    """dSprites at a quarter of its side, with positions and orientations in eight bins."""
    source = load("dsprites")
    columns = dict(zip(source["factor_names"].tolist(), source["factors"].T))
    rows = np.random.default_rng(seed).permutation(len(source["x"]))[: sum(counts.values())]
    places = {"train": rows[: counts["train"]], "test": rows[counts["train"] :]}
    bins = {"shape": 1, "scale": 1, "x": 4, "y": 4, "orientation": 5}
    x = {part: F.avg_pool2d(torch.from_numpy(source["x"][at]).float()[:, None], 4) for part, at in places.items()}
    factors = {
        part: {name: (columns[name][at] // width).astype(np.int64) for name, width in bins.items()}
        for part, at in places.items()
    }
    return FactorPictures("dSprites", x, factors)
