"""Rep4Ex: a hidden state out of observations, up to an affine map, and what actions beyond those tried would do."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin, clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import check_matrix, like
from subspan.base.estimators import Estimator
from subspan.base.modules import applied
from subspan.base.parameters import Count, NonNegative, Positive, Seed, Share
from subspan.geometry import AffineMap, Subspace, Whitener
from subspan.nn import MLP, ConvDecoder, ConvEncoder
from subspan.nn.training import RowBatches, quiet_trainer
from subspan.statistics import Moments

from .control_function import (
    ControlFunctionRegressor,
    FirstStage,
    Interval,
    check_actions,
    check_outcomes,
    first_stage,
    warn_weak,
)
from .linear_invariance import InvarianceTest, Kernel, LinearInvarianceLoss, kernel_width, linear_invariance_test

_BLOCK = 1024
# Rows a latent and an action; ratio of variances of latents below which one is lost; actions too few for an open set.
_ROWS_EACH, _LOST, _FEW_LEVELS = 10, 1e-6, 10
# Principal components of X that the dimension of the state is looked for in, and rows of the test in a fit.
_COMPONENTS, _TESTED = 20, 5000


class Rep4ExAutoencoder(nn.Module):
    """Observations (n, p), or images (n, c, h, w) in [0, 1], to latents (n, dim) and back.

    Parameters
    ----------
    input_shape
        (p,) or (c, h, w).
    dim
        Of the latents.
    hidden
        Units of hidden layers between vectors and latents, and back in the other order, with leaky ReLU.
    width
        Of `ConvEncoder` and `ConvDecoder`, which read and write images.
    encoder, decoder
        Any modules in place of these: from what comes in to (n, dim), and back.

    Raises
    ------
    ValueError
        For sizes that do not fit; in use for an encoder of another width.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import Rep4ExAutoencoder
    >>> model = Rep4ExAutoencoder((10,), 2)
    >>> model.encode(torch.randn(5, 10)).shape, model(torch.randn(5, 10))[0].shape
    (torch.Size([5, 2]), torch.Size([5, 10]))
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        dim: int,
        *,
        hidden: Sequence[int] = (64, 64),
        width: int = 16,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        shape: Any = tuple(input_shape)
        if len(shape) not in (1, 3):
            raise ValueError(f"input_shape: expected (p,) or (c, h, w), got {shape}")
        if dim < 1:
            raise ValueError(f"dim: at least 1, got {dim}")
        self.dim = dim
        vectors = len(shape) == 1
        if encoder is None:
            sizes = (*shape, *hidden, dim)
            encoder = MLP(sizes, activation="leaky_relu") if vectors else ConvEncoder(shape, dim, width=width)
        if decoder is None:
            sizes = (dim, *reversed(hidden), *shape)
            decoder = MLP(sizes, activation="leaky_relu") if vectors else ConvDecoder(dim, shape, width=width)
        self.encoder, self.decoder = encoder, decoder

    def encode(self, x: Float[Tensor, "n p *s"]) -> Float[Tensor, "n d"]:
        """Latents."""
        z = self.encoder(x)
        if z.shape != (len(x), self.dim):
            raise ValueError(f"encoder: expected {(len(x), self.dim)} latents of {len(x)} items, got {tuple(z.shape)}")
        return z

    def decode(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n p *s"]:
        """What latents stand for."""
        return self.decoder(z)

    def forward(self, x: Float[Tensor, "n p *s"]) -> tuple[Float[Tensor, "n p *s"], Float[Tensor, "n d"]]:
        """What comes back, and the latents."""
        z = self.encode(x)
        return self.decode(z), z


class Rep4ExLoss(nn.Module):
    """Share of the variance that is not reconstructed, and the weighted loss of linear invariance.

    ``loss(model, (x, a))`` of a `Rep4ExAutoencoder`, or of any model of x that returns its reconstruction and latents,
    so that ``Objective(model, Rep4ExLoss(…))`` trains it. Batches should be large: the constraint is one on means.

    Parameters
    ----------
    penalty
        Weight of the invariance.
    warmup
        Steps in which the weight rises from 0 to that.
    invariance
        None: `LinearInvarianceLoss()`.

    Raises
    ------
    ValueError
        For a penalty or a warm-up below 0, and a batch without variance.

    References
    ----------
    Saengkyongam et al. (2024), arXiv 2310.04295.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import Rep4ExAutoencoder, Rep4ExLoss
    >>> terms = Rep4ExLoss(warmup=10)(Rep4ExAutoencoder((6,), 2), (torch.randn(64, 6), torch.rand(64, 2)), step=0)
    >>> sorted(terms), terms["invariance"].item()
    (['invariance', 'reconstruction'], 0.0)
    """

    def __init__(
        self, penalty: float = 10.0, *, warmup: int = 0, invariance: LinearInvarianceLoss | None = None
    ) -> None:
        super().__init__()
        for name, value in (("penalty", penalty), ("warmup", warmup)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: must be 0 or more and finite, got {value}")
        self.penalty, self.warmup = penalty, warmup
        self.invariance = LinearInvarianceLoss() if invariance is None else invariance

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"penalty={self.penalty:g}, warmup={self.warmup}"

    def forward(self, model: nn.Module, batch: Sequence[Tensor], step: int | None = None) -> dict[str, Tensor]:
        """The terms of a batch (x, a); without a step the weight is whole."""
        x, a = batch[0], batch[1]
        variance = x.var(0, correction=0).mean()
        if not bool(variance > 0):
            raise ValueError("x: all rows of the batch are the same")
        again, z = model(x)
        share = 1.0 if step is None or not self.warmup else min(1.0, step / self.warmup)
        terms = {"reconstruction": F.mse_loss(again, x) / variance}
        if self.penalty:
            terms["invariance"] = share * self.penalty * self.invariance(z, a)
        return terms


@dataclass(eq=False, repr=False)
class Rep4Ex(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """Predict what actions beyond those tried would do, from rich observations: E[Y | do(A = a)].

    Z = M A + V moves unseen, X = g(Z) is observed, and Y = l(Z) + U, where U and V may hang together: a regression of Y
    on X, or of Y on A beyond the actions tried, is wrong then. An autoencoder whose latents have a mean that is affine
    in A recovers Z up to an affine map; `ControlFunctionRegressor` does the rest. Needs the extra `train`.

    Assumed, and not to be seen in the data but for `invariance_`: A moves Z linearly, in all its directions, and was
    drawn independently of U and V; A has an open set of values; V has no bounds; g is invertible, without noise.

    Parameters
    ----------
    dim
        Dimensions of Z. None: as many as A moves X in, linearly, at the level of 1 %, which is never more than A has.
    penalty
        Weight of linear invariance; between 1 and 100 it hardly matters.
    kernel, n_features, bandwidth
        Of `LinearInvarianceLoss`; the bandwidth in standard deviations of the actions.
    scaling
        Columns of X are brought to unit variance, or ("common") all to one scale: principal components, whose variances
        tell what matters. Images stay as they are.
    hidden, encoder, decoder
        Of `Rep4ExAutoencoder`; those given are trained as far as their parameters require gradients, in a copy.
    max_steps, batch_size, learning_rate, warmup
        Of the training by Adam at a rate that falls to 0; warmup is the share of the steps in which the penalty rises.
    control
        None: `ControlFunctionRegressor` as it comes.
    trainer
        Options of Lightning's Trainer (devices, callbacks, progress, …).
    random_state
        Seed of the training.

    Attributes
    ----------
    dim_
        Dimensions of the latents.
    subspace_
        Directions of the latents that actions move: what they identify.
    first_stage_, action_map_
        How actions move latents: `FirstStage`, and its affine map.
    control_
        The fitted `ControlFunctionRegressor`, where there were outcomes.
    invariance_
        `InvarianceTest` of the rows of the fit.
    reconstruction_error_
        Share of the variance of X that the decoder does not give back.
    network_, whitener_
        The trained `Rep4ExAutoencoder`, and what brings its latents to mean 0 and unit covariance.
    losses_
        Mean loss of the training.

    References
    ----------
    Saengkyongam, Rosenfeld, Ravikumar, Pfister & Peters (2024), Identifying representations for intervention
    extrapolation, arXiv 2310.04295. White latents and random features are ours, and so are all tests.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.dynamics import ControlFunctionRegressor, Rep4Ex
    >>> rng = np.random.default_rng(0)
    >>> a, v = rng.uniform(-1, 1, size=(600, 1)), rng.normal(size=(600, 1))
    >>> z = 2 * a + v
    >>> x, y = np.hstack([z, np.tanh(z), np.exp(z / 2)]), 3 * z[:, 0] - 4 * v[:, 0]
    >>> model = Rep4Ex(max_steps=30, control=ControlFunctionRegressor("linear"), random_state=0).fit(x, a, y)
    >>> model.transform(x).shape, model.predict_do([[1.5], [0.0]]).shape, model.predict(x[:4], a[:4]).shape
    ((600, 1), (2,), (4,))
    """

    dim: Count | None = None
    penalty: NonNegative = 10.0
    kernel: Kernel = "features"
    n_features: Count = 128
    bandwidth: Literal["median"] | Positive = "median"
    scaling: Literal["columns", "common"] = "columns"
    hidden: Sequence[int] = (64, 64)
    encoder: nn.Module | None = None
    decoder: nn.Module | None = None
    max_steps: Count = 1500
    batch_size: Count = 2048
    learning_rate: Positive = 2e-3
    warmup: Share = 0.2
    control: ControlFunctionRegressor | None = None
    trainer: Mapping[str, Any] | None = None
    random_state: Seed = None

    def fit(self, X: Any, A: Any, y: Any = None) -> Rep4Ex:
        """Train on observations X (n, p) or images, actions A (n, d_a) or (n,), and outcomes y (n,).

        y: NaN where an outcome is not known; None for the latents alone. Warns of weak actions, actions of few values,
        and latents that lost a dimension. Raises ValueError for NaN in X or A, numbers of rows that do not fit, actions
        that cannot move `dim` directions, and fewer than 10 rows for each latent and action.
        """
        self._check_parameters()
        items = self._items(X, reset=True)
        rows = items.detach().float().cpu()
        actions = check_actions(A, rows=len(rows))
        self.dim_ = self._dimensions(rows, actions)
        check_actions(actions, rows=len(rows), state=self.dim_)
        least = _ROWS_EACH * (self.dim_ + actions.shape[1])
        if len(rows) < least:
            raise ValueError(
                f"X: {len(rows)} rows of {self._shape[0]} feature(s) are too few; {self.dim_} latents and "
                f"{actions.shape[1]} actions need {least}"
            )
        if y is not None:
            check_outcomes(y, len(rows), least=least)
        self._warn_levels(actions)
        self._set_scale(rows)
        scaled = (actions - actions.mean(0)) / actions.std(0).clamp_min(1e-300)
        seed = int(check_random_state(self.random_state).randint(2**31))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._train((rows - self._mean) / self._scale, scaled.float())
        z = self._set_latents(items).double().cpu()
        some = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:_TESTED]
        self.invariance_ = self._tested(z[some], scaled[some], seed)
        self._second(z, actions, y, seed)
        return self

    def _dimensions(self, rows: Tensor, actions: Tensor) -> int:
        """As given, or as many as actions move the leading principal components of rows in."""
        if rows.ndim == 4:
            if self.dim is None:
                raise ValueError("dim: of images it has to be given")
            if self.decoder is None and (float(rows.min()) < 0 or float(rows.max()) > 1):
                raise ValueError(f"X: pixels must lie in [0, 1], got {float(rows.min()):g} to {float(rows.max()):g}")
        if not bool((rows != rows[0]).any()):
            raise ValueError("X: all rows are the same")
        if self.dim is not None:
            return int(self.dim)
        most = min(_COMPONENTS, rows.shape[1], max(1, len(rows) // (2 * _ROWS_EACH)))
        leading = Subspace.fit(rows.double(), rank=Moments(rows.shape[1]).update(rows).subspace(rank=most).dim)
        return first_stage(leading.coordinates(rows.double()), actions).subspace.dim

    def _warn_levels(self, actions: Tensor) -> None:
        levels = len(actions.unique(dim=0))
        rank = Subspace.span(actions - actions.mean(0)).dim
        if levels <= rank + 1:
            warnings.warn(
                f"A: {levels} different actions: every mean is affine in them, and linear invariance says nothing; the "
                "latents are those of a plain autoencoder",
                stacklevel=3,
            )
        elif levels < _FEW_LEVELS**rank and levels < len(actions):
            warnings.warn(
                f"A: {levels} different actions; latents are identified by an open set of actions, and by few only "
                "as far as few means say",
                stacklevel=3,
            )

    def _set_scale(self, rows: Tensor) -> None:
        """Rows are centred and brought to unit variance, flat columns left at 0; images stay as they are."""
        self._mean, self._scale = torch.zeros(()), torch.ones(())
        if rows.ndim == 2:
            wide = rows.double()
            deviation = wide.std(0, correction=0)
            if self.scaling == "common":
                deviation = deviation.square().mean().sqrt().expand_as(deviation)
            flat = deviation <= 1e-10 * wide.abs().amax(0)
            self._mean, self._scale = wide.mean(0).float(), torch.where(flat, 1, deviation).float()

    def _train(self, rows: Tensor, actions: Tensor) -> None:
        from subspan.nn import Objective

        encoder, decoder = copy.deepcopy((self.encoder, self.decoder))
        options: Any = {"hidden": tuple(self.hidden), "encoder": encoder, "decoder": decoder}
        network = Rep4ExAutoencoder(self._shape, self.dim_, **options)
        width = kernel_width(actions[torch.randperm(len(actions))]) if self.bandwidth == "median" else self.bandwidth
        invariance = LinearInvarianceLoss(self.kernel, n_features=int(self.n_features), bandwidth=float(width))
        steps = int(self.max_steps)
        loss = Rep4ExLoss(float(self.penalty), warmup=round(self.warmup * steps), invariance=invariance)
        batches = RowBatches(rows, actions, size=int(self.batch_size), steps=steps)
        rate = float(self.learning_rate)
        objective = Objective(network, loss, optimizer="adam", learning_rate=rate, schedule="cosine")
        with quiet_trainer(**{"max_epochs": 1, **(self.trainer or {})}) as trainer:
            trainer.fit(objective, batches)
        self.losses_ = list(objective.losses)
        self.network_ = network.cpu().eval().requires_grad_(False)

    def _set_latents(self, items: Tensor) -> Float[Tensor, "n d"]:
        """White latents of the rows of the fit, and what makes them white."""
        scaled = self._scaled(items)
        z = applied(self.network_, scaled, "encode", size=_BLOCK)
        again = applied(self.network_, z, "decode", size=_BLOCK)
        self.reconstruction_error_ = float(F.mse_loss(again, scaled) / scaled.var(0, correction=0).mean())
        moments = Moments(self.dim_).update(z)
        covariance = moments.covariance()
        values, vectors = torch.linalg.eigh(covariance)
        if not float(values[0]) > _LOST * float(values[-1]):
            lost = ", ".join(f"{entry:.2g}" for entry in vectors[:, 0].tolist())
            warnings.warn(
                f"dim: latents have no variance along ({lost}) of {self.dim_} dimensions; choose a smaller dim, or "
                "train longer",
                stacklevel=3,
            )
        self.whitener_ = Whitener.of(covariance, moments.mean, tolerance=1e-12)
        self._n_features_out = self.dim_
        return self.whitener_.whiten(z.double())

    def _second(self, z: Tensor, actions: Tensor, y: Any, seed: int) -> None:
        """The first stage and, where there are outcomes, the control function."""
        self.__dict__.pop("control_", None)
        if y is None:
            self.first_stage_: FirstStage = first_stage(z, actions)
            if self.first_stage_.weak:
                warn_weak(self.first_stage_, stacklevel=3)
        else:
            control: Any = ControlFunctionRegressor(random_state=seed) if self.control is None else clone(self.control)
            self.control_ = control.fit(z, actions, y)
            self.first_stage_ = self.control_.first_stage_
        self.action_map_: AffineMap = self.first_stage_.map
        self.subspace_: Subspace = self.first_stage_.subspace

    # ------------------------------------------------------------------ use

    def _scaled(self, items: Tensor) -> Tensor:
        return (items - self._mean.to(items)) / self._scale.to(items)

    def _latents(self, items: Tensor) -> Float[Tensor, "n d"]:
        return self.whitener_.whiten(applied(self.network_, self._scaled(items), "encode", size=_BLOCK))

    def transform(self, X: Any) -> Any:
        """Latents (n, dim_) of X: the hidden state up to an affine map, of unit covariance in the fit."""
        check_is_fitted(self, "network_")
        return like(self._latents(self._items(X)), X)

    def inverse_transform(self, Z: Any) -> Any:
        """The observations that latents Z (n, dim_) stand for."""
        check_is_fitted(self, "network_")
        z = self.whitener_.unwhiten(check_matrix(Z, "Z", columns=self.dim_))
        again = applied(self.network_, z, "decode", size=_BLOCK)
        return like(again * self._scale.to(again) + self._mean.to(again), Z)

    def _controlled(self) -> ControlFunctionRegressor:
        check_is_fitted(self, "network_")
        if not hasattr(self, "control_"):
            raise ValueError("y: the fit had no outcomes; give them to fit to predict any")
        return self.control_

    def predict_do(self, A: Any) -> Any:
        """E[Y | do(A = a)] (m,) for actions A (m, d_a), also beyond those of the fit.

        Warns where most of the states that an action would lead to lie outside those that were seen (`support`).
        """
        return self._controlled().predict_do(A)

    def predict(self, X: Any, A: Any) -> Any:
        """E[Y | X = x, do(A = a)] (n,) of observations X, each under its action in A (n, d_a)."""
        control, items = self._controlled(), self._items(X)
        return like(torch.as_tensor(control.predict(self._latents(items), A)), X)

    def support(self, A: Any) -> Any:
        """Share (m,) of the states that each action would lead to which were not seen; see the regressor's."""
        return self._controlled().support(A)

    def predict_interval(
        self, A: Any, *, level: float = 0.95, n_resamples: int = 50, random_state: Seed = None
    ) -> Interval:
        """Bootstrap interval of `predict_do`, of the second stage alone: latents are taken as they are."""
        options: Any = {"level": level, "n_resamples": n_resamples, "random_state": random_state}
        return self._controlled().predict_interval(A, **options)

    def invariance_test(self, X: Any, A: Any, *, random_state: Seed = None) -> InvarianceTest:
        """Whether latents of X, best rows that were not trained on, keep to linear invariance in A."""
        check_is_fitted(self, "network_")
        z = self._latents(self._items(X)).double().cpu()
        seed = int(check_random_state(random_state).randint(2**31))
        actions = check_actions(A, rows=len(z))
        return self._tested(z, (actions - actions.mean(0)) / actions.std(0).clamp_min(1e-300), seed)

    def _tested(self, z: Tensor, scaled: Tensor, seed: int) -> InvarianceTest:
        width: Any = self.bandwidth if isinstance(self.bandwidth, str) else float(self.bandwidth)
        return linear_invariance_test(z, scaled, bandwidth=width, generator=torch.Generator().manual_seed(seed))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags
