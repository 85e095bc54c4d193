"""Leading eigenspaces not cut inside a cluster of equal eigenvalues, with a derivative that holds there as well."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from subspan.geometry import Subspace


class _Leading(torch.autograd.Function):
    """Leading eigenvectors as a basis of their span: the derivative has poles only at a gap that is cut through."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, values: Tensor, vectors: Tensor, rank: int) -> Tensor:
        ctx.save_for_backward(values, vectors)
        ctx.rank = rank
        return vectors[..., :rank].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        values, vectors = ctx.saved_tensors
        inside, outside = vectors[..., : ctx.rank], vectors[..., ctx.rank :]
        gaps = values[..., None, : ctx.rank] - values[..., ctx.rank :, None]
        turned = (outside.mH @ grads[0]) * torch.where(gaps > 0, 1 / gaps, 0)
        half = outside @ turned @ inside.mH
        return (half + half.mH) / 2, None, None, None


def leading_eigenspace(
    matrix: Inexact[Tensor, "*b d d"], rank: int, *, cut: str = "widen", tolerance: float | None = None
) -> Subspace:
    """Span of the `rank` largest eigenvectors of a symmetric or Hermitian matrix, moved to a gap where it has none.

    Differentiable in the matrix for functions of the span (of `subspace.projector`, not of one basis), also where
    eigenvalues inside or outside are equal. Half precision is computed in float32.

    Parameters
    ----------
    matrix
        (*b, d, d).
    rank
        Directions asked for.
    cut
        Where eigenvalues rank and rank + 1 are equal, "widen" takes the whole cluster, "narrow" none of it, each with a
        warning, and "exact" cuts it all the same, with derivatives that leave equal pairs out.
    tolerance
        Eigenvalues nearer than this times the largest absolute one are equal; None: the square root of the precision of
        the dtype.

    Returns
    -------
    Subspace with `variances` (its eigenvalues) and `spectrum` (all of them, descending, of either sign).

    Raises
    ------
    ValueError
        For a rank outside [1, d], NaN, a cluster that "narrow" leaves nothing of, or a batch whose members would need
        different ranks.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import leading_eigenspace
    >>> leading_eigenspace(torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0])), 2, cut="narrow").dim
    1
    """
    if cut not in ("widen", "narrow", "exact"):
        raise ValueError(f"cut: expected 'widen', 'narrow' or 'exact', got {cut!r}")
    d = matrix.shape[-1]
    if not 1 <= rank <= d:
        raise ValueError(f"rank: must lie in [1, {d}], got {rank}")
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("matrix: contains NaN or infinity")
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(wide)
        values, vectors = values.flip(-1), vectors.flip(-1)
        chosen = rank if cut == "exact" else _at_gap(values, rank, cut, tolerance)
    basis = _Leading.apply(wide, values, vectors, chosen)
    return Subspace(basis, variances=values[..., :chosen], spectrum=values)  # pyright: ignore[reportArgumentType]


def _at_gap(values: Float[Tensor, "*b d"], rank: int, cut: str, tolerance: float | None) -> int:
    least = torch.finfo(values.dtype).eps ** 0.5 if tolerance is None else tolerance
    apart = -values.diff(dim=-1) > least * values.abs().amax(-1, keepdim=True)
    # Ranks 0 and d never cut a cluster.
    free = torch.nn.functional.pad(apart, (1, 1), value=True).reshape(-1, values.shape[-1] + 1)
    ranks = torch.arange(free.shape[1], device=free.device)
    if cut == "widen":
        found = torch.where(free & (ranks >= rank), ranks, free.shape[1]).amin(-1)
    else:
        found = torch.where(free & (ranks <= rank), ranks, -1).amax(-1)
    found = sorted(set(found.tolist()))
    if len(found) > 1:
        raise ValueError(f"matrix: the batch needs ranks {found} to cut no cluster; take its members one by one")
    if found[0] == 0:
        raise ValueError(f"rank: the {rank} leading eigenvalues equal those after them, and narrowing leaves none")
    if found[0] != rank:
        warnings.warn(
            f"eigenvalues {rank} and {rank + 1} are equal to {least:g}, so that no {rank} directions are defined; "
            f"{found[0]} are given (cut={cut!r})",
            stacklevel=3,
        )
    return found[0]
