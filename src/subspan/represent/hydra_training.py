"""Training of Hydra: an encoder, a projector and the loss together, and the estimator for embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from subspan.base import like
from subspan.base.estimators import Estimator, in_numpy
from subspan.base.modules import applied
from subspan.base.parameters import Count, NonNegative, Positive, Seed
from subspan.geometry import CoordinateSubspace
from subspan.nn import MLP
from subspan.nn.training import batch_rows, quiet_trainer

from .hydra import ArbitraryPairLoss, PairGate, Pairing

if TYPE_CHECKING:
    from subspan.nn import Objective


class HydraTraining(nn.Module):
    """An encoder, a projector and `ArbitraryPairLoss`: what is trained.

    Batches are (x, labels), or (x1, x2, labels) of two views. `Trainer.fit(module.objective(…), batches)` trains
    (extra: train). Afterwards the encoder is what transfers; gates are read in the projector's space.

    Parameters
    ----------
    encoder
        Samples → features (n, p).
    loss
        Its gate is of the projector's width.
    features
        p.
    hidden
        Units of the projector.
    gate_warmup
        Steps at the start in which the gate alone is trained.

    Raises
    ------
    ValueError
        For a negative warm-up.

    References
    ----------
    Wu et al. (2024). The last layer norm is theirs: behind a batch norm gates do not close.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import ArbitraryPairLoss, HydraTraining, PairGate
    >>> loss = ArbitraryPairLoss(PairGate(3, 8, embed_dim=4, hidden=16))
    >>> module = HydraTraining(torch.nn.Linear(5, 12), loss, features=12, hidden=16)
    >>> value, log = module.training_loss((torch.randn(9, 5), torch.arange(9) % 3), step=0)
    >>> module(torch.randn(2, 5)).shape, bool(value.isfinite())
    (torch.Size([2, 8]), True)
    """

    def __init__(
        self,
        encoder: nn.Module,
        loss: ArbitraryPairLoss,
        *,
        features: int,
        hidden: int = 2048,
        gate_warmup: int = 0,
    ) -> None:
        super().__init__()
        if gate_warmup < 0:
            raise ValueError(f"gate_warmup: must be 0 or more, got {gate_warmup}")
        self.encoder, self.loss, self.gate_warmup = encoder, loss, gate_warmup
        sizes = (features, hidden, loss.gate.dim)
        self.projector = MLP(sizes, norm="batch", activation="relu", last_norm="layer")

    def forward(self, x: Tensor) -> Float[Tensor, "n d"]:
        """Projected embeddings, whose coordinates the gates are of."""
        return self.projector(self.encoder(x))

    def training_loss(self, batch: Sequence[Tensor], step: int) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of one batch."""
        *views, labels = batch
        found = [self(view) for view in views]
        if step < self.gate_warmup:
            found = [each.detach() for each in found]
        return self.loss(found[0], found[1] if len(found) > 1 else None, labels)

    def objective(self, *, learning_rate: float = 1e-3, weight_decay: float = 5e-4, **options: Any) -> Objective:
        """For a Trainer (extra: train): Adam, and a rate that falls along a cosine; options of `Objective`."""
        from subspan.nn import Objective

        usual: dict[str, Any] = {"optimizer": "adam", "schedule": "cosine", "warmup": 0.04, **options}
        given = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        return Objective(self, HydraTraining.training_loss, **given, **usual)


@dataclass(eq=False, repr=False)
class HydraProjector(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """Map embeddings X (n, d) with classes y to coordinates of which every two classes share a subset, found by gates.

    A trunk, a projector and a gate are trained on top of what a frozen encoder gives (extra: train).

    Parameters
    ----------
    out_dim
        Coordinates that come out, and are gated.
    features, hidden
        Width of the trunk, what `features_of` gives, and of the projector.
    pairing, temperature, binary_penalty, normalize
        Of `ArbitraryPairLoss`.
    kind, fuse, gate_norm
        Of `PairGate`; kind="open" with pairing="identical" is supervised contrast.
    embed_dim, gate_hidden
        Sizes of the gate.
    epochs, learning_rate, weight_decay
        Of the training, by Adam along a cosine.
    batch_size
        None for 256 rows, of few rows so many (32 at least) that an epoch has 32 steps.
    trainer
        Options of Lightning's Trainer (devices, callbacks, progress, …).
    random_state
        Seed of the training.

    Attributes
    ----------
    classes_, gate_, network_, losses_
        The classes, the trained `PairGate`, the whole `HydraTraining`, and the mean loss of each epoch.
    relations_
        (c, c) overlap of the classes' gates, in the order of `classes_`.
    subspaces_
        A `CoordinateSubspace` a class, of the coordinates that its own gate opens (at least the most open one).

    References
    ----------
    Wu et al. (2024), arXiv 2410.18200.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.represent import HydraProjector
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(3, size=90)
    >>> x = rng.normal(size=(90, 6)) + 3 * np.eye(3, 6)[y]
    >>> model = HydraProjector(8, features=16, hidden=16, embed_dim=8, gate_hidden=16, epochs=2, random_state=0)
    >>> model.fit(x, y).transform(x).shape, model.relations_.shape
    ((90, 8), (3, 3))
    """

    out_dim: Count = 256
    features: Count = 512
    hidden: Count = 512
    pairing: Pairing = "arbitrary"
    kind: Literal["sigmoid", "open", "gumbel", "stochastic"] = "sigmoid"
    fuse: Literal["mean", "product"] = "mean"
    gate_norm: Literal["batch", "layer"] = "layer"
    embed_dim: Count = 512
    gate_hidden: Count = 1024
    temperature: Positive = 0.1
    binary_penalty: NonNegative = 0.0
    normalize: Literal["inside", "before"] = "inside"
    epochs: Count = 15
    batch_size: Count | None = None
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 5e-4
    trainer: Mapping[str, Any] | None = None
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None) -> HydraProjector:
        """Train on rows X (n, d) of classes y (n,).

        Raises ValueError for NaN, labels of another number, and fewer than two classes.
        """
        self._check_parameters()
        rows = self._rows(X, reset=True)
        self.classes_, labels = class_numbers(y, len(rows))
        self._n_features_out = int(self.out_dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(check_random_state(self.random_state).randint(2**31)))
            network = self._network(rows)
            self._train(network, rows.detach().float().cpu(), labels)
        self.network_ = network.eval().requires_grad_(False)
        self.gate_ = network.loss.gate
        self.relations_ = self.gate_.relations().numpy()
        self.subspaces_ = tuple(self._own(place) for place in range(len(self.classes_)))
        return self

    def _network(self, rows: Tensor) -> HydraTraining:
        gate = PairGate(
            len(self.classes_),
            int(self.out_dim),
            embed_dim=int(self.embed_dim),
            hidden=int(self.gate_hidden),
            fuse=self.fuse,
            kind=self.kind,
            norm=self.gate_norm,
        )
        loss = ArbitraryPairLoss(
            gate,
            temperature=self.temperature,
            pairing=self.pairing,
            binary_penalty=self.binary_penalty,
            normalize=self.normalize,
        )
        trunk = nn.Sequential(Standardize(rows.detach()), nn.Linear(rows.shape[1], int(self.features)), nn.ReLU())
        return HydraTraining(trunk, loss, features=int(self.features), hidden=int(self.hidden))

    def _train(self, network: HydraTraining, rows: Tensor, labels: Tensor) -> None:
        size = max(2, batch_rows(len(rows), self.batch_size, 256))
        data = torch.utils.data.TensorDataset(rows, labels)
        loader = torch.utils.data.DataLoader(data, batch_size=None, sampler=_Mixed(labels, size))
        objective = network.objective(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        with quiet_trainer(**{"max_epochs": self.epochs, **(self.trainer or {})}) as trainer:
            trainer.fit(objective, loader)
        self.losses_ = list(objective.losses)
        network.cpu()

    def _own(self, place: int) -> CoordinateSubspace:
        weights = self.gate_.soft_subspace(place, place).weights
        top = None if bool((weights > 0.5).any()) else 1
        return self.gate_.subspace(place, place, top_k=top)

    def pair_subspace(self, first: Any, second: Any, **options: Any) -> CoordinateSubspace:
        """The coordinates of `transform` that two classes share, by their names; options of `PairGate.subspace`."""
        check_is_fitted(self, "gate_")
        places = []
        for name in (first, second):
            (found,) = np.nonzero(self.classes_ == name)
            if not len(found):
                raise ValueError(f"class {name!r} was not seen in fit; there are {self.classes_.tolist()}")
            places.append(int(found[0]))
        return self.gate_.subspace(places[0], places[1], **options)

    def transform(self, X: Any) -> Any:
        """Coordinates (n, out_dim) of rows X (n, d); numpy or torch as given, in its dtype."""
        check_is_fitted(self, "network_")
        return like(applied(self.network_, self._rows(X)), X)

    def features_of(self, X: Any) -> Any:
        """Features (n, features) of the trunk, which the method transfers; numpy or torch as given, in its dtype."""
        check_is_fitted(self, "network_")
        return like(applied(self.network_.encoder, self._rows(X)), X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


class Standardize(nn.Module):
    """(x - mean) / deviation of each column; columns that do not vary become 0. Fixed, and saved with the network."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, rows: Float[Tensor, "n d"]) -> None:
        super().__init__()
        wide = rows.double().cpu()
        deviation = wide.std(0, correction=0)
        flat = deviation <= 1e-10 * wide.abs().amax(0)
        self.register_buffer("mean", wide.mean(0).float())
        self.register_buffer("deviation", torch.where(flat, torch.inf, deviation).float())

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Standardised rows."""
        return (x - self.mean) / self.deviation


class _Mixed(torch.utils.data.Sampler[Tensor]):
    """Random batches of at least two classes: one of a single class is put together with the next."""

    def __init__(self, labels: Tensor, size: int) -> None:
        self.labels, self.size = labels, size

    def __iter__(self) -> Iterator[Tensor]:
        held: list[Tensor] = []
        for part in torch.randperm(len(self.labels)).split(self.size):
            held.append(part)
            together = torch.cat(held)
            if len(self.labels[together].unique()) > 1:
                yield together
                held = []

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)


def class_numbers(y: Any, count: int) -> tuple[np.ndarray, Tensor]:
    """The classes, sorted, and the number of each of `count` labels among them; ValueError for fewer than two."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None: it holds the classes of X")
    labels = np.asarray(in_numpy(y))
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise ValueError(f"y: expected {count} labels, one a row of X, got shape {labels.shape}")
    check_classification_targets(labels)
    classes, place = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y: at least 2 classes are needed, got 1 class ({classes[0]!r})")
    return classes, torch.as_tensor(place)
