"""Sparse subspace clustering: self-expression by the lasso (Elhamifar & Vidal, 2013)."""

from __future__ import annotations

from typing import Any

from scipy import sparse
from torch import Tensor

from subspan.solvers.self_expression import elastic_net_self_expression

from .self_expressive import SelfExpressiveClustering


class SparseSubspaceClustering(SelfExpressiveClustering):
    """Subspace clustering by l1 self-expression, min |x - cX|^2/2 + alpha |c|_1 with c_i = 0 for row i.

    The elastic net of `ElasticNetSubspaceClustering` with l1_ratio = 1; gamma, max_support and working_set as there,
    the other parameters and the attributes as in `SelfExpressiveClustering`.
    Source: Elhamifar & Vidal, Sparse subspace clustering: algorithm, theory and applications, TPAMI 2013.
    """

    def __init__(
        self,
        n_clusters: Any = 8,
        *,
        gamma: Any = 50.0,
        max_support: Any = 50,
        working_set: Any = 32,
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
        self.gamma = gamma
        self.max_support = max_support
        self.working_set = working_set

    def _represent(self, points: Tensor) -> sparse.csr_matrix:
        return elastic_net_self_expression(
            points,
            gamma=float(self.gamma),
            l1_ratio=1.0,
            max_support=int(self.max_support),
            working_set=int(self.working_set),
        )
