"""Subspace clustering by thresholding (Heckel & Bölcskei, 2015)."""

from __future__ import annotations

from typing import Any

from scipy import sparse
from torch import Tensor

from ..solvers.self_expression import thresholded_similarities
from .self_expressive import SelfExpressiveClustering


class ThresholdingSubspaceClustering(SelfExpressiveClustering):
    """Subspace clustering by the graph of each row's nearest others in angle, the sign left out.

    n_neighbors: others a row is joined to. The other parameters and the attributes are those of
    `SelfExpressiveClustering`. Time O(n^2 d) in matrix products, memory O(n n_neighbors).
    Source: Heckel & Bölcskei, Robust subspace clustering via thresholding, IEEE Trans. Information Theory 2015.
    """

    def __init__(
        self,
        n_clusters: Any = 8,
        *,
        n_neighbors: Any = 5,
        affine: Any = False,
        retain: Any = None,
        affinity: Any = "symmetric",
        rank: Any = 0.9,
        rounding: Any = "kmeans",
        n_init: Any = 20,
        random_state: Any = None,
    ):
        self.n_clusters = n_clusters
        self.n_neighbors = n_neighbors
        self.affine = affine
        self.retain = retain
        self.affinity = affinity
        self.rank = rank
        self.rounding = rounding
        self.n_init = n_init
        self.random_state = random_state

    def _represent(self, points: Tensor) -> sparse.csr_matrix:
        return thresholded_similarities(points, min(int(self.n_neighbors), len(points) - 1))
