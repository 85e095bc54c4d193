"""The ways from one weight to fewer bits: dictionaries, a low rank, a mask, rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from subspan.base import normalize_rows
from subspan.geometry import Whitener
from subspan.models import LowRankLinear, SparseDictLinear
from subspan.solvers import (
    SparseCodes,
    coding_error,
    ksvd_step,
    mod_step,
    omp,
    procrustes_step,
    top_s,
)

from .budgets import CODE_BITS, VALUE_BITS, dictionary_sizes
from .rounding import GROUP, round_to_bits

Found = tuple[Tensor, SparseCodes, list[float]]

MAX_ITER = {"procrustes": 20, "ksvd": 60, "mod": 60}
_WARM = 10
_TWINS = 0.95


@dataclass(frozen=True, eq=False)
class Job:
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
        """Turns at most."""
        return MAX_ITER[solver] if self.max_iter is None else self.max_iter


def _dictionary(solver: Callable[[Job, Tensor, int, int], Found], orthonormal: bool) -> Callable[[Job], Any]:
    def run(job: Job) -> tuple[nn.Module, int, list[float]]:
        d_out, d_in = job.weight.shape
        rows = job.coded[0]
        # More orthonormal atoms than the rows span would never be read.
        most = rows.shape[1] if orthonormal else None
        k, s = dictionary_sizes(d_in, d_out, job.bits, density=job.density, most=most)
        atoms, codes, history = solver(job, rows, k, min(s, rows.shape[1]))
        total = float(rows.square().sum()) or 1.0
        order = codes.indices.argsort(dim=1)
        indices, values = (part.gather(1, order) for part in (codes.indices, codes.values.double()))
        layer = SparseDictLinear(job.back(atoms).mT.contiguous(), indices, values)
        return layer, layer.bits(VALUE_BITS, code_bits=CODE_BITS), [max(0.0, lost) / total for lost in history]

    return run


def _procrustes(job: Job, rows: Tensor, k: int, s: int, turns: int | None = None) -> Found:
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


def _pursuit(name: str, step: Callable[..., tuple[Tensor, SparseCodes]]) -> Callable[[Job, Tensor, int, int], Found]:
    def run(job: Job, rows: Tensor, k: int, s: int) -> Found:
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


def _start(job: Job, rows: Tensor, k: int, s: int) -> Tensor:
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


def _rocket(job: Job, rows: Tensor, k: int, s: int) -> Found:
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


def _svd(job: Job) -> tuple[nn.Module, int, list[float]]:
    d_out, d_in = job.weight.shape
    rank = min(int(job.bits / (VALUE_BITS * (d_in + d_out)) + 1e-9), d_in, d_out)
    if rank < 1:
        raise ValueError(f"ratio: {job.bits:.0f} bits of a weight {d_out} x {d_in} are no rank; lower the ratio")
    u, sizes, vh = torch.linalg.svd(job.coded[0].double(), full_matrices=False)
    root = sizes[:rank].sqrt()
    layer = LowRankLinear(u[:, :rank] * root, job.back(root[:, None] * vh[:rank]))
    lost = float(sizes[rank:].square().sum() / sizes.square().sum().clamp_min(torch.finfo(sizes.dtype).tiny))
    return layer, layer.bits(VALUE_BITS), [lost]


def _two_of_four(job: Job) -> tuple[nn.Module, int, list[float]]:
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


def _round(job: Job) -> tuple[nn.Module, int, list[float]]:
    d_out, d_in = job.weight.shape
    scales = 2 * VALUE_BITS * d_out * -(-d_in // GROUP)
    levels = int((job.bits - scales) / job.weight.numel() + 1e-9)
    if levels < 1:
        raise ValueError(f"ratio: {job.bits / job.weight.numel():.2f} bits a number are too few to round to")
    levels = min(levels, VALUE_BITS)
    return _linear(round_to_bits(job.weight, levels)), levels * job.weight.numel() + scales, []


def _linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.double(), requires_grad=False)
    return layer


SOLVERS: dict[str, Callable[[Job], tuple[nn.Module, int, list[float]]]] = {
    "procrustes": _dictionary(_procrustes, orthonormal=True),
    "ksvd": _dictionary(_pursuit("ksvd", ksvd_step), orthonormal=False),
    "mod": _dictionary(_pursuit("mod", mod_step), orthonormal=False),
    "rocket": _dictionary(_rocket, orthonormal=True),
    "svd": _svd,
    "2:4": _two_of_four,
    "round": _round,
}
