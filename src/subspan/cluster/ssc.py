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

    It is the elastic net of `ElasticNetSubspaceClustering` with l1_ratio = 1. The attributes are those of
    `SelfExpressiveClustering`.

    Parameters
    ----------
    n_clusters, affine, retain, affinity, rank, rounding, n_init, random_state
        As in `SelfExpressiveClustering`.
    gamma, max_support, working_set
        As in `ElasticNetSubspaceClustering`.

    References
    ----------
    Elhamifar & Vidal, Sparse subspace clustering: algorithm, theory and applications, TPAMI 2013.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.cluster import SparseSubspaceClustering
    >>> rng = np.random.default_rng(0)
    >>> x = np.vstack([rng.normal(size=(20, 2)) @ rng.normal(size=(2, 12)) for _ in range(3)])
    >>> model = SparseSubspaceClustering(3, random_state=0).fit(x)
    >>> [len(set(part)) for part in model.labels_.reshape(3, 20).tolist()]  # one label in each plane
    [1, 1, 1]
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
