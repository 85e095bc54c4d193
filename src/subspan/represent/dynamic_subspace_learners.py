"""Metric learners inside one embedding whose number grows while it is trained (Adiga et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import like
from subspan.base.estimators import Estimator, in_numpy
from subspan.base.modules import applied
from subspan.base.parameters import Count, NonNegative, Positive, Seed, Share
from subspan.nn.training import quiet_trainer

from .hydra_training import class_numbers
from .learner_growth import GrowthController
from .learner_training import LearnerEpochs, LearnerNetwork
from .margin import MarginLoss, NearestNegativeSampler
from .subspace_embedding import learner_separation


class Separation(NamedTuple):
    """How different learners are; see `DynamicSubspaceLearners.separation`.

    Attributes
    ----------
    angle
        Mean principal angle of what they read, degrees.
    agreement
        Mean normalised mutual information of their own k-means clusters: low where they look at different things.
    """

    angle: float
    agreement: float


@dataclass(eq=False, repr=False)
class DynamicSubspaceLearners(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """Map embeddings X (n, d), or feature maps (n, c, h, w), with classes y to slices, one a metric learner.

    Training starts with one learner. Where the clustering of rows held out no longer gets better, the last learner is
    split: its important neurons stay, the others start new; the rows are clustered, and each learner is trained on a
    cluster of its own. At the end all are trained together. Maps are pooled by an attention that is trained along.
    Needs the extra `train`.

    Parameters
    ----------
    out_dim
        Coordinates of all learners together.
    n_learners
        A fixed number, without growth; None lets it grow.
    max_learners
        Bound of the growth.
    growth
        "importance", or "random" neurons stay, as a control.
    patience, threshold, min_new, min_split, top_share
        Of `GrowthController`.
    validation
        Share of the rows of each class that is held out for the growth alone; 0 watches the rows of the training.
    epochs, final_epochs
        All of them, and the last ones that train all learners together.
    recluster
        Epochs between two clusterings.
    batch_size, per_class
        Rows of a batch, and of each class in it; the one is a multiple of the other.
    learning_rate, weight_decay
        Of Adam.
    beta, margin, cutoff
        Of `MarginLoss` and `NearestNegativeSampler`.
    trainer
        Options of Lightning's Trainer (devices, callbacks, progress, …).
    random_state
        Seed of the training.

    Attributes
    ----------
    n_learners_, blocks_
        Their number, and the coordinates of each as named `Blocks`.
    subspaces_
        What each learner reads of the (pooled) features: a tuple of `Subspace`s.
    growth_history_
        Of every epoch before the last ones: NMI of the rows watched (None where nothing can grow), learners after it.
    learner_of_
        (n,) the learner that each row was given to at the last clustering; -1 for rows held out.
    skipped_
        Clusters of a single class that gave no batch, counted over epochs.
    classes_, network_, losses_
        The classes, the trained module, and the mean loss of each epoch.

    Notes
    -----
    The authors' code grows by the score of the test set, and leaves Adam's moments where they were when neurons move;
    here rows are held out for the growth, and moments follow their neurons.

    References
    ----------
    Adiga et al. (2022), arXiv 2206.09068. Fixed learners are those of Sanakoyeu et al. (2019), arXiv 1906.05990.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.represent import DynamicSubspaceLearners
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(80) % 4
    >>> x = rng.normal(size=(80, 6)) + 3 * np.eye(4, 6)[y]
    >>> model = DynamicSubspaceLearners(8, n_learners=2, epochs=3, final_epochs=1, random_state=0).fit(x, y)
    >>> model.transform(x).shape, model.transform(x, learners=[1]).shape, model.blocks_.sizes
    ((80, 8), (80, 4), {'0': 4, '1': 4})
    """

    out_dim: Count = 128
    n_learners: Count | None = None
    max_learners: Count | None = None
    growth: Literal["importance", "random"] = "importance"
    patience: Count = 10
    threshold: Positive = 0.5
    min_new: Count = 5
    min_split: Count = 11
    top_share: Positive | None = None
    validation: Share = 0.2
    epochs: Count = 60
    final_epochs: Count = 10
    recluster: Count = 2
    batch_size: Count = 32
    per_class: Count = 8
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 1e-4
    beta: Positive = 1.2
    margin: NonNegative = 0.2
    cutoff: NonNegative = 0.5
    trainer: Mapping[str, Any] | None = None
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None) -> DynamicSubspaceLearners:
        """Train on items X, (n, d) or (n, c, h, w), of classes y (n,).

        Raises ValueError for NaN, a class of a single item, and sizes that do not fit.
        """
        self._check_parameters()
        items = self._items(X, reset=True)
        self.classes_, labels = class_numbers(y, len(items))
        counts = labels.bincount()
        if int(counts.min()) < 2:
            raise ValueError(f"y: class {self.classes_.tolist()[int(counts.argmin())]!r} has 1 item; a pair needs 2")
        self._n_features_out = int(self.out_dim)
        random = check_random_state(self.random_state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random.randint(2**31)))
            network = LearnerNetwork(
                items.detach().float().cpu(),
                int(self.out_dim),
                n_learners=1 if self.n_learners is None else int(self.n_learners),
                loss=MarginLoss(self.beta, self.margin, NearestNegativeSampler(self.cutoff)),
            )
            epochs = self._epochs(network, items.detach().float().cpu(), labels, random)
            self._train(network, epochs)
        self.network_ = network.eval().requires_grad_(False)
        self.blocks_, self.n_learners_ = network.embedding.blocks, network.embedding.n_learners
        self.subspaces_ = tuple(network.embedding.learner_subspaces())
        self.growth_history_, self.skipped_ = epochs.history, epochs.skipped
        self.learner_of_ = epochs.learner_of()
        return self

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.batch_size % self.per_class:
            raise ValueError(f"batch_size: must be a multiple of per_class = {self.per_class}, got {self.batch_size}")
        if self.batch_size < 2 * self.per_class or self.per_class < 2:
            raise ValueError(
                f"batch_size: 2 items of 2 classes are the least, got {self.batch_size} of {self.per_class} a class"
            )
        if self.final_epochs > self.epochs:
            raise ValueError(f"final_epochs: must be at most epochs = {self.epochs}, got {self.final_epochs}")

    def _policy(self) -> GrowthController | None:
        if self.n_learners is not None:
            return None
        return GrowthController(
            int(self.patience),
            self.threshold,
            int(self.min_new),
            int(self.min_split),
            None if self.max_learners is None else int(self.max_learners),
            self.top_share,
        )

    def _epochs(self, network: LearnerNetwork, items: Tensor, labels: Tensor, random: Any) -> LearnerEpochs:
        return LearnerEpochs(
            network,
            items,
            labels,
            policy=self._policy(),
            by_chance=self.growth == "random",
            validation=float(self.validation),
            epochs=int(self.epochs) - int(self.final_epochs),
            recluster=int(self.recluster),
            batch_size=int(self.batch_size),
            per_class=int(self.per_class),
            random=random,
        )

    def _train(self, network: LearnerNetwork, epochs: LearnerEpochs) -> None:
        from subspan.nn import Objective

        objective = Objective(
            network,
            LearnerNetwork.training_loss,
            optimizer=epochs.keep_optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
        )
        with quiet_trainer(**{"max_epochs": self.epochs, **(self.trainer or {})}) as trainer:
            trainer.fit(objective, epochs)
        self.losses_ = list(objective.losses)
        network.cpu()

    def transform(self, X: Any, learners: Sequence[int] | None = None) -> Any:
        """Slices (n, out_dim) of items X, each of unit length; of some learners alone where they are named."""
        check_is_fitted(self, "network_")
        found = applied(self.network_, self._items(X))
        if learners is not None:
            if not len(learners):
                raise ValueError("learners: name at least one")
            found = self.network_.embedding.slice(found, *learners)
        return like(found, X)

    def attention(self, X: Any) -> Any:
        """Where each of the maps X (n, c, h, w) is looked at: (n, h, w), in (0, 1). Raises ValueError for vectors."""
        check_is_fitted(self, "network_")
        if self.network_.pool is None:
            raise ValueError("X: the learners were fitted to vectors; there is attention on maps alone")
        items = self._items(X)
        with torch.no_grad():
            found = torch.cat([self.network_.attention(part) for part in items.split(256)])
        return like(found, X)

    def separation(self, X: Any) -> Separation:
        """How different the learners are: angles between what they read, and agreement of their clusters of X.

        Raises ValueError for a single learner.
        """
        z = in_numpy(self.transform(X))
        parts = [z[:, self.blocks_.indices(name).numpy()] for name in self.blocks_.sizes]
        options: dict[str, Any] = {"n_init": 1, "random_state": 0}
        clusters = [KMeans(len(self.classes_), **options).fit_predict(part) for part in parts]
        angle = learner_separation(self.subspaces_)
        agreements = [normalized_mutual_info_score(a, b) for a, b in combinations(clusters, 2)]
        return Separation(angle, float(np.mean(agreements)))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags
