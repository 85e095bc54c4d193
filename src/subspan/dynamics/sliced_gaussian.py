"""How far samples are from a standard normal distribution, along many directions: the sliced Epps-Pulley statistic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base import check_finite


class Knots(NamedTuple):
    """Where characteristic functions are compared: knots i * step, i < m, and their weights (m,).

    The weights are those of the trapezoid rule on [-t_max, t_max], half of whose knots symmetry spares, times the
    window exp(-t²/2), which is also the characteristic function that is wanted.
    """

    step: float
    target: Tensor
    weights: Tensor

    @classmethod
    def spread(cls, count: int, t_max: float) -> Knots:
        """`count` knots from 0 to `t_max`."""
        step = t_max / (count - 1)
        target = torch.exp(-((step * torch.arange(count, dtype=torch.float64)) ** 2) / 2)
        weights = torch.full((count,), 2 * step, dtype=torch.float64)
        weights[[0, -1]] = step
        return cls(step, target, weights * target)


def _waves(s: Tensor, step: float, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """cos(i step s) and sin(i step s) for i = 1, …, count - 1: turned step by step, from one call of each."""
    cos, sin = (s * step).cos(), (s * step).sin()
    one, other = cos, sin
    for at in range(1, count):
        yield one, other
        if at < count - 1:
            one, other = one * cos - other * sin, other * cos + one * sin


class _SlicedEppsPulley(torch.autograd.Function):
    """Statistic a direction. Waves are made again for the gradient, chunk by chunk: nothing of size b n p m is kept."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, directions: Tensor, knots: Knots, chunk: int, group: Any) -> Tensor:
        target, weights = knots.target.to(z), knots.weights.to(z)
        found, means = [], []
        world = dist.get_world_size(group) if group is not None else 1
        count = torch.tensor(float(z.shape[-2]), device=z.device)
        if world > 1:
            dist.all_reduce(count, group=group)
        for some in directions.split(chunk, -1):
            s = z @ some
            sums = [torch.stack([c.sum(-2), w.sum(-2)]) for c, w in _waves(s, knots.step, len(target))]
            both = torch.stack(sums, -1)
            if world > 1:
                dist.all_reduce(both, group=group)
            # From 1 on: at 0 every characteristic function is 1.
            cos, sin = both / count
            cos = cos - target[1:]
            means.append(torch.stack([cos, sin]))
            found.append(count * ((cos.square() + sin.square()) * weights[1:]).sum(-1))
        ctx.save_for_backward(z, directions, *means)
        ctx.knots, ctx.chunk, ctx.world = knots, chunk, world
        return torch.cat(found, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        z, directions, *means = ctx.saved_tensors
        knots: Knots = ctx.knots
        weights, found = knots.weights.to(z), torch.zeros_like(z)
        chunks = zip(directions.split(ctx.chunk, -1), gradient.split(ctx.chunk, -1), means)
        for some, given, (cos, sin) in chunks:
            s = z @ some
            slope = torch.zeros_like(s)
            for at, (one, other) in enumerate(_waves(s, knots.step, len(weights))):
                rate = 2 * weights[at + 1] * knots.step * (at + 1)
                slope.addcmul_(one, (rate * sin[..., at]).unsqueeze(-2))
                slope.addcmul_(other, (rate * cos[..., at]).unsqueeze(-2), value=-1)
            found += (slope * given.unsqueeze(-2)) @ some.mT
        # Every process has the same loss of all samples; frameworks that average gradients divide by their number.
        return found * ctx.world, None, None, None, None


def epps_pulley(
    z: Float[Tensor, "*b n d"],
    directions: Float[Tensor, "*c d p"],
    *,
    n_knots: int = 17,
    t_max: float = 3.0,
    chunk_size: int = 256,
    group: Any = None,
) -> Float[Tensor, "*b p"]:
    """Epps-Pulley statistic of samples along directions: their characteristic functions beside the standard normal's.

    Parameters
    ----------
    z
        Samples (…, n, d); each leading index is a sample set of its own. Nothing is centred or scaled: mean 0 and
        variance 1 are part of what is tested.
    directions
        Columns (…, d, p), meant to be of unit length; leading dimensions broadcast with those of z. They are
        constants.
    n_knots, t_max
        Knots t from 0 to t_max.
    chunk_size
        Directions at a time; the answer does not depend on it, memory beyond inputs is … n chunk_size numbers.
    group
        Process group of torch.distributed whose samples are taken together; the directions must be the same there.

    Returns
    -------
    Tensor (…, p), in float32 or wider: n times the weighted squared distance. Around 1.05 for normal samples of any
    number, 0.402 n where all are 0.

    Raises
    ------
    ValueError
        For fewer than 2 samples or 3 knots, a `t_max` or `chunk_size` that is not positive, and NaN.

    References
    ----------
    Epps & Pulley (1983); sliced and windowed as in LeJEPA (arXiv 2511.08544).

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import epps_pulley
    >>> epps_pulley(torch.zeros(100, 3), torch.eye(3)).round(decimals=2)
    tensor([40.2000, 40.2000, 40.2000])
    """
    if n_knots < 3:
        raise ValueError(f"n_knots: at least 3, got {n_knots}")
    if t_max <= 0:
        raise ValueError(f"t_max: must be positive, got {t_max}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: at least 1, got {chunk_size}")
    if z.ndim < 2 or z.shape[-2] < 2:
        raise ValueError(f"z: at least 2 samples (…, n, d) are needed, got {tuple(z.shape)}")
    if z.shape[-1] != directions.shape[-2]:
        raise ValueError(f"directions: expected {z.shape[-1]} rows, got {tuple(directions.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        wide = torch.promote_types(z.dtype, torch.float32)
        samples = check_finite(z.to(wide), "z")
        leading = torch.broadcast_shapes(samples.shape[:-2], directions.shape[:-2])
        samples = samples.expand(*leading, *samples.shape[-2:])
        knots = Knots.spread(n_knots, t_max)
        found: Any = _SlicedEppsPulley.apply(samples, directions.to(samples).detach(), knots, chunk_size, group)
        return found


class SlicedGaussianLoss(nn.Module):
    """Mean Epps-Pulley statistic along random directions, drawn anew at every call (SIGReg).

    Called with samples (…, n, d), the second last dimension being the samples, such as (T, B, D), it gives a scalar
    that is small when they look standard normal in all directions: embeddings then neither collapse nor blow up.

    Parameters
    ----------
    knots, num_proj
        Knots of the statistic, and directions a call.
    t_max
        The largest knot.
    chunk_size
        Directions at a time.
    generator
        Of the directions; None: torch's default one.
    reduce_ranks
        Where torch.distributed is initialised, take the samples of all processes together and draw the directions of
        the first one everywhere. The gradient is then right under averaging, as DistributedDataParallel does it.

    Attributes
    ----------
    floor : float
        What normal samples give in the mean; about 1.05.

    Notes
    -----
    The published SIGReg judges the samples of each process apart. The arguments are in its order, so that
    `from subspan.dynamics import SlicedGaussianLoss as SIGReg` changes nothing else.

    References
    ----------
    LeJEPA (arXiv 2511.08544); LeWorldModel (arXiv 2603.19312).

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import SlicedGaussianLoss
    >>> loss = SlicedGaussianLoss(num_proj=64, generator=torch.Generator().manual_seed(0))
    >>> normal = torch.randn(4, 128, 16, generator=torch.Generator().manual_seed(1))
    >>> bool(loss(normal) < 1.5), bool(loss(0.1 * normal) > 20)
    (True, True)
    """

    def __init__(
        self,
        knots: int = 17,
        num_proj: int = 1024,
        *,
        t_max: float = 3.0,
        chunk_size: int = 256,
        generator: torch.Generator | None = None,
        reduce_ranks: bool = True,
    ) -> None:
        super().__init__()
        if num_proj < 1:
            raise ValueError(f"num_proj: at least 1, got {num_proj}")
        if knots < 3:
            raise ValueError(f"knots: at least 3, got {knots}")
        if t_max <= 0:
            raise ValueError(f"t_max: must be positive, got {t_max}")
        self.knots, self.num_proj, self.t_max, self.chunk_size = knots, num_proj, t_max, chunk_size
        self.generator, self.reduce_ranks = generator, reduce_ranks

    def extra_repr(self) -> str:
        """Its settings."""
        return f"knots={self.knots}, num_proj={self.num_proj}, t_max={self.t_max:g}"

    @property
    def floor(self) -> float:
        """The statistic's mean for standard normal samples, of any number and dimension."""
        # The variance of exp(i t s) is 1 - exp(-t²), and the mean of n has an n-th of it.
        _, target, weights = Knots.spread(self.knots, self.t_max)
        return float((weights * (1 - target.square())).sum())

    @property
    def group(self) -> Any:
        """The processes whose samples are taken together, or None."""
        return dist.group.WORLD if self.reduce_ranks and dist.is_available() and dist.is_initialized() else None

    def directions(self, *shape: int, like: Tensor) -> Tensor:
        """Unit columns (…, d, p) that are the same in all processes."""
        device = like.device if self.generator is None else self.generator.device
        drawn = torch.randn(*shape, generator=self.generator, device=device).to(like.device)
        if self.group is not None:
            dist.broadcast(drawn, src=0)
        return drawn / drawn.norm(dim=-2, keepdim=True)

    def statistic(self, z: Tensor, directions: Tensor) -> Tensor:
        """Statistics (…, p) of samples along directions."""
        options: dict[str, Any] = {"n_knots": self.knots, "t_max": self.t_max, "chunk_size": self.chunk_size}
        return epps_pulley(z, directions, group=self.group, **options)

    def forward(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, ""]:
        """Mean statistic over directions and leading dimensions."""
        return self.statistic(z, self.directions(z.shape[-1], self.num_proj, like=z)).mean()
