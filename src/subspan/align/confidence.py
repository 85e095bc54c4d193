"""How far a mapped query can be trusted: evidence about it, calibrated to the recall of held-out queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from ..geometry.subspace import Subspace
from ..statistics import Moments

if TYPE_CHECKING:
    from .held_out import CrossValidation, HeldOut

_EXPLAINED = 0.95
_TINY = 1e-12


@dataclass(frozen=True)
class Evidence:
    """Principal subspaces of the anchors in both spaces; rows → what they say about how ordinary a query is."""

    source: Subspace
    target: Subspace

    def __call__(self, x: Float[Tensor, "n d_x"], mapped: Float[Tensor, "n d_y"]) -> Float[Tensor, "n 4"]:
        """log share of x outside its subspace, log Mahalanobis distance inside, log share of mapped x outside the
        target's subspace, log length of mapped x from the target's mean."""
        z, outside = self.source.energies(x.double())
        assert self.source.variances is not None
        share = outside / (outside + z.square().sum(-1)).clamp_min(_TINY)
        inside = (z.square() / self.source.variances).sum(-1) / self.source.dim
        w, beyond = self.target.energies(mapped.double())
        length = beyond + w.square().sum(-1)
        features = [share, inside, beyond / length.clamp_min(_TINY), length]
        return torch.stack([feature.clamp_min(_TINY).log() for feature in features], dim=-1)

    @classmethod
    def of(cls, x: Moments, y: Moments, x_axes: Tensor | None = None, y_axes: Tensor | None = None) -> Evidence:
        """From the moments of the anchors; in wide spaces the subspaces are looked for within given axes."""
        return cls(_principal(x, x_axes), _principal(y, y_axes))


def _principal(moments: Moments, axes: Float[Tensor, "d p"] | None) -> Subspace:
    """Directions with 95 % of the variance, at most half of what the rows span, so that something lies outside."""
    covariance = moments.covariance()
    total = float(covariance.diagonal().sum())
    values, vectors = torch.linalg.eigh(covariance if axes is None else axes.mT @ covariance @ axes)
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
    center: Float[np.ndarray, " 4"]
    scale: Float[np.ndarray, " 4"]
    coefficients: Float[np.ndarray, " 4"]
    scores: Float[np.ndarray, " s"]
    values: Float[np.ndarray, " s"]
    limits: Float[np.ndarray, " 2"]

    @classmethod
    def calibrated(cls, validation: CrossValidation, held_out: HeldOut) -> RetrievalConfidence:
        """From the held-out queries; each one's evidence comes from the folds that it was held out of."""
        features = np.zeros((len(held_out.recall), 4))
        for fold in range(len(validation.pairs.folds)):
            place = (validation.query_fold == fold).nonzero()[:, 0]
            moments = validation.pairs.without(fold)
            evidence = Evidence.of(moments.x, moments.y, validation.x_axes, validation.y_axes)
            features[place] = evidence(validation.x[validation.queries[place]], held_out.mapped[place]).numpy()
        recall = held_out.recall.numpy()
        center, scale = features.mean(0), np.maximum(features.std(0), 1e-6)
        standard = (features - center) / scale
        gram = standard.T @ standard + 1e-2 * len(recall) * np.eye(4)
        coefficients = np.linalg.solve(gram, standard.T @ (recall - recall.mean()))
        isotonic = IsotonicRegression(y_min=0.0, y_max=1.0).fit(standard @ coefficients, recall)
        total = validation.pairs.without()
        return cls(
            Evidence.of(total.x, total.y, validation.x_axes, validation.y_axes),
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
        return cls(Evidence(source, target), **{name: arrays[name].numpy() for name in names})
