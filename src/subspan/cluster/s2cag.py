"""S²CAG and M-S²CAG: spectral subspace clustering of attributed graphs in linear time (Lin et al., 2025)."""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from sklearn.base import ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import like
from subspan.base.estimators import Estimator, in_numpy, validate_data
from subspan.base.parameters import Count, NonNegative, Seed, Whole
from subspan.geometry import Subspace
from subspan.solvers import (
    FilteredOperator,
    MatrixOperator,
    Operator,
    PolynomialFilter,
    as_adjacency,
    geometric_weights,
    orthogonal_iteration,
    orthonormal_columns,
    randomized_svd,
    round_embedding,
    transition_matrix,
)
from subspan.solvers.nearest_subspace import stack_subspaces
from subspan.solvers.rounding import Rounding, unit_rows
from subspan.statistics import GroupedMoments

_PANEL = 256
# What a multiplication of a sparse matrix with a block of columns costs, in those of a dense one.
_SPARSE_PRICE = 5
_N_ITER = {"conductance": 7, "modularity": 50}


@dataclass(eq=False, repr=False)
class S2CAG(ClusterMixin, Estimator):
    """Cluster the nodes of a graph by their attributes, smoothed along its edges.

    Attributes X are weighted (TF-IDF) and scaled by their degrees in the attribute graph XX', X^ = diag(d)^(-1/2) X,
    and averaged over walks, Z = sum_t w_t P^t X^ with w_t proportional to decay^t. The self-expression Z = SZ of low
    rank is solved by a projector S = UU' on leading left singular vectors of Z, so that clustering S needs only U.
    X sets the precision: float32 attributes are worked on in float32. Cost O(n_iter (nnz(X) + order m) k), or
    O(order m d + n_iter n d k) with Z formed.

    Parameters
    ----------
    n_clusters
        Number of clusters k.
    objective
        "conductance" (S²CAG): singular vectors 2 … k+1, the first being the trivial one. "modularity" (M-S²CAG):
        leading eigenvectors of ZZ' - gamma ww'/sum(w), w = Z(Z'1), after the rows of Z were rescaled.
    order, decay
        Steps of the walks, and the weight of each against the one before; decay > 1 prefers far nodes.
    gamma
        Resolution of the modularity.
    n_iter
        Power iterations; None means 7 (conductance) or 50 (modularity).
    oversample
        Extra random directions.
    features
        "tfidf", "l2" (rows of unit length; the only one for negative attributes) or None (as given).
    solver
        "explicit" forms Z (n, d), "implicit" only multiplies with it, "auto" takes the cheaper by operation count.
    rounding, n_init
        See `solvers.round_embedding`; 10 starts of k-means can leave the accuracy to the seed.
    rescale
        Rows of Z for the modularity, times sqrt(row sum) ("rowsum", the published code), over sqrt(w) ("degree"), or to
        unit length ("l2").
    loops
        2 for P = rownorm(D^(-1/2)(A+I)D^(-1/2) + I), the published code; 1 for rownorm(A + I).
    random_state
        Seed of the random start and the rounding.

    Attributes
    ----------
    labels_
        (n,), in the kind of X.
    embedding_
        The `Subspace` of R^n spanned by U; its projector is S.
    singular_values_
        (k,) of Z for these directions; modularity: square roots of the eigenvalues, 0 for negative ones.
    solver_
        The solver that was used.
    subspaces_
        Of the attributes of each cluster: a batched `Subspace`, or a tuple where dimensions differ.

    References
    ----------
    Lin, Yang, Zheng & Ke, KDD 2025 (arXiv 2411.11074).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.cluster import S2CAG
    >>> x = np.random.default_rng(0).random((40, 6))
    >>> x[:20, :3] += 1  # two groups of nodes by their attributes
    >>> edges = np.array([[i, (i + 1) % 20] for i in range(20)]).T  # and a ring of edges in each
    >>> model = S2CAG(2, random_state=0).fit(x, adjacency=np.hstack([edges, edges + 20]))
    >>> [len(set(part)) for part in model.labels_.reshape(2, 20).tolist()]
    [1, 1]
    """

    n_clusters: Count = 8
    objective: Literal["conductance", "modularity"] = "conductance"
    _: KW_ONLY
    order: Whole = 10
    decay: float = 0.9
    gamma: NonNegative = 1.0
    n_iter: Whole | None = None
    oversample: Whole = 10
    features: Literal["tfidf", "l2"] | None = "tfidf"
    solver: Literal["auto", "explicit", "implicit"] = "auto"
    rounding: Rounding = "kmeans+snem"
    rescale: Literal["rowsum", "degree", "l2"] = "rowsum"
    loops: Literal[1, 2] = 2
    n_init: Count = 50
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None, *, adjacency: Any = None) -> S2CAG:
        """Cluster n nodes with attributes X (n, d), dense or sparse, and an undirected graph `adjacency`.

        adjacency: SciPy or torch sparse (n, n), or an edge index (2, m); loops are kept. None clusters by the
        attributes alone. Raises ValueError for negative attributes (but with features="l2"), k > n, attributes of
        rank 1, NaN, and graphs that `solvers.as_adjacency` refuses.
        """
        self._check_parameters()
        rows = self._attributes_of(X, reset=True)
        n = rows.shape[0]
        if self.n_clusters > n:
            raise ValueError(f"n_clusters: {self.n_clusters} clusters asked for of n_samples = {n} nodes")
        graph = sparse.csr_matrix((n, n)) if adjacency is None else as_adjacency(adjacency, n)
        random = check_random_state(self.random_state)

        self._fit_features(rows)
        self._attributes, self._graph = self._normalized(rows), graph
        polynomial = self._filter(graph)
        n_iter = self._iterations()
        self.solver_ = self._cheaper(polynomial, n_iter) if self.solver == "auto" else self.solver
        z = self._smoothed(polynomial)
        if self.objective == "conductance":
            embedding = self._conductance(z, n_iter, random)
        else:
            embedding = self._modularity(z, n_iter, random)
        self.embedding_ = Subspace(torch.from_numpy(np.ascontiguousarray(embedding)))
        labels = round_embedding(
            embedding, self.rounding, n_clusters=self.n_clusters, n_init=self.n_init, random_state=random
        )
        self._means = self._cluster_means(embedding, labels)
        self._coordinates = z.matmul(self._directions)
        self._subspaces: Subspace | tuple[Subspace, ...] | None = None
        self.labels_: Any = like(torch.from_numpy(labels), X)
        self.singular_values_: Any = like(torch.from_numpy(np.array(self.singular_values_)), X)
        return self

    def predict(self, X: Any, *, adjacency: Any = None, links: Any = None) -> Any:
        """Clusters (m,) of unseen nodes with attributes X (m, d).

        links (m, n): their edges to the fitted nodes; adjacency (m, m): edges among them. The graph is extended by
        them, their attributes are smoothed in it, and the embedding's equation is solved for their rows (the Nyström
        extension, exact on fitted nodes), which go to the cluster that the rounding would give them.
        """
        check_is_fitted(self)
        labels = self._assigned(self._embedded(X, adjacency, links))
        return like(torch.from_numpy(labels), X)

    def _embedded(self, X: Any, adjacency: Any, links: Any) -> Float[np.ndarray, "m q"]:
        """Rows of the embedding for unseen nodes."""
        rows = self._attributes_of(X, reset=False)
        m, n = rows.shape[0], self._attributes.shape[0]
        among = sparse.csr_matrix((m, m)) if adjacency is None else as_adjacency(adjacency, m)
        to_fitted = sparse.csr_matrix((m, n)) if links is None else _links(links, m, n)
        attributes = _stack(self._attributes, self._normalized(rows))
        graph = sparse.csr_matrix(sparse.block_array([[self._graph, to_fitted.T], [to_fitted, among]]))
        return self._extension(FilteredOperator(self._filter(graph), attributes), n)

    @property
    def subspaces_(self) -> Subspace | tuple[Subspace, ...]:
        """The subspace of each cluster's smoothed attributes (90 % of their energy) among the leading directions."""
        check_is_fitted(self)
        if self._subspaces is None:
            coordinates = torch.from_numpy(np.asarray(self._coordinates, dtype=np.float64))
            grouped = GroupedMoments(coordinates.shape[1])
            grouped.update(coordinates, self.labels_)
            lift = torch.from_numpy(np.asarray(self._directions, dtype=np.float64))
            self._subspaces = stack_subspaces(
                [
                    Subspace(torch.linalg.qr(lift @ own.basis).Q, variances=own.variances, count=own.count)
                    for own in grouped.subspaces(0.9, center=False).values()
                ]
            )
        return self._subspaces

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = self.features != "l2"
        return tags

    # ------------------------------------------------------------------ attributes

    def _attributes_of(self, X: Any, *, reset: bool) -> Any:
        """Rows as an array or a CSR matrix: the one estimator that reads sparse ones."""
        options: Any = {"accept_sparse": "csr", "ensure_min_samples": 2 if reset else 1}
        rows = validate_data(self, in_numpy(X), reset=reset, dtype=[np.float64, np.float32], **options)
        smallest = rows.data.min(initial=0.0) if sparse.issparse(rows) else rows.min()
        if self.features != "l2" and smallest < 0:
            raise ValueError(
                f"X: Negative values in data passed to S2CAG: features={self.features!r} needs attributes >= 0; "
                'features="l2" takes any'
            )
        return rows

    def _fit_features(self, rows: Any) -> None:
        n = rows.shape[0]
        if self.features == "tfidf":
            used = np.asarray((rows != 0).sum(0)).ravel()
            self._idf = (np.log((1 + n) / (1 + used)) + 1).astype(rows.dtype)
        weighted = self._weighted(rows)
        self._column_sums = np.asarray((abs(weighted)).sum(0)).ravel()
        if not self._column_sums.any():
            raise ValueError("X: all attributes are zero; there is nothing to cluster by")

    def _weighted(self, rows: Any) -> Any:
        if self.features is None:
            return rows
        if self.features == "tfidf":
            rows = rows.multiply(self._idf).tocsr() if sparse.issparse(rows) else rows * self._idf
        if not sparse.issparse(rows):
            return unit_rows(rows)
        norms = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
        return _scale_rows(rows, 1 / np.where(norms > 0, norms, 1))

    def _normalized(self, rows: Any) -> Any:
        """X^: each row over the square root of its degree in the attribute graph."""
        weighted = self._weighted(rows)
        degree = np.asarray(abs(weighted) @ self._column_sums).ravel()
        zero = degree <= 0
        if zero.any():
            warnings.warn(
                f"X: {int(zero.sum())} nodes have no attributes (the first is {int(zero.argmax())}); only those of "
                "their neighbours place them",
                stacklevel=3,
            )
        return _scale_rows(weighted, 1 / np.sqrt(np.where(zero, 1, degree)))

    # ------------------------------------------------------------------ smoothing

    def _filter(self, graph: sparse.csr_matrix) -> PolynomialFilter:
        matrix = transition_matrix(graph, self.loops).astype(self._attributes.dtype)
        # With two loops the normalised graph plus the identity is positive semidefinite.
        spectrum = (0.0, 1.0) if self.loops == 2 else (-1.0, 1.0)
        tolerance = float(np.finfo(matrix.dtype).eps) if matrix.dtype == np.float32 else 1e-12
        weights = geometric_weights(self.order, self.decay)
        return PolynomialFilter(matrix, weights, spectrum=spectrum, tolerance=tolerance)

    def _iterations(self) -> int:
        return _N_ITER[self.objective] if self.n_iter is None else int(self.n_iter)

    def _cheaper(self, polynomial: PolynomialFilter, n_iter: int) -> str:
        """The published count of multiplications of both ways, those with sparse matrices at their measured price."""
        n, d = self._attributes.shape
        dense = n * d
        attributes = _SPARSE_PRICE * self._attributes.nnz if sparse.issparse(self._attributes) else dense
        steps = _SPARSE_PRICE * polynomial.matrix.nnz * polynomial.steps
        if self.objective == "conductance":
            products = 2 * (n_iter + 1) * (self.n_clusters + 1 + self.oversample)
        else:
            products = 2 * n_iter * self.n_clusters
        return "explicit" if steps * d + products * dense < products * (attributes + steps) else "implicit"

    def _smoothed(self, polynomial: PolynomialFilter) -> Operator:
        if self.solver_ == "implicit":
            return FilteredOperator(polynomial, self._attributes)
        dense = self._attributes.toarray() if sparse.issparse(self._attributes) else self._attributes
        return MatrixOperator(polynomial.matmul(dense))

    # ------------------------------------------------------------------ the two objectives

    def _conductance(self, z: Operator, n_iter: int, random: Any) -> Float[np.ndarray, "n q"]:
        wanted = min(self.n_clusters + 1, *z.shape)
        u, s, vt = randomized_svd(
            z, wanted, n_iter=n_iter, oversample=self.oversample, random_state=random, dtype=self._attributes.dtype
        )
        strong = s > s[0] * self._tolerance(z)
        rank = int(strong[:wanted].sum())
        enough = self._enough(rank, self.n_clusters + 1, 2)
        kept = slice(1, self.n_clusters + 1) if enough else slice(0, rank)
        self.singular_values_ = s[kept]
        self._directions = vt[strong].T.astype(self._attributes.dtype)
        self._solve = (vt[kept] / s[kept, None]).T
        return np.ascontiguousarray(u[:, kept])

    def _modularity(self, z: Operator, n_iter: int, random: Any) -> Float[np.ndarray, "n q"]:
        n, dtype = z.shape[0], self._attributes.dtype
        self._reference = self._rescaling_reference(z, np.ones((n, 1), dtype))
        scale = self._row_scale(z).astype(dtype)[:, None]
        total = z.rmatmul(scale)
        omega = scale * z.matmul(total)
        volume = float(omega.sum())
        if not volume > 0:
            raise ValueError(
                "X: the smoothed attributes sum to zero, so the graph ZZ' has no volume; use 'conductance'"
            )

        def matmul(q: Any) -> Any:
            return scale * z.matmul(z.rmatmul(scale * q)) - self.gamma / volume * omega * (omega.T @ q)

        k = min(self.n_clusters, n)
        u, values = orthogonal_iteration(matmul, n, k, n_iter=n_iter, random_state=random, dtype=dtype)
        # Against what the rank-one term takes away too: of constant attributes nothing but rounding is left.
        largest = max(float(np.abs(values).max()), float((omega**2).sum()) / volume)
        strong = np.abs(values) > largest * self._tolerance(z)
        self._enough(int(strong.sum()), self.n_clusters, 1)
        u, values = u[:, strong], values[strong]
        self.singular_values_ = np.sqrt(np.maximum(values, 0))
        self._solve = z.rmatmul((scale * u).astype(dtype)) / values
        self._trivial = (total, self.gamma / volume * (omega.T @ u) / values)
        self._directions = orthonormal_columns(z.rmatmul((scale * u).astype(dtype)))
        return u

    def _tolerance(self, z: Operator) -> float:
        """Singular values below this share of the largest are rounding, whose parts add up like a random walk."""
        return 10 * float(np.finfo(self._attributes.dtype).eps) * max(z.shape) ** 0.5

    def _rescaling_reference(self, z: Operator, ones: np.ndarray) -> np.ndarray:
        """(d, 1): what a row of Z is multiplied with for the number that rescales it."""
        d = z.shape[1]
        return z.rmatmul(ones) if self.rescale == "degree" else np.ones((d, 1), ones.dtype)

    def _row_scale(self, z: Operator) -> Float[np.ndarray, " n"]:
        if self.rescale == "l2":
            squares = np.zeros(z.shape[0])
            for start in range(0, z.shape[1], _PANEL):
                columns = np.eye(z.shape[1], min(_PANEL, z.shape[1] - start), -start, dtype=self._attributes.dtype)
                squares += (z.matmul(columns).astype(np.float64) ** 2).sum(1)
            return np.where(squares > 0, 1 / np.sqrt(np.where(squares > 0, squares, 1)), 0.0)
        sums = z.matmul(self._reference).ravel().astype(np.float64)
        if self.rescale == "rowsum":
            return np.sqrt(np.maximum(sums, 0))
        return np.where(sums > 0, 1 / np.sqrt(np.where(sums > 0, sums, 1)), 0.0)

    def _enough(self, rank: int, wanted: int, least: int) -> bool:
        """Whether there are `wanted` directions above rounding; warns where not, raises for fewer than `least`."""
        n, d = self._attributes.shape
        if rank < least:
            raise ValueError(
                f"X: the smoothed attributes have no two directions (n_samples = {n}, n_features = {d}; are they "
                "constant?), so nothing tells the nodes apart"
            )
        if rank < wanted:
            warnings.warn(
                f"X: the smoothed attributes have {rank} directions, {wanted} are needed for {self.n_clusters} "
                "clusters; all are used",
                stacklevel=4,
            )
        return rank >= wanted

    # ------------------------------------------------------------------ unseen nodes

    def _extension(self, extended: FilteredOperator, n: int) -> Float[np.ndarray, "m q"]:
        """Rows of the embedding for the nodes after the first n of an extended graph."""
        if self.objective == "conductance":
            return np.asarray(extended.matmul(self._solve.astype(self._attributes.dtype))[n:], dtype=np.float64)
        scale = self._row_scale(extended)[n:, None]
        total, share = self._trivial
        products = extended.matmul(np.hstack([self._solve, total]).astype(self._attributes.dtype))[n:]
        return scale * (products[:, :-1] - products[:, -1:] * share)

    def _cluster_means(self, embedding: np.ndarray, labels: Int[np.ndarray, " n"]) -> np.ndarray:
        """What the last step of the rounding compares a row with, one row a cluster."""
        rows = embedding if "snem" in self.rounding else unit_rows(embedding)
        counts = np.bincount(labels, minlength=self.n_clusters)
        sums = np.stack([np.bincount(labels, column, self.n_clusters) for column in rows.T], axis=1)
        return sums / (np.sqrt(counts) if "snem" in self.rounding else counts)[:, None]

    def _assigned(self, rows: np.ndarray) -> Int[np.ndarray, " m"]:
        if "snem" in self.rounding:
            return np.argmax(rows @ self._means.T, axis=1)
        distances = (self._means**2).sum(1) - 2 * unit_rows(rows) @ self._means.T
        return np.argmin(distances, axis=1)


def _scale_rows(rows: Any, scale: np.ndarray) -> Any:
    scale = scale.astype(rows.dtype)
    if not sparse.issparse(rows):
        return rows * scale[:, None]
    scaled = rows.copy()
    scaled.data *= np.repeat(scale, np.diff(scaled.indptr))
    return scaled


def _stack(first: Any, second: Any) -> Any:
    if sparse.issparse(first) or sparse.issparse(second):
        return sparse.vstack([sparse.csr_matrix(first), sparse.csr_matrix(second)], format="csr")
    return np.vstack([first, second])


def _links(links: Any, m: int, n: int) -> sparse.csr_matrix:
    if isinstance(links, Tensor):
        links = links.detach().cpu()
        links = links.to_dense().numpy() if links.layout != torch.strided else links.numpy()
    matrix = sparse.csr_matrix(links, dtype=np.float64)
    if matrix.shape != (m, n):
        raise ValueError(f"links: expected shape ({m}, {n}), new nodes by fitted ones, got {matrix.shape}")
    if not np.isfinite(matrix.data).all() or (matrix.data < 0).any():
        raise ValueError("links: weights must be finite and >= 0")
    return matrix
