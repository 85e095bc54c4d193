"""Which atoms fire on a manifold, on how much of it each, and how their codes go with a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from subspan.base import check_matrix

from .sae_training import check_codes

Regime = Literal["capture", "shatter", "dilution"]
_POINTS = 2000
_SHARE, _FEWEST_POINTS = 0.1, 30
_LOCAL = 0.5


class Diagnostics(NamedTuple):
    """How atoms share a manifold; see `manifold_diagnostics`.

    Attributes
    ----------
    support
        Atoms that fire on enough of its points.
    spreads
        Of each of them: mean distance between the points where it fires over that between all points.
    spread
        The median of these; 0 without support.
    co_firing
        Mean share of the support that fires on a point.
    regime
        "shatter": spread below a half, atoms are tiles. Else "capture" for at most two atoms a dimension, "dilution"
        for more.
    """

    support: Int[np.ndarray, " s"]
    spreads: Float[np.ndarray, " s"]
    spread: float
    co_firing: float
    regime: Regime


def manifold_diagnostics(
    codes: Any, points: Any, active: Any = None, *, dim: int | None = None, min_points: int = _FEWEST_POINTS
) -> Diagnostics:
    """Support, receptive fields and regime of the atoms that fire on a manifold.

    Parameters
    ----------
    codes
        (n, c).
    points
        (n, d) points of the manifold: its own contributions, or activations of a concept.
    active
        (n,) rows that belong to the manifold; None: all.
    dim
        Dimensions of its subspace; None: those that hold 95 % of its variance.
    min_points
        An atom of the support fires on a tenth of the points and at least on so many (of few points, on half of them).

    Returns
    -------
    Diagnostics

    Raises
    ------
    ValueError
        For fewer than 10 points, NaN, and shapes that do not fit.

    References
    ----------
    Bhalla et al. (2026), arXiv 2604.28119, as replicated; the borders between regimes are ours.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import manifold_diagnostics
    >>> angle = torch.arange(240) * 6.2832 / 240
    >>> circle = torch.stack([angle.cos(), angle.sin()], 1)
    >>> tiles = torch.eye(6).repeat_interleave(40, 0)  # six atoms, each on a sixth of the circle
    >>> found = manifold_diagnostics(tiles, circle, min_points=20)
    >>> found.regime, len(found.support), found.spread < 0.3
    ('shatter', 6, True)
    """
    x = check_matrix(points, "points")
    z = check_codes(codes, "codes", None)
    if len(z) != len(x):
        raise ValueError(f"codes: {len(x)} rows are needed, one a point, got {len(z)}")
    if active is not None:
        rows = torch.as_tensor(active)
        if rows.dtype != torch.bool or rows.shape != (len(x),):
            raise ValueError(f"active: {len(x)} booleans are needed, got {rows.dtype} of shape {tuple(rows.shape)}")
        x, z = x[rows], z[rows]
    if len(x) < 10:
        raise ValueError(f"points: 10 points of the manifold or more are needed, got {len(x)}")
    fires = z != 0
    counts = fires.sum(0)
    least = max(_SHARE * len(x), min(min_points, len(x) / 2))
    support = (counts >= least).nonzero().flatten()
    spreads = receptive_fields(fires[:, support], x)
    spread = float(spreads.median()) if len(support) else 0.0
    sharing = float(fires[:, support].float().mean()) if len(support) else 0.0
    if dim is None:
        values = torch.linalg.svdvals((x - x.mean(0)).double()).square()
        dim = int((values.cumsum(0) < 0.95 * values.sum()).sum()) + 1
    regime: Regime = "shatter" if spread < _LOCAL else "capture" if len(support) <= 2 * dim else "dilution"
    return Diagnostics(support.cpu().numpy(), spreads.cpu().numpy(), spread, sharing, regime)


def receptive_fields(fires: Bool[Tensor, "n s"], points: Float[Tensor, "n d"]) -> Float[Tensor, " s"]:
    """Mean distance between points where each atom fires over that of all points; of the first 2,000 points.

    0 where an atom fires on fewer than two of them, or all points are one.
    """
    fires, x = fires[:_POINTS].double(), points[:_POINTS].double()
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    counts = fires.sum(0)
    within = ((distances @ fires) * fires).sum(0) / (counts * (counts - 1)).clamp_min(1)
    whole = distances.sum() / (len(x) * (len(x) - 1))
    return within / whole if float(whole) > 0 else torch.zeros_like(within)


class TuningCurves(NamedTuple):
    """Mean codes by label, smoothed and brought to [0, 1]; see `tuning_curves`.

    Attributes
    ----------
    labels
        Values, in ascending order.
    atoms
        (a,) in the order of their peaks.
    curves
        (a, v).
    """

    labels: list[Any]
    atoms: Int[np.ndarray, " a"]
    curves: Float[np.ndarray, "a v"]

    def unimodal(self) -> Bool[np.ndarray, " a"]:
        """Of each atom whether all values above a half follow one another: one bump, not several."""
        above = np.pad((self.curves > 0.5).astype(int), ((0, 0), (1, 1)))
        return (np.diff(above, axis=1) == 1).sum(1) == 1


def tuning_curves(codes: Any, labels: Sequence[Any], atoms: Sequence[int], *, sigma: float = 3.0) -> TuningCurves:
    """How the codes of some atoms go with an ordered label, such as a year.

    Parameters
    ----------
    codes
        (n, c).
    labels
        (n,) values that can be ordered.
    atoms
        Which columns, such as the first ten of a statistical capture curve.
    sigma
        Standard deviation of the Gaussian by which curves are smoothed, in values; 0: none.

    Returns
    -------
    TuningCurves

    Raises
    ------
    ValueError
        For other than one label a row, fewer than two values, and atoms out of range.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import tuning_curves
    >>> years = list(range(1900, 1960))
    >>> codes = torch.stack([(torch.arange(60.0) - peak).square().neg().div(50).exp() for peak in (40, 10)], 1)
    >>> found = tuning_curves(codes, years, [0, 1])
    >>> found.atoms.tolist(), [years[curve.argmax()] for curve in found.curves], found.unimodal().tolist()
    ([1, 0], [1910, 1940], [True, True])
    """
    z = check_codes(codes, "codes", None)
    if len(labels) != len(z):
        raise ValueError(f"labels: {len(z)} are needed, one a row, got {len(labels)}")
    chosen = torch.as_tensor(np.asarray(list(atoms), dtype=np.int64))
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < z.shape[1]:
        raise ValueError(f"atoms: must lie in [0, {z.shape[1] - 1}], got {list(atoms)}")
    if not sigma >= 0:
        raise ValueError(f"sigma: must be 0 or more, got {sigma}")
    values, places = np.unique(np.asarray(labels), return_inverse=True)
    if len(values) < 2:
        raise ValueError(f"labels: two values or more are needed, got {len(values)}")
    groups = torch.from_numpy(places.reshape(-1))
    sums = torch.zeros(len(values), len(chosen), dtype=torch.float64).index_add_(0, groups, z[:, chosen].double().cpu())
    means = (sums / groups.bincount().unsqueeze(1)).numpy().T
    smooth = gaussian_filter1d(means, sigma, axis=1, mode="nearest") if sigma else means
    low, high = smooth.min(1, keepdims=True), smooth.max(1, keepdims=True)
    curves = (smooth - low) / np.where(high > low, high - low, 1)
    order = np.argsort(curves.argmax(1), kind="stable")
    return TuningCurves(values.tolist(), chosen.numpy()[order], curves[order])
