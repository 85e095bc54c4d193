"""Compatibility of generations of embeddings: every model's queries in older galleries, and in one half re-embedded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import trapezoid
from torch import Tensor

from subspan.base import check_matrix

from .retrieval import retrieval_scores


def common_prefix(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both sets of rows, cut to the width of the narrower one.

    Parameters
    ----------
    a, b
        Rows (n, d_a) and (m, d_b).

    Returns
    -------
    Tensors (n, d) and (m, d), d = min(d_a, d_b).

    Examples
    --------
    >>> from subspan.measures import common_prefix
    >>> a, b = common_prefix([[1.0, 2.0, 3.0]], [[4.0, 5.0]])
    >>> a.tolist(), b.tolist()
    ([[1.0, 2.0]], [[4.0, 5.0]])
    """
    first, second = check_matrix(a, "a"), check_matrix(b, "b")
    width = min(first.shape[1], second.shape[1])
    return first[:, :width], second[:, :width]


def compatibility_matrix(
    queries: Sequence[Any],
    galleries: Sequence[Any],
    query_labels: Any,
    gallery_labels: Any,
    *,
    metric: str = "cosine",
    measure: str = "cmc",
    k: int = 1,
    exclude_self: bool = False,
) -> Float[np.ndarray, "t t"]:
    """Retrieval by queries of model t in the gallery of every older model s.

    Embeddings of unequal width are cut to the narrower one.

    Parameters
    ----------
    queries, galleries
        Rows (m, d_t) and (n, d_t) of each model, oldest first; all show the same items, in the same order.
    query_labels, gallery_labels
        (m,) and (n,).
    metric
        "cosine", "inner" or "euclidean".
    measure
        "cmc" (at k) or "map".
    k
        Ranks of "cmc".
    exclude_self
        Whether queries and gallery are the same items.

    Returns
    -------
    Array, (t, t): M[t, s] for s <= t, NaN above the diagonal.

    Raises
    ------
    ValueError
        For unequal numbers of models, an unknown measure, and as `retrieval_scores`.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import compatibility_matrix
    >>> old, new = np.eye(2), np.eye(2)[::-1].copy()  # the new model has swapped its axes
    >>> compatibility_matrix([old, new], [old, new], [0, 1], [0, 1]).tolist()
    [[1.0, nan], [0.0, 1.0]]
    """
    if len(queries) != len(galleries) or not queries:
        raise ValueError(
            f"galleries: as many as queries are needed, at least one, got {len(galleries)}, {len(queries)}"
        )
    if measure not in ("cmc", "map"):
        raise ValueError(f"measure: expected 'cmc' or 'map', got {measure!r}")
    matrix = np.full((len(queries), len(queries)), np.nan)
    for t, rows in enumerate(queries):
        for s in range(t + 1):
            q, g = common_prefix(rows, galleries[s])
            found = retrieval_scores(q, g, query_labels, gallery_labels, metric=metric, exclude_self=exclude_self)
            matrix[t, s] = found.cmc(k) if measure == "cmc" else found.mean_average_precision
    return matrix


def average_compatibility(matrix: Any) -> float:
    """Share of the pairs t > s whose cross-test beats the older model's own test, M[t, s] > M[s, s] (ties fail).

    Parameters
    ----------
    matrix
        (t, t) lower triangular, as from `compatibility_matrix`; at least 2 models.

    Returns
    -------
    Share in [0, 1].

    Raises
    ------
    ValueError
        For a matrix that is not square and lower triangular.

    References
    ----------
    Biondi et al. (2024), arXiv 2405.02581.

    Examples
    --------
    >>> from subspan.measures import average_compatibility
    >>> round(average_compatibility([[0.6, 0, 0], [0.7, 0.8, 0], [0.5, 0.9, 0.9]]), 4)  # 0.5 does not beat 0.6
    0.6667
    """
    values = _triangle(matrix)
    below = np.tril_indices(len(values), -1)
    if not below[0].size:
        raise ValueError("matrix: at least two models are needed")
    return float((values[below] > np.diag(values)[below[1]]).mean())


def average_accuracy(matrix: Any) -> float:
    """Mean of the lower triangle with its diagonal.

    Parameters
    ----------
    matrix
        (t, t) lower triangular, as from `compatibility_matrix`.

    Returns
    -------
    Mean, in the unit of the matrix.

    Raises
    ------
    ValueError
        For a matrix that is not square and lower triangular.

    References
    ----------
    Biondi et al. (2024), arXiv 2405.02581.

    Examples
    --------
    >>> from subspan.measures import average_accuracy
    >>> average_accuracy([[0.5, 0], [0.75, 1.0]])
    0.75
    """
    values = _triangle(matrix)
    return float(values[np.tril_indices(len(values))].mean())


@dataclass(frozen=True)
class BackfillCurve:
    """Retrieval as the share of re-embedded gallery items grows; `area` is the mean score.

    Attributes
    ----------
    shares
        (b,) ascending, in [0, 1].
    scores
        (b,) retrieval at each.
    """

    shares: Float[np.ndarray, " b"]
    scores: Float[np.ndarray, " b"]

    @property
    def area(self) -> float:
        """Mean score over the shares (trapezoids)."""
        return float(trapezoid(self.scores, self.shares))


def backfill_curve(
    queries: Any,
    old_gallery: Any,
    new_gallery: Any,
    order: Any,
    query_labels: Any,
    gallery_labels: Any,
    *,
    shares: Any = None,
    metric: str = "cosine",
    measure: str = "cmc",
    k: int = 1,
    exclude_self: bool = False,
) -> BackfillCurve:
    """Scores of queries in a gallery whose first items are already re-embedded, the others not.

    Parameters
    ----------
    queries
        Rows (m, d) of the new model.
    old_gallery, new_gallery
        (n, d) the same items before and after.
    order
        (n,) a permutation: the order in which items are re-embedded.
    query_labels, gallery_labels
        (m,) and (n,).
    shares
        Ascending shares in [0, 1] that are done; None: 11 from 0 to 1.
    metric
        "cosine", "inner" or "euclidean".
    measure
        "cmc" (at k) or "map".
    k
        Ranks of "cmc".
    exclude_self
        Whether queries and gallery are the same items.

    Returns
    -------
    BackfillCurve.

    Raises
    ------
    ValueError
        For galleries of unequal shape, an order that is no permutation, shares that do not ascend, and as
        `retrieval_scores`.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import backfill_curve
    >>> new, labels = np.eye(4), [0, 1, 2, 3]
    >>> curve = backfill_curve(new, -new, new, range(4), labels, labels, shares=[0, 0.5, 1])
    >>> curve.scores.tolist(), curve.area
    ([0.0, 0.5, 1.0], 0.5)
    """
    old, new = check_matrix(old_gallery, "old_gallery"), check_matrix(new_gallery, "new_gallery")
    if old.shape != new.shape:
        raise ValueError(f"new_gallery: expected shape {tuple(old.shape)}, got {tuple(new.shape)}")
    if measure not in ("cmc", "map"):
        raise ValueError(f"measure: expected 'cmc' or 'map', got {measure!r}")
    chosen = np.asarray(order)
    if chosen.shape != (len(old),) or not np.array_equal(np.sort(chosen), np.arange(len(old))):
        raise ValueError(f"order: expected a permutation of {len(old)} row numbers")
    points = np.linspace(0, 1, 11) if shares is None else np.asarray(shares, dtype=float)
    if points.ndim != 1 or not len(points) or not ((points >= 0) & (points <= 1)).all() or (np.diff(points) <= 0).any():
        raise ValueError("shares: expected ascending numbers in [0, 1]")
    scores = []
    for share in points:
        mixed = old.clone()
        done = torch.as_tensor(chosen[: int(share * len(old))].copy(), device=old.device)
        mixed[done] = new[done].to(mixed)
        found = retrieval_scores(queries, mixed, query_labels, gallery_labels, metric=metric, exclude_self=exclude_self)
        scores.append(found.cmc(k) if measure == "cmc" else found.mean_average_precision)
    return BackfillCurve(points, np.asarray(scores))


def _triangle(matrix: Any) -> Float[np.ndarray, "t t"]:
    values = np.asarray(matrix, dtype=float)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not len(values):
        raise ValueError(f"matrix: expected a square one, got shape {values.shape}")
    if np.isnan(values[np.tril_indices(len(values))]).any():
        raise ValueError("matrix: the lower triangle contains NaN")
    above = values[np.triu_indices(len(values), 1)]
    if not (np.isnan(above) | (above == 0)).all():
        raise ValueError("matrix: expected a lower triangular one (query model t, gallery model s <= t)")
    return values
