"""What clusterers by self-expression share: rows, affinity, spectral clustering, subspaces, prediction."""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from scipy import sparse
from sklearn.base import ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import like, normalize_rows
from subspan.base.estimators import Estimator, at_least_single
from subspan.base.parameters import Count, Seed
from subspan.geometry import Subspace
from subspan.geometry.rank import Rank
from subspan.solvers.nearest_subspace import group_subspaces, nearest_subspace, stack_subspaces
from subspan.solvers.rounding import Rounding
from subspan.solvers.self_expression import check_rows
from subspan.solvers.spectral import affinity_from_representation, spectral_labels


class RowClusterer(ClusterMixin, Estimator):
    """Rows in, labels and one subspace a cluster out; unseen rows go to the nearest subspace."""

    n_clusters: int
    affine: bool
    labels_: Any
    subspaces_: Subspace | tuple[Subspace, ...]

    def predict(self, X: Any) -> Any:
        """The cluster (m,) whose subspace is nearest to each row of X (m, d)."""
        check_is_fitted(self)
        return like(nearest_subspace(self._spanning(self._on_cpu(X)), self.subspaces_), X)

    def _on_cpu(self, X: Any, *, reset: bool = False) -> Tensor:
        """Finite rows as float32 or float64 on the CPU."""
        rows = at_least_single(self._rows(X, reset=reset).cpu()).contiguous()
        if reset:
            check_cluster_count(self.n_clusters, len(rows))
        return rows

    def _spanning(self, rows: Tensor) -> Tensor:
        """The rows whose subspaces the clusters are: of unit length, or as they are where those are affine."""
        return rows if self.affine else normalize_rows(rows)


@dataclass(eq=False, repr=False)
class SelfExpressiveClustering(RowClusterer):
    """Base of the clusterers that express each row by others and cluster the graph of the coefficients.

    Rows are scaled to unit length (a row of zeros is an error). With `affine`, a constant is appended to each row
    first, which turns an affine subspace of dimension m into a linear one of m + 1. A clusterer of your own says
    `_represent`.

    Parameters
    ----------
    n_clusters
        Number of clusters.
    affine
        Whether the clusters are affine subspaces: they need not go through the origin.
    retain
        Coefficients of each row that go into the affinity, the largest; None for all.
    affinity
        "symmetric", (|C| + |C|')/2 of rows of unit length; or "knn", the 3-nearest-neighbour graph of these rows.
    rank
        Of `subspaces_`: a number of directions, a share of the energy in (0, 1), or a rule.
    rounding, n_init
        Of the spectral clustering, see `solvers.round_embedding`.
    random_state
        Seed of the spectral clustering.

    Attributes
    ----------
    labels_
        (n,), in the kind of X.
    representation_
        Coefficients (n, n), row i those of row i: CSR, or dense in the kind of X where all are kept.
    affinity_
        (n, n), CSR.
    subspaces_
        By cluster: a batched `Subspace`, or a tuple where the dimensions differ; both take [i].

    Examples
    --------
    >>> import torch
    >>> from subspan.cluster import SelfExpressiveClustering
    >>> class ByCosine(SelfExpressiveClustering):
    ...     def _represent(self, points):
    ...         return (points @ points.mT).fill_diagonal_(0)
    >>> x = torch.tensor([[1.0, 0.1], [0.1, 1.0]]).repeat_interleave(5, 0) + 0.01 * torch.eye(10, 2)
    >>> labels = ByCosine(2, random_state=0).fit_predict(x + 0.01 * torch.randn(10, 2))
    >>> labels.bincount().tolist()
    [5, 5]
    """

    n_clusters: Count = 8
    _: KW_ONLY
    affine: bool = False
    retain: Count | None = None
    affinity: Literal["symmetric", "knn"] = "symmetric"
    rank: Rank = 0.9
    rounding: Rounding = "kmeans"
    n_init: Count = 20
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None) -> SelfExpressiveClustering:
        """Cluster rows X (n, d). Raises ValueError for NaN, rows of zeros and more clusters than rows."""
        self._check_parameters()
        rows = self._on_cpu(X, reset=True)
        points = self._points(rows)
        warn_of_copies(points)
        found = self._represent(points)
        self.representation_: Any = like(found, X) if isinstance(found, Tensor) else found
        retain = None if self.retain is None else int(self.retain)
        self.affinity_ = affinity_from_representation(
            found.numpy() if isinstance(found, Tensor) else found, kind=self.affinity, retain=retain
        )
        labels = spectral_labels(
            self.affinity_, self.n_clusters, rounding=self.rounding, n_init=self.n_init,
            random_state=check_random_state(self.random_state),
        )  # fmt: skip
        part = torch.from_numpy(labels)
        spaces = group_subspaces(self._spanning(rows), part, self.n_clusters, rank=self.rank, affine=self.affine)
        self.subspaces_, self.labels_ = stack_subspaces(spaces), like(part, X)
        return self

    def _points(self, rows: Tensor) -> Tensor:
        if not self.affine:
            check_rows(rows)
            return normalize_rows(rows)
        centred = rows - rows.mean(0)
        size = float(centred.square().sum(1).mean().sqrt())
        if not size > 0:
            raise ValueError("X: all rows are the same; there is nothing to cluster")
        # The constant is as large as the rows, so that it is neither ignored nor all that counts.
        return normalize_rows(torch.cat([centred, torch.full_like(centred[:, :1], size)], dim=1))

    def _represent(self, points: Tensor) -> Tensor | sparse.csr_matrix:
        raise NotImplementedError


def check_cluster_count(k: int, n: int) -> None:
    """Refuse more clusters than the n rows."""
    if k > n:
        raise ValueError(f"n_clusters: {k} clusters asked for of n_samples = {n} rows")


def warn_of_copies(points: Tensor) -> None:
    """Say how many rows repeat others."""
    copies = len(points) - len({row.tobytes() for row in points.numpy()})
    if copies:
        warnings.warn(
            f"X: {copies} rows repeat others; the coefficients of such a row may all fall on its twin", stacklevel=3
        )
