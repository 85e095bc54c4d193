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
    """Entropy -sum p log p of the spectrum scaled to sum to one.

    Parameters
    ----------
    variances
        (*b, d) spectra; negative values count as zero.

    Returns
    -------
    Entropies (*b,) in nats.

    Raises
    ------
    ValueError
        Where a total variance is zero.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import von_neumann_entropy
    >>> round(float(von_neumann_entropy(torch.ones(4)).exp()), 4)
    4.0
    """
    return torch.special.entr(_distribution(variances)).sum(-1)


def effective_rank(variances: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Effective rank exp(von Neumann entropy): k equal variances give k.

    Parameters
    ----------
    variances
        (*b, d) spectra; negative values count as zero.

    Returns
    -------
    Ranks (*b,) in [1, d].

    Raises
    ------
    ValueError
        Where a total variance is zero.

    References
    ----------
    Roy & Vetterli (2007), The effective rank: a measure of effective dimensionality.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import effective_rank
    >>> effective_rank(torch.tensor([[2.0, 2.0, 0.0], [1.0, 0.0, 0.0]])).round(decimals=4).tolist()
    [2.0, 1.0]
    """
    return von_neumann_entropy(variances).exp()


def participation_ratio(variances: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Participation ratio (sum v)^2 / sum v^2: k equal variances give k.

    Parameters
    ----------
    variances
        (*b, d) spectra; negative values count as zero.

    Returns
    -------
    Ratios (*b,) in [1, d].

    Raises
    ------
    ValueError
        Where a total variance is zero.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import participation_ratio
    >>> round(float(participation_ratio(torch.tensor([3.0, 1.0]))), 4)
    1.6
    """
    return 1 / _distribution(variances).square().sum(-1)


def explained_ratio(variances: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Cumulative share of the total variance.

    Parameters
    ----------
    variances
        (*b, d) spectra in descending order; negative values count as zero.

    Returns
    -------
    Shares (*b, d): entry i is that of the first i + 1 directions.

    Raises
    ------
    ValueError
        Where a total variance is zero.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import explained_ratio
    >>> explained_ratio(torch.tensor([3.0, 1.0])).tolist()
    [0.75, 1.0]
    """
    return _distribution(variances).cumsum(-1)


def power_law_exponent(variances: Float[Tensor, " d"], *, first: int = 1, last: int | None = None) -> Float[Tensor, ""]:
    """Exponent a of variance_i ~ i^-a by least squares in log-log.

    Parameters
    ----------
    variances
        (d,) in descending order; values that are not positive are left out.
    first, last
        Ranks that are fitted, 1-based, both included; last None: d.

    Returns
    -------
    Scalar tensor.

    Raises
    ------
    ValueError
        For fewer than two positive values in the range.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import power_law_exponent
    >>> round(float(power_law_exponent(torch.arange(1, 50).double() ** -1.5)), 4)
    1.5
    """
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
    """Coding rate 1/2 logdet(I + d/(n eps^2) Z'Z), in the smaller Gram matrix.

    Parameters
    ----------
    z
        Rows (*b, n, d).
    epsilon
        Precision eps of the code, > 0, in the unit of z.
    weights
        (*c, n), not negative, *c broadcast against *b: the rate of weighted rows,
        1/2 logdet(I + d/(sum w eps^2) Z' diag(w) Z), one for each row of weights; weights that are all zero give 0.

    Returns
    -------
    Rates in nats, (*b,), or broadcast with (*c,).

    References
    ----------
    Ma, Derksen, Hong & Wright (2007), Segmentation of multivariate mixed data via lossy data coding and compression.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import coding_rate
    >>> spread, flat = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> bool(coding_rate(spread) > coding_rate(flat)), round(float(coding_rate(spread).exp()), 4)
    (True, 5.0)
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

    Where the columns of `membership` sum to 1 it is at most `coding_rate(z)`.

    Parameters
    ----------
    z
        Rows (n, d).
    membership
        (g, n): hard or soft groups, or n rows of a doubly stochastic matrix, each with its own neighbourhood.
    epsilon
        Precision of the code, > 0, in the unit of z.

    Returns
    -------
    Scalar tensor, in nats.

    Raises
    ------
    ValueError
        Where `membership` does not have a column a row, and for `epsilon` that is not positive.

    References
    ----------
    Yu et al. (2020), arXiv 2006.08558. Ding et al. (2023), arXiv 2301.01805.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import coding_rate, compressed_coding_rate
    >>> groups = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    >>> z = groups.T  # two rows along each axis
    >>> bool(compressed_coding_rate(z, groups) < coding_rate(z))
    True
    """
    if membership.shape[-1] != z.shape[0]:
        raise ValueError(f"membership: expected {z.shape[0]} columns, got {tuple(membership.shape)}")
    share = membership.sum(-1) / z.shape[0]
    return (share * coding_rate(z, epsilon=epsilon, weights=membership)).sum()


def compression_rate(
    z: Float[Tensor, "*b n d"], bases: Float[Tensor, "k d p"], *, epsilon: float = 0.5
) -> Float[Tensor, "*b"]:
    """R^c(Z | U) = Σ_k ½ logdet(I + p/(n ε²) (Z U_k)'(Z U_k)): the rate of tokens coded in k subspaces.

    Parameters
    ----------
    z
        Tokens (*b, n, d).
    bases
        (k, d, p), a basis for each subspace.
    epsilon
        Precision ε of the code, > 0, in the unit of z.

    Returns
    -------
    Rates (*b,) in nats.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import compression_rate
    >>> inside, outside = torch.eye(4)[None, :, :2], torch.eye(4)[None, :, 2:]
    >>> z = torch.eye(4)[:2]
    >>> [round(float(compression_rate(z, bases).exp()), 4) for bases in (inside, outside)]
    [5.0, 1.0]
    """
    return coding_rate(torch.einsum("...nd,kdp->...knp", z, bases), epsilon=epsilon).sum(-1)


def compression_gradient(
    z: Float[Tensor, "*b n d"], bases: Float[Tensor, "k d p"], *, epsilon: float = 0.5
) -> Float[Tensor, "*b n d"]:
    """Gradient of `compression_rate` in z, in closed form, solved in the smaller of n x n and p x p.

    Parameters
    ----------
    z
        Tokens (*b, n, d).
    bases
        (k, d, p), a basis for each subspace.
    epsilon
        Precision of the code, > 0, in the unit of z.

    Returns
    -------
    Gradient (*b, n, d).

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import compression_gradient, compression_rate
    >>> z, bases = torch.eye(4)[:2].requires_grad_(), torch.eye(4)[None, :, :2]
    >>> compression_rate(z, bases).backward()
    >>> z.grad.allclose(compression_gradient(z, bases), atol=1e-4)
    True
    """
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
    """ΔR = R(Z) - R^c: what coding in groups saves.

    Parameters
    ----------
    z
        Rows (*b, n, d).
    groups
        Subspaces: one batch of k, or their bases (k, d, p). R^c is `compression_rate`, whose constant is p/(n ε²) where
        that of R is d/(n ε²), so that ΔR may be negative. Or labels (n,) of the rows (z without batch): R^c is
        `compressed_coding_rate`, and ΔR is not negative.
    epsilon
        Precision ε of the code, > 0, in the unit of z.

    Returns
    -------
    Reductions (*b,) in nats.

    Raises
    ------
    ValueError
        For groups that are neither, and for `epsilon` that is not positive.

    References
    ----------
    Yu et al. (2020), arXiv 2006.08558; Yu et al. (2023), arXiv 2311.13110.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import rate_reduction
    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> right, mixed = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    >>> bool(rate_reduction(z, right) > rate_reduction(z, mixed))
    True
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
