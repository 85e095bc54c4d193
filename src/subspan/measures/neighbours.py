"""What neighbourhoods say: recall, agreement of two spaces, purity of labels."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspan.base.arrays import check_matrix
from subspan.solvers import nearest


def recall_at_k(found: Int[Tensor, "m k"], truth: Int[Tensor, "m t"]) -> Float[Tensor, " m"]:
    """Share of the true neighbours of each query that were found."""
    if found.shape[0] != truth.shape[0]:
        raise ValueError(f"found: expected {truth.shape[0]} rows, got {found.shape[0]}")
    return (found.unsqueeze(1) == truth.unsqueeze(2)).any(-1).double().mean(-1)


def knn_overlap(a: Any, b: Any, k: int = 10, *, metric: str = "cosine") -> Float[Tensor, " n"]:
    """Share of each row's k nearest neighbours that two representations (n, d_a), (n, d_b) have in common."""
    x, y = check_matrix(a, "a"), check_matrix(b, "b")
    if len(x) != len(y):
        raise ValueError(f"b: expected {len(x)} rows, got {len(y)}")
    first = nearest(x, x, k, metric=metric, exclude=torch.arange(len(x)))[1]
    second = nearest(y, y, k, metric=metric, exclude=torch.arange(len(y)))[1]
    return recall_at_k(second.to(first.device), first)


def neighbour_purity(rows: Any, labels: Any, k: int = 10, *, metric: str = "cosine") -> float:
    """Mean share of the k nearest other rows (n, d) that carry the row's own label (n,)."""
    x = check_matrix(rows, "rows")
    names = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if len(names) != len(x):
        raise ValueError(f"labels: expected {len(x)}, got {len(names)}")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    label = torch.tensor([numbers[name] for name in names], device=x.device)
    found = nearest(x, x, k, metric=metric, exclude=torch.arange(len(x)))[1]
    return float((label[found] == label.unsqueeze(1)).double().mean())
