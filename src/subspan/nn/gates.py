"""Gates that are learnt: noise in training makes them differentiable, evaluation is deterministic.

All take one number a gate (parameters, or what a network gives) and return values in [0, 1] of the same shape.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

_CLAMP = 1e-6


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers in (0, 1), drawn where the generator lives, so that a seed gives the same ones on every device."""
    device = like.device if generator is None else generator.device
    drawn = torch.rand(like.shape, generator=generator, device=device, dtype=like.dtype)
    return drawn.clamp(_CLAMP, 1 - _CLAMP).to(like.device)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def straight_through(hard: Float[Tensor, "*n"], soft: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The value of `hard` with the gradient of `soft` (Bengio et al., 2013).

    Parameters
    ----------
    hard
        What goes on, of any shape.
    soft
        What the gradient goes to, of the same shape.

    Returns
    -------
    Tensor of that shape.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import straight_through
    >>> soft = torch.tensor([0.2, 0.7], requires_grad=True)
    >>> gate = straight_through((soft > 0.5).float(), soft)
    >>> gate.sum().backward()
    >>> gate.tolist(), soft.grad
    ([0.0, 1.0], tensor([1., 1.]))
    """
    return hard.detach() + (soft - soft.detach())


class ConcreteGate(nn.Module):
    """Relaxed Bernoulli gates (concrete distribution), stretched to reach 0 and 1 where asked for (hard concrete).

    In training σ((logit + log u - log(1 - u)) / temperature), u uniform; in evaluation σ(logit).

    Parameters
    ----------
    temperature
        Towards 0 the gates become 0 or 1; > 0.
    stretch
        (low, high) with low <= 0 < 1 <= high: the value is stretched to this interval and cut to [0, 1], so that gates
        are exactly 0 or 1 with some chance. (-0.1, 1.1) is usual; (0, 1) is none.
    hard
        Round the values in training too, at 1/2, with the gradient of what was rounded.

    References
    ----------
    Maddison et al. (2017); Louizos et al. (2018), L0 regularisation. Concrete merging (arXiv 2312.06173): temperature
    0.5, no stretch.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import ConcreteGate
    >>> gate = ConcreteGate().eval()
    >>> gate(torch.zeros(3))
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(
        self, temperature: float = 0.5, *, stretch: tuple[float, float] = (0.0, 1.0), hard: bool = False
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        if not stretch[0] <= 0 < 1 <= stretch[1]:
            raise ValueError(f"stretch: low <= 0 < 1 <= high is needed, got {stretch}")
        self.temperature, self.stretch, self.hard = temperature, stretch, hard

    def forward(self, logits: Float[Tensor, "*n"], generator: torch.Generator | None = None) -> Float[Tensor, "*n"]:
        """Gates of logits, in float32 or wider."""
        x = _wide(logits)
        if self.training:
            u = _uniform(x, generator)
            x = (x + torch.log(u) - torch.log1p(-u)) / self.temperature
        low, high = self.stretch
        gates = (torch.sigmoid(x) * (high - low) + low).clamp(0, 1)
        return straight_through((gates > 0.5).to(gates), gates) if self.hard else gates

    def expected_open(self, logits: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Chance that a gate is open in training: above 0, or above 1/2 where nothing is exactly 0 or it is rounded."""
        low, high = self.stretch
        if low == 0 or self.hard:
            limit = (0.5 - low) / (high - low)
        else:
            limit = -low / (high - low)
        return torch.sigmoid(_wide(logits) - self.temperature * math.log(limit / (1 - limit)))

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"temperature={self.temperature}, stretch={self.stretch}, hard={self.hard}"


class StochasticGate(nn.Module):
    """Gaussian gates: mu + 1/2 with noise of deviation `sigma` in training, cut to [0, 1].

    Parameters
    ----------
    sigma
        Deviation of the noise; > 0.

    Notes
    -----
    Add `expected_open(mu).sum()` times a weight to the loss to close gates.

    References
    ----------
    Yamada et al. (2020), STG; the mean is shifted by 1/2, so that mu = 0 is a half-open gate.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import StochasticGate
    >>> StochasticGate().eval()(torch.tensor([-1.0, 0.0, 0.25, 2.0]))
    tensor([0.0000, 0.5000, 0.7500, 1.0000])
    """

    def __init__(self, sigma: float = 0.5) -> None:
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"sigma: must be positive, got {sigma}")
        self.sigma = sigma

    def forward(self, mu: Float[Tensor, "*n"], generator: torch.Generator | None = None) -> Float[Tensor, "*n"]:
        """Gates of means, in float32 or wider."""
        x = _wide(mu) + 0.5
        if self.training:
            x = x + self.sigma * math.sqrt(2) * torch.erfinv(2 * _uniform(x, generator) - 1)
        return x.clamp(0, 1)

    def expected_open(self, mu: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Chance that a gate is above 0 in training: its part of the expected L0 norm."""
        return torch.special.ndtr((_wide(mu) + 0.5) / self.sigma)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"sigma={self.sigma}"


class TopKGate(nn.Module):
    """Exactly k gates of the last axis are 1, the rest 0: the largest logits, with Gumbel noise in training.

    Training samples k without replacement, in proportion to exp(logit), and has the gradient of the relaxed sample.

    Parameters
    ----------
    k
        Open gates.
    temperature
        Of the relaxation that gives the gradient; > 0.

    References
    ----------
    Kool et al. (2019), Gumbel top-k; Xie & Ermon (2019), relaxed subset sampling; straight-through as Jang et al.
    (2017).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import TopKGate
    >>> TopKGate(2).eval()(torch.tensor([0.1, 3.0, 2.0, -1.0]))
    tensor([0., 1., 1., 0.])
    """

    def __init__(self, k: int, temperature: float = 1.0) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        if not temperature > 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.k, self.temperature = k, temperature

    def forward(self, logits: Float[Tensor, "*b n"], generator: torch.Generator | None = None) -> Float[Tensor, "*b n"]:
        """Gates (…, n) of logits, in float32 or wider. Raises ValueError where n < k."""
        if logits.shape[-1] < self.k:
            raise ValueError(f"logits: at least {self.k} are needed, got {logits.shape[-1]}")
        x = _wide(logits)
        if self.training:
            x = x - torch.log(-torch.log(_uniform(x, generator)))
        hard = torch.zeros_like(x).scatter(-1, x.topk(self.k, dim=-1).indices, 1.0)
        soft, left = torch.zeros_like(x), x / self.temperature
        for _ in range(self.k):
            share = torch.softmax(left, -1)
            soft = soft + share
            left = left + torch.log1p(-share.clamp_max(1 - _CLAMP))
        return straight_through(hard, soft)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"k={self.k}, temperature={self.temperature}"
