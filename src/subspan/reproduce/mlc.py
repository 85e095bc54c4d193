"""Manifold linearizing and clustering on EfficientNet-Lite0's features of CIFAR-10, beside clusterings of those."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.cluster import KMeans, SpectralClustering
from torch import Tensor

from subspan.base import normalize_rows
from subspan.cluster import (
    ElasticNetSubspaceClustering,
    LowRankMixtureDiffusion,
    ManifoldLinearizingClustering,
    linearization,
)
from subspan.measures import clustering_accuracy, partition_scores
from subspan.solvers.spectral import spectral_labels

from .materials.image_features import image_encoder, labelled_images, pooled_features
from .protocol import Check, Outcome, Progress, Table
from .trials import Column, Trials

_PIXELS = 128
_NEVER = 10**9


class Setting(NamedTuple):
    """Sizes of a run: rows, seeds, epochs, and the width of the representation."""

    rows: int = 2000
    seeds: int = 3
    epochs: int = 30
    hidden: int = 512
    z_dim: int = 64


_MLC, _FIRST = "MLC", "stage one alone (coding rate)"
_RIVALS = ("k-means", "spectral, 10 neighbours", "K-subspaces")
QUICK = Setting(rows=500, seeds=1, epochs=8, hidden=256, z_dim=64)


def features(setting: Setting) -> tuple[str, Float[Tensor, "n p"], np.ndarray]:
    """Pooled features of the test pictures, and their classes (looked at by scores alone)."""
    data = labelled_images("cifar10")
    rows = data.test[: setting.rows]
    return data.name, pooled_features(data.images[rows], image_encoder(_PIXELS), _PIXELS), data.labels[rows]


def elastic_net_affinity(rows: Float[Tensor, "n p"], k: int) -> Any:
    """Affinity by the elastic net of unit rows about their mean, which no seed moves: (n, n), CSR."""
    unit = normalize_rows(rows - rows.mean(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ElasticNetSubspaceClustering(k, retain=8, n_init=1, random_state=0).fit(unit.numpy()).affinity_


def rivals(rows: Float[Tensor, "n p"], k: int, seed: int) -> dict[str, np.ndarray]:
    """Labels by what is usually done with features: unit rows about their mean, three clusterings."""
    unit = normalize_rows(rows - rows.mean(0)).double()
    neighbours = SpectralClustering(k, affinity="nearest_neighbors", n_neighbors=10, random_state=seed)
    spans: Any = {"method": "hard", "center": False, "random_state": seed}
    restarts: Any = {"n_init": 10}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "k-means": KMeans(k, random_state=seed, **restarts).fit_predict(unit.numpy()),
            "spectral, 10 neighbours": neighbours.fit_predict(unit.numpy()),
            "K-subspaces": LowRankMixtureDiffusion(k, 8, **spans).fit(unit).labels_,
        }


def subspace_tool(z: Float[Tensor, "n d"], k: int, seed: int) -> np.ndarray:
    """Labels of a representation by K-subspaces from the shape-interaction matrix."""
    options: Any = {"method": "hard", "center": False, "random_state": seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LowRankMixtureDiffusion(k, 5, **options).fit(z.double().numpy()).labels_


def imbalanced(truth: np.ndarray) -> np.ndarray:
    """Rows with every second one of the odd classes left out."""
    kept = np.ones(len(truth), bool)
    for label in np.unique(truth)[1::2]:
        own = np.flatnonzero(truth == label)
        kept[own[::2]] = False
    return np.flatnonzero(kept)


class Study:
    """Labels of every arm under every seed; what is trained or costs much is made once."""

    def __init__(self, rows: Float[Tensor, "n p"], truth: np.ndarray, setting: Setting) -> None:
        self.rows, self.truth, self.thinned, k = rows, truth, imbalanced(truth), len(np.unique(truth))
        self.k, affinity = k, elastic_net_affinity(rows, k)
        usual = cache(lambda seed: rivals(rows, k, seed))

        def model(seed: int, *, thinned: bool = False, **options: Any) -> ManifoldLinearizingClustering:
            options |= {"z_dim": setting.z_dim, "hidden": setting.hidden, "epochs": setting.epochs}
            made = ManifoldLinearizingClustering(k, random_state=seed, batch_size=500, **options)
            return made.fit(rows[self.thinned] if thinned else rows)

        self.model: Callable[..., ManifoldLinearizingClustering] = cache(model)
        self.labels: dict[str, Callable[[int], np.ndarray]] = {
            **{arm: lambda seed, arm=arm: usual(seed)[arm] for arm in _RIVALS},
            "EnSC": lambda seed: spectral_labels(affinity, k, random_state=seed),
            # Memberships of stage one are those of the representation itself.
            _FIRST: lambda seed: self.first(seed).spectral_labels(self.first(seed).transform(rows)),
            _MLC: lambda seed: self.model(seed).labels_,
            "MLC, nearest subspace": lambda seed: np.asarray(self.model(seed).predict(rows)),
        }

    def first(self, seed: int) -> ManifoldLinearizingClustering:
        """The model that never leaves stage one."""
        return self.model(seed, warmup=_NEVER)

    def facts(self, arm: str, seed: int) -> dict[str, float]:
        """Agreement with the classes; of an arm with a representation of its own, what that is like, too."""
        found = partition_scores(self.truth, self.labels[arm](seed))
        if arm in (_FIRST, _MLC):
            z = (self.first if arm == _FIRST else self.model)(seed).transform(self.rows)
            found |= linearization(z, self.truth)
            found["K-subspaces on it"] = clustering_accuracy(self.truth, subspace_tool(z, self.k, seed))
        if arm == _MLC:
            few = self.model(seed, thinned=True).labels_
            found["thinned"] = clustering_accuracy(self.truth[self.thinned], few)
        return found


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Accuracy without labels, and how far the representation is a union of subspaces."""
    setting = QUICK if quick else Setting()
    progress("features", 0.0)
    name, rows, truth = features(setting)
    study = Study(rows, truth, setting)
    trials = Trials(study.labels, range(seed, seed + setting.seeds), study.facts, progress=progress, span=(0.1, 1.0))
    median = trials.means("accuracy", of=np.median)
    ours, raw = median[_MLC], max(median[arm] for arm in (*_RIVALS, "EnSC"))
    tool = trials.means("K-subspaces on it", of=np.median)
    fall = 1 - trials.mean(_MLC, "rank of a cluster") / trials.mean(_FIRST, "rank of a cluster")
    lost, rank = ours - trials.statistic(_MLC, "thinned", np.median), trials.mean(_MLC, "rank") / setting.z_dim
    gain, on_it = "accuracy difference", "accuracy of K-subspaces gained"
    shape = [fact for fact in trials.runs[_FIRST][0] if fact not in (*trials.runs["EnSC"][0], "K-subspaces on it")]
    both = (_FIRST, _MLC)
    return Outcome(
        claim="maximising the coding-rate reduction over a representation and a doubly stochastic membership gives "
        "orthogonal low-dimensional subspaces, and a better clustering than of the features it starts from",
        data=f"{name}: {len(rows)} test pictures, no label used before scoring",
        model=f"heads on frozen EfficientNet-Lite0 features (1280), width {setting.hidden}, z of {setting.z_dim}",
        metric="accuracy of the clustering, median over seeds",
        ours=ours,
        baselines={arm: value for arm, value in median.items() if not arm.startswith(_MLC)},
        main=Check.at_least("beside the best clustering of the raw features", gain, ours - raw, 0.03),
        checks=[
            Check.at_least("beside stage one alone", gain, ours - median[_FIRST], 0.03),
            Check.at_least("classes become lower-dimensional", "fall of a class's rank", fall, 0.25),
            Check.at_least("the whole stays high-dimensional", "rank over z_dim", rank, 0.8, quick=True),
            Check.at_least("subspace tools work better on it", on_it, tool[_MLC] - tool[_FIRST], 0.04),
            Check.at_most("every second picture of odd classes left out", "accuracy lost", lost, 0.08),
        ],
        tables=[
            trials.table(
                f"clustering of {len(rows)} pictures, median (range) of {setting.seeds} seeds",
                "method",
                {
                    "accuracy": Column("accuracy", np.median),
                    "range": Column("accuracy", lambda values: f"{min(values):.3f} to {max(values):.3f}"),
                    **{fact: Column(fact, np.median) for fact in ("NMI", "ARI")},
                },
                digits=4,
            ),
            trials.table("the representation by true classes, mean over seeds", "after", shape, digits=3, arms=both),
            Table.rounded("K-subspaces on the representation, accuracy", ["after", "median"], tool.items()),
        ],
        notes=[
            "The paper trains ResNet-18 and its own self-supervised start on a GPU; here the encoder is frozen and was "
            "trained on ImageNet, and the heads alone are trained.",
            "Precision, entropy and width of z are those of the follow-up code; nothing was chosen by labels.",
        ],
    )
