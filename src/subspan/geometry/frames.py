"""Finite frames: more vectors than dimensions that still tell every vector from its coefficients; DFT dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Complex, Float, Inexact
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Frame:
    """Vectors f_i with A |x|^2 <= sum_i |<x, f_i>|^2 <= B |x|^2 for every x, A > 0; an orthonormal basis has A = B = 1.

    Parameters
    ----------
    vectors
        (m, d) one a row, real or complex, m >= d, that span the space.

    Raises
    ------
    ValueError
        For fewer vectors than dimensions, NaN, or vectors that do not span the space.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Frame
    >>> angles = 2 * torch.pi * torch.arange(3) / 3
    >>> frame = Frame(torch.stack([angles.cos(), angles.sin()], 1))  # three vectors in the plane, tight
    >>> [round(float(bound), 4) for bound in frame.bounds], round(frame.coherence, 4)
    ([1.5, 1.5], 0.5)
    """

    vectors: Inexact[Tensor, "m d"]

    def __post_init__(self) -> None:
        m, d = self.vectors.shape
        if m < d:
            raise ValueError(f"vectors: {m} cannot span {d} dimensions")
        lower, upper = self.bounds
        # `not >` also catches NaN.
        if not float(lower) > float(upper) * torch.finfo(self.vectors.dtype).eps * m:
            raise ValueError("vectors: do not span the space, so they are no frame of it")

    @property
    def operator(self) -> Inexact[Tensor, "d d"]:
        """Frame operator: x @ operator = sum_i <x, f_i> f_i."""
        return self.vectors.mH @ self.vectors

    @property
    def bounds(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The best A and B: the extreme eigenvalues of the frame operator."""
        values = torch.linalg.eigvalsh(self.operator)
        return values[0], values[-1]

    @property
    def tightness(self) -> float:
        """A / B in (0, 1]; 1 where the frame is tight, and its own dual but for a factor."""
        lower, upper = self.bounds
        return float(lower / upper)

    @property
    def redundancy(self) -> float:
        """Vectors a dimension, m / d."""
        return self.vectors.shape[0] / self.vectors.shape[1]

    @property
    def coherence(self) -> float:
        """Largest |cosine| between two of the vectors; 0 for an orthonormal basis. A vector of zeros counts as 0."""
        length = torch.linalg.vector_norm(self.vectors, dim=1, keepdim=True)
        unit = self.vectors / torch.where(length > 0, length, torch.ones_like(length))
        return float((unit @ unit.mH).abs().fill_diagonal_(0).max())

    def analysis(self, x: Inexact[Tensor, "*n d"]) -> Inexact[Tensor, "*n m"]:
        """Coefficients <x, f_i> of rows x."""
        dtype = torch.promote_types(x.dtype, self.vectors.dtype)
        return x.to(dtype) @ self.vectors.mH.to(dtype)

    def synthesis(self, coefficients: Inexact[Tensor, "*n m"]) -> Inexact[Tensor, "*n d"]:
        """Rows sum_i c_i f_i."""
        dtype = torch.promote_types(coefficients.dtype, self.vectors.dtype)
        return coefficients.to(dtype) @ self.vectors.to(dtype)

    def dual(self) -> Frame:
        """Canonical dual frame: its synthesis undoes the analysis of this one, with the least vectors of all duals."""
        factor = torch.linalg.cholesky(self.operator)
        return Frame(torch.cholesky_solve(self.vectors.mH, factor).mH)

    def reconstruct(self, coefficients: Inexact[Tensor, "*n m"]) -> Inexact[Tensor, "*n d"]:
        """Rows from what `analysis` gave, by the dual; of other coefficients, the rows nearest to them."""
        return self.dual().synthesis(coefficients)


def response_bounds(responses: Inexact[Tensor, "m l"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Frame bounds of all circular shifts of m filters, from their frequency responses.

    They are the extremes over frequency of the sum of squared responses: no (l m, l) matrix is made.

    Parameters
    ----------
    responses
        (m, l) at the l DFT frequencies, real or complex. For filters that are to cover a band only, those of that band.

    Returns
    -------
    The lower and the upper bound, scalars.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import response_bounds
    >>> mean_and_difference = torch.tensor([[0.5, 0.5], [0.5, -0.5]])
    >>> [round(float(bound), 4) for bound in response_bounds(torch.fft.fft(mean_and_difference, n=8))]
    [1.0, 1.0]
    """
    energy = responses.abs().square().sum(0)
    return energy.min(), energy.max()


def dft_dictionary(
    *sizes: int, oversampling: int | Sequence[int] = 1, dtype: torch.dtype = torch.complex128
) -> Complex[Tensor, "g n n"]:
    """Oversampled DFT beams of a grid with these sizes, in groups that are an orthonormal basis each.

    Parameters
    ----------
    *sizes
        Points along each axis; n is their product, the last axis the fastest.
    oversampling
        Whole number for each axis, or one for all; g is their product.
    dtype
        complex64 or complex128.

    Returns
    -------
    Beams (g, n, n) as rows
        In group (q_1, …), beam (l_1, …) has frequency (q + oversampling l) / (oversampling n) along each axis, the
        group and the beam counted with the last axis fastest. `flatten(0, 1)` is a tight frame.

    Raises
    ------
    ValueError
        For no sizes, numbers below 1, and another number of oversamplings than of sizes.

    Examples
    --------
    >>> from subspan.geometry import Frame, dft_dictionary
    >>> beams = dft_dictionary(4, 2, oversampling=(4, 1))
    >>> tuple(beams.shape), round(Frame(beams.flatten(0, 1)).tightness, 6)
    ((4, 8, 8), 1.0)
    """
    factors = [oversampling] * len(sizes) if isinstance(oversampling, int) else list(oversampling)
    if not sizes or len(factors) != len(sizes) or min(*sizes, *factors) < 1:
        raise ValueError(f"sizes, oversampling: expected whole numbers >= 1 in pairs, got {sizes} and {oversampling}")
    axes = []
    for n, o in zip(sizes, factors):
        point, beam, group = torch.arange(n), torch.arange(n).unsqueeze(1), torch.arange(o).reshape(-1, 1, 1)
        turns = ((group + o * beam) * point % (o * n)).double() / (o * n)
        axes.append(torch.exp(2j * torch.pi * turns) / n**0.5)
    return reduce(torch.kron, axes).to(dtype)
