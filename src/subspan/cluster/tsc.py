"""Subspace clustering by thresholding (Heckel & Bölcskei, 2015)."""

from __future__ import annotations

from typing import Any

from scipy import sparse
from torch import Tensor

from subspan.solvers.self_expression import thresholded_similarities

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
        super().__init__(
            n_clusters, affine=affine, retain=retain, affinity=affinity, rank=rank, rounding=rounding, n_init=n_init,
            random_state=random_state,
        )  # fmt: skip
        self.n_neighbors = n_neighbors

    def _represent(self, points: Tensor) -> sparse.csr_matrix:
        return thresholded_similarities(points, min(int(self.n_neighbors), len(points) - 1))
