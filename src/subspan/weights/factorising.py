"""One weight in fewer bits: a dictionary and sparse codes, two thin matrices, or a mask; on data or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base import check_finite, normalize_rows
from subspan.geometry import Subspace, Whitener
from subspan.models import LowRankLinear, SparseDictLinear, linear_weight
from subspan.solvers import (
    SparseCodes,
    coding_error,
    ksvd_step,
    mod_step,
    omp,
    procrustes_step,
    top_s,
)
from subspan.statistics import Moments

Solver = Literal["procrustes", "ksvd", "mod", "rocket", "svd", "2:4", "round"]
Metric = Moments | Whitener | None
Found = tuple[Tensor, SparseCodes, list[float]]

VALUE_BITS, CODE_BITS = 16, 14
MAX_ITER = {"procrustes": 20, "ksvd": 60, "mod": 60}
_WARM = 10
_TWINS = 0.95
_GROUP = 32


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


def dictionary_sizes(
    d_in: int, d_out: int, bits: float, *, density: float = 2.0, most: int | None = None
) -> tuple[int, int]:
    """Atoms k of a dictionary and entries s a column of its codes that fit into so many bits.

    A dictionary takes 16 bits a number, codes take 14, and a mask says with one bit each which of the k d_out are not
    zero: 16 d_in k + 14 s d_out + k d_out. With k = 2 s this is as many as numbers of 16 bits without a mask.

    Parameters
    ----------
    d_in, d_out
        Of the layer.
    bits
        All together.
    density
        k / s, at least 1.
    most
        Most atoms, where they must be orthonormal; what they leave goes to s.

    Returns
    -------
    (k, s)

    Raises
    ------
    ValueError
        Where not one atom fits.

    References
    ----------
    CoSpaDi (arXiv 2509.22075).

    Examples
    --------
    >>> from subspan.weights import dictionary_sizes
    >>> dictionary_sizes(4096, 12288, 0.8 * 16 * 4096 * 12288)
    (3932, 1966)
    """
    if not density >= 1:
        raise ValueError(f"density: at least 1 atom for each that is read, got {density}")
    k = int(bits / (VALUE_BITS * d_in + d_out * (CODE_BITS / density + 1)) + 1e-9)
    k = k if most is None else min(k, most)
    s = int((bits - k * (VALUE_BITS * d_in + d_out)) / (CODE_BITS * d_out) + 1e-9)
    if k < 1 or s < 1:
        raise ValueError(f"ratio: {bits / (VALUE_BITS * d_in * d_out):.2g} of {d_out} x {d_in} numbers is no atom")
    return k, min(s, k)


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
    if solver not in _SOLVERS:
        raise ValueError(f"solver: one of {', '.join(_SOLVERS)}, got {solver!r}")
    if (ratio is None) == (bits is None):
        raise ValueError("ratio, bits: give one of the two")
    dense_bits = VALUE_BITS * weight.numel()
    if ratio is not None and not 0 < ratio < 1:
        raise ValueError(f"ratio: in (0, 1), got {ratio}")
    budget = float(bits) if bits is not None else (1 - float(ratio or 0)) * dense_bits
    white = whitener_of(metric, weight.shape[1])
    wide = weight.detach().double()
    job = _Job(wide, white, budget, density, init, max_iter, n_power, tolerance, random_state, weight.dtype)
    layer, used, history = _SOLVERS[solver](job)
    if rounded and isinstance(layer, LowRankLinear | SparseDictLinear):
        _round_stored(layer)
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


@dataclass(frozen=True, eq=False)
class _Job:
    """One weight on its way: its rows as they are coded, and back."""

    weight: Tensor
    white: Whitener | None
    bits: float
    density: float
    init: str
    max_iter: int | None
    n_power: int
    tolerance: float
    random_state: int
    dtype: torch.dtype

    @cached_property
    def coded(self) -> tuple[Tensor, Tensor | None]:
        """Rows of W L, and a basis of their span where they are fewer than their numbers: then they are in it."""
        rows = self.weight if self.white is None else self.white.weigh(self.weight)
        basis = None
        if rows.shape[0] < rows.shape[1]:
            basis, triangle = torch.linalg.qr(rows.mT)
            rows = triangle.mT
        return rows.to(torch.float64 if self.dtype == torch.float64 else torch.float32), basis

    def back(self, atoms: Tensor) -> Tensor:
        """Atoms (k, ·) of the coded rows as weights of inputs (k, d_in)."""
        atoms, basis = atoms.double(), self.coded[1]
        atoms = atoms if basis is None else atoms @ basis.mT
        return atoms if self.white is None else self.white.unweigh(atoms)

    def iterations(self, solver: str) -> int:
        return MAX_ITER[solver] if self.max_iter is None else self.max_iter


def _dictionary(solver: Callable[[_Job, Tensor, int, int], Found], orthonormal: bool) -> Callable[[_Job], Any]:
    def run(job: _Job) -> tuple[nn.Module, int, list[float]]:
        d_out, d_in = job.weight.shape
        rows = job.coded[0]
        # More orthonormal atoms than the rows span would never be read.
        most = rows.shape[1] if orthonormal else None
        k, s = dictionary_sizes(d_in, d_out, job.bits, density=job.density, most=most)
        atoms, codes, history = solver(job, rows, k, min(s, rows.shape[1]))
        total = float(rows.square().sum()) or 1.0
        layer = SparseDictLinear(job.back(atoms).mT.contiguous(), codes.indices, codes.values.double())
        return layer, layer.bits(VALUE_BITS, code_bits=CODE_BITS), [max(0.0, lost) / total for lost in history]

    return run


def _procrustes(job: _Job, rows: Tensor, k: int, s: int, turns: int | None = None) -> Found:
    total = rows.square().sum()
    atoms = _eigenvectors(rows, k)
    codes = top_s(rows, atoms, s)
    history = [float(total - codes.values.square().sum())]
    for _ in range(job.iterations("procrustes") if turns is None else turns):
        atoms = procrustes_step(rows, codes)
        codes = top_s(rows, atoms, s)
        history.append(float(total - codes.values.square().sum()))
        if _settled(history, job.tolerance):
            break
    return atoms, codes, history


def _pursuit(name: str, step: Callable[..., tuple[Tensor, SparseCodes]]) -> Callable[[_Job, Tensor, int, int], Found]:
    def run(job: _Job, rows: Tensor, k: int, s: int) -> Found:
        atoms, history = _start(job, rows, k, s), []
        best: tuple[float, Tensor, SparseCodes] | None = None
        options = {"n_power": job.n_power} if name == "ksvd" else {}
        turns = max(1, job.iterations(name))
        for turn in range(turns):
            codes = omp(rows, atoms, s)
            atoms, codes = step(rows, codes, atoms, **options)
            history.append(float(coding_error(rows, codes, atoms)))
            if best is None or history[-1] < best[0]:
                best = (history[-1], atoms, codes)
            if _settled(history, job.tolerance):
                break
            if turn < turns // 2:
                atoms = _spread(rows, codes, atoms)
        assert best is not None
        return best[1], best[2], history

    return run


def _spread(rows: Tensor, codes: SparseCodes, atoms: Tensor) -> Tensor:
    """Atoms of which the second of two that are nearly one is the row that is coded worst, as Aharon et al. do."""
    twins = ((atoms @ atoms.mT).abs().triu(1) > _TWINS).any(0).nonzero()[:, 0][: len(rows)]
    residual = rows - codes.decode(atoms)
    error, worst = residual.square().sum(1).topk(len(twins))
    atoms = atoms.clone()
    atoms[twins[error > 0]] = normalize_rows(rows[worst[error > 0]])
    return atoms


def _start(job: _Job, rows: Tensor, k: int, s: int) -> Tensor:
    """Atoms where pursuit starts: the procrustes solution or outputs at random, and random ones where these run out."""
    generator = torch.Generator().manual_seed(job.random_state)
    if job.init == "procrustes":
        n = min(k, rows.shape[1])
        atoms = _procrustes(job, rows, n, min(s, n), _WARM)[0]
    else:
        some = rows[rows.any(1)]
        atoms = some[torch.randperm(len(some), generator=generator)[:k].to(rows.device)]
    more = torch.randn(k - len(atoms), rows.shape[1], generator=generator, dtype=torch.float64).to(rows)
    return normalize_rows(torch.cat([atoms, more]))


def _rocket(job: _Job, rows: Tensor, k: int, s: int) -> Found:
    atoms = _eigenvectors(rows, k)
    products = rows @ atoms.mT
    # |v| in the norm of the data times |v| |inverse(L) u| in that of the weights, geometric mean.
    lengths = job.back(atoms).norm(dim=1).to(products)
    indices = (products.abs() * lengths.sqrt()).topk(s, dim=1).indices
    codes = SparseCodes(indices, products.gather(1, indices), k)
    first = float(coding_error(rows, codes, atoms))
    atoms, codes = mod_step(rows, codes, atoms)
    return atoms, codes, [first, float(coding_error(rows, codes, atoms))]


def _eigenvectors(rows: Tensor, k: int) -> Tensor:
    return torch.linalg.svd(rows, full_matrices=False).Vh[:k]


def _settled(history: list[float], tolerance: float) -> bool:
    return len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-2]


def _svd(job: _Job) -> tuple[nn.Module, int, list[float]]:
    d_out, d_in = job.weight.shape
    rank = min(int(job.bits / (VALUE_BITS * (d_in + d_out)) + 1e-9), d_in, d_out)
    if rank < 1:
        raise ValueError(f"ratio: {job.bits:.0f} bits of a weight {d_out} x {d_in} are no rank; lower the ratio")
    u, sizes, vh = torch.linalg.svd(job.coded[0].double(), full_matrices=False)
    root = sizes[:rank].sqrt()
    layer = LowRankLinear(u[:, :rank] * root, job.back(root[:, None] * vh[:rank]))
    lost = float(sizes[rank:].square().sum() / sizes.square().sum().clamp_min(torch.finfo(sizes.dtype).tiny))
    return layer, layer.bits(VALUE_BITS), [lost]


def _two_of_four(job: _Job) -> tuple[nn.Module, int, list[float]]:
    d_out, d_in = job.weight.shape
    fours = d_in // 4 * 4
    # Two numbers of four, and two bits each that say which.
    used = d_out * (fours // 2 * (VALUE_BITS + 2) + (d_in - fours) * VALUE_BITS)
    if used > job.bits:
        raise ValueError(f"ratio: 2:4 saves {1 - used / (VALUE_BITS * d_in * d_out):.4f} of the bits and no more")
    score = job.weight.abs() if job.white is None else job.weight.abs() * job.white.factor.norm(dim=1)
    kept = torch.ones_like(score)
    best = score[:, :fours].unflatten(1, (-1, 4)).topk(2, dim=2).indices
    kept[:, :fours] = torch.zeros_like(kept[:, :fours]).unflatten(1, (-1, 4)).scatter(2, best, 1.0).flatten(1)
    return _linear((job.weight * kept).to(torch.bfloat16)), used, []


def _round(job: _Job) -> tuple[nn.Module, int, list[float]]:
    d_out, d_in = job.weight.shape
    scales = 2 * VALUE_BITS * d_out * -(-d_in // _GROUP)
    levels = int((job.bits - scales) / job.weight.numel() + 1e-9)
    if levels < 1:
        raise ValueError(f"ratio: {job.bits / job.weight.numel():.2f} bits a number are too few to round to")
    levels = min(levels, VALUE_BITS)
    return _linear(round_to_bits(job.weight, levels)), levels * job.weight.numel() + scales, []


def _linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.double(), requires_grad=False)
    return layer


def round_to_bits(x: Float[Tensor, "n d"], bits: int = 4, *, group: int = _GROUP) -> Float[Tensor, "n d"]:
    """Numbers rounded to 2^bits levels, zero among them, from the least to the largest of each group of a row.

    Parameters
    ----------
    x
        (n, d).
    bits
        Of a number, 1 to 16; a group takes 32 more for its least level and its step (bfloat16).
    group
        Neighbours in a row with one scale.

    Returns
    -------
    Tensor as x.

    Examples
    --------
    >>> import torch
    >>> from subspan.weights import round_to_bits
    >>> round_to_bits(torch.tensor([[0.0, 0.9, 2.1, 3.0]]), bits=2)
    tensor([[0., 1., 2., 3.]])
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits: from 1 to 16, got {bits}")
    parts = nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    low, high = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True).clamp(min=0)
    exact = (high - low) / (2**bits - 1)
    step = exact.to(torch.bfloat16)
    step = torch.where(step < exact, (step.view(torch.int16) + 1).view(torch.bfloat16), step).to(x)
    unit = torch.where(step > 0, step, 1)
    least = (low / unit).round()
    return (step * (parts / unit).round().clamp(least, least + 2**bits - 1)).flatten(1)[:, : x.shape[1]]


def _round_stored(layer: LowRankLinear | SparseDictLinear) -> None:
    """Numbers as they are stored: bfloat16, and codes with 5 bits of mantissa, to the nearest."""
    for name, value in layer.named_parameters():
        half = value.data.to(torch.bfloat16)
        if name == "values":
            half = ((half.view(torch.int16) + 2) & ~3).view(torch.bfloat16)
        value.data = half.to(value.dtype)


_SOLVERS: dict[str, Callable[[_Job], tuple[nn.Module, int, list[float]]]] = {
    "procrustes": _dictionary(_procrustes, orthonormal=True),
    "ksvd": _dictionary(_pursuit("ksvd", ksvd_step), orthonormal=False),
    "mod": _dictionary(_pursuit("mod", mod_step), orthonormal=False),
    "rocket": _dictionary(_rocket, orthonormal=True),
    "svd": _svd,
    "2:4": _two_of_four,
    "round": _round,
}


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
    rows = _Job(wide, white, 0.0, density, "", None, 0, 0.0, 0, torch.float32).coded[0]
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
