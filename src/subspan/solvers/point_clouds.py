"""Distances between shapes that are given as points on their surfaces."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base import as_tensor, check_finite

_BLOCK = 1 << 22


def chamfer_distances(a: Any, b: Any) -> Float[Tensor, "m p"]:
    """Chamfer distance of each cloud of points to each of others.

    Mean squared distance to the nearest point, summed over both directions.

    Parameters
    ----------
    a, b
        Clouds (m, n_a, 3) and (p, n_b, 3), or in any other dimension of space.

    Returns
    -------
    Distances (m, p), in the square of the unit of the points.

    Raises
    ------
    ValueError
        For points that are none, not finite or of unequal dimension.

    References
    ----------
    Fan, Su & Guibas (2017), arXiv 1612.00603.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import chamfer_distances
    >>> cloud = torch.tensor([[[0.0, 0.0, 0.0], [5.0, 0.0, 0.0]]])
    >>> chamfer_distances(cloud, cloud + torch.tensor([0.0, 0.0, 1.0])).tolist()
    [[2.0]]
    """
    first, second = (check_finite(as_tensor(x, name, ndim=3), name) for x, name in ((a, "a"), (b, "b")))
    if first.shape[2] != second.shape[2]:
        raise ValueError(f"b: expected points in {first.shape[2]} dimensions, got {second.shape[2]}")
    if not (first.numel() and second.numel()):
        raise ValueError("a, b: hold no points")
    second = second.to(first)
    result = first.new_empty(len(first), len(second))
    step = max(1, _BLOCK // (first.shape[1] * second.shape[1]))
    for row, cloud in enumerate(first):
        for start in range(0, len(second), step):
            others = second[start : start + step]
            squared = torch.cdist(
                cloud.expand(len(others), -1, -1), others, compute_mode="donot_use_mm_for_euclid_dist"
            ).square()
            result[row, start : start + step] = squared.amin(2).mean(1) + squared.amin(1).mean(1)
    return result
