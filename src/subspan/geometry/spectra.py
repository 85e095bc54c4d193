"""Numbers that describe a spectrum: effective rank, participation ratio, power law, coding rates."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .subspace import Subspace


def _distribution(variances: Tensor) -> Tensor:
    clipped = variances.clamp_min(0)
    total = clipped.sum(-1, keepdim=True)
    if bool((total <= 0).any()):
        raise ValueError("variances: the total variance is zero")
    return clipped / total


def von_neumann_entropy(variances: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Entropy (nats) of the spectrum scaled to sum to one, -sum p log p."""
    return torch.special.entr(_distribution(variances)).sum(-1)


def effective_rank(variances: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Effective rank exp(von Neumann entropy): k equal variances give k (Roy & Vetterli, 2007)."""
    return von_neumann_entropy(variances).exp()


def participation_ratio(variances: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Participation ratio (sum v)^2 / sum v^2."""
    return 1 / _distribution(variances).square().sum(-1)


def explained_ratio(variances: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Cumulative share of the total variance, for variances in descending order."""
    return _distribution(variances).cumsum(-1)


def power_law_exponent(variances: Float[Tensor, " d"], *, first: int = 1, last: int | None = None) -> Float[Tensor, ""]:
    """Exponent a of variance_i ~ i^-a by least squares in log-log over ranks `first`..`last` (1-based, inclusive)."""
    last = variances.numel() if last is None else min(last, variances.numel())
    ranks = torch.arange(1, variances.numel() + 1, dtype=torch.float64, device=variances.device)[first - 1 : last]
    values = variances.double()[first - 1 : last]
    kept = values > 0
    if int(kept.sum()) < 2:
        raise ValueError("variances: a power law needs at least two positive values in the range")
    x, y = ranks[kept].log(), values[kept].log()
    x = x - x.mean()
    return -(x * (y - y.mean())).sum() / x.square().sum()


def coding_rate(
    z: Float[Tensor, "*b n d"], *, epsilon: float = 0.5, weights: Float[Tensor, "*c n"] | None = None
) -> Float[Tensor, "*_"]:
    """Coding rate 1/2 logdet(I + d/(n eps^2) Z'Z), in nats, in the smaller Gram matrix (Ma et al., 2007).

    weights (*c, n), non-negative, *c broadcast against *b: the rate of weighted rows, 1/2 logdet(I + d/(sum w eps^2)
    Z' diag(w) Z), one for each row of weights; rows of weights that are zero give 0.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon: must be positive, got {epsilon}")
    n, d = z.shape[-2:]
    if weights is None:
        gram, total = z.mT @ z if d <= n else z @ z.mT, z.new_tensor(float(n))
    else:
        # All Gram matrices in one product with the rows' outer products, which are few numbers for d below n.
        outer = (z.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
        gram = (weights @ outer if z.ndim == 2 else torch.einsum("...n,...np->...p", weights, outer)).unflatten(
            -1, (d, d)
        )
        total = weights.sum(-1).unsqueeze(-1).unsqueeze(-1)
        total = torch.where(total > 0, total, torch.ones_like(total))
    eye = torch.eye(gram.shape[-1], dtype=z.dtype, device=z.device)
    return 0.5 * torch.linalg.slogdet(eye + gram * (d / (total * epsilon**2)))[1]


def compressed_coding_rate(
    z: Float[Tensor, "n d"], membership: Float[Tensor, "g n"], *, epsilon: float = 0.5
) -> Float[Tensor, ""]:
    """Coding rate of groups of rows, sum_j (sum_i m_ji / n) coding_rate(Z, weights=m_j): what MCR² subtracts.

    membership (g, n): hard or soft groups, or n rows of a doubly stochastic matrix, each with its own neighbourhood
    (Ding et al., 2023). Where the columns sum to 1 it is at most `coding_rate(z)`. Source: Yu et al. (2020).
    """
    if membership.shape[-1] != z.shape[0]:
        raise ValueError(f"membership: expected {z.shape[0]} columns, got {tuple(membership.shape)}")
    share = membership.sum(-1) / z.shape[0]
    return (share * coding_rate(z, epsilon=epsilon, weights=membership)).sum()


def compression_rate(
    z: Float[Tensor, "*b n d"], bases: Float[Tensor, "k d p"], *, epsilon: float = 0.5
) -> Float[Tensor, "*b"]:
    """R^c(Z | U) = Σ_k ½ logdet(I + p/(n ε²) (Z U_k)'(Z U_k)), nats: the rate of tokens coded in k subspaces."""
    return coding_rate(torch.einsum("...nd,kdp->...knp", z, bases), epsilon=epsilon).sum(-1)


def compression_gradient(
    z: Float[Tensor, "*b n d"], bases: Float[Tensor, "k d p"], *, epsilon: float = 0.5
) -> Float[Tensor, "*b n d"]:
    """Gradient of `compression_rate` in z, in closed form, solved in the smaller of n x n and p x p."""
    n, p = z.shape[-2], bases.shape[-1]
    scale = p / (n * epsilon**2)
    w = torch.einsum("...nd,kdp->...knp", z, bases)
    if p <= n:
        gram = torch.eye(p, dtype=z.dtype, device=z.device) + scale * w.mT @ w
        inner = torch.linalg.solve(gram, w.mT).mT
    else:
        gram = torch.eye(n, dtype=z.dtype, device=z.device) + scale * w @ w.mT
        inner = torch.linalg.solve(gram, w)
    return scale * torch.einsum("...knp,kdp->...nd", inner, bases)


def rate_reduction(
    z: Float[Tensor, "*b n d"],
    groups: Subspace | Float[Tensor, "k e p"] | Int[Tensor, " m"],
    *,
    epsilon: float = 0.5,
) -> Float[Tensor, "*b"]:
    """ΔR = R(Z) - R^c: what coding in groups saves, nats. groups: subspaces, one batch of k, or labels of the rows.

    Subspaces: R^c is `compression_rate`, whose constant is p/(n ε²) where that of R is d/(n ε²), so that ΔR may be
    negative. Labels (z without batch): R^c is `compressed_coding_rate`, and ΔR is not negative. Raises ValueError for
    groups that fit neither. Source: Yu et al. (2020; 2023, arXiv 2311.13110).
    """
    bases = groups.basis if isinstance(groups, Subspace) else groups
    if bases.ndim == 1 and not bases.is_floating_point():
        if z.ndim != 2 or len(bases) != len(z):
            raise ValueError(f"groups: {len(bases)} labels, but z has shape {tuple(z.shape)}; one a row is needed")
        membership = (bases.unique().unsqueeze(1) == bases).to(z)
        return coding_rate(z, epsilon=epsilon) - compressed_coding_rate(z, membership, epsilon=epsilon)
    if bases.ndim != 3 or bases.shape[1] != z.shape[-1]:
        raise ValueError(f"groups: expected bases (k, {z.shape[-1]}, p) or labels (n,), got {tuple(bases.shape)}")
    return coding_rate(z, epsilon=epsilon) - compression_rate(z, bases.to(z), epsilon=epsilon)
