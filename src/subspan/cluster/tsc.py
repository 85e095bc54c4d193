"""Subspace clustering by thresholding (Heckel & Bölcskei, 2015)."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import sparse
from torch import Tensor

from subspan.base.parameters import Count
from subspan.solvers.self_expression import thresholded_similarities

from .self_expressive import SelfExpressiveClustering


@dataclass(eq=False, repr=False, kw_only=True)
class ThresholdingSubspaceClustering(SelfExpressiveClustering):
    """Subspace clustering by the graph of each row's nearest others in angle, the sign left out.

    n_neighbors: others a row is joined to. The other parameters and the attributes are those of
    `SelfExpressiveClustering`. Time O(n^2 d) in matrix products, memory O(n n_neighbors).
    Source: Heckel & Bölcskei, Robust subspace clustering via thresholding, IEEE Trans. Information Theory 2015.
    """

    n_neighbors: Count = 5

    def _represent(self, points: Tensor) -> sparse.csr_matrix:
        return thresholded_similarities(points, min(int(self.n_neighbors), len(points) - 1))
