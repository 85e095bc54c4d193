"""A user's channel subspace from powers of a few beams: pretrained on many sites, adapted by a memory (SiFo, 2026)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.utils import check_random_state
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from subspan.base import as_tensor
from subspan.base.parameters import Count, NonNegative, Positive, Seed, check_parameters
from subspan.geometry import Subspace
from subspan.nn.training import quiet_trainer
from subspan.represent import SubspaceBank
from subspan.solvers import leading_eigenspace

from .fingerprints import fingerprint_keys
from .sifo_network import CaptureLoss, InContextSubspaceRegressor, Memory, label_covariances

# What a pretraining tries for the bank: widths in dB, and pairs that the prior counts as.
BANDWIDTHS, PRIOR_WEIGHTS = (3.0, 4.5, 6.0, 9.0), (0.003, 0.03)
_TRIED, _ASKED = (10, 50), 100
_QUERIES = 1024


class Episodes(Dataset[Any]):
    """Episodes of a pretraining: queries and a memory, both of one site and of different users.

    Parameters
    ----------
    sites
        Keys and covariances of each.
    count
        Episodes.
    queries, largest
        Users that are asked about, and the most in a memory: half the users of a site where it has too few.
    seed
        Each episode is drawn from it and its number alone.
    """

    def __init__(self, sites: Sequence[Memory], count: int, *, queries: int, largest: int, seed: int) -> None:
        self.sites, self.count, self.queries, self.largest, self.seed = sites, count, queries, largest, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if index >= self.count:
            raise IndexError(index)
        random = np.random.default_rng([self.seed, index])
        keys, covariances = self.sites[int(random.integers(len(self.sites)))]
        order = torch.from_numpy(random.permutation(len(keys)))
        # Log-uniform sizes, 0 among them.
        size = int(np.exp(random.uniform(0, np.log(self.largest + 2)))) - 1
        size = min(size, len(keys) // 2)
        asked, held = order[size : size + self.queries], order[:size]
        return keys[asked], covariances[asked], keys[held], covariances[held]


@dataclass(eq=False)
class SiFo:
    """Predict the dominant subspace of users' channels from powers of a few wide beams.

    `pretrain` on other sites, `calibrate` with some users of the site at hand, `predict` for all others. Calibration is
    memory alone: no parameter changes, users may come and go. Training needs the extra `train`; the bank needs none.

    Parameters
    ----------
    n_components
        Dimension of what is predicted.
    method
        "in-context": the pretrained network. "bank", which needs no pretraining: the mean covariance of neighbours in
        the space of fingerprints (`SubspaceBank`), with a prior and a bandwidth from other sites where there are any.
    capacity
        Users in the memory, at most; the oldest go first. None: all.
    n_neighbors, bandwidth, prior_weight
        Of the bank: dB, and pairs that the prior counts as. None: the best at the sites of the pretraining, else 6 dB
        and 0.03.
    level_weight
        dB of distance between fingerprints for a dB of level.
    width, blocks, rank
        Of the network; see `InContextSubspaceRegressor`.
    frame
        (g, N) beams in which the network reads labels; None: the positions.
    episodes, queries, largest_memory
        Of the pretraining: episodes, users asked about in each, and the most users in its memory.
    learning_rate, weight_decay, energy_weight
        Of AdamW with a cosine, and of the divergence of energies in `CaptureLoss`.
    trainer
        Options of Lightning's Trainer.
    random_state
        Seed of the pretraining.

    Attributes
    ----------
    memory_
        The `SubspaceBank` of calibrated users.
    network_
        The pretrained network ("in-context").
    prior_
        Mean covariance of the sites of the pretraining, as a subspace; what is predicted before any calibration.
    bandwidth_, prior_weight_
        As given or chosen.
    loss_
        Mean loss over the episodes of the pretraining ("in-context").

    References
    ----------
    Zhao, Wang, Zhao & Liu (2026), arXiv 2605.16141, of which only the abstract was at hand: network and bank are ours.

    Examples
    --------
    >>> from subspan.datasets import street_canyon
    >>> from subspan.wireless import SiFo, channel_covariance, channel_subspaces, probing_beams, rsrp
    >>> beams = probing_beams((8, 4))
    >>> def measured(site):
    ...     return rsrp(site.channels, beams, gains=site.gains), channel_subspaces(site.channels)
    >>> here = street_canyon(users=120, random_state=9)
    >>> powers, labels = measured(here)
    >>> others = [measured(street_canyon(users=60, random_state=seed)) for seed in range(2)]
    >>> model = SiFo(n_components=4, method="bank").pretrain(others)
    >>> prior = model.predict(powers[60:])
    >>> found = model.calibrate(powers[:60], labels[:60]).predict(powers[60:])
    >>> truth = channel_covariance(here.channels[60:])
    >>> bool(found.captured_energy(truth).mean() > prior.captured_energy(truth).mean() + 0.1)
    True
    """

    # It is `check_parameters` that checks them: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    n_components: Count = 4
    method: Literal["bank", "in-context"] = "in-context"
    capacity: Count | None = None
    n_neighbors: Count = 8
    bandwidth: Positive | None = None
    prior_weight: Positive | None = None
    level_weight: NonNegative = 0.25
    width: Count = 256
    blocks: Count = 2
    rank: Count = 8
    frame: Tensor | None = field(default=None, repr=False)
    episodes: Count = 20_000
    queries: Count = 64
    largest_memory: Count = 256
    learning_rate: Positive = 3e-4
    weight_decay: NonNegative = 1e-2
    energy_weight: NonNegative = 0.1
    trainer: dict[str, Any] | None = None
    random_state: Seed = None

    def __post_init__(self) -> None:
        check_parameters(self)
        self.prior_: Subspace | None = None
        self.network_: InContextSubspaceRegressor | None = None
        self.loss_: float | None = None
        self.bandwidth_ = 6.0 if self.bandwidth is None else float(self.bandwidth)
        self.prior_weight_ = 0.03 if self.prior_weight is None else float(self.prior_weight)
        self.forget()

    # ------------------------------------------------------------------ learning

    def pretrain(self, sites: Sequence[tuple[Any, Subspace]]) -> SiFo:
        """Learn from sites, each powers (n, S) in dB and labels, a batch of n subspaces with variances.

        Forgets what was calibrated. Raises ValueError for NaN, no site, and sites of different sizes.
        """
        if not sites:
            raise ValueError("sites: at least one is needed, each with powers and labels")
        read = [self._site(powers, labels) for powers, labels in sites]
        if len({(site.keys.shape[1], site.covariances.shape[1:], site.covariances.dtype) for site in read}) > 1:
            raise ValueError("sites: must have equal numbers of beams and positions, all real or all complex")
        mean = torch.stack([site.covariances.mean(0) for site in read]).mean(0)
        self.prior_ = leading_eigenspace(mean, len(mean), cut="exact")
        if self.n_components > len(mean):
            raise ValueError(f"n_components: at most {len(mean)} positions, got {self.n_components}")
        self._choose(read)
        if self.method == "in-context":
            self._train(read, mean)
        return self.forget()

    def _site(self, powers: Any, labels: Subspace) -> Memory:
        keys = self._keys(powers)
        if labels.batch_shape != (len(keys),):
            raise ValueError(f"sites: {len(keys)} rows of powers and labels of batch shape {labels.batch_shape}")
        return Memory(keys, label_covariances(labels).to(keys.device))

    def _keys(self, powers: Any) -> Float[Tensor, "n q"]:
        return fingerprint_keys(as_tensor(powers, "powers").detach(), level_weight=self.level_weight).float()

    def _choose(self, sites: Sequence[Memory]) -> None:
        """The bandwidth and the prior's weight that capture most at the sites, each with a prior of the others."""
        if self.bandwidth is not None and self.prior_weight is not None:
            return
        random = np.random.default_rng(0)
        tried: dict[tuple[float, float], list[float]] = {}
        for place, (keys, covariances) in enumerate(sites):
            others = [site.covariances.mean(0) for other, site in enumerate(sites) if other != place or len(sites) == 1]
            mean = torch.stack(others).mean(0)
            prior = leading_eigenspace(mean, len(mean), cut="exact")
            order = torch.from_numpy(random.permutation(len(keys)))
            for size in _TRIED:
                size = min(size, len(keys) // 2)
                held, asked = order[:size], order[size:][:_ASKED]
                labels = leading_eigenspace(covariances[held], min(8, len(mean)), cut="exact")
                widths = BANDWIDTHS if self.bandwidth is None else (self.bandwidth,)
                weights = PRIOR_WEIGHTS if self.prior_weight is None else (self.prior_weight,)
                for width, weight in itertools.product(widths, weights):
                    bank = SubspaceBank(self.n_components, prior=prior, prior_weight=weight).add(keys[held], labels)
                    found = bank.query(keys[asked], self.n_neighbors, bandwidth=width)
                    share = float(found.captured_energy(covariances[asked]).mean())
                    tried.setdefault((width, weight), []).append(share)
        self.bandwidth_, self.prior_weight_ = max(tried, key=lambda each: np.mean(tried[each]))

    def _train(self, sites: Sequence[Memory], mean: Tensor) -> None:
        from subspan.nn import Objective

        seed = int(check_random_state(self.random_state).randint(2**31))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self._network(sites[0].keys.shape[1], mean)
            data = Episodes(sites, self.episodes, queries=self.queries, largest=self.largest_memory, seed=seed)
            objective = Objective(
                network,
                CaptureLoss(self.energy_weight),
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                decay_vectors=False,
                schedule="cosine",
                warmup=0.05,
            )
            batches: Any = DataLoader(data, batch_size=None)
            with quiet_trainer(max_epochs=1, gradient_clip_val=1.0, **(self.trainer or {})) as trainer:
                trainer.fit(objective, batches)
        self.loss_ = objective.losses[-1]
        self.network_ = network.eval().requires_grad_(False).cpu()

    def _network(self, features: int, mean: Tensor) -> InContextSubspaceRegressor:
        network = InContextSubspaceRegressor(
            len(mean),
            self.n_components,
            features,
            frame=self.frame,
            is_complex=mean.is_complex(),
            rank=self.rank,
            width=self.width,
            blocks=self.blocks,
            bandwidth=self.bandwidth_,
            prior_weight=self.prior_weight_,
        )
        network.prior.copy_(mean)
        return network

    # ------------------------------------------------------------------ a site

    def forget(self) -> SiFo:
        """Empty the memory: a new site."""
        self.memory_ = SubspaceBank(
            self.n_components, capacity=self.capacity, prior=self.prior_, prior_weight=self.prior_weight_
        )
        return self

    def calibrate(self, powers: Any, subspaces: Subspace) -> SiFo:
        """Remember users with known subspaces: powers (n, S) in dB, and a batch of n. They add to those there are."""
        self.memory_.add(self._keys(powers), subspaces)
        return self

    def predict(self, powers: Any) -> Subspace:
        """Subspaces of users from their powers (m, S) in dB: a batch, with the share of energy expected along each.

        Raises ValueError for NaN, other numbers of beams, and where there is neither a memory nor a pretraining.
        """
        keys = self._keys(powers)
        if self.method == "bank":
            return self.memory_.query(keys, self.n_neighbors, bandwidth=self.bandwidth_)
        if self.network_ is None:
            raise ValueError("method: 'in-context' predicts with a pretrained network; call pretrain first")
        if keys.shape[1] != self.network_.n_features:
            raise ValueError(f"powers: expected {self.network_.n_features - 1} beams, got {keys.shape[1] - 1}")
        with torch.no_grad():
            parts = [self.network_(part, self.memory_.keys, self.memory_.subspaces) for part in keys.split(_QUERIES)]
        basis, variances = (torch.cat(each) for each in zip(*((part.basis, part.variances) for part in parts)))
        return Subspace(basis, variances=variances)
