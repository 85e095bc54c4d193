"""Rows as sparse combinations of the atoms of a dictionary, and one step of learning the dictionary from them.

Rows x (n, d) are samples, atoms (k, d) are rows of unit length, and codes C (n, k) with x ~ C atoms have few entries a
row. A dictionary is learnt by turns: code (`omp`, or `top_s` where atoms are orthonormal), then one update
(`ksvd_step`, `mod_step`, `procrustes_step`), none of which raises `coding_error`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from subspan.base import check_matrix, normalize_rows
from subspan.geometry.grassmann import polar

from .neighbours import largest_product

Progress = Callable[[float], None]
# Numbers of the factors that a block of rows works on: what stays in a cache, and what a device is kept busy with.
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 22, 1 << 28
_ROWS = 512


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """Codes (n, n_atoms) by their entries: `values` (n, s) at the atoms `indices` (n, s), 0 where a row has fewer."""

    indices: Int[Tensor, "n s"]
    values: Float[Tensor, "n s"]
    n_atoms: int

    def dense(self) -> Float[Tensor, "n k"]:
        """The codes with their zeros."""
        whole = self.values.new_zeros(len(self.values), self.n_atoms)
        return whole.scatter_add_(1, self.indices, self.values)

    def decode(self, atoms: Float[Tensor, "k d"]) -> Float[Tensor, "n d"]:
        """The rows that the codes stand for."""
        return F.embedding_bag(self.indices, atoms.to(self.values), per_sample_weights=self.values, mode="sum")


def coding_error(x: Float[Tensor, "n d"], codes: SparseCodes, atoms: Float[Tensor, "k d"]) -> Float[Tensor, ""]:
    """Squared distance of all rows to what their codes stand for, |X - C atoms|_F^2."""
    return (x - codes.decode(atoms)).square().sum()


def omp(
    x: Any,
    atoms: Any,
    n_nonzero: int,
    *,
    tolerance: float = 0.0,
    progress: Progress | None = None,
) -> SparseCodes:
    """Orthogonal matching pursuit of each row by the atoms: the most correlated with what is left, then a new fit.

    Where many are chosen of not too many, correlations come from the Gram matrix of the atoms (Rubinstein, Zibulevsky &
    Elad, 2008) and the fit from the inverse of its Cholesky factor, row by row; else see `pursue`.

    Parameters
    ----------
    x : (n, d) rows, float32 or float64, on any device.
    atoms : (k, d) of unit length, on the device of x.
    n_nonzero : atoms a row takes; fewer where it stops at `tolerance`, or where the next depends on those it has.
    tolerance : squared residual at which a row stops.
    progress : called with the share of the rows that are done.

    Raises
    ------
    ValueError
        For n_nonzero outside [1, min(k, d)], another width, NaN, or atoms of another length than one.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers.sparse_coding import omp
    >>> codes = omp(torch.tensor([[0.0, 3.0, -1.0]]), torch.eye(3), n_nonzero=2)
    >>> codes.dense()
    tensor([[ 0.,  3., -1.]])
    """
    rows, base = _checked(x, atoms, n_nonzero)
    k, d = base.shape
    # Sizes at which the Gram matrix is faster: its products cost k a step, an explicit basis 2 d for each atom chosen.
    gram = base @ base.mT if k * k < d * (k + 16 * n_nonzero) else None
    numbers = _CPU_BLOCK if rows.device.type == "cpu" else _DEVICE_BLOCK
    size = n_nonzero * (2 * n_nonzero if gram is not None else d) + 4 * k
    step = min(_ROWS, max(64, numbers // size)) if rows.device.type == "cpu" else max(1, numbers // size)
    parts = []
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if gram is None:
            parts.append(pursue(part, base, n_nonzero, tolerance))
        else:
            parts.append(_gram_pursuit(part, base, gram, n_nonzero, tolerance))
        if progress is not None:
            progress(min(1.0, (start + step) / len(rows)))
    indices, values = (torch.cat(found) for found in zip(*parts))
    return SparseCodes(indices, values, k)


def _checked(x: Any, atoms: Any, n_nonzero: int) -> tuple[Tensor, Tensor]:
    rows = check_matrix(x, "x", min_rows=1)
    base = check_matrix(atoms, "atoms", columns=rows.shape[1])
    if not 1 <= n_nonzero <= min(base.shape):
        raise ValueError(f"n_nonzero: must lie in [1, {min(base.shape)}], got {n_nonzero}")
    dtype = torch.promote_types(torch.promote_types(rows.dtype, base.dtype), torch.float32)
    rows, base = rows.to(dtype), base.to(dtype)
    length = torch.linalg.vector_norm(base, dim=1)
    if float((length - 1).abs().max()) > 1e-3:
        raise ValueError(f"atoms: must have unit length, got {float(length.min()):g} … {float(length.max()):g}")
    return rows, base


def pursue(
    targets: Float[Tensor, "b d"],
    atoms: Float[Tensor, "k d"],
    n_nonzero: int,
    tolerance: float,
    *,
    exclude: Int[Tensor, " b"] | None = None,
) -> tuple[Int[Tensor, "b s"], Float[Tensor, "b s"]]:
    """Chosen atoms and coefficients of a block of rows, without a Gram matrix; exclude: an atom each row may not take.

    Correlations are one product a step, never k numbers a row at once; the least squares are updated by a batched
    Cholesky factor beside an orthonormal basis of what was chosen. Nothing is checked.
    """
    b, device = len(targets), targets.device
    chosen = torch.zeros(b, n_nonzero, dtype=torch.int64, device=device)
    used = torch.zeros(b, n_nonzero, dtype=torch.bool, device=device)
    basis = targets.new_zeros(b, n_nonzero, targets.shape[1])  # orthonormalised atoms
    triangle = torch.eye(n_nonzero, dtype=targets.dtype, device=device).repeat(b, 1, 1)  # atoms = triangle' basis
    weights = targets.new_zeros(b, n_nonzero)
    residual, active = targets.clone(), torch.ones(b, dtype=torch.bool, device=device)
    for step in range(n_nonzero):
        active &= residual.square().sum(1) > tolerance
        if not bool(active.any()):
            break
        best, atom = largest_product(residual, atoms, absolute=True, exclude=exclude)
        fresh = atoms[atom]
        inner = (basis[:, :step] @ fresh.unsqueeze(2)).squeeze(2)
        fresh = fresh - (basis[:, :step].mT @ inner.unsqueeze(2)).squeeze(2)
        norm = fresh.norm(dim=1)
        # An atom inside the span of those chosen (one of them again, or a duplicate) adds nothing; the row stops.
        active &= (norm > 1e3 * torch.finfo(targets.dtype).eps) & (best > 0)
        direction = fresh / norm.unsqueeze(1)
        weight = (residual * direction).sum(1)
        basis[:, step] = torch.where(active.unsqueeze(1), direction, 0)
        triangle[:, :step, step] = torch.where(active.unsqueeze(1), inner, 0)
        triangle[:, step, step] = torch.where(active, norm, 1)
        weights[:, step] = torch.where(active, weight, 0)
        chosen[:, step], used[:, step] = atom, active
        residual -= weights[:, step : step + 1] * basis[:, step]
    coefficients = torch.linalg.solve_triangular(triangle, weights.unsqueeze(2), upper=True).squeeze(2)
    return chosen, torch.where(used, coefficients, torch.zeros_like(coefficients))


def _gram_pursuit(
    targets: Tensor, atoms: Tensor, gram: Tensor, n_nonzero: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """`pursue` with correlations from the Gram matrix of the atoms (k, k)."""
    b, device = len(targets), targets.device
    every = torch.arange(b, device=device)
    start = targets @ atoms.mT
    left, codes = start.clone(), torch.zeros_like(start)  # correlations of the residual with all atoms; dense codes
    # Inverse of the Cholesky factor of each row's own Gram matrix, also transposed: products are fast from one side.
    inverse = targets.new_zeros(b, n_nonzero, n_nonzero)
    turned = torch.zeros_like(inverse)
    chosen = torch.zeros(b, n_nonzero, dtype=torch.int64, device=device)
    rest, active = targets.square().sum(1), torch.ones(b, dtype=torch.bool, device=device)
    least = 1e3 * torch.finfo(targets.dtype).eps
    for step in range(n_nonzero):
        best, atom = left.abs().max(1)
        inner = gram[atom.unsqueeze(1), chosen[:, :step]].unsqueeze(1) @ turned[:, :step, :step]
        square = gram[atom, atom] - inner.square().sum((1, 2))
        # As in `pursue`; the square of the length has the rounding of products.
        active = active & (rest > tolerance) & (square > least) & (best > 0)
        if not bool(active.any()):
            break
        scale = torch.where(active, square.clamp_min(least).rsqrt(), 0)
        row = -(inner @ inverse[:, :step, :step]).squeeze(1) * scale.unsqueeze(1)
        inverse[:, step, :step], inverse[:, step, step] = row, scale
        turned[:, :step, step], turned[:, step, step] = row, scale
        weight = left[every, atom] * scale
        rest = rest - weight.square()
        chosen[:, step] = torch.where(active, atom, 0)
        codes.scatter_add_(1, chosen[:, : step + 1], weight.unsqueeze(1) * inverse[:, step, : step + 1])
        torch.addmm(start, codes, gram, alpha=-1, out=left)
        left.scatter_(1, chosen[:, : step + 1], 0)
    used = inverse.diagonal(dim1=1, dim2=2) > 0
    return chosen, torch.where(used, codes.gather(1, chosen), 0)


def top_s(x: Any, atoms: Any, n_nonzero: int) -> SparseCodes:
    """The n_nonzero largest correlations of each row with the atoms: its best code where the atoms are orthonormal."""
    rows, base = _checked(x, atoms, n_nonzero)
    products = rows @ base.mT
    indices = products.abs().topk(n_nonzero, dim=1).indices
    return SparseCodes(indices, products.gather(1, indices), len(base))


def simultaneous_omp(
    x: Any, atoms: Any, n_atoms: int, *, explained: float = 1.0
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Atoms for all rows together, in order, and the share of sum |x|^2 in the span of the first 1, 2, …, m of them.

    Each step takes the atom along which the residuals of all rows have most energy (Tropp, Gilbert & Strauss, 2006). It
    stops at `n_atoms`, at `explained`, or where no atom has energy left. Time O(k (n + d)) a step.
    """
    rows, base = _checked(x, atoms, 1)
    if not 1 <= n_atoms <= len(base):
        raise ValueError(f"n_atoms: must lie in [1, {len(base)}], got {n_atoms}")
    total = rows.square().sum()
    if not float(total) > 0:
        raise ValueError("x: all rows are zero")
    products, basis = base @ rows.mT, rows.new_zeros(0, rows.shape[1])
    order, shares, share = [], [], rows.new_zeros(())
    while len(order) < n_atoms and float(share) < explained:
        energy, atom = products.square().sum(1).max(0)
        direction = base[atom]
        for _ in range(2):  # twice is orthogonal to rounding
            direction = direction - (basis @ direction) @ basis
        if not float(energy) > torch.finfo(rows.dtype).eps * float(total) or not float(direction.norm()) > 1e-6:
            break
        direction = direction / direction.norm()
        along = rows @ direction
        products -= torch.outer(base @ direction, along)
        basis = torch.cat([basis, direction.unsqueeze(0)])
        share = share + along.square().sum() / total
        order.append(atom)
        shares.append(share)
    return torch.stack(order), torch.stack(shares)


def ksvd_step(
    x: Float[Tensor, "n d"], codes: SparseCodes, atoms: Float[Tensor, "k d"], *, n_power: int = 8
) -> tuple[Float[Tensor, "k d"], SparseCodes]:
    """New atoms one after the other, each with its entries of the codes, on the rows that use it (K-SVD).

    n_power: power iterations of each rank-one fit, from the atom as it was, so that the error never rises. An atom
    that no row uses becomes the row that is coded worst. Source: Aharon, Elad & Bruckstein, 2006.
    """
    atoms, values = atoms.clone(), codes.values.flatten().clone()
    residual = x - codes.decode(atoms)
    entries = values.nonzero()[:, 0]
    atom_of = codes.indices.flatten()[entries]
    entries = entries[atom_of.argsort(stable=True)]
    counts = atom_of.bincount(minlength=codes.n_atoms)
    for k, places in enumerate(entries.split(counts.tolist())):
        if not len(places):
            continue
        rows = places // codes.values.shape[1]
        part = residual[rows] + torch.outer(values[places], atoms[k])
        direction = atoms[k]
        for _ in range(n_power):
            direction = normalize_rows((part @ direction) @ part)
        if not bool(direction.any()):  # rows that these entries leave nothing of
            continue
        atoms[k], values[places] = direction, part @ direction
        residual[rows] = part - torch.outer(values[places], direction)
    unused = (counts == 0).nonzero()[:, 0][: len(x)]
    error, worst = residual.square().sum(1).topk(len(unused))
    atoms[unused[error > 0]] = normalize_rows(residual[worst[error > 0]])
    return atoms, SparseCodes(codes.indices, values.view_as(codes.values), codes.n_atoms)


def mod_step(
    x: Float[Tensor, "n d"], codes: SparseCodes, atoms: Float[Tensor, "k d"]
) -> tuple[Float[Tensor, "k d"], SparseCodes]:
    """All atoms at once by least squares, scaled to one with the codes scaled back (method of optimal directions).

    An atom that no row uses stays as it is. Source: Engan, Aase & Husøy, 1999.
    """
    dense = codes.dense()
    solved = torch.linalg.pinv(dense.mT @ dense, hermitian=True) @ (dense.mT @ x)
    length = torch.linalg.vector_norm(solved, dim=1)
    atoms = torch.where((length > 0).unsqueeze(1), normalize_rows(solved), atoms)
    return atoms, SparseCodes(codes.indices, codes.values * length[codes.indices], codes.n_atoms)


def procrustes_step(x: Float[Tensor, "n d"], codes: SparseCodes) -> Float[Tensor, "k d"]:
    """The orthonormal atoms that fit rows to their codes best: the polar factor of C'X. Raises ValueError for k > d."""
    if codes.n_atoms > x.shape[1]:
        raise ValueError(f"codes: {codes.n_atoms} atoms cannot be orthonormal in {x.shape[1]} dimensions")
    return polar((codes.dense().mT @ x).mT).mT
