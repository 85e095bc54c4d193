"""Training of deep subspace clusterers: the coefficients and the encoder together (extra: train)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from subspan.base import require
from subspan.nn import ConvAutoencoder, LinearAutoencoder, SelfExpression, SubspaceStructured

if TYPE_CHECKING:
    from lightning import LightningModule
else:
    LightningModule = require("lightning", extra="train").LightningModule

Autoencoder = ConvAutoencoder | LinearAutoencoder
# Steps without a change of labels that end stage three; looks at stage two without a better one that end it.
_UNCHANGED, _PATIENCE = 10, 5


class _EveryStep(IterableDataset[Tensor]):
    def __init__(self, items: Tensor, steps: int) -> None:
        self.items, self.steps = items, steps

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.steps):
            yield self.items


def all_items(items: Tensor, steps: int) -> DataLoader[Tensor]:
    """All items as the one batch of each of `steps` steps: coefficients join every item with every other."""
    return DataLoader(_EveryStep(items, steps), batch_size=None)


class _FullBatch(LightningModule):
    """Adam on all parameters that are trained, and an end of training that the module decides."""

    learning_rate: float

    def end(self) -> None:
        """Make this step the last."""
        self.trainer.should_stop = True

    def configure_optimizers(self) -> Any:
        """Adam, as published."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], self.learning_rate)


class ReconstructionModule(_FullBatch):
    """Stage one: the auto-encoder alone, on |x - x̂|^2 / |x|^2."""

    def __init__(self, autoencoder: Autoencoder, *, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.autoencoder, self.learning_rate = autoencoder, learning_rate

    def training_step(self, batch: Tensor, batch_index: int = 0) -> Tensor:
        """The relative squared error of the reconstruction."""
        return relative_error(self.autoencoder.decode(self.autoencoder.encode(batch)[-1]), batch)


class SelfExpressionModule(_FullBatch):
    """Stage two: one C (n, n) for all layers, sum |Z - CZ|^2 / |Z|^2, and the reconstruction kept beside it.

    fixed: (n, d) what does not change, the rows themselves or all layers of a frozen network in one (`joint_factor`);
    None for none. autoencoder: trained along, its layers' rows scaled to unit length, so that it gains nothing by
    shrinking; None where all is fixed. layers: those of the auto-encoder that are expressed, as indices.
    look: coefficients → a number, asked for every `every` steps and at the end; the coefficients and the auto-encoder
    of the look with the largest are kept by `restore`, and five looks without a larger one end the training. No label
    is looked at. history holds the loss of each step, looks the step and number of each look.
    """

    def __init__(
        self,
        n: int,
        *,
        fixed: Float[Tensor, "n d"] | None = None,
        autoencoder: Autoencoder | None = None,
        layers: tuple[int, ...] = (),
        look: Callable[[Float[Tensor, "n n"]], float] | None = None,
        every: int = 50,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        if fixed is None and (autoencoder is None or not layers):
            raise ValueError("fixed, autoencoder: there is nothing to express; give one of them, and layers")
        self.c = nn.Parameter(torch.full((n, n), 1e-8))
        self.register_buffer("fixed", fixed)
        self.autoencoder, self.layers = autoencoder, layers
        self.loss = SelfExpression()
        self.look, self.every, self.learning_rate = look, every, learning_rate
        self.history: list[float] = []
        self.looks: list[tuple[int, float]] = []
        self._best: dict[str, Tensor] = {}

    fixed: Tensor | None

    def coefficients(self) -> Float[Tensor, "n n"]:
        """C with its diagonal of zeros."""
        return self.loss.coefficients(self.c.detach())

    def training_step(self, batch: Tensor, batch_index: int = 0) -> Tensor:
        """The loss of the coefficients, plus that of the reconstruction."""
        expressed = [] if self.fixed is None else [self.fixed]
        reconstruction = self.c.new_zeros(())
        if self.autoencoder is not None:
            found = self.autoencoder.encode(batch)
            expressed += [F.normalize(found[layer].flatten(1)) for layer in self.layers]
            reconstruction = relative_error(self.autoencoder.decode(found[-1]), batch)
        loss = self.loss(self.c, expressed)
        self.history.append(float(loss.detach()))
        if not torch.isfinite(loss):
            raise ValueError("X: the loss is no longer finite; are values far larger than 1?")
        return loss + reconstruction

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_index: int) -> None:
        """A look where it is due."""
        if len(self.history) % self.every == 0:
            self._look()

    def on_train_end(self) -> None:
        """The last look."""
        if len(self.history) % self.every:
            self._look()

    def _look(self) -> None:
        if self.look is None:
            return
        self.looks.append((len(self.history), self.look(self.coefficients())))
        values = [value for _, value in self.looks]
        best = values.index(max(values))
        if best == len(values) - 1:
            self._best = {name: value.detach().clone() for name, value in self.named_parameters()}
        if len(values) - 1 - best >= _PATIENCE:
            self.end()

    def restore(self) -> None:
        """Back to the look with the largest number, where there were any."""
        self.load_state_dict(self._best, strict=False)


class StructureModule(_FullBatch):
    """Stage three: the affinity between clusters is taken away, the clusters being those of C at every step.

    cluster: coefficients and the labels of the step before (None at first) → labels. Ends after 10 steps without a
    change. The weight of the loss does not matter to Adam.
    """

    def __init__(
        self,
        c: Float[Tensor, "n n"],
        cluster: Callable[[Tensor, Int[Tensor, " n"] | None], Int[Tensor, " n"]],
        *,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.c = nn.Parameter(c.clone())
        self.cluster, self.learning_rate = cluster, learning_rate
        self.loss = SubspaceStructured()
        self.labels: Tensor | None = None
        self.unchanged = 0

    def coefficients(self) -> Float[Tensor, "n n"]:
        """C, whose diagonal the loss does not move."""
        return self.c.detach()

    def training_step(self, batch: Tensor, batch_index: int = 0) -> Tensor:
        """The affinity between the clusters of this step."""
        labels = self.cluster(self.c.detach(), self.labels)
        same = self.labels is not None and torch.equal(labels, self.labels)
        self.unchanged = self.unchanged + 1 if same else 0
        self.labels = labels
        if self.unchanged >= _UNCHANGED:
            self.end()
        return self.loss(self.c, labels)


class DSCNetModule(_FullBatch):
    """DSC-Net: |x - x̂|^2 / 2 + w_c |C|^2 + w_e |Z - CZ|^2 / 2, x̂ decoded from CZ, Z the code of the last layer.

    Source: Ji et al., Deep subspace clustering networks, NeurIPS 2017.
    """

    def __init__(
        self,
        n: int,
        autoencoder: Autoencoder,
        *,
        coefficient_weight: float,
        expression_weight: float,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.full((n, n), 1e-8))
        self.autoencoder = autoencoder
        self.coefficient_weight, self.expression_weight = coefficient_weight, expression_weight
        self.learning_rate = learning_rate
        self.loss = SelfExpression(per_layer_scale=False, zero_diag=False)
        self.history: list[float] = []

    def coefficients(self) -> Float[Tensor, "n n"]:
        """C; its diagonal is free."""
        return self.c.detach()

    def training_step(self, batch: Tensor, batch_index: int = 0) -> Tensor:
        """The three terms, sums over all items."""
        code = self.autoencoder.encode(batch)[-1]
        z = code.flatten(1)
        expressed = self.c @ z
        expression = (z - expressed).square().sum()
        decoded = self.autoencoder.decode(expressed.reshape(code.shape))
        self.history.append(float(expression.detach() / z.detach().square().sum()))
        return (
            0.5 * (batch - decoded).square().sum()
            + self.coefficient_weight * self.c.square().sum()
            + 0.5 * self.expression_weight * expression
        )


def relative_error(found: Tensor, wanted: Tensor) -> Float[Tensor, ""]:
    """|found - wanted|^2 / |wanted|^2."""
    return (found - wanted).square().sum() / wanted.square().sum()
