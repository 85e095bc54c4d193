"""Training of nested adapters as a Lightning module (extra: train)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from subspan.base import require
from subspan.nn import MatryoshkaLinear, MatryoshkaLogitLoss, MatryoshkaLoss, info_nce
from subspan.nn.training import finite_loss

if TYPE_CHECKING:
    from lightning import LightningModule
else:
    LightningModule = require("lightning", extra="train").LightningModule

_OBJECTIVES = ("labels", "pairs", "similarity")


def similarity_loss(z: Float[Tensor, "n m"], cosines: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Mean squared error of the cosines between rows of z, the diagonal left out."""
    error = (F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).mT - cosines).square()
    return (error.sum() - error.diagonal().sum()) / (len(z) * (len(z) - 1))


class NestedTraining(LightningModule):
    """An adapter (any module with rows in and nested coordinates out) and its nested objective.

    objective: "labels", batches (x, class numbers), one head a prefix (`heads`) · "pairs", batches (x, paired x),
    symmetric InfoNCE · "similarity", batches (x,), every prefix keeps the cosines of x. AdamW with a cosine decay by
    step. losses: the mean training loss of each epoch.
    """

    def __init__(
        self,
        adapter: torch.nn.Module,
        objective: str,
        *,
        dims: Sequence[int],
        weights: str | Sequence[float] | None = None,
        num_classes: int = 0,
        efficient: bool = False,
        temperature: float = 0.05,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-4,
        dims_per_step: int | None = None,
    ) -> None:
        super().__init__()
        if objective not in _OBJECTIVES:
            raise ValueError(f"objective: expected one of {_OBJECTIVES}, got {objective!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.adapter: Any = adapter
        self.objective = objective
        self.temperature = temperature
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.heads: Any = None
        options: Any = {"weights": weights, "normalize": True, "dims_per_step": dims_per_step}
        if objective == "labels":
            self.heads = MatryoshkaLinear(dims, num_classes, efficient=efficient)
            self.nested_loss: Any = MatryoshkaLogitLoss(dims, weights=weights)
        elif objective == "pairs":
            self.nested_loss = MatryoshkaLoss(self._contrast, dims, embeddings=(0, 1), **options)
        else:
            self.nested_loss = MatryoshkaLoss(similarity_loss, dims, embeddings=(0,), **options)
        self.losses: list[float] = []
        self._epoch: list[Tensor] = []

    def _contrast(self, x: Tensor, y: Tensor) -> Tensor:
        return info_nce(x, y, temperature=self.temperature, symmetric=True)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
        """Nested coordinates."""
        return self.adapter(x)

    def training_step(self, batch: Sequence[Tensor], batch_index: int = 0) -> Tensor:
        """The nested loss of one batch."""
        z = self.adapter(batch[0])
        if self.objective == "labels":
            loss = self.nested_loss(self.heads(z), batch[1])
        elif self.objective == "pairs":
            loss = self.nested_loss(z, self.adapter(batch[1]))
        else:
            rows = F.normalize(batch[0], dim=-1)
            loss = self.nested_loss(z, rows @ rows.mT)
        self._epoch.append(loss.detach())
        return finite_loss(loss, self.global_step)

    def on_train_epoch_end(self) -> None:
        """Keep the epoch's mean loss."""
        self.losses.append(float(torch.stack(self._epoch).mean()))
        self._epoch.clear()

    def configure_optimizers(self) -> Any:
        """AdamW; the learning rate falls to zero along a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
