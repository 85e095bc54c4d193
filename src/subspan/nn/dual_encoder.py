"""A shared space for two modalities: two small heads on frozen encoders, trained to agree on pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import normalize_rows

from .contrastive import ContrastiveLoss

if TYPE_CHECKING:
    from .objective import Objective


def projection_head(d_in: int, hidden: int, d_out: int, *, dropout: float = 0.0) -> nn.Sequential:
    """Linear, GELU, dropout, linear: features (n, d_in) to the shared space (n, d_out)."""
    return nn.Sequential(nn.Linear(d_in, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, d_out))


class DualEncoder(nn.Module):
    """Features of two modalities → unit vectors of one space, by symmetric InfoNCE (CLIP; Radford et al., 2021).

    image_features, text_features: dimensions of the frozen encoders' features. A training batch is a mapping with
    "image" (n, image_features), "text" (n, text_features) and "group" (n,): rows of one group (the same picture, the
    same label) are positives of one another.
    """

    image_scale: Tensor
    text_scale: Tensor

    def __init__(
        self,
        image_features: int,
        text_features: int,
        *,
        d: int = 256,
        hidden: int = 512,
        dropout: float = 0.0,
        temperature: float = 0.07,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__()
        self.image_head = projection_head(image_features, hidden, d, dropout=dropout)
        self.text_head = projection_head(text_features, hidden, d, dropout=dropout)
        self.loss = ContrastiveLoss(temperature, learnt=learn_temperature)
        for name in ("image_scale", "text_scale"):
            self.register_buffer(name, torch.ones(()))

    def set_scales(self, image: Float[Tensor, "n p"], text: Float[Tensor, "m q"]) -> None:
        """Divide each modality's features by one number from now on, so that these rows have unit variance on average.

        The means stay: the cone that each frozen encoder's features lie in is what a modality gap starts from.
        """
        self.image_scale.copy_(image.var(0).mean().sqrt())
        self.text_scale.copy_(text.var(0).mean().sqrt())

    def encode_image_features(self, features: Float[Tensor, "n p"]) -> Float[Tensor, "n d"]:
        """Unit vectors of image features (n, image_features)."""
        return F.normalize(self.image_head(features / self.image_scale), dim=-1)

    def encode_text_features(self, features: Float[Tensor, "n q"]) -> Float[Tensor, "n d"]:
        """Unit vectors of text features (n, text_features)."""
        return F.normalize(self.text_head(features / self.text_scale), dim=-1)

    def prototypes(self, features: Float[Tensor, "c t q"]) -> Float[Tensor, "c d"]:
        """One unit vector a class: the mean of the unit vectors of its t templates' text features, scaled to one."""
        classes, templates, width = features.shape
        vectors = self.encode_text_features(features.reshape(-1, width))
        return normalize_rows(vectors.reshape(classes, templates, -1).mean(1))

    def training_loss(self, batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Loss of one batch of pairs."""
        group: Int[Tensor, " n"] = batch["group"]
        image, text = self.encode_image_features(batch["image"]), self.encode_text_features(batch["text"])
        return self.loss(image, text, group[:, None] == group)

    def objective(self, *, learning_rate: float = 1e-3, weight_decay: float = 1e-2, warmup: float = 0.05) -> Objective:
        """For a Trainer (extra: train): AdamW, no decay on biases and the temperature, one cycle of the rate."""
        from .objective import Objective

        options = {"learning_rate": learning_rate, "weight_decay": weight_decay, "decay_vectors": False}
        return Objective(self, DualEncoder.training_loss, schedule="one-cycle", warmup=float(warmup), **options)
