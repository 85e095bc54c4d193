"""Denoisers of noisy rows x + sigma ε: preconditioning, loss, and the probability-flow path between noise levels.

Conventions of EDM: noise has standard deviation sigma, the signal is not scaled. Source: Karras et al. (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Denoise = Callable[[Tensor, Tensor], Tensor]


class PreconditionedDenoiser(nn.Module):
    """c_skip x + c_out F(c_in x, ¼ log sigma): inputs, targets and output of the network F are of unit variance.

    network: (rows (b, n), noise level (b,)) → (b, n). sigma_data: standard deviation of the clean entries.
    """

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data: must be positive, got {sigma_data}")
        self.network = network
        self.sigma_data = sigma_data

    def forward(self, x: Float[Tensor, "b n"], sigma: float | Tensor) -> Float[Tensor, "b n"]:
        """Denoised rows; sigma is a number or (b,)."""
        noise = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x)).unsqueeze(1)
        total = noise.square() + self.sigma_data**2
        skip, out = self.sigma_data**2 / total, noise * self.sigma_data / total.sqrt()
        return skip * x + out * self.network(x / total.sqrt(), noise[:, 0].clamp_min(1e-8).log() / 4)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"sigma_data={self.sigma_data:g}"


class DenoisingMLP(nn.Module):
    """Rows (b, n) and a noise level (b,) → rows (b, n): residual blocks of `width` with the level added in each."""

    def __init__(self, n: int, width: int = 512, blocks: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(n, width)
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.leave = nn.Linear(width, n)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Float[Tensor, "b n"], level: Float[Tensor, " b"]) -> Float[Tensor, "b n"]:
        """What the preconditioned denoiser adds."""
        frequencies = torch.arange(1, 9, dtype=x.dtype, device=x.device)
        phase = level.unsqueeze(1) * frequencies
        encoded = self.level(torch.cat([phase.sin(), phase.cos()], 1))
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = hidden + block(hidden + encoded)
        return self.leave(torch.nn.functional.silu(hidden))


def edm_weight(sigma: Float[Tensor, " b"], sigma_data: float) -> Float[Tensor, " b"]:
    """(sigma² + sigma_data²) / (sigma sigma_data)²: every noise level counts alike at the start of training."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def denoising_loss(
    denoiser: Denoise,
    x: Float[Tensor, "b n"],
    sigma: Float[Tensor, " b"],
    noise: Float[Tensor, "b n"],
    weight: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error per entry of denoised rows, weighted row by row (equally where None)."""
    error = (denoiser(x + sigma.unsqueeze(1) * noise, sigma) - x).square().mean(1)
    return (error if weight is None else weight * error).mean()


class DenoisingLoss(nn.Module):
    """Of a denoiser and a batch of rows, for an `Objective`: all noise levels, drawn log-normally, count alike (EDM).

    Parameters
    ----------
    sigma_data : float
        Standard deviation of the clean entries.
    log_sigma : tuple of float
        Mean and deviation of log sigma / sigma_data.

    Examples
    --------
    >>> import torch
    >>> loss = DenoisingLoss(1.0)
    >>> nothing = loss(lambda rows, sigma: 0 * rows, torch.zeros(8, 3))
    >>> float(nothing)
    0.0
    """

    def __init__(self, sigma_data: float, log_sigma: tuple[float, float] = (-0.5, 1.2)) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data: must be positive, got {sigma_data}")
        self.sigma_data = sigma_data
        self.log_sigma = log_sigma

    def forward(self, denoiser: Denoise, batch: Any) -> Float[Tensor, ""]:
        """The weighted error at random noise levels; a batch is rows (b, n), or a tuple that begins with them."""
        rows = batch[0] if isinstance(batch, tuple | list) else batch
        mean, deviation = self.log_sigma
        drawn = torch.randn(len(rows), device=rows.device, dtype=rows.dtype)
        sigma = self.sigma_data * (mean + deviation * drawn).exp()
        return denoising_loss(denoiser, rows, sigma, torch.randn_like(rows), edm_weight(sigma, self.sigma_data))

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"sigma_data={self.sigma_data:g}, log_sigma={self.log_sigma}"


def noise_levels(
    steps: int, *, smallest: float = 0.002, largest: float = 80.0, rho: float = 7.0
) -> Float[Tensor, " s"]:
    """`steps` noise levels from the largest to the smallest, and 0 behind them."""
    if steps < 2 or not 0 < smallest < largest:
        raise ValueError(
            f"steps, smallest, largest: at least 2 and 0 < smallest < largest, got {steps}, {smallest}, {largest}"
        )
    ramp = torch.linspace(0, 1, steps)
    levels = (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def flow(denoiser: Denoise, x: Float[Tensor, "b n"], levels: Float[Tensor, " s"]) -> Float[Tensor, "b n"]:
    """Rows carried along the probability-flow path from noise level levels[0] through to levels[-1], by Heun's method.

    Falling levels that end in 0 sample (start from levels[0] times standard noise); rising ones turn an image into the
    noise that gives it back. Only the last level may be 0.
    """
    if len(levels) < 2 or bool((levels[:-1] <= 0).any()):
        raise ValueError("levels: at least two, of which only the last may be 0")
    for now, after in pairwise(levels.to(x)):
        slope = (x - denoiser(x, now.expand(len(x)))) / now
        moved = x + (after - now) * slope
        if float(after) > 0:
            again = (moved - denoiser(moved, after.expand(len(x)))) / after
            moved = x + (after - now) * (slope + again) / 2
        x = moved
    return x
