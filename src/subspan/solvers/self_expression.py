"""Each row as a combination of other rows: the solvers of self-expression, all with a coefficient of zero on itself.

Rows x_i are samples and are expected to have unit length; row i of the answer (n, n) holds the coefficients of x_i.
The sparse solvers work on blocks of rows, so that correlations are matrix products, and never hold n x n numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from .elastic_net import elastic_nets
from .neighbours import largest_per_row
from .sparse_coding import pursue

# Correlations of a block of rows, small enough to stay in a cache between the passes over them.
_BLOCK = 1 << 21
# Rows that pursue their atoms side by side, and the fewest that do so by elastic net.
_ROWS, _FEW_ROWS = 512, 16
_DENSE_ROWS = 20_000
# The ridge of clusterers by least squares, in units of `mean_energy`.
RIDGE = 0.1
# Up to here the Gram matrix of all rows is small, and looked up in place of a product a row and round.
_GRAM_ROWS = 4096

Progress = Callable[[float], None]


def ridge_self_expression(x: Float[Tensor, "n d"], alpha: float, *, zero_diagonal: bool = True) -> Float[Tensor, "n n"]:
    """min |x_i - c X|^2 + alpha |c|^2 in closed form (least squares regression; Lu et al., 2012).

    zero_diagonal: c_i = 0, C_ij = -D_ij / D_ii with D = (XX' + alpha I)^(-1); else C = XX' D. Where n > d, D comes by
    Woodbury from a d x d system. Dense: n up to 20 000.
    """
    check_dense(len(x))
    if not alpha > 0:
        raise ValueError(f"alpha: must be > 0, got {alpha}")
    n, d = x.shape
    if n > d:
        inner = x.mT @ x
        inner.diagonal().add_(alpha)
        smooth = x @ torch.linalg.solve(inner, x.mT)  # XX'(XX' + alpha I)^(-1), and D = (I - smooth) / alpha
        if not zero_diagonal:
            return smooth
        inverse = smooth.neg_()
        inverse.diagonal().add_(1)
    else:
        gram = x @ x.mT
        gram.diagonal().add_(alpha)
        inverse = torch.linalg.inv(gram)
        if not zero_diagonal:
            inverse.mul_(-alpha)
            inverse.diagonal().add_(1)
            return inverse
    c = -inverse / inverse.diagonal().unsqueeze(1)
    c.fill_diagonal_(0)
    return c


def mean_energy(x: Float[Tensor, "n d"]) -> float:
    """Mean of the min(n, d) squared singular values of rows: n / min(n, d) for rows of unit length.

    A ridge that is a multiple of it, and a nuclear norm's weight over it, mean the same for any number of rows.
    """
    return float(x.square().sum()) / min(x.shape)


def joint_factor(layers: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n r"]:
    """F (n, r), r <= n, with FF' = sum of ZZ' over layers Z: to self-expression, all of them at once.

    |F - CF|^2 is the sum of |Z - CZ|^2 for every C, so `ridge_self_expression(joint_factor(layers), alpha)` is the
    closed form of one C for all layers.
    """
    joined = torch.cat(list(layers), dim=1)
    n, d = joined.shape
    return joined if d <= n else torch.linalg.qr(joined.mT, mode="r").R.mT


def low_rank_self_expression(x: Float[Tensor, "n d"], alpha: float) -> Float[Tensor, "n n"]:
    """min |C|_* + alpha/2 |X - CX|_F^2 in closed form: U (I - S^(-2)/alpha) U' over singular values > 1/sqrt(alpha).

    alpha = inf gives the shape-interaction matrix UU'. Source: Favaro, Vidal & Ravichandran, 2011.
    """
    check_dense(len(x))
    if not alpha > 0:
        raise ValueError(f"alpha: must be > 0, got {alpha}")
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    kept = s > max(alpha**-0.5 if alpha < float("inf") else 0.0, float(s[0]) * torch.finfo(s.dtype).eps * max(x.shape))
    u, s = u[:, kept], s[kept]
    return (u * (1 - s.pow(-2) / alpha)) @ u.mT


def robust_low_rank_self_expression(
    x: Float[Tensor, "n d"], alpha: float, *, max_iter: int = 200, tolerance: float = 1e-6
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n d"]]:
    """min |C|_* + alpha |E|_{2,1} with X = CX + E, rows of E being the corrupted samples; returns (C, E).

    Inexact augmented Lagrangian in the row space of X. Source: Liu et al., Robust recovery by LRR, 2013.
    """
    check_dense(len(x))
    # With X = B Q', B (n, r): C = J B' for J (n, n) -> unknown (n, r), as the optimal C lies in the column space of X.
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    r = int((s > s[0] * torch.finfo(s.dtype).eps * max(x.shape)).sum())
    u, a = u[:, :r], s[:r].unsqueeze(1) * vh[:r]  # X = u a, C = z u' with z (n, r): CX = z a
    gram_inverse = torch.linalg.inv(torch.eye(r, dtype=x.dtype, device=x.device) + a @ a.mT)
    z, j, e = (torch.zeros(len(x), width, dtype=x.dtype, device=x.device) for width in (r, r, x.shape[1]))
    y1, y2 = torch.zeros_like(e), torch.zeros_like(j)
    mu, scale = 1e-2, float(x.abs().max())
    for _ in range(max_iter):
        left, values, right = torch.linalg.svd(z + y2 / mu, full_matrices=False)
        j = (left * (values - 1 / mu).clamp_min(0)) @ right
        z = ((x - e + y1 / mu) @ a.mT + j - y2 / mu) @ gram_inverse
        rest = x - z @ a + y1 / mu
        norms = rest.norm(dim=1, keepdim=True)
        e = rest * ((norms - alpha / mu).clamp_min(0) / norms.clamp_min(1e-300))
        gap1, gap2 = x - z @ a - e, z - j
        y1, y2, mu = y1 + mu * gap1, y2 + mu * gap2, min(mu * 1.2, 1e8)
        if max(float(gap1.abs().max()), float(gap2.abs().max())) < tolerance * scale:
            break
    return z @ u.mT, e


def omp_self_expression(
    x: Float[Tensor, "n d"], n_nonzero: int, *, tolerance: float = 1e-6, progress: Progress | None = None
) -> sparse.csr_matrix:
    """Orthogonal matching pursuit of each row by the others, at most `n_nonzero` of them (You, Robinson & Vidal, 2016).

    A row stops when its squared residual is below `tolerance`. Blocks of rows go by `pursue`.
    """
    n = len(x)
    if not 1 <= n_nonzero < n:
        raise ValueError(f"n_nonzero: must lie in [1, {n - 1}], got {n_nonzero}")
    blocks = [
        (rows, *pursue(x[rows], x, n_nonzero, tolerance, exclude=rows)) for rows in _row_blocks(n, progress, _ROWS)
    ]
    return _assemble(blocks, n)


def thresholded_similarities(
    x: Float[Tensor, "n d"], n_neighbors: int, *, progress: Progress | None = None
) -> sparse.csr_matrix:
    """exp(-2 arccos |<x_i, x_j>|) on the `n_neighbors` largest absolute inner products of each row.

    Source: Heckel & Bölcskei, Robust subspace clustering via thresholding, 2015.
    """
    n = len(x)
    if not 1 <= n_neighbors < n:
        raise ValueError(f"n_neighbors: must lie in [1, {n - 1}], got {n_neighbors}")
    blocks = []
    for rows in _row_blocks(n, progress, max(1, _BLOCK // n)):
        score = (x[rows] @ x.mT).abs_()
        score[torch.arange(len(rows), device=x.device), rows] = -1
        value, found = score.topk(n_neighbors, dim=1)
        blocks.append((rows, found, torch.exp(-2 * torch.arccos(value.clamp(0, 1)))))
    return _assemble(blocks, n)


def elastic_net_self_expression(
    x: Float[Tensor, "n d"],
    *,
    gamma: float = 50.0,
    l1_ratio: float = 0.95,
    max_support: int = 50,
    working_set: int = 32,
    n_rounds: int = 40,
    tolerance: float = 1e-4,
    progress: Progress | None = None,
) -> sparse.csr_matrix:
    """min |x_i - cX|^2 / 2 + alpha (r |c|_1 + (1 - r)/2 |c|^2) by active sets (You, Li, Robinson & Vidal, 2016).

    r = l1_ratio (1: the lasso of SSC); alpha = alpha_0 / gamma a row, alpha_0 = max |<x_i, x_j>| / r being the least at
    which c = 0. Each row starts from the `working_set` others most correlated with it; the problem there is solved
    (`elastic_nets`), and as many of those most correlated with the residual take the place of zeros, until none exceeds
    the penalty. That comes down to alpha on the way, so that few are taken that do not stay. At most `n_rounds`; at
    most `max_support` of the largest coefficients of a row are kept.
    """
    n, d = x.shape
    if n < 2:
        raise ValueError(f"x: needs at least 2 rows, got {n}")
    if not gamma > 0 or not 0 < l1_ratio <= 1:
        raise ValueError(f"gamma, l1_ratio: must be > 0 and in (0, 1], got {gamma} and {l1_ratio}")
    if max_support < 1 or working_set < 1:
        raise ValueError(f"max_support, working_set: must be at least 1, got {max_support} and {working_set}")
    if gamma <= 1:
        return sparse.csr_matrix((n, n), dtype=x.cpu().numpy().dtype)
    size = min(working_set, n - 1)
    gram = x @ x.mT if n <= _GRAM_ROWS else None
    keep = min(max_support, n - 1)
    # In place from the start: many small parts kept between large temporary ones would tear the memory up.
    others, coefficients = torch.zeros(n, keep, dtype=torch.int64, device=x.device), x.new_zeros(n, keep)
    for block in _row_blocks(n, progress, max(_FEW_ROWS, _BLOCK // 4 // max(n, 4 * size * d))):
        for rows, chosen, c in _elastic_net_block(x, gram, block, gamma, l1_ratio, size, keep, n_rounds, tolerance):
            others[rows, : chosen.shape[1]], coefficients[rows, : chosen.shape[1]] = chosen, c
    return _assemble([(torch.arange(n), others, coefficients)], n)


def _elastic_net_block(
    x: Tensor,
    gram: Tensor | None,
    rows: Tensor,
    gamma: float,
    r: float,
    size: int,
    keep: int,
    n_rounds: int,
    tolerance: float,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows, others, coefficients) of rows as they settle."""
    products = x[rows] @ x.mT
    value, chosen = largest_per_row(products.abs().scatter_(1, rows.unsqueeze(1), 0.0), size)
    live = (value[:, 0] > 0).nonzero().squeeze(1)
    coefficients, chosen = torch.zeros_like(value)[live], chosen[live]
    goal = value[live, 0] / gamma
    ridge, bound = goal * (1 / r - 1), _next_bound(value[live, 0], value[live], goal)
    # What an inexact solver leaves open must not look like a violation.
    margin = max(0.01, 10 * tolerance) if tolerance > 1e-7 else 1e-4
    for _ in range(n_rounds):
        if not len(live):
            return
        target, atoms, own = x[rows[live]], x[chosen], rows[live].unsqueeze(1)
        coefficients = elastic_nets(
            atoms @ atoms.mT if gram is None else gram[chosen.unsqueeze(2), chosen.unsqueeze(1)],
            products[live.unsqueeze(1), chosen],
            bound,
            ridge,
            target.square().sum(1),
            coefficients,
            chosen != own,
            tolerance=tolerance,
        )
        residual = target - (coefficients.unsqueeze(1) @ atoms).squeeze(1)
        # Inside the working set the conditions hold.
        outside = (residual @ x.mT).abs_().scatter_(1, chosen, 0.0).scatter_(1, own, 0.0)
        used = int((coefficients != 0).sum(1).max())
        value, found = largest_per_row(outside, min(size, max(1, len(x) - 1 - used)))
        lower = _next_bound(bound, value, goal)
        wanted = value > torch.where(lower > goal, lower, goal * (1 + margin)).unsqueeze(1)
        settled = (bound <= goal) & ~wanted[:, 0]
        place = coefficients.abs().topk(min(max(used, keep), chosen.shape[1]), dim=1).indices
        chosen, coefficients = chosen.gather(1, place), coefficients.gather(1, place)
        yield rows[live[settled]], chosen[settled, :keep], coefficients[settled, :keep]
        # A row stands for itself in the places of its working set that stay empty.
        newcomers, rest = torch.where(wanted, found, own), ~settled
        chosen = torch.cat([chosen[:, :used], newcomers], 1)[rest]
        coefficients = torch.cat([coefficients[:, :used], torch.zeros_like(value)], 1)[rest]
        live, goal, ridge, bound = live[rest], goal[rest], ridge[rest], lower[rest]
    yield rows[live], chosen[:, :keep], coefficients[:, :keep]


def _next_bound(bound: Tensor, outside: Tensor, goal: Tensor) -> Tensor:
    """Half the penalty, or as far down as those `outside` (b, m), largest first, tell what will be wanted."""
    return torch.maximum(goal, torch.minimum(bound / 2, outside[:, -1]))


def _row_blocks(n: int, progress: Progress | None, step: int) -> Iterator[Tensor]:
    for start in range(0, n, step):
        yield torch.arange(start, min(n, start + step))
        if progress is not None:
            progress(min(1.0, (start + step) / n))


def _assemble(blocks: list[tuple[Tensor, Tensor, Tensor]], n: int) -> sparse.csr_matrix:
    rows: Int[np.ndarray, " m"] = np.concatenate(
        [np.repeat(block.cpu().numpy(), found.shape[1]) for block, found, _ in blocks]
    )
    columns = np.concatenate([found.cpu().numpy().ravel() for _, found, _ in blocks])
    values = np.concatenate([value.cpu().numpy().ravel() for _, _, value in blocks])
    kept = values != 0
    return sparse.csr_matrix((values[kept], (rows[kept], columns[kept])), shape=(n, n))


def check_dense(n: int) -> None:
    """Refuse more rows than an n x n matrix is made for, naming what does without."""
    if n > _DENSE_ROWS:
        raise ValueError(
            f"X: {n} rows need an n x n matrix here; use OMP, elastic net, thresholding or K-subspaces beyond "
            f"{_DENSE_ROWS}"
        )


def check_rows(x: Any) -> None:
    """Refuse rows of zeros, which no others express, naming them."""
    zero = torch.linalg.vector_norm(x, dim=1) == 0
    if bool(zero.any()):
        found = zero.nonzero().squeeze(1).tolist()
        shown = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
        raise ValueError(f"X: {len(found)} rows are zero and lie in every subspace (rows {shown}); remove them")
