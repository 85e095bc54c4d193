"""K-subspaces: rows to the nearest of k subspaces, each refitted to its rows, in turn (Bradley & Mangasarian, 2000)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from subspan.base import like
from subspan.base.parameters import Count, NonNegative, Seed
from subspan.geometry import Subspace
from subspan.solvers import round_embedding
from subspan.solvers.nearest_subspace import squared_residuals
from subspan.solvers.self_expression import RIDGE, mean_energy, ridge_self_expression
from subspan.solvers.spectral import affinity_from_representation, spectral_embedding

from .self_expressive import RowClusterer

_EXACT = 512
_BLOCK = 1 << 24


@dataclass(eq=False, repr=False)
class KSubspaces(RowClusterer):
    """Cluster rows by k linear (or affine) subspaces of one dimension, minimising their squared residuals.

    A cluster that comes out empty is started from the worst-fitted rows. Time O(n d k rank) a step, memory O(n (d +
    k)).

    Parameters
    ----------
    n_clusters, rank
        Number k and dimension of the subspaces.
    affine
        True: each goes through the mean of its rows, and rows are taken as they are; False: they are scaled to unit
        length.
    init
        "neighbours", a subspace of a row and its nearest others, the next row drawn by its squared residual to those
        before; "random", k random subsets of rows; "lsr", ridge self-expression (up to 20 000 rows).
    n_init
        Starts; the best objective wins.
    max_iter, tolerance
        A start ends after max_iter steps, or when the objective falls by less than tolerance of it.
    random_state
        Seed of the starts.

    Attributes
    ----------
    labels_
        (n,), in the kind of X.
    subspaces_
        Batched `Subspace`, one a cluster.
    inertia_
        Sum of squared residuals.
    history_, n_iter_
        The objective after each step of the best start (it never rises), and the number of its steps.

    References
    ----------
    Bradley & Mangasarian, 2000; Tseng, 2000.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.cluster import KSubspaces
    >>> rng = np.random.default_rng(0)
    >>> x = np.vstack([rng.normal(size=(20, 2)) @ rng.normal(size=(2, 12)) for _ in range(3)])
    >>> model = KSubspaces(3, 2, random_state=0).fit(x)
    >>> [len(set(part)) for part in model.labels_.reshape(3, 20).tolist()], model.inertia_ < 1e-9
    ([1, 1, 1], True)
    """

    n_clusters: Count = 8
    rank: Count = 2
    _: KW_ONLY
    affine: bool = False
    init: Literal["neighbours", "random", "lsr"] = "neighbours"
    n_init: Count = 10
    max_iter: Count = 100
    tolerance: NonNegative = 1e-6
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None) -> KSubspaces:
        """Cluster rows X (n, d). Raises ValueError for NaN, rank >= d, k > n."""
        self._check_parameters()
        rows = self._on_cpu(X, reset=True)
        if self.rank >= rows.shape[1] and rows.shape[1] > 1:
            raise ValueError(f"rank: subspaces of dimension {self.rank} fill a space of n_features = {rows.shape[1]}")
        points = self._spanning(rows)
        random = check_random_state(self.random_state)
        best: tuple[float, list[float], Tensor, Subspace] | None = None
        for _ in range(self.n_init):
            found = self._descend(points, self._start(points, random))
            if best is None or found[0] < best[0]:
                best = found
        assert best is not None
        self.inertia_, self.history_, labels, self.subspaces_ = best
        self.n_iter_ = len(self.history_)
        self.labels_ = like(labels, X)
        return self

    # ------------------------------------------------------------------ one start

    def _descend(self, points: Tensor, spaces: Subspace) -> tuple[float, list[float], Tensor, Subspace]:
        history: list[float] = []
        labels, residuals = self._assigned(points, spaces)
        for _ in range(self.max_iter):
            labels = self._without_empty(labels, residuals)
            spaces = self._refitted(points, labels, spaces)
            labels, residuals = self._assigned(points, spaces)
            history.append(float(residuals.sum()))
            if len(history) > 1 and history[-2] - history[-1] <= self.tolerance * history[-2]:
                break
        return history[-1], history, self._without_empty(labels, residuals), spaces

    def _assigned(self, points: Tensor, spaces: Subspace) -> tuple[Tensor, Tensor]:
        """The nearest subspace of each row and its squared residual."""
        step = max(1, _BLOCK // points.shape[1])
        parts = [squared_residuals(part, spaces).min(1) for part in points.split(step)]
        return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])

    def _without_empty(self, labels: Tensor, residuals: Tensor) -> Tensor:
        counts = torch.bincount(labels, minlength=self.n_clusters)
        for cluster in (counts == 0).nonzero().squeeze(1).tolist():
            # The worst-fitted rows, but never the last one of another cluster.
            order = residuals.masked_fill(counts[labels] < 2, -1.0)
            worst = int(order.argmax())
            labels, residuals = labels.clone(), residuals.clone()
            counts[labels[worst]] -= 1
            counts[cluster] += 1
            labels[worst], residuals[worst] = cluster, 0.0
        return labels

    def _refitted(self, points: Tensor, labels: Tensor, before: Subspace) -> Subspace:
        """The principal subspace of each cluster; in high dimension some steps of it from the one before."""
        bases, centers = [], []
        for cluster in range(self.n_clusters):
            rows = points[labels == cluster]
            if self.affine:
                centers.append(rows.mean(0))
                rows = rows - centers[-1]
            bases.append(_principal(rows, before.basis[cluster]))
        return Subspace(torch.stack(bases), center=torch.stack(centers) if centers else None)

    def _start(self, points: Tensor, random: Any) -> Subspace:
        n, k = len(points), self.n_clusters
        if self.init == "lsr":
            c = ridge_self_expression(points, RIDGE * mean_energy(points)).numpy()
            affinity = affinity_from_representation(c, retain=max(3, min(n - 1, 2 * self.rank)))
            vectors = spectral_embedding(affinity, k, random_state=random).vectors
            labels = torch.from_numpy(round_embedding(vectors, "kmeans", n_init=1, random_state=random))
            groups = [points[labels == cluster] for cluster in range(k)]
        elif self.init == "random":
            order = torch.from_numpy(random.permutation(n))
            groups = [points[part] for part in order.tensor_split(k)]
        else:
            groups = []
            residuals = np.ones(n)
            for _ in range(k):
                total = residuals.sum()
                seed = int(random.choice(n, p=residuals / total if total > 0 else None))
                groups.append(points[self._neighbours(points, seed)])
                fresh = squared_residuals(points, [self._space(groups[-1], random)])[:, 0].double().numpy()
                residuals = np.minimum(residuals, fresh) if len(groups) > 1 else fresh
                residuals = np.maximum(residuals, 0)
        spaces = [self._space(group, random) for group in groups]
        centers = [space.center for space in spaces if space.center is not None]
        return Subspace(
            torch.stack([space.basis for space in spaces]), center=torch.stack(centers) if centers else None
        )

    def _neighbours(self, points: Tensor, seed: int) -> Tensor:
        count = min(len(points), 2 * self.rank + 1)
        if self.affine:
            return (points - points[seed]).square().sum(1).topk(count, largest=False).indices
        return (points @ points[seed]).abs().topk(count).indices

    def _space(self, rows: Tensor, random: Any) -> Subspace:
        center = rows.mean(0) if self.affine else None
        filler = torch.from_numpy(random.standard_normal((rows.shape[1], self.rank))).to(rows)
        start = torch.linalg.qr(filler).Q
        return Subspace(_principal(rows if center is None else rows - center, start), center=center)


def _principal(rows: Tensor, start: Tensor) -> Tensor:
    """Basis (d, dim) of the leading directions of rows (m, d); directions that the rows lack come from `start`."""
    d, dim = start.shape
    if min(rows.shape) <= _EXACT:
        if len(rows) >= d:
            basis = torch.linalg.eigh((rows.mT @ rows).double()).eigenvectors[:, -dim:].flip(1)
            return torch.linalg.qr(basis.to(start.dtype)).Q
        wide = rows.double()
        values, left = torch.linalg.eigh(wide @ wide.mT)
        values, left = values.flip(0), left.flip(1)
        strong = int((values > 1e-12 * values[:1]).sum())
        directions = (wide.mT @ left[:, : min(strong, dim)]).to(start.dtype)
        directions = torch.linalg.qr(directions).Q
        return torch.linalg.qr(torch.cat([directions, start], dim=1)).Q[:, :dim] if strong < dim else directions
    # Each step of orthogonal iteration captures at least as much energy as the one before.
    for _ in range(3):
        start = torch.linalg.qr(rows.mT @ (rows @ start)).Q
    return start
