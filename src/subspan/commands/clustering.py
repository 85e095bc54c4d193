"""The work of `subspan cluster`: rows, images or the nodes of a graph in clusters, and what the clusters are like."""

from __future__ import annotations

import time
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.preprocessing import normalize
from sklearn.utils import check_random_state

from subspan.base import Progress, normalize_rows, silent
from subspan.cluster import (
    S2CAG,
    ElasticNetSubspaceClustering,
    KSubspaces,
    LeastSquaresRepresentation,
    LowRankRepresentation,
    OMPSubspaceClustering,
    SparseSubspaceClustering,
    ThresholdingSubspaceClustering,
)
from subspan.datasets import AttributedGraph, Rows
from subspan.geometry import Subspace
from subspan.measures import clustering_accuracy, conductance, modularity
from subspan.solvers.nearest_subspace import group_subspaces, squared_residuals
from subspan.solvers.rounding import fill_empty, kmeans_labels
from subspan.solvers.self_expression import thresholded_similarities
from subspan.solvers.spectral import affinity_from_representation, count_clusters

from .columns import Found, naming
from .origin import origin

METHODS = {
    "lsr": LeastSquaresRepresentation,
    "lrr": LowRankRepresentation,
    "ssc": SparseSubspaceClustering,
    "ensc": ElasticNetSubspaceClustering,
    "omp": OMPSubspaceClustering,
    "tsc": ThresholdingSubspaceClustering,
    "ksubspaces": KSubspaces,
}
MOST_CLUSTERS = 20
_DENSE_ROWS = 5000
# Rows whose clusters are counted, and what makes their number one to trust (see `_counted`).
_COUNTED_ROWS = 2000
_CLEAR_GAP, _CLEAR_PARTS = 0.25, 0.95
_GRAPH_NEIGHBOURS = (3, 10)
# For data of any kind; the default of the class, a thirtieth of it, suits faces. Of 0.1, 0.3, 1, 3 and 10 it had the
# best mean accuracy on MNIST, Fashion-MNIST, half of COIL-20, UCI HAR, features of CIFAR-100 and 12 people of Yale-B.
_RIDGE = 3.0
_REPRESENTATIVES = 3
_AFFINITY_CELLS = 100


class Clustering(NamedTuple):
    """Labels (n,), how far each row is from its own cluster's subspace (n,), and the facts."""

    labels: np.ndarray
    residuals: np.ndarray
    facts: dict[str, Any]

    def found(self, data: Rows) -> Found:
        """The cluster of each row under its name."""
        columns = {"cluster": self.labels.tolist(), "residual": self.residuals.tolist()}
        return Found(naming(data, range(len(data))) | columns, self.facts)


def cluster_rows(
    data: Rows,
    n_clusters: int | None = None,
    *,
    method: str = "auto",
    dim: int | None = None,
    affine: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Clustering:
    """Cluster rows by subspaces, with k-means beside; without `n_clusters` as many as `_counted` finds.

    method: one of METHODS, or "auto": least squares up to 5 000 rows, thresholding above, or k-means where its clusters
    have the larger modularity in the graph of nearest rows. That was settled on eight labelled sets and a planted
    union, whole and with ten rows a class: it took the more accurate of the two in 20 of 25 cases, and where it did not
    lost 4 points of accuracy on average.
    """
    started = time.perf_counter()
    _check_clusters(n_clusters, len(data))
    rows = data.take(np.arange(len(data)))
    choose = method == "auto"
    if choose:
        method = "lsr" if len(rows) <= _DENSE_ROWS else "tsc"
    options: dict[str, Any] = {"affine": affine, "random_state": seed}
    if method == "lsr":
        options |= {"alpha": _RIDGE}
    if method == "ksubspaces":
        options |= {"rank": dim or 5}
    elif dim is not None:
        options |= {"rank": dim} | ({"retain": max(dim, 9)} if method in ("lsr", "lrr") else {})
        options |= {"n_nonzero": dim} if method == "omp" else {}
    counted = None
    if n_clusters is None:
        progress("counting the clusters", 0.1)
        counted = _counted(rows, affine, seed)
        n_clusters = int(counted["n_clusters"])
    progress("clustering", 0.3)
    model = METHODS[method](n_clusters, **options).fit(rows)
    progress("k-means beside it", 0.8)
    points = torch.from_numpy(rows) if affine else normalize_rows(torch.from_numpy(rows))
    means = _kmeans(points.numpy(), n_clusters, seed)
    progress("describing", 0.9)
    rank = model.rank
    other = group_subspaces(points, torch.from_numpy(means), n_clusters, rank=rank, affine=affine)
    labels, spaces, affinity = model.labels_, list(model.subspaces_), getattr(model, "affinity_", None)
    choice: dict[str, float] = {}
    if choose:
        graph = _nearest_in_angle(rows, n_clusters, affine)
        choice = {method: modularity(graph, labels), "kmeans": modularity(graph, means)}
        if choice["kmeans"] > choice[method]:
            method, labels, spaces, affinity = "kmeans", means, other, graph
    distances = _distances(points, spaces)
    facts = {
        "rows": len(rows),
        "columns": data.dim,
        "method": method,
        **({"choice": choice} if choose else {}),
        "clusters": n_clusters,
        **({"count": counted} if counted is not None else {}),
        **_described(labels, distances, spaces, data.labels),
        "kmeans": _beside(labels, means, data.labels, silhouette=_silhouette(_distances(points, other), means)),
        **({} if affinity is None else _affinity(affinity, labels, distances)),
        **origin(started, seed),
    }
    return Clustering(labels, distances[np.arange(len(rows)), labels], facts)


def cluster_graph(
    graph: AttributedGraph,
    n_clusters: int | None = None,
    *,
    objective: Any = "conductance",
    order: int = 10,
    decay: float = 0.9,
    seed: int = 0,
    progress: Progress = silent,
) -> Clustering:
    """Cluster the nodes of a graph by S²CAG, with k-means beside; without `n_clusters` by the singular values' gap."""
    started = time.perf_counter()
    _check_clusters(n_clusters, len(graph))
    negative = graph.attributes.nnz > 0 and graph.attributes.data.min() < 0
    options = {
        "order": order, "decay": decay, "features": "l2" if negative else "tfidf", "random_state": seed,
    }  # fmt: skip
    counted = None
    progress("clustering", 0.1)
    if n_clusters is None:
        most = min(MOST_CLUSTERS, len(graph) - 2, graph.n_attributes - 2)
        if most < 2:
            raise ValueError("--clusters: the graph is too small to count clusters; say how many")
        probe = S2CAG(most, rounding="snem", n_init=1, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            probe.fit(graph.attributes, adjacency=graph.adjacency)
        counted = _largest_gap(probe.singular_values_**2, graph.adjacency, seed)
        n_clusters = int(counted["n_clusters"])
    model = S2CAG(n_clusters, objective, **options).fit(graph.attributes, adjacency=graph.adjacency)
    progress("describing", 0.9)
    u = model.embedding_.basis.numpy()
    means = np.stack([u[model.labels_ == c].mean(0) for c in range(n_clusters)])
    distances = ((u[:, None] - means) ** 2).sum(2)
    named = None if graph.labels is None else np.where(graph.labels >= 0, graph.labels, -1).astype(str)
    has_edges = graph.adjacency.nnz > 0
    means = _kmeans(normalize(graph.attributes), n_clusters, seed)
    facts = {
        "rows": len(graph),
        "columns": graph.n_attributes,
        "edges": graph.n_edges,
        "method": f"s2cag, {objective}",
        "clusters": n_clusters,
        **({"count": counted} if counted is not None else {}),
        "modularity": modularity(graph.adjacency, model.labels_) if has_edges else None,
        "conductance": conductance(graph.adjacency, model.labels_),
        **_described(model.labels_, distances, list(model.subspaces_), named, unlabelled="-1"),
        "kmeans": _beside(model.labels_, means, named, unlabelled="-1"),
        **(_affinity(graph.adjacency, model.labels_, distances) if has_edges else {}),
        **origin(started, seed),
    }
    return Clustering(model.labels_, distances[np.arange(len(graph)), model.labels_], facts)


def _check_clusters(clusters: int | None, n: int) -> None:
    if clusters is not None and clusters > n:
        raise ValueError(f"--clusters: {clusters} asked for of {n} rows")
    if n < 4:
        raise ValueError(f"{n} rows are too few to cluster")


def count_in_words(count: dict[str, Any]) -> str:
    """Whether the number of clusters that was found can be trusted, and what else it may be."""
    ways = ", ".join(f"{name} {number}" for name, number in count["by"].items())
    if count["trusted"]:
        return f"The number of clusters, {count['n_clusters']}, stands out in the data (by {ways})."
    candidates = ", ".join(map(str, count["candidates"]))
    return f"Do not trust this number of clusters: the data do not tell it (by {ways}; candidates {candidates})."


def kmeans_in_words(facts: dict[str, Any]) -> str:
    """How k-means clusters the same rows, and whether the labels, where there are any, are for it."""
    means, choice = facts["kmeans"], facts.get("choice", {})
    words = f"k-means, for comparison: adjusted Rand index with these clusters {means['agreement']:.2f}"
    if choice:
        ways = ", ".join(f"{name} {value:.3f}" for name, value in choice.items())
        words = f"Chosen by modularity among nearest rows: {ways}. {words}"
    if means.get("silhouette") is not None:
        words += f", silhouette {means['silhouette']:.2f}"
    if "scores" not in means:
        return f"{words}."
    words += "; against the labels " + ", ".join(f"{name} {value:.3f}" for name, value in means["scores"].items())
    ahead = means["scores"]["accuracy"] > facts["scores"]["accuracy"]
    return f"{words}, more accurate than these clusters." if ahead else f"{words}."


def _counted(rows: np.ndarray, affine: bool, seed: int) -> dict[str, Any]:
    """How many clusters, by the eigengaps of three affinities of at most 2 000 rows, and whether that can be trusted.

    Of the three the nearest in angle tell most where clusters touch, all coefficients where they are apart. Trusted is
    a number on which the three agree while the affinity of few coefficients all but falls into so many parts, or after
    which the spectrum of all coefficients falls by a quarter. This was settled on 35 choices of classes of eight
    labelled sets and ten planted unions of subspaces: 9 of the 45 numbers were trusted, and all 9 were right.
    """
    random = np.random.default_rng(seed)
    part = rows[np.sort(random.permutation(len(rows))[:_COUNTED_ROWS])]
    # A small ridge, as the blocks of a union of subspaces stand out best without one.
    dense = LeastSquaresRepresentation(1, alpha=0.1, affine=affine, n_init=1)
    near = ThresholdingSubspaceClustering(1, affine=affine, n_init=1)
    few = LeastSquaresRepresentation(1, alpha=_RIDGE, affine=affine, n_init=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the number of clusters, which is not known yet
        affinities = {
            "all coefficients": affinity_from_representation(dense.fit(part).representation_),
            "few coefficients": few.fit(part).affinity_,
            "nearest in angle": near.fit(part).affinity_,
        }
        found = {
            name: count_clusters(affinity, most=MOST_CLUSTERS, random_state=seed)
            for name, affinity in affinities.items()
        }
    everything, kept, angle = found.values()
    numbers = {name: count.n_clusters for name, count in found.items()}
    apart = everything.gap >= _CLEAR_GAP
    parts = len(set(numbers.values())) == 1 and float(kept.values[kept.n_clusters - 1]) >= _CLEAR_PARTS
    chosen = everything if apart else angle
    return {
        "n_clusters": chosen.n_clusters,
        "trusted": bool(apart or parts),
        "candidates": list(dict.fromkeys([chosen.n_clusters, *numbers.values(), chosen.runner_up])),
        "by": numbers,
    }


def _largest_gap(values: np.ndarray, adjacency: Any, seed: int) -> dict[str, Any]:
    """The count after which the values fall most; without the trivial one, k clusters have k - 1 large values.

    Trusted where the eigengap of the graph alone, whose attributes are another matter, says the same.
    """
    gaps = values[:-1] - values[1:]
    order = [int(place) + 2 for place in np.argsort(-gaps)]
    numbers = {"smoothed attributes": order[0]}
    if adjacency.nnz:
        found = count_clusters(adjacency, most=min(MOST_CLUSTERS, len(values) + 1), random_state=seed)
        numbers["graph"] = found.n_clusters
    return {
        "n_clusters": order[0],
        "trusted": len(numbers) == 2 and len(set(numbers.values())) == 1,
        "candidates": list(dict.fromkeys([*numbers.values(), *order[:2]])),
        "by": numbers,
    }


def _nearest_in_angle(rows: np.ndarray, n_clusters: int, affine: bool) -> Any:
    """The graph (n, n) of each row's others nearest in angle, about the mean where subspaces are affine.

    Ten of them, or a third of a mean cluster: more than a cluster holds would blame it for being small.
    """
    points = normalize_rows(torch.from_numpy(rows - rows.mean(0) if affine else rows))
    few, many = _GRAPH_NEIGHBOURS
    neighbours = min(max(len(rows) // (3 * n_clusters), few), many, len(rows) - 1)
    found = thresholded_similarities(points, neighbours)
    found.data[:] = 1
    return found + found.T


def _kmeans(points: Any, n_clusters: int, seed: int) -> np.ndarray:
    """Labels by k-means, no cluster empty."""
    starts = 10 if points.shape[0] <= _DENSE_ROWS else 1
    labels = kmeans_labels(points, n_clusters, starts, check_random_state(seed))
    if len(np.unique(labels)) == n_clusters:
        return labels
    return fill_empty(points.toarray() if sparse.issparse(points) else points, labels, n_clusters)


def _beside(
    labels: np.ndarray, means: np.ndarray, truth: Any, *, unlabelled: str | None = None, silhouette: float | None = None
) -> dict[str, Any]:
    """What there is to say of the clusters of k-means beside those found: how alike they are, and their scores."""
    facts: dict[str, Any] = {"agreement": float(adjusted_rand_score(labels, means))}
    if silhouette is not None:
        facts["silhouette"] = silhouette
    return facts | ({} if truth is None else {"scores": _scores(truth, means, unlabelled)})


def _distances(points: torch.Tensor, spaces: list[Subspace]) -> np.ndarray:
    return squared_residuals(points, spaces).numpy().astype(np.float64)


def _silhouette(distances: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean of how much nearer the own subspace is than the next, as a share of the farther; None for one cluster."""
    if distances.shape[1] == 1:
        return None
    place = np.arange(len(labels))
    own, others = distances[place, labels], distances.copy()
    others[place, labels] = np.inf
    nearest = others.min(1)
    return float(((nearest - own) / np.maximum(np.maximum(nearest, own), 1e-300)).mean())


def _scores(truth: Any, labels: np.ndarray, unlabelled: str | None) -> dict[str, float]:
    known = np.ones(len(labels), dtype=bool) if unlabelled is None else truth != unlabelled
    return {
        "accuracy": clustering_accuracy(truth[known], labels[known]),
        "nmi": float(normalized_mutual_info_score(truth[known], labels[known])),
        "ari": float(adjusted_rand_score(truth[known], labels[known])),
    }


def _affinity(affinity: Any, labels: np.ndarray, distances: np.ndarray) -> dict[str, Any]:
    """The affinity with rows in the order of clusters, in cells of the mean of its entries, and where clusters end.

    Inside a cluster the rows nearest to its subspace come first. Cells never hold rows of two clusters.
    """
    n, k = distances.shape
    order = np.lexsort((distances[np.arange(n), labels], labels))
    cell = np.empty(n, dtype=np.int64)
    ends, used = [], 0
    for cluster in range(k):
        own = order[labels[order] == cluster]
        parts = min(len(own), max(1, round(_AFFINITY_CELLS * len(own) / n)))
        cell[own] = used + np.arange(len(own)) * parts // max(1, len(own))
        used += parts
        ends.append(used)
    members = sparse.csr_matrix((np.ones(n), (np.arange(n), cell)), shape=(n, used))
    sizes = np.bincount(cell, minlength=used)
    matrix = sparse.csr_matrix(affinity)
    mean = (members.T @ matrix @ members).toarray() / np.outer(sizes, sizes)
    largest = mean.max()
    entries = matrix.tocoo()
    within = entries.data[labels[entries.row] == labels[entries.col]].sum() / max(entries.data.sum(), 1e-300)
    cells = np.round(mean / (largest if largest > 0 else 1), 4).tolist()
    return {"affinity": {"cells": cells, "ends": ends, "within": float(within)}}


def _described(
    labels: np.ndarray, distances: np.ndarray, spaces: list[Subspace], truth: Any, *, unlabelled: str | None = None
) -> dict[str, Any]:
    """Sizes, dimensions, angles, separation and representatives of the clusters; scores where there are labels."""
    k = distances.shape[1]
    own = distances[np.arange(len(labels)), labels]
    facts: dict[str, Any] = {}
    if (silhouette := _silhouette(distances, labels)) is not None:
        facts["silhouette"] = silhouette
    facts["sizes"] = np.bincount(labels, minlength=k).tolist()
    facts["dimensions"] = [space.dim for space in spaces]
    angles = [[0.0] * k for _ in range(k)]
    for i in range(k):
        for j in range(i):
            mean = float(spaces[i].angles(spaces[j]).rad2deg().mean())
            angles[i][j] = angles[j][i] = round(mean, 2)
    facts["angles"] = angles
    facts["representatives"] = [
        [int(row) for row in members[np.argsort(own[members], kind="stable")[:_REPRESENTATIVES]]]
        for members in (np.flatnonzero(labels == c) for c in range(k))
    ]
    if truth is not None:
        facts["scores"] = _scores(truth, labels, unlabelled)
    return facts
