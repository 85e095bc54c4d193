"""Trajectories at the door: one, several of unequal length, or one in batches; rows with those before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base.arrays import is_sparse
from subspan.datasets import Series

_BLOCK_NUMBERS = 1 << 21


def listed_trajectories(X: Any, dim: int = 2) -> list[Any]:
    """X as a list of trajectories, each with `dim` axes: a `Series`, one array or frame, an array of more, or a list.

    A list of lists is one matrix.
    """
    if isinstance(X, Series):
        return list(X.trajectories)
    if isinstance(X, list | tuple):
        return list(X) if len(X) and np.ndim(X[0]) == dim else [X]
    return list(X) if getattr(X, "ndim", dim) == dim + 1 else [X]


def comes_in_batches(X: Any) -> bool:
    """Whether X gives one trajectory batch by batch: an iterator or a DataLoader."""
    arrays = hasattr(X, "__array__") or isinstance(X, Series | Tensor | list | tuple | str) or is_sparse(X)
    return not arrays and hasattr(X, "__iter__")


def delayed(rows: Float[Tensor, "n c"], delays: int) -> Float[Tensor, "m p"]:
    """Each row behind the `delays - 1` rows before it, the newest last: (n - delays + 1, delays c)."""
    if delays == 1:
        return rows
    return rows.unfold(0, delays, 1).transpose(1, 2).reshape(len(rows) - delays + 1, -1)


def overlapping(rows: Float[Tensor, "n c"], shared: int, width: int) -> Iterator[Float[Tensor, "b c"]]:
    """Blocks that share `shared` rows with the next, so that what spans `shared + 1` rows is in one block and once."""
    size = max(shared + 1, _BLOCK_NUMBERS // max(1, width))
    for start in range(0, max(1, len(rows) - shared), size):
        yield rows[start : start + size + shared]


def rollout_errors(
    forecast: Callable[[Any, int], Any],
    trajectories: Sequence[Any],
    horizons: Sequence[int],
    *,
    history: int = 1,
    starts: int = 8,
) -> dict[int, float]:
    """Error of roll-outs after each of some numbers of steps: root mean square over the data's standard deviation.

    Parameters
    ----------
    forecast
        From histories (m, history, *state) and a number of steps to (m, steps, *state), such as ``model.predict``.
    trajectories
        Arrays (n_i, c) or fields (n_i, c, h, w); the deviation is that of all their rows, a channel at a time, of
        fields about each pixel's mean; what is constant does not count.
    horizons
        Steps ahead.
    history
        Rows that a forecast starts from.
    starts
        Of each trajectory, evenly over it.

    Returns
    -------
    dict: horizon → error; 1 is that of the mean.

    Raises
    ------
    ValueError
        Where no trajectory is as long as the history and the longest horizon.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.dynamics import rollout_errors
    >>> wave = np.sin(np.arange(200) / 5)[:, None]
    >>> persistence = lambda x, steps: np.repeat(x[:, -1:], steps, axis=1)
    >>> {h: round(error, 1) for h, error in rollout_errors(persistence, [wave], [1, 16]).items()}
    {1: 0.2, 16: 1.9}
    """
    steps = max(horizons)
    histories, futures = [], []
    for part in map(np.asarray, trajectories):
        last = len(part) - history - steps
        for start in np.unique(np.linspace(0, last, starts).astype(int)) if last >= 0 else ():
            histories.append(part[start : start + history])
            futures.append(part[start + history : start + history + steps])
    if not histories:
        raise ValueError(f"trajectories: none has the {history + steps} rows of a history and {steps} steps ahead")
    every = np.concatenate([np.asarray(part) for part in trajectories]).astype(np.float64)
    inner = tuple(range(1, every.ndim - 1))
    deviation = np.sqrt(every.var(axis=0).mean(axis=inner))
    moving = deviation > 1e-10 * np.abs(every).max(axis=(0, *(axis + 1 for axis in inner)))
    found = np.asarray(forecast(np.stack(histories), steps), dtype=np.float64)
    apart = np.moveaxis(found - np.stack(futures), 2, -1)[..., moving] / deviation[moving]
    return {h: float(np.sqrt(np.mean(apart[:, h - 1] ** 2))) for h in horizons}


def seasonal_naive(season: int) -> Callable[[Any, int], Any]:
    """The forecast that repeats the last rows of a history.

    Parameters
    ----------
    season
        How many; 1: persistence.

    Returns
    -------
    A function from histories (m, history, *state) and a number of steps to (m, steps, *state), for `rollout_errors`.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.dynamics import seasonal_naive
    >>> seasonal_naive(2)(np.array([[[1.0], [2.0], [3.0]]]), 3)[0, :, 0].tolist()
    [2.0, 3.0, 2.0]
    """

    def forecast(history: Any, steps: int) -> Any:
        last = np.asarray(history)[:, -season:]
        return np.concatenate([last] * -(-steps // season), axis=1)[:, :steps]

    return forecast


def in_double(rows: Any, like_device: torch.device | None = None) -> Tensor:
    """Rows for moments."""
    return rows.detach().to(dtype=torch.float64, device=like_device)
