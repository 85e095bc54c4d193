"""Moments of pairs of rows in two spaces, and the spaces that few rows span."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from subspan.base import as_tensor, check_matrix
from subspan.geometry.affine import AffineMap, LowRankMap
from subspan.geometry.canonical import CanonicalCorrelation, cca
from subspan.geometry.closed_forms import procrustes, ridge, translation

from .moments import Moments


class JointMoments:
    """Moments of paired rows (x, y): everything that maps and compares two spaces in closed form needs only these.

    A monoid like `Moments`: `update` with batches, `+` to merge, `all_reduce` across processes.

    Parameters
    ----------
    d_x, d_y
        Dimensions of the rows.
    dtype
        Of the sums; a complex one for complex rows.
    device
        Of the sums; None: torch's default.

    Attributes
    ----------
    joint
        `Moments` of the rows [x, y], d_x + d_y wide.

    Examples
    --------
    >>> import torch
    >>> from subspan.statistics import JointMoments
    >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double()
    >>> turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()
    >>> pairs = JointMoments(2, 2).update(x, x @ turn.T + 7)
    >>> pairs.procrustes().matrix.allclose(turn), round(pairs.cka(), 6)
    (True, 1.0)
    """

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
