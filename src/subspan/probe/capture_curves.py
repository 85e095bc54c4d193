"""Capture curves: how much of a manifold the best n atoms of a dictionary hold, beside PCA and random dictionaries."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from subspan.base import check_matrix
from subspan.base.draws import generator_for
from subspan.geometry.grassmann import random_basis
from subspan.solvers import simultaneous_omp

from .sae_training import check_codes

CaptureMethod = Literal["geometric", "statistical", "affine"]
_FEWEST = 10
# Of the total variance: what a step adds below this is rounding.
_NOTHING = 1e-10


class CaptureCurve(NamedTuple):
    """Share of a manifold's variance by number of atoms; entry n - 1 of each curve is for n. See `capture_curve`.

    Attributes
    ----------
    method
        What `explained` says.
    order
        (m,) atoms as they are chosen; none where the manifold does not vary.
    explained
        (m,) by the first 1, 2, …, m of them.
    pca
        (p,) by as many principal directions, the most that any can hold.
    random_orthonormal, random_dictionary
        (r,), (s,) by the best of a random orthonormal basis, and of as many random atoms as the dictionary has.
    kept
        (n,) which points were used.
    """

    method: str
    order: Int[np.ndarray, " m"]
    explained: Float[np.ndarray, " m"]
    pca: Float[np.ndarray, " p"]
    random_orthonormal: Float[np.ndarray, " r"]
    random_dictionary: Float[np.ndarray, " s"]
    kept: Bool[np.ndarray, " n"]

    @property
    def elbow(self) -> int:
        """Number of atoms at the point farthest from the chord of the curve; 0 for an empty one."""
        return chord_elbow(self.explained)

    def atoms_needed(self, share: float = 0.95) -> int | None:
        """The fewest atoms that hold a share of the variance; None where the curve does not reach it."""
        return _needed(self.explained, share)

    def compactness(self, share: float = 0.95) -> float | None:
        """Atoms needed over principal directions needed: 1 where atoms span the manifold as compactly as can be."""
        atoms, directions = _needed(self.explained, share), _needed(self.pca, share)
        return None if atoms is None or directions is None else atoms / directions


def _needed(curve: Float[np.ndarray, " m"], share: float) -> int | None:
    reached = np.flatnonzero(curve >= share - 1e-9)
    return int(reached[0]) + 1 if len(reached) else None


def chord_elbow(curve: Float[np.ndarray, " m"]) -> int:
    """Number of the entry (from 1) farthest from the straight line between the ends of a curve; 0 for an empty one."""
    if not len(curve):
        return 0
    chord = np.linspace(curve[0], curve[-1], len(curve))
    # In a plot the distance to a line is the vertical one times a constant.
    return int(np.argmax(np.abs(curve - chord))) + 1


def capture_curve(
    X: Any,
    decoder: Any,
    codes: Any = None,
    *,
    method: str = "geometric",
    target: Any = None,
    max_atoms: int = 64,
    explained: float = 1.0,
    outlier: float | None = 3.0,
    controls: int = 5,
    random_state: int = 0,
) -> CaptureCurve:
    """How much of one concept's points the best atoms hold, one after the other.

    "geometric": variance in the span of the atoms' directions, by simultaneous orthogonal matching pursuit. What could
    be read if the codes were free. "statistical": variance that the contributions (z - mean z) d of the chosen atoms
    take away as they are, without a fit, as long as the next one takes any: what the autoencoder does. "affine": R² of
    the best affine map from the codes of the first n geometric atoms to the points: whether the information is there.
    Where these span all there is, a new choice begins among the others, since an axis has an atom for each sign.

    Parameters
    ----------
    X
        (n, d) points of one concept, at least 10; half precision is promoted.
    decoder
        (c, d) atoms of any length; those of length 0 are left out.
    codes
        (n, c), for "statistical" and "affine".
    method
        As above.
    target
        (n, t) what "affine" predicts, such as a manifold's own contributions; None: X.
    max_atoms
        At most so many.
    explained
        Share at which it stops.
    outlier
        Points whose norm is more than so many standard deviations above the mean norm are left out (attention sinks);
        None: none.
    controls
        Random bases and dictionaries that are averaged; 0: none.
    random_state
        Of the controls.

    Returns
    -------
    CaptureCurve

    Raises
    ------
    ValueError
        For fewer than 10 points, NaN, shapes that do not fit, codes that are needed, and max_atoms outside [1, c].

    Notes
    -----
    Codes are not negative, so an axis through the centre needs two atoms: between k + 1 and 2 k atoms span k
    dimensions. Memory O(c min(n, d)), also for 65,000 atoms.

    References
    ----------
    Bhalla et al. (2026), Do sparse autoencoders capture concept manifolds?, arXiv 2604.28119.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import capture_curve
    >>> angle = torch.linspace(0, 6.28, 100)
    >>> circle = torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
    >>> atoms = torch.cat([torch.eye(3)[:2], -torch.eye(3)[:2]])
    >>> codes = (circle @ atoms.T).relu()
    >>> capture_curve(circle, atoms, max_atoms=4).atoms_needed(0.99)
    2
    >>> capture_curve(circle, atoms, codes, method="statistical", max_atoms=4).atoms_needed(0.99)
    4
    """
    x, atoms = check_matrix(X, "X").double(), check_matrix(decoder, "decoder")
    if len(x) < _FEWEST:
        raise ValueError(f"X: {_FEWEST} points of the concept or more are needed, got {len(x)}")
    if atoms.shape[1] != x.shape[1]:
        raise ValueError(f"decoder: expected {x.shape[1]} columns, as X has, got {atoms.shape[1]}")
    if not 1 <= max_atoms <= len(atoms):
        raise ValueError(f"max_atoms: must lie in [1, {len(atoms)}], the number of atoms, got {max_atoms}")
    if not 0 < explained <= 1:
        raise ValueError(f"explained: must lie in (0, 1], got {explained}")
    if method not in get_args(CaptureMethod):
        raise ValueError(f"method: expected one of {get_args(CaptureMethod)}, got {method!r}")
    if method != "geometric" and codes is None:
        raise ValueError(f"codes: are needed for {method!r}")
    kept = typical(x, outlier)
    rows = x[kept] - x[kept].mean(0)
    z = None if codes is None else _fitting(codes, "codes", len(x), len(atoms))[kept].double()
    aim = rows if target is None else _fitting(target, "target", len(x), None)[kept].double()
    aim = aim - aim.mean(0)
    if not _varies(rows, x[kept]) or not _varies(aim, aim):
        empty = np.zeros(0)
        return CaptureCurve(method, np.zeros(0, int), empty, empty, empty, empty, kept.cpu().numpy())
    factor, pca = _principal(rows)
    options = max_atoms, explained
    if method == "statistical":
        assert z is not None
        order, curve = _statistical(rows, atoms.double(), z, *options)
    else:
        order, curve = _geometric(factor, atoms, max_atoms, 1.0 if method == "affine" else explained)
        if method == "affine":
            assert z is not None
            order = _in_rounds(factor, atoms, order, max_atoms)
            curve = _affine(aim, z[:, torch.from_numpy(order)])
            stop = _needed(curve, explained) or len(curve)
            order, curve = order[:stop], curve[:stop]
    bases, dictionaries = [], []
    for number in range(controls):
        draw = generator_for(random_state, "capture", number)
        d = x.shape[1]
        basis = random_basis(d, d, generator=draw, dtype=torch.float64).to(x.device)
        bases.append(_geometric(factor, basis.mT, min(max_atoms, d), 1.0)[1])
        drawn = torch.randn(len(atoms), d, generator=draw).to(x.device)
        dictionaries.append(_geometric(factor, drawn, max_atoms, 1.0)[1])
    return CaptureCurve(method, order, curve, pca[:max_atoms], _mean(bases), _mean(dictionaries), kept.cpu().numpy())


def typical(x: Float[Tensor, "n d"], outlier: float | None) -> Bool[Tensor, " n"]:
    """Points whose norm is at most so many standard deviations above the mean norm."""
    norms = torch.linalg.vector_norm(x, dim=1)
    if outlier is None:
        return torch.ones_like(norms, dtype=torch.bool)
    # Norms that are equal but for rounding have no outliers.
    return norms <= norms.mean() * (1 + 1e-6) + outlier * norms.std()


def _fitting(values: Any, name: str, n: int, c: int | None) -> Tensor:
    found = check_codes(values, name, c) if c is not None else check_matrix(values, name)
    if len(found) != n:
        raise ValueError(f"{name}: {n} rows are needed, one a point, got {len(found)}")
    return found


def _varies(centred: Tensor, whole: Tensor) -> bool:
    size = float(whole.square().sum())
    return float(centred.square().sum()) > 1e-20 * size and size > 0


def _principal(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "r d"], Float[np.ndarray, " p"]]:
    """A factor with the same Gram matrix over coordinates, of few rows, and the cumulative variance of PCA."""
    _, s, vh = torch.linalg.svd(rows, full_matrices=False)
    share = (s.square().cumsum(0) / s.square().sum()).cpu().numpy()
    real = s > 1e-9 * s[0]
    return s[real, None] * vh[real], share


def _geometric(
    factor: Float[Tensor, "r d"], atoms: Float[Tensor, "c d"], most: int, explained: float
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    lengths = torch.linalg.vector_norm(atoms.double(), dim=1)
    alive = (lengths > 0).nonzero().flatten()
    if not len(alive):
        return np.zeros(0, int), np.zeros(0)
    unit = F.normalize(atoms[alive].to(factor), dim=1)
    order, curve = simultaneous_omp(factor, unit, min(most, len(alive)), explained=explained)
    return alive[order].cpu().numpy(), curve.clamp(0, 1).cpu().numpy()


def _in_rounds(
    factor: Float[Tensor, "r d"], atoms: Float[Tensor, "c d"], order: Int[np.ndarray, " m"], most: int
) -> Int[np.ndarray, " k"]:
    """The order, and once the atoms span all there is, a new choice among those that are left, and so on."""
    while len(order) < most:
        left = atoms.clone()
        left[torch.from_numpy(order)] = 0
        more = _geometric(factor, left, most - len(order), 1.0)[0]
        if not len(more):
            break
        order = np.concatenate([order, more])
    return order


def _statistical(
    rows: Float[Tensor, "n d"], atoms: Float[Tensor, "c d"], z: Float[Tensor, "n c"], most: int, explained: float
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    fired = (z != 0).any(0).nonzero().flatten()
    use, directions = z[:, fired] - z[:, fired].mean(0), atoms[fired]
    cost = use.square().sum(0) * directions.square().sum(1)
    products = ((rows @ directions.mT) * use).sum(0)
    total = rows.square().sum()
    taken, order, shares, share = torch.zeros(len(fired), dtype=torch.bool, device=z.device), [], [], 0.0
    while len(order) < min(most, len(fired)) and share < explained:
        gain, atom = torch.where(taken, -torch.inf, 2 * products - cost).max(0)
        if not float(gain) > _NOTHING * float(total):
            break
        # The residual is less by a (n) times d: so are its products with every other contribution.
        products = products - (use.mT @ use[:, atom]) * (directions @ directions[atom])
        taken[atom] = True
        share += float(gain / total)
        order.append(int(fired[atom]))
        shares.append(share)
    return np.array(order, int), np.array(shares)


def _affine(aim: Float[Tensor, "n t"], z: Float[Tensor, "n m"]) -> Float[np.ndarray, " m"]:
    """R² of the least squares from the first 1, 2, …, m columns and a constant."""
    use, total = z - z.mean(0), aim.square().sum()
    basis, shares = use.new_zeros(len(use), 0), []
    share = use.new_zeros(())
    for column in use.unbind(1):
        rest = column
        for _ in range(2):  # twice is orthogonal to rounding
            rest = rest - basis @ (basis.mT @ rest)
        if float(rest.norm()) > 1e-7 * float(column.norm()) > 0:
            direction = (rest / rest.norm()).unsqueeze(1)
            basis = torch.cat([basis, direction], 1)
            share = share + (direction.mT @ aim).square().sum() / total
        shares.append(share)
    return torch.stack(shares).clamp(0, 1).cpu().numpy() if shares else np.zeros(0)


def _mean(curves: list[Float[np.ndarray, " m"]]) -> Float[np.ndarray, " m"]:
    """The mean of curves, of which those that ended early stay at their last value."""
    if not curves:
        return np.zeros(0)
    length = max(map(len, curves))
    return np.mean([np.pad(curve, (0, length - len(curve)), mode="edge") for curve in curves], axis=0)
