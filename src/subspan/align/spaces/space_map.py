"""`SpaceMap`: the closed-form maps from one paired representation space to another, as one estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from subspan.base import check_matrix, like
from subspan.base.estimators import PairedEstimator
from subspan.base.parameters import Count, NonNegative, Share
from subspan.geometry import AffineMap
from subspan.geometry.affine import check_map_memory
from subspan.statistics import JointMoments


@dataclass(eq=False, repr=False)
class SpaceMap(ClassNamePrefixFeaturesOutMixin, TransformerMixin, PairedEstimator):
    """Affine map from rows X (n, d_x) to the rows Y (n, d_y) that they are paired with, in closed form.

    One pass over data in any form that `subspan.statistics.batches` reads, or `partial_fit`; O((d_x + d_y)²) memory. Of
    fewer pairs than (d_x + d_y) / 2 it is fitted in what their rows span, in O(d_x d_y) memory, and the isometry sends
    what lies outside to the mean.

    Parameters
    ----------
    method
        "translation", a shift of the mean; "procrustes", the isometry nearest to the pairs (rotation or reflection);
        "scaled", the same times one factor; "ridge", linear regression; "cca", regression through canonical pairs.
    alpha
        Penalty of "ridge", relative to the mean variance of X.
    k
        Canonical pairs; None for all.
    shrinkage
        Of the covariances of "cca": a share, or "oas".

    Attributes
    ----------
    map_
        An `AffineMap`.
    moments_
        The `JointMoments`.
    canonical_
        The canonical directions ("cca").

    Raises
    ------
    ValueError
        Where a matrix of these sizes takes over an eighth of the machine's memory.

    References
    ----------
    Schönemann, 1966 (Procrustes).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.align import SpaceMap
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(50, 4))
    >>> y = x @ np.linalg.qr(rng.normal(size=(4, 4)))[0] + 1
    >>> bool(np.allclose(SpaceMap("procrustes").fit(x, y).transform(x), y))
    True
    """

    method: Literal["translation", "procrustes", "scaled", "ridge", "cca"] = "procrustes"
    alpha: NonNegative = 1e-3
    k: Count | None = None
    shrinkage: Literal["oas"] | Share = "oas"

    def fit(self, X: Any, Y: Any) -> SpaceMap:
        """Fit to paired rows. Raises ValueError for NaN, unequal numbers of rows, or fewer than 2."""
        self.__dict__.pop("moments_", None)
        return self.partial_fit(X, Y)

    def partial_fit(self, X: Any, Y: Any) -> SpaceMap:
        """Add paired rows to the statistics and make the map anew."""
        self._check_parameters()
        reset = not hasattr(self, "moments_")
        for x, y in self._pairs(X, Y, reset=reset):
            if not hasattr(self, "moments_"):
                check_map_memory(x.shape[1], y.shape[1])
                self.moments_ = JointMoments(x.shape[1], y.shape[1], device=x.device)
            self.moments_.update(x, y)
        if not hasattr(self, "moments_") or self.moments_.count < 2:
            raise ValueError("X, Y: need at least 2 pairs (n_samples = 2)")
        self.map_ = self._closed_form(self.moments_)
        self._n_features_out = self.map_.matrix.shape[0]
        return self

    def _closed_form(self, moments: JointMoments) -> AffineMap:
        if not (moments.x.total_variance > 0 and moments.y.total_variance > 0):
            raise ValueError("X, Y: one of them is constant; there is nothing to map")
        if self.method == "translation":
            return moments.translation()
        if self.method in ("procrustes", "scaled"):
            return moments.procrustes(scale=self.method == "scaled")
        if self.method == "ridge":
            return moments.ridge(self.alpha)
        self.canonical_ = moments.cca(self.k, shrinkage=self.shrinkage)
        return moments.through_canonical(self.canonical_)

    def transform(self, X: Any) -> Any:
        """Rows X (n, d_x) in the space of Y (n, d_y); numpy or torch as given."""
        check_is_fitted(self, "map_")
        rows = self._rows(X)
        return like(self.map_.to(rows.device).map(rows), X)

    def inverse_transform(self, X: Any) -> Any:
        """Rows X (n, d_y) of the target space back in the source space, by the (pseudo) inverse of the map."""
        check_is_fitted(self, "map_")
        rows = check_matrix(X, "X", columns=self.map_.matrix.shape[0])
        return like(self.map_.inverse().to(rows.device).map(rows), X)
