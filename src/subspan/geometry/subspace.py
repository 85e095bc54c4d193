"""`Subspace`: an ordered orthonormal basis with its centre and spectrum, and everything one does with it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from subspan.base import as_tensor, check_finite, save_arrays, saved_object
from subspan.base.arrays import centre, holding
from subspan.base.saved import Schema, optional

from .angles import principal_angles, subspace_distance, subspace_overlap
from .grassmann import orthonormalize, polar, random_basis
from .rank import RankRule, rank_rule

SAVED_ARRAYS: Schema = {
    "basis": Inexact[Tensor, "*b d k"],
    "center": optional(Inexact[Tensor, "*b d"]),
    "variances": optional(Float[Tensor, "*b k"]),
    "residual_variance": optional(Float[Tensor, "*b"]),
    "spectrum": optional(Float[Tensor, "*b m"]),
}
"""What a file holds of a subspace, beside its count."""


@dataclass(frozen=True)
class Subspace:
    """An affine or linear subspace with ordered principal directions.

    Parameters
    ----------
    basis
        (*b, d, k) orthonormal columns, strongest first where variances are known.
    center
        (*b, d) the point it passes through; None: the origin.
    variances
        (*b, k) variance of the data along each direction, or None.
    residual_variance
        (*b,) mean variance per discarded dimension (PPCA's noise), or None.
    spectrum
        (*b, m) all variances of the fit, descending, m = min(n, d) or d, or None.
    count
        Number of rows behind the fit; None: the subspace was given.

    Examples
    --------
    >>> from subspan.geometry import Subspace
    >>> plane = Subspace.span([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> plane.project([[3.0, 4.0, 5.0]]).tolist(), plane.residual_energy([[3.0, 4.0, 5.0]]).tolist()
    ([[3.0, 4.0, 0.0]], [25.0])
    """

    basis: Inexact[Tensor, "*b d k"]
    center: Inexact[Tensor, "*b d"] | None = None
    variances: Float[Tensor, "*b k"] | None = None
    residual_variance: Float[Tensor, "*b"] | None = None
    spectrum: Float[Tensor, "*b m"] | None = None
    count: float | None = None

    def __post_init__(self) -> None:
        if self.basis.ndim < 2:
            raise ValueError(f"basis: expected shape (..., d, k), got {tuple(self.basis.shape)}")
        d, k = self.basis.shape[-2:]
        if not 1 <= k <= d:
            raise ValueError(f"basis: k must lie in [1, d], got k = {k} and d = {d}")
        defect = self.basis.mH @ self.basis - torch.eye(k, dtype=self.basis.dtype, device=self.basis.device)
        # `not <=` also catches NaN, which compares false with everything.
        tolerance = 100 * torch.finfo(self.basis.dtype).eps * max(1.0, k**0.5)
        if defect.numel() and not float(defect.detach().abs().max()) <= tolerance:
            raise ValueError("basis: the columns are not orthonormal; use Subspace.span to orthonormalise vectors")

    # ------------------------------------------------------------------ construction

    @classmethod
    def span(cls, vectors: Any, *, center: Any = None, tolerance: float | None = None) -> Subspace:
        """Subspace spanned by the columns of `vectors` (*b, d, m); dependent columns are dropped (unbatched).

        Raises ValueError when all columns are zero or a batch holds subspaces of unequal dimension.
        """
        x = check_finite(as_tensor(vectors, "vectors"), "vectors")
        if x.ndim < 2:
            raise ValueError(f"vectors: expected shape (..., d, m), got {tuple(x.shape)}")
        c = None if center is None else as_tensor(center, "center").to(x)
        u, s, _ = torch.linalg.svd(x, full_matrices=False)
        cut = torch.finfo(s.dtype).eps * max(x.shape[-2:]) if tolerance is None else tolerance
        ranks = (s > cut * s[..., :1]).sum(-1)
        k = int(ranks.max())
        if k == 0 or int(ranks.min()) != k:
            raise ValueError(
                f"vectors: must span subspaces of one dimension >= 1, got ranks {ranks.flatten().tolist()}"
            )
        if k == x.shape[-1]:
            u = orthonormalize(x)  # keeps the order of independent vectors, which an SVD does not
        return cls(u[..., :k], center=c)

    @classmethod
    def random(
        cls,
        d: int,
        k: int,
        *,
        batch: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Subspace:
        """Uniformly random k-dimensional subspace of R^d."""
        return cls(random_basis(d, k, batch=batch, generator=generator, dtype=dtype))

    @classmethod
    def from_covariance(
        cls,
        covariance: Inexact[Tensor, "d d"],
        *,
        mean: Inexact[Tensor, " d"] | None = None,
        count: float,
        rank: int | float | str | RankRule = 0.99,
        dtype: torch.dtype | None = None,
    ) -> Subspace:
        """Leading eigenvectors of a covariance (or second moment, with mean=None) estimated from `count` rows."""
        values, vectors = torch.linalg.eigh(covariance)
        return cls._from_spectrum(vectors.flip(-1), values.flip(-1).clamp_min(0), mean, count, rank, dtype)

    @classmethod
    def from_factor(
        cls,
        factor: Inexact[Tensor, "m d"],
        *,
        mean: Inexact[Tensor, " d"] | None = None,
        count: float,
        rank: int | float | str | RankRule = 0.99,
        dtype: torch.dtype | None = None,
    ) -> Subspace:
        """`from_covariance` of F' conj(F) over count - 1 (over count with mean=None), without a d x d matrix."""
        d = factor.shape[1]
        _, s, vh = torch.linalg.svd(factor, full_matrices=False)
        values = s.square() / (count - 1 if mean is not None else count)
        # As many as `fit` gives: one a row; what is beyond their number is zero but for rounding.
        length = int(min(d, max(1, round(count))))
        values = torch.nn.functional.pad(values, (0, max(0, length - len(values))))[:length]
        return cls._from_spectrum(vh.mT[:, :length], values, mean, count, rank, dtype)

    @classmethod
    def fit(
        cls,
        x: Any,
        *,
        rank: int | float | str | RankRule = 0.99,
        center: bool = True,
    ) -> Subspace:
        """Principal subspace of the rows of `x` (n, d), computed in float64, returned in the dtype of `x`.

        The centre stays in float64: where it is large against the spread, rounding it would move the subspace.
        `rank`: int, float in (0, 1] = explained variance, rule name or rule. `center`: subtract the mean first.
        Uses the smaller of the two Gram matrices, so n < d costs O(n^2 d). For data larger than memory use
        `Moments`. Raises ValueError for non-finite or constant rows.
        """
        rows = check_finite(as_tensor(x, "x", ndim=2).detach(), "x")
        n, d = rows.shape
        if n < 2:
            raise ValueError(f"x: needs at least 2 rows, got {n}")
        wide = rows.to(torch.complex128 if rows.is_complex() else torch.float64)
        mean = wide.mean(0) if center else None
        wide = wide - mean if mean is not None else wide
        degrees = n - 1 if center else n
        if n >= d:
            values, vectors = torch.linalg.eigh(wide.mT @ wide.conj() / degrees)
            vectors, values = vectors.flip(-1), values.flip(-1).clamp_min(0)
        else:
            _, s, vh = torch.linalg.svd(wide, full_matrices=False)
            vectors, values = vh.mT, s.square() / degrees
        return cls._from_spectrum(vectors, values, mean, float(n), rank, rows.dtype)

    @classmethod
    def _from_spectrum(
        cls,
        vectors: Tensor,
        values: Tensor,
        mean: Tensor | None,
        count: float,
        rank: int | float | str | RankRule,
        dtype: torch.dtype | None,
    ) -> Subspace:
        d = vectors.shape[-2]
        available = int(min(d, max(1, count - (mean is not None))))
        total = float(values.sum())
        scale = float(mean.abs().square().sum()) if mean is not None else 0.0
        if not total > 1e-28 * scale or total == 0:
            raise ValueError("x: the total variance is zero (constant rows); there is no direction to keep")
        k = rank_rule(rank)(values[:available].cpu().numpy(), max(1, round(count)), d)
        if not 1 <= k <= d:
            raise ValueError(f"rank: the rule returned {k}, outside [1, {d}]")
        dtype = holding(vectors.dtype if dtype is None else dtype, values)
        real = dtype.to_real()
        rest = values[k:].sum() / (d - k) if k < d else values.new_zeros(())
        return cls(
            basis=vectors[:, :k].to(dtype).contiguous(),
            center=mean,
            variances=values[:k].to(real),
            residual_variance=rest.to(real),
            spectrum=values.to(real),
            count=float(count),
        )

    # ------------------------------------------------------------------ description

    @property
    def dim(self) -> int:
        """Dimension k."""
        return self.basis.shape[-1]

    @property
    def ambient_dim(self) -> int:
        """Ambient dimension d."""
        return self.basis.shape[-2]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading dimensions."""
        return tuple(self.basis.shape[:-2])

    @property
    def projector(self) -> Inexact[Tensor, "*b d d"]:
        """The orthogonal projector as a matrix (d x d: for small d and for checks)."""
        return self.basis @ self.basis.mH

    @property
    def explained_ratio(self) -> Float[Tensor, "*b"]:
        """Share of the total variance inside the subspace."""
        spectrum, variances = self._need("spectrum"), self._need("variances")
        return variances.sum(-1) / spectrum.sum(-1)

    @property
    def degrees_of_freedom(self) -> float:
        """Divisor between squared singular values and variances: count - 1 when centred, else count."""
        if self.count is None:
            raise ValueError("subspace: it was not fitted to rows, so it has no count")
        return self.count - 1 if self.center is not None else self.count

    def __repr__(self) -> str:
        batch = f", batch={self.batch_shape}" if self.batch_shape else ""
        ratio = f", explained={float(self.explained_ratio):.4f}" if self.spectrum is not None and not batch else ""
        return f"Subspace(dim={self.dim}, ambient_dim={self.ambient_dim}{batch}{ratio}, dtype={self.basis.dtype})"

    # ------------------------------------------------------------------ a batch

    def __len__(self) -> int:
        """Size of the first leading dimension. Raises TypeError where there is none."""
        return self._batched()[0]

    def __bool__(self) -> bool:
        return True  # also without leading dimensions, where there is no length to ask

    def __getitem__(self, index: Any) -> Subspace:
        """Member or members along the first leading dimension. Raises TypeError where there is none."""
        size = self._batched()[0]
        if isinstance(index, int | np.integer) and not -size <= index < size:
            raise IndexError(f"index: {index} is out of range for {size} subspaces")
        return Subspace(count=self.count, **{name: value[index] for name, value in self.arrays().items()})

    def __iter__(self) -> Iterator[Subspace]:
        return (self[place] for place in range(len(self)))

    def _batched(self) -> tuple[int, ...]:
        if not self.batch_shape:
            raise TypeError("subspace: it is one subspace, not a batch; it has no members")
        return self.batch_shape

    def _need(self, name: str) -> Tensor:
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"subspace: it has no {name}; it was given, not fitted")
        return value

    # ------------------------------------------------------------------ vectors

    def _rows(self, x: Any) -> Tensor:
        rows = as_tensor(x, "x")
        if rows.shape[-1:] != (self.ambient_dim,):
            raise ValueError(f"x: expected {self.ambient_dim} columns, got shape {tuple(rows.shape)}")
        # Half precision is for storage; sums over d need more digits.
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.to(torch.float32)
        dtype = torch.promote_types(rows.dtype, self.basis.dtype)
        if rows.device != self.basis.device:
            raise ValueError(f"x: is on {rows.device}, the subspace on {self.basis.device}; move one with .to(...)")
        return rows.to(dtype)

    def _centered(self, rows: Tensor) -> Tensor:
        return rows if self.center is None else centre(rows, self.center.unsqueeze(-2))

    def coordinates(self, x: Any) -> Inexact[Tensor, "*b n k"]:
        """Coordinates (…, n, k) of rows x (…, n, d) along the directions, from the centre."""
        rows = self._centered(self._rows(x))
        return rows @ self.basis.to(rows.dtype).conj()

    def embed(self, z: Any) -> Inexact[Tensor, "*b n d"]:
        """Points (…, n, d) with coordinates z (…, n, k); the inverse of `coordinates` inside the subspace."""
        coordinates = as_tensor(z, "z")
        if coordinates.shape[-1:] != (self.dim,):
            raise ValueError(f"z: expected {self.dim} columns, got shape {tuple(coordinates.shape)}")
        points = coordinates @ self.basis.mT.to(coordinates.dtype)
        return points if self.center is None else points + self.center.unsqueeze(-2).to(points.dtype)

    def project(self, x: Any) -> Inexact[Tensor, "*b n d"]:
        """Nearest points of the subspace to rows x (…, n, d)."""
        return self.embed(self.coordinates(x))

    def residual(self, x: Any) -> Inexact[Tensor, "*b n d"]:
        """What the subspace leaves of rows x (…, n, d): x - project(x)."""
        rows = self._centered(self._rows(x))
        basis = self.basis.to(rows.dtype)
        return rows - (rows @ basis.conj()) @ basis.mT

    def energies(self, x: Any) -> tuple[Inexact[Tensor, "*b n k"], Float[Tensor, "*b n"]]:
        """Coordinates and squared distance to the subspace in one pass over rows x (…, n, d).

        The distance is |x - c|^2 - |z|^2; rows where that cancels (close to the subspace) are measured directly.
        """
        given = self._rows(x)
        z, residual = self._energies(given)
        if bool(torch.isfinite(residual).all()):
            return z, residual
        z, residual = self._energies(check_finite(given, "x").to(torch.promote_types(given.dtype, torch.float64)))
        if not bool(torch.isfinite(residual).all()):
            raise ValueError("x: values are so large that their squares overflow float64; rescale them")
        return z, residual

    def _energies(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._centered(rows)
        basis = self.basis.to(rows.dtype)
        z = rows @ basis.conj()
        norm = rows.abs().square().sum(-1)
        residual = norm - z.abs().square().sum(-1)
        close = residual < norm * (1e4 * torch.finfo(norm.dtype).eps)
        if bool(close.any()):
            if self.batch_shape:
                exact = (rows - z @ basis.mT).abs().square().sum(-1)
                residual = torch.where(close, exact, residual)
            else:
                residual[close] = (rows[close] - z[close] @ basis.mT).abs().square().sum(-1)
        return z, residual

    def residual_energy(self, x: Any) -> Float[Tensor, "*b n"]:
        """Squared distance (…, n) of rows x (…, n, d) to the subspace."""
        return self.energies(x)[1]

    def mahalanobis(self, x: Any, *, epsilon: float = 0.0) -> Float[Tensor, "*b n"]:
        """Squared Mahalanobis distance inside the subspace, sum_i z_i^2 / (variance_i + epsilon)."""
        variances = self._need("variances").unsqueeze(-2) + epsilon
        rows = self._rows(x)
        z = self.coordinates(rows)
        distance = (z.abs().square() / variances.to(z.real.dtype)).sum(-1)
        if bool(torch.isfinite(distance).all()):
            return distance
        z = self.coordinates(check_finite(rows, "x").to(torch.promote_types(rows.dtype, torch.float64)))
        distance = (z.abs().square() / variances.to(z.real.dtype)).sum(-1)
        if not bool(torch.isfinite(distance).all()):
            raise ValueError("epsilon: a direction has no variance to divide by; choose epsilon > 0 or a lower rank")
        return distance

    def leverage(self, x: Any) -> Float[Tensor, "*b n"]:
        """Statistical leverage sum_i z_i^2 / s_i^2 of rows, equal to Mahalanobis over the degrees of freedom."""
        return self.mahalanobis(x) / self.degrees_of_freedom

    def captured_energy(self, covariance: Inexact[Tensor, "*c d d"]) -> Float[Tensor, "*a"]:
        """Share tr(U' R U) / tr(R) of a covariance or second moment R inside the directions U, in [0, 1].

        Leading dimensions are broadcast against those of the subspace; differentiable. NaN where R is zero.
        """
        dtype = torch.promote_types(self.basis.dtype, covariance.dtype)
        basis, covariance = self.basis.to(covariance.device, dtype), covariance.to(dtype)
        inside = (basis.conj() * (covariance @ basis)).sum((-2, -1)).real
        return inside / covariance.diagonal(dim1=-2, dim2=-1).sum(-1).real

    # ------------------------------------------------------------------ algebra

    def complement(self) -> Subspace:
        """Orthogonal complement (dimension d - k, same centre). Raises ValueError when k = d."""
        d, k = self.ambient_dim, self.dim
        if k == d:
            raise ValueError("subspace: it is the whole space, so its complement is empty")
        q = torch.linalg.qr(self.basis, mode="complete")[0]
        return Subspace(q[..., k:], center=self.center)

    def select(self, index: Any) -> Subspace:
        """Subspace of chosen directions, in the given order (boolean mask or indices), spectrum kept."""
        chosen = torch.as_tensor(np.asarray(index) if not isinstance(index, Tensor) else index)
        if chosen.dtype == torch.bool:
            if chosen.shape != (self.dim,):
                raise ValueError(f"index: a mask must have {self.dim} entries, got shape {tuple(chosen.shape)}")
            chosen = chosen.nonzero()[:, 0]
        chosen = chosen.to(self.basis.device)
        if chosen.numel() == 0:
            raise ValueError("index: selects no direction")
        variances = None if self.variances is None else self.variances[..., chosen]
        residual = None
        if self.spectrum is not None and variances is not None:
            rest = self.ambient_dim - chosen.numel()
            outside = (self.spectrum.sum(-1) - variances.sum(-1)).clamp_min(0)
            residual = outside / rest if rest else torch.zeros_like(outside)
        return dataclasses.replace(self, basis=self.basis[..., chosen], variances=variances, residual_variance=residual)

    def truncate(self, k: int) -> Subspace:
        """The first k directions."""
        if not 1 <= k <= self.dim:
            raise ValueError(f"k: must lie in [1, {self.dim}], got {k}")
        return self.select(torch.arange(k))

    def split(self, cuts: list[int] | tuple[int, ...]) -> list[Subspace]:
        """Consecutive blocks of directions, cut before each index of `cuts` (ascending, inside (0, k))."""
        points = [0, *cuts, self.dim]
        if any(a >= b for a, b in pairwise(points)):
            raise ValueError(f"cuts: must ascend strictly inside (0, {self.dim}), got {list(cuts)}")
        return [self.select(torch.arange(a, b)) for a, b in pairwise(points)]

    def rotate_onto(self, other: Subspace) -> Subspace:
        """Same subspace, its basis rotated to be as near as possible to that of `other` (same k)."""
        if self.dim != other.dim:
            raise ValueError(f"other: expected dimension {self.dim}, got {other.dim}")
        basis = self.basis @ polar(self.basis.mH @ other.basis)
        return Subspace(basis, center=self.center, residual_variance=self.residual_variance, count=self.count)

    def union(self, other: Subspace, *, tolerance: float | None = None) -> Subspace:
        """Sum of the two subspaces (unbatched); directions closer than `tolerance` (sine) count once."""
        residual = other.basis - self.basis @ (self.basis.mH @ other.basis)
        u, s, _ = torch.linalg.svd(residual, full_matrices=False)
        extra = u[:, s > self._tolerance(tolerance)]
        extra = extra - self.basis @ (self.basis.mH @ extra)
        if extra.shape[1] == 0:
            return Subspace(self.basis, center=self.center)
        return Subspace(torch.cat([self.basis, orthonormalize(extra)], dim=1), center=self.center)

    def intersection(self, other: Subspace, *, tolerance: float | None = None) -> Subspace | None:
        """Common directions (unbatched): principal angles with sine <= tolerance; None where there is none."""
        u = torch.linalg.svd(self.basis.mH @ other.basis, full_matrices=False)[0]
        vectors = self.basis @ u
        outside = vectors - other.basis @ (other.basis.mH @ vectors)
        kept = torch.linalg.vector_norm(outside, dim=0) <= self._tolerance(tolerance)
        return Subspace(orthonormalize(vectors[:, kept]), center=self.center) if bool(kept.any()) else None

    def _tolerance(self, tolerance: float | None) -> float:
        if self.batch_shape:
            raise ValueError("subspace: union and intersection take one pair at a time")
        return float(torch.finfo(self.basis.dtype).eps ** 0.5) if tolerance is None else tolerance

    def angles(self, other: Subspace) -> Float[Tensor, "*b m"]:
        """Principal angles to `other` (radians, ascending)."""
        return principal_angles(self.basis, other.basis)

    def distance(self, other: Subspace, *, metric: str = "geodesic") -> Float[Tensor, "*b"]:
        """Distance of the directions to those of `other`; for the metrics see `subspace_distance`."""
        return subspace_distance(self.basis, other.basis, metric=metric)

    def overlap(self, other: Subspace) -> Float[Tensor, "*b"]:
        """Share of directions in common, |A'B|_F^2 / min(p, q)."""
        return subspace_overlap(self.basis, other.basis)

    # ------------------------------------------------------------------ moving and keeping

    def to(self, *args: Any, **kwargs: Any) -> Subspace:
        """Move to a device or floating dtype, like `Tensor.to`; the basis is made orthonormal again.

        Of a dtype only the precision counts: what is complex stays so, and spectra stay real.
        """
        moved = {}
        for name, value in self.arrays().items():
            asked = torch.empty(0, dtype=value.dtype, device=value.device).to(*args, **kwargs)
            moved[name] = value.to(
                asked.device, asked.dtype.to_complex() if value.is_complex() else asked.dtype.to_real()
            )
        if moved["basis"].dtype != self.basis.dtype:
            wide = self.basis.to(moved["basis"].device)
            target = moved["basis"].dtype
            moved["basis"] = orthonormalize(wide.to(torch.promote_types(target, wide.dtype))).to(target)
        return Subspace(count=self.count, **moved)

    def arrays(self) -> dict[str, Tensor]:
        """Basis, centre and spectra by name, as far as they are there: what a file holds."""
        return {name: value for name in SAVED_ARRAYS if (value := getattr(self, name)) is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor], count: float | None) -> Subspace:
        """What `arrays` returned as a subspace again. Raises ValueError where spectrum and count do not fit."""
        found = cls(count=count, **arrays)
        if count is not None and not count >= 1:
            raise ValueError(f"count: must be at least 1, got {count}")
        d, m = found.ambient_dim, None if found.spectrum is None else found.spectrum.shape[-1]
        if m is not None and m != d and (count is None or m != round(count)):
            raise ValueError(f"spectrum: expected {d} values, or as many as rows, got {m}")
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, whole or not at all."""
        save_arrays(path, "subspace", self.arrays(), count=self.count)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Subspace:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        with saved_object(path, "subspace", SAVED_ARRAYS, {"count": float | None}) as (arrays, facts):
            return cls.from_arrays(arrays, facts["count"])
