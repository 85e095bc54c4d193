"""Prefixes of vectors: every leading part of a row as a vector of its own, all sizes in one pass.

Between consecutive cuts only a block of coordinates is new, so inner products, squared norms and linear maps of all
prefixes are running sums over blocks: O(d) a pair instead of O(sum of the sizes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base import check_matrix

_METRICS = ("cosine", "inner", "euclidean")


def prefix_sizes(dims: Any, d: int | None = None, *, name: str = "dims") -> tuple[int, ...]:
    """Sizes of prefixes in ascending order, given in any.

    Parameters
    ----------
    dims
        Sizes: one or more different integers.
    d
        Largest size allowed, the length of the rows; None: any.
    name
        What an error calls `dims`.

    Returns
    -------
    The sizes as a tuple.

    Raises
    ------
    ValueError
        For no sizes, repeated ones, any that is no integer or outside [1, d].

    Examples
    --------
    >>> from subspan.geometry import prefix_sizes
    >>> prefix_sizes([64, 8, 32], 64)
    (8, 32, 64)
    """
    given = list(dims) if isinstance(dims, Sequence | np.ndarray | range) and not isinstance(dims, str) else None
    if not given or any(isinstance(m, bool) or not isinstance(m, int | np.integer) for m in given):
        raise ValueError(f"{name}: expected one or more integers, got {dims!r}")
    sizes = tuple(sorted(int(m) for m in given))
    if any(a == b for a, b in pairwise(sizes)):
        raise ValueError(f"{name}: a size is repeated in {list(sizes)}")
    if sizes[0] < 1 or (d is not None and sizes[-1] > d):
        raise ValueError(f"{name}: sizes must lie in [1, {'d' if d is None else d}], got {list(sizes)}")
    return sizes


def halving_sizes(d: int, smallest: int = 8) -> tuple[int, ...]:
    """d, d/2, d/4, … down to `smallest`, in ascending order.

    Parameters
    ----------
    d
        Length of the rows, at least 1.
    smallest
        Least size that is listed; d stands alone where it is smaller.

    Returns
    -------
    The sizes as a tuple.

    References
    ----------
    Kusupati et al. (2022), Matryoshka representation learning, arXiv 2205.13147.

    Examples
    --------
    >>> from subspan.geometry import halving_sizes
    >>> halving_sizes(100, 20)
    (25, 50, 100)
    """
    if d < 1:
        raise ValueError(f"d: must be at least 1, got {d}")
    sizes = [d]
    while sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    return tuple(reversed(sizes))


def blocks_between(sizes: Sequence[int]) -> list[slice]:
    """The blocks of coordinates between consecutive cuts, from 0 on.

    Parameters
    ----------
    sizes
        Cuts in ascending order.

    Returns
    -------
    A slice for each cut.

    Examples
    --------
    >>> from subspan.geometry import blocks_between
    >>> blocks_between([2, 5])
    [slice(0, 2, None), slice(2, 5, None)]
    """
    return [slice(a, b) for a, b in pairwise([0, *sizes])]


def prefix(x: Tensor, m: int, *, normalize: bool = True, epsilon: float = 1e-12) -> Tensor:
    """The first m coordinates of rows, scaled to unit length when `normalize`; differentiable.

    Lengths are taken in float32 at least.

    Parameters
    ----------
    x
        Rows (…, d).
    m
        Coordinates to keep, in [1, d].
    normalize
        Whether each prefix gets unit length.
    epsilon
        Least length that is divided by, so that zero rows stay zero.

    Returns
    -------
    Tensor (…, m) in the dtype of x.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import prefix
    >>> prefix(torch.tensor([[3.0, 4.0, 9.0]]), 2)
    tensor([[0.6000, 0.8000]])
    """
    if not 1 <= m <= x.shape[-1]:
        raise ValueError(f"m: must lie in [1, {x.shape[-1]}], got {m}")
    part = x[..., :m]
    if not normalize:
        return part
    wide = part.to(torch.promote_types(part.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / length.clamp_min(epsilon)).to(part.dtype)


def prefix_squared_norms(x: Float[Tensor, "*n d"], dims: Sequence[int]) -> Float[Tensor, "*n l"]:
    """Squared length of every prefix of rows, by running sums.

    Parameters
    ----------
    x
        Rows (…, d).
    dims
        Sizes of the prefixes.

    Returns
    -------
    Tensor (…, l), a column for each of the l sizes in ascending order; float32 at least.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import prefix_squared_norms
    >>> prefix_squared_norms(torch.tensor([[3.0, 4.0, 12.0]]), [1, 2, 3])
    tensor([[  9.,  25., 169.]])
    """
    sizes = prefix_sizes(dims, x.shape[-1])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.stack([wide[..., block].square().sum(-1) for block in blocks_between(sizes)], -1).cumsum(-1)


def prefix_similarities(
    queries: Any, base: Any, dims: Sequence[int], *, metric: str = "cosine"
) -> Iterator[tuple[int, Float[Tensor, "m n"]]]:
    """Similarities of queries and base rows for each prefix, smallest first.

    One running sum of products serves all sizes.

    Parameters
    ----------
    queries, base
        Rows (m, d) and (n, d).
    dims
        Sizes of the prefixes.
    metric
        "cosine" (each prefix normalised on its own; a zero prefix has cosine 0 with everything), "inner", or
        "euclidean" (minus the squared distance).

    Yields
    ------
    A size and the similarities (m, n) at it.

    Raises
    ------
    ValueError
        For rows that are not finite or of unequal length, an unknown metric, and as `prefix_sizes`.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import prefix_similarities
    >>> query, base = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0], [2.0, 0.0]])
    >>> for size, found in prefix_similarities(query, base, [1, 2]):
    ...     print(size, found)
    1 tensor([[1., 1.]])
    2 tensor([[0.6000, 1.0000]])
    """
    q = check_matrix(queries, "queries")
    b = check_matrix(base, "base", columns=q.shape[1])
    if metric not in _METRICS:
        raise ValueError(f"metric: expected one of {_METRICS}, got {metric!r}")
    sizes = prefix_sizes(dims, q.shape[1])
    dtype = torch.promote_types(torch.float32, torch.promote_types(q.dtype, b.dtype))
    q, b = q.to(dtype), b.to(q.device, dtype)
    products = q.new_zeros(len(q), len(b))
    q_norms, b_norms = prefix_squared_norms(q, sizes), prefix_squared_norms(b, sizes)
    for level, (size, block) in enumerate(zip(sizes, blocks_between(sizes))):
        products.addmm_(q[:, block], b[:, block].mT)
        if metric == "inner":
            yield size, products.clone()
        elif metric == "euclidean":
            yield size, 2 * products - q_norms[:, level, None] - b_norms[:, level]
        else:
            lengths = [torch.rsqrt(norms[:, level]).nan_to_num(posinf=0) for norms in (q_norms, b_norms)]
            yield size, products * lengths[0][:, None] * lengths[1]


def smallest_sufficient(sizes: Sequence[int], scores: Sequence[float], *, tolerance: float = 0.01) -> int:
    """The smallest size from which on every score is within `tolerance` of the largest size's score.

    Parameters
    ----------
    sizes
        Sizes, in any order.
    scores
        One finite number a size; more is better.
    tolerance
        Loss against the largest size that is accepted, in the unit of the scores.

    Returns
    -------
    One of the sizes.

    Raises
    ------
    ValueError
        For no scores, another number of them than of sizes, or scores that are not finite.

    Examples
    --------
    >>> from subspan.geometry import smallest_sufficient
    >>> smallest_sufficient([8, 16, 32, 64], [0.70, 0.895, 0.90, 0.90])
    16
    """
    order = np.argsort(sizes)
    ordered, values = np.asarray(sizes)[order], np.asarray(scores, dtype=float)[order]
    if len(ordered) != len(values) or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"scores: expected one finite number for each of {len(ordered)} sizes")
    short = np.flatnonzero(values < values[-1] - tolerance)
    return int(ordered[short[-1] + 1 if len(short) else 0])
