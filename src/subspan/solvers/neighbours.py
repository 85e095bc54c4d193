"""Exact nearest neighbours in chunks, and the retrieval numbers built on them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from subspan.base import check_matrix, normalize_rows

_BLOCK = 1 << 24
# Columns of a group, and rows and columns of a tile, where only the largest product is sought.
_GROUP, _ROWS, _TILE = 64, 512, 2048
# Slices of the columns where several are.
_SLICES = 16


def nearest(
    queries: Any,
    base: Any,
    k: int,
    *,
    metric: str = "euclidean",
    exclude: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """The k nearest rows of a base for each query; exact, O(chunk n) memory.

    Parameters
    ----------
    queries, base
        Rows (m, d) and (n, d).
    k
        Neighbours of a query, in [1, n], or in [1, n - 1] with `exclude`.
    metric
        "euclidean" (squared distances, ascending), "cosine" or "inner" (similarities, descending).
    exclude
        (m,) for each query the row of the base that is left out (itself, where it is one); None: none.

    Returns
    -------
    Values and indices (m, k), best first.

    Raises
    ------
    ValueError
        For rows that are not finite or of unequal length, k out of range, or an unknown metric.

    Examples
    --------
    >>> from subspan.solvers import nearest
    >>> values, indices = nearest([[2.0]], [[0.0], [3.0], [10.0]], 2)
    >>> values.tolist(), indices.tolist()
    ([[1.0, 4.0]], [[1, 0]])
    """
    q = check_matrix(queries, "queries")
    b = check_matrix(base, "base", columns=q.shape[1])
    if metric not in ("euclidean", "cosine", "inner"):
        raise ValueError(f"metric: expected 'euclidean', 'cosine' or 'inner', got {metric!r}")
    available = len(b) - (exclude is not None)
    if not 1 <= k <= available:
        raise ValueError(f"k: must lie in [1, {available}], got {k}")
    dtype = torch.promote_types(torch.float32, torch.promote_types(q.dtype, b.dtype))
    q, b = q.to(dtype), b.to(dtype).to(q.device)
    if metric == "cosine":
        q, b = normalize_rows(q), normalize_rows(b)
    shift = b.mean(0) if metric == "euclidean" else None
    if shift is not None:
        # Distances do not change with the origin, and near it their differences keep their digits.
        q, b = q - shift, b - shift
    half_squares = 0.5 * b.square().sum(-1) if metric == "euclidean" else None
    step = max(1, min(len(q), _BLOCK // len(b)))
    values, indices = q.new_empty(len(q), k), torch.empty(len(q), k, dtype=torch.int64, device=q.device)
    for start in range(0, len(q), step):
        part = q[start : start + step]
        score = part @ b.mT if half_squares is None else torch.addmm(half_squares, part, b.mT, beta=-1)
        if exclude is not None:
            score.scatter_(1, exclude[start : start + len(part), None].to(q.device), -torch.inf)
        best, found = largest_per_row(score, k)
        if metric == "euclidean":
            best = (part.square().sum(-1, keepdim=True) - 2 * best).clamp_min(0)
        values[start : start + step], indices[start : start + step] = best, found
    return values, indices


def largest_per_row(score: Float[Tensor, "m n"], k: int) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """The k largest values of each row, best first, and their columns.

    They lie in the k groups of columns with the largest maxima, or among the last columns, which are in no group.
    """
    groups = score.shape[1] // _SLICES
    if groups < 4 * k:
        return score.topk(k, dim=1)
    # A group is a column of each slice, so that the maxima are those of whole slices.
    grouped = score[:, : groups * _SLICES].view(len(score), _SLICES, groups)
    best = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    columns = (best.unsqueeze(2) + torch.arange(0, groups * _SLICES, groups, device=score.device)).flatten(1)
    last = torch.arange(groups * _SLICES, score.shape[1], device=score.device)
    columns = torch.cat([columns, last.expand(len(score), -1)], 1)
    value, place = score.gather(1, columns).topk(k, dim=1)
    return value, columns.gather(1, place)


def nearest_code(rows: Float[Tensor, "n d"], codes: Float[Tensor, "k d"], *, block: int = _BLOCK) -> Int[Tensor, " n"]:
    """Index of the code nearest to each row, the lowest of equals.

    No check that would wait for a device, so that it can stand inside a layer. Distances in float32 at least: in half
    precision |z|² - 2 z'e + |e|² cancels.

    Parameters
    ----------
    rows
        (n, d).
    codes
        (k, d).
    block
        Distances in memory at once, at most.

    Returns
    -------
    Indices (n,).

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import nearest_code
    >>> nearest_code(torch.tensor([[0.9, 0.1], [0.0, 2.0]]), torch.eye(2))
    tensor([0, 1])
    """
    with torch.autocast(rows.device.type, enabled=False):
        dtype = torch.promote_types(torch.float32, torch.promote_types(rows.dtype, codes.dtype))
        # Distances do not change with the origin, and near it their differences keep their digits.
        shift = codes.to(dtype).mean(0)
        rows, codes = rows.to(dtype) - shift, codes.to(dtype) - shift
        half_squares = 0.5 * codes.square().sum(-1)
        return largest_product(rows, codes, offset=-half_squares, block=block)[1]


def largest_product(
    rows: Float[Tensor, "m d"],
    base: Float[Tensor, "n d"],
    *,
    offset: Float[Tensor, " n"] | None = None,
    absolute: bool = False,
    exclude: Int[Tensor, " m"] | None = None,
    block: int = _BLOCK,
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Largest <row, base_j> + offset_j of each row, and the lowest j that has it.

    On the CPU products are made in tiles that stay in the cache, and first the largest of each group of columns is
    found: a maximum without its place costs a tenth of one with it. Nothing is checked.

    Parameters
    ----------
    rows, base
        (m, d) and (n, d).
    offset
        (n,) added to the products; None: nothing.
    absolute
        Whether absolute values are compared.
    exclude
        (m,) an index for each row that is left out; None: none.
    block
        Products in memory at once, at most.

    Returns
    -------
    Values and indices (m,).

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import largest_product
    >>> value, index = largest_product(torch.tensor([[1.0, -3.0]]), torch.eye(2), absolute=True)
    >>> value.tolist(), index.tolist()
    ([3.0], [1])
    """
    n = len(base)
    size = min(_GROUP, n)
    most = max(size, block // size * size)
    if rows.device.type == "cpu":
        most = min(most, _TILE)
    tiles = -(-n // most)
    width = min(-(-n // (tiles * size)) * size, n // size * size)
    down = max(1, block // width)
    if rows.device.type == "cpu":
        down = min(down, _ROWS)
    values, found = [], []
    for first, part in enumerate(rows.split(down)):
        every = torch.arange(len(part), device=rows.device)
        value = torch.full_like(part[:, 0], -torch.inf)
        index = torch.zeros_like(value, dtype=torch.int64)
        # The last tile reaches back over the one before, so that all have one width.
        for start in [*range(0, n - width, width), n - width]:
            tile = slice(start, start + width)
            score = F.linear(part, base[tile], None if offset is None else offset[tile])
            if absolute:
                score = score.abs_()
            if exclude is not None:
                own = exclude[first * down : first * down + len(part)] - start
                inside = (own >= 0) & (own < width)
                score[every[inside], own[inside]] = -torch.inf
            groups = score.view(len(part), -1, size)
            best, group = groups.amax(2).max(1)
            place = group * size + groups[every, group].argmax(1) + start
            # Strictly better only: of equals the earlier tile keeps its place.
            value, index = torch.where(best > value, best, value), torch.where(best > value, place, index)
        values.append(value)
        found.append(index)
    return torch.cat(values), torch.cat(found)
