"""The work of `subspan cluster`: rows, images or the nodes of a graph in clusters, and what the clusters are like."""

from __future__ import annotations

import time
import warnings
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from .. import __version__
from ..cluster import (
    S2CAG,
    ElasticNetSubspaceClustering,
    KSubspaces,
    LeastSquaresRepresentation,
    LowRankRepresentation,
    OMPSubspaceClustering,
    SparseSubspaceClustering,
    ThresholdingSubspaceClustering,
)
from ..datasets.graphs import AttributedGraph
from ..geometry import Subspace, normalize_rows
from ..solvers.nearest_subspace import squared_residuals
from ..solvers.partitions import clustering_accuracy, conductance, modularity
from ..solvers.spectral import affinity_from_representation, count_clusters
from .embeddings import Embeddings, Progress, silent

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
_RESAMPLES = 10
_REPRESENTATIVES = 3
_AFFINITY_CELLS = 100


class Clustering(NamedTuple):
    """Labels (n,), how far each row is from its own cluster's subspace (n,), and the facts."""

    labels: np.ndarray
    residuals: np.ndarray
    facts: dict[str, Any]


def cluster_rows(
    data: Embeddings,
    n_clusters: int | None = None,
    *,
    method: str = "auto",
    dim: int | None = None,
    affine: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Clustering:
    """Cluster rows by subspaces; without `n_clusters` their number is that of the largest eigengap of the affinity.

    method: one of METHODS, or "auto": least squares up to 5 000 rows, thresholding above.
    """
    started = time.perf_counter()
    rows = data.take(np.arange(len(data)))
    if method == "auto":
        method = "lsr" if len(rows) <= _DENSE_ROWS else "tsc"
    if method == "ksubspaces" and n_clusters is None:
        raise ValueError("--clusters: K-subspaces needs the number of clusters; other methods can count them")
    options: dict[str, Any] = {"affine": affine, "random_state": seed}
    if method == "ksubspaces":
        options |= {"dim": dim or 5}
    elif dim is not None:
        options |= {"rank": dim} | ({"retain": max(dim, 9)} if method in ("lsr", "lrr") else {})
        options |= {"n_nonzero": dim} if method == "omp" else {}
    progress("clustering", 0.1)
    counted = None
    make = METHODS[method]
    if n_clusters is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said by the fit with the right number
            model = make(2, **options).fit(rows)
        progress("counting the clusters", 0.6)
        # All coefficients: those that are kept for the clustering are too few to hold a cluster together.
        counted = _counted(affinity_from_representation(model.representation_), seed)
        n_clusters = int(counted["n_clusters"])
    model = make(n_clusters, **options).fit(rows)
    progress("describing", 0.9)
    spaces = model.subspaces_
    points = torch.from_numpy(rows) if affine else normalize_rows(torch.from_numpy(rows))
    spaces = [_one(spaces, c) for c in range(n_clusters)] if isinstance(spaces, Subspace) else spaces
    distances = squared_residuals(points, spaces).numpy().astype(np.float64)
    facts = {
        "rows": len(rows),
        "columns": data.dim,
        "method": method,
        "clusters": n_clusters,
        **({"count": counted} if counted is not None else {}),
        **_described(model.labels_, distances, spaces, data.labels),
        **({} if method == "ksubspaces" else _affinity(model.affinity_, model.labels_, distances)),
        **_origin(started, seed),
    }
    return Clustering(model.labels_, distances[np.arange(len(rows)), model.labels_], facts)


def cluster_graph(
    graph: AttributedGraph,
    n_clusters: int | None = None,
    *,
    objective: str = "conductance",
    order: int = 10,
    decay: float = 0.9,
    seed: int = 0,
    progress: Progress = silent,
) -> Clustering:
    """Cluster the nodes of a graph by S²CAG; without `n_clusters` by the largest gap of the singular values."""
    started = time.perf_counter()
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
        counted = _largest_gap(probe.singular_values_**2)
        n_clusters = int(counted["n_clusters"])
    model = S2CAG(n_clusters, objective, **options).fit(graph.attributes, adjacency=graph.adjacency)
    progress("describing", 0.9)
    u = model.embedding_.basis.numpy()
    means = np.stack([u[model.labels_ == c].mean(0) for c in range(n_clusters)])
    distances = ((u[:, None] - means) ** 2).sum(2)
    named = None if graph.labels is None else np.where(graph.labels >= 0, graph.labels, -1).astype(str)
    has_edges = graph.adjacency.nnz > 0
    facts = {
        "rows": len(graph),
        "columns": graph.n_attributes,
        "edges": int((graph.adjacency.nnz + (graph.adjacency.diagonal() != 0).sum()) // 2),
        "method": f"s2cag, {objective}",
        "clusters": n_clusters,
        **({"count": counted} if counted is not None else {}),
        "modularity": modularity(graph.adjacency, model.labels_) if has_edges else None,
        "conductance": conductance(graph.adjacency, model.labels_),
        **_described(model.labels_, distances, model.cluster_subspaces_, named, unlabelled="-1"),
        **(_affinity(graph.adjacency, model.labels_, distances) if has_edges else {}),
        **_origin(started, seed),
    }
    return Clustering(model.labels_, distances[np.arange(len(graph)), model.labels_], facts)


def _origin(started: float, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 2),
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"subspan": __version__},
    }


def _one(spaces: Subspace, cluster: int) -> Subspace:
    return Subspace(spaces.basis[cluster], center=None if spaces.center is None else spaces.center[cluster])


def _counted(affinity: Any, seed: int) -> dict[str, Any]:
    """The count by the eigengap, and how it varies over resamples of four fifths of the rows."""
    found = count_clusters(affinity, most=MOST_CLUSTERS, random_state=seed)
    random = np.random.default_rng(seed)
    n, counts = affinity.shape[0], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(_RESAMPLES):
            kept = np.sort(random.permutation(n)[: max(4, 4 * n // 5)])
            part = affinity[kept][:, kept]
            if part.nnz:
                counts.append(count_clusters(part, most=MOST_CLUSTERS, random_state=seed).n_clusters)
    return {
        "n_clusters": found.n_clusters,
        "runner_up": found.runner_up,
        "certainty": found.certainty,
        "resampled": sorted(counts),
        "agreement": float(np.mean([count == found.n_clusters for count in counts])) if counts else 0.0,
    }


def _largest_gap(values: np.ndarray) -> dict[str, Any]:
    """The count after which the values fall most; without the trivial one, k clusters have k - 1 large values."""
    gaps = values[:-1] - values[1:]
    order = np.argsort(-gaps)
    first, second = int(order[0]), int(order[1]) if len(order) > 1 else int(order[0])
    certainty = 1 - max(gaps[second], 0) / gaps[first] if gaps[first] > 0 else 0.0
    return {"n_clusters": first + 2, "runner_up": second + 2, "certainty": float(certainty)}


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
    if k > 1:
        others = distances.copy()
        others[np.arange(len(labels)), labels] = np.inf
        nearest = others.min(1)
        facts["silhouette"] = float(((nearest - own) / np.maximum(np.maximum(nearest, own), 1e-300)).mean())
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
        known = np.ones(len(labels), dtype=bool) if unlabelled is None else truth != unlabelled
        facts["scores"] = {
            "accuracy": clustering_accuracy(truth[known], labels[known]),
            "nmi": float(normalized_mutual_info_score(truth[known], labels[known])),
            "ari": float(adjusted_rand_score(truth[known], labels[known])),
        }
    return facts
