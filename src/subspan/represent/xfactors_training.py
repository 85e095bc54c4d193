"""XFactors as an estimator: images or features with named factors in, blocks of coordinates out, and edits of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from subspan.base import like
from subspan.base.estimators import Estimator, in_numpy
from subspan.base.modules import applied
from subspan.base.parameters import Count, NonNegative, Positive, Seed, Share
from subspan.measures import ProbeScore, block_leakage
from subspan.nn.training import batch_rows, keep_best, quiet_trainer

from .hydra_training import class_numbers
from .xfactors import XFactorsLoss, XFactorsVAE

_BLOCK = 256


@dataclass(eq=False, repr=False)
class XFactors(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """Map images (n, c, h, w) in [0, 1], or rows (n, p), to a block of coordinates a factor and one for the rest.

    Blocks can be exchanged between items, turned and drawn, and what comes of it decoded. Needs the extra `train`.

    Parameters
    ----------
    factor_dim
        Dimension of each factor's block; or by name, which also chooses the factors: all others stay in the residual.
    residual_dim, width, block, decode_directions, initial_log_variance, resize, encoder
        Of `XFactorsVAE`; a given encoder is trained as far as its parameters require gradients.
    temperature, kl_weight, beta_residual, beta_factors, contrast_weight, correlation_weight
        Of `XFactorsLoss`.
    epochs, learning_rate, weight_decay, gradient_clip
        Of the training by AdamW, the last one the largest norm of a gradient.
    batch_size
        None for 128, of few items so many (32 at least) that an epoch has 32 batches. The authors take 32; values of a
        factor that are rare must repeat in a batch to be taught.
    validation
        Share of the items that is held out: the weights of the epoch with their least loss are kept. 0: the last ones.
    trainer
        Options of Lightning's Trainer (devices, callbacks, progress, …).
    random_state
        Seed of the training.

    Attributes
    ----------
    classes_
        The values of each factor, by name.
    blocks_
        The coordinates as named `Blocks`, the residual first.
    subspaces_
        A `CoordinateSubspace` a block, in the same order.
    latents_, numbers_
        (n, d) coordinates of the training items, and (n, k) which of its values each factor has; `sample` draws them.
    network_, losses_
        The trained `XFactorsVAE`, and the mean loss of each epoch.

    References
    ----------
    XFactors, arXiv 2601.21688. Rows, given encoders and decoded directions are ours.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.represent import XFactors
    >>> rng = np.random.default_rng(0)
    >>> factors = {"shape": rng.integers(3, size=90), "size": rng.integers(2, size=90)}
    >>> x = np.eye(3, 6)[factors["shape"]] + np.eye(2, 6, 3)[factors["size"]] + 0.1 * rng.normal(size=(90, 6))
    >>> model = XFactors(residual_dim=2, width=4, epochs=3, random_state=0).fit(x, factors)
    >>> model.transform(x).shape, model.blocks_.sizes
    ((90, 6), {'residual': 2, 'shape': 2, 'size': 2})
    >>> model.swap(x, x[::-1], "shape").shape, model.sample(5, {"size": 1}, random_state=0).shape
    ((90, 6), (5, 6))
    """

    factor_dim: Count | Mapping[str, int] = 2
    residual_dim: Count = 126
    width: Count = 48
    block: Literal["residual", "plain"] = "residual"
    decode_directions: bool = False
    initial_log_variance: float = 0.0
    resize: bool = False
    encoder: nn.Module | None = None
    temperature: Positive = 0.03
    kl_weight: NonNegative = 1e-6
    beta_residual: NonNegative = 1.0
    beta_factors: NonNegative = 1.0
    contrast_weight: NonNegative | None = None
    correlation_weight: NonNegative = 0.0
    epochs: Count = 50
    batch_size: Count | None = None
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 1e-2
    gradient_clip: Positive | None = 3.0
    validation: Share = 0.1
    trainer: Mapping[str, Any] | None = None
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None) -> XFactors:
        """Train on items X and their factors y: by name (n,) each, a frame, or (n,) or (n, k) in an array.

        Warns of factors that had no repeated value in more than half of the batches.

        Raises ValueError for NaN, pixels outside [0, 1], and factors that are missing, of another number, all the same
        or all different.
        """
        self._check_parameters()
        items = self._items(X, reset=True)
        if items.ndim == 4 and (float(items.min()) < 0 or float(items.max()) > 1):
            raise ValueError(
                f"X: pixels must lie in [0, 1], got {float(items.min()):g} to {float(items.max()):g}; "
                "divide bytes by 255"
            )
        factors = self._chosen(named_factors(y, len(items)))
        self.classes_ = {name: classes for name, (classes, _) in factors.items()}
        numbers = torch.stack([codes for _, codes in factors.values()], 1)
        rows = items.detach().float().cpu()
        self._set_scale(rows)
        sizes = self.factor_dim if isinstance(self.factor_dim, Mapping) else dict.fromkeys(factors, self.factor_dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(check_random_state(self.random_state).randint(2**31)))
            network = XFactorsVAE(
                self._shape,
                {name: int(size) for name, size in sizes.items()},
                residual_dim=int(self.residual_dim),
                width=int(self.width),
                block=self.block,
                decode_directions=bool(self.decode_directions),
                initial_log_variance=float(self.initial_log_variance),
                resize=bool(self.resize),
                encoder=copy.deepcopy(self.encoder),
            )
            loss = self._loss()
            self._train(network, loss, (rows - self._mean) / self._scale, numbers)
        self._warn(loss)
        self.network_ = network.eval().requires_grad_(False)
        self.blocks_ = network.blocks
        self.subspaces_ = tuple(self.blocks_.subspace(name) for name in self.blocks_.sizes)
        self._n_features_out = self.blocks_.dim
        self.latents_, self.numbers_ = in_numpy(self._means(items)), numbers.numpy()
        return self

    def _chosen(self, factors: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(self.factor_dim, Mapping):
            return factors
        if missing := [name for name in self.factor_dim if name not in factors]:
            raise ValueError(f"factor_dim: y has no factors {missing}; it has {list(factors)}")
        return {name: factors[name] for name in self.factor_dim}

    def _set_scale(self, rows: Tensor) -> None:
        """Rows are standardised by column, flat ones left at 0; images stay as they are."""
        self._mean, self._scale = torch.zeros(()), torch.ones(())
        if rows.ndim == 2:
            wide = rows.double()
            deviation = wide.std(0, correction=0)
            flat = deviation <= 1e-10 * wide.abs().amax(0)
            self._mean, self._scale = wide.mean(0).float(), torch.where(flat, 1, deviation).float()

    def _loss(self) -> XFactorsLoss:
        return XFactorsLoss(
            temperature=self.temperature,
            kl_weight=self.kl_weight,
            beta_residual=self.beta_residual,
            beta_factors=self.beta_factors,
            contrast_weight=self.contrast_weight,
            correlation_weight=self.correlation_weight,
        )

    def _train(self, network: XFactorsVAE, loss: XFactorsLoss, rows: Tensor, numbers: Tensor) -> None:
        from subspan.nn import Objective

        order = torch.randperm(len(rows))
        held = order[: int(self.validation * len(rows))]
        kept = order[len(held) :]
        if len(kept) < 2:
            raise ValueError(f"validation: leaves {len(kept)} of {len(rows)} items to train on; at least 2 are needed")
        size = max(2, batch_rows(len(kept), self.batch_size, 128))
        # A batch norm cannot be trained on a single item.
        data = TensorDataset(rows[kept], numbers[kept])
        batches = DataLoader(data, size, shuffle=True, drop_last=len(kept) % size == 1)
        objective = Objective(network, loss, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        options: dict[str, Any] = {"max_epochs": self.epochs, "gradient_clip_val": self.gradient_clip}
        options |= {"num_sanity_val_steps": 0, **(self.trainer or {})}
        others = None
        if len(held):
            others = DataLoader(TensorDataset(rows[held], numbers[held]), max(size, _BLOCK))
            options["callbacks"] = [*(options.get("callbacks") or []), keep_best(network)]
        with quiet_trainer(**options) as trainer:
            trainer.fit(objective, batches, others)
        self.losses_ = list(objective.losses)
        network.cpu()

    def _warn(self, loss: XFactorsLoss) -> None:
        for name, count in loss.idle.items():
            if 2 * count > loss.batches:
                warnings.warn(
                    f"y: no value of factor {name!r} was repeated in {count} of {loss.batches} batches, which taught "
                    "it nothing; raise batch_size",
                    stacklevel=3,
                )

    # ------------------------------------------------------------------ use

    def _means(self, items: Tensor) -> Float[Tensor, "n d"]:
        scaled = (items - self._mean.to(items)) / self._scale.to(items)
        return applied(self.network_, scaled, "means", size=_BLOCK)

    def _decoded(self, z: Float[Tensor, "n d"]) -> Tensor:
        return applied(self.network_, z, "decode", size=_BLOCK) * self._scale.to(z) + self._mean.to(z)

    def transform(self, X: Any) -> Any:
        """Coordinates (n, d) of items X: the posterior's means."""
        check_is_fitted(self, "network_")
        return like(self._means(self._items(X)), X)

    def inverse_transform(self, Z: Any) -> Any:
        """The items that coordinates Z (n, d) stand for."""
        check_is_fitted(self, "network_")
        return like(self._decoded(self._latents(Z)), Z)

    def _latents(self, z: Any) -> Float[Tensor, "n d"]:
        from subspan.base import check_matrix

        return check_matrix(z, "Z", columns=self.blocks_.dim)

    def swap(self, X: Any, donor: Any, *names: str) -> Any:
        """Each item of X with the named blocks of its donor, decoded; "residual" is a block too."""
        check_is_fitted(self, "network_")
        own, other = self._means(self._items(X)), self._means(self._items(donor))
        if len(own) != len(other):
            raise ValueError(f"donor: expected {len(own)} items, one for each of X, got {len(other)}")
        return like(self._decoded(self.blocks_.swap(own, other.to(own), *names)), X)

    def traverse(self, X: Any, name: str, steps: int = 8) -> Any:
        """Each item of X with a block turned once about 0 in `steps` steps, decoded: (n, steps, …)."""
        check_is_fitted(self, "network_")
        items = self._items(X)
        network = copy.deepcopy(self.network_).to(items.device, items.dtype)
        mean, scale = self._mean.to(items), self._scale.to(items)
        with torch.no_grad():
            turned = network.traverse((items - mean) / scale, name, steps)
        return like(turned * scale + mean, X)

    def sample(self, n: int, values: Mapping[str, Any] | None = None, *, random_state: Seed = None) -> Any:
        """Draw n items: each block is that of a training item of its own, of factors in `values` one with this value.

        Raises ValueError for a factor or a value that was not trained on.
        """
        check_is_fitted(self, "network_")
        random = check_random_state(random_state)
        parts: dict[str, np.ndarray] = {}
        for name in values or {}:
            if name not in self.classes_:
                raise ValueError(f"values: there is no factor {name!r}; there are {list(self.classes_)}")
        for name, block in self.blocks_.split(self.latents_).items():
            pool = np.arange(len(block))
            if name in (values or {}):
                pool = np.flatnonzero(self._with_value(name, (values or {})[name]))
            parts[name] = block[pool[random.randint(len(pool), size=n)]]
        return self.inverse_transform(self.blocks_.join(parts))

    def _with_value(self, name: str, value: Any) -> np.ndarray:
        found = np.flatnonzero(self.classes_[name] == value)
        if not len(found):
            raise ValueError(f"values: {name!r} has no value {value!r}; it has {self.classes_[name].tolist()}")
        return self.numbers_[:, list(self.classes_).index(name)] == found[0]

    def leakage(self, X: Any, y: Any, *, kind: str = "logistic") -> dict[str, dict[str, ProbeScore]]:
        """What blocks, and lengths of blocks, of the training items tell of all factors y of X; see `block_leakage`.

        Probes are fitted on one half of X and scored on the other.
        """
        check_is_fitted(self, "network_")
        z = in_numpy(self.transform(X))
        factors = {name: codes.numpy() for name, (_, codes) in named_factors(y, len(z)).items()}
        half = np.arange(len(z)) % 2 == 0
        fit, test = ((z[part], {name: codes[part] for name, codes in factors.items()}) for part in (half, ~half))
        return block_leakage(fit, test, self.blocks_, kind=kind)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        return tags


def named_factors(y: Any, count: int) -> dict[str, tuple[np.ndarray, Int[Tensor, " n"]]]:
    """The values of each factor, sorted, and the number of that of each of `count` items.

    y: a mapping or a frame of columns, or an array (n,) or (n, k), whose columns are named by their numbers.
    """
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None: it holds the factors of X")
    if isinstance(y, Mapping) or hasattr(y, "columns"):
        columns = {str(name): y[name] for name in (y if isinstance(y, Mapping) else y.columns)}
    else:
        table = np.asarray(in_numpy(y))
        table = table[:, None] if table.ndim == 1 else table
        if table.ndim != 2:
            raise ValueError(f"y: expected factors (n,) or (n, k), got shape {table.shape}")
        columns = {str(place): table[:, place] for place in range(table.shape[1])}
    if not columns:
        raise ValueError("y: has no factors")
    found = {}
    for name, values in columns.items():
        values = np.asarray(in_numpy(values))
        if values.dtype.kind == "f" and count > 2 and len(np.unique(values)) == count:
            raise ValueError(
                f"y: factor {name!r} has another number in each row (Unknown label type: continuous); "
                "bin them, such as with numpy.digitize"
            )
        try:
            found[name] = class_numbers(values, count)
        except ValueError as error:
            raise ValueError(f"y: factor {name!r}: {error}") from error
    return found
