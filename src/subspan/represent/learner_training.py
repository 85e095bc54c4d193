"""What dynamic subspace learners are trained on: the network, and epochs of batches, between which it grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from subspan.base.modules import applied
from subspan.nn import AttentionPool2d

from .learner_growth import ClusterAssigner, GrowthController, TaylorImportance
from .margin import MarginLoss
from .subspace_embedding import SubspaceEmbedding

# In place of the number of a learner: all of them together.
_ALL = -1


class LearnerNetwork(nn.Module):
    """Vectors (n, d), or maps (n, c, h, w) pooled by attention, through one `SubspaceEmbedding`.

    Features are centred and brought to one scale by fixed numbers, a mean a channel and one deviation: what learners
    read are subspaces of the features as they came.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, items: Float[Tensor, "n c *p"], out_dim: int, *, n_learners: int = 1, loss: MarginLoss | None = None
    ) -> None:
        super().__init__()
        channels = items.shape[1]
        rows = items.double().transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        scale = (rows - mean[:, None]).square().mean().sqrt()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", torch.where(scale > 1e-10 * rows.abs().max(), scale, 1).float())
        self.pool = AttentionPool2d(channels) if items.ndim == 4 else None
        self.embedding = SubspaceEmbedding(channels, out_dim, n_learners=n_learners)
        self.loss = MarginLoss() if loss is None else loss
        self.importance: TaylorImportance | None = None

    def _scaled(self, items: Float[Tensor, "n c *p"]) -> Float[Tensor, "n c *p"]:
        shape = (-1, *[1] * (items.ndim - 2))
        return (items - self.mean.view(shape)) / self.scale

    def features(self, items: Float[Tensor, "n c *p"]) -> Float[Tensor, "n c"]:
        """What the embedding reads."""
        scaled = self._scaled(items)
        return scaled if self.pool is None else self.pool(scaled)[0]

    def attention(self, maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n h w"]:
        """Where maps are looked at."""
        assert self.pool is not None
        return self.pool.attention(self._scaled(maps))

    def forward(self, items: Float[Tensor, "n c *p"]) -> Float[Tensor, "n e"]:
        """Slices of unit length."""
        return self.embedding(self.features(items))

    def training_loss(self, batch: Sequence[Any]) -> Float[Tensor, ""]:
        """Of the slice of the batch's learner, or of the whole embedding; importances of the last one are gathered."""
        items, labels, learner = batch
        f = self(items)
        if learner == _ALL:
            return self.loss(F.normalize(f, dim=-1), labels)
        z = self.embedding.slice(f, learner)
        if self.importance is not None and learner == self.embedding.n_learners - 1 and z.requires_grad:
            self.importance.watch(z)
        return self.loss(z, labels)


class LearnerEpochs:
    """Batches (items, labels, learner) of one epoch after the other; growth and clustering are done between epochs.

    Clusters take turns, batch by batch; those that are short start again until the longest is through. After `epochs`
    the batches are of all rows, for all learners together.
    """

    def __init__(
        self,
        network: LearnerNetwork,
        items: Float[Tensor, "n c *p"],
        labels: Int[Tensor, " n"],
        *,
        policy: GrowthController | None,
        by_chance: bool,
        validation: float,
        epochs: int,
        recluster: int,
        batch_size: int,
        per_class: int,
        random: np.random.RandomState,
    ) -> None:
        self.network, self.items, self.labels = network, items, labels
        self.policy, self.by_chance = policy, by_chance
        self.epochs, self.recluster = epochs, recluster
        self.batch_size, self.per_class, self.random = batch_size, per_class, random
        self.optimizer: Optimizer | None = None
        self.epoch, self.skipped = 0, 0
        self.history: list[tuple[float | None, int]] = []
        self.held = self._held_out(validation if policy is not None else 0.0)
        self.rows = (~self.held).nonzero()[:, 0]
        self.clusters = ClusterAssigner(network.embedding.n_learners, random_state=random)
        self.cluster = np.zeros(len(self.rows), dtype=np.int64)

    def keep_optimizer(self, groups: Any, **options: Any) -> Optimizer:
        """Adam, remembered: its moments follow the neurons of a learner that is split."""
        self.optimizer = Adam(groups, **options)
        return self.optimizer

    def _held_out(self, share: float) -> Tensor:
        """A share of each class, of which at least two rows stay for the training."""
        held = torch.zeros(len(self.labels), dtype=torch.bool)
        for name in self.labels.unique():
            rows = (self.labels == name).nonzero()[:, 0].numpy()
            count = min(round(share * len(rows)), len(rows) - 2)
            held[torch.from_numpy(self.random.permutation(rows)[:count].copy())] = True
        return held

    def learner_of(self) -> np.ndarray:
        """The learner of each row at the last clustering; -1 for rows held out."""
        found = np.full(len(self.labels), -1)
        found[self.rows.numpy()] = self.cluster
        return found

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        if 0 < self.epoch <= self.epochs:
            self._grow()
        if self.epoch < self.epochs:
            if self.network.embedding.n_learners > 1 and self.epoch % self.recluster == 0:
                self._cluster()
            yield from self._turns()
        else:
            for rows in self._balanced(self.rows):
                yield self.items[rows], self.labels[rows], _ALL
        self.epoch += 1

    # ------------------------------------------------------------------ growth

    def _grow(self) -> None:
        """Look at the rows held out; split the last learner where it is time."""
        embedding = self.network.embedding
        score = None
        if self.policy is not None:
            score = self._score()
            if self.policy.update(score) and self.network.importance is not None:
                kept = self.policy.kept_neurons(self.network.importance.mean, embedding.n_learners)
                if kept is not None:
                    if self.by_chance:
                        width = len(self.network.importance.mean)
                        kept = torch.from_numpy(self.random.permutation(width)[: len(kept)].copy())
                    embedding.split(embedding.n_learners - 1, kept, self.optimizer)
                    self.policy.grown()
                    self.clusters.k = embedding.n_learners
                    self._cluster()
            self.network.importance = None
        self.history.append((score, embedding.n_learners))

    @torch.no_grad()
    def _score(self) -> float:
        """NMI of k-means with the classes, on the rows held out, or on those of the training where there are few."""
        classes = len(self.labels.unique())
        watched = self.held if int(self.held.sum()) >= 2 * classes else ~self.held
        self.network.eval()
        z = applied(self.network, self.items[watched]).numpy()
        self.network.train()
        options: dict[str, Any] = {"n_init": 1, "random_state": 0}
        found = KMeans(classes, **options).fit_predict(z)
        return float(normalized_mutual_info_score(self.labels[watched].numpy(), found))

    @torch.no_grad()
    def _cluster(self) -> None:
        self.network.eval()
        device = self.network.mean.device
        parts = [self.network.features(part.to(device)) for part in self.items[self.rows].split(512)]
        self.cluster = self.clusters.update(torch.cat(parts))
        self.network.train()

    # ------------------------------------------------------------------ batches

    def _turns(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        learners = self.network.embedding.n_learners
        if self.policy is not None:
            self.network.importance = TaylorImportance(int(self.network.embedding.learner.bincount()[-1]))
        loaders = {}
        for learner in range(learners):
            batches = list(self._balanced(self.rows[torch.from_numpy(self.cluster == learner)]))
            loaders |= {learner: batches} if batches else {}
        self.skipped += learners - len(loaders)
        for turn in range(max(map(len, loaders.values()), default=0)):
            for learner, batches in loaders.items():
                rows = batches[turn % len(batches)]
                yield self.items[rows], self.labels[rows], learner

    def _balanced(self, rows: Tensor) -> Iterator[Tensor]:
        """Batches with as many rows of each of some classes; classes of a single row are left out."""
        members = {int(name): rows[self.labels[rows] == name] for name in self.labels[rows].unique()}
        members = {name: found for name, found in members.items() if len(found) > 1}
        if len(members) < 2:
            return
        names = np.array(list(members))
        per_batch = min(len(names), self.batch_size // self.per_class)
        for _ in range(-(-sum(map(len, members.values())) // self.batch_size)):
            chosen = self.random.choice(names, per_batch, replace=False)
            yield torch.cat([self._drawn(members[name]) for name in chosen])

    def _drawn(self, rows: Tensor) -> Tensor:
        few = len(rows) < self.per_class
        return rows[torch.from_numpy(self.random.choice(len(rows), self.per_class, replace=few))]
