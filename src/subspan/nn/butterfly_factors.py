"""Butterfly factors of a matrix by peeling, and the permutations that stand before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from subspan.base import check_finite

from .butterfly_products import butterfly_multiply


@dataclass(frozen=True)
class ButterflyFactors:
    """What `butterfly_factorize` found.

    Attributes
    ----------
    twiddle
        The 2 x 2 matrices of B, (levels, N/2, 2, 2).
    permutation
        P as an index (N,).
    relative_error
        |B P - T|_F / |T|_F.
    """

    twiddle: Inexact[Tensor, "levels half 2 2"]
    permutation: Int[Tensor, " n"]
    relative_error: float

    def to_dense(self) -> Inexact[Tensor, "n n"]:
        """The product B P."""
        eye = torch.eye(len(self.permutation), dtype=self.twiddle.dtype, device=self.twiddle.device)
        return butterfly_multiply(self.twiddle, eye[:, self.permutation]).mT


@torch.no_grad()
def butterfly_factorize(
    matrix: Inexact[Tensor, "n n"], permutation: str | Int[Tensor, " n"] = "bit-reversal"
) -> ButterflyFactors:
    """Factors of a square matrix T ≈ B P by peeling levels from the left, O(N²), in float64.

    At each level two rows that share a child row form 2 x (N/2) blocks of rank one. Their leading singular pairs give a
    column of the 2 x 2 and a row of the child. This is exact where T = B P; otherwise it is a projection level by
    level, which is no best approximation. Levels are fixed up to a scale between neighbours: child rows have unit
    length here.

    Parameters
    ----------
    matrix
        T (N, N), real or complex, N a power of two.
    permutation
        P: "identity", "bit-reversal" or an index (N,).

    Returns
    -------
    ButterflyFactors

    Raises
    ------
    ValueError
        For a matrix whose size is no power of two, or that is not finite.

    References
    ----------
    Le, Riccietti & Gribonval (2022), on the factorisation of Dao et al. (2019).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import butterfly_factorize
    >>> dft = torch.fft.fft(torch.eye(8, dtype=torch.complex128))
    >>> butterfly_factorize(dft).relative_error < 1e-12
    True
    """
    n = matrix.shape[0]
    if matrix.shape[1] != n or n < 2 or n & (n - 1):
        raise ValueError(f"matrix: expected a square one of a power of two, got {tuple(matrix.shape)}")
    wide = check_finite(matrix, "matrix").to(torch.complex128 if matrix.is_complex() else torch.float64)
    index = fixed_permutation(permutation, n).to(matrix.device)
    twiddle = peel(wide[:, index])
    found = ButterflyFactors(twiddle, index, 0.0)
    error = torch.linalg.norm(found.to_dense() - wide) / torch.linalg.norm(wide).clamp_min(1e-300)
    return ButterflyFactors(twiddle, index, float(error))


def peel(matrix: Tensor) -> Tensor:
    """Twiddles (levels, N/2, 2, 2) of a matrix whose columns are permuted already."""
    n = len(matrix)
    rest = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64).unsqueeze(0)
    found = []
    for level in range(n.bit_length() - 2, 0, -1):
        half = 1 << level
        # (group, out of the pair, row, half of the columns, column) → 2 x half blocks of one row and one half.
        blocks = rest.unflatten(1, (2, half)).unflatten(3, (2, half)).permute(0, 2, 3, 1, 4)
        u = torch.linalg.eigh(blocks @ blocks.mH)[1][..., -1]
        rows = (u.conj().unsqueeze(-2) @ blocks).squeeze(-2)
        scale = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        found.append((u * scale).mT.flatten(0, 1))
        rest = (rows / torch.where(scale > 0, scale, 1)).transpose(1, 2).flatten(0, 1)
    found.append(rest)
    return torch.stack(found[::-1])


def check_size(n: int) -> int:
    """The m of n = 2^m, at least 1. Raises ValueError for another n."""
    if n < 2 or n & (n - 1):
        raise ValueError(f"n: must be a power of two from 2, got {n}")
    return n.bit_length() - 1


def bit_reversal(n: int) -> Int[Tensor, " n"]:
    """The index that reads numbers below n = 2^m with their bits in reverse."""
    bits = check_size(n)
    index = torch.arange(n)
    return (
        torch.stack([(index >> bit) & 1 for bit in range(bits)])
        .mul(2 ** torch.arange(bits - 1, -1, -1).unsqueeze(-1))
        .sum(0)
    )


def fixed_permutation(permutation: str | Tensor, n: int) -> Int[Tensor, " n"]:
    """A permutation by its name, or a given one checked, as an index (n,). Raises ValueError for any other."""
    if isinstance(permutation, str):
        if permutation == "identity":
            return torch.arange(n)
        if permutation == "bit-reversal":
            return bit_reversal(n)
        raise ValueError(f"permutation: expected 'identity', 'bit-reversal' or an index, got {permutation!r}")
    if permutation.shape != (n,) or not torch.equal(
        permutation.sort().values, torch.arange(n, device=permutation.device)
    ):
        raise ValueError(f"permutation: expected each of 0 … {n - 1} once, got shape {tuple(permutation.shape)}")
    return permutation.clone()
