"""Training of manifold linearizing and clustering (Ding et al., 2023; extra: train)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from subspan.base import require
from subspan.nn.subspace_cluster_heads import ManifoldLinearizingLoss, SubspaceClusterHeads, TotalCodingRate

if TYPE_CHECKING:
    from lightning import LightningModule
else:
    LightningModule = require("lightning", extra="train").LightningModule


class ManifoldLinearizingModule(LightningModule):
    """Stage one, `warmup` steps that spread the representation; then memberships start from it and both are trained.

    encoder: items → features (b, heads' in_dim); None where batches are features already. augment: items → items, drawn
    twice a step, whose representations and memberships are averaged; None trains on the items as they are. Stage one
    maximises the total coding rate, with two views also their cosine (weight `alignment`). Two optimisers as published:
    SGD with momentum 0.9 and weight decay 1e-4, and 5e-3 on the cluster head; "adamw" in place of them. Batches are
    items, or tuples that begin with them; labels are not looked at. A batch of one row is skipped by batch norm's need.
    """

    def __init__(
        self,
        heads: SubspaceClusterHeads,
        *,
        encoder: nn.Module | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        loss: ManifoldLinearizingLoss | None = None,
        warmup: int = 50,
        alignment: float = 1.0,
        optimizer: str = "adamw",
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        if optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer: 'adamw' or 'sgd', got {optimizer!r}")
        if warmup < 0:
            raise ValueError(f"warmup: must be >= 0, got {warmup}")
        self.heads = heads
        self.encoder = encoder
        self.augment = augment
        self.loss = ManifoldLinearizingLoss() if loss is None else loss
        self.total = TotalCodingRate(self.loss.eps2)
        self.warmup = warmup
        self.alignment = alignment
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    steps: Tensor

    def forward(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """z and c of items."""
        return self.heads(items if self.encoder is None else self.encoder(items))

    def training_step(self, batch: Any, batch_index: int = 0) -> Tensor:
        """Minus the coding rate in stage one, minus its reduction after it."""
        items = batch[0] if isinstance(batch, tuple | list) else batch
        views = [items] if self.augment is None else [self.augment(items), self.augment(items)]
        found = [self(view) for view in views]
        z, c = (torch.stack(part) for part in zip(*found))
        step = int(self.steps)
        self.steps += 1
        if step < self.warmup:
            loss = self.total(torch.nn.functional.normalize(z.mean(0), dim=-1))
            if len(views) > 1:
                loss = loss - self.alignment * (z[0] * z[1]).sum(-1).mean()
            self.log("coding_rate", -loss, prog_bar=True)
            return loss
        if step == self.warmup:
            self.heads.copy_feature_to_cluster()
            with torch.no_grad():
                c = torch.stack([self(view)[1] for view in views])
        loss, parts = self.loss(z, c)
        self.log_dict(parts, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """One optimizer; the cluster head has a weight decay of its own."""
        own = {id(parameter) for parameter in self.heads.cluster.parameters()}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in own]
        groups = [
            {"params": rest, "weight_decay": 1e-4},
            {"params": list(self.heads.cluster.parameters()), "weight_decay": 5e-3},
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, self.learning_rate, momentum=0.9)
        return torch.optim.AdamW(groups, self.learning_rate)
