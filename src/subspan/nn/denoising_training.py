"""Training a denoiser of rows (extra: train)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from subspan.base import require

from .denoising import denoising_loss, edm_weight

if TYPE_CHECKING:
    from lightning import LightningModule
else:
    LightningModule = require("lightning", extra="train").LightningModule


class DenoisingModule(LightningModule):
    """Squared error of denoised rows at log-normal noise levels, weighted so that all levels count alike (EDM).

    denoiser: (rows (b, n), sigma (b,)) → (b, n). Batches are rows (b, n), or a tuple that begins with them. sigma_data:
    standard deviation of the clean entries. log_sigma: mean and deviation of log sigma / sigma_data. Adam with a
    cosine decay of the rate over the run.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        sigma_data: float,
        log_sigma: tuple[float, float] = (-0.5, 1.2),
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data: must be positive, got {sigma_data}")
        self.denoiser = denoiser
        self.sigma_data = sigma_data
        self.log_sigma = log_sigma
        self.learning_rate = learning_rate

    def training_step(self, batch: Any, batch_index: int = 0) -> Tensor:
        """The weighted error at random noise levels."""
        rows = batch[0] if isinstance(batch, tuple | list) else batch
        mean, deviation = self.log_sigma
        drawn = torch.randn(len(rows), device=rows.device, dtype=rows.dtype)
        sigma = self.sigma_data * (mean + deviation * drawn).exp()
        noise = torch.randn_like(rows)
        loss = denoising_loss(self.denoiser, rows, sigma, noise, edm_weight(sigma, self.sigma_data))
        self.log("denoising_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Adam, its rate falling to 0 over the run."""
        learnt = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(learnt, self.learning_rate)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
