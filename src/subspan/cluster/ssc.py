"""Sparse subspace clustering: self-expression by the lasso (Elhamifar & Vidal, 2013)."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import sparse
from torch import Tensor

from subspan.base.parameters import Count, Positive
from subspan.solvers.self_expression import elastic_net_self_expression

from .self_expressive import SelfExpressiveClustering


@dataclass(eq=False, repr=False, kw_only=True)
class SparseSubspaceClustering(SelfExpressiveClustering):
    """Subspace clustering by l1 self-expression, min |x - cX|^2/2 + alpha |c|_1 with c_i = 0 for row i.

    The elastic net of `ElasticNetSubspaceClustering` with l1_ratio = 1; gamma, max_support and working_set as there,
    the other parameters and the attributes as in `SelfExpressiveClustering`.
    Source: Elhamifar & Vidal, Sparse subspace clustering: algorithm, theory and applications, TPAMI 2013.
    """

    gamma: Positive = 50.0
    max_support: Count = 50
    working_set: Count = 32

    def _represent(self, points: Tensor) -> sparse.csr_matrix:
        return elastic_net_self_expression(
            points,
            gamma=float(self.gamma),
            l1_ratio=1.0,
            max_support=int(self.max_support),
            working_set=int(self.working_set),
        )
