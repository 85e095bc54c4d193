"""`Spread`: mean and total variance of rows in O(d) memory, where no covariance is needed."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base import check_matrix


class Spread:
    """Count, mean and trace of the scatter of rows in d dimensions: the diagonal-free sister of `Moments`.

    Mergeable in any order (Chan, Golub & LeVeque, 1983), accumulated in float64.
    """

    def __init__(self, d: int, *, device: torch.device | str | None = None) -> None:
        if d < 1:
            raise ValueError(f"d: must be at least 1, got {d}")
        self.count = 0.0
        self.mean: Float[Tensor, " d"] = torch.zeros(d, dtype=torch.float64, device=device)
        self.squares = 0.0

    def __repr__(self) -> str:
        return f"Spread(d={len(self.mean)}, count={self.count:g})"

    def update(self, batch: Any) -> Spread:
        """Add rows `batch` (n, d); returns self. Raises ValueError for a wrong width, NaN or infinity."""
        rows = check_matrix(batch, "batch", columns=len(self.mean), min_rows=0).to(self.mean)
        if len(rows) == 0:
            return self
        mean = rows.mean(0)
        return self._merge(float(len(rows)), mean, float((rows - mean).square().sum()))

    def _merge(self, count: float, mean: Tensor, squares: float) -> Spread:
        total = self.count + count
        if count:
            delta = mean - self.mean
            self.squares += squares + float(delta.square().sum()) * self.count * count / total
            self.mean = self.mean + delta * (count / total)
            self.count = total
        return self

    def __add__(self, other: Spread) -> Spread:
        """Spread of the rows of both."""
        if not isinstance(other, Spread):
            return NotImplemented
        if len(other.mean) != len(self.mean):
            raise ValueError(f"other: has dimension {len(other.mean)}, expected {len(self.mean)}")
        new = Spread(len(self.mean), device=self.mean.device)
        for part in (self, other):
            new._merge(part.count, part.mean.to(new.mean), part.squares)
        return new

    def all_reduce(self, group: Any = None) -> Spread:
        """Merge over the processes of a torch.distributed group, in place on every rank; returns self."""
        import torch.distributed as dist

        facts = torch.cat([self.mean.new_tensor([self.count]), self.mean * self.count])
        dist.all_reduce(facts, group=group)
        count = float(facts[0])
        if count == 0:
            return self
        mean = facts[1:] / count
        squares = self.mean.new_tensor([self.squares + self.count * float((self.mean - mean).square().sum())])
        dist.all_reduce(squares, group=group)
        self.count, self.mean, self.squares = count, mean, float(squares[0])
        return self

    @property
    def trace(self) -> float:
        """Mean squared distance from the mean (divisor: count). Raises ValueError for no rows."""
        if self.count == 0:
            raise ValueError("spread: holds no rows")
        return self.squares / self.count
