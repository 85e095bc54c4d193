"""Koopman autoencoders as an estimator: trajectories in, forecasts in the data's units out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from subspan.base import as_tensor, check_finite, check_matrix, like
from subspan.base.estimators import Estimator, in_numpy
from subspan.base.parameters import Count, NonNegative, Positive, Seed, Share
from subspan.geometry import Subspace
from subspan.nn.training import keep_best, quiet_trainer

from .information_koopman import InformationKoopmanLoss, KoopmanNetwork, OperatorKind, effective_dimension
from .koopman_operator import KoopmanOperator
from .trajectories import listed_trajectories, rollout_errors

_BLOCK = 512
_REFIT_RIDGE = 1e-6


class _Windows(Dataset[Any]):
    """Windows of T + 1 states, and T inputs, of trajectories that stay where they are."""

    def __init__(self, states: list[Tensor], inputs: list[Tensor] | None, size: int) -> None:
        self.states, self.inputs, self.size = states, inputs, size
        self.places = [(i, at) for i, x in enumerate(states) for at in range(len(x) - size)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        part, at = self.places[index]
        x = self.states[part][at : at + self.size + 1]
        return (x,) if self.inputs is None else (x, self.inputs[part][at : at + self.size])


@dataclass(eq=False, repr=False)
class KoopmanAutoencoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """Learn latents in which trajectories move linearly, shaped by information between steps and spectral entropy.

    Forecasts are powers of one matrix between an encoder and a decoder. Without shaping (alpha = gamma = 0) it is a
    Koopman autoencoder, whose latents tend to collapse onto few directions. Needs the extra `train`.

    Parameters
    ----------
    dim
        Of the latent space.
    alpha, beta, gamma, id_weight, neighbours, temperature, negatives
        Of `InformationKoopmanLoss`. gamma > 0 rewards entropy as the paper does; gamma < 0 is the released code's.
    operator, ridge, detach_operator, hidden, width, dropout, encoder, decoder
        Of `KoopmanNetwork`; given modules are copied.
    clip_spectral_radius
        Of the final `KoopmanOperator`.
    window
        Steps of a window in training; fewer where the longest trajectory has fewer.
    epochs, batch_size, learning_rate, gradient_clip
        Of the training by Adam, an epoch all windows.
    validation
        Share of the trajectories (at least one) whose loss chooses the epoch that is kept. 0: the last.
    trainer
        Options of Lightning's Trainer (max_steps, devices, callbacks, …).
    random_state
        Seed of the training.

    Attributes
    ----------
    dynamics_
        The `KoopmanOperator` fitted to the latents of all training rows after the training, K and B alike.
    eigenvalues_
        Of its K.
    network_, losses_
        The trained `KoopmanNetwork`, and the mean loss of each epoch.
    effective_dimension_
        exp of the von Neumann entropy of the latents: how many directions they fill.
    subspace_
        Their principal directions, with variances.

    Notes
    -----
    Each channel is standardised over all training rows, constant ones left at 0, and forecasts come back in its units.
    The released code keeps the mean of the batches' operators over the best epoch; refitting costs one pass and does
    not lag behind the encoder.

    References
    ----------
    Cheng et al. (2026), "Information shapes Koopman representation", arXiv 2510.13025.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.dynamics import KoopmanAutoencoder
    >>> t = np.arange(80) / 5
    >>> x = [np.stack([np.cos(t + phase), np.sin(t + phase)], 1) for phase in (0, 1, 2)]
    >>> model = KoopmanAutoencoder(4, hidden=(16,), epochs=2, random_state=0).fit(x)
    >>> model.transform(x[0]).shape, model.predict(x[0][:2], 5).shape
    ((80, 4), (2, 5, 2))
    """

    dim: Count = 32
    alpha: NonNegative = 2.0
    beta: NonNegative = 0.0
    gamma: float = 0.1
    id_weight: NonNegative = 0.1
    neighbours: Count = 3
    temperature: Positive = 0.1
    negatives: Literal["sequence", "batch"] = "sequence"
    operator: OperatorKind = "pooled"
    ridge: Positive = 0.1
    detach_operator: bool = True
    clip_spectral_radius: Positive | None = None
    hidden: Sequence[int] = (96, 96)
    width: Count = 16
    dropout: Share = 0.0
    encoder: nn.Module | None = None
    decoder: nn.Module | None = None
    window: Count = 16
    epochs: Count = 20
    batch_size: Count = 16
    learning_rate: Positive = 1e-3
    gradient_clip: Positive | None = 1.0
    validation: Share = 0.0
    trainer: Mapping[str, Any] | None = None
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None, *, inputs: Any = None) -> KoopmanAutoencoder:
        """Train on trajectories X: (n, c) vectors or (n, c, h, w) fields, a list or an array of these, or a `Series`.

        inputs: rows (n, m) that act on the step from each state to the next, in the same form.

        Raises ValueError for NaN, trajectories of other widths, and windows that are too short for the neighbours.
        """
        self._check_parameters()
        parts = self._trajectories(X, reset=True)
        acting = self._inputs_of(inputs, [len(part) for part in parts])
        window = min(int(self.window), max(map(len, parts)) - 1)
        if self.alpha and window <= 2 * self.neighbours + (self.negatives == "sequence"):
            least = 2 * self.neighbours + 1 + (self.negatives == "sequence")
            raise ValueError(
                f"window: {window} steps do not hold {self.neighbours} neighbours on each side of a step and others; "
                f"at least {least}, of trajectories of {least + 1} rows, or alpha=0"
            )
        short = sum(len(part) <= window for part in parts)
        if short:
            warnings.warn(
                f"X: {short} of {len(parts)} trajectories are shorter than a window of {window} steps, and only count "
                "in the final operator",
                stacklevel=2,
            )
        self._set_scale(parts)
        states = [self._scaled(part).float() for part in parts]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(check_random_state(self.random_state).randint(2**31)))
            network = KoopmanNetwork(
                self._shape,
                int(self.dim),
                n_inputs=0 if acting is None else acting[0].shape[1],
                operator=self.operator,
                ridge=float(self.ridge),
                detach_operator=bool(self.detach_operator),
                hidden=tuple(map(int, self.hidden)),
                width=int(self.width),
                dropout=float(self.dropout),
                encoder=copy.deepcopy(self.encoder),
                decoder=copy.deepcopy(self.decoder),
            )
            self._train(network, states, acting, window)
        self.network_ = network.eval().requires_grad_(False)
        self._refit([self._encoded(x) for x in states], acting)
        return self

    def _trajectories(self, X: Any, *, reset: bool) -> list[Tensor]:
        """Checked trajectories on the CPU, each (n, *state)."""
        axes = np.ndim(X[0]) if isinstance(X, list | tuple) and len(X) else getattr(X, "ndim", 2)
        fields = axes >= 4 or (not reset and len(self._shape) == 3)
        parts = listed_trajectories(X, 4 if fields else 2)
        return [self._items(part, reset=reset and i == 0).detach().cpu() for i, part in enumerate(parts)]

    def _inputs_of(self, inputs: Any, lengths: list[int]) -> list[Tensor] | None:
        """Inputs of each trajectory, standardised."""
        if inputs is None:
            self._acting = None
            return None
        parts = [check_matrix(part, "inputs").detach().cpu() for part in listed_trajectories(inputs)]
        if [len(part) for part in parts] != lengths or len({part.shape[1] for part in parts}) > 1:
            raise ValueError(f"inputs: expected trajectories of {lengths} rows, got {[len(part) for part in parts]}")
        every = torch.cat(parts).double()
        deviation = every.std(0, correction=0)
        self._acting = every.mean(0), torch.where(deviation > 1e-10, deviation, 1)
        return [self._given_inputs(part) for part in parts]

    def _given_inputs(self, inputs: Any) -> Tensor:
        assert self._acting is not None
        mean, scale = self._acting
        return ((as_tensor(inputs, "inputs").detach().cpu().double() - mean) / scale).float()

    def _set_scale(self, parts: list[Tensor]) -> None:
        """Mean and deviation of each column, or of each channel of fields."""
        axes = (0,) if len(self._shape) == 1 else (0, 2, 3)
        counts = torch.tensor([float(part[:, 0].numel() if len(axes) > 1 else len(part)) for part in parts])
        share = (counts / counts.sum()).double()
        means = torch.stack([part.double().mean(axes) for part in parts])
        mean = share @ means
        spread = torch.stack([part.double().var(axes, correction=0) for part in parts])
        deviation = (share @ (spread + (means - mean).square())).sqrt()
        largest = torch.stack([part.double().abs().amax(axes) for part in parts]).amax(0)
        scale = torch.where(deviation <= 1e-10 * largest, 1, deviation)
        shape = (-1, *[1] * (len(self._shape) - 1))
        self._mean, self._scale = mean.view(shape), scale.view(shape)

    def _scaled(self, x: Tensor) -> Tensor:
        return (x.double().cpu() - self._mean) / self._scale

    def _train(self, network: KoopmanNetwork, states: list[Tensor], acting: list[Tensor] | None, window: int) -> None:
        from subspan.nn import Objective

        held = torch.randperm(len(states)).tolist()[: int(np.ceil(self.validation * len(states)))]
        if len(held) == len(states):
            raise ValueError(f"validation: leaves no trajectory of {len(states)} to train on")
        kept = [i for i in range(len(states)) if i not in held]

        def windows(chosen: list[int]) -> _Windows:
            inputs = None if acting is None else [acting[i] for i in chosen]
            return _Windows([states[i] for i in chosen], inputs, window)

        loss = InformationKoopmanLoss(
            float(self.alpha), float(self.beta), float(self.gamma), float(self.id_weight),
            neighbours=int(self.neighbours), temperature=float(self.temperature), negatives=self.negatives,
        )  # fmt: skip
        objective = Objective(network, loss, optimizer="adam", learning_rate=self.learning_rate)
        options: dict[str, Any] = {"max_epochs": self.epochs, "gradient_clip_val": self.gradient_clip}
        options |= {"num_sanity_val_steps": 0, **(self.trainer or {})}
        others = None
        if held and len(windows(held)):
            others = DataLoader(windows(held), 4 * int(self.batch_size))
            options["callbacks"] = [*(options.get("callbacks") or []), keep_best(network)]
        with quiet_trainer(**options) as trainer:
            trainer.fit(objective, DataLoader(windows(kept), int(self.batch_size), shuffle=True), others)
        self.losses_ = list(objective.losses)
        network.cpu()

    def _refit(self, latents: list[Tensor], acting: list[Tensor] | None) -> None:
        """One operator for the latents of all rows."""
        options: dict[str, Any] = {"clip_spectral_radius": self.clip_spectral_radius, "ridge": _REFIT_RIDGE}
        operator = KoopmanOperator(fit_intercept=False, standardize=False, **options)
        self.dynamics_ = operator.fit([in_numpy(z) for z in latents], inputs=acting)
        self.eigenvalues_ = self.dynamics_.eigenvalues_
        every = torch.cat(latents)
        self.effective_dimension_ = effective_dimension(every)
        self.subspace_ = Subspace.fit(every.double(), rank=min(len(every) - 1, int(self.dim)))
        self._n_features_out = int(self.dim)

    # ------------------------------------------------------------------ use

    @torch.no_grad()
    def _encoded(self, scaled: Float[Tensor, "n p *s"]) -> Float[Tensor, "n d"]:
        """Latents in double precision: the answer for a row does not depend on its block."""
        network = copy.deepcopy(self.network_).double()
        return torch.cat([network.encode(block) for block in scaled.double().split(_BLOCK)])

    @torch.no_grad()
    def _decoded(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n p *s"]:
        network = copy.deepcopy(self.network_).double()
        return torch.cat([network.decode(block) for block in z.double().split(_BLOCK)]) * self._scale + self._mean

    def transform(self, X: Any) -> Any:
        """Latents (n, dim) of states X (n, *state)."""
        check_is_fitted(self, "network_")
        items = self._items(X)
        return like(self._encoded(self._scaled(items)).to(items.dtype), X)

    def inverse_transform(self, Z: Any) -> Any:
        """The states that latents Z (n, dim) stand for, in the data's units."""
        check_is_fitted(self, "network_")
        z = check_matrix(Z, "Z", columns=int(self.dim))
        return like(self._decoded(z.cpu()).to(z.dtype), Z)

    def predict(self, X: Any, n_steps: int = 1, inputs: Any = None) -> Any:
        """The states (n, n_steps, *state) that follow each of the states X (n, *state).

        inputs: (n_steps, m) for all, or (n, n_steps, m). Nothing is encoded again on the way.
        """
        check_is_fitted(self, "network_")
        items = self._items(X)
        acts = None
        if inputs is not None:
            if self._acting is None:
                raise ValueError("inputs: the autoencoder was fitted without inputs, got some")
            acts = self._given_inputs(check_finite(as_tensor(inputs, "inputs"), "inputs"))
        z = self.dynamics_.predict(self._encoded(self._scaled(items)), n_steps, acts)
        found = self._decoded(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return like(found.to(items.dtype), X)

    def score(self, X: Any, y: Any = None, *, n_steps: int = 1) -> float:
        """Minus the root mean square error `n_steps` ahead over the data's standard deviation: 0 is best."""
        check_is_fitted(self, "network_")
        parts = [part.numpy() for part in self._trajectories(X, reset=False)]
        return -rollout_errors(lambda x, steps: self.predict(x[:, -1], steps), parts, [n_steps], starts=64)[n_steps]
