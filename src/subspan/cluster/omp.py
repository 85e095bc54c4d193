"""Sparse subspace clustering by orthogonal matching pursuit (You, Robinson & Vidal, 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import sparse
from torch import Tensor

from subspan.base.parameters import Count, NonNegative
from subspan.solvers.self_expression import omp_self_expression

from .self_expressive import SelfExpressiveClustering


@dataclass(eq=False, repr=False, kw_only=True)
class OMPSubspaceClustering(SelfExpressiveClustering):
    """Subspace clustering by greedy sparse self-expression, for many rows.

    Time O(n_nonzero n^2 d) in matrix products, memory O(n n_nonzero): no n x n numbers are held. Not for data of few
    columns: there two or three rows express any other, so that it cannot tell blobs in a plane apart, affine or not.
    The attributes are those of `SelfExpressiveClustering`.

    Parameters
    ----------
    n_clusters, affine, retain, affinity, rank, rounding, n_init, random_state
        As in `SelfExpressiveClustering`.
    n_nonzero
        Others that express a row, at most; near the dimension of the subspaces.
    tolerance
        Squared residual at which a row stops.

    References
    ----------
    You, Robinson & Vidal, Scalable sparse subspace clustering by OMP, CVPR 2016.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.cluster import OMPSubspaceClustering
    >>> rng = np.random.default_rng(0)
    >>> x = np.vstack([rng.normal(size=(20, 3)) @ rng.normal(size=(3, 12)) for _ in range(3)])
    >>> model = OMPSubspaceClustering(3, n_nonzero=3, random_state=0).fit(x)
    >>> int(model.representation_.count_nonzero(axis=1).max())  # others that express a row
    3
    """

    n_nonzero: Count = 10
    tolerance: NonNegative = 1e-6

    def _represent(self, points: Tensor) -> sparse.csr_matrix:
        return omp_self_expression(points, min(int(self.n_nonzero), len(points) - 1), tolerance=float(self.tolerance))
