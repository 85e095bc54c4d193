"""A small PointNet, and its training without labels by contrast of two views of each cloud."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .blocks import MLP
from .contrastive import info_nce

if TYPE_CHECKING:
    from .objective import Objective


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


class PointContrast(nn.Module):
    """A PointNet that learns, without labels, to tell a cloud's two views from the views of other clouds (InfoNCE).

    Batches are tensors (b, n, 3). keep: points a view. Source: Chen et al. (2020), SimCLR, on point clouds.
    """

    def __init__(self, width: int = 256, *, keep: int = 192, temperature: float = 0.1, random_state: int = 0) -> None:
        super().__init__()
        self.keep, self.temperature = keep, temperature
        self.encoder = PointNet(width)
        self.head = MLP((2 * width, width, 128))
        self._views = torch.Generator().manual_seed(random_state)

    def forward(self, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b d"]:
        """Features of clouds, before the head that the contrast uses."""
        return self.encoder(points)

    def get_extra_state(self) -> Tensor:
        """Where the drawing of views stands: a run that resumes goes on with it."""
        return self._views.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the drawing of views."""
        self._views.set_state(state.cpu())

    def training_loss(self, batch: Float[Tensor, "b n 3"]) -> Float[Tensor, ""]:
        """Loss of one batch of clouds."""
        keep = min(self.keep, batch.shape[1])
        first, second = (self.head(self.encoder(augmented(batch, keep, self._views))) for _ in range(2))
        return info_nce(first, second, temperature=self.temperature, symmetric=True)

    def objective(self, *, learning_rate: float = 2e-3) -> Objective:
        """For a Trainer (extra: train): AdamW, one cycle of the learning rate over the training."""
        from .objective import Objective

        options = {"weight_decay": 1e-2, "schedule": "one-cycle", "warmup": 0.3}
        return Objective(self, PointContrast.training_loss, learning_rate=learning_rate, **options)
