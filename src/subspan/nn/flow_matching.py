"""Flow matching: training a denoiser on straight paths from images to noise, and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .flow_transformer import FlowTransformer

if TYPE_CHECKING:
    from .objective import Objective

_CLOSEST = 0.05


class FlowMatching(nn.Module):
    """x_t = (1 - t) x + t ε; the denoiser learns the velocity ε - x (SiT), or the image, judged by velocity (JiT).

    Batches are mappings with "image" (n, c, h, w) in [-1, 1] and "label" (n,); "teacher" where the alignment has no
    teacher of its own and wants cached features. alignment: a module whose `loss(images or features, step=…)` is added
    (`subspan.align.RepresentationAlignment` on a layer of `denoiser`); its parameters are trained too. class_dropout:
    share of labels replaced by "no class", so that `sample` can use guidance. prediction: "velocity", times uniform;
    or "image", times logit-normal (mean 0.8, deviation 0.8 in this direction of time) and the velocity's denominator
    kept at 0.05 or more. `sample` uses `ema`, an exponential moving average of the denoiser.
    Source: Ma et al. (2024), SiT; Li & He (2025), JiT.
    """

    def __init__(
        self,
        denoiser: FlowTransformer,
        *,
        alignment: nn.Module | None = None,
        prediction: str = "velocity",
        class_dropout: float = 0.1,
        ema_decay: float = 0.9999,
    ) -> None:
        super().__init__()
        if prediction not in ("velocity", "image"):
            raise ValueError(f"prediction: 'velocity' or 'image', got {prediction!r}")
        if not 0 <= class_dropout < 1:
            raise ValueError(f"class_dropout: in [0, 1), got {class_dropout}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay: in [0, 1), got {ema_decay}")
        self.denoiser = denoiser
        self.alignment = alignment
        self.prediction = prediction
        self.class_dropout = class_dropout
        self.ema = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.ema.requires_grad_(False)

    def noised(
        self, images: Float[Tensor, "b c h w"], time: Float[Tensor, " b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """x_t."""
        t = time.view(-1, 1, 1, 1)
        return (1 - t) * images + t * noise

    def velocity(
        self,
        x: Float[Tensor, "b c h w"],
        time: Float[Tensor, " b"],
        label: Int[Tensor, " b"],
        *,
        model: nn.Module | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """The velocity at x_t that the denoiser (or `model`, such as `ema`) predicts."""
        field = (self.denoiser if model is None else model)(x, time, label)
        return field if self.prediction == "velocity" else self._through_image(x, time, field)

    def denoising_loss(
        self,
        images: Float[Tensor, "b c h w"],
        label: Int[Tensor, " b"],
        time: Float[Tensor, " b"],
        noise: Float[Tensor, "b c h w"],
        *,
        model: nn.Module | None = None,
    ) -> Float[Tensor, ""]:
        """Mean squared error of the velocity at given times and noise."""
        x = self.noised(images, time, noise)
        true = noise - images if self.prediction == "velocity" else self._through_image(x, time, images)
        return (self.velocity(x, time, label, model=model) - true).square().mean()

    def training_loss(self, batch: Mapping[str, Tensor], step: int | None = None) -> dict[str, Tensor]:
        """Denoising loss at random times, and the alignment's."""
        images, label = batch["image"], batch["label"]
        time = torch.rand(len(images), device=images.device, dtype=images.dtype)
        if self.prediction == "image":
            time = torch.sigmoid(0.8 + 0.8 * torch.randn_like(time))
        dropped = torch.rand(len(images), device=images.device) < self.class_dropout
        label = torch.where(dropped, self.denoiser.null, label)
        terms = {"denoising_loss": self.denoising_loss(images, label, time, torch.randn_like(images))}
        if self.alignment is not None:
            aligned: Any = self.alignment
            terms["alignment_loss"] = aligned.loss(batch.get("teacher", images), step=step)
        return terms

    def validation_loss(self, batch: Mapping[str, Tensor], batch_index: int) -> Float[Tensor, ""]:
        """Denoising loss at times and noise that are the same in every epoch."""
        generator = torch.Generator().manual_seed(batch_index)
        images, label = batch["image"], batch["label"]
        time = torch.rand(len(images), generator=generator).to(images)
        noise = torch.randn(images.shape, generator=generator).to(images)
        return self.denoising_loss(images, label, time, noise)

    def update_average(self, step: int | None = None) -> None:
        """One step of the moving average."""
        self.ema.update_parameters(self.denoiser)

    def objective(
        self,
        *,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup: int = 0,
    ) -> Objective:
        """For a Trainer (extra: train): AdamW on denoiser and alignment, constant after `warmup` steps."""
        from .objective import Objective

        return Objective(
            self,
            FlowMatching.training_loss,
            validation=FlowMatching.validation_loss,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            warmup=warmup,
            after_step=FlowMatching.update_average,
        )

    @torch.no_grad()
    def sample(
        self,
        label: Int[Tensor, " b"],
        *,
        steps: int = 50,
        method: str = "heun",
        guidance: float = 1.0,
        averaged: bool = True,
        noise: Float[Tensor, "b c h w"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Images of the classes `label`, by integrating the velocity from noise (t = 1) to t = 0.

        guidance: classifier-free, v = v_none + guidance (v_class - v_none). averaged: with the moving average of the
        weights. noise: where to start, else drawn by `generator`.
        """
        if method not in ("euler", "heun"):
            raise ValueError(f"method: 'euler' or 'heun', got {method!r}")
        if steps < 1:
            raise ValueError(f"steps: at least 1, got {steps}")
        model = self.ema if averaged else self.denoiser
        device = self.ema.n_averaged.device
        label = label.to(device)
        if noise is None:
            noise = torch.randn(len(label), *self.denoiser.image_shape, generator=generator)
        x = noise.to(device)
        times = torch.linspace(1, 0, steps + 1)
        for t, following in pairwise(times):
            dt = following - t
            first = self._guided(x, t, label, guidance, model)
            x_next = x + dt * first
            if method == "heun":
                x_next = x + dt / 2 * (first + self._guided(x_next, following, label, guidance, model))
            x = x_next
        return x

    def _guided(self, x: Tensor, t: Tensor, label: Tensor, guidance: float, model: nn.Module) -> Tensor:
        time = t.to(x).expand(len(x))
        conditional = self.velocity(x, time, label, model=model)
        if guidance == 1:
            return conditional
        free = self.velocity(x, time, torch.full_like(label, self.denoiser.null), model=model)
        return free + guidance * (conditional - free)

    def _through_image(self, x: Tensor, time: Tensor, image: Tensor) -> Tensor:
        return (x - image) / time.clamp_min(_CLOSEST).view(-1, 1, 1, 1)
