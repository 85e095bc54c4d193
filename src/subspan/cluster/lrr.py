"""Low-rank representation: self-expression with the nuclear norm (Liu et al., 2013)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subspan.base import like
from subspan.solvers.self_expression import low_rank_self_expression, mean_energy, robust_low_rank_self_expression

from .self_expressive import SelfExpressiveClustering


class LowRankRepresentation(SelfExpressiveClustering):
    """Subspace clustering by self-expression of least nuclear norm.

    noise: "gaussian", min |C|_* + alpha / (2 s) |X - CX|_F^2 in closed form (alpha = inf: the shape-interaction
    matrix), s the mean of the min(n, d) squared singular values of the rows of unit length: directions that hold less
    than s / alpha are left out, whatever the number of rows. Or "rows", min |C|_* + alpha |E|_{2,1} with X = CX + E for
    a few corrupted rows, by augmented Lagrangian; noise_ is E.
    The other parameters and the attributes are those of `SelfExpressiveClustering`. Time O(n^2 d), memory O(n^2): up to
    20 000 rows. Source: Liu et al., TPAMI 2013; Favaro, Vidal & Ravichandran, CVPR 2011.
    """

    def __init__(
        self,
        n_clusters: Any = 8,
        *,
        alpha: Any = 10.0,
        noise: Any = "gaussian",
        affine: Any = False,
        retain: Any = 9,
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
        self.alpha = alpha
        self.noise = noise

    def _represent(self, points: Tensor) -> Tensor:
        if self.noise not in ("gaussian", "rows"):
            raise ValueError(f"noise: expected 'gaussian' or 'rows', got {self.noise!r}")
        if self.noise == "gaussian":
            return low_rank_self_expression(points, float(self.alpha) / mean_energy(points))
        found, noise = robust_low_rank_self_expression(points, float(self.alpha))
        self._noise = noise
        return found

    def fit(self, X: Any, y: Any = None) -> Any:
        """Cluster rows X (n, d), as `SelfExpressiveClustering`."""
        super().fit(X)
        if self.noise == "rows":
            self.noise_ = like(self._noise, X)
        return self
