"""Joint spaces of image features and sentence embeddings, made of a classifier's rows without any training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from subspan.base import normalize_rows
from subspan.datasets import load_model
from subspan.edit import zero_shot_prototypes
from subspan.models import SentenceEncoder
from subspan.statistics import JointMoments

from .disturbed_views import Views


@dataclass(frozen=True)
class JointSpace:
    """Heads that take image features and sentence embeddings to one space, and the factor of cosines there."""

    name: str
    image_head: Callable[[Tensor], Tensor]
    text_head: Callable[[Tensor], Tensor]
    logit_scale: float

    def views(self, drawn: Views) -> Float[Tensor, "b n d"]:
        """Unit embeddings of views."""
        flat = self.image_head(drawn.features.float().flatten(0, 1))
        return normalize_rows(flat).unflatten(0, drawn.features.shape[:2])

    def prototypes(self, encoder: SentenceEncoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit prototypes of class names."""
        return zero_shot_prototypes(
            lambda texts: self.text_head(torch.from_numpy(encoder.encode(texts))), names, templates
        )


def classifier_rows() -> Float[Tensor, "c d"]:
    """The rows of EfficientNet-Lite0's ImageNet classifier without their mean, which no softmax sees."""
    rows: Tensor = load_model("efficientnet-lite0").get_parameter("_fc.weight").detach()
    return rows - rows.mean(0)


def linear_space(
    embeddings: Float[Tensor, "c e"], rows: Float[Tensor, "c d"], feature_mean: Float[Tensor, " d"], logit_scale: float
) -> JointSpace:
    """Sentence embeddings of class names sent to their classifier rows by ridge; features need only be centred."""
    fold = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)) % 5

    def ridge(kept: Tensor, alpha: float) -> Any:
        return JointMoments(embeddings.shape[1], rows.shape[1]).update(embeddings[kept], rows[kept]).ridge(alpha)

    def held_out_cosine(alpha: float) -> float:
        outside = [(fold == number, ridge(fold != number, alpha)) for number in range(5)]
        cosines = [F.cosine_similarity(fit.map(embeddings[out]), rows[out]).mean() for out, fit in outside]
        return float(torch.stack(cosines).mean())

    alpha = max((0.3, 1.0, 3.0, 10.0), key=held_out_cosine)
    mapped = ridge(fold >= 0, alpha).to(torch.float32)
    name = f"ridge map from MiniLM to EfficientNet-Lite0 classifier rows (alpha {alpha:g})"
    return JointSpace(name, lambda features: features - feature_mean, mapped.map, logit_scale)


def fitted_logit_scale(views: Float[Tensor, "b d"], prototypes: Float[Tensor, "c d"], labels: Tensor) -> float:
    """The factor of cosines with the lowest cross-entropy on labelled rows (temperature scaling)."""
    cosines = views @ prototypes.mT
    grid = torch.logspace(math.log10(5), math.log10(200), 60).tolist()
    return min(grid, key=lambda scale: float(F.cross_entropy(scale * cosines, labels)))
