"""A-posteriori alignment of two unimodal encoders inside the subspaces that they share (Hadgi et al., 2025)."""

from __future__ import annotations

import math
import os
import warnings
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
_FOLDS = 5
_SVCCA_ENERGY = 0.99
# Standard errors that a held-out correlation must exceed to count as shared.
_STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class _SharedSpace:
    """Coordinates of the two spaces, and the moments of the anchors in them."""

    map_x: AffineMap
    map_y: AffineMap
    mean_x: Float[Tensor, " p"]
    mean_y: Float[Tensor, " q"]
    moments: JointMoments
    correlations: Float[Tensor, " k"] | None = None
    # Of all pairs that were tried where cross-validation chose k.
    held_out: Float[Tensor, " m"] | None = None


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
                number = _FOLDS if self.n_components == "cv" else 2
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
        place = (torch.arange(len(x), device=x.device) + int(sum(fold.count for fold in self._folds))) % _FOLDS
        for number, fold in enumerate(self._folds):
            # Two folds: the fifth pairs and all others.
            last = number == len(self._folds) - 1
            chosen = place == number if len(self._folds) == _FOLDS else (place == _FOLDS - 1) == last
            fold.update(x[chosen].double(), y[chosen].double())

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.n_components == "cv" and self.subspace not in ("cca", "svcca"):
            raise ValueError(f"n_components: 'cv' counts canonical pairs; subspace={self.subspace!r} has none")

    # ------------------------------------------------------------------ the algorithm

    def _solve(self) -> _SharedSpace:
        if not hasattr(self, "_folds"):
            raise NotFittedError(f"This {type(self).__name__} instance is not fitted yet; call fit first")
        moments = self.moments_
        self._check_anchors(moments)
        if self.subspace is None:
            k, held_out = 0, None
        elif self.n_components == "cv":
            k, held_out = self._cross_validated(moments)
        else:
            k = int(self.n_components)
            available = self._available(moments)
            if k > available:
                raise ValueError(
                    f"n_components: the anchors give at most {available} (columns, and rank of both sides), got {k}"
                )
            held_out = self._held_out(_total(self._folds[:-1]), self._folds[-1], k)
        map_x, map_y, correlations = self._coordinates(moments, k)
        self._shared = _SharedSpace(
            map_x, map_y, moments.mean_x, moments.mean_y, moments.map(map_x, map_y), correlations, held_out
        )
        self._warn_if_overfitted()
        self._align()
        return self._shared

    def _coordinates(self, moments: JointMoments, k: int) -> tuple[AffineMap, AffineMap, Tensor | None]:
        """Maps of both spaces to their k coordinates, centred at the anchors' means."""
        if self.subspace is None:
            whole_x, whole_y = (torch.eye(d, dtype=torch.float64) for d in (moments.d_x, moments.d_y))
            return _centred(whole_x, moments.mean_x), _centred(whole_y, moments.mean_y), None
        if self.subspace == "pca":
            return _principal(moments.x.subspace(k)), _principal(moments.y.subspace(k)), None
        weight = "oas" if self.shrinkage == "auto" else float(self.shrinkage)
        if self.subspace == "cca":
            found = moments.cca(k, shrinkage=weight)
            factor = found.correlations if self.scale == "rho" else torch.ones_like(found.correlations)
            map_x = _centred((found.x_directions * factor).mT, moments.mean_x)
            return map_x, _centred((found.y_directions * factor).mT, moments.mean_y), found.correlations
        inner_x, inner_y = (_principal(part.subspace(_SVCCA_ENERGY)) for part in (moments.x, moments.y))
        found = moments.map(inner_x, inner_y).cca(k, shrinkage=weight)
        factor = found.correlations if self.scale == "rho" else torch.ones_like(found.correlations)
        map_x, map_y = (AffineMap((w * factor).mT) for w in (found.x_directions, found.y_directions))
        return map_x @ inner_x, map_y @ inner_y, found.correlations

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

    def _cross_validated(self, moments: JointMoments) -> tuple[int, Tensor]:
        """The leading canonical pairs whose correlation, averaged over folds held out, stands above its noise."""
        parts = range(len(self._folds))
        rest = [_total([self._folds[j] for j in parts if j != i]) for i in parts]
        if min(part.count for part in (*rest, *self._folds)) < 2:
            raise ValueError(f"X: 'cv' needs at least {2 * _FOLDS} anchors, got {moments.count:g}")
        k = min(self._available(part) for part in (moments, *rest))
        curves = [self._held_out(rest[i], self._folds[i], k) for i in parts]
        curve = torch.stack([c for c in curves if c is not None]).mean(0)
        weak = (curve <= _STANDARD_ERRORS / moments.count**0.5).nonzero()
        return max(1, int(weak[0]) if len(weak) else k), curve

    def _held_out(self, fitted: JointMoments, held: JointMoments, k: int) -> Float[Tensor, " k"] | None:
        """Correlations on `held` of the k canonical pairs found in `fitted`; None where there are too few anchors."""
        if self.subspace not in ("cca", "svcca") or held.count < 3 or fitted.count < 3:
            return None
        k = min(k, self._available(fitted))
        if k < 1:
            return None
        map_x, map_y, _ = self._coordinates(fitted, k)
        there = held.map(map_x, map_y)
        spread = (there.cov_xx.diagonal() * there.cov_yy.diagonal()).clamp_min(0).sqrt()
        return torch.where(spread > 0, there.cov_xy.diagonal() / spread, torch.zeros_like(spread))

    def _available(self, moments: JointMoments) -> int:
        """How many coordinates both sides have: the smaller of their numerical ranks."""
        ranks = []
        for part in (moments.x, moments.y):
            values = torch.linalg.eigvalsh(part.covariance())
            rank = int((values > 1e-12 * values[-1]).sum())
            if self.subspace == "svcca" and rank:
                share = values.flip(0).clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
                rank = min(rank, int((share < _SVCCA_ENERGY).sum()) + 1)
            ranks.append(rank)
        return min(ranks)

    # ------------------------------------------------------------------ checks of the anchors

    def _check_anchors(self, moments: JointMoments) -> None:
        if moments.count < 3:
            raise ValueError(f"X, Y: need at least 3 pairs, got {moments.count:g}")
        for name, part in (("X", moments.x), ("Y", moments.y)):
            # What is left of the spread of equal rows after centring is rounding.
            if part.total_variance <= 1e-24 * float(part.mean.square().sum()):
                raise ValueError(f"{name}: the rows are constant; there is nothing to align")
        columns = moments.d_x + moments.d_y
        if self.subspace in ("cca", "svcca") and self.shrinkage == 0 and moments.count < 5 * columns:
            warnings.warn(
                f"X, Y: {moments.count:g} anchors are few for {columns} columns without shrinkage (5 to 30 a column "
                "are needed); canonical correlations will be optimistic: set shrinkage to 0.1 or 'auto'",
                stacklevel=4,
            )

    def _warn_if_overfitted(self) -> None:
        seen, held = self._shared.correlations, self._shared.held_out
        if seen is None or held is None:
            return
        length = min(len(seen), len(held))
        lost = (seen[:length] > 0.9) & (held[:length] < 0.5)
        if bool(lost.any()):
            first = int(lost.nonzero()[0, 0])
            warnings.warn(
                f"X, Y: {int(lost.sum())} canonical correlations are near 1 on the anchors but not on anchors left out "
                f"(pair {first + 1}: {float(seen[first]):.2f} against {float(held[first]):.2f}): over-fitted; "
                "regularise (larger shrinkage), use fewer components, or more anchors",
                stacklevel=4,
            )

    # ------------------------------------------------------------------ what was found

    def _fitted(self) -> _SharedSpace:
        return self._shared if hasattr(self, "_shared") else self._solve()

    @property
    def moments_(self) -> JointMoments:
        """Moments of all anchors."""
        if not hasattr(self, "_folds"):
            raise NotFittedError("moments_: no anchors were given (a file does not keep their moments)")
        return _total(self._folds)

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
        shared = self._fitted()
        return Subspace.span(shared.map_x.matrix.mT, center=shared.mean_x)

    @property
    def subspace_y_(self) -> Subspace:
        """Span of the coordinates in the space of y, through the anchors' mean."""
        shared = self._fitted()
        return Subspace.span(shared.map_y.matrix.mT, center=shared.mean_y)

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
            k = int(n_components)
            first = [
                AffineMap(torch.eye(len(m.matrix), dtype=torch.float64)[:k].to(m.matrix))
                for m in (shared.map_x, shared.map_y)
            ]
            shared = _SharedSpace(
                first[0] @ shared.map_x,
                first[1] @ shared.map_y,
                shared.mean_x,
                shared.mean_y,
                shared.moments.map(*first),
                None if shared.correlations is None else shared.correlations[:k],
                None if shared.held_out is None else shared.held_out[:k],
            )
            new.n_components = k
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
            map_x, map_y = _centred(arrays["matrix_x"], mean_x), _centred(arrays["matrix_y"], mean_y)
            moments = JointMoments(len(map_x.matrix), len(map_y.matrix))
            joint = type(moments.joint).from_state(
                {name: arrays[f"moments_{name}"] for name in ("count", "mean", "scatter")}
            )
            if joint.d != moments.joint.d:
                raise ValueError(f"moments of {joint.d} dimensions, expected {moments.joint.d}")
            moments.joint = joint
            found = arrays.get("correlations"), arrays.get("held_out")
            new._shared = _SharedSpace(map_x, map_y, mean_x, mean_y, moments, *found)
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


def _total(parts: list[JointMoments]) -> JointMoments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _centred(matrix: Float[Tensor, "k d"], mean: Float[Tensor, " d"]) -> AffineMap:
    matrix = matrix.to(mean)
    return AffineMap(matrix, -(matrix @ mean))


def _principal(space: Subspace) -> AffineMap:
    assert space.center is not None
    return _centred(space.basis.mT, space.center)
