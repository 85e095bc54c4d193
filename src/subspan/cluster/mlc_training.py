"""Training of manifold linearizing and clustering (Ding et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.nn.subspace_cluster_heads import ManifoldLinearizingLoss, SubspaceClusterHeads, TotalCodingRate

if TYPE_CHECKING:
    from subspan.nn import Objective


class ManifoldLinearizingModule(nn.Module):
    """Stage one, `warmup` steps that spread the representation; then memberships start from it and both are trained.

    Stage one maximises the total coding rate, with two views also their cosine. Batches are items, or tuples that begin
    with them; labels are not looked at. `Trainer.fit(module.objective(), batches)` trains (extra: train).

    Parameters
    ----------
    heads
        The two heads on their trunk.
    encoder
        Items → features (b, heads' in_dim); None where batches are features already.
    augment
        Items → items, drawn twice a step, whose representations and memberships are averaged; None trains on the items
        as they are.
    loss
        Of stage two; None is `ManifoldLinearizingLoss()`.
    warmup
        Steps of stage one.
    alignment
        Weight of the cosine of the two views in stage one.

    Examples
    --------
    >>> import torch
    >>> from subspan.cluster import ManifoldLinearizingModule
    >>> from subspan.nn.subspace_cluster_heads import SubspaceClusterHeads
    >>> module = ManifoldLinearizingModule(SubspaceClusterHeads(8, 32, 4), warmup=1)
    >>> loss, parts = module.training_loss(torch.randn(16, 8), step=0)
    >>> bool(loss == -parts["coding_rate"])
    True
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
    ) -> None:
        super().__init__()
        if warmup < 0:
            raise ValueError(f"warmup: must be >= 0, got {warmup}")
        self.heads = heads
        self.encoder = encoder
        self.augment = augment
        self.loss = ManifoldLinearizingLoss() if loss is None else loss
        self.total = TotalCodingRate(self.loss.eps2)
        self.warmup = warmup
        self.alignment = alignment

    def forward(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """z and c of items."""
        return self.heads(items if self.encoder is None else self.encoder(items))

    def training_loss(self, batch: Any, step: int) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Minus the coding rate in stage one, minus its reduction after it; what they are made of."""
        items = batch[0] if isinstance(batch, tuple | list) else batch
        views = [items] if self.augment is None else [self.augment(items), self.augment(items)]
        found = [self(view) for view in views]
        z, c = (torch.stack(part) for part in zip(*found))
        if step < self.warmup:
            loss = self.total(torch.nn.functional.normalize(z.mean(0), dim=-1))
            if len(views) > 1:
                loss = loss - self.alignment * (z[0] * z[1]).sum(-1).mean()
            return loss, {"coding_rate": -loss}
        if step == self.warmup:
            self.heads.copy_feature_to_cluster()
            with torch.no_grad():
                c = torch.stack([self(view)[1] for view in views])
        return self.loss(z, c)

    def objective(self, *, optimizer: str = "adamw", learning_rate: float = 1e-3) -> Objective:
        """For a Trainer (extra: train): weight decay 1e-4, and 5e-3 on the cluster head.

        optimizer: "adamw", or "sgd" with momentum 0.9 as published. Raises ValueError for another.
        """
        from subspan.nn import Objective

        if optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer: 'adamw' or 'sgd', got {optimizer!r}")
        options: dict[str, Any] = {"momentum": 0.9} if optimizer == "sgd" else {}
        return Objective(
            self,
            ManifoldLinearizingModule.training_loss,
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=1e-4,
            groups={"heads.cluster": {"weight_decay": 5e-3}},
            **options,
        )
