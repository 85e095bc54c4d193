"""Arbitrary pairs of classes as positives: with gates beside without, from scratch and on frozen features."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import normalize_rows
from subspan.geometry import effective_rank
from subspan.measures import probe_score
from subspan.nn import gated_cosine
from subspan.represent import ArbitraryPairLoss, HydraTraining, PairGate
from subspan.statistics import Moments

from .gcr import coarse_labels
from .materials import labelled_images, pixels, small_network
from .protocol import Check, Outcome, Progress, Table
from .training import cosine, shuffled, train
from .trials import Trials, spread


class Sizes(NamedTuple):
    """Pictures to train and to test on, epochs, and seeds: from scratch, then on frozen features."""

    train: int = 2500
    test: int = 1000
    epochs: int = 12
    frozen_train: int = 2500
    frozen_test: int = 1500
    frozen_epochs: int = 8
    seeds: int = 3


QUICK = Sizes(600, 300, 2, 600, 300, 2, 1)
WIDTHS, FEATURES, BATCH, RATE, TEMPERATURE = (16, 32, 64), 64, 64, 2e-3, 0.1
TRUNK = 512
PLAIN, SAME, ANY, OURS = "cross-entropy", "SupCon", "SupCon, arbitrary pairs", "Hydra, arbitrary pairs"
# Kind of gate and pairing of each arm that contrasts.
CONTRASTS: dict[str, tuple[Any, Any]] = {
    SAME: ("open", "identical"),
    ANY: ("open", "arbitrary"),
    OURS: ("sigmoid", "arbitrary"),
}
FROZEN = (PLAIN, SAME, OURS)


class Part(NamedTuple):
    """Inputs and labels of the training and the test pictures; probed: the labels that a probe is asked for."""

    x: dict[str, Tensor]
    y: dict[str, Tensor]
    probed: dict[str, np.ndarray]


def trained(arm: str, encoder: nn.Module, features: int, part: Part, epochs: int, seed: int) -> nn.Module:
    """An encoder with what trains it: a head, or a projector and a gate; all arms start and draw alike."""
    classes = int(part.y["train"].max()) + 1
    torch.manual_seed(seed)
    batches = shuffled(part.x["train"], part.y["train"], batch_size=BATCH, seed=seed)
    options: Any = {"learning_rate": RATE, "epochs": epochs, "schedule": cosine, "weight_decay": 5e-4}
    if arm == PLAIN:
        network = nn.Sequential(encoder, nn.Linear(features, classes))
        return train(network, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batches, **options)
    loss_of: Any = HydraTraining.training_loss
    kind, pairing = CONTRASTS[arm]
    gate = PairGate(classes, 128, kind=kind, embed_dim=128, hidden=256, norm="layer")
    loss = ArbitraryPairLoss(gate, temperature=TEMPERATURE, pairing=pairing)
    network: Any = HydraTraining(encoder, loss, features=features, hidden=256)
    return train(network, loss_of, batches, **options)


@torch.no_grad()
def features_of(encoder: nn.Module, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features of both parts."""
    return {name: torch.cat([encoder(part) for part in rows.split(500)]) for name, rows in x.items()}


def probed(encoder: nn.Module, part: Part, seed: int) -> dict[str, float]:
    """What can be read from features of unit length, and in how many dimensions they lie."""
    found = features_of(encoder, part.x)
    unit = {name: normalize_rows(rows).numpy() for name, rows in found.items()}
    linear = LogisticRegression(C=10.0, max_iter=100).fit(unit["train"], part.probed["train"])
    held = (unit["test"], part.probed["test"])
    near = probe_score(unit["train"], part.probed["train"], kind="knn", test=held)
    spectrum = torch.linalg.eigvalsh(Moments(unit["test"].shape[1]).update(found["test"].double()).covariance())
    return {
        "linear probe": 100 * float(linear.score(*held)),
        "10 neighbours": 100 * near.score,
        "effective rank": float(effective_rank(spectrum.clamp_min(0))),
    }


@torch.no_grad()
def gate_facts(network: HydraTraining, part: Part) -> dict[str, float]:
    """What the gates say: openness, cosines of two classes under their own gate and that of others, and relations."""
    gate, classes = network.loss.gate, int(part.y["train"].max()) + 1
    z = torch.cat([network(rows) for rows in part.x["test"].split(500)])
    z = z - z.mean(0)
    means = torch.stack([z[part.y["test"] == c].mean(0) for c in range(classes)])
    first, second = torch.triu_indices(classes, classes, 1)
    gates = gate.soft_subspace(first, second).weights
    under = torch.stack([gated_cosine(means[first], means[second], each.expand_as(gates)).diagonal() for each in gates])
    own, count = under.diagonal(), len(first)
    others = (under.sum(0) - own) / (count - 1)
    pictures = torch.stack([part.x["train"][part.y["train"] == c].flatten(1).mean(0) for c in range(classes)])
    centred = pictures - pictures.mean(0)
    alike = gated_cosine(centred, centred, torch.ones_like(centred))[first, second]
    ranked: Any = spearmanr(gate.relations()[first, second].numpy(), alike.numpy())
    return {
        "open gates": float(gates.mean()),
        "own gate": float(own.mean()),
        "gate of others": float(others.mean()),
        "relations": float(ranked.statistic),
    }


def from_scratch(sizes: Sizes) -> tuple[str, Part]:
    """Pictures of Fashion-MNIST at half their size (digits where the data folder lacks them)."""
    data = labelled_images("fashion_mnist").first(sizes.train, sizes.test)
    x = pixels(data.images)
    x = F.avg_pool2d(x, 2) if x.shape[-1] > 16 else x
    y = torch.from_numpy(data.labels)
    return data.name, Part(data.split(x), data.split(y), data.split(data.labels))


def frozen(sizes: Sizes, quick: bool) -> tuple[str, Part]:
    """Features of CIFAR-100, coarse classes to train on and the fine ones in them to probe."""
    data = labelled_images("cifar100")
    data = data.first(1500, 600) if quick else data
    y = coarse_labels(data.labels, data.classes)
    x: Float[Tensor, "n d"] = data.features().float()
    x = (x - x[data.train].mean(0)) / x[data.train].std()
    counts = {"train": sizes.frozen_train, "test": sizes.frozen_test}
    cut = [{name: rows[: counts[name]] for name, rows in data.split(each).items()} for each in (x, y, data.labels)]
    return data.name, Part(*cut)


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """All arms from scratch, three of them on frozen features."""
    sizes = QUICK if quick else Sizes()
    seeds = range(seed, seed + sizes.seeds)
    name, pictures = from_scratch(sizes)
    gates: dict[str, list[float]] = {}

    def scratch(arm: str, each: int) -> dict[str, float]:
        channels, classes = pictures.x["train"].shape[1], int(pictures.y["train"].max()) + 1
        encoder = small_network(channels, classes, each, WIDTHS)[:-1]  # pyright: ignore[reportIndexIssue]
        network = trained(arm, encoder, FEATURES, pictures, sizes.epochs, each)
        if arm == OURS:
            assert isinstance(network, HydraTraining)
            for fact, value in gate_facts(network, pictures).items():
                gates.setdefault(fact, []).append(value)
        return probed(encoder, pictures, each)

    trials = Trials([PLAIN, *CONTRASTS], seeds, scratch, progress=progress, span=(0.0, 0.6))
    progress("features", 0.6)
    coarse_name, coarse = frozen(sizes, quick)

    def on_features(arm: str, each: int) -> dict[str, float]:
        torch.manual_seed(each)
        encoder = nn.Sequential(nn.Linear(coarse.x["train"].shape[1], TRUNK), nn.ReLU())
        trained(arm, encoder, TRUNK, coarse, sizes.frozen_epochs, each)
        return probed(encoder, coarse, each)

    transfer = Trials(FROZEN, seeds, on_features, progress=progress, span=(0.65, 1.0))
    probe, rank = "linear probe", "effective rank"
    points = "points of the linear probe"
    ratio = trials.mean(OURS, rank) / trials.mean(SAME, rank)
    commonest = 100 * float(np.bincount(pictures.probed["test"]).max() / len(pictures.probed["test"]))
    learnt = trials.mean(OURS, probe) - commonest
    better = float(np.mean(gates["own gate"]) - np.mean(gates["gate of others"]))
    return Outcome(
        claim="Any two classes have a subspace in which they are alike: with a gate a pair, arbitrary pairs are as "
        "good positives as those of one class (CIFAR-10, 90.9 beside 89.9), where without gates training collapses "
        "(25.3).",
        data=f"{name} at half its size, {len(pictures.y['train'])} training and {len(pictures.y['test'])} test "
        f"pictures; {coarse_name}, {len(coarse.y['train'])} and {len(coarse.y['test'])}, coarse classes trained, fine "
        "ones probed",
        model=f"three convolutions {WIDTHS} and a layer of {FEATURES} from scratch, {sizes.epochs} epochs; a layer of "
        f"{TRUNK} on frozen EfficientNet-Lite0 features, {sizes.frozen_epochs} epochs; projector and gates of 128",
        metric="accuracy (percent) of a linear probe of the encoder's features, from scratch",
        ours=trials.mean(OURS, probe),
        baselines=trials.means(probe, but=OURS),
        main=Check.at_least("arbitrary pairs with gates, beside SupCon", points, trials.gap(OURS, SAME, probe), -1.5),
        checks=[
            Check.above("something is learnt", "points over the commonest class", learnt, 20, quick=True),
            Check.at_least("without gates they collapse", points, trials.gap(SAME, ANY, probe), 15),
            Check.above("gates beside none, arbitrary pairs", points, trials.gap(OURS, ANY, probe), 0),
            Check.at_least("features lie in more dimensions", "effective rank over SupCon's", ratio, 1.3),
            Check.at_least("transfer to fine classes", points, transfer.gap(OURS, SAME, probe), 1),
            Check.above("a pair's own gate beside others'", "cosine of its two class means", better, 0.05),
            Check.above(
                "classes that look alike share more", "rank correlation", np.mean(gates["relations"]), 0, required=False
            ),
        ],
        tables=_tables(name, trials, coarse_name, transfer, gates),
        notes=[
            "The paper trains a ResNet-18 at 32 pixels for 50 epochs and a ResNet-50 on ImageNet; here a small network "
            "for minutes. One view, as in the authors' recipe for CIFAR; a sample is not its own positive.",
            "The probe is fitted on frozen features of unit length; the paper's is trained along.",
        ],
    )


def _tables(
    name: str, trials: Trials[Any], coarse_name: str, transfer: Trials[Any], gates: dict[str, list[float]]
) -> list[Table]:
    """Means of both settings, and what the gates say."""
    probe, rank = "linear probe", "effective rank"
    return [
        trials.table(
            f"{name}, from scratch: means over seeds",
            "trained by",
            {**spread(probe, probe), "10 neighbours": "10 neighbours", rank: rank},
        ),
        transfer.table(
            f"{coarse_name}, frozen features: fine classes, means over seeds",
            "trained by",
            {**spread(probe, probe), "10 neighbours": "10 neighbours", rank: rank},
        ),
        Table.rounded(
            "gates of different classes, from scratch",
            ["fact", "mean", "lowest", "highest"],
            [[fact, float(np.mean(values)), min(values), max(values)] for fact, values in gates.items()],
            3,
        ),
    ]
