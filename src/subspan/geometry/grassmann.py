"""The Grassmann manifold in orthonormal bases (*b, d, k): tangents, geodesics, transport, means.

Geodesics and transport follow Edelman, Arias & Smith (1998).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor


def orthonormalize(x: Inexact[Tensor, "*b d k"]) -> Inexact[Tensor, "*b d k"]:
    """Orthonormal basis of the columns by QR with a positive diagonal, so the result is unique and continuous."""
    if x.shape[-1] > x.shape[-2]:
        raise ValueError(f"x: {x.shape[-1]} columns cannot be independent in {x.shape[-2]} dimensions")
    q, r = torch.linalg.qr(x)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    magnitude = diagonal.abs()
    phase = torch.where(magnitude > 0, diagonal / torch.where(magnitude > 0, magnitude, 1), torch.ones_like(diagonal))
    return q * phase.unsqueeze(-2)


class _Polar(torch.autograd.Function):
    """The polar factor, with its own derivative: that of the SVD has poles at equal singular values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        ctx.save_for_backward(u, s, vh)
        return u @ vh

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        u, s, vh = ctx.saved_tensors
        inner = u.mH @ grads[0] @ vh.mH
        within = (inner - inner.mH) / (s.unsqueeze(-1) + s.unsqueeze(-2))
        outside = (grads[0] @ vh.mH - u @ inner) / s.unsqueeze(-2)
        return (u @ within + outside) @ vh


def polar(x: Inexact[Tensor, "*b d k"]) -> Inexact[Tensor, "*b d k"]:
    """Nearest matrix with orthonormal columns (polar factor) in the Frobenius norm; differentiable at full rank."""
    return _Polar.apply(x)  # pyright: ignore[reportReturnType]


def random_basis(
    d: int,
    k: int,
    *,
    batch: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform (Haar) orthonormal basis (*batch, d, k)."""
    if not 1 <= k <= d:
        raise ValueError(f"k: must lie in [1, {d}], got {k}")
    device = generator.device if generator is not None and device is None else device
    return orthonormalize(torch.randn(*batch, d, k, generator=generator, dtype=dtype, device=device))


def tangent_projection(basis: Inexact[Tensor, "*b d k"], x: Inexact[Tensor, "*b d k"]) -> Inexact[Tensor, "*b d k"]:
    """Horizontal part of `x` at `basis`: what changes the span, not only the basis."""
    return x - basis @ (basis.mH @ x)


def geodesic(
    basis: Inexact[Tensor, "*b d k"], tangent: Inexact[Tensor, "*b d k"], t: float = 1.0
) -> Inexact[Tensor, "*b d k"]:
    """Point at time `t` on the geodesic from `basis` with horizontal velocity `tangent` (the exponential map)."""
    u, s, vh = torch.linalg.svd(tangent, full_matrices=False)
    cosine, sine = (s * t).cos().unsqueeze(-2), (s * t).sin().unsqueeze(-2)
    moved = (basis @ vh.mH) * cosine + u * sine
    return orthonormalize(moved @ vh)


def logarithm(basis: Inexact[Tensor, "*b d k"], target: Inexact[Tensor, "*b d k"]) -> Inexact[Tensor, "*b d k"]:
    """Horizontal tangent at `basis` whose geodesic reaches the span of `target` at time 1.

    Stable for all principal angles below pi/2 and returns one of the minimal tangents at pi/2
    (Bendokat, Zimmermann & Absil, 2024).
    """
    if basis.shape[-2:] != target.shape[-2:]:
        raise ValueError(f"target: expected shape {tuple(basis.shape[-2:])}, got {tuple(target.shape[-2:])}")
    q, _, rh = torch.linalg.svd(target.mH @ basis, full_matrices=False)
    aligned = target @ (q @ rh)
    u, sine, vh = torch.linalg.svd(tangent_projection(basis, aligned), full_matrices=False)
    # The cosines follow from the same right vectors, so the angle is right at both ends of [0, pi/2].
    cosine = torch.linalg.vector_norm(basis.mH @ aligned @ vh.mH, dim=-2)
    return (u * torch.atan2(sine, cosine).unsqueeze(-2)) @ vh


def parallel_transport(
    basis: Inexact[Tensor, "*b d k"],
    direction: Inexact[Tensor, "*b d k"],
    x: Inexact[Tensor, "*b d k"],
    t: float = 1.0,
) -> Inexact[Tensor, "*b d k"]:
    """Transport the horizontal `x` along the geodesic from `basis` in `direction`, to time `t`.

    The result is horizontal at `geodesic(basis, direction, t)` expressed in the un-rotated frame of that geodesic.
    """
    u, s, vh = torch.linalg.svd(direction, full_matrices=False)
    inner = u.mH @ x
    turned = -(basis @ vh.mH) @ ((s * t).sin().unsqueeze(-1) * inner) + u @ ((s * t).cos().unsqueeze(-1) * inner)
    return turned + x - u @ inner


def geodesic_functions(
    gram: Inexact[Tensor, "*b k k"], t: float | Float[Tensor, "*b"] = 1.0
) -> tuple[Inexact[Tensor, "*b k k"], Inexact[Tensor, "*b k k"], Inexact[Tensor, "*b k k"]]:
    """cos(ts), sin(ts)/s and (1 - cos(ts))/s² of a tangent's Gram matrix V diag(s²) V', at the same V; none divides."""
    values, v = torch.linalg.eigh(gram)
    s = values.clamp_min(0).sqrt()
    t = torch.as_tensor(t, dtype=s.dtype, device=s.device).unsqueeze(-1)
    # torch.sinc(x) is sin(πx)/(πx).
    sine = t * torch.sinc(t * s / torch.pi)
    versine = 0.5 * t.square() * torch.sinc(t * s / (2 * torch.pi)).square()
    functions = torch.stack([(t * s).cos(), sine, versine], -2).unsqueeze(-2)
    cosine, sine, versine = (v.unsqueeze(-3) * functions @ v.mH.unsqueeze(-3)).unbind(-3)
    return cosine, sine, versine


def gram_geodesic(
    basis: Inexact[Tensor, "*b d k"],
    tangent: Inexact[Tensor, "*b d k"],
    t: float | Float[Tensor, "*b"] = 1.0,
    carried: Inexact[Tensor, "*b d k"] | None = None,
) -> tuple[Inexact[Tensor, "*b d k"], Inexact[Tensor, "*b d k"] | None]:
    """`geodesic`, and `parallel_transport` of `carried`, from the k x k Gram matrix of `tangent`: a step of training.

    With G'G = V diag(s²) V' the point is S V cos(ts) V' + G V sin(ts)/s V', all of it smooth functions of s² with no
    division at s = 0, so the frame is that of the geodesic. One eigendecomposition of k x k in place of an SVD of
    d x k; t may differ along the batch. The point is orthonormal to rounding, which callers that iterate must mend.
    """
    cosine, sine, versine = geodesic_functions(tangent.mH @ tangent, t)
    # As products from the left of the rows, which is how a step of training keeps its bases: sums of one layout.
    rows, direction = basis.mT, tangent.mT
    moved = (cosine.mT @ rows + sine.mT @ direction).mT
    if carried is None:
        return moved, None
    inner = tangent.mH @ carried
    return moved, (carried.mT - (sine @ inner).mT @ rows - (versine @ inner).mT @ direction).mT


def plucker(
    u: Inexact[Tensor, "*b r"], v: Inexact[Tensor, "*b r"], pairs: Int[Tensor, "2 p"] | None = None
) -> Inexact[Tensor, "*b p"]:
    """Plücker coordinates u_i v_j - u_j v_i, i < j, of the oriented plane of two vectors; p = r (r - 1) / 2.

    Their length is `parallelogram_area`; unit coordinates of two planes have inner product ± cos θ₁ cos θ₂.
    pairs: the (i, j), where a caller keeps them; torch.triu_indices(r, r, 1) otherwise.
    """
    i, j = torch.triu_indices(u.shape[-1], u.shape[-1], 1, device=u.device) if pairs is None else pairs
    return u[..., i] * v[..., j] - u[..., j] * v[..., i]


def parallelogram_area(u: Float[Tensor, "*b r"], v: Float[Tensor, "*b r"], floor: float = 0.0) -> Float[Tensor, "*b"]:
    """Area of the parallelogram of two vectors, |u ∧ v|, at least floor · |u| |v|, with a finite gradient; O(r).

    Parallel vectors have the area 0, and a direction of their plane only to rounding: floor says from where on.
    """
    return _area(u.square().sum(-1), v.square().sum(-1), (u * v).sum(-1), floor)


def pairwise_areas(
    u: Float[Tensor, "*b n r"], v: Float[Tensor, "*b m r"], floor: float = 0.0
) -> Float[Tensor, "*b n m"]:
    """`parallelogram_area` of every vector of one set with every vector of the other, from one matrix product."""
    return _area(u.square().sum(-1)[..., :, None], v.square().sum(-1)[..., None, :], u @ v.transpose(-1, -2), floor)


def _area(uu: Tensor, vv: Tensor, uv: Tensor, floor: float) -> Tensor:
    tiny = torch.finfo(uv.dtype).tiny ** 0.5
    return torch.maximum(uu * vv - uv.square(), floor**2 * uu * vv).clamp_min(tiny).sqrt()


def chordal_mean(
    bases: Inexact[Tensor, "*b m d p"],
    k: int | None = None,
    *,
    weights: Float[Tensor, "*b m"] | None = None,
    spectra: Float[Tensor, "*b m p"] | None = None,
) -> tuple[Inexact[Tensor, "*b d k"], Float[Tensor, "*b k"]]:
    """Extrinsic mean: top eigenvectors of sum_j w_j U_j L_j U_j', from its factor or itself; also their eigenvalues.

    `spectra` (default all ones) weighs the directions inside each subspace. Where they have fewer than k directions
    together, the rest is any complement, with eigenvalues 0. Not differentiable where eigenvalues are equal.
    """
    *_, m, d, p = bases.shape
    k = p if k is None else k
    if not 1 <= k <= min(d, m * p):
        raise ValueError(f"k: must lie in [1, {min(d, m * p)}], got {k}")
    scale = bases.real.new_ones((*bases.shape[:-2], p)) if spectra is None else spectra
    if weights is not None:
        if bool((weights < 0).any()) or not bool((weights.sum(-1) > 0).all()):
            raise ValueError("weights: must be non-negative with a positive sum")
        scale = scale * (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)
    else:
        scale = scale / m
    stacked = (bases * scale.sqrt().unsqueeze(-2)).movedim(-3, -2).flatten(-2)
    if d <= m * p:
        # An eigendecomposition of d x d costs a fraction of the factor's SVD.
        values, vectors = torch.linalg.eigh(stacked @ stacked.mH)
        return vectors[..., -k:].flip(-1), values[..., -k:].flip(-1).clamp_min(0)
    u, s, _ = torch.linalg.svd(stacked, full_matrices=False)
    return u[..., :k], s[..., :k].square()


def karcher_mean(
    bases: Inexact[Tensor, "m d k"],
    *,
    weights: Float[Tensor, " m"] | None = None,
    tolerance: float = 1e-10,
    max_iter: int = 200,
) -> Inexact[Tensor, "d k"]:
    """Intrinsic (Frechet) mean by Riemannian gradient steps from the chordal mean.

    Raises ValueError when it does not settle, which happens for subspaces spread beyond a geodesic ball.
    """
    mean, _ = chordal_mean(bases, bases.shape[-1], weights=weights)
    w = torch.ones(bases.shape[0], dtype=bases.real.dtype, device=bases.device) if weights is None else weights
    w = (w / w.sum()).reshape(-1, 1, 1)
    for _ in range(max_iter):
        step = (w * logarithm(mean.expand_as(bases), bases)).sum(0)
        mean = geodesic(mean, tangent_projection(mean, step))
        if float(torch.linalg.matrix_norm(step)) < tolerance * bases.shape[-1]:
            return mean
    raise ValueError(f"bases: the mean did not settle in {max_iter} steps; the subspaces are too far apart")
