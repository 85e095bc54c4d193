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

    Time O(n^2 d + min(n, d)^3), memory O(n^2): up to 20 000 rows. The attributes are those of
    `SelfExpressiveClustering`.

    Parameters
    ----------
    n_clusters, affine, affinity, rank, rounding, n_init, random_state
        As in `SelfExpressiveClustering`.
    alpha
        In units of s, the mean of the min(n, d) squared singular values of the rows of unit length, so that it means
        the same for any number of rows. 0.1 suits faces, 1 to 3 features of networks, objects and handwriting.
    zero_diagonal
        False leaves the diagonal of C free.
    retain
        Coefficients of each row that go into the affinity; few of them matter: a value near the dimension of the
        subspaces is worth more than any alpha. None for all.

    References
    ----------
    Lu et al., Robust and efficient subspace segmentation via LSR, ECCV 2012.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.cluster import LeastSquaresRepresentation
    >>> rng = np.random.default_rng(0)
    >>> x = np.vstack([rng.normal(size=(20, 2)) @ rng.normal(size=(2, 12)) for _ in range(3)])
    >>> model = LeastSquaresRepresentation(3, retain=4, random_state=0).fit(x)
    >>> [len(set(part)) for part in model.labels_.reshape(3, 20).tolist()]  # one label in each plane
    [1, 1, 1]
    """

    alpha: NonNegative = RIDGE
    zero_diagonal: bool = True
    retain: Count | None = 9

    def _represent(self, points: Tensor) -> Tensor:
        return ridge_self_expression(points, float(self.alpha) * mean_energy(points), zero_diagonal=self.zero_diagonal)
