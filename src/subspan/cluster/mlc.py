"""Manifold linearizing and clustering: a union of orthogonal subspaces and its clusters at once (Ding et al., 2023)."""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import eigsh
from sklearn.base import ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import check_matrix, like
from subspan.base.estimators import Estimator
from subspan.base.parameters import Bounds, Count, Positive, Seed, Whole
from subspan.geometry import EnergyRank, Subspace, coding_rate, compressed_coding_rate
from subspan.nn.subspace_cluster_heads import ManifoldLinearizingLoss, SubspaceClusterHeads
from subspan.solvers import round_embedding
from subspan.solvers.nearest_subspace import stack_subspaces

from .self_expressive import check_cluster_count

_ROWS = 4096


@dataclass(eq=False, repr=False)
class ManifoldLinearizingClustering(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, Estimator):
    """Cluster features X (n, p) by learning unit vectors Z (n, z_dim) near orthogonal subspaces, one a cluster.

    Two heads on a shared trunk are trained without labels: `warmup` steps maximise the coding rate R(Z); the head that
    makes memberships then becomes a copy of the other, and R(Z) - R_c(Z, G) is maximised, G the doubly stochastic
    membership of every row with every row of a batch. The number of clusters enters only at the end: spectral
    clustering of G over all rows, at most 4096 of them, the others by the nearest subspace. X is standardised by
    column. Needs the extra `train`. Other encoders, augmentations, devices: `ManifoldLinearizingModule` with a Trainer.

    Parameters
    ----------
    n_clusters
        Number of clusters.
    z_dim
        Size of Z; at least n_clusters times the dimension of a cluster.
    hidden
        Size of the trunk.
    eps2
        Squared precision of the coding rate.
    eta
        Entropy of memberships.
    warmup, epochs
        Steps of the first stage; passes over the rows, both stages together.
    batch_size
        Rows a step; not below z_dim by much, or the rate saturates.
    learning_rate
        Of the training.
    rank
        Of `subspaces_`, a share of energy.
    random_state
        Seed of the weights, the batches and the clustering.

    Attributes
    ----------
    labels_
        (n,), in the kind of X.
    heads_
        The trained `SubspaceClusterHeads`.
    subspaces_
        By cluster: a batched `Subspace`, or a tuple where dimensions differ.
    linearization_
        Numbers that describe Z, see `linearization`.

    References
    ----------
    Ding, Tong, Chan, Dai, Ma & Haeffele (2023), arXiv 2301.01805.

    Examples
    --------
    >>> from subspan.cluster import ManifoldLinearizingClustering
    >>> model = ManifoldLinearizingClustering(10, z_dim=64, batch_size=512, random_state=0)
    >>> labels = model.fit_predict(features)  # doctest: +SKIP
    >>> model.z_dim
    64
    """

    n_clusters: Count = 10
    _: KW_ONLY
    z_dim: Count = 64
    hidden: Count = 1024
    eps2: Positive = 0.1
    eta: Positive = 0.175
    warmup: Whole = 50
    epochs: Count = 30
    batch_size: Count = 512
    learning_rate: Positive = 1e-3
    rank: Annotated[float, Bounds(above=0, most=1)] = 0.95
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None) -> ManifoldLinearizingClustering:
        """Train on rows X (n, p) and cluster them; y is ignored. Raises ValueError for NaN or fewer rows than clusters.

        Warns where a batch has fewer rows than z_dim: the coding rate is then bounded by the rows.
        """
        self._check_parameters()
        rows = self._rows(X, reset=True).cpu().float()
        n = len(rows)
        check_cluster_count(self.n_clusters, n)
        loss = ManifoldLinearizingLoss(self.eps2, self.eta)
        if min(self.batch_size, n) < self.z_dim:
            warnings.warn(
                f"batch_size: {min(self.batch_size, n)} rows span fewer than z_dim = {self.z_dim} directions, so the "
                "coding rate is bounded by the rows",
                stacklevel=2,
            )
        self._random = check_random_state(self.random_state)
        self._mean, deviation = rows.mean(0), rows.std(0, correction=0)
        self._scale = torch.where(deviation > 0, deviation, 1)
        self.heads_ = self._trained((rows - self._mean) / self._scale, loss).double()
        self._n_features_out = self.z_dim
        z, c = self._represent(X)
        chosen = torch.from_numpy(np.sort(self._random.permutation(n)[: min(n, _ROWS)]))
        self.eps2_, self.eta_ = self.eps2, self.eta
        part = self.spectral_labels(c[chosen])
        self.subspaces_ = stack_subspaces(self._spans(z[chosen], part))
        labels = self._nearest(z)
        labels[chosen] = torch.from_numpy(part)
        self.labels_ = like(labels, X)
        self.linearization_ = linearization(z, labels.numpy(), eps2=self.eps2, energy=self.rank)
        return self

    def _trained(self, rows: Float[Tensor, "n p"], loss: ManifoldLinearizingLoss) -> SubspaceClusterHeads:
        from torch.utils.data import DataLoader, TensorDataset

        from subspan.nn.training import quiet_trainer

        from .mlc_training import ManifoldLinearizingModule

        seed = int(self._random.randint(2**31 - 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = SubspaceClusterHeads(rows.shape[1], self.hidden, self.z_dim)
            module = ManifoldLinearizingModule(heads, loss=loss, warmup=self.warmup)
            size = min(self.batch_size, len(rows))
            loader = DataLoader(
                TensorDataset(rows.float()),
                size,
                shuffle=True,
                drop_last=True,
                generator=torch.Generator().manual_seed(seed),
            )
            with quiet_trainer(max_epochs=self.epochs) as trainer:
                trainer.fit(module.objective(learning_rate=self.learning_rate), loader)
        return heads.eval().requires_grad_(False)

    def spectral_labels(self, c: Float[Tensor, "m d"]) -> np.ndarray:
        """Labels (m,) from the membership of unit rows c: its leading eigenvectors, as its degrees are all 1."""
        check_is_fitted(self, "heads_")
        with torch.no_grad():
            plan = ManifoldLinearizingLoss(self.eps2_, self.eta_).membership(c).double().numpy()
        k = self.n_clusters
        if k >= len(plan) - 1:
            vectors = np.linalg.eigh(plan)[1][:, ::-1][:, :k]
        else:
            start = self._random.standard_normal(len(plan))
            vectors = eigsh(plan, k, which="LA", v0=start)[1]
        return round_embedding(vectors, "kmeans", n_clusters=k, random_state=self._random)

    def _spans(self, z: Float[Tensor, "m d"], labels: np.ndarray) -> list[Subspace]:
        found = []
        for label in range(self.n_clusters):
            own = z[torch.from_numpy(labels == label)].double()
            if len(own) < 2:
                found.append(Subspace.span(own.mT))
                continue
            found.append(Subspace.fit(own, rank=EnergyRank(self.rank), center=False))
        return found

    def _nearest(self, z: Float[Tensor, "n d"]) -> Tensor:
        """The subspace with the least residual."""
        return torch.stack([span.residual_energy(z.double()) for span in self.subspaces_]).argmin(0)

    @torch.no_grad()
    def _represent(self, X: Any) -> tuple[Tensor, Tensor]:
        rows = self._rows(X).cpu().float()
        # In double precision, so that a row is represented alike in whatever batch it comes.
        parts = [self.heads_(((part - self._mean) / self._scale).double()) for part in rows.split(_ROWS)]
        z, c = (torch.cat(part) for part in zip(*parts))
        return z, c

    def transform(self, X: Any) -> Any:
        """The representation Z (n, z_dim) of rows, of unit length."""
        check_is_fitted(self, "heads_")
        given = X.dtype if isinstance(X, Tensor) else torch.float32 if getattr(X, "dtype", None) == np.float32 else None
        z = self._represent(X)[0]
        return like(z.to(torch.float64 if given is None or not given.is_floating_point else given), X)

    def predict(self, X: Any) -> Any:
        """The cluster of each row: that of the subspace nearest to its representation."""
        check_is_fitted(self, "heads_")
        return like(self._nearest(self._represent(X)[0]), X)

    def membership(self, X: Any) -> Any:
        """The doubly stochastic membership (n, n) of rows among themselves; at most 4096 of them."""
        check_is_fitted(self, "heads_")
        c = self._represent(X)[1]
        if len(c) > _ROWS:
            raise ValueError(f"X: at most {_ROWS} rows, got {len(c)}; a membership holds all pairs")
        with torch.no_grad():
            return like(ManifoldLinearizingLoss(self.eps2_, self.eta_).membership(c), X)


def linearization(Z: Any, labels: Any, *, eps2: float = 0.1, energy: float = 0.95) -> dict[str, float]:
    """Numbers that say how far rows of unit length are a union of orthogonal subspaces by their labels.

    Parameters
    ----------
    Z
        Rows (n, d) of unit length.
    labels
        (n,), the group of each row.
    eps2
        Squared precision of the coding rate.
    energy
        Share of the (uncentred) variance that the counted directions hold.

    Returns
    -------
    dict
        Directions that hold `energy` over all rows and on average in a cluster; mean |cosine| within and between
        clusters; coding rate, that of the clusters, and their difference.

    Raises
    ------
    ValueError
        Where there are not as many labels as rows.

    Examples
    --------
    >>> import torch
    >>> from subspan.cluster import linearization
    >>> found = linearization(torch.eye(4).repeat_interleave(3, 0), [0] * 6 + [1] * 6)  # two orthogonal planes
    >>> found["rank"], found["rank of a cluster"], found["cosine between"]
    (4.0, 2.0, 0.0)
    """
    z = check_matrix(Z, "Z", min_rows=2).double()
    names, index = np.unique(np.asarray(labels), return_inverse=True)
    if len(index) != len(z):
        raise ValueError(f"labels: expected {len(z)}, got {len(index)}")
    member = torch.from_numpy(np.eye(len(names))[index].T).to(z)

    def rank(rows: Tensor) -> float:
        share = torch.linalg.svdvals(rows).square().cumsum(0)
        return float((share < energy * share[-1]).sum()) + 1

    cosines = (z @ z.mT).abs()
    same = member.mT @ member > 0
    pairs = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    whole = float(coding_rate(z, epsilon=eps2**0.5))
    parts = float(compressed_coding_rate(z, member, epsilon=eps2**0.5))
    return {
        "rank": rank(z),
        "rank of a cluster": float(np.mean([rank(z[row > 0]) for row in member])),
        "cosine within": float(cosines[pairs].mean()) if bool(pairs.any()) else 0.0,
        "cosine between": float(cosines[~same].mean()) if bool((~same).any()) else 0.0,
        "coding rate": whole,
        "coding rate of clusters": parts,
        "rate reduction": whole - parts,
    }
