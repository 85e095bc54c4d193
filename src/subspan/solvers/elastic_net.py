"""Many small elastic nets at once: by homotopy where numba is installed, else by scikit-learn's coordinate descent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn import config_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import enet_path
from torch import Tensor

# Sweeps of coordinate descent, and those for a row of which more than single digits are asked.
_SWEEPS, _FINE_SWEEPS = 60, 1200


def elastic_nets(
    grams: Float[Tensor, "b s s"],
    linear: Float[Tensor, "b s"],
    l1: Float[Tensor, " b"],
    l2: Float[Tensor, " b"],
    squares: Float[Tensor, " b"],
    start: Float[Tensor, "b s"],
    present: Bool[Tensor, "b s"],
    *,
    tolerance: float,
) -> Float[Tensor, "b s"]:
    """min c'Gc/2 - q'c + l1 |c|_1 + l2/2 |c|^2 of each row, from `start`, by the atoms that are `present`.

    squares: |y|^2 of the target that q are the products with, for the duality gap of coordinate descent. With numba
    (extra `fast`) exactly, by homotopy, each thread a share of the rows; without it, and for rows with ties that the
    homotopy cannot part, by coordinate descent to `tolerance`. On the CPU; G is overwritten.
    """
    arrays = [part.cpu().numpy() for part in (grams, linear, l1, l2, start, present)]
    found, settled = np.zeros(linear.shape), np.zeros(len(linear), bool)
    homotopy = _homotopy()
    if homotopy is not None:
        parts = (*arrays, found, settled)
        threads = torch.get_num_threads()
        if threads == 1:
            homotopy(*parts)
        else:
            shares = zip(*(np.array_split(part, threads) for part in parts))
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda share: homotopy(*share), shares))
    rest = np.flatnonzero(~settled)
    if len(rest):
        targets = squares.sqrt().cpu().numpy()
        found[rest] = _coordinate_descents(*(part[rest] for part in (*arrays, targets)), tolerance=tolerance)
    return torch.from_numpy(found).to(linear)


@cache
def _homotopy() -> Callable[..., None] | None:
    """The compiled solver; None without numba, or with one that does not go with this NumPy."""
    try:
        from .homotopy import elastic_net_homotopy
    except ImportError:
        return None
    return elastic_net_homotopy


def _coordinate_descents(
    grams: np.ndarray, linear: np.ndarray, l1: np.ndarray, l2: np.ndarray, start: np.ndarray, present: np.ndarray,
    targets: np.ndarray, *, tolerance: float,
) -> np.ndarray:  # fmt: skip
    """The same by scikit-learn, one row at a time: rows settle after very different numbers of sweeps."""
    result = np.empty_like(linear)
    # An atom that is absent is one of zeros, which the solver passes over.
    grams, linear = grams * (present[:, :, None] & present[:, None, :]), linear * present
    # Of the target the solver uses no more than its length, and of the atoms nothing.
    atoms = np.ones((1, linear.shape[1]), linear.dtype)
    with warnings.catch_warnings(), config_context(skip_parameter_validation=True):
        # Rows that lie in a subspace exactly have no unique answer at small penalties; any of them will do.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for row in range(len(result)):
            penalty = float(l1[row] + l2[row])
            options: dict[str, Any] = {"alphas": [penalty], "precompute": grams[row], "Xy": linear[row]}
            result[row] = enet_path(
                atoms, targets[row : row + 1], l1_ratio=float(l1[row]) / penalty, coef_init=start[row],
                check_input=False, tol=tolerance, max_iter=_SWEEPS if tolerance >= 1e-4 else _FINE_SWEEPS, **options,
            )[1][:, 0]  # fmt: skip
    return result
