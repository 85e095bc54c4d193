"""Matryoshka: nested prefixes on the embeddings of a frozen encoder (Kusupati et al., 2022)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import check_matrix, like, normalize_rows, save_arrays, saved_object
from subspan.base.estimators import Estimator
from subspan.base.parameters import Count, NonNegative, Positive, Seed
from subspan.base.saved import Schema, optional, set_state
from subspan.geometry import Subspace, halving_sizes, prefix, prefix_sizes
from subspan.nn import MatryoshkaAdapter, MatryoshkaLinear, nesting_weights
from subspan.nn.training import batch_rows, quiet_trainer
from subspan.statistics import Moments, fit_moments, is_stream

_BLOCK = 8192
_SAVED: Schema = {"kind": str, "center": bool, "normalize": bool, "efficient": bool, "hidden": int}
_SAVED_ARRAYS: Schema = {
    "adapter.shift": Float[Tensor, " d"],
    "adapter.scale": Float[Tensor, ""],
    "adapter.basis": optional(Float[Tensor, "d k"]),
    "adapter.map.weight": optional(Float[Tensor, "m d"]),
    "adapter.map.0.weight": optional(Float[Tensor, "h d"]),
    "adapter.map.0.bias": optional(Float[Tensor, " h"]),
    "adapter.map.2.weight": optional(Float[Tensor, "m h"]),
    "adapter.map.2.bias": optional(Float[Tensor, " m"]),
    "heads.*": optional(Float[Tensor, "..."]),
}


@dataclass(eq=False, repr=False)
class Matryoshka(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """Map embeddings X (n, d) to coordinates (n, max(dims)) of which the first m serve, for every m in `dims`.

    All kinds but "pca" are trained through Lightning (extra: train), for what y says: class labels (n,) → cross entropy
    of one linear head a prefix; rows (n, d) paired with X → InfoNCE in the batch; None → every prefix keeps the batch's
    cosines.

    Parameters
    ----------
    dims
        Sizes; None: d, d/2, … down to 8.
    kind
        "pca", the principal directions in order (closed form, any stream of rows); "rotation", a learnt orthogonal map
        of the leading max(dims) principal directions, which keeps inner products among them; "linear", any linear map;
        "mlp", one hidden layer.
    weights
        Of the sizes in the loss: None for equal ones, "inverse" or one number a size.
    center
        The mean is subtracted, which changes cosines.
    normalize
        Rows of unit length come out.
    efficient
        Heads share a weight (MRL-E).
    hidden
        Units of "mlp".
    temperature
        Of InfoNCE.
    epochs, weight_decay, dims_per_step
        Of the training; the last: sizes drawn for each step, None for all.
    batch_size
        None for 256 rows, of few rows so many (32 at least) that an epoch has 32 steps.
    learning_rate
        None for 3e-3, and 1e-2 for a linear map or a rotation with labels, whose heads have further to go.
    trainer
        Options of Lightning's Trainer (devices, callbacks, progress, …).
    random_state
        Seed of the training.

    Attributes
    ----------
    dims_, adapter_
        The sizes, and the map as a torch module.
    subspace_
        For "pca" and "rotation"; its `truncate` and `split` are the nested subspaces.
    heads_, classes_
        Where trained with labels.
    losses_
        The mean loss of each epoch.

    References
    ----------
    Kusupati et al. (2022), arXiv 2205.13147.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.represent import Matryoshka
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 16)) * np.r_[np.ones(4), np.full(12, 0.01)]  # four directions hold nearly all
    >>> model = Matryoshka([4, 16]).fit(x)
    >>> short, cosines = model.shorten(x, 4), (x @ x.T) / np.outer(*2 * [np.linalg.norm(x, axis=1)])
    >>> short.shape, bool(np.abs(short @ short.T - cosines).max() < 0.1)
    ((200, 4), True)
    """

    dims: Sequence[Count] | None = None
    kind: Literal["pca", "rotation", "linear", "mlp"] = "pca"
    weights: str | Sequence[float] | None = None
    center: bool = False
    normalize: bool = True
    efficient: bool = False
    hidden: Count = 512
    temperature: Positive = 0.05
    epochs: Count = 15
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    weight_decay: NonNegative = 1e-4
    dims_per_step: Count | None = None
    trainer: Mapping[str, Any] | None = None
    random_state: Seed = None

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, y: Any = None) -> Matryoshka:
        """Fit to rows X (n, d), and for the trained kinds to labels y (n,), paired rows y (n, d) or neither.

        Raises ValueError for NaN, sizes beyond d (except "mlp"), labels of another length, or a single class.
        """
        self._check_parameters()
        for name in ("subspace_", "heads_", "classes_", "losses_"):
            self.__dict__.pop(name, None)
        if self.kind == "pca" and (isinstance(X, Tensor) or is_stream(X)):
            moments = fit_moments(X)
            self._set_width(moments.d)
        else:
            rows = self._rows(X, reset=True)
            moments = self._moments(rows)
        if moments.count < 2:
            raise ValueError(f"X: needs at least 2 rows (n_samples = {moments.count:g})")
        d = self.n_features_in_
        self.dims_ = (
            halving_sizes(d) if self.dims is None else prefix_sizes(list(self.dims), None if self.kind == "mlp" else d)
        )
        nesting_weights(self.dims_ if self.dims is None else list(self.dims), self.weights)
        self._n_features_out = self.dims_[-1]
        matrix = moments.covariance() if self.center else moments.second_moment()
        scale = self._scale(matrix, moments)
        shift = moments.mean if self.center else None
        if self.kind == "mlp":
            self._train(rows, y, None, shift, scale)
        elif self.kind == "pca":
            self._set_subspace(self._principal(matrix, moments), scale)
        else:
            self._train(rows, y, self._principal(matrix, moments).basis, shift, scale)
        return self

    def _moments(self, rows: Tensor) -> Moments:
        moments = Moments(rows.shape[1])
        for block in rows.split(_BLOCK):
            moments.update(block)
        return moments

    def _scale(self, matrix: Float[Tensor, "d d"], moments: Moments) -> float:
        """The scale of unit mean variance."""
        total = float(matrix.diagonal().clamp_min(0).sum())
        if not total > 1e-28 * float(moments.mean.square().sum()) or total == 0:
            raise ValueError("X: the rows are constant; there is no direction to keep")
        return (total / moments.d) ** 0.5

    def _principal(self, matrix: Float[Tensor, "d d"], moments: Moments) -> Subspace:
        """The leading directions, as many as the largest size."""
        values, vectors = torch.linalg.eigh(matrix)
        width = self.dims_[-1]
        kept = values.flip(-1).clamp_min(0)
        return Subspace(
            vectors.flip(-1)[:, :width].contiguous(),
            center=moments.mean if self.center else None,
            variances=kept[:width],
            spectrum=kept,
            count=moments.count,
        )

    def _set_subspace(self, flag: Subspace, scale: float) -> None:
        self.subspace_ = flag
        self.adapter_ = MatryoshkaAdapter(
            flag.ambient_dim, self.dims_, basis=flag.basis, shift=flag.center, scale=scale, trainable=False
        )

    def _train(
        self, rows: Tensor, y: Any, basis: Float[Tensor, "d k"] | None, shift: Float[Tensor, " d"] | None, scale: float
    ) -> None:
        from .nested_training import NestedTraining

        rows = rows.detach().float().cpu()
        target, objective, classes = self._target(y, rows)
        usual = 1e-2 if objective == "labels" and self.kind != "mlp" else 3e-3
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(check_random_state(self.random_state).randint(2**31)))
            options: Any = {"basis": basis, "shift": shift, "scale": scale, "hidden": self.hidden}
            module = NestedTraining(
                MatryoshkaAdapter(rows.shape[1], self.dims_, kind=self.kind, **options),
                objective,
                dims=self.dims_ if self.dims is None else list(self.dims),
                weights=self.weights,
                num_classes=classes,
                efficient=self.efficient,
                temperature=self.temperature,
                dims_per_step=self.dims_per_step,
            )
            rate = usual if self.learning_rate is None else self.learning_rate
            training = module.objective(learning_rate=rate, weight_decay=self.weight_decay)
            self._run(training, rows, target)
        self.losses_ = list(training.losses)
        adapter = module.adapter.eval().requires_grad_(False)
        if module.heads is not None:
            self.heads_ = module.heads.eval().requires_grad_(False)
        if self.kind == "rotation":
            matrix = adapter.matrix
            assert matrix is not None
            turned = torch.linalg.qr(matrix.double().mT)
            signs = turned.R.diagonal().sign()
            self._set_subspace(Subspace(turned.Q * signs, center=shift), scale)
        else:
            self.adapter_ = adapter

    def _target(self, y: Any, rows: Tensor) -> tuple[Tensor | None, str, int]:
        if y is None:
            return None, "similarity", 0
        labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
        if labels.shape[:1] != (len(rows),):
            raise ValueError(f"y: expected {len(rows)} labels or rows to go with X, got shape {labels.shape}")
        if labels.ndim == 1:
            self.classes_, place = np.unique(labels, return_inverse=True)
            if len(self.classes_) < 2:
                raise ValueError(f"y: at least 2 classes are needed, got 1 class ({self.classes_[0]!r})")
            return torch.as_tensor(place), "labels", len(self.classes_)
        return check_matrix(labels, "y", columns=rows.shape[1]).float(), "pairs", 0

    def _run(self, module: Any, rows: Tensor, target: Tensor | None) -> None:
        columns = [rows] if target is None else [rows, target]

        def batch(index: list[int]) -> list[Tensor]:
            return [column[index] for column in columns]

        size = batch_rows(len(rows), self.batch_size, 256)
        index: Any = range(len(rows))
        loader = torch.utils.data.DataLoader(index, size, shuffle=True, drop_last=True, collate_fn=batch)
        with quiet_trainer(**{"max_epochs": self.epochs, **(self.trainer or {})}) as trainer:
            trainer.fit(module, loader)

    # ------------------------------------------------------------------ use

    def transform(self, X: Any) -> Any:
        """Nested coordinates (n, max(dims)) of rows X (n, d); numpy or torch as given, in its dtype."""
        check_is_fitted(self, "adapter_")
        return like(self._coordinates(X, self.normalize), X)

    def shorten(self, X: Any, m: int) -> Any:
        """The first m of the nested coordinates, scaled to unit length again where `normalize` is set."""
        check_is_fitted(self, "adapter_")
        return like(prefix(self._coordinates(X, False), m, normalize=bool(self.normalize)), X)

    @torch.no_grad()
    def logits(self, X: Any) -> Any:
        """Logits (l, n, classes) of every prefix, smallest first, by the heads that were trained with labels."""
        check_is_fitted(self, "heads_")
        return like(self.heads_(self._coordinates(X, False).float()), X)

    @torch.no_grad()
    def _coordinates(self, X: Any, normalize: bool) -> Tensor:
        rows = self._rows(X)
        adapter = self.adapter_.to(rows.device)
        # An MLP's weights are float32; a linear map is applied in the digits of the rows.
        wide = torch.float32 if self.kind in ("mlp", "linear") else torch.promote_types(rows.dtype, torch.float32)
        blocks = [adapter(block.to(wide)) for block in rows.split(_BLOCK)]
        return torch.cat([normalize_rows(z) if normalize else z for z in blocks]).to(rows.dtype)

    def to_module(self) -> MatryoshkaAdapter:
        """The fitted map as a torch module, before any normalisation."""
        check_is_fitted(self, "adapter_")
        return self.adapter_

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted map, and the heads where there are some, to a safetensors file, whole or not at all."""
        check_is_fitted(self, "adapter_")
        arrays: dict[str, Tensor] = {f"adapter.{k}": v for k, v in self.adapter_.state_dict().items()}
        facts: dict[str, Any] = {"parameters": {name: getattr(self, name) for name in _SAVED}}
        if hasattr(self, "heads_"):
            arrays |= {f"heads.{k}": v for k, v in self.heads_.state_dict().items()}
            facts["classes"] = self.classes_.tolist()
        save_arrays(path, "matryoshka", arrays, dims=list(self.dims_), d=self.n_features_in_, **facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Matryoshka:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        kept = {"parameters": _SAVED, "dims": list[int], "d": int, "classes": list[Any] | None}
        with saved_object(path, "matryoshka", _SAVED_ARRAYS, kept) as (arrays, facts):
            model = cls(**facts["parameters"], dims=facts["dims"])
            model.dims_, model.n_features_in_ = prefix_sizes(facts["dims"]), facts["d"]
            model._n_features_out = model.dims_[-1]
            model._set_saved(arrays, facts["classes"])
            return model

    def _set_saved(self, arrays: dict[str, Tensor], classes: list[Any] | None) -> None:
        adapter, heads = (
            {name.removeprefix(f"{part}."): value for name, value in arrays.items() if name.startswith(f"{part}.")}
            for part in ("adapter", "heads")
        )
        d, width = self.n_features_in_, self.dims_[-1]
        widest = next((adapter[name] for name in ("map.2.weight", "map.weight") if name in adapter), None)
        hidden = len(adapter["map.0.weight"]) if "map.0.weight" in adapter else self.hidden
        if len(adapter["shift"]) != d or hidden != self.hidden or (widest is not None and len(widest) != width):
            raise ValueError(f"a map that is not of {d} to {width} dimensions")
        is_closed = self.kind in ("pca", "rotation")
        options: Any = {"kind": "rotation" if is_closed else self.kind, "trainable": not is_closed}
        if is_closed:
            center = adapter["shift"] if self.center else None
            self.subspace_ = Subspace(_orthonormal(adapter["basis"]), center=center)
            options["basis"] = adapter["basis"]
        module = MatryoshkaAdapter(d, self.dims_, hidden=hidden, **options)
        set_state(module, adapter)
        self.adapter_ = module.eval().requires_grad_(False)
        if (classes is None) != (not heads):
            raise ValueError("heads without classes, or classes without heads")
        if classes is not None:
            self.classes_ = np.asarray(classes)
            bias = any(name.endswith("bias") for name in heads)
            layer = MatryoshkaLinear(self.dims_, len(classes), efficient=self.efficient, bias=bias)
            set_state(layer, heads)
            self.heads_ = layer.eval().requires_grad_(False)


def _orthonormal(basis: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Stored single-precision directions, orthonormal in double precision again."""
    turned = torch.linalg.qr(basis.double())
    return turned.Q * turned.R.diagonal().sign()
