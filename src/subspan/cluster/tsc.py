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

    Time O(n^2 d) in matrix products, memory O(n n_neighbors). The attributes are those of `SelfExpressiveClustering`.

    Parameters
    ----------
    n_clusters, affine, retain, affinity, rank, rounding, n_init, random_state
        As in `SelfExpressiveClustering`.
    n_neighbors
        Others that a row is joined to.

    References
    ----------
    Heckel & Bölcskei, Robust subspace clustering via thresholding, IEEE Trans. Information Theory 2015.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.cluster import ThresholdingSubspaceClustering
    >>> rng = np.random.default_rng(0)
    >>> x = np.vstack([rng.normal(size=(20, 2)) @ rng.normal(size=(2, 12)) for _ in range(3)])
    >>> model = ThresholdingSubspaceClustering(3, random_state=0).fit(x)
    >>> [len(set(part)) for part in model.labels_.reshape(3, 20).tolist()]  # one label in each plane
    [1, 1, 1]
    """

    n_neighbors: Count = 5

    def _represent(self, points: Tensor) -> sparse.csr_matrix:
        return thresholded_similarities(points, min(int(self.n_neighbors), len(points) - 1))
