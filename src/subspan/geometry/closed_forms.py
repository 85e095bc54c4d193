"""Maps in closed form, from means and covariances; `subspan.statistics.JointMoments` supplies them in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .affine import AffineMap
from .covariance import inverse_sqrt


def translation(mean_x: Float[Tensor, " d_x"], mean_y: Float[Tensor, " d_y"]) -> AffineMap:
    """Shift of the mean of x to that of y; between unequal dimensions x is padded with zeros or cut.

    Parameters
    ----------
    mean_x, mean_y
        Means (d_x,) and (d_y,).

    Returns
    -------
    AffineMap from d_x to d_y dimensions.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import translation
    >>> translation(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 5.0, 2.0])).map(torch.tensor([[1.0, 2.0]]))
    tensor([[0., 6., 2.]])
    """
    return AffineMap.through(torch.eye(len(mean_y), len(mean_x)).to(mean_x), mean_x, mean_y)


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

    Parameters
    ----------
    cov_xy
        Cross-covariance (d_x, d_y) of paired rows.
    mean_x, mean_y
        Means (d_x,) and (d_y,) that the map sends one to the other; None: a linear map.
    cov_xx
        Covariance (d_x, d_x), with which a common scale is fitted too; None: no scale.
    determinant
        +1 or -1 fixes the sign (square maps only); None: either.
    rank
        A partial isometry of so many leading directions, zero on the others, of which few pairs say nothing; None: all.

    Returns
    -------
    AffineMap from d_x to d_y dimensions.

    Raises
    ------
    ValueError
        For a rank outside [1, min(d_x, d_y)] or beside a determinant, and for a determinant that cannot be had.

    References
    ----------
    Schönemann (1966), A generalized solution of the orthogonal Procrustes problem.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import procrustes
    >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    >>> turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    >>> procrustes(x.T @ (x @ turn.T)).matrix.allclose(turn, atol=1e-4)
    True
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
    return AffineMap.through(matrix, mean_x, mean_y)


def ridge(
    cov_xx: Float[Tensor, "d_x d_x"],
    cov_xy: Float[Tensor, "d_x d_y"],
    *,
    alpha: float = 1e-3,
    mean_x: Tensor | None = None,
    mean_y: Tensor | None = None,
) -> AffineMap:
    """Ridge regression from x to y, from covariances.

    Parameters
    ----------
    cov_xx, cov_xy
        Covariances (d_x, d_x) and (d_x, d_y).
    alpha
        Penalty >= 0, relative to the mean variance of x (tr cov_xx / d_x). 0 is least squares on the range of `cov_xx`:
        directions that x does not have (constant or duplicated columns, fewer rows than columns) count for nothing.
    mean_x, mean_y
        Means (d_x,) and (d_y,) that the map sends one to the other; None: a linear map.

    Returns
    -------
    AffineMap from d_x to d_y dimensions.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import ridge
    >>> cov_xx, weights = torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([[2.0, 3.0]])
    >>> ridge(cov_xx, cov_xx @ weights.T, alpha=0.0).matrix.round(decimals=3)
    tensor([[2., 3.]])
    """
    if alpha < 0:
        raise ValueError(f"alpha: must be >= 0, got {alpha}")
    if alpha == 0:
        white = inverse_sqrt(cov_xx)
        return AffineMap.through((white @ (white @ cov_xy)).mT, mean_x, mean_y)
    d = cov_xx.shape[0]
    penalty = alpha * cov_xx.diagonal().sum() / d
    regular = cov_xx + penalty * torch.eye(d, dtype=cov_xx.dtype, device=cov_xx.device)
    factor, failed = torch.linalg.cholesky_ex(regular)
    if int(failed):
        matrix = (torch.linalg.pinv(regular, hermitian=True) @ cov_xy).mT
    else:
        matrix = torch.cholesky_solve(cov_xy, factor).mT
    return AffineMap.through(matrix, mean_x, mean_y)


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
    return AffineMap.through(reduced_rank_factors(cov_xx, cov_xy, alpha=alpha)(rank), mean_x, mean_y)


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


def gaussian_transport(
    cov_x: Float[Tensor, "d d"],
    cov_y: Float[Tensor, "d d"],
    *,
    mean_x: Tensor | None = None,
    mean_y: Tensor | None = None,
    method: str = "coral",
    tolerance: float = 1e-12,
) -> AffineMap:
    """Map that gives x the mean and covariance of y.

    Parameters
    ----------
    cov_x, cov_y
        Covariances (d, d).
    mean_x, mean_y
        Means (d,) that the map sends one to the other; None: a linear map.
    method
        "coral" (whiten, then colour) or "optimal" (least movement: optimal transport between Gaussians).
    tolerance
        Directions of x with less than this share of its largest eigenvalue count as none and are mapped to zero.

    Returns
    -------
    AffineMap of d dimensions.

    Raises
    ------
    ValueError
        For an unknown method.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import gaussian_transport
    >>> cov_x, cov_y = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 1.0]))
    >>> gaussian_transport(cov_x, cov_y, method="optimal").matrix.round(decimals=3).diagonal()
    tensor([3.0000, 0.5000])
    """
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
    return AffineMap.through(matrix, mean_x, mean_y)
