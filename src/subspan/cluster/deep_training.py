"""Training of deep subspace clusterers: the coefficients and the encoder together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from subspan.nn import ConvAutoencoder, LinearAutoencoder, SelfExpression, SubspaceStructured

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


class SelfExpressionModule(nn.Module):
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
    ) -> None:
        super().__init__()
        if fixed is None and (autoencoder is None or not layers):
            raise ValueError("fixed, autoencoder: there is nothing to express; give one of them, and layers")
        self.c = nn.Parameter(torch.full((n, n), 1e-8))
        self.register_buffer("fixed", fixed)
        self.autoencoder, self.layers = autoencoder, layers
        self.loss = SelfExpression()
        self.look, self.every = look, every
        self.history: list[float] = []
        self.looks: list[tuple[int, float]] = []
        self._best: dict[str, Tensor] = {}

    fixed: Tensor | None

    def coefficients(self) -> Float[Tensor, "n n"]:
        """C with its diagonal of zeros."""
        return self.loss.coefficients(self.c.detach())

    def training_loss(self, items: Tensor) -> Float[Tensor, ""]:
        """The loss of the coefficients, plus that of the reconstruction."""
        expressed = [] if self.fixed is None else [self.fixed]
        reconstruction = self.c.new_zeros(())
        if self.autoencoder is not None:
            found = self.autoencoder.encode(items)
            expressed += [F.normalize(found[layer].flatten(1)) for layer in self.layers]
            reconstruction = relative_error(self.autoencoder.decode(found[-1]), items)
        loss = self.loss(self.c, expressed)
        self.history.append(float(loss.detach()))
        return loss + reconstruction

    def watch(self, step: int) -> bool:
        """A look where it is due; True where it is time to end."""
        return step % self.every == 0 and self._looked(step)

    def _looked(self, step: int) -> bool:
        if self.look is None:
            return False
        self.looks.append((step, self.look(self.coefficients())))
        values = [value for _, value in self.looks]
        best = values.index(max(values))
        if best == len(values) - 1:
            self._best = {name: value.detach().clone() for name, value in self.named_parameters()}
        return len(values) - 1 - best >= _PATIENCE

    def restore(self) -> None:
        """A last look, where the last step had none; then back to the look with the largest number."""
        if len(self.history) % self.every:
            self._looked(len(self.history))
        self.load_state_dict(self._best, strict=False)


class StructureModule(nn.Module):
    """Stage three: the affinity between clusters is taken away, the clusters being those of C at every step.

    cluster: coefficients and the labels of the step before (None at first) → labels. Ends after 10 steps without a
    change. The weight of the loss does not matter to Adam.
    """

    def __init__(
        self, c: Float[Tensor, "n n"], cluster: Callable[[Tensor, Int[Tensor, " n"] | None], Int[Tensor, " n"]]
    ) -> None:
        super().__init__()
        self.c = nn.Parameter(c.clone())
        self.cluster = cluster
        self.loss = SubspaceStructured()
        self.labels: Tensor | None = None
        self.unchanged = 0

    def coefficients(self) -> Float[Tensor, "n n"]:
        """C, whose diagonal the loss does not move."""
        return self.c.detach()

    def training_loss(self, items: Tensor) -> Float[Tensor, ""]:
        """The affinity between the clusters of this step."""
        labels = self.cluster(self.c.detach(), self.labels)
        same = self.labels is not None and torch.equal(labels, self.labels)
        self.unchanged = self.unchanged + 1 if same else 0
        self.labels = labels
        return self.loss(self.c, labels)

    def watch(self, step: int) -> bool:
        """True where the clusters no longer change."""
        return self.unchanged >= _UNCHANGED


class DSCNetModule(nn.Module):
    """DSC-Net: |x - x̂|^2 / 2 + w_c |C|^2 + w_e |Z - CZ|^2 / 2, x̂ decoded from CZ, Z the code of the last layer.

    Source: Ji et al., Deep subspace clustering networks, NeurIPS 2017.
    """

    def __init__(
        self, n: int, autoencoder: Autoencoder, *, coefficient_weight: float, expression_weight: float
    ) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.full((n, n), 1e-8))
        self.autoencoder = autoencoder
        self.coefficient_weight, self.expression_weight = coefficient_weight, expression_weight
        self.history: list[float] = []

    def coefficients(self) -> Float[Tensor, "n n"]:
        """C; its diagonal is free."""
        return self.c.detach()

    def training_loss(self, items: Tensor) -> Float[Tensor, ""]:
        """The three terms, sums over all items."""
        code = self.autoencoder.encode(items)[-1]
        z = code.flatten(1)
        expressed = self.c @ z
        expression = (z - expressed).square().sum()
        decoded = self.autoencoder.decode(expressed.reshape(code.shape))
        self.history.append(float(expression.detach() / z.detach().square().sum()))
        return (
            0.5 * (items - decoded).square().sum()
            + self.coefficient_weight * self.c.square().sum()
            + 0.5 * self.expression_weight * expression
        )


def reconstruction_loss(autoencoder: Autoencoder, items: Tensor) -> Float[Tensor, ""]:
    """Stage one: the auto-encoder alone, on |x - x̂|^2 / |x|^2."""
    return relative_error(autoencoder.decode(autoencoder.encode(items)[-1]), items)


def relative_error(found: Tensor, wanted: Tensor) -> Float[Tensor, ""]:
    """|found - wanted|^2 / |wanted|^2."""
    return (found - wanted).square().sum() / wanted.square().sum()
