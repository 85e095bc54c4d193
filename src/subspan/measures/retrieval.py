"""Retrieval by label, and what it says about the compatibility of two generations of embeddings.

A gallery item is relevant to a query when their labels agree. Ties are broken against the query: among equal
similarities the relevant items come last, so that collapsed embeddings score at chance or below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.integrate import trapezoid
from torch import Tensor

from subspan.base import as_tensor, check_matrix, normalize_rows
from subspan.geometry import prefix_similarities, prefix_sizes

_BLOCK = 1 << 24
_METRICS = ("cosine", "inner", "euclidean")


@dataclass(frozen=True)
class RetrievalScores:
    """Per-query results for the queries that have a relevant item; see `retrieval_scores`.

    Attributes
    ----------
    first_hit
        (m,) rank, from 1, of the first relevant item.
    average_precision
        (m,) mean of the precision at every relevant item, or, cut at k, the sum over the first k ranks divided by k.
    queries
        (m,) row numbers of the queries.
    """

    first_hit: Int[Tensor, " m"]
    average_precision: Float[Tensor, " m"]
    queries: Int[Tensor, " m"]

    def cmc(self, k: int = 1) -> float:
        """Share of queries with a relevant item among the first k (cumulative matching characteristic)."""
        return float((self.first_hit <= k).double().mean())

    @property
    def mean_average_precision(self) -> float:
        """Mean of the average precision over queries."""
        return float(self.average_precision.mean())


def retrieval_scores(
    queries: Any,
    gallery: Any,
    query_labels: Any,
    gallery_labels: Any,
    *,
    metric: str = "cosine",
    exclude_self: bool = False,
    k: int | None = None,
) -> RetrievalScores:
    """First hits and average precision of queries in a gallery, by exact search in O(chunk n) memory.

    A gallery item is relevant to a query when their labels agree. Ties are broken against the query: among equal
    similarities the relevant items come last, so that collapsed embeddings score at chance or below.

    Parameters
    ----------
    queries, gallery
        Rows (m, d) and (n, d).
    query_labels, gallery_labels
        (m,) and (n,).
    metric
        "cosine", "inner" or "euclidean".
    exclude_self
        Whether query i is gallery row i, which is left out.
    k
        Average precision over the first k ranks divided by k; None: over all relevant items.

    Returns
    -------
    RetrievalScores.

    Raises
    ------
    ValueError
        For unequal widths, labels of another length, or when no query has a relevant item.

    References
    ----------
    Cut at k: Kusupati et al. (2022), arXiv 2205.13147.

    Examples
    --------
    >>> from subspan.measures import retrieval_scores
    >>> queries, gallery = [[1.0, 0.0], [0.0, 1.0]], [[0.9, 0.1], [0.1, 0.9], [1.0, 0.0]]
    >>> found = retrieval_scores(queries, gallery, ["a", "b"], ["a", "b", "b"])
    >>> found.first_hit.tolist(), found.cmc(1)
    ([2, 1], 0.5)
    """
    q, g = check_matrix(queries, "queries"), check_matrix(gallery, "gallery")
    if q.shape[1] != g.shape[1]:
        raise ValueError(f"gallery: expected {q.shape[1]} columns, got {g.shape[1]}; cut both to `common_prefix`")
    if metric not in _METRICS:
        raise ValueError(f"metric: expected one of {_METRICS}, got {metric!r}")
    if k is not None and not 1 <= k <= len(g):
        raise ValueError(f"k: must lie in [1, {len(g)}], got {k}")
    q_labels, g_labels = (
        _labels(query_labels, len(q), "query_labels"),
        _labels(gallery_labels, len(g), "gallery_labels"),
    )
    if exclude_self and len(q) > len(g):
        raise ValueError(f"queries: with exclude_self at most {len(g)} rows, got {len(q)}")
    q_code, g_code = _codes(q_labels, g_labels)
    dtype = torch.promote_types(torch.float32, torch.promote_types(q.dtype, g.dtype))
    q, g = q.to(dtype), g.to(q.device, dtype)
    q_code, g_code = q_code.to(q.device), g_code.to(q.device)
    if metric == "cosine":
        q, g = normalize_rows(q), normalize_rows(g)
    offset = -g.square().sum(-1) / 2 if metric == "euclidean" else None
    hits, precisions = [], []
    step = max(1, _BLOCK // len(g))
    for start in range(0, len(q), step):
        part = q[start : start + step]
        score = part @ g.mT if offset is None else torch.addmm(offset, part, g.mT)
        relevant = q_code[start : start + step, None] == g_code
        if exclude_self:
            rows = torch.arange(len(part), device=q.device)
            score[rows, rows + start] = -torch.inf
            relevant[rows, rows + start] = False
        hit, precision = _scores(score, relevant, k)
        hits.append(hit)
        precisions.append(precision)
    first, precision = torch.cat(hits), torch.cat(precisions)
    kept = (first > 0).nonzero()[:, 0]
    if len(kept) == 0:
        raise ValueError("query_labels: no query has an item of its label in the gallery")
    return RetrievalScores(first[kept], precision[kept], kept)


def prefix_retrieval_scores(
    queries: Any,
    gallery: Any,
    query_labels: Any,
    gallery_labels: Any,
    dims: Sequence[int],
    *,
    metric: str = "cosine",
    exclude_self: bool = False,
    k: int | None = None,
) -> dict[int, RetrievalScores]:
    """`retrieval_scores` of every prefix size of both sides, from one running sum of inner products.

    Parameters
    ----------
    queries, gallery, query_labels, gallery_labels
        As in `retrieval_scores`.
    dims
        Sizes of the prefixes.
    metric, exclude_self, k
        As in `retrieval_scores`.

    Returns
    -------
    `RetrievalScores` by size, ascending.

    Raises
    ------
    ValueError
        As `retrieval_scores` and `prefix_sizes`.

    Examples
    --------
    >>> from subspan.measures import prefix_retrieval_scores
    >>> queries, gallery = [[1.0, 1.0], [1.0, -1.0]], [[1.0, 1.0], [1.0, -1.0]]
    >>> found = prefix_retrieval_scores(queries, gallery, ["a", "b"], ["a", "b"], [1, 2])
    >>> {size: scores.cmc(1) for size, scores in found.items()}  # the second coordinate tells the two apart
    {1: 0.0, 2: 1.0}
    """
    q = check_matrix(queries, "queries")
    g = check_matrix(gallery, "gallery", columns=q.shape[1])
    if k is not None and not 1 <= k <= len(g):
        raise ValueError(f"k: must lie in [1, {len(g)}], got {k}")
    if exclude_self and len(q) > len(g):
        raise ValueError(f"queries: with exclude_self at most {len(g)} rows, got {len(q)}")
    sizes = prefix_sizes(dims, q.shape[1])
    q_code, g_code = _codes(
        _labels(query_labels, len(q), "query_labels"), _labels(gallery_labels, len(g), "gallery_labels")
    )
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {size: [] for size in sizes}
    step = max(1, _BLOCK // len(g))
    for start in range(0, len(q), step):
        relevant = q_code[start : start + step, None] == g_code
        rows = torch.arange(len(relevant))
        if exclude_self:
            relevant[rows, rows + start] = False
        for size, score in prefix_similarities(q[start : start + step], g, sizes, metric=metric):
            if exclude_self:
                score[rows.to(score.device), (rows + start).to(score.device)] = -torch.inf
            parts[size].append(_scores(score, relevant.to(score.device), k))
    scores = {}
    for size, found in parts.items():
        first, precision = (torch.cat(column) for column in zip(*found))
        kept = (first > 0).nonzero()[:, 0]
        if len(kept) == 0:
            raise ValueError("query_labels: no query has an item of its label in the gallery")
        scores[size] = RetrievalScores(first[kept], precision[kept], kept)
    return scores


def _scores(
    score: Float[Tensor, "m n"], relevant: Bool[Tensor, "m n"], k: int | None
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Rank of the first relevant item (0: none) and average precision of each row."""
    worst_first = relevant.to(torch.uint8).argsort(dim=1, stable=True)
    order = score.gather(1, worst_first).argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, worst_first).gather(1, order)
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    found = hits.cumsum(1)
    first = torch.where(hits.any(1), hits.to(torch.uint8).argmax(1) + 1, 0)
    precision = torch.where(hits, found / ranks, 0).double()
    if k is None:
        return first, precision.sum(1) / found[:, -1].clamp_min(1)
    return first, precision[:, :k].sum(1) / k


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


def template_gallery(features: Any, labels: Any) -> tuple[Float[Tensor, "c d"], np.ndarray]:
    """One unit vector a class, the mean of its unit rows scaled to one.

    Parameters
    ----------
    features
        Rows (n, d).
    labels
        (n,) classes.

    Returns
    -------
    Vectors (c, d), and the classes (c,), sorted.

    Raises
    ------
    ValueError
        Naming a class whose rows cancel.

    Examples
    --------
    >>> from subspan.measures import template_gallery
    >>> vectors, classes = template_gallery([[2.0, 0.0], [5.0, 0.0], [0.0, 3.0]], ["b", "b", "a"])
    >>> vectors.tolist(), classes.tolist()
    ([[0.0, 1.0], [1.0, 0.0]], ['a', 'b'])
    """
    rows = normalize_rows(check_matrix(features, "features"))
    classes, place = np.unique(_labels(labels, len(rows), "labels"), return_inverse=True)
    index = torch.as_tensor(place, device=rows.device)
    sums = rows.new_zeros(len(classes), rows.shape[1]).index_add(0, index, rows)
    empty = torch.linalg.vector_norm(sums, dim=-1) == 0
    if bool(empty.any()):
        raise ValueError(f"features: the rows of class {classes[int(empty.nonzero()[0, 0])]!r} have no mean direction")
    return normalize_rows(sums), classes


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


def _labels(labels: Any, count: int, name: str) -> np.ndarray:
    values = as_tensor(labels, name, floating=False).cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.shape != (count,):
        raise ValueError(f"{name}: expected {count} labels, got shape {values.shape}")
    return values


def _codes(first: np.ndarray, second: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both label arrays as integers of one numbering."""
    codes = torch.as_tensor(np.unique(np.concatenate([first, second]), return_inverse=True)[1])
    return codes[: len(first)], codes[len(first) :]
