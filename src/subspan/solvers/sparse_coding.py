"""Rows as sparse combinations of the atoms of a dictionary, and one step of learning the dictionary from them.

Rows x (n, d) are samples, atoms (k, d) are rows of unit length, and codes C (n, k) with x ~ C atoms have few entries a
row. A dictionary is learnt by turns: code (`omp`, or `top_s` where atoms are orthonormal), then one update
(`ksvd_step`, `mod_step`, `procrustes_step`), none of which raises `coding_error`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
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
# Multiplications from which on it pays to load (the first time to make) compiled code.
_WORTH_COMPILING = 1 << 26


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """Codes (n, n_atoms) by their s entries a row.

    Parameters
    ----------
    indices
        (n, s) atoms.
    values
        (n, s) coefficients at them, 0 where a row has fewer.
    n_atoms
        Atoms of the dictionary.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import SparseCodes
    >>> codes = SparseCodes(torch.tensor([[0, 2]]), torch.tensor([[3.0, -1.0]]), 3)
    >>> codes.dense().tolist(), codes.decode(2 * torch.eye(3)).tolist()
    ([[3.0, 0.0, -1.0]], [[6.0, 0.0, -2.0]])
    """

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
    """Squared distance of all rows to what their codes stand for, |X - C atoms|_F^2.

    Parameters
    ----------
    x
        Rows (n, d).
    codes
        Codes of the rows.
    atoms
        Dictionary (k, d).

    Returns
    -------
    Scalar tensor.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import coding_error, top_s
    >>> x, atoms = torch.tensor([[3.0, 2.0, 0.0]]), torch.eye(3)
    >>> float(coding_error(x, top_s(x, atoms, 1), atoms))
    4.0
    """
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
    Elad, 2008), of which each row has its own Cholesky factor; much of that on a CPU is done by compiled code where
    numba is installed (extra `fast`). Else see `pursue`.

    Parameters
    ----------
    x
        Rows (n, d), float32 or float64, on any device.
    atoms
        Dictionary (k, d) of unit length, on the device of x.
    n_nonzero
        Atoms a row takes; fewer where it stops at `tolerance`, or where the next depends on those it has.
    tolerance
        Squared residual at which a row stops.
    progress
        Called with the share of the rows that are done; None: nothing is.

    Returns
    -------
    SparseCodes.

    Raises
    ------
    ValueError
        For n_nonzero outside [1, min(k, d)], another width, NaN, or atoms of another length than one.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import omp
    >>> codes = omp(torch.tensor([[0.0, 3.0, -1.0]]), torch.eye(3), n_nonzero=2)
    >>> codes.dense()
    tensor([[ 0.,  3., -1.]])
    """
    rows, base = _checked(x, atoms, n_nonzero)
    k, d = base.shape
    on_cpu, n, s = rows.device.type == "cpu", len(rows), n_nonzero
    # Multiplications a row: of the Gram matrix and of new directions with all atoms, which memory holds up, beside
    # those of residuals with atoms and of an explicit basis.
    by_gram = k * k * d / n + 8 * s * s * k < s * d * (k + 16 * s)
    gram = base @ base.mT if by_gram else None
    code = pursue if gram is None else partial(_gram_pursuit, gram=gram)
    step = max(1, (_CPU_BLOCK if on_cpu else _DEVICE_BLOCK) // (s * (k + s if by_gram else d) + 4 * k))
    if on_cpu:
        step = min(_ROWS, max(64, step))
    if gram is not None and on_cpu and n * s * s * k > _WORTH_COMPILING and _compiled() is not None:
        code, step = partial(_compiled_pursuit, gram=gram), _ROWS
    parts = []
    for start in range(0, n, step):
        parts.append(code(rows[start : start + step], base, n_nonzero=s, tolerance=tolerance))
        if progress is not None:
            progress(min(1.0, (start + step) / n))
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
    """`pursue` with correlations from the Gram matrix of the atoms (k, k), all rows a step.

    After each choice only the products of one new direction with all atoms are worked out, from those before.
    """
    b, device = len(targets), targets.device
    every = torch.arange(b, device=device)
    left = targets @ atoms.mT  # correlations of the residual with all atoms
    along = targets.new_zeros(b, n_nonzero, len(atoms))  # products of the orthonormal directions with all atoms
    triangle = torch.eye(n_nonzero, dtype=targets.dtype, device=device).repeat(b, 1, 1)
    weights = targets.new_zeros(b, n_nonzero)
    chosen = torch.zeros(b, n_nonzero, dtype=torch.int64, device=device)
    rest, active = targets.square().sum(1), torch.ones(b, dtype=torch.bool, device=device)
    least = _least(targets.dtype)
    for step in range(n_nonzero):
        best, atom = left.abs().max(1)
        before = along[:, :step]
        inner = before.gather(2, atom.view(b, 1, 1).expand(b, step, 1)).squeeze(2)
        square = gram[atom, atom] - inner.square().sum(1)
        active = active & (rest > tolerance) & (square > least) & (best > 0)
        if not bool(active.any()):
            break
        scale = torch.where(active, square.clamp_min(least).rsqrt(), 0)
        fresh = torch.baddbmm(gram[atom].unsqueeze(1), inner.unsqueeze(1), before, alpha=-1).squeeze(1)
        torch.mul(fresh, scale.unsqueeze(1), out=along[:, step])
        weight = left[every, atom] * scale
        left.addcmul_(along[:, step], weight.unsqueeze(1), value=-1)
        left[every, atom] = 0
        rest = rest - weight.square()
        triangle[:, :step, step] = torch.where(active.unsqueeze(1), inner, 0)
        triangle[:, step, step] = torch.where(active, square.clamp_min(least).sqrt(), 1)
        weights[:, step], chosen[:, step] = weight, torch.where(active, atom, 0)
    return chosen, torch.linalg.solve_triangular(triangle, weights.unsqueeze(2), upper=True).squeeze(2)


def _compiled_pursuit(
    rows: Tensor, atoms: Tensor, gram: Tensor, n_nonzero: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The same by compiled code, each thread a share of the rows."""
    run = _compiled()
    assert run is not None
    chosen = torch.zeros(len(rows), n_nonzero, dtype=torch.int64)
    values = rows.new_zeros(len(rows), n_nonzero)
    parts = [part.detach().numpy() for part in (rows @ atoms.mT, rows.square().sum(1), chosen, values)]
    threads = torch.get_num_threads()
    shares = list(zip(*(np.array_split(part, threads) for part in parts)))

    def work(share: Any) -> None:
        products, squares, *written = share
        run(products, squares, gram.detach().numpy(), tolerance, _least(rows.dtype), *written)

    if threads == 1:
        work(shares[0])
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, shares))
    return chosen, values


def _least(dtype: torch.dtype) -> float:
    """As in `pursue`; the square of the length has the rounding of products."""
    return 1e3 * torch.finfo(dtype).eps


@cache
def _compiled() -> Callable[..., None] | None:
    """Compiled pursuit; None without numba, or with one that does not go with this NumPy."""
    try:
        from .compiled_pursuit import gram_pursuit_rows
    except ImportError:
        return None
    return gram_pursuit_rows


def top_s(x: Any, atoms: Any, n_nonzero: int) -> SparseCodes:
    """The largest correlations of each row with the atoms: its best code where the atoms are orthonormal.

    Parameters
    ----------
    x
        Rows (n, d).
    atoms
        Dictionary (k, d) of unit length.
    n_nonzero
        Atoms a row takes, in [1, min(k, d)].

    Returns
    -------
    SparseCodes.

    Raises
    ------
    ValueError
        As `omp`.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import top_s
    >>> top_s(torch.tensor([[1.0, 3.0, -2.0]]), torch.eye(3), 2).dense()
    tensor([[ 0.,  3., -2.]])
    """
    rows, base = _checked(x, atoms, n_nonzero)
    products = rows @ base.mT
    # In no order: sorting would take longer than choosing.
    indices = products.abs().topk(n_nonzero, dim=1, sorted=False).indices
    return SparseCodes(indices, products.gather(1, indices), len(base))


def simultaneous_omp(
    x: Any, atoms: Any, n_atoms: int, *, explained: float = 1.0
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Atoms for all rows together, each the one along which the residuals of all rows have most energy.

    Time O(k (n + d)) a step.

    Parameters
    ----------
    x
        Rows (n, d).
    atoms
        Dictionary (k, d) of unit length.
    n_atoms
        Atoms at most, in [1, k]; fewer where none has energy left.
    explained
        Share of sum |x|^2 in their span at which it stops.

    Returns
    -------
    Atoms (m,), in order, and the share of sum |x|^2 in the span of the first 1, 2, …, m of them (m,).

    Raises
    ------
    ValueError
        For rows that are all zero, and as `omp`.

    References
    ----------
    Tropp, Gilbert & Strauss (2006), Algorithms for simultaneous sparse approximation.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import simultaneous_omp
    >>> order, shares = simultaneous_omp(torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]]), torch.eye(3), 3)
    >>> order.tolist(), [round(float(share), 4) for share in shares]
    ([1, 0], [0.9, 1.0])
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
    if not order:  # no atom has any energy
        return torch.zeros(0, dtype=torch.int64, device=rows.device), rows.new_zeros(0)
    return torch.stack(order), torch.stack(shares)


def ksvd_step(
    x: Float[Tensor, "n d"], codes: SparseCodes, atoms: Float[Tensor, "k d"], *, n_power: int = 8
) -> tuple[Float[Tensor, "k d"], SparseCodes]:
    """New atoms one after the other, each with its entries of the codes, on the rows that use it (K-SVD).

    An atom that no row uses becomes the row that is coded worst. The error never rises.

    Parameters
    ----------
    x
        Rows (n, d).
    codes
        Codes of the rows.
    atoms
        Dictionary (k, d).
    n_power
        Power iterations of each rank-one fit, from the atom as it was.

    Returns
    -------
    New atoms (k, d) of unit length and new codes.

    References
    ----------
    Aharon, Elad & Bruckstein (2006), K-SVD: an algorithm for designing overcomplete dictionaries.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import coding_error, ksvd_step, omp
    >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    >>> codes = omp(x, torch.eye(4), 2)
    >>> better, refined = ksvd_step(x, codes, torch.eye(4))
    >>> bool(coding_error(x, refined, better) < coding_error(x, codes, torch.eye(4)))
    True
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

    An atom that no row uses stays as it is. The error never rises.

    Parameters
    ----------
    x
        Rows (n, d).
    codes
        Codes of the rows.
    atoms
        Dictionary (k, d).

    Returns
    -------
    New atoms (k, d) of unit length and new codes.

    References
    ----------
    Engan, Aase & Husøy (1999), Method of optimal directions for frame design.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import coding_error, mod_step, omp
    >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    >>> codes = omp(x, torch.eye(4), 2)
    >>> better, scaled = mod_step(x, codes, torch.eye(4))
    >>> bool(coding_error(x, scaled, better) < coding_error(x, codes, torch.eye(4)))
    True
    """
    dense = codes.dense()
    solved = torch.linalg.pinv(dense.mT @ dense, hermitian=True) @ (dense.mT @ x)
    length = torch.linalg.vector_norm(solved, dim=1)
    atoms = torch.where((length > 0).unsqueeze(1), normalize_rows(solved), atoms)
    return atoms, SparseCodes(codes.indices, codes.values * length[codes.indices], codes.n_atoms)


def procrustes_step(x: Float[Tensor, "n d"], codes: SparseCodes) -> Float[Tensor, "k d"]:
    """The orthonormal atoms that fit rows to their codes best: the polar factor of C'X.

    Parameters
    ----------
    x
        Rows (n, d).
    codes
        Codes of the rows, for at most d atoms.

    Returns
    -------
    Atoms (k, d), orthonormal.

    Raises
    ------
    ValueError
        For more atoms than dimensions.

    Examples
    --------
    >>> import torch
    >>> from subspan.solvers import procrustes_step, top_s
    >>> x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    >>> atoms = procrustes_step(x, top_s(x, torch.eye(3), 1))
    >>> (atoms @ atoms.T).allclose(torch.eye(3), atol=1e-5)
    True
    """
    if codes.n_atoms > x.shape[1]:
        raise ValueError(f"codes: {codes.n_atoms} atoms cannot be orthonormal in {x.shape[1]} dimensions")
    return polar((codes.dense().mT @ x).mT).mT
