"""How far a mapped query can be trusted: evidence about it, calibrated to the recall of held-out queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from subspan.base.saved import Schema, optional
from subspan.geometry import Subspace
from subspan.measures import recall_at_k
from subspan.solvers import nearest
from subspan.statistics import Moments

if TYPE_CHECKING:
    from .held_out import CrossValidation, HeldOut

_EXPLAINED = 0.95
_TINY = 1e-12
_ANCHORS = 2000
_NEAR, _AROUND = 10, 50
_FEATURES = 9


SAVED_ARRAYS: Schema = {
    "source_basis": optional(Float[Tensor, "d_in k_source"]),
    "source_center": optional(Float[Tensor, " d_in"]),
    "source_variances": optional(Float[Tensor, " k_source"]),
    "target_basis": optional(Float[Tensor, "d_out k_target"]),
    "target_center": optional(Float[Tensor, " d_out"]),
    "target_variances": optional(Float[Tensor, " k_target"]),
    "anchors_x": optional(Float[Tensor, "anchors d_in"]),
    "anchors_y": optional(Float[Tensor, "anchors d_out"]),
    **{name: optional(Float[Tensor, str(_FEATURES)]) for name in ("center", "scale", "coefficients")},
    **dict.fromkeys(("scores", "values"), optional(Float[Tensor, " steps"])),
    "limits": optional(Float[Tensor, "2"]),
}
"""What a file holds of a confidence: all of it or nothing."""


@dataclass(frozen=True)
class Evidence:
    """Principal subspaces of the anchors in both spaces, and a sample of the anchors; rows → evidence about a query."""

    source: Subspace
    target: Subspace
    anchors_x: Float[Tensor, "a d_x"]
    anchors_y: Float[Tensor, "a d_y"]

    def __call__(self, x: Float[Tensor, "n d_x"], mapped: Float[Tensor, "n d_y"]) -> Float[Tensor, "n 9"]:
        """How ordinary a query is, and what its neighbourhoods are like.

        log share of x outside its subspace, log Mahalanobis distance inside, log share of mapped x outside the target's
        subspace, log length of mapped x from the target's mean; in both spaces the mean cosine to the ten nearest
        anchors, and how far it lies above that to the fifty nearest; the share of these fifty that both spaces name.
        """
        x, mapped = x.double(), mapped.double()
        z, outside = self.source.energies(x)
        assert self.source.variances is not None
        share = outside / (outside + z.square().sum(-1)).clamp_min(_TINY)
        inside = (z.square() / self.source.variances).sum(-1) / self.source.dim
        w, beyond = self.target.energies(mapped)
        length = beyond + w.square().sum(-1)
        features = [share, inside, beyond / length.clamp_min(_TINY), length]
        ordinary = torch.stack([feature.clamp_min(_TINY).log() for feature in features], dim=-1)
        sides = ((x, self.source, self.anchors_x), (mapped, self.target, self.anchors_y))
        around = []
        for rows, space, anchors in sides:
            assert space.center is not None
            around.append(self._around(rows - space.center, anchors - space.center))
        both = recall_at_k(*(near[1] for near in around))
        return torch.cat([ordinary, *(near[0] for near in around), both.unsqueeze(-1)], dim=-1)

    @staticmethod
    def _around(
        rows: Float[Tensor, "n d"], anchors: Float[Tensor, "a d"]
    ) -> tuple[Float[Tensor, "n 2"], Int[Tensor, "n around"]]:
        """Mean cosine to the nearest anchors, its height above that to more of them, and which those are."""
        cosines, places = nearest(rows, anchors, min(_AROUND, len(anchors)), metric="cosine")
        near = cosines[:, : min(_NEAR, max(1, len(anchors) // 5))].mean(1)
        return torch.stack([near, near - cosines.mean(1)], dim=-1), places

    @classmethod
    def of(cls, validation: CrossValidation, count: int, *left_out: int) -> Evidence:
        """From the anchors of all folds but some, of which `count` are kept.

        In wide spaces the subspaces are looked for within the axes of the cross-validation.
        """
        moments = validation.pairs.without(*left_out)
        source, target = _principal(moments.x, validation.x_axes), _principal(moments.y, validation.y_axes)
        there = (~torch.isin(validation.fold, torch.tensor(left_out, dtype=torch.int64))).nonzero()[:, 0]
        # The sample is in the order of the rows, which may mean something.
        kept = there[torch.linspace(0, len(there) - 1, count).round().long()]
        return cls(source, target, validation.x[kept], validation.y[kept])


def _principal(moments: Moments, axes: Float[Tensor, "d p"] | None) -> Subspace:
    """Directions with 95 % of the variance, at most half of what the rows span, so that something lies outside."""
    total, factor = moments.total_variance, moments.factor
    if axes is None or factor is None:
        covariance = moments.covariance()
        covariance = covariance if axes is None else axes.mT @ covariance @ axes
    else:
        inside = factor @ axes
        covariance = inside.mT @ inside / (moments.count - 1)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    explained = int((values.cumsum(0) < _EXPLAINED * total).sum()) + 1
    k = max(1, min(explained, len(values), (min(moments.d, int(moments.count) - 1) + 1) // 2))
    k = min(k, max(1, int((values > _TINY * values[0]).sum())))
    basis = vectors[:, :k] if axes is None else axes @ vectors[:, :k]
    return Subspace(torch.linalg.qr(basis).Q, center=moments.mean, variances=values[:k])


@dataclass(frozen=True)
class RetrievalConfidence:
    """Evidence → expected recall: a least-squares score of the evidence, made monotone, cut where nothing is known.

    Beyond the 99th percentile of the held-out rows' share outside the subspace and distance inside, the value falls
    with the square of the excess.
    """

    evidence: Evidence
    center: Float[np.ndarray, " 9"]
    scale: Float[np.ndarray, " 9"]
    coefficients: Float[np.ndarray, " 9"]
    scores: Float[np.ndarray, " s"]
    values: Float[np.ndarray, " s"]
    limits: Float[np.ndarray, " 2"]

    @classmethod
    def calibrated(cls, validation: CrossValidation, held_out: HeldOut) -> RetrievalConfidence:
        """From the held-out queries; each one's evidence comes from the folds that it was held out of."""
        folds = len(validation.pairs.folds)
        # Neighbours are the farther away the fewer anchors there are, so as many are kept here as later.
        count = min(_ANCHORS, *(int((validation.fold != fold).sum()) for fold in range(folds)))
        features = np.zeros((len(held_out.recall), _FEATURES))
        for fold in range(folds):
            place = (validation.query_fold == fold).nonzero()[:, 0]
            evidence = Evidence.of(validation, count, fold)
            features[place] = evidence(validation.x[validation.queries[place]], held_out.mapped[place]).numpy()
        recall = held_out.recall.numpy()
        center, scale = features.mean(0), np.maximum(features.std(0), 1e-6)
        standard = (features - center) / scale
        gram = standard.T @ standard + 1e-2 * len(recall) * np.eye(_FEATURES)
        coefficients = np.linalg.solve(gram, standard.T @ (recall - recall.mean()))
        isotonic = IsotonicRegression(y_min=0.0, y_max=1.0).fit(standard @ coefficients, recall)
        return cls(
            Evidence.of(validation, count),
            center,
            scale,
            coefficients,
            np.asarray(isotonic.X_thresholds_, dtype=np.float64),
            np.asarray(isotonic.y_thresholds_, dtype=np.float64),
            np.quantile(features[:, :2], 0.99, axis=0),
        )

    def __call__(self, x: Float[Tensor, "n d_x"], mapped: Float[Tensor, "n d_y"]) -> Float[Tensor, " n"]:
        """Confidence of rows and what they were mapped to."""
        features = self.evidence(x.cpu(), mapped.cpu()).numpy()
        value = np.interp(((features - self.center) / self.scale) @ self.coefficients, self.scores, self.values)
        excess = np.minimum(0.0, self.limits - features[:, :2]).sum(1)
        return torch.from_numpy(np.clip(value * np.exp(excess), 0.0, 1.0)).to(x.device)

    def arrays(self) -> dict[str, Tensor]:
        """Everything as tensors, for a file."""
        found = {}
        for name in ("source", "target"):
            subspace: Subspace = getattr(self.evidence, name)
            assert subspace.center is not None
            assert subspace.variances is not None
            found |= {f"{name}_basis": subspace.basis, f"{name}_center": subspace.center}
            found[f"{name}_variances"] = subspace.variances
        found |= {"anchors_x": self.evidence.anchors_x, "anchors_y": self.evidence.anchors_y}
        names = ("center", "scale", "coefficients", "scores", "values", "limits")
        return found | {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in names}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor]) -> RetrievalConfidence:
        """From the tensors of a file."""
        source, target = (
            Subspace(arrays[f"{n}_basis"], center=arrays[f"{n}_center"], variances=arrays[f"{n}_variances"])
            for n in ("source", "target")
        )
        names = ("center", "scale", "coefficients", "scores", "values", "limits")
        evidence = Evidence(source, target, arrays["anchors_x"], arrays["anchors_y"])
        return cls(evidence, **{name: arrays[name].numpy() for name in names})
