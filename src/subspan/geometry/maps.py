"""Affine maps between spaces, and their closed forms from means and covariances.

Every estimator here takes second moments, not rows: `JointMoments` in `subspan.statistics` supplies them in one pass.
Rows are observations; a map sends a row x to `x @ matrix.T + bias`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..base.reading import memory_bytes
from ..base.saved import optional, saved_object
from .arrays import as_tensor
from .extras import require
from .files import save_arrays
from .subspace import Subspace


@dataclass(frozen=True)
class AffineMap:
    """An affine map from a source space (d_in) to a target space (d_out): x -> matrix x + bias."""

    matrix: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"] | None = None

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise ValueError(f"matrix: expected shape (d_out, d_in), got {tuple(self.matrix.shape)}")
        if self.bias is not None and self.bias.shape != self.matrix.shape[:1]:
            raise ValueError(f"bias: expected shape ({self.matrix.shape[0]},), got {tuple(self.bias.shape)}")
        for name, value in (("matrix", self.matrix), ("bias", self.bias)):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}: contains NaN or infinity")

    @classmethod
    def identity(cls, d: int, *, dtype: torch.dtype = torch.float64) -> AffineMap:
        """The identity on R^d."""
        return cls(torch.eye(d, dtype=dtype))

    def map(self, x: Any) -> Float[Tensor, "*n d_out"]:
        """Map rows x (…, d_in) to (…, d_out), in the dtype of x; half precision is summed in float32."""
        rows = as_tensor(x, "x")
        if rows.shape[-1:] != self.matrix.shape[1:]:
            raise ValueError(f"x: expected {self.matrix.shape[1]} columns, got shape {tuple(rows.shape)}")
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        if self.bias is None:
            return (wide @ self.matrix.to(wide).mT).to(rows.dtype)
        flat = torch.addmm(self.bias.to(wide), wide.reshape(-1, wide.shape[-1]), self.matrix.to(wide).mT)
        return flat.reshape(*rows.shape[:-1], self.matrix.shape[0]).to(rows.dtype)

    def inverse(self) -> AffineMap:
        """Inverse map; for unequal dimensions the least-squares (pseudo) inverse."""
        inverse = torch.linalg.pinv(self.matrix)
        return AffineMap(inverse, None if self.bias is None else -(inverse @ self.bias))

    def __matmul__(self, other: AffineMap) -> AffineMap:
        """Composition: (self @ other).map(x) = self.map(other.map(x))."""
        if self.matrix.shape[1] != other.matrix.shape[0]:
            raise ValueError(f"other: maps into {other.matrix.shape[0]} dimensions, {self.matrix.shape[1]} are needed")
        bias = self.bias
        if other.bias is not None:
            moved = self.matrix @ other.bias
            bias = moved if bias is None else moved + bias
        return AffineMap(self.matrix @ other.matrix, bias)

    @property
    def orthogonality_defect(self) -> float:
        """Frobenius norm of W'W - I (or WW' - I for fewer rows than columns)."""
        w = self.matrix
        gram = w.mT @ w if w.shape[0] >= w.shape[1] else w @ w.mT
        return float(torch.linalg.matrix_norm(gram - torch.eye(gram.shape[0], dtype=w.dtype, device=w.device)))

    def to(self, *args: Any, **kwargs: Any) -> AffineMap:
        """Move to a device or dtype, like `Tensor.to`."""
        bias = None if self.bias is None else self.bias.to(*args, **kwargs)
        return AffineMap(self.matrix.to(*args, **kwargs), bias)

    def to_module(self) -> nn.Linear:
        """The same map as a torch Linear layer."""
        d_out, d_in = self.matrix.shape
        layer = nn.Linear(d_in, d_out, bias=self.bias is not None, device=self.matrix.device, dtype=self.matrix.dtype)
        with torch.no_grad():
            layer.weight.copy_(self.matrix)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def to_faiss(self) -> Any:
        """The same map as a faiss LinearTransform, for an IndexPreTransform (extra: index)."""
        faiss: Any = require("faiss", extra="index")
        d_out, d_in = self.matrix.shape
        transform = faiss.LinearTransform(d_in, d_out, self.bias is not None)
        faiss.copy_array_to_vector(self.matrix.float().cpu().contiguous().numpy().ravel(), transform.A)
        if self.bias is not None:
            faiss.copy_array_to_vector(self.bias.float().cpu().numpy(), transform.b)
        transform.is_trained = True
        transform.set_is_orthonormal()
        return transform

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, whole or not at all."""
        save_arrays(path, "affine-map", {"matrix": self.matrix} | ({} if self.bias is None else {"bias": self.bias}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AffineMap:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        schema = {"matrix": Float[Tensor, "d_out d_in"], "bias": optional(Float[Tensor, " d_out"])}
        with saved_object(path, "affine-map", schema) as (arrays, _):
            return cls(**arrays)


@dataclass(frozen=True)
class LowRankMap:
    """An affine map kept as two thin factors: x -> left (right x) + bias, in O(r (d_in + d_out)) memory."""

    left: Float[Tensor, "d_out r"]
    right: Float[Tensor, "r d_in"]
    bias: Float[Tensor, " d_out"]

    def map(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """Map rows x, in their dtype."""
        return torch.addmm(self.bias.to(x), x @ self.right.to(x).mT, self.left.to(x).mT)

    def dense(self) -> AffineMap:
        """The same with its whole matrix."""
        return AffineMap(self.left @ self.right, self.bias)


def check_map_memory(d_in: int, d_out: int) -> None:
    """ValueError where a matrix between the spaces takes over an eighth of the memory: fitting holds several."""
    size, most = 8 * d_in * d_out, memory_bytes() / 8
    if size > most:
        raise ValueError(
            f"X, Y: a map from {d_in} to {d_out} dimensions takes {size / 2**30:.3g} GiB, over an eighth of this "
            f"machine's memory ({most / 2**30:.3g} GiB); shorten the rows first (subspan shorten)"
        )


def _through_means(matrix: Tensor, mean_x: Tensor | None, mean_y: Tensor | None) -> AffineMap:
    if mean_x is None or mean_y is None:
        return AffineMap(matrix)
    return AffineMap(matrix, mean_y - matrix @ mean_x)


def translation(mean_x: Float[Tensor, " d_x"], mean_y: Float[Tensor, " d_y"]) -> AffineMap:
    """Shift of the mean of x to that of y; between unequal dimensions x is padded with zeros or cut."""
    return _through_means(torch.eye(len(mean_y), len(mean_x)).to(mean_x), mean_x, mean_y)


def procrustes(
    cov_xy: Float[Tensor, "d_x d_y"],
    *,
    mean_x: Tensor | None = None,
    mean_y: Tensor | None = None,
    cov_xx: Float[Tensor, "d_x d_x"] | None = None,
    determinant: int | None = None,
    rank: int | None = None,
) -> AffineMap:
    """Orthogonal map (or isometry between unequal dimensions) from x to y with the least squared error.

    With `cov_xx` a common scale is fitted too. `determinant` = +1 or -1 fixes the sign (square maps only). `rank`: a
    partial isometry of the leading directions, zero on the others, of which few pairs say nothing.
    Source: Schonemann (1966).
    """
    u, s, vh = torch.linalg.svd(cov_xy.mT, full_matrices=False)
    if rank is not None:
        if determinant is not None or not 1 <= rank <= len(s):
            raise ValueError(f"rank: must lie in [1, {len(s)}], without a determinant, got {rank}")
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    if determinant is not None:
        if determinant not in (1, -1) or cov_xy.shape[0] != cov_xy.shape[1]:
            raise ValueError("determinant: takes +1 or -1, and needs equal dimensions")
        sign = torch.ones_like(s)
        sign[-1] = determinant * torch.linalg.det(u) * torch.linalg.det(vh)
        u, s = u * sign.sign(), s * sign.sign()
    matrix = u @ vh
    if cov_xx is not None:
        # Between unequal dimensions only the part of x that survives the map counts against the scale.
        denominator = torch.einsum("ij,jk,ik->", matrix, cov_xx, matrix)
        matrix = matrix * (s.sum() / denominator)
    return _through_means(matrix, mean_x, mean_y)


def ridge(
    cov_xx: Float[Tensor, "d_x d_x"],
    cov_xy: Float[Tensor, "d_x d_y"],
    *,
    alpha: float = 1e-3,
    mean_x: Tensor | None = None,
    mean_y: Tensor | None = None,
) -> AffineMap:
    """Ridge regression from x to y; `alpha` is relative to the mean variance of x (tr cov_xx / d_x).

    alpha = 0 is least squares on the range of cov_xx: directions that x does not have (constant or duplicated columns,
    fewer rows than columns) count for nothing.
    """
    if alpha < 0:
        raise ValueError(f"alpha: must be >= 0, got {alpha}")
    if alpha == 0:
        white = inverse_sqrt(cov_xx)
        return _through_means((white @ (white @ cov_xy)).mT, mean_x, mean_y)
    d = cov_xx.shape[0]
    penalty = alpha * cov_xx.diagonal().sum() / d
    regular = cov_xx + penalty * torch.eye(d, dtype=cov_xx.dtype, device=cov_xx.device)
    factor, failed = torch.linalg.cholesky_ex(regular)
    if int(failed):
        matrix = (torch.linalg.pinv(regular, hermitian=True) @ cov_xy).mT
    else:
        matrix = torch.cholesky_solve(cov_xy, factor).mT
    return _through_means(matrix, mean_x, mean_y)


def reduced_rank(
    cov_xx: Float[Tensor, "d_x d_x"],
    cov_xy: Float[Tensor, "d_x d_y"],
    rank: int,
    *,
    alpha: float = 1e-3,
    mean_x: Tensor | None = None,
    mean_y: Tensor | None = None,
) -> AffineMap:
    """Ridge regression from x to y through `rank` dimensions, the least penalised error among such maps.

    Source: Izenman (1975); with a ridge, Mukherjee & Zhu (2011).
    """
    return _through_means(reduced_rank_factors(cov_xx, cov_xy, alpha=alpha)(rank), mean_x, mean_y)


def reduced_rank_factors(
    cov_xx: Float[Tensor, "d_x d_x"], cov_xy: Float[Tensor, "d_x d_y"], *, alpha: float = 1e-3
) -> Callable[[int], Float[Tensor, "d_y d_x"]]:
    """What `reduced_rank` needs for any rank, solved once: rank → matrix."""
    full = ridge(cov_xx, cov_xy, alpha=alpha).matrix
    # The penalised fit's own second moment, B' (C_xx + penalty) B, is B' C_xy.
    fitted = full @ cov_xy
    directions = torch.linalg.eigh((fitted + fitted.mT) / 2)[1].flip(-1)

    def of_rank(rank: int) -> Float[Tensor, "d_y d_x"]:
        if not 1 <= rank <= min(full.shape):
            raise ValueError(f"rank: must lie in [1, {min(full.shape)}], got {rank}")
        kept = directions[:, :rank]
        return kept @ (kept.mT @ full)

    return of_rank


def oas_shrinkage(covariance: Float[Tensor, "p p"], count: float, d: int | None = None) -> float:
    """Weight in [0, 1] of the scaled identity by oracle approximating shrinkage (Chen et al., 2010).

    d: dimension of the space, where the covariance is in coordinates of a part that has all the variance.
    """
    trace, square = float(covariance.diagonal().sum()), float(covariance.square().sum())
    return oas_weight(trace, square, d or covariance.shape[0], count)


def oas_weight(trace: float, square: float, d: int, count: float) -> float:
    """The same from the sum of the d eigenvalues and that of their squares."""
    top = (1 - 2 / d) * square + trace**2
    bottom = (count + 1 - 2 / d) * (square - trace**2 / d)
    return 1.0 if bottom <= 0 else float(min(1.0, top / bottom))


def shrink_covariance(covariance: Float[Tensor, "p p"], weight: float, d: int | None = None) -> Float[Tensor, "p p"]:
    """(1 - weight) covariance + weight (tr covariance / d) I; d as for `oas_shrinkage`."""
    if not 0 <= weight <= 1:
        raise ValueError(f"shrinkage: must lie in [0, 1], got {weight}")
    p = covariance.shape[0]
    eye = torch.eye(p, dtype=covariance.dtype, device=covariance.device)
    return (1 - weight) * covariance + weight * covariance.diagonal().sum() / (d or p) * eye


def inverse_sqrt(covariance: Float[Tensor, "d d"], *, tolerance: float = 1e-12) -> Float[Tensor, "d d"]:
    """Symmetric inverse square root on the range of the covariance; smaller eigenvalues map to zero."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > tolerance * values[-1].clamp_min(0)
    scale = torch.where(kept, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), torch.zeros_like(values))
    return (vectors * scale) @ vectors.mT


def whitening(
    covariance: Float[Tensor, "d d"],
    mean: Float[Tensor, " d"] | None = None,
    *,
    method: str = "zca",
    shrinkage: float = 0.0,
    tolerance: float = 1e-12,
) -> AffineMap:
    """Map to unit covariance: "zca" (symmetric), "pca" (rotated to the axes, by variance) or "cholesky"."""
    regular = shrink_covariance(covariance, shrinkage)
    if method == "zca":
        matrix = inverse_sqrt(regular, tolerance=tolerance)
    elif method == "pca":
        values, vectors = torch.linalg.eigh(regular)
        values, vectors = values.flip(-1), vectors.flip(-1)
        kept = values > tolerance * values[0]
        matrix = vectors[:, kept].mT / values[kept].sqrt().unsqueeze(-1)
    elif method == "cholesky":
        factor, failed = torch.linalg.cholesky_ex(regular)
        if int(failed):
            raise ValueError("covariance: is not positive definite; use shrinkage > 0 or method='zca'")
        matrix = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
    else:
        raise ValueError(f"method: expected 'zca', 'pca' or 'cholesky', got {method!r}")
    return _through_means(matrix, mean, None if mean is None else mean.new_zeros(matrix.shape[0]))


def gaussian_transport(
    cov_x: Float[Tensor, "d d"],
    cov_y: Float[Tensor, "d d"],
    *,
    mean_x: Tensor | None = None,
    mean_y: Tensor | None = None,
    method: str = "coral",
    tolerance: float = 1e-12,
) -> AffineMap:
    """Map that gives x the mean and covariance of y: "coral" (whiten-colour) or "optimal" (least movement)."""
    values, vectors = torch.linalg.eigh(cov_y)
    root_y = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    if method == "coral":
        matrix = root_y @ inverse_sqrt(cov_x, tolerance=tolerance)
    elif method == "optimal":
        values, vectors = torch.linalg.eigh(cov_x)
        root_x = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
        inner_values, inner_vectors = torch.linalg.eigh(root_x @ cov_y @ root_x)
        inner = (inner_vectors * inner_values.clamp_min(0).sqrt()) @ inner_vectors.mT
        inverse = inverse_sqrt(cov_x, tolerance=tolerance)
        matrix = inverse @ inner @ inverse
    else:
        raise ValueError(f"method: expected 'coral' or 'optimal', got {method!r}")
    return _through_means(matrix, mean_x, mean_y)


@dataclass(frozen=True)
class CanonicalCorrelation:
    """Canonical directions of two spaces: columns with unit variance and cross-correlation diag(correlations)."""

    x_directions: Float[Tensor, "d_x k"]
    y_directions: Float[Tensor, "d_y k"]
    correlations: Float[Tensor, " k"]
    mean_x: Float[Tensor, " d_x"]
    mean_y: Float[Tensor, " d_y"]
    shrinkage: tuple[float, float] = (0.0, 0.0)

    def transform_x(self, x: Any) -> Float[Tensor, "n k"]:
        """Canonical variables of rows x (n, d_x)."""
        rows = as_tensor(x, "x")
        return (rows - self.mean_x.to(rows)) @ self.x_directions.to(rows)

    def transform_y(self, y: Any) -> Float[Tensor, "n k"]:
        """Canonical variables of rows y (n, d_y)."""
        rows = as_tensor(y, "y")
        return (rows - self.mean_y.to(rows)) @ self.y_directions.to(rows)

    def truncate(self, k: int) -> CanonicalCorrelation:
        """The first k pairs."""
        return dataclasses.replace(
            self,
            x_directions=self.x_directions[:, :k],
            y_directions=self.y_directions[:, :k],
            correlations=self.correlations[:k],
        )

    def subspaces(self) -> tuple[Subspace, Subspace]:
        """Spans of the directions in x and in y (Euclidean orthonormal bases, centred at the means)."""
        return (
            Subspace.span(self.x_directions, center=self.mean_x),
            Subspace.span(self.y_directions, center=self.mean_y),
        )

    def shared_dimensions(self, threshold: float = 0.5) -> int:
        """Number of pairs with a correlation above `threshold`."""
        return int((self.correlations > threshold).sum())


def cca(
    cov_xx: Float[Tensor, "d_x d_x"],
    cov_xy: Float[Tensor, "d_x d_y"],
    cov_yy: Float[Tensor, "d_y d_y"],
    *,
    count: float,
    mean_x: Tensor | None = None,
    mean_y: Tensor | None = None,
    k: int | None = None,
    shrinkage: float | str = "oas",
    dimensions: tuple[int, int] | None = None,
) -> CanonicalCorrelation:
    """Canonical correlation analysis from covariances.

    shrinkage: "oas" (default) or a weight in [0, 1] for both sides. The joint covariance is shrunk, so the
    cross-covariance shrinks with its two sides and correlations stay below one; where the shrinkage is so strong that
    nothing of the data is left, correlations are zero. dimensions: of the two spaces, where the covariances are in
    coordinates of parts that have all the variance. Directions without variance (constant or dependent columns,
    fewer rows than columns) are left out where nothing is shrunk. Raises ValueError for a side that is constant, and
    for k above the pairs that there are.
    """
    for name, covariance in (("cov_xx", cov_xx), ("cov_yy", cov_yy)):
        if not float(covariance.diagonal().sum()) > 0:
            raise ValueError(f"{name}: is zero: the rows are constant and have no directions")
    d_x, d_y = dimensions or (len(cov_xx), len(cov_yy))
    if isinstance(shrinkage, str):
        if shrinkage != "oas":
            raise ValueError(f"shrinkage: expected 'oas' or a number in [0, 1], got {shrinkage!r}")
        weights = (oas_shrinkage(cov_xx, count, d_x), oas_shrinkage(cov_yy, count, d_y))
    else:
        weights = (float(shrinkage), float(shrinkage))
    regular = [shrink_covariance(*side) for side in zip((cov_xx, cov_yy), weights, (d_x, d_y))]
    white_x, white_y = map(inverse_sqrt, regular)
    # The trace of a whitened covariance is its rank.
    available = min(round(float((white @ side @ white).trace())) for white, side in zip((white_x, white_y), regular))
    kept = ((1 - weights[0]) * (1 - weights[1])) ** 0.5
    u, s, vh = torch.linalg.svd(white_x @ cov_xy @ white_y * kept, full_matrices=False)
    k = available if k is None else k
    if not 1 <= k <= available:
        raise ValueError(f"k: must lie in [1, {available}], got {k}")
    return CanonicalCorrelation(
        white_x @ u[:, :k],
        white_y @ vh.mT[:, :k],
        s[:k].clamp(0, 1),
        cov_xx.new_zeros(len(cov_xx)) if mean_x is None else mean_x,
        cov_yy.new_zeros(len(cov_yy)) if mean_y is None else mean_y,
        weights,
    )


def linear_cka(
    cov_xx: Float[Tensor, "d_x d_x"], cov_xy: Float[Tensor, "d_x d_y"], cov_yy: Float[Tensor, "d_y d_y"]
) -> float:
    """Linear centred kernel alignment in [0, 1] from covariances (Kornblith et al., 2019)."""
    norm = torch.linalg.matrix_norm(cov_xx) * torch.linalg.matrix_norm(cov_yy)
    if not float(norm) > 0:
        raise ValueError("cov_xx, cov_yy: one of them is zero, so the alignment is not defined")
    return float(torch.linalg.matrix_norm(cov_xy).square() / norm)
