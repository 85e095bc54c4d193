"""Mergeable one-pass first and second moments: `Moments`, `JointMoments`, `GroupedMoments`.

Each is a monoid: `update` with a batch, `+` to merge, `all_reduce` across processes. Every chunk is centred on its own
mean before its products are formed and chunks are merged pairwise (Chan, Golub & LeVeque, 1983), so a mean that is
large against the spread costs no digits, and float32 rows may be multiplied in float32 while sums are kept in float64.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from subspan.base import as_tensor, check_finite, check_matrix, save_arrays, saved_object
from subspan.base.saved import Schema, optional
from subspan.geometry import RankRule, Subspace
from subspan.geometry.affine import AffineMap, LowRankMap
from subspan.geometry.canonical import CanonicalCorrelation, cca
from subspan.geometry.closed_forms import procrustes, ridge, translation
from subspan.geometry.covariance import whitening

SAVED_STATE: Schema = {
    "count": Float[Tensor, "1"],
    "mean": Inexact[Tensor, " d"],
    "scatter": optional(Inexact[Tensor, "d d"]),
    "factor": optional(Inexact[Tensor, "m d"]),
}
"""What a file holds of `Moments`: the scatter, or the factor while that is smaller."""
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
    """Count, mean and centred second moment of rows in d dimensions, accumulated in `dtype` (default float64).

    Memory O(d^2), one pass, any order of updates and merges to rounding. Up to d/2 rows the centred rows themselves
    are kept, which is less, and `subspace` needs no d x d matrix; `scatter` makes one when it is asked for.
    Complex rows need a complex `dtype`.
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


class JointMoments:
    """Moments of paired rows (x, y): everything that maps and compares two spaces in closed form needs only these."""

    def __init__(
        self, d_x: int, d_y: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ):
        if d_x < 1 or d_y < 1:
            raise ValueError(f"d_x, d_y: must be at least 1, got {d_x} and {d_y}")
        self.d_x, self.d_y = d_x, d_y
        self.joint = Moments(d_x + d_y, dtype=dtype, device=device)

    def __repr__(self) -> str:
        return f"JointMoments(d_x={self.d_x}, d_y={self.d_y}, count={self.count:g})"

    def update(self, x: Any, y: Any, weights: Any = None) -> JointMoments:
        """Add paired rows x (n, d_x) and y (n, d_y); returns self."""
        a, b = as_tensor(x, "x", ndim=2).detach(), as_tensor(y, "y", ndim=2).detach()
        if a.shape[1] != self.d_x or b.shape[1] != self.d_y:
            raise ValueError(f"x, y: expected {self.d_x} and {self.d_y} columns, got {a.shape[1]} and {b.shape[1]}")
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"y: expected {a.shape[0]} rows to pair with x, got {b.shape[0]}")
        dtype = torch.promote_types(a.dtype, b.dtype)
        self.joint.update(torch.cat([a.to(dtype), b.to(dtype)], dim=1), weights)
        return self

    def __add__(self, other: JointMoments) -> JointMoments:
        """Moments of the pairs of both."""
        if not isinstance(other, JointMoments):
            return NotImplemented
        if (other.d_x, other.d_y) != (self.d_x, self.d_y):
            raise ValueError(f"other: has dimensions {(other.d_x, other.d_y)}, expected {(self.d_x, self.d_y)}")
        return self._with(self.d_x, self.d_y, self.joint + other.joint)

    def all_reduce(self, group: Any = None) -> JointMoments:
        """Merge over the processes of a torch.distributed group, in place on every rank; returns self."""
        self.joint.all_reduce(group)
        return self

    @property
    def count(self) -> float:
        """Number of pairs."""
        return self.joint.count

    @property
    def mean_x(self) -> Inexact[Tensor, " d_x"]:
        """Mean of x."""
        return self.joint.mean[: self.d_x]

    @property
    def mean_y(self) -> Inexact[Tensor, " d_y"]:
        """Mean of y."""
        return self.joint.mean[self.d_x :]

    def _covariance(self, rows: slice, columns: slice) -> Inexact[Tensor, "p q"]:
        self.joint._need(2)
        return self.joint.block(rows, columns) / (self.count - 1)

    @property
    def _sides(self) -> tuple[slice, slice]:
        return slice(0, self.d_x), slice(self.d_x, None)

    @property
    def cov_xx(self) -> Inexact[Tensor, "d_x d_x"]:
        """Covariance of x (divisor count - 1)."""
        x, _ = self._sides
        return self._covariance(x, x)

    @property
    def cov_xy(self) -> Inexact[Tensor, "d_x d_y"]:
        """Cross-covariance of x and y."""
        return self._covariance(*self._sides)

    @property
    def cov_yy(self) -> Inexact[Tensor, "d_y d_y"]:
        """Covariance of y."""
        _, y = self._sides
        return self._covariance(y, y)

    @property
    def x(self) -> Moments:
        """Moments of x alone."""
        return self.joint._part(self._sides[0])

    @property
    def y(self) -> Moments:
        """Moments of y alone."""
        return self.joint._part(self._sides[1])

    def copy(self) -> JointMoments:
        """Independent copy."""
        return self._with(self.d_x, self.d_y, self.joint.copy())

    @staticmethod
    def _with(d_x: int, d_y: int, joint: Moments) -> JointMoments:
        new = JointMoments.__new__(JointMoments)
        new.d_x, new.d_y, new.joint = d_x, d_y, joint
        return new

    def swapped(self) -> JointMoments:
        """Moments of the pairs (y, x)."""
        order = torch.arange(self.d_x + self.d_y, device=self.joint.mean.device).roll(self.d_y)
        joint = self.joint.copy()
        joint.mean = joint.mean[order]
        if joint._scatter is not None:
            joint.scatter = joint._scatter[order][:, order]
        joint._factors = [part[:, order] for part in joint._factors]
        return self._with(self.d_y, self.d_x, joint)

    def map(self, x: AffineMap, y: AffineMap) -> JointMoments:
        """Moments of the pairs (x(row), y(row)), in O(d^3) without the rows."""
        left, right = x.matrix.to(self.joint.mean), y.matrix.to(self.joint.mean)
        factor, d = self.joint.factor, self.d_x
        if factor is None:
            s = self.joint.scatter
            cross = left @ s[:d, d:] @ right.mT
            top = torch.cat([left @ s[:d, :d] @ left.mT, cross], dim=1)
            scatter = torch.cat([top, torch.cat([cross.mT, right @ s[d:, d:] @ right.mT], dim=1)])
        else:
            moved = torch.cat([factor[:, :d] @ left.mT, factor[:, d:] @ right.mT], dim=1)
            scatter = moved.mT @ moved.conj()
        joint = Moments.from_state(
            {
                "count": torch.tensor([self.count], dtype=torch.float64),
                "mean": torch.cat([x.map(self.mean_x.unsqueeze(0))[0], y.map(self.mean_y.unsqueeze(0))[0]]),
                "scatter": scatter,
            }
        )
        return self._with(len(left), len(right), joint)

    def row_spaces(self) -> RowSpaces | None:
        """The two sides in coordinates of what their rows span, while the rows are kept (see `Moments`), else None."""
        factor = self.joint.factor
        if factor is None or factor.is_complex():
            return None
        bases = []
        for side in self._sides:
            _, sizes, vh = torch.linalg.svd(factor[:, side], full_matrices=False)
            least = torch.finfo(sizes.dtype).eps * max(vh.shape) * sizes.max() if len(sizes) else 0
            bases.append(vh[sizes > least])
        if not all(map(len, bases)):
            return None
        x_basis, y_basis = bases
        inner = self.map(AffineMap(x_basis), AffineMap(y_basis))
        return RowSpaces(inner, x_basis, y_basis, self.mean_x, self.mean_y)

    def translation(self) -> AffineMap:
        """Shift x -> y of the means."""
        return translation(self.mean_x, self.mean_y)

    def procrustes(self, *, scale: bool = False, determinant: int | None = None, rank: int | None = None) -> AffineMap:
        """Orthogonal map x -> y through the means, with a common scale when `scale`; of `rank` where that is given.

        Of few rows (see `row_spaces`), and without a `determinant`, it maps their span alone: the rest goes to zero.
        """
        if determinant is None and (spaces := self.row_spaces()):
            return spaces.procrustes(scale=scale, rank=rank).dense()
        return procrustes(
            self.cov_xy,
            mean_x=self.mean_x,
            mean_y=self.mean_y,
            cov_xx=self.cov_xx if scale else None,
            determinant=determinant,
            rank=rank,
        )

    def ridge(self, alpha: float = 1e-3) -> AffineMap:
        """Affine ridge map x -> y; `alpha` is relative to the mean variance of x."""
        if spaces := self.row_spaces():
            return spaces.ridge(alpha).dense()
        return ridge(self.cov_xx, self.cov_xy, alpha=alpha, mean_x=self.mean_x, mean_y=self.mean_y)

    def cca(self, k: int | None = None, *, shrinkage: float | str = "oas") -> CanonicalCorrelation:
        """Canonical correlation analysis, shrunk by default; of few rows (see `row_spaces`), inside their span."""
        if spaces := self.row_spaces():
            return spaces.cca(k, shrinkage=shrinkage)
        return cca(
            self.cov_xx,
            self.cov_xy,
            self.cov_yy,
            count=self.count,
            mean_x=self.mean_x,
            mean_y=self.mean_y,
            k=k,
            shrinkage=shrinkage,
        )

    def through_canonical(self, canonical: CanonicalCorrelation) -> AffineMap:
        """The best linear prediction of y from the canonical variables of x."""
        if spaces := self.row_spaces():
            return spaces.through_canonical(canonical).dense()
        return self._through(canonical.x_directions)

    def _through(self, a: Float[Tensor, "d_x k"]) -> AffineMap:
        variance, covariance = a.mT @ self.cov_xx @ a, a.mT @ self.cov_xy
        # A direction that is there by shrinkage alone has no variance, and predicts nothing.
        matrix = (a @ torch.linalg.pinv(variance, hermitian=True) @ covariance).mT
        return AffineMap(matrix, self.mean_y - matrix @ self.mean_x)

    def cka(self, *, debiased: bool = False) -> float:
        """Linear centred kernel alignment of x and y.

        Few rows in many dimensions look alike whatever they are: `chance_cka` says how much. debiased: without what
        chance adds to numerator and denominator, 0 on average for unrelated rows (unbiased for Gaussian rows; Wishart
        moments). Raises ValueError for a constant side, and where debiasing leaves no spread of one (too few rows).
        """
        cross, own, chance = self._alignment()
        if not debiased:
            return cross / (own[0] * own[1]) ** 0.5
        spread = [square - trace**2 / (self.count - 1) for square, trace in zip(own, chance)]
        if min(spread) <= 0:
            raise ValueError(f"moments: {self.count:g} rows are too few to tell their spread from chance")
        return (cross - chance[0] * chance[1] / (self.count - 1)) / (spread[0] * spread[1]) ** 0.5

    def chance_cka(self) -> float:
        """Mean of the linear CKA over all ways to pair these rows of x with these rows of y, in closed form."""
        _, own, trace = self._alignment()
        return trace[0] * trace[1] / (self.count - 1) / (own[0] * own[1]) ** 0.5

    def _alignment(self) -> tuple[float, list[float], list[float]]:
        """Squared norms of the cross-scatter and of the two scatters, and the traces of these."""
        self.joint._need(2)
        sides = self._sides
        factor = self.joint.factor
        trace = [float(self.joint.squares[side].sum()) for side in sides]
        if min(trace) <= 0:
            raise ValueError("moments: one of the two is constant, so the alignment is not defined")
        if factor is None:
            cross, *own = (
                float(torch.linalg.matrix_norm(self.joint.scatter[a, b])) ** 2
                for a, b in (sides, (sides[0],) * 2, (sides[1],) * 2)
            )
        else:
            grams = [factor[:, side] @ factor[:, side].mH for side in sides]
            cross, *own = (float((a * b.conj()).real.sum()) for a, b in (grams, (grams[0],) * 2, (grams[1],) * 2))
        return cross, own, trace

    def local_cka(self, x: Any, y: Any) -> Float[Tensor, "m p"]:
        """Linear CKA (m, p) after adding the pair (x_i, y_j) for every i, j, by a rank-one update.

        Costs O((m + p) d^2 + m p d) instead of a kernel matrix per pair. Source: Maniparambil et al., 2024.
        """
        # In double precision: with n pairs the scores of one query differ in the relative order of 1/n.
        center_x, center_y = self.mean_x.double(), self.mean_y.double()
        a = check_matrix(x, "x", columns=self.d_x).to(center_x)
        b = check_matrix(y, "y", columns=self.d_y).to(center_y)
        a, b = a - center_x, b - center_y
        factor = self.count / (self.count + 1)
        scatter, d = self.joint.scatter.double(), self.d_x
        s_xx, s_xy, s_yy = scatter[:d, :d], scatter[:d, d:], scatter[d:, d:]

        def own(s: Tensor, rows: Tensor) -> Tensor:
            linear, quartic = ((rows @ s) * rows).sum(-1), rows.square().sum(-1).square()
            return s.square().sum() + 2 * factor * linear + factor**2 * quartic

        quartic = a.square().sum(-1, keepdim=True) * b.square().sum(-1)
        cross = s_xy.square().sum() + 2 * factor * (a @ s_xy @ b.mT) + factor**2 * quartic
        return cross / (own(s_xx, a).sqrt().unsqueeze(-1) * own(s_yy, b).sqrt())


@dataclass(frozen=True)
class RowSpaces:
    """Few paired rows in coordinates of their spans, where closed forms need no square of the columns."""

    moments: JointMoments
    x_basis: Float[Tensor, "p d_x"]
    y_basis: Float[Tensor, "q d_y"]
    mean_x: Float[Tensor, " d_x"]
    mean_y: Float[Tensor, " d_y"]

    @property
    def share(self) -> float:
        """Coordinates a dimension of x: a penalty relative to the mean variance of x is so much less in coordinates."""
        return self.x_basis.shape[0] / self.x_basis.shape[1]

    def between(self, inner: AffineMap) -> LowRankMap:
        """A map between coordinates that keeps the means, as one between the spaces."""
        left = self.y_basis.mT @ inner.matrix
        return LowRankMap(left, self.x_basis, self.mean_y - left @ (self.x_basis @ self.mean_x))

    def procrustes(self, *, scale: bool = False, rank: int | None = None) -> LowRankMap:
        """Orthogonal map of the span of x into that of y."""
        return self.between(self.moments.procrustes(scale=scale, rank=rank))

    def ridge(self, alpha: float = 1e-3) -> LowRankMap:
        """Affine ridge map x -> y; `alpha` is relative to the mean variance of x."""
        return self.between(self.moments.ridge(alpha * self.share))

    def cca(self, k: int | None = None, *, shrinkage: float | str = "oas") -> CanonicalCorrelation:
        """Canonical correlation analysis, shrunk as in the whole spaces."""
        inner = self.moments
        found = cca(
            inner.cov_xx,
            inner.cov_xy,
            inner.cov_yy,
            count=inner.count,
            k=k,
            shrinkage=shrinkage,
            dimensions=(len(self.mean_x), len(self.mean_y)),
        )
        return replace(
            found,
            x_directions=self.x_basis.mT @ found.x_directions,
            y_directions=self.y_basis.mT @ found.y_directions,
            mean_x=self.mean_x,
            mean_y=self.mean_y,
        )

    def through_canonical(self, canonical: CanonicalCorrelation) -> LowRankMap:
        """The best linear prediction of y from the canonical variables of x."""
        return self.between(self.moments._through(self.x_basis @ canonical.x_directions))


class GroupedMoments:
    """One `Moments` a group (class, cluster, layer), with the pooled, within and between parts."""

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
