"""Deep subspace clustering without labels or tuning (Sindičić & Kopriva, 2025), and DSC-Net (Ji et al., 2017)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from subspan.base import check_finite, like, normalize_rows
from subspan.base.estimators import Estimator, in_numpy, validate_data
from subspan.base.modules import evaluation
from subspan.base.parameters import Bounds, Count, NonNegative, Positive, Seed, Whole
from subspan.geometry.rank import Rank
from subspan.measures import modularity
from subspan.models import Capture, layer_names
from subspan.nn import ConvAutoencoder, LinearAutoencoder
from subspan.solvers.nearest_subspace import group_subspaces, nearest_subspace, stack_subspaces
from subspan.solvers.self_expression import check_dense, check_rows, joint_factor
from subspan.solvers.spectral import low_rank_affinity, retained_affinity, spectral_labels

from .self_expressive import check_cluster_count, warn_of_copies

if TYPE_CHECKING:
    from .deep_training import Autoencoder

STAGES = ("pretrain", "express", "structure")
_BATCH = 256


class _EncodingClusterer(ClusterMixin, Estimator):
    """What the methods of `_DeepClusterer` read beside its parameters."""

    layers: Any = "last"
    affine: Any = False
    encoder_: Any
    subspaces_: Any
    _random: Any


@dataclass(eq=False, repr=False)
class _DeepClusterer(_EncodingClusterer):
    """Items in, through an encoder, to coefficients and clusters; unseen items by the subspaces of the layers."""

    n_clusters: Count = 8
    _: KW_ONLY
    encoder: Literal["conv", "linear"] | nn.Module = "conv"
    channels: Sequence[Count] = (3, 3, 5)
    kernels: Sequence[Count] = (3, 3, 3)
    hidden: Sequence[Count] = (64, 32)
    max_steps: Count = 700
    pretrain_steps: Whole = 100
    learning_rate: Positive = 1e-3
    rank: Rank = 0.9
    n_init: Count = 20
    device: str | torch.device = "cpu"
    random_state: Seed = None

    # ------------------------------------------------------------------ at the door

    def _items(self, X: Any, *, reset: bool) -> Tensor:
        """Finite float32 items (n, …) on the CPU; for the auto-encoders divided by their largest absolute value."""
        images = isinstance(self.encoder, nn.Module) or self.encoder == "conv"
        given: Any = validate_data(
            self, in_numpy(X), reset=reset, dtype=np.float32, allow_nd=images, ensure_min_samples=2 if reset else 1
        )
        items = torch.from_numpy(np.array(given))
        if self.encoder == "conv":
            if items.ndim not in (3, 4):
                raise ValueError(
                    f"X: encoder='conv' takes images (n, h, w) or (n, c, h, w), got shape {tuple(items.shape)}; "
                    "use encoder='linear' for vectors"
                )
            items = items.unsqueeze(1) if items.ndim == 3 else items
        if reset:
            check_cluster_count(self.n_clusters, len(items))
            check_dense(len(items))
            self._shape = tuple(items.shape[1:])
            self._largest = 1.0 if isinstance(self.encoder, nn.Module) else float(items.abs().max())
            if not self._largest > 0:
                raise ValueError("X: all values are zero; there is nothing to cluster")
            rows = items.flatten(1) / self._largest
            self._mean = rows.mean(0)
            self._size = float((rows - self._mean).square().sum(1).mean().sqrt())
            if self.affine and not self._size > 0:
                raise ValueError("X: all rows are the same; there is nothing to cluster")
        elif tuple(items.shape[1:]) != self._shape:
            raise ValueError(f"X: expected items of shape {self._shape}, as in fit, got {tuple(items.shape[1:])}")
        return items / self._largest

    def _autoencoder(self) -> Autoencoder | None:
        """An untrained auto-encoder of the items, None for a network that is given."""
        if isinstance(self.encoder, nn.Module):
            return None
        if self.encoder == "conv":
            c, h, w = self._shape
            return ConvAutoencoder((c, h, w), list(self.channels), list(self.kernels))
        return LinearAutoencoder([self._shape[0], *self.hidden])

    def _train(self, module: Any, items: Tensor, steps: int, loss: Callable[..., Tensor] | None = None) -> int:
        """Train on all items at once by Adam, as published; the steps it took."""
        from subspan.nn import Objective
        from subspan.nn.training import quiet_trainer

        from .deep_training import all_items

        objective = Objective(
            module,
            type(module).training_loss if loss is None else loss,
            optimizer="adam",
            learning_rate=self.learning_rate,
            after_step=getattr(type(module), "watch", None),
        )
        kind = torch.device(self.device).type
        with quiet_trainer(max_epochs=1, accelerator="gpu" if kind == "cuda" else kind, devices=1) as trainer:
            trainer.fit(objective, all_items(items, steps))
        module.cpu()
        return int(trainer.global_step)

    def _seed(self) -> int:
        return int(self._random.randint(2**31 - 1))

    # ------------------------------------------------------------------ layers

    def _points(self, items: Tensor) -> Float[Tensor, "n d"]:
        """The items as rows of unit length, with their constant where `affine`."""
        rows = items.flatten(1)
        if self.affine:
            rows = torch.cat([rows - self._mean, torch.full_like(rows[:, :1], self._size)], dim=1)
        return normalize_rows(rows)

    @torch.no_grad()
    def _layers(self, items: Tensor) -> list[Float[Tensor, "n _"]]:
        """The layers that are expressed, each with rows of unit length."""
        first = [self._points(items)] if self.layers == "all" else []
        if not isinstance(self.encoder_, ConvAutoencoder | LinearAutoencoder):
            return first + self._hooked(items)
        found = [[layer.flatten(1) for layer in self.encoder_.encode(part)] for part in items.split(_BATCH)]
        layers = [normalize_rows(torch.cat(layer)) for layer in zip(*found)]
        return first + layers if self.layers == "all" else layers[-1:]

    def _hooked(self, items: Tensor) -> list[Tensor]:
        children = [name for name, _ in self.encoder_.named_children()]
        if self.layers in ("all", "last") and not children:
            names = [""]
        else:
            chosen = {"all": children, "last": children[-1:]}.get(self.layers) if isinstance(self.layers, str) else None
            names = layer_names(self.encoder_, self.layers if chosen is None else chosen)
        parts: list[Sequence[Tensor]] = []
        with evaluation(self.encoder_), Capture(self.encoder_, names) as states:
            for part in items.split(_BATCH):
                states.run(part)
                parts.append([states.by_sample(name).flatten(1).float().cpu() for name in names])
        layers = [torch.cat(layer) for layer in zip(*parts)]
        return [normalize_rows(check_finite(layer, f"encoder, layer {name!r}")) for name, layer in zip(names, layers)]

    def _joined(self, items: Tensor) -> Float[Tensor, "n d"]:
        """All layers side by side, each of the same weight: rows of unit length."""
        layers = self._layers(items)
        return torch.cat(layers, dim=1) / len(layers) ** 0.5

    def _keep(self, X: Any, items: Tensor, labels: np.ndarray) -> None:
        found = torch.from_numpy(labels)
        # An affine subspace of the items is a linear one of the items with their constant.
        spaces = group_subspaces(self._joined(items), found, self.n_clusters, rank=self.rank, affine=False)
        self.subspaces_ = stack_subspaces(spaces)
        self.labels_ = like(found, X)

    def predict(self, X: Any) -> Any:
        """The cluster (m,) whose subspace, in the layers side by side, is nearest to each item of X."""
        check_is_fitted(self)
        labels = nearest_subspace(self._joined(self._items(X, reset=False)), self.subspaces_)
        return like(labels, X)


@dataclass(eq=False, repr=False, kw_only=True)
class DeepSubspaceClustering(_DeepClusterer):
    """Cluster items by one self-expression C of all layers of an encoder, trained with it, without labels or tuning.

    Stages: "pretrain", an auto-encoder on the reconstruction; "express", C and the auto-encoder on the self-expression
    of the items and of every layer, rows of unit length, reconstruction kept; "structure", the affinity between the
    clusters of C at that step is taken away. "express" is looked at every `look_every` steps, and the look whose
    clusters have the largest modularity in their own affinity is kept; it ends after five looks without a larger one,
    or max_steps. Memory O(n^2), up to 20 000 items. Needs the extra `train`.

    Parameters
    ----------
    n_clusters
        Number of clusters.
    encoder
        "conv", images (n, h, w) or (n, c, h, w); "linear", vectors (n, d); both divide X by its largest absolute value.
        Or any nn.Module, used as it is on X and not trained, whose layers are taken by hooks.
    channels, kernels
        Of the stride-2 convolutions of "conv".
    hidden
        Sizes of the layers of "linear".
    max_steps, pretrain_steps
        Training steps of "express", at most, and of "pretrain".
    learning_rate
        Of Adam, on all items at once.
    rank
        Of `subspaces_`: a number of directions, a share of the energy in (0, 1), or a rule.
    n_init
        Starts of the spectral clustering.
    device
        Of the training.
    random_state
        Seed of the weights and the clustering.
    layers
        "all", the items and each layer (of a module: each direct child); "last", that one alone; for a module also what
        `models.layer_names` takes, without the items.
    stages
        Some of the three, in this order; "express" cannot be left out.
    retain
        Entries of each row of (|C| + |C|')/2 that go into the affinity, near the dimension of the subspaces (9 for
        faces and objects, 12 for digits); None for all.
    affine
        Whether a constant is appended to the items, as large as they are about their mean.
    look_every
        Steps between looks.
    structure_steps
        "structure" ends after 10 steps without a change of labels, or these steps.

    Attributes
    ----------
    labels_
        (n,), in the kind of X.
    representation_, affinity_
        C (n, n), dense; and (n, n), CSR.
    subspaces_
        By cluster, in the layers side by side, where `predict` looks for the nearest.
    encoder_
        The trained network, or the one that was given.
    n_steps_, history_, looks_
        Steps by stage; loss by step and (step, modularity) by look of "express".

    References
    ----------
    Sindičić & Kopriva, arXiv 2504.18179 (2025); the choice of the step, the diagonal of zeros and the scaling of layers
    are ours.

    Examples
    --------
    >>> from subspan.cluster import DeepSubspaceClustering
    >>> model = DeepSubspaceClustering(20, encoder="linear", hidden=(64, 16), random_state=0)
    >>> labels = model.fit_predict(vectors)  # doctest: +SKIP
    >>> model.stages
    ('pretrain', 'express', 'structure')
    """

    layers: str | Sequence[str | int] = "all"
    stages: Sequence[Literal["pretrain", "express", "structure"]] = STAGES
    retain: Count | None = 9
    affine: bool = False
    look_every: Count = 50
    structure_steps: Whole = 100

    def fit(self, X: Any, y: Any = None) -> DeepSubspaceClustering:
        """Cluster items X; y is not looked at.

        Raises ValueError for NaN, items of zeros, more clusters than items, retain >= n. Warns of repeated items.
        """
        self._check_parameters()
        items = self._items(X, reset=True)
        if self.retain is not None and self.retain >= len(items):
            raise ValueError(f"retain: must be below n_samples = {len(items)}, got {self.retain}")
        if not self.affine:
            check_rows(items.flatten(1))
        warn_of_copies(self._points(items))
        self._random = check_random_state(self.random_state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed())
            c = self._express(items)
            if "structure" in self.stages and self.n_clusters > 1:
                c = self._structure(items, c)
        self.representation_ = like(c, X)
        self.affinity_ = retained_affinity(c.numpy(), self._retained())
        labels = spectral_labels(self.affinity_, self.n_clusters, n_init=self.n_init, random_state=self._random)
        self._keep(X, items, labels)
        return self

    def _check_parameters(self) -> None:
        super()._check_parameters()
        stages = tuple(self.stages)
        if "express" not in stages or list(stages) != [stage for stage in STAGES if stage in stages]:
            raise ValueError(f"stages: some of {STAGES} in this order, 'express' among them, got {self.stages!r}")
        if not isinstance(self.encoder, nn.Module) and self.layers not in ("all", "last"):
            raise ValueError(f"layers: 'all' or 'last' with encoder={self.encoder!r}, got {self.layers!r}")

    def _retained(self) -> int | None:
        return None if self.retain is None else int(self.retain)

    def _express(self, items: Tensor) -> Float[Tensor, "n n"]:
        """Stages one and two."""
        from .deep_training import SelfExpressionModule, reconstruction_loss

        self.n_steps_: dict[str, int] = {}
        self.encoder_: Any = self._autoencoder()
        options: dict[str, Any] = {
            "look": self._modularity() if self.n_clusters > 1 else None,
            "every": int(self.look_every),
        }
        if self.encoder_ is None:
            self.encoder_ = self.encoder
            module = SelfExpressionModule(len(items), fixed=joint_factor(self._layers(items)), **options)
        else:
            if "pretrain" in self.stages and self.pretrain_steps:
                steps = self._train(self.encoder_, items, self.pretrain_steps, reconstruction_loss)
                self.n_steps_["pretrain"] = steps
            depth = len(self.encoder_.encoder)
            everything = self.layers == "all"
            module = SelfExpressionModule(
                len(items),
                fixed=joint_factor([self._points(items)]) if everything else None,
                autoencoder=self.encoder_,
                layers=tuple(range(depth)) if everything else (depth - 1,),
                **options,
            )
        self.n_steps_["express"] = self._train(module, items, self.max_steps)
        self.history_, self.looks_ = module.history, module.looks
        module.restore()
        if isinstance(self.encoder_, ConvAutoencoder | LinearAutoencoder):
            self.encoder_.eval().requires_grad_(False)
        return module.coefficients()

    def _structure(self, items: Tensor, c: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """Stage three."""
        from .deep_training import StructureModule

        module = StructureModule(c, self._clusters(self._seed()))
        self.n_steps_["structure"] = self._train(module, items, self.structure_steps)
        return module.coefficients()

    def _modularity(self) -> Callable[[Tensor], float]:
        """The modularity of the clusters of coefficients in their affinity: how well they hold together."""
        seed = self._seed()

        def look(c: Tensor) -> float:
            affinity = retained_affinity(c.cpu().numpy(), self._retained())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # said of the clusters that are kept
                found = spectral_labels(affinity, self.n_clusters, n_init=min(5, self.n_init), random_state=seed)
            return modularity(affinity, found)

        return look

    def _clusters(self, seed: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The clusters of coefficients, from those of the step before where there are any."""

        def cluster(c: Tensor, before: Tensor | None) -> Tensor:
            affinity = retained_affinity(c.cpu().numpy(), self._retained())
            start = None if before is None else before.cpu().numpy()
            found = spectral_labels(affinity, self.n_clusters, n_init=self.n_init, start=start, random_state=seed)
            return torch.from_numpy(found).to(c.device)

        return cluster


@dataclass(eq=False, repr=False, kw_only=True)
class DSCNetClustering(_DeepClusterer):
    """Cluster items by the self-expression of an auto-encoder's code: DSC-Net, with its post-processing.

    Minimises |x - x̂|^2 / 2 + coefficient_weight |C|^2 + expression_weight |Z - CZ|^2 / 2 over an auto-encoder and C,
    x̂ decoded from CZ; then `solvers.spectral.low_rank_affinity` and spectral clustering by discretisation. Published,
    for 32 x 32 images in [0, 1]: ORL, channels (3, 3, 5), kernels 3, weights (1, 0.2), 700 steps, (fraction, dim,
    power) = (0.2, 3, 1); COIL-20, channels (15,), weights (1, 150), 30 steps, (0.04, 12, 8). They were chosen by
    labels, and the published networks were pre-trained for longer. The attributes are those of
    `DeepSubspaceClustering`, but affinity_ is dense, and subspaces_ are those of the code. Needs the extra `train`.

    Parameters
    ----------
    encoder
        "conv" or "linear": it needs a decoder.
    n_clusters, channels, kernels, hidden, pretrain_steps, learning_rate, rank, n_init, device, random_state
        As in `DeepSubspaceClustering`.
    max_steps
        Training steps after the pretraining.
    coefficient_weight, expression_weight
        See above.
    fraction, dim, power
        Of `solvers.spectral.low_rank_affinity`.

    References
    ----------
    Ji et al., Deep subspace clustering networks, NeurIPS 2017.

    Examples
    --------
    >>> from subspan.cluster import DSCNetClustering
    >>> coil = {"channels": (15,), "kernels": (3,), "expression_weight": 150.0, "max_steps": 30}
    >>> model = DSCNetClustering(20, fraction=0.04, dim=12, power=8.0, **coil)
    >>> labels = model.fit_predict(images)  # doctest: +SKIP
    >>> model.expression_weight
    150.0
    """

    coefficient_weight: NonNegative = 1.0
    expression_weight: NonNegative = 0.2
    fraction: Annotated[float, Bounds(above=0, most=1)] = 0.2
    dim: Count = 3
    power: Positive = 1.0

    def fit(self, X: Any, y: Any = None) -> DSCNetClustering:
        """Cluster items X; y is not looked at. Raises and warns as `DeepSubspaceClustering`.

        Items of zeros are let through, since the code of one need not be zero.
        """
        self._check_parameters()
        items = self._items(X, reset=True)
        warn_of_copies(self._points(items))
        self._random = check_random_state(self.random_state)
        from .deep_training import DSCNetModule, reconstruction_loss

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed())
            network = self._autoencoder()
            if network is None:
                raise ValueError("encoder: DSC-Net needs one with a decoder, 'conv' or 'linear'")
            self.encoder_ = network
            self.n_steps_: dict[str, int] = {}
            if self.pretrain_steps:
                self.n_steps_["pretrain"] = self._train(network, items, self.pretrain_steps, reconstruction_loss)
            module = DSCNetModule(
                len(items),
                network,
                coefficient_weight=float(self.coefficient_weight),
                expression_weight=float(self.expression_weight),
            )
            self.n_steps_["express"] = self._train(module, items, self.max_steps)
        network.eval().requires_grad_(False)
        self.history_ = module.history
        c = module.coefficients()
        self.representation_ = like(c, X)
        affinity = low_rank_affinity(c.numpy(), self.n_clusters, fraction=self.fraction, dim=self.dim, power=self.power)
        self.affinity_ = like(torch.from_numpy(affinity), X)
        labels = spectral_labels(
            affinity, self.n_clusters, rounding="rotation", n_init=self.n_init, random_state=self._random
        )
        self._keep(X, items, labels)
        return self
