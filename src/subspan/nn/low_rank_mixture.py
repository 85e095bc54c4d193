"""The denoiser of a mixture of low-rank Gaussians in closed form, and the losses that make it cluster by subspace."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.geometry.grassmann import orthonormalize


class LowRankMixtureDenoiser(nn.Module):
    """E[x_0 | x_0 + sigma ε = x] for x_0 from a mixture of Gaussians N(μ_k, U_k Λ_k U_k' + τ_k² (I - U_k U_k')).

    bases (K, n, d): kept orthonormal whatever the optimiser does to the stored directions. variances (K, d): Λ, ones
    where None; a direction whose variance is the floor is none, so components may differ in dimension. means (K, n),
    zeros where None. weights (K,), equal where None. floor: τ², a number or (K,); 0 is exactly low rank, which at small
    sigma throws away all that the bases miss. hard: the most probable component alone. Only the directions are
    learnt unless `learn_all`. Sums run in float32 or wider.
    Source: Wang et al. (2024), arXiv 2409.02426; the floor is Tipping & Bishop's (1999).
    """

    means: Tensor
    log_variances: Tensor
    log_weights: Tensor
    floor: Tensor

    def __init__(
        self,
        bases: Float[Tensor, "K n d"],
        *,
        variances: Float[Tensor, "K d"] | None = None,
        means: Float[Tensor, "K n"] | None = None,
        weights: Float[Tensor, " K"] | None = None,
        floor: float | Float[Tensor, " K"] = 0.0,
        hard: bool = False,
        learn_all: bool = False,
    ) -> None:
        super().__init__()
        count, n, d = bases.shape
        if not 1 <= d <= n:
            raise ValueError(f"bases: expected (K, n, d) with d <= n, got {tuple(bases.shape)}")
        spread = bases.new_ones(count, d) if variances is None else variances
        share = bases.new_full((count,), 1 / count) if weights is None else weights
        lowest = torch.as_tensor(floor, dtype=bases.dtype, device=bases.device).expand(count).clone()
        for name, value, shape in (("variances", spread, (count, d)), ("weights", share, (count,))):
            if value.shape != shape or not bool((value > 0).all()):
                raise ValueError(f"{name}: expected positive numbers of shape {shape}, got {tuple(value.shape)}")
        if not bool((lowest >= 0).all()):
            raise ValueError(f"floor: must be >= 0, got {floor}")
        self.directions = nn.Parameter(orthonormalize(bases.detach()).clone())
        rest = {
            "log_variances": spread.detach().log(),
            "log_weights": (share / share.sum()).detach().log(),
            "means": bases.new_zeros(count, n) if means is None else means.detach().clone(),
        }
        for name, value in rest.items():
            if learn_all:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.register_buffer("floor", lowest)
        self.hard = hard

    @property
    def bases(self) -> Float[Tensor, "K n d"]:
        """Orthonormal bases."""
        stored = self.directions
        if not stored.requires_grad:
            # Frozen directions mostly are orthonormal; seeing that costs far less than making them so.
            eye = torch.eye(stored.shape[-1], dtype=stored.dtype, device=stored.device)
            if bool((stored.mT @ stored - eye).abs().max() <= 100 * torch.finfo(stored.dtype).eps):
                return stored
        return orthonormalize(stored)

    def extra_repr(self) -> str:
        """Shown by print."""
        count, n, d = self.directions.shape
        return f"components={count}, n={n}, dim={d}, hard={self.hard}"

    def forward(self, x: Float[Tensor, "b n"], sigma: float | Tensor) -> Float[Tensor, "b n"]:
        """Posterior mean of rows x (b, n) at noise sigma, a number or (b,); rows at sigma = 0 come back as they are."""
        rows, noise = self._rows(x, sigma)
        z, logits, bases = self._coordinates(rows, noise)
        weight = self._weights(logits)
        # Rows without noise come back as they are; a gradient would pass through what is not taken of them.
        variance = noise.square().masked_fill(noise == 0, 1)
        gain = self.log_variances.exp() / (self.log_variances.exp() + variance)
        rest = (self.floor / (self.floor + variance[..., 0])).unsqueeze(-1)
        pulled = weight.unsqueeze(-1) * (gain - rest) * z
        inside = pulled.flatten(1) @ bases.movedim(1, 2).flatten(0, 1)
        kept = (weight * rest[..., 0]).sum(1, keepdim=True)
        denoised = inside + kept * rows + (weight * (1 - rest[..., 0])) @ self.means
        clean = (noise == 0).view(-1, 1)
        return torch.where(clean, rows, denoised).to(x.dtype)

    def score(self, x: Float[Tensor, "b n"], sigma: float | Tensor) -> Float[Tensor, "b n"]:
        """Gradient of the log density of noisy rows, (x_hat - x) / sigma² (Tweedie); sigma must be positive."""
        _, noise = self._rows(x, sigma)
        if not bool((noise > 0).all()):
            raise ValueError("sigma: must be positive for a score")
        return (self(x, sigma) - x) / noise.view(-1, 1).square().to(x.dtype)

    def log_density(self, x: Float[Tensor, "b n"], sigma: float | Tensor = 0.0) -> Float[Tensor, " b"]:
        """Log density (nats) of rows with noise sigma; sigma = 0 needs a floor."""
        rows, noise = self._rows(x, sigma)
        if not bool((noise.square().view(-1, 1) + self.floor > 0).all()):
            raise ValueError("sigma: a low-rank mixture without floor has no density at sigma = 0")
        return torch.logsumexp(self._coordinates(rows, noise)[1], 1) - rows.shape[1] / 2 * math.log(2 * math.pi)

    def responsibilities(self, x: Float[Tensor, "b n"], sigma: float | Tensor = 0.0) -> Float[Tensor, "b K"]:
        """Probability of each component given noisy rows; at sigma = 0 without floor, the nearest subspace."""
        rows, noise = self._rows(x, sigma)
        return self._weights(self._coordinates(rows, noise)[1])

    def _rows(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 2 or x.shape[1] != self.directions.shape[1]:
            raise ValueError(f"x: expected rows of {self.directions.shape[1]} numbers, got {tuple(x.shape)}")
        wide = torch.promote_types(torch.promote_types(x.dtype, self.directions.dtype), torch.float32)
        noise = torch.as_tensor(sigma, dtype=wide, device=x.device)
        if noise.ndim > 1 or (noise.ndim == 1 and len(noise) != len(x)):
            raise ValueError(f"sigma: a number or one a row ({len(x)}) is needed, got shape {tuple(noise.shape)}")
        if not bool((noise >= 0).all()):
            raise ValueError("sigma: must be >= 0 and finite")
        return x.to(wide), noise.expand(len(x)).view(-1, 1, 1)

    def residual_energy(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b K"]:
        """Squared distance of rows to each component's affine subspace."""
        rows, _ = self._rows(x, 0.0)
        return self._projected(rows)[1]

    def _projected(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates (b, K, d) in each component, squared distances to it (b, K), and the bases."""
        bases = self.bases.to(rows.dtype)
        means = self.means.to(rows.dtype)
        # About the middle of the means, so that the squares below do not cancel a large common offset.
        middle = means.mean(0)
        rows, means = rows - middle, means - middle
        count, n, d = bases.shape
        # One product for all components, and no (b, K, n) numbers.
        z = (rows @ bases.movedim(0, 1).reshape(n, count * d)).unflatten(1, (count, d))
        z = z - torch.einsum("kn,knd->kd", means, bases)
        squares = rows.square().sum(1, keepdim=True) - 2 * rows @ means.mT + means.square().sum(1)
        return z, (squares - z.square().sum(-1)).clamp_min(0), bases

    def _coordinates(self, rows: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates (b, K, d) in each component, log joint densities (b, K) up to a constant, and the bases."""
        z, residual, bases = self._projected(rows)
        # Without floor the residual decides alone as sigma goes to 0; a tiny noise stands for the limit.
        variance = noise.square().clamp_min(torch.finfo(rows.dtype).eps ** 2)
        spread = self.log_variances.exp() + variance
        outside = self.floor + variance[..., 0]
        n, d = bases.shape[1:]
        energy = (z.square() / spread).sum(-1) + residual / outside
        volume = spread.log().sum(-1) + (n - d) * outside.log()
        return z, self.log_weights - (energy + volume) / 2, bases

    def _weights(self, logits: Tensor) -> Tensor:
        if self.hard:
            return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)
        return logits.softmax(1)


def hard_assignment_energy(x: Float[Tensor, "b n"], bases: Float[Tensor, "K n d"]) -> Float[Tensor, " b"]:
    """max_k |U_k'x|² of each row: what K-subspaces maximises the sum of."""
    return torch.einsum("bn,knd->bkd", x, bases).square().sum(-1).amax(1)


def hard_denoising_loss(x: Float[Tensor, "b n"], bases: Float[Tensor, "K n d"], sigma: float) -> Float[Tensor, ""]:
    """Mean over rows of E|x_hat(x + sigma ε) - x|² for the hard low-rank denoiser x_hat = a U U'(x + sigma ε), exactly.

    a = 1 / (1 + sigma²) and U the basis with the largest |U'x|. It is mean |x|² - (2a - a²) mean max_k |U_k'x|² +
    a² sigma² d: at every sigma an affine function, with negative slope, of the objective of K-subspaces.
    Source: Wang et al. (2024), arXiv 2409.02426, theorem 3; the closed form is ours.
    """
    if not sigma >= 0:
        raise ValueError(f"sigma: must be >= 0, got {sigma}")
    a = 1 / (1 + sigma**2)
    energy = hard_assignment_energy(x, bases).mean()
    return x.square().sum(1).mean() - (2 * a - a**2) * energy + a**2 * sigma**2 * bases.shape[-1]
