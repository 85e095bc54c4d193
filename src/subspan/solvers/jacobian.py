"""What a differentiable map does near a point: leading directions, singular values, rank of its Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subspan.geometry import Subspace
from subspan.geometry.grassmann import orthonormalize

Map = Callable[[Tensor], Tensor]


class JacobianSubspace(NamedTuple):
    """Leading singular vectors and values of a Jacobian; see `jacobian_subspace`.

    Attributes
    ----------
    input
        Right singular vectors as a subspace of the input; its variances are the squared singular values.
    values
        Singular values (k,), descending.
    output
        Left singular vectors (m, k): images of the directions, of unit length, where the value is not zero.
    iterations
        Rounds that were made.
    """

    input: Subspace
    values: Float[Tensor, " k"]
    output: Float[Tensor, "m k"]
    iterations: int


def jacobian_subspace(
    f: Map,
    x: Float[Tensor, "*s"],
    rank: int,
    *,
    mask: Bool[Tensor, "*t"] | None = None,
    null: Subspace | None = None,
    tolerance: float = 1e-4,
    max_iter: int = 50,
    generator: torch.Generator | None = None,
) -> JacobianSubspace:
    """The directions at x along which f(x) changes most, without forming the Jacobian.

    Subspace iteration with forward-mode products J v and reverse-mode products u'J, at least 10 rounds.

    Parameters
    ----------
    f
        Differentiable map of a tensor in the shape of x to a tensor, also in forward mode and without in-place changes.
    x
        The point, any shape, taken flat: d numbers.
    rank
        Directions asked for, in [1, d].
    mask
        Booleans in the shape of the output: entries that count; None: all.
    null
        Directions of R^d that are taken out of the found ones (the span that changes what must stay), which are then
        orthonormal again; None: none.
    tolerance
        Rounds stop when the directions move by less than this (sine of the largest angle).
    max_iter
        Rounds at most.
    generator
        Draws the first directions; None: torch's own.

    Returns
    -------
    JacobianSubspace.

    Raises
    ------
    ValueError
        For a rank, mask or `null` that does not fit, and derivatives that are not finite.
    TypeError
        Where f cannot be differentiated forwards.

    References
    ----------
    Chen et al. (2024), arXiv 2409.02374.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import jacobian_subspace
    >>> scale = torch.tensor([1.0, 5.0, 3.0])
    >>> found = jacobian_subspace(lambda x: scale * x, torch.zeros(3), 2, generator=torch.Generator().manual_seed(0))
    >>> found.values.round(decimals=3).tolist(), found.input.basis[:, 0].abs().round(decimals=3).tolist()
    ([5.0, 3.0], [0.0, 1.0, 0.0])
    """
    d = x.numel()
    if not 1 <= rank <= d:
        raise ValueError(f"rank: must lie in [1, {d}], got {rank}")
    if null is not None and (null.ambient_dim != d or null.dim + rank > d):
        raise ValueError(f"null: expected a subspace of R^{d} of dimension <= {d - rank}, got {null!r}")
    flat = x.detach().flatten()
    kept = None if mask is None else mask.flatten().nonzero()[:, 0]

    def g(row: Tensor) -> Tensor:
        out = f(row.reshape(x.shape)).flatten()
        if kept is None:
            return out
        if mask is not None and out.numel() != mask.numel():
            raise ValueError(f"mask: has {mask.numel()} entries, the output {out.numel()}")
        return out[kept]

    if kept is not None and not len(kept):
        raise ValueError("mask: selects nothing")
    forward, backward = _products(g, flat)
    outside = None if null is None else null.basis.to(flat)

    def cleaned(v: Tensor) -> Tensor:
        return v if outside is None else v - outside @ (outside.mT @ v)

    v = orthonormalize(cleaned(torch.randn(d, rank, generator=generator, dtype=flat.dtype).to(flat.device)))
    rounds = 0
    for _ in range(max_iter):
        rounds += 1
        # What f's own parameters have for gradients is of no interest and would keep every round alive.
        moved = cleaned(backward(forward(v)).detach())
        if not bool(torch.isfinite(moved).all()):
            raise ValueError("f: its derivatives at x contain NaN or infinity")
        if not bool((moved.abs().amax(0) > 0).any()):
            break
        following = torch.linalg.qr(moved).Q
        sine = torch.linalg.matrix_norm(following - v @ (v.mT @ following), 2)
        v = following
        if rounds >= 10 and bool(sine < tolerance):
            break
    u, s, wh = torch.linalg.svd(forward(v).detach(), full_matrices=False)
    width = min(rank, len(s))
    turned = orthonormalize(v @ wh.mT[:, :width])
    return JacobianSubspace(Subspace(turned, variances=s[:width].square()), s[:width], u[:, :width], rounds)


def _products(g: Map, x: Tensor) -> tuple[Map, Map]:
    """V → J V and U → J'U, columns at once."""

    def forward(v: Tensor) -> Tensor:
        try:
            return torch.func.vmap(lambda column: torch.func.jvp(g, (x,), (column,))[1], in_dims=1, out_dims=1)(v)
        except (RuntimeError, NotImplementedError) as error:
            if "forward" not in str(error) and "in-place" not in str(error) and "vmap" not in str(error):
                raise
            raise TypeError(f"f: needs forward-mode derivatives and no in-place changes ({error})") from error

    pull = torch.func.vjp(g, x)[1]
    return forward, lambda u: torch.func.vmap(lambda column: pull(column)[0], in_dims=1, out_dims=1)(u)


def jacobian_rank(f: Map, x: Float[Tensor, "*s"], *, share: float = 0.99) -> int:
    """Numerical rank of the Jacobian of f at x: the fewest singular values with `share` of its Frobenius norm.

    Forms the Jacobian (m, d).

    Parameters
    ----------
    f
        Differentiable map of a tensor in the shape of x to a tensor.
    x
        The point, any shape.
    share
        Of the norm, not of its square, in (0, 1]: 0.99 keeps 98 % of the energy.

    Returns
    -------
    The rank, at least 1.

    Raises
    ------
    ValueError
        For a Jacobian that is zero or not finite.

    References
    ----------
    Wang et al. (2024), arXiv 2409.02426.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import jacobian_rank
    >>> jacobian_rank(lambda x: x.sum() * torch.ones(3), torch.zeros(4))
    1
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: must lie in (0, 1], got {share}")
    flat = x.detach().flatten()
    jacobian = torch.func.jacrev(lambda row: f(row.reshape(x.shape)).flatten())(flat)
    if not bool(torch.isfinite(jacobian).all()):
        raise ValueError("f: its derivatives at x contain NaN or infinity")
    energy = torch.linalg.svdvals(jacobian.double()).square().cumsum(0)
    if not float(energy[-1]) > 0:
        raise ValueError("f: its Jacobian at x is zero")
    return int((energy.sqrt() < share * energy[-1].sqrt() * (1 - 1e-12)).sum()) + 1
