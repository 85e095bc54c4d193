"""From an orthonormal embedding of n items in k dimensions to k clusters: the roundings that spectral methods share."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.utils import check_random_state

from subspan.base import check_matrix

Rounding = Literal["kmeans+snem", "snem", "kmeans", "rotation"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
_MAX_ROUNDS = 100


def round_embedding(
    embedding: Any,
    method: str = "kmeans+snem",
    *,
    n_clusters: int | None = None,
    n_init: int = 10,
    start: Int[np.ndarray, " n"] | None = None,
    random_state: Any = None,
) -> Int[np.ndarray, " n"]:
    """Cluster labels of the rows of an orthonormal embedding.

    No cluster is empty: one that came out so is started from the worst-fitted row, with a warning.

    Parameters
    ----------
    embedding
        U (n, q) with orthonormal columns.
    method
        "kmeans": k-means on rows of unit length, best of `n_init` starts. "snem": a discrete power step on max
        tr(C'UU'C), C the clusters' indicator of unit columns, started from the largest entry of each row; further
        starts from random rotations of U, the best objective wins. "kmeans+snem": the k-means labels refined by it.
        "rotation": alternately the nearest indicator and the nearest rotation (Yu & Shi, 2003).
    n_clusters
        Number of clusters; None: q.
    n_init
        Starts.
    start
        Labels (n,), at least one of every cluster, from whose means k-means starts in place of `n_init` draws; clusters
        keep their numbers. None: random starts.
    random_state
        Seed of the starts; None: another each time.

    Returns
    -------
    Labels (n,) in [0, n_clusters).

    Raises
    ------
    ValueError
        For more clusters than rows, an unknown method, NaN, and for "snem" and "rotation" with q above `n_clusters`.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import round_embedding
    >>> embedding = np.array([[0.6, 0.0], [0.8, 0.0], [0.0, 0.8], [0.0, 0.6]])
    >>> labels = round_embedding(embedding, random_state=0)
    >>> bool(labels[0] == labels[1] != labels[2] == labels[3])
    True
    """
    if method not in ROUNDINGS:
        raise ValueError(f"method: expected one of {', '.join(ROUNDINGS)}, got {method!r}")
    rows = check_matrix(embedding, "embedding").detach().cpu().double().numpy()
    k = rows.shape[1] if n_clusters is None else int(n_clusters)
    if not 1 <= k <= len(rows):
        raise ValueError(f"n_clusters: must lie in [1, {len(rows)}], the number of rows, got {k}")
    if n_init < 1:
        raise ValueError(f"n_init: must be at least 1, got {n_init}")
    random = check_random_state(random_state)
    if k == 1:
        return np.zeros(len(rows), dtype=np.int64)
    if method == "snem":
        labels = _snem_from_rotations(_at_least(rows, k), n_init, random)
    elif method == "rotation":
        labels = _rotation(_at_least(unit_rows(rows), k), n_init, random)
    else:
        labels = kmeans_labels(unit_rows(rows), k, n_init, random, start)
        if method == "kmeans+snem":
            labels = snem(rows, labels, k)
    return fill_empty(unit_rows(rows), labels, k)


def unit_rows(rows: Float[np.ndarray, "n q"]) -> Float[np.ndarray, "n q"]:
    """Rows of unit length; zero rows stay zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def kmeans_labels(
    rows: Any, k: int, n_init: int, random: Any, start: Int[np.ndarray, " n"] | None = None
) -> Int[np.ndarray, " n"]:
    """Labels of the best of `n_init` k-means runs on rows, dense or sparse, or of the one from the means of `start`."""
    options: dict[str, Any] = {"n_init": n_init, "random_state": random}
    if start is not None:
        means = np.stack([rows[start == cluster].mean(0) for cluster in range(k)])
        options = {"n_init": 1, "init": means, "random_state": random}
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters is mended, and said, by `fill_empty`.
        warnings.simplefilter("ignore")
        return KMeans(k, **options).fit_predict(rows).astype(np.int64)


def snem(rows: Float[np.ndarray, "n q"], labels: Int[np.ndarray, " n"], k: int) -> Int[np.ndarray, " n"]:
    """Refine labels by argmax(U U'C) until they stay, or the best labels seen in 100 rounds (it need not settle)."""
    best, best_value = labels, -np.inf
    for _ in range(_MAX_ROUNDS):
        means = _unit_indicator_products(rows, labels, k)
        value = float((means**2).sum())
        if value > best_value:
            best, best_value = labels, value
        refined = np.argmax(rows @ means.T, axis=1)
        if np.array_equal(refined, labels):
            return labels
        labels = refined
    return best


def snem_objective(rows: Float[np.ndarray, "n q"], labels: Int[np.ndarray, " n"], k: int) -> float:
    """tr(C'UU'C) for the indicator C with columns of unit length; at most min(q, k)."""
    return float((_unit_indicator_products(rows, labels, k) ** 2).sum())


def fill_empty(rows: Float[np.ndarray, "n q"], labels: Int[np.ndarray, " n"], k: int) -> Int[np.ndarray, " n"]:
    """Give each empty cluster the row that lies farthest from its cluster's mean, and warn."""
    labels = labels.copy()
    counts = np.bincount(labels, minlength=k)
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return labels
    warnings.warn(f"{len(empty)} of {k} clusters came out empty and were started from the worst-fitted rows",
                  stacklevel=3)  # fmt: skip
    for cluster in empty:
        sums = np.zeros((k, rows.shape[1]))
        np.add.at(sums, labels, rows)
        distance = ((rows - (sums / np.maximum(counts, 1)[:, None])[labels]) ** 2).sum(1)
        distance[counts[labels] < 2] = -1
        chosen = int(distance.argmax())
        counts[labels[chosen]] -= 1
        labels[chosen] = cluster
        counts[cluster] = 1
    return labels


def _unit_indicator_products(rows: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """C'U (k, q), with zero rows for empty clusters."""
    counts = np.bincount(labels, minlength=k)
    sums = np.stack([np.bincount(labels, weights=column, minlength=k) for column in rows.T], axis=1)
    return sums / np.sqrt(np.maximum(counts, 1))[:, None]


def _snem_from_rotations(rows: np.ndarray, n_init: int, random: Any) -> np.ndarray:
    k = rows.shape[1]
    found = [snem(rows, np.argmax(rows, axis=1), k)]
    found += [snem(rows, np.argmax(rows @ _random_rotation(k, random), axis=1), k) for _ in range(n_init - 1)]
    return max(found, key=lambda labels: snem_objective(rows, labels, k))


def _rotation(rows: np.ndarray, n_init: int, random: Any) -> np.ndarray:
    k = rows.shape[1]
    best, best_value = np.zeros(len(rows), dtype=np.int64), -np.inf
    for _ in range(n_init):
        rotation, value = _random_rotation(k, random), -np.inf
        labels = np.argmax(rows @ rotation, axis=1)
        for _ in range(_MAX_ROUNDS):
            sums = np.stack([np.bincount(labels, weights=column, minlength=k) for column in rows.T])
            u, s, vt = np.linalg.svd(sums)
            if s.sum() <= value * (1 + 1e-12):
                break
            value, rotation = s.sum(), u @ vt
            labels = np.argmax(rows @ rotation, axis=1)
        if value > best_value:
            best, best_value = labels, value
    return best


def _random_rotation(k: int, random: Any) -> np.ndarray:
    q, r = np.linalg.qr(random.standard_normal((k, k)))
    return q * np.sign(np.diag(r))


def _at_least(rows: np.ndarray, k: int) -> np.ndarray:
    """Rows with k columns, zeros where the embedding has fewer. Raises ValueError where it has more."""
    if rows.shape[1] > k:
        raise ValueError(f"embedding: this rounding takes n_clusters = {k} columns at most, got {rows.shape[1]}")
    return np.pad(rows, ((0, 0), (0, k - rows.shape[1])))
