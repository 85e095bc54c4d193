"""Elastic net subspace clustering by active sets, and its sparsest case, SSC (You et al., 2016)."""

from __future__ import annotations

from typing import Any

from scipy import sparse
from torch import Tensor

from subspan.solvers.self_expression import elastic_net_self_expression

from .self_expressive import SelfExpressiveClustering


class ElasticNetSubspaceClustering(SelfExpressiveClustering):
    """Subspace clustering by elastic-net self-expression, min |x - cX|^2/2 + alpha (r |c|_1 + (1 - r)/2 |c|^2).

    gamma: alpha is the least value at which c = 0, over gamma, so that any gamma > 1 (5 to 500) means the same for all
    rows. l1_ratio: r. max_support: coefficients kept of a row. working_set: others taken in at a time. The other
    parameters and the attributes are those of `SelfExpressiveClustering`. Every row is solved on its working set, by
    homotopy where numba is installed (extra `fast`), else by coordinate descent; correlations with all others are
    matrix products. Memory O(n max_support).
    Source: You, Li, Robinson & Vidal, Oracle based active set algorithm for scalable EnSC, CVPR 2016.
    """

    def __init__(
        self,
        n_clusters: Any = 8,
        *,
        gamma: Any = 50.0,
        l1_ratio: Any = 0.95,
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
        self.l1_ratio = l1_ratio
        self.max_support = max_support
        self.working_set = working_set

    def _represent(self, points: Tensor) -> sparse.csr_matrix:
        return elastic_net_self_expression(
            points,
            gamma=float(self.gamma),
            l1_ratio=float(self.l1_ratio),
            max_support=int(self.max_support),
            working_set=int(self.working_set),
        )
