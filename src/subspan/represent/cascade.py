"""Adaptive classification: the smallest prefix that is sure enough answers (Kusupati et al., 2022)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import as_tensor, check_finite, like, save_arrays, saved_object
from subspan.base.estimators import Estimator
from subspan.base.parameters import Count
from subspan.geometry import prefix_sizes
from subspan.nn import MatryoshkaLinear


@dataclass(eq=False, repr=False)
class MatryoshkaCascade(Estimator):
    """Thresholds on the largest softmax probability of each prefix's classifier, found on held-out logits.

    For each size and the next alone, the threshold is the smallest of the best: the smaller answers where its
    confidence is above it.

    Parameters
    ----------
    dims
        The sizes of the logits, ascending.
    grid
        Thresholds tried; None: 100 from 0.1 to 1.

    Attributes
    ----------
    thresholds_
        (l - 1,), one for each size but the largest.
    accuracy_
        On the rows of `fit`.
    expected_dim_
        Mean size of the answering prefix.
    expected_total_dim_
        Mean sum of all sizes evaluated on the way, the cost of separate heads.

    References
    ----------
    Kusupati et al. (2022), arXiv 2205.13147.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import MatryoshkaCascade
    >>> large = 8 * torch.eye(2).repeat(10, 1)  # always right, and sure
    >>> small = large.clone()
    >>> small[:4] = torch.tensor([0.1, 0.0])  # not sure of four rows
    >>> cascade = MatryoshkaCascade([8, 64], grid=[0.5, 0.9]).fit(torch.stack([small, large]), [0, 1] * 10)
    >>> cascade.accuracy_, cascade.route(torch.stack([small, large])).bincount()[[8, 64]].tolist()
    (1.0, [16, 4])
    """

    dims: Sequence[Count]
    grid: Sequence[float] | None = None

    def fit(self, logits: Any, y: Any) -> MatryoshkaCascade:
        """Find the thresholds on logits (l, n, c), a tensor or one matrix a size, and class numbers y (n,).

        Raises ValueError for another number of layers than dims, NaN, or labels outside [0, c). Warns for one class.
        """
        self._check_parameters()
        layers = self._layers(logits)
        labels = as_tensor(y, "y", ndim=1, floating=False).to(layers.device).long()
        if len(labels) != layers.shape[1]:
            raise ValueError(f"y: expected {layers.shape[1]} labels, got {len(labels)}")
        if not 0 <= int(labels.min()) <= int(labels.max()) < layers.shape[2]:
            raise ValueError(f"y: class numbers must lie in [0, {layers.shape[2] - 1}]")
        if len(labels.unique()) == 1:
            warnings.warn("y: all rows are of one class; the thresholds say nothing about others", stacklevel=2)
        grid = np.linspace(0.1, 1, 100) if self.grid is None else np.asarray(self.grid, dtype=float)
        if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all():
            raise ValueError(f"grid: expected a list of thresholds, got {self.grid!r}")
        grid = np.unique(grid)
        confidence, right = _confidence(layers), layers.argmax(-1) == labels
        thresholds = [
            _best_threshold(confidence[level].cpu().numpy(), right[level : level + 2].cpu().numpy(), grid)
            for level in range(len(layers) - 1)
        ]
        self.thresholds_ = np.asarray(thresholds, dtype=float)
        chosen = self._stages(layers, None)
        self._account(chosen)
        self.accuracy_ = float(right.gather(0, chosen[None]).double().mean())
        return self

    def _layers(self, logits: Any) -> Float[Tensor, "l n c"]:
        sizes = prefix_sizes(list(self.dims))
        given = logits if isinstance(logits, Tensor | np.ndarray) else [as_tensor(x, "logits", ndim=2) for x in logits]
        if len(given) != len(sizes):
            raise ValueError(f"logits: expected {len(sizes)} layers, one for each of {sizes}, got {len(given)}")
        layers = torch.stack(given) if isinstance(given, list) else as_tensor(given, "logits", ndim=3)
        if not layers.shape[1]:
            raise ValueError("logits: hold no rows")
        return check_finite(layers.to(torch.promote_types(layers.dtype, torch.float32)), "logits")

    def _stages(self, layers: Float[Tensor, "l n c"], cap: int | None) -> Int[Tensor, " n"]:
        """The level that answers each row: the first that is sure enough, at most the capped one."""
        last = self._level(cap)
        thresholds = torch.as_tensor(self.thresholds_[:last], device=layers.device).unsqueeze(1)
        sure = _confidence(layers[:last]).double() > thresholds
        sure = torch.cat([sure, sure.new_ones(1, layers.shape[1])])
        return sure.to(torch.uint8).argmax(0)

    def _level(self, cap: int | None) -> int:
        sizes = prefix_sizes(list(self.dims))
        if cap is None:
            return len(sizes) - 1
        if cap not in sizes:
            raise ValueError(f"cap: expected one of {sizes}, got {cap}")
        return sizes.index(cap)

    def _account(self, stages: Int[Tensor, " n"]) -> None:
        sizes = torch.tensor(prefix_sizes(list(self.dims)), dtype=torch.float64, device=stages.device)
        self.expected_dim_ = float(sizes[stages].mean())
        self.expected_total_dim_ = float(sizes.cumsum(0)[stages].mean())

    def route(self, logits: Any, *, cap: int | None = None) -> Any:
        """The size (n,) that answers each row of logits (l, n, c), at most `cap`; sets the expected dimensions."""
        check_is_fitted(self, "thresholds_")
        stages = self._stages(self._layers(logits), cap)
        self._account(stages)
        sizes = torch.tensor(prefix_sizes(list(self.dims)), device=stages.device)
        return like(sizes[stages], logits if isinstance(logits, Tensor) else np.empty(0))

    def predict(self, logits: Any, *, cap: int | None = None) -> Any:
        """Class numbers (n,) from logits (l, n, c); sets the expected dimensions to these rows'."""
        check_is_fitted(self, "thresholds_")
        layers = self._layers(logits)
        stages = self._stages(layers, cap)
        self._account(stages)
        labels = layers.argmax(-1).gather(0, stages[None])[0]
        return like(labels, logits if isinstance(logits, Tensor) else np.empty(0))

    @torch.no_grad()
    def classify(
        self, embeddings: Float[Tensor, "n d"], heads: MatryoshkaLinear, *, cap: int | None = None
    ) -> Int[Tensor, " n"]:
        """Class numbers of embeddings (n, d), where larger heads run only on the rows that smaller ones passed on."""
        check_is_fitted(self, "thresholds_")
        if heads.dims != prefix_sizes(list(self.dims)):
            raise ValueError(f"heads: expected the sizes {list(self.dims)}, got {list(heads.dims)}")
        last = self._level(cap)
        labels = torch.empty(len(embeddings), dtype=torch.int64, device=embeddings.device)
        stages = torch.full_like(labels, last)
        left = torch.arange(len(embeddings), device=embeddings.device)
        for level, size in enumerate(heads.dims[: last + 1]):
            logits = heads.logits(embeddings[left], size).float()
            labels[left] = logits.argmax(-1)
            if level == last:
                break
            sure = _confidence(logits).double() > self.thresholds_[level]
            stages[left[sure]] = level
            left = left[~sure]
            if not len(left):
                break
        self._account(stages)
        return labels

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write sizes and thresholds to a safetensors file, whole or not at all."""
        check_is_fitted(self, "thresholds_")
        facts = {name: getattr(self, name) for name in ("accuracy_", "expected_dim_", "expected_total_dim_")}
        sizes: Sequence[int] = prefix_sizes(list(self.dims))
        save_arrays(
            path, "matryoshka-cascade", {"thresholds": torch.as_tensor(self.thresholds_)}, dims=list(sizes), **facts
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MatryoshkaCascade:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        kept = {"dims": list[int], "accuracy_": float, "expected_dim_": float, "expected_total_dim_": float}
        schema = {"thresholds": Float[Tensor, " l"]}
        with saved_object(path, "matryoshka-cascade", schema, kept) as (arrays, facts):
            model = cls(facts["dims"])
            if len(arrays["thresholds"]) != len(prefix_sizes(facts["dims"])) - 1:
                raise ValueError(f"{len(arrays['thresholds'])} thresholds between the sizes {facts['dims']}")
            model.thresholds_ = arrays["thresholds"].numpy()
            model.accuracy_, model.expected_dim_ = facts["accuracy_"], facts["expected_dim_"]
            model.expected_total_dim_ = facts["expected_total_dim_"]
            return model


def _confidence(logits: Float[Tensor, "*l n c"]) -> Float[Tensor, "*l n"]:
    return logits.softmax(-1).amax(-1)


def _best_threshold(confidence: np.ndarray, right: np.ndarray, grid: np.ndarray) -> float:
    """The smallest of the best thresholds of `grid` (ascending): rows above it are answered by right[0], else right[1].

    One sort instead of a pass over the rows a threshold.
    """
    order = np.argsort(confidence.astype(np.float64), kind="stable")
    # Gain of leaving the first i rows, the least confident, to the larger head.
    gain = np.concatenate([[0], np.cumsum(right[1].astype(int)[order] - right[0].astype(int)[order])])
    passed_on = np.searchsorted(confidence.astype(np.float64)[order], grid, side="right")
    return float(grid[np.argmax(gain[passed_on])])
