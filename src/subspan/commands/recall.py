"""What several verbs measure: which neighbours a row keeps, with intervals, and how many dimensions that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspan.base import Progress, normalize_rows
from subspan.measures import recall_at_k
from subspan.solvers import nearest

NEIGHBOURS = 10
RESAMPLES = 1000


def others(
    base: Float[Tensor, "n d"],
    queries: Int[np.ndarray, " q"],
    metric: str = "cosine",
    *,
    k: int = NEIGHBOURS,
    asked: Float[Tensor, "n d"] | None = None,
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Values and positions of the k nearest other rows of the base to its rows `queries`, or to those of `asked`."""
    chosen = torch.from_numpy(queries)
    return nearest(
        (base if asked is None else asked)[chosen], base, min(k, len(base) - 1), metric=metric, exclude=chosen
    )


def recall_curve(
    rows: Float[Tensor, "n d"],
    ways: Mapping[str, Callable[[int], Tensor]],
    sizes: Sequence[int],
    queries: Int[np.ndarray, " q"],
    *,
    metric: str,
    unit: bool,
    seed: int,
    progress: Progress,
) -> dict[str, list[dict[str, Any]]]:
    """Recall@10 of the neighbours of `rows` among rows shortened to each of these sizes in each way (n, size).

    unit: the shorter rows are scaled to length one.
    """
    truth = others(rows, queries, metric)[1]
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for step, size in enumerate(sizes):
        for name, shortened in ways.items():
            short = shortened(size)
            kept = recall_at_k(others(normalize_rows(short) if unit else short, queries, metric)[1], truth).numpy()
            curves[name].append({"dims": size, "recall": float(kept.mean()), "interval": mean_interval(kept, seed)})
        progress("shortening", (step + 1) / len(sizes))
    return curves


def sizes_up_to(most: int) -> list[int]:
    """Powers of two and the numbers half-way between them, up to `most`, from 8 on where that is more than 32."""
    grid = sorted({2**power for power in range(30)} | {3 * 2**power for power in range(30)})
    return [size for size in grid if (size >= 8 or most <= 32) and size < most] + [most]


def fitted_width(rows: Float[Tensor, "n d"], width: int) -> Float[Tensor, "n w"]:
    """Rows cut or padded with zeros to `width`: what an index would see if nobody mapped anything."""
    return torch.nn.functional.pad(rows, (0, max(0, width - rows.shape[1])))[:, :width]


def sample(index: Int[np.ndarray, " n"], size: int, seed: int) -> Int[np.ndarray, " m"]:
    """At most `size` of these positions, drawn at random, in order."""
    if len(index) <= size:
        return index
    return np.sort(np.random.default_rng(seed).choice(index, size, replace=False))


def summary(values: Float[np.ndarray, " n"], seed: int) -> dict[str, Any]:
    """Mean and its interval."""
    return {"value": float(values.mean()), "interval": mean_interval(values, seed)}


def mean_interval(values: Float[np.ndarray, " n"], seed: int, resamples: int = RESAMPLES) -> list[float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    return np.quantile(means, (0.025, 0.975)).tolist()
