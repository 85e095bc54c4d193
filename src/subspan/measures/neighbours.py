"""What neighbourhoods say: recall, agreement of two spaces, purity of labels."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspan.base.arrays import check_matrix
from subspan.solvers import nearest


def recall_at_k(found: Int[Tensor, "m k"], truth: Int[Tensor, "m t"]) -> Float[Tensor, " m"]:
    """Share of the true neighbours of each query that were found.

    Parameters
    ----------
    found, truth
        Indices (m, k) and (m, t).

    Returns
    -------
    Shares (m,).

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import recall_at_k
    >>> recall_at_k(torch.tensor([[5, 2, 9]]), torch.tensor([[9, 7]])).tolist()
    [0.5]
    """
    if found.shape[0] != truth.shape[0]:
        raise ValueError(f"found: expected {truth.shape[0]} rows, got {found.shape[0]}")
    return (found.unsqueeze(1) == truth.unsqueeze(2)).any(-1).double().mean(-1)


def knn_overlap(a: Any, b: Any, k: int = 10, *, metric: str = "cosine") -> Float[Tensor, " n"]:
    """Share of each row's k nearest neighbours that two representations have in common.

    Parameters
    ----------
    a, b
        Paired rows (n, d_a) and (n, d_b).
    k
        Neighbours, in [1, n - 1].
    metric
        "cosine", "inner" or "euclidean".

    Returns
    -------
    Shares (n,).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import knn_overlap
    >>> x = np.random.default_rng(0).normal(size=(50, 4))
    >>> float(knn_overlap(x, 2 * x).mean()), bool(knn_overlap(x, x[:, :2]).mean() < 0.8)
    (1.0, True)
    """
    x, y = check_matrix(a, "a"), check_matrix(b, "b")
    if len(x) != len(y):
        raise ValueError(f"b: expected {len(x)} rows, got {len(y)}")
    first = nearest(x, x, k, metric=metric, exclude=torch.arange(len(x)))[1]
    second = nearest(y, y, k, metric=metric, exclude=torch.arange(len(y)))[1]
    return recall_at_k(second.to(first.device), first)


def neighbour_purity(rows: Any, labels: Any, k: int = 10, *, metric: str = "cosine") -> float:
    """Mean share of the k nearest other rows that carry the row's own label.

    Parameters
    ----------
    rows
        (n, d).
    labels
        (n,), any hashables.
    k
        Neighbours, in [1, n - 1].
    metric
        "cosine", "inner" or "euclidean".

    Returns
    -------
    Share in [0, 1].

    Examples
    --------
    >>> from subspan.measures import neighbour_purity
    >>> neighbour_purity([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]], ["a", "a", "b", "b"], k=1)
    1.0
    """
    x = check_matrix(rows, "rows")
    names = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if len(names) != len(x):
        raise ValueError(f"labels: expected {len(x)}, got {len(names)}")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    label = torch.tensor([numbers[name] for name in names], device=x.device)
    found = nearest(x, x, k, metric=metric, exclude=torch.arange(len(x)))[1]
    return float((label[found] == label.unsqueeze(1)).double().mean())
