"""Training an embedding that stays compatible with an older one, through Lightning (extra: train)."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import require, save_arrays, saved_object
from subspan.base.modules import evaluation
from subspan.base.saved import set_state
from subspan.nn.training import finite_loss

if TYPE_CHECKING:
    from lightning import LightningModule
else:
    LightningModule = require("lightning", extra="train").LightningModule

_SPACES = ("full", "compatible")


class BackwardCompatibleModule(LightningModule):
    """Backbone and compatible head, trained against cached teachers; afterwards `encode` gives either space.

    backbone: inputs → pooled features. head: pooled features → an output with `full` and `compatible`, such as
    `BT2Head`. loss(output, labels, old, new) → total and a dict of terms, such as `BT2Loss`. Batches are those of
    `TeacherDataset`. Adam (weight_decay is an L2 term, as published), linear warm-up over the share
    `warmup` of the steps, then cosine to zero.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        loss: nn.Module,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 2**-15,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"learning_rate: must be positive, got {learning_rate}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup: must lie in [0, 1), got {warmup}")
        self.backbone, self.head, self.loss = backbone, head, loss
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup

    def training_step(self, batch: Any, batch_index: int = 0) -> Tensor:
        """Loss of one batch (inputs, class numbers, old features, new features); the terms are logged."""
        inputs, labels, old, new = batch
        total, terms = self.loss(self.head(self.backbone(inputs)), labels, old, new)
        self.log_dict({name: term.detach() for name, term in terms.items()}, batch_size=len(labels))
        return finite_loss(total, self.global_step)

    @torch.no_grad()
    def encode(self, inputs: Any, space: str = "full") -> Float[Tensor, "n d"]:
        """Vectors of inputs: "full" for new galleries (inner product), "compatible", of unit length, for old ones."""
        if space not in _SPACES:
            raise ValueError(f"space: expected one of {_SPACES}, got {space!r}")
        with evaluation(self):
            out = self.head(self.backbone(inputs))
        return out.full if space == "full" else F.normalize(out.compatible, dim=-1)

    def configure_optimizers(self) -> Any:
        """Adam; the learning rate changes each step."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        start = round(self.warmup * steps)

        def rate(step: int) -> float:
            if step < start:
                return (step + 1) / (start + 1)
            return (1 + math.cos(math.pi * (step - start) / max(1, steps - start))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Write backbone and head to a safetensors file, whole or not at all."""
        save_arrays(path, "backward-compatible", self._encoder().state_dict())

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Read what `save_weights` wrote. Raises ValueError when it is another file or does not fit."""
        with saved_object(path, "backward-compatible", {"*": Shaped[Tensor, "..."]}) as (arrays, _):
            set_state(self._encoder(), arrays)

    def _encoder(self) -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})
