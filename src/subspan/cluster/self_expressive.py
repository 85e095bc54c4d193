"""What clusterers by self-expression share: rows, affinity, spectral clustering, subspaces, prediction."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import like, normalize_rows
from subspan.base.estimators import validate_data
from subspan.geometry import Subspace
from subspan.solvers import ROUNDINGS
from subspan.solvers.nearest_subspace import group_subspaces, nearest_subspace, stack_subspaces
from subspan.solvers.self_expression import check_rows
from subspan.solvers.spectral import affinity_from_representation, spectral_labels


class _RowClusterer(ClusterMixin, BaseEstimator):
    """Rows in, labels and one subspace a cluster out; unseen rows go to the nearest subspace."""

    n_clusters: Any
    affine: Any
    rank: Any
    labels_: Any
    subspaces_: Subspace | tuple[Subspace, ...]

    def predict(self, X: Any) -> Any:
        """The cluster (m,) whose subspace is nearest to each row of X (m, d)."""
        check_is_fitted(self)
        labels = nearest_subspace(self._spanning(self._rows(X, reset=False)), self.subspaces_)
        return like(labels, X)

    def _rows(self, X: Any, *, reset: bool) -> Tensor:
        """Finite rows as float32 or float64 on the CPU."""
        if isinstance(X, Tensor):
            X = X.detach().cpu()
            X = X.float().numpy() if X.dtype in (torch.float16, torch.bfloat16) else X.numpy()
        rows: Any = validate_data(
            self, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=2 if reset else 1
        )
        if reset:
            check_cluster_count(self.n_clusters, len(rows))
        return torch.from_numpy(np.ascontiguousarray(rows) if rows.flags.writeable else rows.copy())

    def _spanning(self, rows: Tensor) -> Tensor:
        """The rows whose subspaces the clusters are: of unit length, or as they are where those are affine."""
        return rows if self.affine else normalize_rows(rows)

    def _keep(self, X: Any, rows: Tensor, labels: np.ndarray) -> None:
        found = torch.from_numpy(labels)
        spaces = group_subspaces(self._spanning(rows), found, self.n_clusters, rank=self.rank, affine=self.affine)
        self.subspaces_ = stack_subspaces(spaces)
        self.labels_ = like(found, X)


class SelfExpressiveClustering(_RowClusterer):
    """Base of the clusterers that express each row by others and cluster the graph of the coefficients.

    Rows are scaled to unit length (a row of zeros is an error). affine: the clusters are affine subspaces; then a
    constant is appended to each row first, which turns an affine subspace of dimension m into a linear one of m + 1.
    retain: coefficients of each row that go into the affinity, None for all. affinity: "symmetric" (|C| + |C|')/2 of
    rows of unit length, or "knn", the 3-nearest-neighbour graph of these rows. rank: of `subspaces_`, as everywhere.
    rounding, n_init: of the spectral clustering (see `solvers.round_embedding`).

    After `fit`: labels_ (n,); representation_ (n, n), CSR, or dense in the kind of X where all coefficients are kept;
    affinity_ (n, n), CSR; subspaces_, a batched `Subspace`, or a tuple where the dimensions differ; both take [i].
    """

    def __init__(
        self,
        n_clusters: Any,
        *,
        affine: Any,
        retain: Any,
        affinity: Any,
        rank: Any,
        rounding: Any,
        n_init: Any,
        random_state: Any,
    ):
        self.n_clusters = n_clusters
        self.affine = affine
        self.retain = retain
        self.affinity = affinity
        self.rank = rank
        self.rounding = rounding
        self.n_init = n_init
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Any:
        """Cluster rows X (n, d). Raises ValueError for NaN, rows of zeros and more clusters than rows."""
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if self.affinity not in ("symmetric", "knn"):
            raise ValueError(f"affinity: expected 'symmetric' or 'knn', got {self.affinity!r}")
        if self.retain is not None and (not isinstance(self.retain, int | np.integer) or self.retain < 1):
            raise ValueError(f"retain: expected an integer >= 1 or None, got {self.retain!r}")
        rows = self._rows(X, reset=True)
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
        self._keep(X, rows, labels)
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


def check_cluster_count(k: Any, n: int) -> None:
    """Refuse a number of clusters that is none, or more than the n rows."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"n_clusters: expected an integer >= 1, got {k!r}")
    if k > n:
        raise ValueError(f"n_clusters: {k} clusters asked for of n_samples = {n} rows")


def warn_of_copies(points: Tensor) -> None:
    """Say how many rows repeat others."""
    copies = len(points) - len({row.tobytes() for row in points.numpy()})
    if copies:
        warnings.warn(
            f"X: {copies} rows repeat others; the coefficients of such a row may all fall on its twin", stacklevel=3
        )
