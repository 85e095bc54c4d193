"""When a learner is split, which of its neurons stay, and which rows belong to which learner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.metrics.cluster import contingency_matrix
from sklearn.utils import check_random_state
from torch import Tensor

from subspan.base import check_matrix, normalize_rows
from subspan.solvers import assign

_BOTH_LEAST = 2


@dataclass
class GrowthController:
    """Decides, from one number an epoch, when the last learner is split, and from importances, how.

    It is time where the number has had no new best for `patience` epochs, and one since the last split (before the
    first, any). Neurons of a relative importance above `threshold` stay.

    Parameters
    ----------
    patience
        Epochs without a new best.
    threshold
        Of |importance|, scaled to reach from 0 to 1 over the learner's neurons.
    min_new
        The fewest neurons that must stay.
    min_split
        The fewest neurons of a learner that is split.
    max_learners
        None for no bound.
    top_share
        The share of the neurons that stay, the most important ones, in place of `threshold`, which hangs on the single
        largest.
    best, waited, improved
        What it has seen: the best number, the epochs since, and whether there was one since the last split.

    Raises
    ------
    ValueError
        For values out of range; in use for a number that is not finite.

    References
    ----------
    Adiga et al. (2022): patience 10, threshold 0.5, 5 and 11 neurons.

    Examples
    --------
    >>> from subspan.represent import GrowthController
    >>> policy = GrowthController(patience=2)
    >>> [policy.update(value) for value in (0.1, 0.3, 0.2, 0.2)]
    [False, False, False, True]
    >>> policy.grown()
    >>> [policy.update(value) for value in (0.2, 0.4, 0.3, 0.3)]  # a new best comes first
    [False, False, False, True]
    """

    patience: int = 10
    threshold: float = 0.5
    min_new: int = 5
    min_split: int = 11
    max_learners: int | None = None
    top_share: float | None = None
    best: float = -math.inf
    waited: int = 0
    improved: bool = True

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_new < _BOTH_LEAST or self.min_split < self.min_new + _BOTH_LEAST:
            raise ValueError(
                f"patience, min_new, min_split: at least 1, {_BOTH_LEAST} and min_new + {_BOTH_LEAST}, "
                f"got {self.patience}, {self.min_new} and {self.min_split}"
            )
        for name, share in (("threshold", self.threshold), ("top_share", self.top_share)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name}: must lie in (0, 1), got {share}")

    def update(self, value: float) -> bool:
        """Take the number of an epoch (higher is better); whether it is time to split."""
        if not math.isfinite(value):
            raise ValueError(f"value: must be finite, got {value}")
        if value > self.best:
            self.best, self.waited, self.improved = value, 0, True
        else:
            self.waited += 1
        return self.improved and self.waited >= self.patience

    def kept_neurons(self, importance: Float[Tensor, " n"], n_learners: int = 1) -> Int[Tensor, " k"] | None:
        """Places of the neurons that stay, most important first; None where the learner is not to be split."""
        score = importance.detach().abs().double()
        width, spread = len(score), score.max() - score.min()
        if width < self.min_split or (self.max_learners is not None and n_learners >= self.max_learners):
            return None
        order = score.argsort(descending=True, stable=True)
        if self.top_share is not None:
            kept = order[: max(self.min_new, round(self.top_share * width))]
        elif not float(spread) > 1e-12 * float(score.max()):
            return None  # all alike: no neuron is more important than another
        else:
            kept = order[((score - score.min()) / spread > self.threshold)[order]]
        return kept if self.min_new <= len(kept) <= width - _BOTH_LEAST else None

    def grown(self) -> None:
        """Say that the learner was split."""
        self.improved = False

    def state_dict(self) -> dict[str, Any]:
        """Everything, to go on later: ``GrowthController(**state)``."""
        return asdict(self)


class ClusterAssigner:
    """Rows by learner: k-means on rows of unit length, whose clusters keep their numbers from one call to the next.

    New clusters get the numbers of old ones by the one-to-one matching with the most rows in common. One of the starts
    is where the clusters were.

    Parameters
    ----------
    k
        Clusters; may be raised between calls, and the numbers that are new then are those of new clusters.
    restarts
        Other starts.
    random_state
        Seed of them.

    Raises
    ------
    ValueError
        For numbers below 1; in use for fewer different rows than clusters.

    References
    ----------
    Sanakoyeu et al. (2019), arXiv 1906.05990, match by the rows that differ, which is the same matching.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.represent import ClusterAssigner
    >>> assigner = ClusterAssigner(2, random_state=0)
    >>> rows = np.repeat(np.eye(2), [5, 3], axis=0)
    >>> first = assigner.update(rows)
    >>> bool((assigner.update(rows * 2 + 0.01) == first).all())
    True
    """

    def __init__(self, k: int, restarts: int = 5, *, random_state: Any = None) -> None:
        if k < 1 or restarts < 1:
            raise ValueError(f"k, restarts: must be at least 1, got {k} and {restarts}")
        self.k, self.restarts = k, restarts
        self.random = check_random_state(random_state)
        self.labels: np.ndarray | None = None
        self.centers: np.ndarray | None = None

    def update(self, features: Any) -> np.ndarray:
        """Cluster (n,) of rows (n, d), the same rows at every call."""
        rows = normalize_rows(check_matrix(features, "features").double()).cpu().numpy()
        if self.labels is not None and len(self.labels) != len(rows):
            raise ValueError(f"features: expected the same {len(self.labels)} rows at every call, got {len(rows)}")
        options: dict[str, Any] = {"n_clusters": self.k, "max_iter": 100, "random_state": self.random}
        found: Any = KMeans(**{**options, "n_init": self.restarts}).fit(rows) if self.k > 1 else None
        if found is not None and self.centers is not None and len(self.centers) == self.k:
            again: Any = KMeans(**{**options, "init": self.centers, "n_init": 1}).fit(rows)
            found = again if again.inertia_ <= found.inertia_ else found
        labels = np.zeros(len(rows), dtype=np.int64) if found is None else found.labels_.astype(np.int64)
        if len(np.unique(labels)) < self.k:
            raise ValueError(f"k: {self.k} clusters cannot be filled by {len(np.unique(rows, axis=0))} different rows")
        labels = labels if self.labels is None else matched(self.labels, labels, self.k)
        if found is not None:
            self.centers = np.stack([rows[labels == place].mean(0) for place in range(self.k)])
        self.labels = labels
        return labels


def matched(old: Sequence[int] | np.ndarray, new: Sequence[int] | np.ndarray, k: int) -> np.ndarray:
    """The new labels with the numbers of the old ones, cluster by cluster, so that as many rows as can be stay."""
    table = np.zeros((k, k))
    counted: Any = contingency_matrix(new, old)
    table[: counted.shape[0], np.unique(old)] = counted
    return assign(table, random_state=None).numpy()[np.asarray(new)]


class TaylorImportance:
    """The mean of activation times gradient of each neuron, gathered while a backward pass runs.

    To first order what the loss would change by without the neuron (Molchanov et al., 2017). Nothing of the size of a
    data set is kept.

    Parameters
    ----------
    width
        Neurons.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import TaylorImportance
    >>> importance, x = TaylorImportance(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> importance.watch(x)
    >>> (x * torch.tensor([1.0, 0.0])).sum().backward()
    >>> importance.mean
    tensor([2., 0.], dtype=torch.float64)
    """

    def __init__(self, width: int) -> None:
        self.sum, self.count = torch.zeros(width, dtype=torch.float64), 0

    def watch(self, activation: Float[Tensor, "n k"]) -> None:
        """Gather from the next backward pass through an activation."""
        value = activation.detach()

        def gather(gradient: Tensor) -> None:
            self.sum += (value * gradient).double().sum(0).cpu()
            self.count += len(value)

        activation.register_hook(gather)

    @property
    def mean(self) -> Float[Tensor, " k"]:
        """Mean over the rows seen; 0 where there were none."""
        return self.sum / max(1, self.count)
