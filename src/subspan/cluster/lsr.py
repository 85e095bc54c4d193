"""Least squares representation: dense self-expression with a ridge, in closed form (Lu et al., 2012)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subspan.base.parameters import Count, NonNegative
from subspan.solvers.self_expression import RIDGE, mean_energy, ridge_self_expression

from .self_expressive import SelfExpressiveClustering


@dataclass(eq=False, repr=False, kw_only=True)
class LeastSquaresRepresentation(SelfExpressiveClustering):
    """Subspace clustering by ridge self-expression, min |X - CX|_F^2 + alpha s |C|_F^2 with a zero diagonal.

    alpha: in units of s, the mean of the min(n, d) squared singular values of the rows of unit length, so that it means
    the same for any number of rows. 0.1 suits faces, 1 to 3 features of networks, objects and handwriting.
    zero_diagonal: False leaves it free.
    Few of the coefficients matter: `retain` near the dimension of the subspaces is worth more than any alpha. The other
    parameters and the attributes are those of `SelfExpressiveClustering`. Time O(n^2 d + min(n, d)^3), memory O(n^2):
    up to 20 000 rows. Source: Lu et al., Robust and efficient subspace segmentation via LSR, ECCV 2012.
    """

    alpha: NonNegative = RIDGE
    zero_diagonal: bool = True
    retain: Count | None = 9

    def _represent(self, points: Tensor) -> Tensor:
        return ridge_self_expression(points, float(self.alpha) * mean_energy(points), zero_diagonal=self.zero_diagonal)
