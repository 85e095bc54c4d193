"""Covariances: shrinkage, roots, maps to unit covariance, and the spectrum of a difference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .affine import AffineMap


def oas_shrinkage(covariance: Float[Tensor, "p p"], count: float, d: int | None = None) -> float:
    """Weight of the scaled identity by oracle approximating shrinkage; see `shrink_covariance`.

    Parameters
    ----------
    covariance
        (p, p).
    count
        Number of rows behind it.
    d
        Dimension of the space, where the covariance is in coordinates of a part that has all the variance; None: p.

    Returns
    -------
    Weight in [0, 1]; 1 where the covariance is a multiple of the identity.

    References
    ----------
    Chen, Wiesel, Eldar & Hero (2010), arXiv 0907.4698.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import oas_shrinkage
    >>> oas_shrinkage(torch.eye(3), 10), oas_shrinkage(torch.diag(torch.tensor([9.0, 1.0, 0.1])), 1000) < 0.01
    (1.0, True)
    """
    trace, square = float(covariance.diagonal().sum()), float(covariance.square().sum())
    return oas_weight(trace, square, d or covariance.shape[0], count)


def oas_weight(trace: float, square: float, d: int, count: float) -> float:
    """The same from the sum of the d eigenvalues and that of their squares."""
    top = (1 - 2 / d) * square + trace**2
    bottom = (count + 1 - 2 / d) * (square - trace**2 / d)
    return 1.0 if bottom <= 0 else float(min(1.0, top / bottom))


def shrink_covariance(covariance: Float[Tensor, "p p"], weight: float, d: int | None = None) -> Float[Tensor, "p p"]:
    """(1 - weight) covariance + weight (tr covariance / d) I.

    Parameters
    ----------
    covariance
        (p, p).
    weight
        Of the scaled identity, in [0, 1]; `oas_shrinkage` finds one.
    d
        As for `oas_shrinkage`; None: p.

    Returns
    -------
    Covariance (p, p).

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import shrink_covariance
    >>> shrink_covariance(torch.diag(torch.tensor([3.0, 1.0])), 0.5).tolist()
    [[2.5, 0.0], [0.0, 1.5]]
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"shrinkage: must lie in [0, 1], got {weight}")
    p = covariance.shape[0]
    eye = torch.eye(p, dtype=covariance.dtype, device=covariance.device)
    return (1 - weight) * covariance + weight * covariance.diagonal().sum() / (d or p) * eye


def inverse_sqrt(covariance: Float[Tensor, "d d"], *, tolerance: float = 1e-12) -> Float[Tensor, "d d"]:
    """Symmetric inverse square root on the range of a covariance.

    Parameters
    ----------
    covariance
        (d, d) symmetric.
    tolerance
        Eigenvalues up to this share of the largest count as none and map to zero.

    Returns
    -------
    Matrix (d, d).

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import inverse_sqrt
    >>> inverse_sqrt(torch.diag(torch.tensor([4.0, 0.0]))).diagonal().tolist()
    [0.5, 0.0]
    """
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
    """Map to unit covariance.

    Parameters
    ----------
    covariance
        (d, d) symmetric.
    mean
        (d,) that the map sends to zero; None: a linear map.
    method
        "zca" (symmetric), "pca" (rotated to the axes, by variance; directions without variance are left out) or
        "cholesky" (triangular).
    shrinkage
        Weight in [0, 1] of the scaled identity, as in `shrink_covariance`.
    tolerance
        Eigenvalues up to this share of the largest count as none, for "zca" and "pca".

    Returns
    -------
    AffineMap from d dimensions to d, or to fewer with "pca".

    Raises
    ------
    ValueError
        For an unknown method, and for "cholesky" where the covariance is not positive definite.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import whitening
    >>> white = whitening(torch.diag(torch.tensor([4.0, 0.25])), torch.tensor([1.0, 0.0]))
    >>> white.map(torch.tensor([[3.0, 1.0]])).round(decimals=4).tolist()
    [[1.0, 2.0]]
    """
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
    return AffineMap.through(matrix, mean, None if mean is None else mean.new_zeros(matrix.shape[0]))


@dataclass(frozen=True, eq=False)
class Whitener:
    """Rows to unit covariance and back, and weights on rows to weights on white rows and back, without an inverse.

    With covariance = factor factor' every direction is a triangular solve or product. A linear map W of rows is
    `weigh(W)` of white rows, so that |X (W - V)'|_F = sqrt(n) |weigh(W) - weigh(V)|_F for n rows of this second moment:
    what approximates `weigh(W)` in the plain norm approximates W on the data. For weights that act from the left of a
    column of features (d_in, d_out), transpose before and after.

    Parameters
    ----------
    factor
        (d, d) lower triangular with a positive diagonal; `Whitener.of` makes it from a covariance.
    mean
        (d,) taken from rows first; None: nothing.
    shift
        What was added to the diagonal of the covariance; 0: nothing.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Whitener
    >>> white = Whitener.of(torch.tensor([[4.0, 0.0], [0.0, 0.25]]))
    >>> white.whiten(torch.tensor([[2.0, 1.0]])), white.weigh(torch.tensor([[1.0, 1.0]]))
    (tensor([[1., 2.]]), tensor([[2.0000, 0.5000]]))
    """

    factor: Float[Tensor, "d d"]
    mean: Float[Tensor, " d"] | None = None
    shift: float = 0.0

    @classmethod
    def of(
        cls,
        covariance: Float[Tensor, "d d"],
        mean: Float[Tensor, " d"] | None = None,
        *,
        shift: float | None = None,
        tolerance: float | None = None,
    ) -> Whitener:
        """Whitener of a covariance or second moment, differentiable in it.

        Parameters
        ----------
        covariance
            (d, d) symmetric; its lower triangle is read.
        mean
            (d,) or None.
        shift
            Added to the diagonal; None: nothing where the matrix is positive definite, else what lifts its least
            eigenvalue to `tolerance` times the largest.
        tolerance
            Least ratio of eigenvalues that a shift leaves; None: d times the precision of the dtype.

        Raises
        ------
        ValueError
            For NaN, a matrix without a positive eigenvalue, or one that `shift` does not make positive definite.
        """
        d = len(covariance)
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError("covariance: contains NaN or infinity")
        least = d * torch.finfo(covariance.dtype).eps if tolerance is None else tolerance
        added = shift or 0.0
        factor = cls._factor(covariance, added, least)
        if factor is None and shift is None:
            values = torch.linalg.eigvalsh(covariance.detach())
            if not float(values[-1]) > 0:
                raise ValueError("covariance: has no positive eigenvalue; the rows are constant")
            added = max(0.0, -float(values[0])) + 4 * least * float(values[-1])
            factor = cls._factor(covariance, added, least)
        if factor is None:
            raise ValueError(f"shift: {added:g} on the diagonal leaves the covariance singular; give a larger one")
        return cls(factor, mean, added)

    @staticmethod
    def _factor(covariance: Tensor, shift: float, least: float) -> Tensor | None:
        eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        factor, failed = torch.linalg.cholesky_ex(covariance + shift * eye)
        pivots = factor.detach().diagonal().square()
        # A pivot that is only rounding would blow noise up to unit variance.
        return None if int(failed) or not float(pivots.min()) > least * float(pivots.max()) else factor

    def whiten(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Rows x with unit covariance (and zero mean, where there is a mean)."""
        rows = x if self.mean is None else x - self.mean.to(x)
        return torch.linalg.solve_triangular(self.factor.to(x).mT, rows, upper=True, left=False)

    def unwhiten(self, z: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Rows x with whiten(x) = z."""
        rows = z @ self.factor.to(z).mT
        return rows if self.mean is None else rows + self.mean.to(z)

    def weigh(self, weight: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Weights (…, d_out, d) of rows as weights of white rows: whiten(x) @ weigh(w)' = (x - mean) @ w'."""
        return weight @ self.factor.to(weight)

    def unweigh(self, weight: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Weights w with weigh(w) = weight."""
        return torch.linalg.solve_triangular(self.factor.to(weight), weight, upper=False, left=False)


def signed_spectrum(
    plus: Float[Tensor, "n d"], minus: Float[Tensor, "m e"]
) -> tuple[Float[Tensor, " r"], Float[Tensor, "d r"]]:
    """Spectrum of plus' plus - minus' minus in the space of the n + m rows, without a d x d matrix.

    Parameters
    ----------
    plus, minus
        Rows (n, d) and (m, d).

    Returns
    -------
    Eigenvalues (r,), descending and of either sign, and eigenvectors (d, r)
        r = min(n + m, d); what is orthogonal to all rows has eigenvalue 0 and is not listed.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import signed_spectrum
    >>> values, vectors = signed_spectrum(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
    >>> values.round(decimals=4).tolist(), tuple(vectors.shape)
    ([4.0, -1.0], (3, 2))
    """
    if plus.shape[1] != minus.shape[1]:
        raise ValueError(f"minus: expected {plus.shape[1]} columns, got {minus.shape[1]}")
    rows = torch.cat([plus, minus])
    signs = torch.cat([plus.new_ones(len(plus)), -plus.new_ones(len(minus))])
    basis, triangle = torch.linalg.qr(rows.mT)
    values, turn = torch.linalg.eigh((triangle * signs) @ triangle.mT)
    return values.flip(-1), basis @ turn.flip(-1)
