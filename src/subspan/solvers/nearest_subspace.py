"""Subspaces of groups of rows, and rows to the nearest of several subspaces."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspan.geometry import RankRule, Subspace

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


def stack_subspaces(spaces: Sequence[Subspace]) -> Subspace | tuple[Subspace, ...]:
    """One batched `Subspace` with all that its members have in common, or a tuple where their dimensions differ."""
    if len({space.dim for space in spaces}) > 1:
        return tuple(spaces)
    found: dict[str, Any] = {}
    for field in fields(Subspace):
        values = [getattr(space, field.name) for space in spaces]
        if all(isinstance(value, Tensor) for value in values) and len({value.shape for value in values}) == 1:
            found[field.name] = torch.stack(values)
        elif field.name == "count" and len(set(values)) == 1:
            found["count"] = values[0]
    return Subspace(**found)


def squared_residuals(x: Float[Tensor, "n d"], spaces: Any) -> Float[Tensor, "n k"]:
    """Squared distance of each row to each of k subspaces: a batched `Subspace` (k,) or a sequence of them."""
    columns = []
    for space in spaces:
        basis, rows = space.basis, x if space.center is None else x - space.center.to(x)
        # From the residual itself, not from the difference of squares, which loses the digits of a close fit.
        coordinates = rows @ basis.to(x)
        columns.append((rows - coordinates @ basis.to(x).mT).square().sum(1))
    return torch.stack(columns, dim=1)


def nearest_subspace(x: Float[Tensor, "n d"], spaces: Any) -> Int[Tensor, " n"]:
    """The subspace nearest to each row."""
    step = max(1, _BLOCK // x.shape[1])
    return torch.cat([squared_residuals(part, spaces).argmin(1) for part in x.split(step)])
