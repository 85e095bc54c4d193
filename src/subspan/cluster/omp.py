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

    n_nonzero: others that express a row, at most; near the dimension of the subspaces. tolerance: squared residual at
    which a row stops. The other parameters and the attributes are those of `SelfExpressiveClustering`. Time
    O(n_nonzero n^2 d) in matrix products, memory O(n n_nonzero): no n x n numbers are held. Not for data of few
    columns: there two or three rows express any other, so that it cannot tell blobs in a plane apart, affine or not.
    Source: You, Robinson & Vidal, Scalable sparse subspace clustering by OMP, CVPR 2016.
    """

    n_nonzero: Count = 10
    tolerance: NonNegative = 1e-6

    def _represent(self, points: Tensor) -> sparse.csr_matrix:
        return omp_self_expression(points, min(int(self.n_nonzero), len(points) - 1), tolerance=float(self.tolerance))
