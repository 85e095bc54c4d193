"""Moments of the groups that rows belong to."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from subspan.base import as_tensor
from subspan.geometry import RankRule, Subspace

from .moments import Moments


class GroupedMoments:
    """One `Moments` a group (class, cluster, layer), with the pooled, within and between parts.

    Parameters
    ----------
    d
        Dimension of the rows.
    dtype
        Of the sums; a complex one for complex rows.
    device
        Of the sums; None: torch's default.

    Attributes
    ----------
    by_group
        The `Moments` of each label seen.

    Examples
    --------
    >>> import torch
    >>> from subspan.statistics import GroupedMoments
    >>> grouped = GroupedMoments(2).update(torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0]]), ["a", "a", "b"])
    >>> grouped.groups, grouped.means.tolist()
    (['a', 'b'], [[1.0, 1.0], [5.0, 5.0]])
    """

    def __init__(self, d: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None):
        self._empty = Moments(d, dtype=dtype, device=device)
        self.by_group: dict[Hashable, Moments] = {}

    def __repr__(self) -> str:
        return f"GroupedMoments(d={self._empty.d}, groups={len(self.by_group)})"

    def update(self, batch: Any, labels: Any, weights: Any = None) -> GroupedMoments:
        """Add rows `batch` (n, d) with one label each (any hashable, or a tensor/array of them); returns self."""
        rows = as_tensor(batch, "batch", ndim=2)
        names = labels.tolist() if hasattr(labels, "tolist") else list(labels)
        if len(names) != rows.shape[0]:
            raise ValueError(f"labels: expected {rows.shape[0]}, got {len(names)}")
        w = None if weights is None else as_tensor(weights, "weights", ndim=1)
        index: dict[Hashable, list[int]] = {}
        for position, name in enumerate(names):
            index.setdefault(name, []).append(position)
        added = {}
        for name, positions in index.items():
            chosen = torch.as_tensor(positions, device=rows.device)
            new = self._empty.copy().update(rows[chosen], None if w is None else w[chosen.to(w.device)])
            added[name] = self.by_group[name] + new if name in self.by_group else new
        self.by_group.update(added)
        return self

    def __add__(self, other: GroupedMoments) -> GroupedMoments:
        """Group-wise union."""
        if not isinstance(other, GroupedMoments):
            return NotImplemented
        new = GroupedMoments(self._empty.d, dtype=self._empty.mean.dtype, device=self._empty.mean.device)
        for part in (self, other):
            for name, moments in part.by_group.items():
                new.by_group[name] = new.by_group[name] + moments if name in new.by_group else moments.copy()
        return new

    def all_reduce(self, group: Any = None) -> GroupedMoments:
        """Merge over the processes of a torch.distributed group; ranks may have seen different groups."""
        import torch.distributed as dist

        seen: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(seen, list(self.by_group), group=group)
        for name in sorted({name for part in seen for name in part}, key=str):
            self.by_group.setdefault(name, self._empty.copy()).all_reduce(group)
        return self

    @property
    def groups(self) -> list[Hashable]:
        """Labels seen, sorted (as text where they do not compare)."""
        try:
            return sorted(self.by_group)  # pyright: ignore[reportArgumentType]
        except TypeError:
            return sorted(self.by_group, key=str)

    @property
    def counts(self) -> Float[Tensor, " g"]:
        """Rows a group, in the order of `groups`."""
        return torch.tensor([self.by_group[name].count for name in self.groups], dtype=torch.float64)

    @property
    def means(self) -> Inexact[Tensor, "g d"]:
        """Group means, in the order of `groups`."""
        return torch.stack([self.by_group[name].mean for name in self.groups])

    def pooled(self) -> Moments:
        """Moments of all rows together."""
        total = self._empty.copy()
        for name in self.groups:
            total = total + self.by_group[name]
        return total

    def within(self) -> Inexact[Tensor, "d d"]:
        """Pooled covariance inside the groups (divisor: rows - groups)."""
        scatter = torch.stack([self.by_group[name].scatter for name in self.groups]).sum(0)
        degrees = float(self.counts.sum()) - len(self.by_group)
        if degrees <= 0:
            raise ValueError("moments: every group has a single row, so there is no spread inside groups")
        return scatter / degrees

    def between(self) -> Inexact[Tensor, "d d"]:
        """Covariance of the group means, weighted by their rows."""
        counts = self.counts.to(self.means.real.dtype).to(self.means.device)
        share = counts / counts.sum()
        centred = self.means - (share.unsqueeze(-1) * self.means).sum(0)
        return (centred * share.unsqueeze(-1)).mT @ centred.conj()

    def subspaces(self, rank: int | float | str | RankRule = 0.99, *, center: bool = True) -> dict[Hashable, Subspace]:
        """Principal subspace of each group. Raises ValueError naming a group with too few rows."""
        found = {}
        for name in self.groups:
            try:
                found[name] = self.by_group[name].subspace(rank, center=center)
            except ValueError as error:
                raise ValueError(f"group {name!r}: {error}") from None
        return found
