"""Moments between two spaces alone: what x says of y, without the squares of either."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from subspan.base import as_tensor, check_finite


class CrossMoments:
    """Count, means and centred cross moment (d_x, d_y) of paired rows in one pass; `JointMoments` without its squares.

    A monoid like `Moments`: `update` with batches, `+` to merge, `all_reduce` across processes, any order to rounding.
    Every batch is centred on its own means before the product is formed (Chan, Golub & LeVeque, 1983).

    Parameters
    ----------
    d_x, d_y
        Dimensions of the rows.
    dtype
        Of the sums; a complex one for complex rows (the product is then x' conj(y)).
    device
        Of the sums; None: torch's default.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import ridge
    >>> from subspan.statistics import CrossMoments, Moments
    >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).double()
    >>> y = x @ torch.tensor([[1.0], [2.0], [0.0]]).double() + 5
    >>> squares, cross = Moments(3).update(x), CrossMoments(3, 1).update(x, y)
    >>> ridge(squares.covariance(), cross.covariance(), alpha=0.0).matrix.round(decimals=6).tolist()
    [[1.0, 2.0, 0.0]]
    """

    def __init__(
        self, d_x: int, d_y: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ):
        if d_x < 1 or d_y < 1:
            raise ValueError(f"d_x, d_y: must be at least 1, got {d_x} and {d_y}")
        self.count = 0.0
        self.mean_x = torch.zeros(d_x, dtype=dtype, device=device)
        self.mean_y = torch.zeros(d_y, dtype=dtype, device=device)
        self.scatter = torch.zeros(d_x, d_y, dtype=dtype, device=device)

    def __repr__(self) -> str:
        return f"CrossMoments(d_x={len(self.mean_x)}, d_y={len(self.mean_y)}, count={self.count:g})"

    def update(self, x: Any, y: Any) -> CrossMoments:
        """Add paired rows x (n, d_x) and y (n, d_y); returns self. A batch that is refused leaves the moments be."""
        pair = []
        for rows, name, mean in ((x, "x", self.mean_x), (y, "y", self.mean_y)):
            given = check_finite(as_tensor(rows, name, ndim=2).detach(), name)
            if given.shape[1] != len(mean):
                raise ValueError(f"{name}: expected {len(mean)} columns, got {given.shape[1]}")
            if given.is_complex() and not mean.is_complex():
                raise ValueError(f"{name}: complex rows need CrossMoments(…, dtype=torch.complex128)")
            pair.append(given.to(mean))
        a, b = pair
        if len(a) != len(b):
            raise ValueError(f"y: expected {len(a)} rows to pair with x, got {len(b)}")
        if len(a):
            mean_x, mean_y = a.mean(0), b.mean(0)
            self._merge(float(len(a)), mean_x, mean_y, (a - mean_x).mT @ (b - mean_y).conj())
        return self

    def _merge(self, count: float, mean_x: Tensor, mean_y: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if total == 0:
            return
        apart_x, apart_y = mean_x - self.mean_x, mean_y - self.mean_y
        between = torch.outer(apart_x * (self.count * count / total), apart_y.conj())
        self.scatter = self.scatter + scatter + between
        self.mean_x, self.mean_y = self.mean_x + apart_x * (count / total), self.mean_y + apart_y * (count / total)
        self.count = total

    def __add__(self, other: CrossMoments) -> CrossMoments:
        """Moments of the pairs of both."""
        if not isinstance(other, CrossMoments):
            return NotImplemented
        if other.scatter.shape != self.scatter.shape:
            mine, theirs = tuple(self.scatter.shape), tuple(other.scatter.shape)
            raise ValueError(f"other: has dimensions {theirs}, expected {mine}")
        new = CrossMoments(*self.scatter.shape, dtype=self.scatter.dtype, device=self.scatter.device)
        for part in (self, other):
            new._merge(part.count, *(value.to(new.scatter) for value in (part.mean_x, part.mean_y, part.scatter)))
        return new

    def all_reduce(self, group: Any = None) -> CrossMoments:
        """Merge over the processes of a torch.distributed group, in place on every rank; returns self."""
        import torch.distributed as dist

        sums = torch.cat([self.mean_x.new_tensor([1.0]), self.mean_x, self.mean_y]) * self.count
        dist.all_reduce(sums, group=group)
        count = float(sums[0].real)
        if count == 0:
            return self
        mean_x, mean_y = (sums[1:] / count).split([len(self.mean_x), len(self.mean_y)])
        between = torch.outer((self.mean_x - mean_x) * self.count, (self.mean_y - mean_y).conj())
        scatter = self.scatter + between
        dist.all_reduce(scatter, group=group)
        self.count, self.mean_x, self.mean_y, self.scatter = count, mean_x, mean_y, scatter
        return self

    def covariance(self, ddof: int = 1) -> Inexact[Tensor, "d_x d_y"]:
        """Cross-covariance with divisor count - ddof."""
        if self.count < ddof + 1:
            raise ValueError(f"moments: need at least {ddof + 1} rows, have {self.count:g}")
        return self.scatter / (self.count - ddof)

    def second_moment(self) -> Inexact[Tensor, "d_x d_y"]:
        """Uncentred cross moment E[x y']."""
        return self.covariance(0) + torch.outer(self.mean_x, self.mean_y.conj())
