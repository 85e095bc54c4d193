"""`SpaceMap`: the closed-form maps from one paired representation space to another, as one estimator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import check_matrix, like
from subspan.base.estimators import validate_data
from subspan.geometry import AffineMap
from subspan.geometry.affine import check_map_memory
from subspan.statistics import JointMoments
from subspan.statistics.pairs import paired_rows

_METHODS = ("translation", "procrustes", "scaled", "ridge", "cca")


class SpaceMap(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Affine map from rows X (n, d_x) to the rows Y (n, d_y) that they are paired with, in closed form.

    method: "translation", a shift of the mean · "procrustes", the isometry nearest to the pairs (rotation or
    reflection; Schönemann, 1966) · "scaled", the same times one factor · "ridge", linear regression with penalty
    `alpha`, relative to the mean variance of X · "cca", regression through the first `k` canonical pairs (all where
    None), covariances shrunk by `shrinkage`. Of fewer pairs than (d_x + d_y) / 2 it is fitted in what their rows span,
    and the isometry sends what lies outside to the mean.
    One pass over data in any form that `subspan.statistics.batches` reads, or `partial_fit`; O((d_x + d_y)²) memory,
    of so few pairs O(d_x d_y). Raises ValueError where such a matrix takes over an eighth of the machine's memory.
    Attributes: map_, an `AffineMap`; moments_, the `JointMoments`; canonical_, the canonical directions (method "cca").
    """

    def __init__(
        self,
        method: Any = "procrustes",
        alpha: Any = 1e-3,
        k: Any = None,
        shrinkage: Any = "oas",
    ) -> None:
        self.method = method
        self.alpha = alpha
        self.k = k
        self.shrinkage = shrinkage

    def fit(self, X: Any, Y: Any) -> SpaceMap:
        """Fit to paired rows. Raises ValueError for NaN, unequal numbers of rows, or fewer than 2."""
        self.__dict__.pop("moments_", None)
        return self.partial_fit(X, Y)

    def partial_fit(self, X: Any, Y: Any) -> SpaceMap:
        """Add paired rows to the statistics and make the map anew."""
        if self.method not in _METHODS:
            raise ValueError(f"method: expected one of {_METHODS}, got {self.method!r}")
        reset = not hasattr(self, "moments_")
        for x, y in paired_rows(self, X, Y, reset=reset):
            if not hasattr(self, "moments_"):
                check_map_memory(x.shape[1], y.shape[1])
                self.moments_ = JointMoments(x.shape[1], y.shape[1], device=x.device)
                self.n_features_in_ = x.shape[1]
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
        return like(self.map_.to(_device(X)).map(self._rows(X, self.map_.matrix.shape[1])), X)

    def inverse_transform(self, X: Any) -> Any:
        """Rows X (n, d_y) of the target space back in the source space, by the (pseudo) inverse of the map."""
        check_is_fitted(self, "map_")
        rows = check_matrix(np.asarray(X) if not isinstance(X, Tensor) else X, "X", columns=self.map_.matrix.shape[0])
        return like(self.map_.inverse().to(_device(X)).map(rows), X)

    def _rows(self, X: Any, columns: int) -> Tensor:
        if not isinstance(X, Tensor):
            X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return check_matrix(X, "X", columns=columns)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = False
        return tags


def _device(rows: Any) -> torch.device:
    return rows.device if isinstance(rows, Tensor) else torch.device("cpu")
