"""Real digits, a few statistics of each, and the directions in which small changes move it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from subspan.datasets import load

_TURNS, _SHIFTS, _SCALES, _SLANTS = (-16, -8, 8, 16), (-1.0, -0.5, 0.5, 1.0), (0.8, 0.9, 1.1, 1.25), (-0.3, 0.3)


def digit_changes(count: int) -> tuple[Float[Tensor, "n 8"], Float[Tensor, "n d d"]]:
    """Mean and deviation of ink in each quarter of a digit, and the covariance of its turns, shifts, sizes and slants.

    Of the first `count` digits of scikit-learn, d = 64 pixels.
    """
    x = torch.from_numpy(load("digits")["x"][:count]).float().unsqueeze(1) / 16
    quarters = x.reshape(len(x), 2, 4, 2, 4).transpose(2, 3).reshape(len(x), 4, 16)
    fingerprints = torch.cat([quarters.mean(2), quarters.std(2)], 1)
    changes = []
    for matrix in _matrices():
        grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        changes.append((F.grid_sample(x, grid, align_corners=False) - x).flatten(1))
    moved = torch.stack(changes, 2)
    return fingerprints, moved @ moved.mT / moved.shape[2]


def _matrices() -> list[Float[Tensor, "2 3"]]:
    found = []
    for degrees in _TURNS:
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        found.append([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
    for pixels in _SHIFTS:
        found += [[[1.0, 0.0, pixels / 4], [0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, pixels / 4]]]
    found += [[[size, 0.0, 0.0], [0.0, size, 0.0]] for size in _SCALES]
    found += [[[1.0, slant, 0.0], [0.0, 1.0, 0.0]] for slant in _SLANTS]
    return [torch.tensor(matrix) for matrix in found]
