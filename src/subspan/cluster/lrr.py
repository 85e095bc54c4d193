"""Low-rank representation: self-expression with the nuclear norm (Liu et al., 2013)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from subspan.base import like
from subspan.base.parameters import Count, Positive
from subspan.solvers.self_expression import low_rank_self_expression, mean_energy, robust_low_rank_self_expression

from .self_expressive import SelfExpressiveClustering


@dataclass(eq=False, repr=False, kw_only=True)
class LowRankRepresentation(SelfExpressiveClustering):
    """Subspace clustering by self-expression of least nuclear norm.

    With noise="gaussian": min |C|_* + alpha / (2 s) |X - CX|_F^2 in closed form, s the mean of the min(n, d) squared
    singular values of the rows of unit length. With noise="rows": min |C|_* + alpha |E|_{2,1}, X = CX + E, for a few
    corrupted rows, by augmented Lagrangian. Time O(n^2 d), memory O(n^2): up to 20 000 rows. The other attributes are
    those of `SelfExpressiveClustering`.

    Parameters
    ----------
    n_clusters, affine, affinity, rank, rounding, n_init, random_state
        As in `SelfExpressiveClustering`.
    alpha
        Weight of the fit. "gaussian": directions that hold less than s / alpha are left out, whatever the number of
        rows; infinity gives the shape-interaction matrix.
    noise
        "gaussian" or "rows", see above.
    retain
        Coefficients of each row that go into the affinity; None for all.

    Attributes
    ----------
    noise_
        E (n, d), with noise="rows" only.

    References
    ----------
    Liu et al., TPAMI 2013; Favaro, Vidal & Ravichandran, CVPR 2011.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.cluster import LowRankRepresentation
    >>> rng = np.random.default_rng(0)
    >>> x = np.vstack([rng.normal(size=(20, 2)) @ rng.normal(size=(2, 12)) for _ in range(3)])
    >>> model = LowRankRepresentation(3, alpha=100, random_state=0).fit(x)
    >>> [len(set(part)) for part in model.labels_.reshape(3, 20).tolist()]  # one label in each plane
    [1, 1, 1]
    """

    alpha: Positive = 10.0
    noise: Literal["gaussian", "rows"] = "gaussian"
    retain: Count | None = 9

    def _represent(self, points: Tensor) -> Tensor:
        if self.noise == "gaussian":
            return low_rank_self_expression(points, float(self.alpha) / mean_energy(points))
        found, self._noise = robust_low_rank_self_expression(points, float(self.alpha))
        return found

    def fit(self, X: Any, y: Any = None) -> LowRankRepresentation:
        """Cluster rows X (n, d), as `SelfExpressiveClustering`."""
        super().fit(X)
        if self.noise == "rows":
            self.noise_ = like(self._noise, X)
        return self
