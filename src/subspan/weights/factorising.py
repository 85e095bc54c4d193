"""One weight in fewer bits: a dictionary and sparse codes, two thin matrices, or a mask; on data or without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base import check_finite
from subspan.geometry import Subspace, Whitener
from subspan.models import LowRankLinear, SparseDictLinear, linear_weight
from subspan.statistics import Moments

from .budgets import VALUE_BITS, dictionary_sizes
from .rounding import round_stored
from .solving import SOLVERS, Job

Solver = Literal["procrustes", "ksvd", "mod", "rocket", "svd", "2:4", "round"]
Metric = Moments | Whitener | None


@dataclass(frozen=True, eq=False)
class Factorisation:
    """A weight in fewer bits, and what it costs.

    Parameters
    ----------
    layer
        `SparseDictLinear`, `LowRankLinear`, or `torch.nn.Linear` with a weight that is masked or rounded.
    solver
        As of `factorise`.
    error
        |X (W - V)'|_F / |X W'|_F of what is stored (V), on the inputs X behind the metric; without one of W itself.
    bits
        What V takes, bias left out.
    dense_bits
        What W takes in 16 bits a number.
    history
        Share of |X W'|_F² that is lost after each iteration, before numbers are rounded.
    shift
        What was added to the second moment to make it positive definite.

    Examples
    --------
    >>> import torch
    >>> from subspan.weights import factorise
    >>> found = factorise(torch.randn(24, 12, generator=torch.Generator().manual_seed(0)), ratio=0.3)
    >>> found.bits <= 0.7 * found.dense_bits, found.dense().shape, found.subspace(0).dim == found.nonzero
    (True, torch.Size([24, 12]), True)
    """

    layer: nn.Module
    solver: str
    error: float
    bits: int
    dense_bits: int
    history: tuple[float, ...] = ()
    shift: float = 0.0

    @property
    def ratio(self) -> float:
        """Share of the bits that is saved."""
        return 1 - self.bits / self.dense_bits

    @property
    def rank(self) -> int:
        """Atoms, rank, or (of a masked or rounded weight) the smaller side."""
        if isinstance(self.layer, SparseDictLinear):
            return self.layer.dictionary.shape[1]
        return self.layer.up.shape[1] if isinstance(self.layer, LowRankLinear) else min(self.dense().shape)

    @property
    def nonzero(self) -> int | None:
        """Atoms that each output reads; None without a dictionary."""
        return self.layer.values.shape[1] if isinstance(self.layer, SparseDictLinear) else None

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The weight V."""
        return dense_weight(self.layer)

    def subspace(self, output: int) -> Subspace:
        """Where the weights of an output lie: the span of the atoms that it reads, or of all where all are read."""
        if isinstance(self.layer, SparseDictLinear):
            read = self.layer.indices[output][self.layer.values[output] != 0]
            return Subspace.span(self.layer.dictionary.detach()[:, read.long()])
        return Subspace.span(self.layer.down.detach().mT if isinstance(self.layer, LowRankLinear) else self.dense().mT)


def dense_weight(layer: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The weight (d_out, d_in) that a layer stands for, factored or not."""
    if isinstance(layer, LowRankLinear | SparseDictLinear):
        return layer.to_dense().detach()
    return linear_weight(layer)[0].detach()


def factorise(
    weight: Float[Tensor, "d_out d_in"],
    metric: Metric = None,
    ratio: float | None = None,
    *,
    bits: float | None = None,
    bias: Float[Tensor, " d_out"] | None = None,
    solver: Solver = "procrustes",
    density: float = 2.0,
    init: Literal["procrustes", "data"] = "procrustes",
    max_iter: int | None = None,
    n_power: int = 8,
    tolerance: float = 1e-3,
    rounded: bool = True,
    random_state: int = 0,
) -> Factorisation:
    """A weight in fewer bits, so that outputs on data change least.

    With L L' the second moment of the inputs, what is near to W L in the plain norm is near to W on the data: rows of
    W L are coded, and atoms are led back by a triangular solve.

    Parameters
    ----------
    weight
        (d_out, d_in), as of `torch.nn.Linear`.
    metric
        `Moments` of the inputs, which may be singular, or their `Whitener`; None: without data.
    ratio
        Share of the bits to save, in (0, 1), of 16 a number; or give `bits`.
    bits
        Most bits instead of a ratio, bias left out.
    bias
        (d_out,), kept as it is.
    solver
        "procrustes": orthonormal atoms, the largest coefficients of each output, and a polar update by turns, from the
        eigenvectors (COMPOT). "ksvd", "mod": any atoms, orthogonal matching pursuit, and K-SVD or least squares.
        "rocket": the eigenvectors, the largest coefficients by their size in both norms, one least-squares update.
        "svd": the best low rank (SVD-LLM's first step; without a metric truncated singular values). "2:4": two of four
        neighbours stay, by magnitude (with a metric times the input's, as Wanda). "round": to the nearest of as many
        levels as fit, 32 inputs a scale.
    density
        Atoms for each that an output reads; 2 is as published.
    init
        Where "ksvd" and "mod" start: at the procrustes solution, or at outputs drawn at random as published.
    max_iter
        Turns at most; None: 20 of procrustes, 60 of the others.
    n_power
        Power iterations of K-SVD for each atom.
    tolerance
        Share of the error by which a turn must lower it.
    rounded
        Round as stored (bfloat16, codes to 14 bits); False keeps the numbers, and counts as if.
    random_state
        Seed of "data".

    Returns
    -------
    Factorisation

    Raises
    ------
    ValueError
        For NaN, a metric of another dimension, both or none of ratio and bits, or so few that nothing is left.

    References
    ----------
    CoSpaDi (arXiv 2509.22075); COMPOT (arXiv 2602.15200); ROCKET (arXiv 2602.11008); SVD-LLM (arXiv 2403.07378).

    Examples
    --------
    >>> import torch
    >>> from subspan.statistics import Moments
    >>> from subspan.weights import factorise
    >>> generator = torch.Generator().manual_seed(0)
    >>> x, w = torch.randn(500, 16, generator=generator).cumsum(1), torch.randn(32, 16, generator=generator)
    >>> moments = Moments(16).update(x)
    >>> errors = [factorise(w, moments, 0.3, solver=name).error for name in ("procrustes", "svd")]
    >>> errors[0] < errors[1] < factorise(w, None, 0.3, solver="svd").error * 2
    True
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: a floating-point matrix is needed, got {weight.dtype} {tuple(weight.shape)}")
    check_finite(weight, "weight")
    if solver not in SOLVERS:
        raise ValueError(f"solver: one of {', '.join(SOLVERS)}, got {solver!r}")
    if (ratio is None) == (bits is None):
        raise ValueError("ratio, bits: give one of the two")
    dense_bits = VALUE_BITS * weight.numel()
    if ratio is not None and not 0 < ratio < 1:
        raise ValueError(f"ratio: in (0, 1), got {ratio}")
    budget = float(bits) if bits is not None else (1 - float(ratio or 0)) * dense_bits
    white = whitener_of(metric, weight.shape[1])
    wide = weight.detach().double()
    job = Job(wide, white, budget, density, init, max_iter, n_power, tolerance, random_state, weight.dtype)
    layer, used, history = SOLVERS[solver](job)
    if rounded and isinstance(layer, LowRankLinear | SparseDictLinear):
        round_stored(layer)
    # Half precision lacks the range for a dictionary that was led back.
    layer = layer.to(torch.float32 if weight.dtype == torch.float16 else weight.dtype)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())  # pyright: ignore
    error = weighted_error(weight, layer, white)
    shift = 0.0 if white is None else white.shift
    return Factorisation(layer, solver, error, used, dense_bits, tuple(history), shift)


def whitener_of(metric: Metric, d_in: int) -> Whitener | None:
    """The whitener of a metric; None where there are no data, or none that differ from zero."""
    if isinstance(metric, Moments):
        if metric.d != d_in:
            raise ValueError(f"metric: has dimension {metric.d}, the weight {d_in}")
        second = metric.second_moment().double() if metric.count else None
        return Whitener.of(second) if second is not None and bool(second.diagonal().any()) else None
    if metric is not None and len(metric.factor) != d_in:
        raise ValueError(f"metric: has dimension {len(metric.factor)}, the weight {d_in}")
    return metric


def weighted_error(weight: Tensor, layer: nn.Module, white: Whitener | None) -> float:
    """|X (W - V)'|_F / |X W'|_F; 0 where X W' is zero and so is the difference."""
    wide = weight.detach().double()
    parts = [wide - dense_weight(layer).double(), wide]
    lost, whole = (float((part if white is None else white.weigh(part)).norm()) for part in parts)
    return lost / whole if whole > 0 else lost


def error_curve(
    weight: Float[Tensor, "d_out d_in"],
    metric: Metric,
    ratios: Sequence[float],
    *,
    solver: Solver = "procrustes",
    density: float = 2.0,
) -> list[float]:
    """Share of |X W'|_F² that is lost at each ratio before anything is learnt: one decomposition for all.

    The low rank is exact; a dictionary is taken as the eigenvectors with the largest coefficients of each output.

    Parameters
    ----------
    weight, metric, solver, density
        As of `factorise`; "svd" is the low rank, all others a dictionary.
    ratios
        Shares of the bits to save.

    Returns
    -------
    A number a ratio; infinity where not one atom or rank is left.

    Examples
    --------
    >>> import torch
    >>> from subspan.weights import error_curve
    >>> mild, strong = error_curve(torch.randn(20, 30), None, [0.2, 0.5])
    >>> mild < strong
    True
    """
    d_out, d_in = weight.shape
    white = whitener_of(metric, d_in)
    wide = weight.detach().double()
    rows = Job(wide, white, 0.0, density, "", None, 0, 0.0, 0, torch.float32).coded[0]
    _, sizes, vh = torch.linalg.svd(rows, full_matrices=False)
    squares, total = (rows @ vh.mT).square(), float(sizes.square().sum()) or 1.0
    lost = []
    for ratio in ratios:
        bits = (1 - ratio) * VALUE_BITS * weight.numel()
        try:
            if solver == "svd":
                kept = sizes[: int(bits / (VALUE_BITS * (d_in + d_out)))].square()
            else:
                k, s = dictionary_sizes(d_in, d_out, bits, density=density, most=len(vh))
                kept = squares[:, :k].topk(s, dim=1).values
        except ValueError:
            lost.append(math.inf)
            continue
        lost.append(max(0.0, 1 - float(kept.sum()) / total) if kept.numel() else math.inf)
    return lost
