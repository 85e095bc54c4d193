"""Principal angles between subspaces given by orthonormal bases, and the distances and overlaps built on them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Inexact
from torch import Tensor


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both bases in double precision, orthonormal to it, and the dtype that the answer is given in."""
    if a.shape[-2] != b.shape[-2]:
        raise ValueError(f"b: the subspaces live in different dimensions, {a.shape[-2]} and {b.shape[-2]}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    wide = torch.promote_types(dtype, torch.float64)
    # A basis rounded to float32 spans the right subspace to 1e-8, but its columns are orthonormal to 1e-7 only, and
    # that would be the error of small angles.
    a, b = (basis if basis.dtype == wide else torch.linalg.qr(basis.to(wide))[0] for basis in (a, b))
    return a, b, dtype


def principal_vectors(
    a: Inexact[Tensor, "*b d p"], b: Inexact[Tensor, "*b e q"]
) -> tuple[Inexact[Tensor, "*b d k"], Inexact[Tensor, "*b d k"], Float[Tensor, "*b k"]]:
    """Principal vectors in each of two subspaces, and the principal angles between them.

    Angles are accurate near 0 and near pi/2: cosines come from an SVD of a'b, and where a cosine is large the sine is
    measured instead, as the distance of the principal vector from the other subspace. Computed in double precision and
    given in that of the bases (float32 for half precision).

    Parameters
    ----------
    a, b
        Bases (*b, d, p) and (*b, d, q) with orthonormal columns, real or complex.

    Returns
    -------
    Vectors in a and in b, (*b, d, k) each, and angles (*b, k) in radians, ascending; k = min(p, q).

    Raises
    ------
    ValueError
        Where the subspaces live in different dimensions.

    References
    ----------
    Björck & Golub (1973), Numerical methods for computing angles between linear subspaces.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import principal_vectors
    >>> a, b = torch.eye(3)[:, :2], torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.75**0.5]])
    >>> u, v, angles = principal_vectors(a, b)
    >>> angles.rad2deg().round().tolist(), (u * v).sum(0).round(decimals=4).tolist()
    ([0.0, 60.0], [1.0, 0.5])
    """
    a, b, dtype = _pair(a, b)
    left, cosines, right = torch.linalg.svd(a.mH @ b, full_matrices=False)
    u, v = a @ left, b @ right.mH
    cosines = cosines.clamp(0, 1)
    # Within a cluster of cosines near one the SVD mixes vectors whose angles differ, so the small angles are taken
    # from a second SVD, of the residual of b's principal vectors outside a.
    near = cosines > math.sqrt(0.5)
    residual = v - a @ (a.mH @ v)
    residual = torch.where(near.unsqueeze(-2), residual, torch.zeros_like(residual))
    _, sines, turn = torch.linalg.svd(residual, full_matrices=False)
    sines = sines.flip(-1)
    k = cosines.shape[-1]
    count = near.sum(-1, keepdim=True)
    index = torch.arange(k, device=a.device)
    # `sines` ascending now has k - count zeros (the masked columns) in front; they are rolled to the back.
    shift = (index + (k - count)) % k
    small = torch.gather(sines, -1, shift.expand(cosines.shape))
    angles = torch.where(near, torch.asin(small.clamp(0, 1)), torch.acos(cosines))
    order = turn.mH.flip(-1)
    rotation = torch.gather(order, -1, shift.expand(cosines.shape).unsqueeze(-2).expand(order.shape))
    v_small = v @ rotation.to(v.dtype)
    v = torch.where(near.unsqueeze(-2), v_small, v)
    projected = a @ (a.mH @ v)
    norm = torch.linalg.vector_norm(projected, dim=-2, keepdim=True)
    u = torch.where(near.unsqueeze(-2), projected / norm.clamp_min(torch.finfo(angles.dtype).tiny), u)
    return u.to(dtype), v.to(dtype), angles.to(dtype.to_real())


def principal_angles(a: Inexact[Tensor, "*b d p"], b: Inexact[Tensor, "*b e q"]) -> Float[Tensor, "*b k"]:
    """Principal angles between the spans of two orthonormal bases.

    Accurate near 0 and near pi/2, as in `principal_vectors`.

    Parameters
    ----------
    a, b
        Bases (*b, d, p) and (*b, d, q) with orthonormal columns, real or complex.

    Returns
    -------
    Angles (*b, k) in radians, ascending; k = min(p, q).

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import principal_angles
    >>> plane, line = torch.eye(3)[:, :2], torch.tensor([[0.0], [0.6], [0.8]])
    >>> principal_angles(plane, line).cos().round(decimals=4)
    tensor([0.6000])
    """
    return principal_vectors(a, b)[2]


_METRICS = ("geodesic", "chordal", "projection", "spectral", "procrustes", "fubini-study", "binet-cauchy", "maximum")


def subspace_distance(a: Tensor, b: Tensor, *, metric: str = "geodesic") -> Float[Tensor, "*b"]:
    """Distance between two subspaces, from their principal angles t.

    Parameters
    ----------
    a, b
        Bases (*b, d, p) and (*b, d, q) with orthonormal columns.
    metric
        "geodesic": |t|_2 · "chordal": |sin t|_2 · "projection": |P_a - P_b|_F, also for unequal dimensions ·
        "spectral": |P_a - P_b|_2 · "procrustes": 2 |sin(t/2)|_2 · "fubini-study": acos prod cos t ·
        "binet-cauchy": sqrt(1 - prod cos^2 t) · "maximum": largest t.

    Returns
    -------
    Distances (*b,); "geodesic", "fubini-study" and "maximum" in radians.

    Raises
    ------
    ValueError
        For an unknown metric and for subspaces of different spaces.

    References
    ----------
    Ye & Lim (2016), Schubert varieties and distances between subspaces of different dimensions, arXiv 1407.0900.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import subspace_distance
    >>> a, b = torch.eye(4)[:, :2], torch.eye(4)[:, 1:3]  # they share one direction of two
    >>> [round(float(subspace_distance(a, b, metric=name)), 4) for name in ("chordal", "projection", "geodesic")]
    [1.0, 1.4142, 1.5708]
    """
    if metric not in _METRICS:
        raise ValueError(f"metric: unknown {metric!r}; known: {', '.join(_METRICS)}")
    angles = principal_angles(a, b)
    difference = abs(a.shape[-1] - b.shape[-1])
    if metric == "geodesic":
        return torch.linalg.vector_norm(angles, dim=-1)
    if metric == "chordal":
        return torch.linalg.vector_norm(angles.sin(), dim=-1)
    if metric == "projection":
        return (2 * angles.sin().square().sum(-1) + difference).sqrt()
    if metric == "spectral":
        return torch.ones_like(angles[..., -1]) if difference else angles[..., -1].sin()
    if metric == "procrustes":
        return 2 * torch.linalg.vector_norm((angles / 2).sin(), dim=-1)
    if metric == "fubini-study":
        return torch.acos(angles.cos().prod(-1).clamp(0, 1))
    if metric == "binet-cauchy":
        return (1 - angles.cos().square().prod(-1)).clamp_min(0).sqrt()
    return angles[..., -1]


def subspace_overlap(a: Tensor, b: Tensor) -> Float[Tensor, "*b"]:
    """Overlap |a'b|_F^2 / min(p, q) of two subspaces; its mean over random subspaces is `expected_overlap`.

    Parameters
    ----------
    a, b
        Bases (*b, d, p) and (*b, d, q) with orthonormal columns.

    Returns
    -------
    Overlaps (*b,) in [0, 1]: 0 where they are orthogonal, 1 where one contains the other.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import subspace_overlap
    >>> float(subspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3]))
    0.5
    """
    a, b, dtype = _pair(a, b)
    return ((a.mH @ b).abs().square().sum((-2, -1)) / min(a.shape[-1], b.shape[-1])).to(dtype.to_real())


def expected_overlap(p: int, q: int, d: int) -> float:
    """Mean `subspace_overlap` of two independent random subspaces, max(p, q)/d.

    Parameters
    ----------
    p, q
        Dimensions of the two subspaces, in [1, d].
    d
        Dimension of the space.

    Returns
    -------
    The mean, in (0, 1].

    Examples
    --------
    >>> from subspan.geometry import expected_overlap
    >>> expected_overlap(2, 5, 20)
    0.25
    """
    if not (1 <= p <= d and 1 <= q <= d):
        raise ValueError(f"p, q: must lie in [1, {d}], got {p} and {q}")
    return max(p, q) / d
