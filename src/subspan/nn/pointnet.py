"""A small PointNet, and its training without labels by contrast of two views of each cloud (extra: train)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base import require

from .blocks import MLP
from .contrastive import info_nce

if TYPE_CHECKING:
    from lightning import LightningModule
else:
    LightningModule = require("lightning", extra="train").LightningModule


class PointNet(nn.Module):
    """Points (b, n, 3) → features (b, 2 width): one network for every point, then maximum and mean over points.

    The answer depends on neither the order nor (but for sampling) the number of points. Source: Qi et al. (2017),
    without its transformer networks.
    """

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.width = width
        self.points = MLP((3, 64, 128, width), norm="layer")

    def forward(self, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b d"]:
        """Features of clouds."""
        each = self.points(points)
        return torch.cat([each.amax(1), each.mean(1)], dim=1)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"d={2 * self.width}"


def augmented(points: Float[Tensor, "b n 3"], keep: int, generator: torch.Generator) -> Float[Tensor, "b k 3"]:
    """A view of each cloud: `keep` of its points, turned about z, scaled by 0.8 to 1.25, shifted and jittered."""
    b, n, _ = points.shape
    chosen = torch.rand(b, n, generator=generator).argsort(1)[:, :keep]
    view = points.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 3))
    angle = 2 * torch.pi * torch.rand(b, generator=generator)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros(b), torch.ones(b)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], 1).reshape(b, 3, 3)
    scale = torch.empty(b, 1, 1).uniform_(0.8, 1.25, generator=generator)
    shift = torch.empty(b, 1, 3).uniform_(-0.05, 0.05, generator=generator)
    return view @ turn.mT * scale + shift + 0.01 * torch.randn(view.shape, generator=generator)


class PointContrast(LightningModule):
    """A PointNet that learns, without labels, to tell a cloud's two views from the views of other clouds (InfoNCE).

    Batches are tensors (b, n, 3). keep: points a view. Source: Chen et al. (2020), SimCLR, on point clouds.
    """

    def __init__(
        self, width: int = 256, *, keep: int = 192, temperature: float = 0.1, learning_rate: float = 2e-3, seed: int = 0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = PointNet(width)
        self.head = MLP((2 * width, width, 128))
        self._views = torch.Generator().manual_seed(seed)

    def forward(self, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b d"]:
        """Features of clouds, before the head that the contrast uses."""
        return self.encoder(points)

    def training_step(self, batch: Float[Tensor, "b n 3"], batch_index: int = 0) -> Tensor:
        """Loss of one batch of clouds."""
        keep = min(self.hparams["keep"], batch.shape[1])
        first, second = (self.head(self.encoder(augmented(batch, keep, self._views))) for _ in range(2))
        return info_nce(first, second, temperature=self.hparams["temperature"], symmetric=True)

    def configure_optimizers(self) -> Any:
        """AdamW, one cycle of the learning rate over the training."""
        rate = self.hparams["learning_rate"]
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=1e-2)
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
