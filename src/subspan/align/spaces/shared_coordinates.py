"""Coordinates in which two spaces share most, from the moments of paired anchors, and how many of them hold up."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.geometry import AffineMap, Subspace
from subspan.statistics import JointMoments

FOLDS = 5
_SVCCA_ENERGY = 0.99
# Standard errors that a held-out correlation must exceed to count as shared.
_STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class SharedSpace:
    """Coordinates of the two spaces, and the moments of the anchors in them."""

    map_x: AffineMap
    map_y: AffineMap
    mean_x: Float[Tensor, " p"]
    mean_y: Float[Tensor, " q"]
    moments: JointMoments
    correlations: Float[Tensor, " k"] | None = None
    # Of all pairs that were tried where cross-validation chose k.
    held_out: Float[Tensor, " m"] | None = None

    def subspaces(self) -> tuple[Subspace, Subspace]:
        """Spans of the coordinates in both spaces, through the anchors' means."""
        sides = ((self.map_x, self.mean_x), (self.map_y, self.mean_y))
        x, y = (Subspace.span(found.matrix.mT, center=mean) for found, mean in sides)
        return x, y

    def truncate(self, k: int) -> SharedSpace:
        """The first k coordinates."""
        first_x, first_y = (
            AffineMap(torch.eye(len(found.matrix), dtype=torch.float64)[:k].to(found.matrix))
            for found in (self.map_x, self.map_y)
        )
        return SharedSpace(
            first_x @ self.map_x,
            first_y @ self.map_y,
            self.mean_x,
            self.mean_y,
            self.moments.map(first_x, first_y),
            None if self.correlations is None else self.correlations[:k],
            None if self.held_out is None else self.held_out[:k],
        )

    def warn_if_overfitted(self) -> None:
        """Warn where canonical correlations near 1 do not hold on anchors left out."""
        seen, held = self.correlations, self.held_out
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


@dataclass(frozen=True)
class SharedCoordinates:
    """How the coordinates are found: `subspace` and `scale` as `SubspaceAligner` has them; shrinkage: that of `cca`."""

    subspace: str | None
    shrinkage: float | str
    scale: str

    def find(self, folds: Sequence[JointMoments], k: int | None) -> SharedSpace:
        """The shared space of all folds, of k coordinates, or of as many as hold up on anchors left out (None)."""
        moments = total(folds)
        if self.subspace is None:
            k, held_out = 0, None
        elif k is None:
            k, held_out = self._cross_validated(moments, folds)
        else:
            available = self._available(moments)
            if k > available:
                raise ValueError(
                    f"n_components: the anchors give at most {available} (columns, and rank of both sides), got {k}"
                )
            held_out = self._held_out(total(folds[:-1]), folds[-1], k)
        map_x, map_y, correlations = self._maps(moments, k)
        return SharedSpace(
            map_x, map_y, moments.mean_x, moments.mean_y, moments.map(map_x, map_y), correlations, held_out
        )

    def _maps(self, moments: JointMoments, k: int) -> tuple[AffineMap, AffineMap, Tensor | None]:
        """Maps of both spaces to their k coordinates, centred at the anchors' means."""
        if self.subspace is None:
            whole_x, whole_y = (torch.eye(d, dtype=torch.float64) for d in (moments.d_x, moments.d_y))
            return centred(whole_x, moments.mean_x), centred(whole_y, moments.mean_y), None
        if self.subspace == "pca":
            return _principal(moments.x.subspace(k)), _principal(moments.y.subspace(k)), None
        if self.subspace == "cca":
            found = moments.cca(k, shrinkage=self.shrinkage)
            factor = found.correlations if self.scale == "rho" else torch.ones_like(found.correlations)
            map_x = centred((found.x_directions * factor).mT, moments.mean_x)
            return map_x, centred((found.y_directions * factor).mT, moments.mean_y), found.correlations
        inner_x, inner_y = (_principal(part.subspace(_SVCCA_ENERGY)) for part in (moments.x, moments.y))
        found = moments.map(inner_x, inner_y).cca(k, shrinkage=self.shrinkage)
        factor = found.correlations if self.scale == "rho" else torch.ones_like(found.correlations)
        map_x, map_y = (AffineMap((w * factor).mT) for w in (found.x_directions, found.y_directions))
        return map_x @ inner_x, map_y @ inner_y, found.correlations

    def _cross_validated(self, moments: JointMoments, folds: Sequence[JointMoments]) -> tuple[int, Tensor]:
        """The leading canonical pairs whose correlation, averaged over folds held out, stands above its noise."""
        parts = range(len(folds))
        rest = [total([folds[j] for j in parts if j != i]) for i in parts]
        if min(part.count for part in (*rest, *folds)) < 2:
            raise ValueError(f"X: 'cv' needs at least {2 * FOLDS} anchors, got {moments.count:g}")
        k = min(self._available(part) for part in (moments, *rest))
        curves = [self._held_out(rest[i], folds[i], k) for i in parts]
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
        map_x, map_y, _ = self._maps(fitted, k)
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

    def check(self, moments: JointMoments) -> None:
        """Raise ValueError for anchors that nothing can be found in; warn where they are few."""
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


def total(parts: Sequence[JointMoments]) -> JointMoments:
    """Moments of all parts together."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def centred(matrix: Float[Tensor, "k d"], mean: Float[Tensor, " d"]) -> AffineMap:
    """The linear map of rows about their mean."""
    matrix = matrix.to(mean)
    return AffineMap(matrix, -(matrix @ mean))


def _principal(space: Subspace) -> AffineMap:
    assert space.center is not None
    return centred(space.basis.mT, space.center)
