"""Sums of one function of the state and one of the noise behind it, y = f(z) + g(v), by three ways of fitting both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.modules import applied
from subspan.geometry import AffineMap, Whitener
from subspan.measures import RandomFeatures
from subspan.nn import MLP
from subspan.nn.training import RowBatches, quiet_trainer
from subspan.statistics import JointMoments

from .linear_invariance import kernel_width

Outcome = Literal["mlp", "kernel", "linear"]
# Ridge penalties that cross-validation chooses from, over the mean square of the features.
_PENALTIES = 10.0 ** torch.arange(-8, 3, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Waves:
    """Rows (n, d) → (n, 1): a line, and random features of a Gaussian kernel."""

    line: AffineMap
    features: RandomFeatures
    weights: Float[Tensor, " m"]

    def map(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        """The function."""
        return self.line.map(rows) + (self.features.features(rows) @ self.weights)[:, None]


@dataclass(frozen=True, eq=False)
class Network:
    """Rows (n, d) → (n, 1) by a module, in their own digits."""

    module: nn.Module

    def map(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        """The function."""
        return applied(self.module, rows)


@dataclass(frozen=True, eq=False)
class Effect:
    """A function of white rows, in the units of an outcome: scale inner(whiten(rows)) + constant."""

    inner: AffineMap | Waves | Network
    whitener: Whitener
    scale: float
    constant: float

    def __call__(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Its values."""
        return self.inner.map(self.whitener.whiten(rows))[:, 0] * self.scale + self.constant


class AdditiveEffects(NamedTuple):
    """y = outcome(z) + control(v), constants wherever they fell."""

    outcome: Any
    control: Any


def linear_effects(z: Float[Tensor, "n d"], v: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> AdditiveEffects:
    """Least squares on z and v: with residuals v of a linear first stage, two-stage least squares to the digit."""
    both = JointMoments(2 * z.shape[1], 1).update(torch.cat([z, v], 1), y[:, None]).ridge(0.0)
    of_z, of_v = both.matrix.split(z.shape[1], 1)
    return AdditiveEffects(AffineMap(of_z, both.bias), AffineMap(of_v))


def kernel_effects(
    z: Float[Tensor, "n d"], v: Float[Tensor, "n d"], y: Float[Tensor, " n"], *, n_features: int
) -> AdditiveEffects:
    """A line and random features for each, the features alone penalised, as generalised cross-validation has it."""
    drawn = [_features(side, n_features) for side in (z, v)]
    plain = torch.cat([torch.ones_like(y)[:, None], z, v], 1)
    wavy = torch.cat([each.features(side) for each, side in zip(drawn, (z, v))], 1)
    # What is not penalised is taken out of both sides first (Frisch and Waugh).
    pseudo = torch.linalg.pinv(plain)
    left, target = wavy - plain @ (pseudo @ wavy), y - plain @ (pseudo @ y)
    values, vectors = torch.linalg.eigh(left.mT @ left)
    values = values.clamp_min(0)
    along = vectors.mT @ (left.mT @ target)
    shrunk = 1 / (values + _PENALTIES.to(y)[:, None] * values.sum() / len(values))
    errors = target.square().sum() - ((2 * shrunk - values * shrunk.square()) * along.square()).sum(1)
    free = len(y) - plain.shape[1] - (values * shrunk).sum(1)
    best = int((errors / free.clamp_min(1).square()).argmin())
    weights = vectors @ (shrunk[best] * along)
    constant, *slopes = (pseudo @ (y - wavy @ weights)).split([1, z.shape[1], v.shape[1]])
    lines = AffineMap(slopes[0][None], constant), AffineMap(slopes[1][None])
    return AdditiveEffects(*(Waves(*each) for each in zip(lines, drawn, weights.split(n_features))))


def _features(rows: Float[Tensor, "n d"], count: int) -> RandomFeatures:
    return RandomFeatures.gaussian(rows.shape[1], count, kernel_width(rows), dtype=rows.dtype)


class _Sum(nn.Module):
    """A perceptron of z and one of v."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.outcome, self.control = (MLP(sizes, activation="leaky_relu") for _ in range(2))

    def forward(self, z: Float[Tensor, "n d"], v: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        return self.outcome(z) + self.control(v)


def _squared_error(model: _Sum, batch: Any) -> Float[Tensor, ""]:
    z, v, y = batch
    return F.mse_loss(model(z, v), y)


def trained_effects(
    z: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    *,
    hidden: Sequence[int],
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
) -> AdditiveEffects:
    """Two perceptrons, trained together by AdamW at a rate that falls to 0."""
    from subspan.nn import Objective

    model = _Sum((z.shape[1], *hidden, 1))
    rows = (z.float(), v.float(), y.float()[:, None])
    batches = RowBatches(*rows, size=batch_size, steps=max_steps)
    options: Any = {"learning_rate": learning_rate, "weight_decay": weight_decay, "schedule": "cosine"}
    with quiet_trainer(max_epochs=1) as trainer:
        trainer.fit(Objective(model, _squared_error, **options), batches)
    model.eval().requires_grad_(False)

    return AdditiveEffects(Network(model.outcome), Network(model.control))
