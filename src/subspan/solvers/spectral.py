"""From coefficients or an affinity to clusters: the spectral path that all self-expressive methods share."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from sklearn.utils import check_random_state

from .graph_filters import symmetric_normalized
from .rounding import round_embedding, unit_rows

_DENSE_NODES = 1500


def top_per_row(matrix: Any, keep: int) -> sparse.csr_matrix:
    """The `keep` entries of largest absolute value in each row of a dense or sparse matrix (n, m)."""
    if keep < 1:
        raise ValueError(f"keep: must be at least 1, got {keep}")
    if not sparse.issparse(matrix):
        dense = np.asarray(matrix)
        if keep >= dense.shape[1]:
            return sparse.csr_matrix(dense)
        columns = np.argpartition(-np.abs(dense), keep - 1, axis=1)[:, :keep]
        rows = np.repeat(np.arange(len(dense)), keep)
        values = np.take_along_axis(dense, columns, 1).ravel()
        found = sparse.csr_matrix((values, (rows, columns.ravel())), shape=dense.shape)
        found.eliminate_zeros()
        return found
    csr: Any = sparse.csr_matrix(matrix)
    rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    order = np.lexsort((-np.abs(csr.data), rows))
    place = np.arange(len(order)) - csr.indptr[rows[order]]
    kept = order[place < keep]
    return sparse.csr_matrix((csr.data[kept], (rows[kept], csr.indices[kept])), shape=csr.shape)


def affinity_from_representation(
    representation: Any, *, kind: str = "symmetric", retain: int | None = None, n_neighbors: int = 3
) -> sparse.csr_matrix:
    """A symmetric non-negative affinity (n, n) from self-expression coefficients C (n, n), row i expressing item i.

    retain: keep so many of each row's largest coefficients first. Rows are scaled to unit length. kind: "symmetric",
    (|C| + |C|')/2, or "knn", the graph of each row's `n_neighbors` most similar other rows (cosine).
    """
    if kind not in ("symmetric", "knn"):
        raise ValueError(f"kind: expected 'symmetric' or 'knn', got {kind!r}")
    c = sparse.csr_matrix(representation) if retain is None else top_per_row(representation, retain)
    c = sparse.csr_matrix(abs(c))
    norms = np.sqrt(np.asarray(c.multiply(c).sum(1)).ravel())
    c = sparse.csr_matrix(sparse.diags(1 / np.where(norms > 0, norms, 1)) @ c)
    if kind == "knn":
        similar = sparse.csr_matrix(c @ c.T)
        similar.setdiag(0)
        similar.eliminate_zeros()
        c = top_per_row(similar, n_neighbors)
        c.data[:] = 1
    return sparse.csr_matrix((c + c.T) / 2)


def retained_affinity(representation: Any, retain: int | None) -> sparse.csr_matrix:
    """W (n, n) from coefficients C: (|C| + |C|')/2, the `retain` largest of each row (None: all), and symmetric again.

    Source: Sindičić & Kopriva, arXiv 2504.18179 (2025); `affinity_from_representation` retains before it adds up.
    """
    c = abs(sparse.csr_matrix(representation))
    w = (c + c.T) / 2
    if retain is not None:
        w = top_per_row(w.toarray() if w.nnz * 2 > w.shape[0] ** 2 else w, retain)
    return sparse.csr_matrix((w + w.T) / 2)


def low_rank_affinity(
    representation: Any, n_clusters: int, *, fraction: float, dim: int, power: float
) -> Float[np.ndarray, "n n"]:
    """Affinity (n, n) in [0, 1] from coefficients C by the post-processing of DSC-Net.

    The largest entries of each column that make up `fraction` of its absolute sum are kept; with (C + C')/2 = U S V' to
    rank dim * n_clusters + 1, rows of U S^(1/2) of unit length and their products, those below 0 left out, to `power`.
    Published (fraction, dim, power): ORL (0.2, 3, 1), COIL-20 (0.04, 12, 8). Dense.
    Source: Ji et al., Deep subspace clustering networks, NeurIPS 2017.
    """
    if not 0 < fraction <= 1 or dim < 1 or not power > 0:
        raise ValueError(f"fraction, dim, power: must be in (0, 1], >= 1 and > 0, got {fraction}, {dim}, {power}")
    c = np.asarray(representation.toarray() if sparse.issparse(representation) else representation, dtype=np.float64)
    order = np.argsort(-np.abs(c), axis=0, kind="stable")
    sizes = np.take_along_axis(np.abs(c), order, 0)
    # An entry stays while those before it have not passed the fraction yet.
    before = np.cumsum(sizes, axis=0) - sizes
    kept = np.zeros(c.shape, dtype=bool)
    np.put_along_axis(kept, order, before <= fraction * sizes.sum(0), 0)
    c = np.where(kept, c, 0)
    values, vectors = np.linalg.eigh((c + c.T) / 2)
    leading = np.argsort(-np.abs(values))[: min(dim * n_clusters + 1, len(c))]
    rows = unit_rows(vectors[:, leading] * np.sqrt(np.abs(values[leading])))
    affinity = np.maximum(rows @ rows.T, 0) ** power
    largest = affinity.max()
    if not largest > 0:
        raise ValueError("representation: all coefficients are zero, so there is no affinity")
    return (affinity + affinity.T) / (2 * largest)


class SpectralEmbedding(NamedTuple):
    """Leading eigenvectors (n, q) of D^(-1/2) W D^(-1/2), orthonormal, and their eigenvalues (q,), descending."""

    vectors: Float[np.ndarray, "n q"]
    values: Float[np.ndarray, " q"]


def spectral_embedding(affinity: Any, q: int, *, random_state: Any = None) -> SpectralEmbedding:
    """The q leading eigenvectors of the normalised affinity (n, n). Raises ValueError for an affinity of zeros.

    Dense below 1 500 items, Lanczos above. Nodes without any affinity have rows of zeros, and are counted in a warning.
    """
    matrix: Any = sparse.csr_matrix(affinity, dtype=np.float64)
    n = matrix.shape[0]
    if not 1 <= q <= n:
        raise ValueError(f"q: must lie in [1, {n}], got {q}")
    isolated = int((np.asarray(matrix.sum(1)).ravel() == 0).sum())
    if isolated == n:
        raise ValueError("affinity: all entries are zero, so nothing can be clustered")
    if isolated:
        warnings.warn(f"affinity: {isolated} of {n} items have none to any other; their clusters are arbitrary",
                      stacklevel=3)  # fmt: skip
    normalized = symmetric_normalized(matrix)
    if n <= _DENSE_NODES or q >= n - 1:
        values, vectors = np.linalg.eigh(normalized.toarray())
        return SpectralEmbedding(np.ascontiguousarray(vectors[:, ::-1][:, :q]), values[::-1][:q].copy())
    start = check_random_state(random_state).uniform(-1, 1, n)
    # A shift makes the largest eigenvalues those of largest absolute value, which Lanczos finds sooner.
    shifted = normalized + sparse.identity(n, format="csr")
    tolerance: dict[str, Any] = {"tol": 1e-6}
    try:
        values, vectors = eigsh(shifted, q, v0=start, ncv=min(n, max(4 * q, 60)), **tolerance)
    except ArpackNoConvergence as error:
        if len(error.eigenvalues) < q:
            raise ValueError("affinity: its eigenvectors did not converge; it may have too many components") from error
        values, vectors = error.eigenvalues, error.eigenvectors
    order = np.argsort(-values)
    return SpectralEmbedding(np.ascontiguousarray(vectors[:, order]), values[order] - 1)


def spectral_labels(
    affinity: Any,
    n_clusters: int,
    *,
    rounding: str = "kmeans",
    n_init: int = 20,
    start: Int[np.ndarray, " n"] | None = None,
    random_state: Any = None,
) -> Int[np.ndarray, " n"]:
    """Normalised spectral clustering (Ng, Jordan & Weiss, 2002) of an affinity (n, n); rows of the embedding are scaled
    to unit length, roundings and `start` are those of `round_embedding`. Warns where the affinity has more components
    than clusters, which splits it arbitrarily."""
    random = check_random_state(random_state)
    matrix = sparse.csr_matrix(affinity)
    components = connected_components(matrix, directed=False)[0]
    if components > n_clusters:
        warnings.warn(
            f"affinity: has {components} connected components, more than n_clusters = {n_clusters}: over-segmented",
            stacklevel=3,
        )
    vectors = spectral_embedding(matrix, n_clusters, random_state=random).vectors
    return round_embedding(vectors, rounding, n_clusters=n_clusters, n_init=n_init, start=start, random_state=random)


class ClusterCount(NamedTuple):
    """Number of clusters by the largest eigengap, the second best number, and their gaps; `values` descend."""

    n_clusters: int
    runner_up: int
    gap: float
    runner_up_gap: float
    values: Float[np.ndarray, " q"]

    @property
    def certainty(self) -> float:
        """1 - runner-up gap / gap: near 0 where another number would do as well."""
        return 1 - self.runner_up_gap / self.gap if self.gap > 0 else 0.0


def count_clusters(affinity: Any, *, most: int = 20, random_state: Any = None) -> ClusterCount:
    """How many clusters an affinity (n, n) has: the k in [2, most] with the largest gap of its normalised spectrum."""
    matrix: Any = sparse.csr_matrix(affinity)
    n = matrix.shape[0]
    most = min(most, n - 1)
    if most < 2:
        raise ValueError(f"affinity: {n} items are too few to count clusters")
    values = spectral_embedding(affinity, most + 1, random_state=random_state).values
    gaps = values[1:-1] - values[2:]
    order = np.argsort(-gaps)
    second = order[1] if len(order) > 1 else order[0]
    return ClusterCount(
        int(order[0]) + 2, int(second) + 2, float(gaps[order[0]]),
        float(gaps[second]) if len(order) > 1 else 0.0, values,
    )  # fmt: skip
