"""Retrieval by label: first hits and average precision of queries in a gallery, by exact search.

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


def _labels(labels: Any, count: int, name: str) -> np.ndarray:
    values = as_tensor(labels, name, floating=False).cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.shape != (count,):
        raise ValueError(f"{name}: expected {count} labels, got shape {values.shape}")
    return values


def _codes(first: np.ndarray, second: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both label arrays as integers of one numbering."""
    codes = torch.as_tensor(np.unique(np.concatenate([first, second]), return_inverse=True)[1])
    return codes[: len(first)], codes[len(first) :]
