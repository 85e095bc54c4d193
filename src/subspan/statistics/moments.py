"""Mergeable one-pass first and second moments: `Moments`, `JointMoments`, `GroupedMoments`.

Each is a monoid: `update` with a batch, `+` to merge, `all_reduce` across processes. Every chunk is centred on its own
mean before its products are formed and chunks are merged pairwise (Chan, Golub & LeVeque, 1983), so a mean that is
large against the spread costs no digits, and float32 rows may be multiplied in float32 while sums are kept in float64.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from subspan.base import as_tensor, check_finite, save_arrays, saved_object
from subspan.base.saved import Schema, optional
from subspan.geometry import RankRule, Subspace
from subspan.geometry.affine import AffineMap
from subspan.geometry.covariance import whitening

SAVED_STATE: Schema = {
    "count": Float[Tensor, "1"],
    "mean": Inexact[Tensor, " d"],
    "scatter": optional(Inexact[Tensor, "d d"]),
    "factor": optional(Inexact[Tensor, "m d"]),
}
_PASS = {"rows": int | None, "batch_size": int | None, "source": list[int | str] | None, "seen": str | None}
_CHUNK_BYTES = 16 << 20
_PANEL = 256


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Add sum_n x_ni conj(x_nj) to `total`, forming only one triangle of blocks."""
    d = x.shape[1]
    if d < 2 * _PANEL:
        total += x.mT @ x.conj()
        return
    for start in range(0, d, _PANEL):
        stop = min(start + _PANEL, d)
        panel = (x[:, start:stop].mT @ x[:, start:].conj()).to(total.dtype)
        total[start:stop, start:] += panel
        total[stop:, start:stop] += panel[:, stop - start :].mH


class Moments:
    """Count, mean and centred second moment of rows in d dimensions, in one pass and O(d^2) memory.

    A monoid: `update` with a batch, `+` to merge, `all_reduce` across processes, in any order to rounding. Up to d/2
    rows the centred rows themselves are kept, which is less, and `subspace` needs no d x d matrix; `scatter` makes one
    when it is asked for.

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
    count
        Number of rows, or the sum of their weights.
    mean
        (d,).

    References
    ----------
    Chan, Golub & LeVeque (1983), Algorithms for computing the sample variance.

    Examples
    --------
    >>> import torch
    >>> from subspan.statistics import Moments
    >>> rows = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    >>> whole = Moments(2).update(rows[:1]) + Moments(2).update(rows[1:])
    >>> whole.count, whole.mean.tolist(), whole.covariance().tolist()
    (3.0, [2.0, 1.0], [[4.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, d: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None):
        if d < 1:
            raise ValueError(f"d: must be at least 1, got {d}")
        self.count = 0.0
        self.mean: Tensor = torch.zeros(d, dtype=dtype, device=device)
        # Either the scatter or, while it is None, factors F with scatter = sum F' conj(F).
        self._scatter: Tensor | None = None
        self._factors: list[Tensor] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}(d={self.d}, count={self.count:g}, dtype={self.mean.dtype})"

    @property
    def d(self) -> int:
        """Dimension of the rows."""
        return self.mean.shape[0]

    @property
    def scatter(self) -> Inexact[Tensor, "d d"]:
        """Sum of the outer products of the centred rows."""
        if self._scatter is None:
            self._scatter = torch.zeros(self.d, self.d, dtype=self.mean.dtype, device=self.mean.device)
            for part in self._factors:
                _add_gram(self._scatter, part)
            self._factors = []
        return self._scatter

    @scatter.setter
    def scatter(self, value: Inexact[Tensor, "d d"]) -> None:
        self._scatter, self._factors = value, []

    @property
    def factor(self) -> Inexact[Tensor, "m d"] | None:
        """Rows F with scatter = F' conj(F), while there are at most d/2 of them; None when there were more."""
        if self._scatter is not None:
            return None
        if len(self._factors) != 1:
            self._factors = [torch.cat([self.mean.new_zeros(0, self.d), *self._factors])]
        return self._factors[0]

    def _has_room(self, rows: int) -> bool:
        return self._scatter is None and 2 * (sum(map(len, self._factors)) + rows) <= self.d

    def update(self, batch: Any, weights: Any = None) -> Moments:
        """Add rows `batch` (n, d), optionally with non-negative `weights` (n,); returns self.

        A batch that is refused (wrong width, NaN, infinity) leaves the moments as they were.
        """
        rows = as_tensor(batch, "batch", ndim=2).detach()
        if rows.shape[1] != self.d:
            raise ValueError(f"batch: expected {self.d} columns, got {rows.shape[1]}")
        if rows.is_complex() and not self.mean.is_complex():
            raise ValueError("batch: complex rows need Moments(d, dtype=torch.complex128)")
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.to(torch.float32)
        w = None
        if weights is not None:
            w = as_tensor(weights, "weights", ndim=1).detach().to(self.mean.real.dtype)
            if w.shape != rows.shape[:1] or not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
                raise ValueError(f"weights: expected {rows.shape[0]} finite non-negative numbers")
        if rows.shape[0] and w is None and self._has_room(len(rows) + 1):
            wide = check_finite(rows, "batch").to(self.mean)
            mean = wide.mean(0)
            centred = wide - mean
            offset = centred.mean(0)
            self._merge(float(len(wide)), mean + offset, [centred - offset])
        elif rows.shape[0]:
            self._merge(*self._batch(rows.to(self.mean.device), None if w is None else w.to(self.mean.device)))
        return self

    def _batch(self, rows: Tensor, w: Tensor | None) -> tuple[float, Tensor, Tensor]:
        """Count, mean and scatter of one batch, chunk by chunk."""
        total = self.mean.dtype
        step = max(2 * self.d, _CHUNK_BYTES // max(1, rows.element_size() * self.d), 64)
        scatter = torch.zeros(self.d, self.d, dtype=total, device=self.mean.device)
        buffer = torch.empty(min(step, rows.shape[0]), self.d, dtype=rows.dtype, device=rows.device)
        counts, means, offsets = [], [], []
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step]
            weight = None if w is None else w[start : start + step]
            count = float(part.shape[0] if weight is None else weight.sum())
            if count == 0:
                continue
            centred = buffer[: part.shape[0]]
            if weight is None:
                shift = part.mean(0)
                torch.sub(part, shift, out=centred)
                offset = centred.mean(0)
            else:
                share = (weight / count).to(rows.real.dtype).unsqueeze(-1)
                shift = (part * share).sum(0)
                torch.sub(part, shift, out=centred)
                offset = (centred * share).sum(0)
                centred.mul_(weight.sqrt().to(rows.real.dtype).unsqueeze(-1))
            _add_gram(scatter, centred)
            counts.append(count)
            offsets.append(offset.to(total))
            means.append(shift.to(total) + offset.to(total))
        if not counts:
            return 0.0, self.mean, scatter
        if not bool(torch.isfinite(scatter.diagonal().abs().sum())):
            return self._widened(rows, w)
        number = torch.tensor(counts, dtype=total, device=rows.device).unsqueeze(-1)
        chunk_means, inner = torch.stack(means), torch.stack(offsets)
        count = float(number.real.sum())
        mean = (chunk_means * number).sum(0) / count
        outer = chunk_means - mean
        # The chunks were centred on their means only to rounding, and their means differ: two rank-few corrections.
        scatter += (outer * number).mT @ outer.conj() - (inner * number).mT @ inner.conj()
        return count, mean, scatter

    def _widened(self, rows: Tensor, w: Tensor | None) -> tuple[float, Tensor, Tensor]:
        bad = (~torch.isfinite(rows)).any(-1)
        if bool(bad.any()):
            raise ValueError(
                f"batch: {int(bad.sum())} of {rows.shape[0]} rows contain NaN or infinity "
                f"(the first is row {int(bad.nonzero()[0, 0])}); remove or impute them"
            )
        if rows.real.dtype == torch.float64:
            raise ValueError("batch: values are so large that their squares overflow float64; rescale the rows")
        # Finite float32 rows whose squares overflow float32.
        return self._batch(rows.to(torch.complex128 if rows.is_complex() else torch.float64), w)

    def _merge(self, count: float, mean: Tensor, spread: Tensor | list[Tensor]) -> Moments:
        """Add rows of which the count, the mean, and the scatter or its factors are known."""
        if count == 0:
            return self
        total = self.count + count
        delta = mean - self.mean
        weight = self.count * count / total
        if isinstance(spread, list) and self._has_room(sum(map(len, spread)) + 1):
            between = [(delta * weight**0.5).unsqueeze(0)] if self.count else []
            self._factors = [*self._factors, *spread, *between]
        else:
            scatter = self.scatter
            if isinstance(spread, list):
                scatter = scatter.clone()
                for part in spread:
                    _add_gram(scatter, part)
            else:
                scatter = scatter + spread
            if self.count:
                scatter += torch.outer(delta * weight, delta.conj())
            self.scatter = scatter
        self.mean = self.mean + delta * (count / total)
        self.count = total
        return self

    def __add__(self, other: Moments) -> Moments:
        """Moments of the rows of both."""
        if not isinstance(other, Moments):
            return NotImplemented
        if other.d != self.d:
            raise ValueError(f"other: has dimension {other.d}, expected {self.d}")
        thin = other._scatter is None
        spread = [part.to(self.mean) for part in other._factors] if thin else other.scatter.to(self.mean)
        return self.copy()._merge(other.count, other.mean.to(self.mean), spread)

    def copy(self) -> Moments:
        """Independent copy."""
        return self._part(slice(None), copy=True)

    def _part(self, columns: slice, *, copy: bool = False) -> Moments:
        """Moments of some of the columns, sharing memory unless `copy`."""

        def own(value: Tensor) -> Tensor:
            return value.clone() if copy else value

        new = Moments.__new__(Moments)
        new.count, new.mean = self.count, own(self.mean[columns])
        new._scatter = None if self._scatter is None else own(self._scatter[columns, columns])
        new._factors = [own(part[:, columns]) for part in self._factors]
        return new

    def scaled(self, factors: Float[Tensor, " d"]) -> Moments:
        """Moments of the rows with each column times a factor."""
        new = self._part(slice(None))
        new.mean = self.mean * factors
        new._factors = [part * factors for part in self._factors]
        if self._scatter is not None:
            new._scatter = self._scatter * torch.outer(factors, factors)
        return new

    def block(self, rows: slice, columns: slice) -> Inexact[Tensor, "p q"]:
        """Part of the scatter, without the whole where the factors are kept."""
        factor = self.factor
        return self.scatter[rows, columns] if factor is None else factor[:, rows].mT @ factor[:, columns].conj()

    def all_reduce(self, group: Any = None) -> Moments:
        """Merge over the processes of a torch.distributed group, in place on every rank; returns self."""
        import torch.distributed as dist

        facts = torch.cat([self.mean.new_tensor([self.count]), self.mean * self.count])
        dist.all_reduce(facts, group=group)
        count = float(facts[0].real)
        if count == 0:
            return self
        mean = facts[1:] / count
        delta = self.mean - mean
        scatter = self.scatter.clone().addr_(delta, delta.conj(), alpha=self.count)
        dist.all_reduce(scatter, group=group)
        self.count, self.mean, self.scatter = count, mean, scatter
        return self

    def covariance(self, ddof: int = 1) -> Inexact[Tensor, "d d"]:
        """Covariance (d, d) with divisor count - ddof."""
        self._need(ddof + 1)
        return self.scatter / (self.count - ddof)

    def second_moment(self) -> Inexact[Tensor, "d d"]:
        """Uncentred second moment E[x x'] (d, d)."""
        self._need(1)
        return self.scatter / self.count + torch.outer(self.mean, self.mean.conj())

    @property
    def total_variance(self) -> float:
        """Trace of the covariance."""
        self._need(2)
        return float(self.squares.sum()) / (self.count - 1)

    @property
    def squares(self) -> Float[Tensor, " d"]:
        """Diagonal of the scatter: the sum of the squares of each column of the centred rows."""
        factor = self.factor
        return self.scatter.diagonal().real if factor is None else factor.abs().square().sum(0)

    def _need(self, rows: int | float) -> None:
        if self.count < rows:
            raise ValueError(f"moments: need at least {rows:g} rows, have {self.count:g}")

    def subspace(
        self,
        rank: int | float | str | RankRule = 0.99,
        *,
        center: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Subspace:
        """Principal subspace with its full spectrum; `center=False` takes the uncentred second moment."""
        self._need(2 if center else 1)
        factor = self.factor
        mean = self.mean if center else None
        if factor is None:
            matrix = self.covariance() if center else self.second_moment()
            return Subspace.from_covariance(matrix, mean=mean, count=self.count, rank=rank, dtype=dtype)
        if not center:
            factor = torch.cat([factor, self.mean.unsqueeze(0) * self.count**0.5])
        return Subspace.from_factor(factor, mean=mean, count=self.count, rank=rank, dtype=dtype)

    def captured_energy(self, subspace: Subspace) -> float:
        """Share of the variance that lies in the directions of a subspace, in [0, 1]; of few rows without the square.

        Parameters
        ----------
        subspace : of the rows' space; its centre counts for nothing.

        Raises
        ------
        ValueError
            Where the subspace lies in another dimension, or the rows do not vary.

        Examples
        --------
        >>> import torch
        >>> from subspan import Moments, Subspace
        >>> rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> Moments(2).update(rows).captured_energy(Subspace(torch.eye(2)[:, :1]))
        0.9
        """
        if subspace.ambient_dim != self.d:
            raise ValueError(f"subspace: of dimension {subspace.ambient_dim}, the rows have {self.d} columns")
        total = float(self.squares.sum())
        if not total > 0:
            raise ValueError("moments: the rows do not vary, so that there is no share of their variance")
        basis, factor = subspace.basis.to(self.mean), self.factor
        if factor is not None:
            return float((factor.conj() @ basis).abs().square().sum()) / total
        return float((basis.conj() * (self.scatter @ basis)).sum().real) / total

    def whitening(self, *, method: str = "zca", shrinkage: float = 0.0) -> AffineMap:
        """Map that gives the rows zero mean and unit covariance."""
        return whitening(self.covariance(), self.mean, method=method, shrinkage=shrinkage)

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for checkpoints."""
        return {
            "count": torch.tensor([self.count], dtype=torch.float64),
            "mean": self.mean.cpu().contiguous(),
            **({"scatter": self.scatter.cpu().contiguous()} if self.factor is None else {"factor": self.factor.cpu()}),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Moments:
        """Moments from what `state` returned. Raises ValueError when the shapes do not fit or the count is negative."""
        try:
            count, mean = float(state["count"][0]), state["mean"]
            scatter, factor = state.get("scatter"), state.get("factor")
        except KeyError as error:
            raise ValueError(f"state: lacks {error}") from None
        if (scatter is None) == (factor is None):
            raise ValueError("state: needs 'scatter' or 'factor', and not both")
        if not count >= 0:
            raise ValueError(f"state: a count must be >= 0, got {count}")
        d = len(mean)
        if mean.ndim != 1 or (scatter is not None and scatter.shape != (d, d)):
            found = None if scatter is None else tuple(scatter.shape)
            raise ValueError(f"state: shapes do not fit, mean {tuple(mean.shape)}, scatter {found}")
        if factor is not None and (factor.ndim != 2 or factor.shape[1] != d or 2 * len(factor) > d):
            raise ValueError(f"state: a factor (m <= {d // 2}, {d}) is needed, got {tuple(factor.shape)}")
        new = cls.__new__(cls)
        new.count, new.mean, new._scatter = count, mean, scatter
        new._factors = [] if factor is None else [factor]
        return new

    def save(self, path: str | os.PathLike[str], **facts: Any) -> None:
        """Write to a safetensors file, whole or not at all; `facts` (JSON values) are stored beside."""
        save_arrays(path, "moments", self.state(), **facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        return cls.load_resumable(path)[0]

    @classmethod
    def load_resumable(cls, path: str | os.PathLike[str]) -> tuple[Moments, dict[str, Any]]:
        """What `save` wrote: the moments, and the facts of the pass that it interrupted (None where there are none)."""
        with saved_object(path, "moments", SAVED_STATE, _PASS) as (state, facts):
            return cls.from_state(state), facts
