"""Cosines inside a soft coordinate subspace that differs from row to row, without a third axis."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def gated_cosine(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    gates: Float[Tensor, "n d"],
    *,
    normalize: Literal["inside", "before"] = "inside",
) -> Float[Tensor, "n m"]:
    """Cosines of queries and keys, both scaled by the gate of the query: <g z, g k> / (|g z| |g k|).

    Two products of (n, d) with (d, m); the n m d gated keys are never made.

    Parameters
    ----------
    queries, keys
        Vectors (n, d) and (m, d), of any length.
    gates
        (n, d), not negative; only their ratios inside a row count, except for "before".
    normalize
        "inside" the subspace, a true cosine; "before" the gate, <g z, g k> of unit z and k, which small gates shrink.

    Returns
    -------
    Tensor (n, m). 0, with a gradient of 0, where a gate is closed or a vector is 0 in it.

    Raises
    ------
    ValueError
        For another `normalize`, and widths or numbers of rows that do not fit.

    References
    ----------
    Wu et al. (2024), arXiv 2410.18200; both normalisations are in the authors' code.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import gated_cosine
    >>> z, k = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0, -2.0, 5.0], [3.0, 1.0, 1.0]])
    >>> gated_cosine(z, k, torch.tensor([[1.0, 0.0, 0.0]])).round(decimals=4)
    tensor([[1., 1.]])
    """
    if normalize not in ("inside", "before"):
        raise ValueError(f"normalize: expected 'inside' or 'before', got {normalize!r}")
    if not queries.shape[-1] == keys.shape[-1] == gates.shape[-1]:
        widths = [each.shape[-1] for each in (queries, keys, gates)]
        raise ValueError(f"gates: queries, keys and gates must be of one width, got {widths}")
    if len(gates) != len(queries):
        raise ValueError(f"gates: expected {len(queries)}, one a query, got {len(gates)}")
    # Unit rows and gates of at most 1 change no cosine, and keep squares of half precision in range.
    z, k = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    if normalize == "before":
        return (z * gates.square()) @ k.mT
    largest = gates.detach().amax(-1, keepdim=True)
    square = (gates / torch.where(largest > 0, largest, 1)).square()
    gated = z * square
    size = (gated * z).sum(-1, keepdim=True) * (square @ k.square().mT)
    there = size > torch.finfo(size.dtype).tiny
    return torch.where(there, (gated @ k.mT) * torch.where(there, size, 1).rsqrt(), 0)
