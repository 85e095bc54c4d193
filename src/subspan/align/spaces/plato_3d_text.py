"""A-posteriori alignment of two unimodal encoders inside the subspaces that they share (Hadgi et al., 2025)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import NotFittedError
from torch import Tensor

from subspan.base import check_matrix, like, normalize_rows, save_arrays, saved_object
from subspan.base.estimators import PairedEstimator
from subspan.base.parameters import Bounds, Count, Share
from subspan.base.saved import Schema, optional
from subspan.geometry import AffineMap, Subspace
from subspan.measures import local_kernel_cka
from subspan.measures.kernel_alignment import MOST_KERNEL_ROWS
from subspan.solvers import assign, nearest
from subspan.statistics import JointMoments

from .shared_coordinates import FOLDS, SharedCoordinates, SharedSpace, centred, total

_PARAMETERS: Schema = {
    "n_components": int | str,
    "method": str,
    "subspace": str | None,
    "shrinkage": float | str,
    "direction": str,
    "kernel": str,
    "scale": str,
    "alpha": float,
}
_SAVED: Schema = {
    "moments_count": Float[Tensor, "1"],
    "moments_mean": Float[Tensor, " m"],
    "moments_scatter": Float[Tensor, "m m"],
    "matrix_x": Float[Tensor, "k_x d_x"],
    "mean_x": Float[Tensor, " d_x"],
    "matrix_y": Float[Tensor, "k_y d_y"],
    "mean_y": Float[Tensor, " d_y"],
    "correlations": optional(Float[Tensor, " k_x"]),
    "held_out": optional(Float[Tensor, " h"]),
}
Direction = Literal["x->y", "y->x"]


@dataclass(eq=False, repr=False)
class SubspaceAligner(PairedEstimator):
    """Compare rows of two spaces that were never trained together, from paired anchors X (n, p) and Y (n, q).

    1. Both spaces are centred at the anchors' means and projected to `n_components` coordinates of a subspace.
    2. The coordinates are compared by a `method`.

    The anchors are read once, in any form that `subspan.statistics.batches` takes, or by `partial_fit`; memory
    O((p + q)²), everything in float64. Queries are centred by the anchors' means, never by their own.

    Parameters
    ----------
    n_components
        k, or "cv" for as many canonical pairs as correlate on held-out anchors (5 folds, 3 standard errors).
    method
        "affine", least squares from the one to the other and then the cosine; "procrustes", an isometry and then the
        cosine; "cosine", the coordinates as they are; "local_cka", the alignment (CKA) of the anchors with the query
        pair added to them.
    subspace
        "cca" (canonical directions), "pca" (the dominant directions of each, the control), "svcca" (canonical
        directions within 99 % of each variance), None (all of both spaces).
    shrinkage
        Weight in [0, 1] of the scaled identity in the covariances of step 1, or "auto" (oracle approximating).
    direction
        "x->y" maps x and lets x search y, "y->x" the other way.
    kernel
        Of local CKA: "linear" (closed form) or "rbf" (median width, at most 5000 anchors, which are kept).
    scale
        "whiten", unit variance of each canonical coordinate, or "rho", its correlation as weight.
    alpha
        Penalty of the affine map, relative to the mean variance; 0 is the paper's least squares.

    Attributes
    ----------
    canonical_correlations_
        (k,) of the anchors.
    held_out_correlations_
        On a fifth of the anchors of directions fitted to the others (all that were tried with "cv").
    n_components_
        Coordinates a side.
    subspace_x_, subspace_y_
        Orthonormal bases of the two spans.
    coordinates_
        The two `AffineMap`s of step 1.
    map_x_, map_y_
        Those behind `transform_x` and `transform_y`.
    moments_
        `JointMoments` of the anchors.

    References
    ----------
    Hadgi et al. (2025), arXiv 2503.05283; local CKA from Maniparambil et al. (2024).

    Examples
    --------
    >>> import torch
    >>> from subspan.align import SubspaceAligner
    >>> random = torch.Generator().manual_seed(0)
    >>> z = torch.randn(150, 3, generator=random)  # what the two spaces share; the rest is their own
    >>> x, y = (torch.cat([z, torch.randn(150, 5, generator=random)], 1) for _ in range(2))
    >>> model = SubspaceAligner(3).fit(x[:100], y[:100])
    >>> model.score(x[100:], y[100:], "top5") > 0.9
    True
    """

    n_components: Count | Literal["cv"] = 50
    method: Literal["affine", "local_cka", "procrustes", "cosine"] = "affine"
    subspace: Literal["cca", "pca", "svcca"] | None = "cca"
    shrinkage: Share | Literal["auto"] = 0.1
    direction: Direction = "x->y"
    kernel: Literal["linear", "rbf"] = "linear"
    scale: Literal["whiten", "rho"] = "whiten"
    alpha: Annotated[float, Bounds(least=0, below=math.inf)] = 0.0

    # ------------------------------------------------------------------ anchors

    def fit(self, X: Any, Y: Any) -> SubspaceAligner:
        """Fit to paired anchors.

        Raises ValueError for unequal numbers of rows, fewer than 3, NaN, a constant space, or n_components above what
        the anchors span. Warns for fewer than 5 (p + q) anchors without shrinkage, and for canonical correlations
        near 1 that do not hold on anchors left out.
        """
        for name in ("_folds", "_anchors", "_shared", "n_features_in_"):
            self.__dict__.pop(name, None)
        self.partial_fit(X, Y)
        self._solve()
        return self

    def partial_fit(self, X: Any, Y: Any) -> SubspaceAligner:
        """Add paired anchors; the alignment is made when it is first asked for."""
        self._check_parameters()
        if hasattr(self, "_shared") and not hasattr(self, "_folds"):
            raise ValueError("X: this aligner was read from a file, which does not keep what more anchors are added to")
        self.__dict__.pop("_shared", None)
        for x, y in self._pairs(X, Y, reset=not hasattr(self, "_folds")):
            if not hasattr(self, "_folds"):
                number = FOLDS if self.n_components == "cv" else 2
                self._folds = [JointMoments(x.shape[1], y.shape[1], device=x.device) for _ in range(number)]
                self._anchors: list[tuple[Tensor, Tensor]] = []
            self._add(x, y)
        return self

    def _add(self, x: Tensor, y: Tensor) -> None:
        """Every fifth pair to the held-out fold (each fifth to a fold of its own for "cv"), however batches fall."""
        if self.kernel == "rbf" and self.method == "local_cka":
            have = len(x) + sum(len(rows) for rows, _ in self._anchors)
            if have > MOST_KERNEL_ROWS:
                raise ValueError(
                    f"X: kernel='rbf' takes a kernel matrix of (n + 1)² numbers a query, so at most {MOST_KERNEL_ROWS} "
                    f"anchors, got {have}; use fewer, or kernel='linear', which needs no kernel matrix"
                )
            self._anchors.append((x.double(), y.double()))
        place = (torch.arange(len(x), device=x.device) + int(sum(fold.count for fold in self._folds))) % FOLDS
        for number, fold in enumerate(self._folds):
            # Two folds: the fifth pairs and all others.
            last = number == len(self._folds) - 1
            chosen = place == number if len(self._folds) == FOLDS else (place == FOLDS - 1) == last
            fold.update(x[chosen].double(), y[chosen].double())

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.n_components == "cv" and self.subspace not in ("cca", "svcca"):
            raise ValueError(f"n_components: 'cv' counts canonical pairs; subspace={self.subspace!r} has none")

    # ------------------------------------------------------------------ the algorithm

    def _solve(self) -> SharedSpace:
        if not hasattr(self, "_folds"):
            raise NotFittedError(f"This {type(self).__name__} instance is not fitted yet; call fit first")
        shrinkage = "oas" if self.shrinkage == "auto" else float(self.shrinkage)
        rule = SharedCoordinates(self.subspace, shrinkage, self.scale)
        rule.check(self.moments_)
        self._shared = rule.find(self._folds, None if self.n_components == "cv" else int(self.n_components))
        self._shared.warn_if_overfitted()
        self._align()
        return self._shared

    def _align(self) -> None:
        """Step 2: the map between the two sets of coordinates, from the moments of the anchors in them."""
        shared = self._shared
        forward = self.direction == "x->y"
        self._map_x, self._map_y = shared.map_x, shared.map_y
        if self.method in ("affine", "procrustes"):
            moments = shared.moments if forward else shared.moments.swapped()
            between = moments.ridge(float(self.alpha)) if self.method == "affine" else moments.procrustes()
            if forward:
                self._map_x = between @ shared.map_x
            else:
                self._map_y = between @ shared.map_y

    # ------------------------------------------------------------------ what was found

    def _fitted(self) -> SharedSpace:
        return self._shared if hasattr(self, "_shared") else self._solve()

    @property
    def moments_(self) -> JointMoments:
        """Moments of all anchors."""
        if not hasattr(self, "_folds"):
            raise NotFittedError("moments_: no anchors were given (a file does not keep their moments)")
        return total(self._folds)

    @property
    def map_x_(self) -> AffineMap:
        """Rows of x to the coordinates that `transform_x` gives."""
        self._fitted()
        return self._map_x

    @property
    def map_y_(self) -> AffineMap:
        """Rows of y to the coordinates that `transform_y` gives."""
        self._fitted()
        return self._map_y

    @property
    def coordinates_(self) -> tuple[AffineMap, AffineMap]:
        """Rows of x and of y to their coordinates in the shared subspaces, before step 2."""
        shared = self._fitted()
        return shared.map_x, shared.map_y

    @property
    def n_components_(self) -> int:
        """Coordinates a side (of x where the two differ: subspace=None)."""
        return int(self._fitted().map_x.matrix.shape[0])

    @property
    def canonical_correlations_(self) -> Float[np.ndarray, " k"]:
        """Correlations of the canonical pairs on the anchors; those of the shrunk covariances where shrinkage > 0."""
        return self._correlations("correlations")

    @property
    def held_out_correlations_(self) -> Float[np.ndarray, " m"]:
        """Correlations of the canonical pairs on anchors that did not fit them."""
        return self._correlations("held_out")

    def _correlations(self, name: str) -> Float[np.ndarray, " k"]:
        values = getattr(self._fitted(), name)
        if values is None:
            raise AttributeError(
                f"subspace={self.subspace!r} and this number of anchors give no canonical correlations"
            )
        return values.cpu().numpy()

    @property
    def subspace_x_(self) -> Subspace:
        """Span of the coordinates in the space of x, through the anchors' mean."""
        return self._fitted().subspaces()[0]

    @property
    def subspace_y_(self) -> Subspace:
        """Span of the coordinates in the space of y, through the anchors' mean."""
        return self._fitted().subspaces()[1]

    def truncate(self, n_components: int | None = None, **parameters: Any) -> SubspaceAligner:
        """A copy with the first n_components coordinates and other `parameters` of step 2 (method, direction, alpha).

        No data is read. Raises ValueError where it has fewer coordinates, or a parameter belongs to step 1.
        """
        shared = self._fitted()
        unknown = set(parameters) - {"method", "direction", "alpha"}
        if unknown:
            raise ValueError(f"parameters: method, direction and alpha can be changed, got {sorted(unknown)}")
        new: SubspaceAligner = type(self)(**{**self.get_params(), **parameters})
        if n_components is not None:
            if self.subspace is None:
                raise ValueError("n_components: subspace=None keeps all coordinates")
            if not 1 <= n_components <= self.n_components_:
                raise ValueError(f"n_components: must lie in [1, {self.n_components_}], got {n_components}")
            shared = shared.truncate(int(n_components))
            new.n_components = int(n_components)
        new._check_parameters()
        if new.method == "local_cka" and new.kernel == "rbf" and not getattr(self, "_anchors", []):
            raise ValueError("method: kernel='rbf' needs the anchors, which this aligner did not keep")
        if hasattr(self, "_folds"):
            new._folds = [fold.copy() for fold in self._folds]
            new._anchors = list(self._anchors)
        new.n_features_in_ = self.n_features_in_
        new._shared = shared
        new._align()
        return new

    # ------------------------------------------------------------------ use

    def transform_x(self, X: Any) -> Any:
        """Coordinates (m, k) of rows X (m, p); but for local CKA, similarity is their cosine with those of y."""
        self._fitted()
        return like(self._map_x.map(self._side(X, "X")), X)

    def transform_y(self, Y: Any) -> Any:
        """Coordinates (m, k) of rows Y (m, q)."""
        self._fitted()
        return like(self._map_y.map(self._side(Y, "Y")), Y)

    def _side(self, rows: Any, name: str) -> Float[Tensor, "m d"]:
        wide = self._shared.map_y.matrix
        found = self._rows(rows) if name == "X" else check_matrix(rows, name, columns=wide.shape[1])
        return found.to(wide)

    def similarity(self, X: Any, Y: Any) -> Any:
        """Scores (m, l) of every row of X (m, p) against every row of Y (l, q); larger is more alike."""
        return like(self._scores(X, Y), X)

    def _scores(self, X: Any, Y: Any) -> Float[Tensor, "m l"]:
        shared = self._fitted()
        x, y = self._side(X, "X"), self._side(Y, "Y")
        if self.method == "local_cka":
            a, b = shared.map_x.map(x), shared.map_y.map(y)
            if self.kernel == "linear":
                return shared.moments.local_cka(a, b)
            anchors_x, anchors_y = (torch.cat(rows).to(a) for rows in zip(*self._anchors))
            return local_kernel_cka(shared.map_x.map(anchors_x), shared.map_y.map(anchors_y), a, b)
        a, b = self._map_x.map(x), self._map_y.map(y)
        self._check_comparable()
        return normalize_rows(a) @ normalize_rows(b).mT

    def _check_comparable(self) -> None:
        k, other = len(self._map_x.matrix), len(self._map_y.matrix)
        if k != other:
            raise ValueError(f"method: {self.method!r} compares equal numbers of coordinates, here {k} and {other}")

    def retrieve(self, X: Any, Y: Any, k: int = 10) -> tuple[Any, Any]:
        """Scores and indices (m, k), best first. x->y: for each row of X the rows of Y; y->x: the other way."""
        self._fitted()
        forward = self.direction == "x->y"
        if self.method == "local_cka":
            scores = self._scores(X, Y) if forward else self._scores(X, Y).mT
            if not 1 <= k <= scores.shape[1]:
                raise ValueError(f"k: must lie in [1, {scores.shape[1]}], got {k}")
            best, found = scores.topk(k, dim=1)
        else:
            self._check_comparable()
            x, y = self._map_x.map(self._side(X, "X")), self._map_y.map(self._side(Y, "Y"))
            queries, base = (x, y) if forward else (y, x)
            best, found = nearest(queries, base, k, metric="cosine")
        reference = X if forward else Y
        return like(best, reference), like(found, reference)

    def match(self, X: Any, Y: Any, *, random_state: int | None = 0) -> Any:
        """For each row of X its row of Y in the one-to-one matching of largest total score, -1 where Y has too few.

        Raises ValueError for fewer than 2 rows on either side.
        """
        scores = self._scores(X, Y)
        if min(scores.shape) < 2:
            raise ValueError(
                f"X, Y: matching needs at least 2 rows of each, got {scores.shape[0]} and {scores.shape[1]}"
            )
        found: Int[Tensor, " m"] = assign(scores, random_state=random_state)
        return like(found, X)

    def score(self, X: Any, y: Any, metric: str = "top5") -> float:
        """How well paired queries (m, p), (m, q) find their partners.

        metric: "topN", share of queries with the partner among the N best (chance N / m), in the aligner's direction;
        "matching", share of pairs that the one-to-one matching gets right (chance 1 / m).
        """
        scores = self._scores(X, y)
        return pair_score(scores if self.direction == "x->y" else scores.mT, metric)

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the alignment to a safetensors file, whole or not at all, without the statistics behind it.

        Raises ValueError for local CKA with kernel="rbf", which is its anchors.
        """
        shared = self._fitted()
        if self.method == "local_cka" and self.kernel == "rbf":
            raise ValueError("kernel: 'rbf' needs all anchors, which files do not keep; use 'linear'")
        arrays = {f"moments_{name}": value for name, value in shared.moments.joint.state().items()}
        for side, found, mean in (("x", shared.map_x, shared.mean_x), ("y", shared.map_y, shared.mean_y)):
            arrays |= {f"matrix_{side}": found.matrix, f"mean_{side}": mean}
        for name in ("correlations", "held_out"):
            if getattr(shared, name) is not None:
                arrays[name] = getattr(shared, name)
        plain = {name: v.item() if isinstance(v, np.generic) else v for name, v in self.get_params().items()}
        save_arrays(path, "subspace-aligner", arrays, parameters=plain)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SubspaceAligner:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        with saved_object(path, "subspace-aligner", _SAVED, {"parameters": _PARAMETERS}) as (arrays, facts):
            new = cls(**facts["parameters"])
            new._check_parameters()
            mean_x, mean_y = arrays["mean_x"], arrays["mean_y"]
            map_x, map_y = centred(arrays["matrix_x"], mean_x), centred(arrays["matrix_y"], mean_y)
            moments = JointMoments(len(map_x.matrix), len(map_y.matrix))
            joint = type(moments.joint).from_state(
                {name: arrays[f"moments_{name}"] for name in ("count", "mean", "scatter")}
            )
            if joint.d != moments.joint.d:
                raise ValueError(f"moments of {joint.d} dimensions, expected {moments.joint.d}")
            moments.joint = joint
            found = arrays.get("correlations"), arrays.get("held_out")
            new._shared = SharedSpace(map_x, map_y, mean_x, mean_y, moments, *found)
            new._anchors = []
            new.n_features_in_ = map_x.matrix.shape[1]
            new._align()
            return new


def pair_score(scores: Float[Tensor, "m n"], metric: str) -> float:
    """How well scores (m, n = m), rows as queries, find the partners on the diagonal: "topN" or "matching".

    A partner's rank counts every other candidate with an equal score before it.
    """
    if scores.shape[0] != scores.shape[1]:
        raise ValueError(f"y: expected as many queries as X, paired with them, got scores {tuple(scores.shape)}")
    if metric == "matching":
        if len(scores) < 2:
            raise ValueError(f"X, y: matching needs at least 2 pairs, got {len(scores)}")
        return float((assign(scores) == torch.arange(len(scores), device=scores.device)).double().mean())
    if not metric.startswith("top") or not metric[3:].isdecimal() or int(metric[3:]) < 1:
        raise ValueError(f"metric: expected 'matching', 'top1', 'top5', 'top10', …, got {metric!r}")
    rank = (scores >= scores.diagonal().unsqueeze(1)).sum(1)
    return float((rank <= int(metric[3:])).double().mean())
