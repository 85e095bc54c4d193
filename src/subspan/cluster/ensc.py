"""Elastic net subspace clustering by active sets, and its sparsest case, SSC (You et al., 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from scipy import sparse
from torch import Tensor

from subspan.base.parameters import Bounds, Count, Positive
from subspan.solvers.self_expression import elastic_net_self_expression

from .self_expressive import SelfExpressiveClustering


@dataclass(eq=False, repr=False, kw_only=True)
class ElasticNetSubspaceClustering(SelfExpressiveClustering):
    """Subspace clustering by elastic-net self-expression, min |x - cX|^2/2 + alpha (r |c|_1 + (1 - r)/2 |c|^2).

    Every row is solved on its working set, by homotopy where numba is installed (extra `fast`), else by coordinate
    descent; correlations with all others are matrix products. Memory O(n max_support). The attributes are those of
    `SelfExpressiveClustering`.

    Parameters
    ----------
    n_clusters, affine, retain, affinity, rank, rounding, n_init, random_state
        As in `SelfExpressiveClustering`.
    gamma
        alpha is the least value at which c = 0, over gamma: any gamma > 1 (5 to 500) means the same for all rows.
    l1_ratio
        The share r of the l1 norm, in (0, 1].
    max_support
        Coefficients kept of a row, at most.
    working_set
        Others taken in at a time.

    References
    ----------
    You, Li, Robinson & Vidal, Oracle based active set algorithm for scalable EnSC, CVPR 2016.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.cluster import ElasticNetSubspaceClustering
    >>> rng = np.random.default_rng(0)
    >>> x = np.vstack([rng.normal(size=(20, 2)) @ rng.normal(size=(2, 12)) for _ in range(3)])
    >>> model = ElasticNetSubspaceClustering(3, random_state=0).fit(x)
    >>> [len(set(part)) for part in model.labels_.reshape(3, 20).tolist()]  # one label in each plane
    [1, 1, 1]
    """

    gamma: Positive = 50.0
    l1_ratio: Annotated[float, Bounds(above=0, most=1)] = 0.95
    max_support: Count = 50
    working_set: Count = 32

    def _represent(self, points: Tensor) -> sparse.csr_matrix:
        return elastic_net_self_expression(
            points,
            gamma=float(self.gamma),
            l1_ratio=float(self.l1_ratio),
            max_support=int(self.max_support),
            working_set=int(self.working_set),
        )
