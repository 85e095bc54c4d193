"""Frame projections as an estimator: windows of series in, features out, in two stages of training without labels."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from subspan.base import check_matrix, like, save_arrays, saved_object
from subspan.base.arrays import as_tensor, check_finite
from subspan.base.estimators import Estimator
from subspan.base.parameters import Count, NonNegative, Positive, Seed, Share
from subspan.base.saved import set_state
from subspan.geometry import Subspace
from subspan.nn import FourierView, FrameView, LatentMapper, MorletView, SeriesEncoder
from subspan.nn.training import quiet_trainer

from .frame_projections import CrossViewContrast, FrameNetwork, SeriesFeatures, mapping_loss, view_geometry

LEAST_LENGTH = 16
"""Shorter series have no spectrum to speak of."""
_BLOCK = 256
# Samples whose pairs of angles are compared.
_COMPARED = 512
_SAVED: dict[str, Any] = {"dim": int, "width": int, "mapper_hidden": int, "dropout": float}
_SAVED |= {"normalize": Literal["channel", "window"]}


@dataclass(eq=False, repr=False)
class FrameViews(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """Map windows of series (n, c, l) to features (n, 3 d), learnt without labels and without augmentations.

    Encoders of the series, of its spectrum and of its scalogram learn to tell which of their vectors are of the same
    window; then small maps learn to guess the other two vectors from that of the series, which is all that is encoded
    in use. Windows are an array (n, c, l), a matrix (n, l) of one channel, or a list of (c, l_i) or (l_i,) of unequal
    lengths. Needs the extra `train`.

    Parameters
    ----------
    views
        "fourier", "morlet", or `FrameView`s of one's own; each adds d features.
    dim
        d.
    width
        Of the encoders; 16 makes them four times as fast.
    n_scales, time_stride
        Of the "morlet" view, whose scales go from 1 to 128, or to half the length of shorter windows.
    mapper_hidden, dropout, encoder
        Of `FrameNetwork`; an encoder of one's own for windows of unequal lengths has a parameter `mask`.
    normalize
        "channel": by mean and deviation of each channel over the windows of fit; "window": by those of each window
        itself, so that its level and its strength count for nothing.
    temperature, mapper_weight
        Of `CrossViewContrast`.
    epochs, mapper_epochs, learning_rate, weight_decay
        Of the training by Adam along a cosine, in each stage; mapper_epochs=None: as many as the first stage.
    batch_size
        Windows, each a rival of all others.
    trainer
        Options of Lightning's Trainer (accelerator, callbacks, progress, …).
    random_state
        Seed of the training.

    Attributes
    ----------
    network_
        The trained `FrameNetwork`; after `load`, its `SeriesFeatures` alone.
    losses_, mapper_losses_
        Mean loss of each epoch of the two stages.
    subspace_
        Principal subspace of the features of the training windows, with 99 % of their variance.
    geometry_
        `ViewGeometry` of each pair of views, of at most 512 training windows.

    References
    ----------
    Demirel & Holz (2025), NeurIPS, arXiv 2510.22655. They train with 1024 windows a batch, at a rate of 0.003 (paper)
    or 0.001 (code), which is the default here with batches of 256. Wavelets are normalised to a tight frame, theirs
    are not; `views=("fourier", MorletView(norm="l2", sampling="pywavelets"))` is as theirs. The order of features is
    series, then views.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.represent import FrameViews
    >>> rng = np.random.default_rng(0)
    >>> windows = np.sin(rng.uniform(0.2, 1, (40, 2, 1)) * np.arange(50)) + 0.1 * rng.normal(size=(40, 2, 50))
    >>> model = FrameViews(dim=16, width=4, n_scales=12, epochs=2, random_state=0).fit(windows)
    >>> model.transform(windows).shape, model.transform(windows[:, :, :30]).shape
    ((40, 48), (40, 48))
    """

    views: Sequence[Any] = ("fourier", "morlet")
    dim: Count = 128
    width: Count = 32
    n_scales: Count = 48
    time_stride: Count = 1
    mapper_hidden: Count = 64
    dropout: Share = 0.5
    encoder: nn.Module | None = None
    normalize: Literal["channel", "window"] = "channel"
    temperature: Positive = 0.15
    mapper_weight: NonNegative = 1.0
    epochs: Count = 256
    mapper_epochs: Count | None = None
    batch_size: Count = 256
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 1e-6
    trainer: Mapping[str, Any] | None = None
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None) -> FrameViews:
        """Train on windows X; y is ignored.

        Raises ValueError for NaN, windows of fewer than 16 samples, a single window, and a batch_size of 1.
        """
        self._check_parameters()
        windows = self._windows(X, reset=True)
        if len(windows) < 2 or self.batch_size < 2:
            raise ValueError(
                f"X, batch_size: contrast needs two windows or more, got {len(windows)} in batches of {self.batch_size}"
            )
        x, mask = filled_up(windows)
        self.length_ = x.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(check_random_state(self.random_state).randint(2**31)))
            network = self._network(x.shape[1])
            if mask is not None and not network.features.takes_mask:
                raise ValueError("encoder: windows of unequal lengths need one with a parameter `mask`")
            if self.normalize == "channel":
                network.features.set_scale(x, mask)
            given = (x,) if mask is None else (x, mask)
            loss = CrossViewContrast(self.temperature, self.mapper_weight)
            network.features.mappers.requires_grad_(False)
            self.losses_ = self._train(network, loss, given, self.epochs)
            network.eval().requires_grad_(False)
            encoded = _encoded(network, given)
            mappers = network.features.mappers.requires_grad_(True)
            self.mapper_losses_ = self._train(mappers, mapping_loss, encoded, self.mapper_epochs or self.epochs)
        self.network_ = network.eval().requires_grad_(False)
        some = torch.linspace(0, len(x) - 1, min(len(x), _COMPARED)).long()
        self.geometry_ = {}
        if len(some) > 2:
            for (first, own), (second, other) in combinations(zip(network.names, encoded), 2):
                self.geometry_[first, second] = view_geometry(own[some], other[some])
        features = self._features(windows)
        self._n_features_out = features.shape[1]
        self.subspace_ = Subspace.fit(features, rank=0.99)
        return self

    def _network(self, channels: int) -> FrameNetwork:
        views: dict[str, FrameView] = {}
        for place, view in enumerate(self.views):
            if view == "fourier":
                views["fourier"] = FourierView()
            elif view == "morlet":
                most = min(128.0, self.length_ / 2)
                views["morlet"] = MorletView(self.n_scales, (1.0, most), time_stride=self.time_stride)
            elif isinstance(view, FrameView):
                views[f"view {place}"] = copy.deepcopy(view)
            else:
                raise ValueError(f"views: expected 'fourier', 'morlet' or a FrameView, got {view!r}")
        return FrameNetwork(
            channels,
            self.length_,
            views=views,
            dim=self.dim,
            width=self.width,
            mapper_hidden=self.mapper_hidden,
            dropout=self.dropout,
            encoder=copy.deepcopy(self.encoder),
            per_window=self.normalize == "window",
        )

    def _train(self, model: nn.Module, loss: Any, columns: Sequence[Tensor], epochs: int) -> list[float]:
        from subspan.nn import Objective

        size = min(self.batch_size, len(columns[0]))
        # The last batch may be smaller; one window alone has no rival.
        batches = DataLoader(TensorDataset(*columns), size, shuffle=True, drop_last=len(columns[0]) % size == 1)
        options: dict[str, Any] = {"optimizer": "adam", "schedule": "cosine"}
        options |= {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        objective = Objective(model, loss, **options)
        with quiet_trainer(**{"max_epochs": epochs, **(self.trainer or {})}) as trainer:
            trainer.fit(objective, batches)
        model.cpu()
        return list(objective.losses)

    # ------------------------------------------------------------------ use

    def transform(self, X: Any) -> Any:
        """Features (n, d + d a view) of windows X, which may be of other lengths than those of fit.

        Each window is encoded as long as it is, so that what else is in X does not matter.
        """
        check_is_fitted(self, "network_")
        windows = self._windows(X, reset=False)
        return like(self._features(windows), X[0] if isinstance(X, list | tuple) else X)

    @torch.no_grad()
    def _features(self, windows: list[Tensor]) -> Float[Tensor, "n m"]:
        wide = torch.promote_types(windows[0].dtype, torch.float32)
        features = copy.deepcopy(self.to_module()).to(windows[0].device, wide)
        lengths = torch.tensor([window.shape[-1] for window in windows])
        found: dict[int, Tensor] = {}
        for length in lengths.unique():
            for rows in (lengths == length).nonzero()[:, 0].split(_BLOCK):
                block = torch.stack([windows[row] for row in rows]).to(wide)
                found |= dict(zip(rows.tolist(), features(block)))
        return torch.stack([found[row] for row in range(len(windows))]).to(windows[0].dtype)

    def to_module(self) -> SeriesFeatures:
        """The trained module from windows (b, c, l) to features, with its standardisation."""
        check_is_fitted(self, "network_")
        return self.network_.features if isinstance(self.network_, FrameNetwork) else self.network_

    def _windows(self, X: Any, *, reset: bool) -> list[Tensor]:
        """Windows (c, l_i) one by one, finite, with the channels of the fit."""
        listed = isinstance(X, list | tuple) and any(getattr(window, "ndim", 0) for window in X)
        if listed:
            windows = [as_tensor(window, f"X[{place}]") for place, window in enumerate(X)]
            windows = [window.unsqueeze(0) if window.ndim == 1 else window for window in windows]
        elif np.ndim(X) == 2:
            matrix = reset or getattr(self, "_width", None) is not None
            rows = self._rows(X, reset=reset, min_rows=1) if matrix else check_matrix(X, "X")
            windows = list(rows.unsqueeze(1))
        else:
            windows = list(as_tensor(X, "X", ndim=3))
        if not windows:
            raise ValueError("X: has no windows")
        if any(window.is_complex() for window in windows):
            raise ValueError("X: real series are needed, got complex numbers; give real and imaginary part as channels")
        channels = windows[0].shape[0] if reset else self.channels_
        for place, window in enumerate(windows):
            if window.ndim != 2 or window.shape[0] != channels or window.shape[1] < LEAST_LENGTH:
                raise ValueError(
                    f"X: expected windows of {channels} channels and {LEAST_LENGTH} samples or more, "
                    f"got one of shape {tuple(window.shape)} at {place}"
                )
        dtype = windows[0].dtype
        checked = [check_finite(window, f"X[{place}]").to(dtype) for place, window in enumerate(windows)]
        if reset:
            self.channels_ = channels
            self._width = windows[0].shape[1] if not listed and np.ndim(X) == 2 else None
            if self._width is None:
                self._set_width(channels)
        return checked

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what `transform` needs to a safetensors file, whole or not at all: no other view is kept."""
        module = self.to_module()
        facts = {"parameters": {name: getattr(self, name) for name in _SAVED}, "channels": self.channels_}
        facts |= {"length": self.length_, "mappers": list(module.mappers), "own_encoder": self.encoder is not None}
        # Batches are counted by whole numbers, which only a further training would read.
        arrays = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
        save_arrays(path, "frame-views", arrays, **facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, encoder: nn.Module | None = None) -> FrameViews:
        """Read a file written by `save`, for `transform` alone; encoder: of the kind it was trained with, if its own.

        Raises ValueError when it is not such a file.
        """
        kept = {"parameters": _SAVED, "channels": int, "length": int, "mappers": list[str], "own_encoder": bool}
        with saved_object(path, "frame-views", {"*": Float[Tensor, "..."]}, kept) as (arrays, facts):
            if facts["own_encoder"] != (encoder is not None):
                raise ValueError("an encoder of one's own, which has to be given" if encoder is None else "no encoder")
            model = cls(**facts["parameters"], encoder=encoder)
            model._check_parameters()
            if facts["channels"] < 1 or not facts["mappers"]:
                raise ValueError(f"{facts['channels']} channels and {len(facts['mappers'])} maps")
            own = copy.deepcopy(encoder) if encoder is not None else None
            if own is None:
                own = SeriesEncoder(facts["channels"], model.dim, width=model.width, dropout=model.dropout)
            mappers = {name: LatentMapper(model.dim, model.mapper_hidden) for name in facts["mappers"]}
            module = SeriesFeatures(facts["channels"], own, mappers, per_window=model.normalize == "window")
            counts = {name: value for name, value in module.state_dict().items() if not value.is_floating_point()}
            set_state(module, arrays | counts)
        model.network_ = module.eval().requires_grad_(False)
        model.channels_, model.length_, model._width = facts["channels"], facts["length"], None
        model.n_features_in_, model._n_features_out = facts["channels"], model.dim * (1 + len(mappers))
        return model

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


def filled_up(windows: Sequence[Tensor]) -> tuple[Float[Tensor, "n c l"], Bool[Tensor, "n l"] | None]:
    """Windows (c, l_i) in single precision, filled up with 0, and which places are their own (None: all)."""
    lengths = torch.tensor([window.shape[-1] for window in windows])
    most = int(lengths.max())
    rows = torch.stack([nn.functional.pad(window.detach().cpu(), (0, most - window.shape[-1])) for window in windows])
    mask = torch.arange(most) < lengths[:, None]
    return rows.float(), None if bool(mask.all()) else mask


@torch.no_grad()
def _encoded(network: FrameNetwork, columns: Sequence[Tensor]) -> list[Float[Tensor, "n d"]]:
    """Vectors of the series and of each view, of all windows."""
    blocks = [network.encode(*block) for block in zip(*(column.split(_BLOCK) for column in columns))]
    return [torch.cat(parts) for parts in zip(*blocks)]
