"""Entropic transport: between two sets, and of a symmetric affinity with its derivative."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_RIDGE = 1e-7


def doubly_stochastic(
    affinity: Float[Tensor, "*b n n"], *, eta: float = 0.175, n_iter: int = 20, gradient: str = "implicit"
) -> Float[Tensor, "*b n n"]:
    """Symmetric G with rows that sum to 1 which maximises <G, K> - eta sum G log G.

    G = exp(K/eta + f_i + f_j) by the averaged iteration f <- (f - logsumexp_j(K/eta + f)) / 2 in the log domain, which
    keeps G symmetric at every step. Marginals are right to some 1e-5 in 10 steps and 1e-8 in 20 at eta of the order of
    K's spread; a smaller eta needs more steps. Half precision is computed in float32.

    Parameters
    ----------
    affinity
        K (*b, n, n), symmetric.
    eta
        Entropy weight > 0: towards infinity G is 1/n, towards 0 a permutation.
    n_iter
        Steps, at least 1.
    gradient
        "implicit", of the exact solution by one linear solve, or "unrolled", through the iterations.

    Returns
    -------
    G (*b, n, n).

    Raises
    ------
    ValueError
        For NaN and an affinity that is not square and symmetric.

    References
    ----------
    Cuturi (2013), arXiv 1306.0895. Knight, Ruiz & Uçar (2014), A symmetry preserving algorithm for matrix scaling.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import doubly_stochastic
    >>> affinity = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.2], [0.0, 0.2, 1.0]])
    >>> plan = doubly_stochastic(affinity)
    >>> plan.sum(1).round(decimals=4).tolist(), bool(plan[0, 1] > plan[1, 2] > plan[0, 2])
    ([1.0, 1.0, 1.0], True)
    """
    if not eta > 0:
        raise ValueError(f"eta: must be positive, got {eta}")
    if n_iter < 1:
        raise ValueError(f"n_iter: at least 1, got {n_iter}")
    if gradient not in ("implicit", "unrolled"):
        raise ValueError(f"gradient: 'implicit' or 'unrolled', got {gradient!r}")
    if affinity.ndim < 2 or affinity.shape[-1] != affinity.shape[-2]:
        raise ValueError(f"affinity: expected square matrices, got {tuple(affinity.shape)}")
    wide = affinity.float() if affinity.dtype in (torch.float16, torch.bfloat16) else affinity
    with torch.no_grad():
        if not bool(torch.isfinite(wide).all()):
            raise ValueError("affinity: contains NaN or infinity")
        tolerance = 1e-4 * float(wide.abs().max()) + torch.finfo(wide.dtype).tiny
        if not float((wide - wide.mT).abs().max()) <= tolerance:
            raise ValueError("affinity: is not symmetric; use (K + K') / 2")
    if gradient == "unrolled":
        return _plan(wide / eta, n_iter).to(affinity.dtype)
    return _Implicit.apply(wide / eta, n_iter).to(affinity.dtype)  # pyright: ignore[reportOptionalMemberAccess]


def _plan(logits: Tensor, n_iter: int) -> Tensor:
    f = -logits.logsumexp(-1) / 2
    for _ in range(n_iter):
        f = (f - (logits + f.unsqueeze(-2)).logsumexp(-1)) / 2
    return (logits + f.unsqueeze(-1) + f.unsqueeze(-2)).exp()


class _Implicit(torch.autograd.Function):
    """The plan, with the derivative of the fixed point: dG = G ∘ (dL + df 1' + 1 df'), rows of dG summing to 0."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, n_iter: int) -> Tensor:
        plan = _plan(logits, n_iter)
        ctx.save_for_backward(plan)
        return plan

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (plan,) = ctx.saved_tensors
        weighted = plan * grads[0]
        marginal = weighted.sum(-1) + weighted.sum(-2)
        # (diag(row sums) + G) df = -(G ∘ dL) 1; the matrix is positive semidefinite.
        system = plan + torch.diag_embed(plan.sum(-1) * (1 + _RIDGE))
        v = torch.linalg.solve(system, marginal.unsqueeze(-1)).squeeze(-1)
        return weighted - v.unsqueeze(-1) * plan, None


def transport_plan(cosines: Float[Tensor, "n m"], temperature: float, *, n_iter: int = 20) -> Float[Tensor, "n m"]:
    """Entropic transport between two sets of equal mass, of the kernel exp((cosines - 1) / temperature).

    Parameters
    ----------
    cosines
        (n, m) similarities of the two sets.
    temperature
        Entropy weight > 0; a small one gives a sharp plan.
    n_iter
        Steps, at least 1.

    Returns
    -------
    Plan (n, m): columns sum to 1 / m, rows nearly to 1 / n.

    References
    ----------
    Cuturi (2013), arXiv 1306.0895.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import transport_plan
    >>> transport_plan(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 0.05).round(decimals=4).tolist()
    [[0.0, 0.5], [0.5, 0.0]]
    """
    if n_iter < 1:
        raise ValueError(f"n_iter: at least 1, got {n_iter}")
    kernel = ((cosines - 1) / temperature).exp()
    left, right = kernel.new_ones(kernel.shape[0]), kernel.new_ones(kernel.shape[1])
    for _ in range(n_iter):
        left = 1 / (kernel @ right).clamp_min(1e-30) / len(kernel)
        right = 1 / (left @ kernel).clamp_min(1e-30) / kernel.shape[1]
    return left.unsqueeze(1) * kernel * right
