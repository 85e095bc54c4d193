"""Subspaces of groups of rows, and rows to the nearest of several subspaces."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..geometry import RankRule, Subspace

_BLOCK = 1 << 24


def group_subspaces(
    x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], k: int, *, rank: int | float | str | RankRule, affine: bool
) -> list[Subspace]:
    """The principal subspace of the rows of each group 0 … k - 1, through their mean where `affine`.

    A group with fewer rows than `rank` gets as many directions as it has.
    """
    found = []
    for group in range(k):
        rows = x[labels == group]
        if not len(rows):
            raise ValueError(f"labels: group {group} of {k} is empty")
        center = rows.mean(0) if affine else None
        spread = rows - center if center is not None else rows
        if float(spread.square().sum()) <= 1e-24 * float(rows.square().sum()) or len(rows) < 2:
            # A point has no direction; the smallest subspace through it stands for it.
            direction = rows[:1].mT if float(rows[0].abs().max()) else torch.eye(x.shape[1], 1).to(rows)
            found.append(Subspace.span(direction, center=center))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found.append(Subspace.fit(rows, rank=rank, center=affine))
    return found


def stack_subspaces(spaces: Sequence[Subspace]) -> Subspace | list[Subspace]:
    """One batched `Subspace` where all have the same dimension, else the list."""
    if len({space.dim for space in spaces}) > 1:
        return list(spaces)
    centers = [space.center for space in spaces if space.center is not None]
    return Subspace(torch.stack([space.basis for space in spaces]), center=torch.stack(centers) if centers else None)


def squared_residuals(x: Float[Tensor, "n d"], spaces: Any) -> Float[Tensor, "n k"]:
    """Squared distance of each row to each of k subspaces: a batched `Subspace` (k,) or a sequence of them."""
    if isinstance(spaces, Subspace):
        centers = [None] * len(spaces.basis) if spaces.center is None else list(spaces.center)
        parts = list(zip(spaces.basis, centers))
    else:
        parts = [(space.basis, space.center) for space in spaces]
    columns = []
    for basis, center in parts:
        rows = x if center is None else x - center.to(x)
        # From the residual itself, not from the difference of squares, which loses the digits of a close fit.
        coordinates = rows @ basis.to(x)
        columns.append((rows - coordinates @ basis.to(x).mT).square().sum(1))
    return torch.stack(columns, dim=1)


def nearest_subspace(x: Float[Tensor, "n d"], spaces: Any) -> Int[Tensor, " n"]:
    """The subspace nearest to each row."""
    step = max(1, _BLOCK // x.shape[1])
    return torch.cat([squared_residuals(part, spaces).argmin(1) for part in x.split(step)])
