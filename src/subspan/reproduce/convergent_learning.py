"""Convergent learning on networks that differ in their seed alone, and on three pretrained ones.

Three small convolutional networks trained on CIFAR-10, with an untrained pair, a pair trained on shuffled labels,
another image's activations, random rotations and random groups as controls; EfficientNet-Lite0, 1 and 2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.datasets import is_installed, load_model
from subspan.geometry import AffineMap
from subspan.measures import jackknife, mutual_information
from subspan.probe import ConvergentLearning, layer_moments, mean_agreement
from subspan.statistics import JointMoments

from .materials import accuracy, image_encoder, labelled_images, pixels, small_network, trained_network
from .protocol import Check, Outcome, Progress, Table
from .training import train

LAYERS = ("relu1", "relu2", "relu3", "relu4")
PENALTIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003)
MODELS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
# The stem, the ends of four stages (whose blocks are numbered differently in Lite0), and units a position.
STAGES = {
    "stem": ("_swish", "_swish", "_swish"),
    "stage 2": ("_blocks.2", "_blocks.3", "_blocks.3"),
    "stage 4": ("_blocks.7", "_blocks.10", "_blocks.10"),
    "stage 5": ("_blocks.10", "_blocks.14", "_blocks.14"),
    "stage 7": ("_blocks.15", "_blocks.20", "_blocks.20"),
}
# Columns of the tables, and the fact that each shows.
COLUMNS = {
    "semi-matching": "semi-matching",
    "matching": "matching",
    "same partner": "same partner",
    "R² one": "R² of one partner",
    "R² few": "R² of few partners",
    "R² group": "R² of its group",
    "R² all": "R² of all units",
    "groups": "group agreement",
    "random groups": "random groups",
    "matching, rotated": "rotated",
    "CKA": "CKA",
}
_PIXELS = 128


class Setting(NamedTuple):
    """Sizes of a run: pictures that train, fit and are held out, epochs, networks, pictures for the pretrained."""

    train: int = 5000
    fit: int = 1000
    held: int = 500
    epochs: int = 6
    networks: int = 3
    pretrained: int = 300
    tuning_steps: int = 20


QUICK = Setting(1500, 300, 200, 3, 2, 0, 0)


class World(NamedTuple):
    """Pictures for the moments (seen by no network) and held out, with labels; networks by how they were trained."""

    name: str
    fit: Float[Tensor, "n c h w"]
    held: Float[Tensor, "m c h w"]
    held_labels: np.ndarray
    trained: list[Any]
    shuffled: list[Any]
    untrained: list[Any]


def small_world(setting: Setting, seed: int, progress: Progress) -> World:
    """The pictures, and networks that are trained, trained on shuffled labels, and untrained."""
    data = labelled_images("cifar10")
    images = pixels(data.images)
    chosen, held = data.train[: setting.train], data.test[: setting.held]
    rest = np.concatenate([data.train[setting.train :], data.test])
    fit = rest[~np.isin(rest, held)][: setting.fit]
    labels, n = data.labels[chosen], setting.networks
    shuffled = np.random.default_rng(seed).permutation(labels)

    def networks(kind: str, targets: np.ndarray, first: int, count: int, epochs: int) -> list[nn.Module]:
        progress(f"networks, {kind}", 0.05)
        return [trained_network(images[chosen], targets, seed=first + i, epochs=epochs) for i in range(count)]

    return World(
        data.name,
        images[fit],
        images[held],
        data.labels[held],
        networks("trained", labels, seed, n, setting.epochs),
        networks("shuffled labels", shuffled, seed + n, 2, max(1, setting.epochs // 3)),
        [small_network(images.shape[1], int(data.labels.max()) + 1, seed + i).eval() for i in range(2)],
    )


class Layer(NamedTuple):
    """A layer of one pair of networks: the comparison, and its read-out on held-out pictures with its controls."""

    model: ConvergentLearning
    facts: dict[str, float]


def compared(
    moments: JointMoments, held: JointMoments, seed: int, *, sign: str = "signed", n_groups: int | None = None
) -> Layer:
    """Everything about one pair of layers."""
    model = ConvergentLearning.from_moments(moments, sign=sign, n_groups=n_groups, random_state=seed)
    groups, rotated = model.groups(), model.rotated(seed)
    controls = {
        "random groups": mean_agreement(model.random_groups(groups, seed)),
        "rotated": rotated.matching_.mean(),
        "moved": float((rotated.canonical_correlations() - model.canonical_correlations()).abs().max()),
        "permuted": model.permuted(seed).matching_.mean(),
    }
    return Layer(model, model.report(held, groups=groups) | controls)


def profile(networks: Sequence[Any], world: World, seed: int) -> dict[str, list[Layer]]:
    """Layer → one comparison for every pair of networks."""
    with torch.no_grad():
        fit, held = (layer_moments(networks, LAYERS, part.split(100)) for part in (world.fit, world.held))
    return {
        name: [compared(fit[pair][place], held[pair][place], seed) for pair in fit] for place, name in enumerate(LAYERS)
    }


def mean_facts(layers: Sequence[Layer]) -> dict[str, float]:
    """The mean over pairs of networks."""
    return {key: float(np.mean([layer.facts[key] for layer in layers])) for key in layers[0].facts}


def cells(*layers: Layer) -> list[Any]:
    """Units, and the columns of the tables, the mean over pairs of networks."""
    facts, first = mean_facts(layers), layers[0].facts
    return [f"{first['units x']:.0f}, {first['units y']:.0f}", *(round(facts[fact], 3) for fact in COLUMNS.values())]


def matched(networks: Sequence[Any], images: Tensor, *, shift: int = 0) -> list[float]:
    """Mean matched correlation of one pair of networks, layer by layer."""
    moments = layer_moments(networks[:2], LAYERS, images.split(100), shift=shift)[0, 1]
    return [ConvergentLearning.from_moments(part, sign="signed").matching_.mean() for part in moments]


class MappedUnits(nn.Module):
    """Units (channels) of a layer through an affine map."""

    def __init__(self, units: AffineMap) -> None:
        super().__init__()
        self.units = units

    def forward(self, states: Tensor) -> Tensor:
        """The mapped states."""
        return self.units.map(states.movedim(1, -1)).movedim(-1, 1)


def until(network: Any, layer: str) -> int:
    """How many parts of a network come up to the end of a layer."""
    return list(dict(network.named_children())).index(layer) + 1


def stitched_accuracy(front: Any, back: Any, layer: str, units: AffineMap, images: Tensor, labels: np.ndarray) -> float:
    """Accuracy of `front` up to `layer`, its units mapped, then `back` from there on."""
    cut = until(front, layer)
    return accuracy(nn.Sequential(front[:cut], MappedUnits(units), back[cut:]), images, labels)


def stitches(world: World, layers: dict[str, list[Layer]]) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """Accuracy of the first network's front with the second one's back, by how the units in between are mapped."""
    found: dict[str, list[float]] = {}
    for name in LAYERS:
        model = layers[name][0].model
        moments = model.moments_
        # Each unit onto the unit of the same number: mean and deviation are matched, the order is not.
        scale = (moments.cov_yy.diagonal() / moments.cov_xx.diagonal().clamp_min(1e-12)).sqrt()
        plain = AffineMap(torch.diag(scale), moments.mean_y - scale * moments.mean_x)
        for way in ("unaligned", "matching", "sparse", "linear"):
            units = (plain if way == "unaligned" else model.alignment(way)).to(torch.float32)
            front, back = world.trained[:2]
            score = stitched_accuracy(front, back, name, units, world.held, world.held_labels)
            found.setdefault(way, []).append(score)
    return list(zip(LAYERS, *found.values())), {way: float(np.mean(scores)) for way, scores in found.items()}


@torch.no_grad()
def information(world: World, layer: str, seed: int) -> tuple[float, float]:
    """Mutual information beside correlation as the measure of what two units have in common.

    Share of the eight best correlated pairs of different units that are partners in information too, and the rank
    correlation of the two measures over all pairs.
    """
    rows = []
    for network in world.trained[:2]:
        states = network[: until(network, layer)](world.fit[:200])
        rows.append(states.movedim(1, -1).flatten(0, -2))
    chosen = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(seed))[:20_000]
    x, y = (part[chosen] for part in rows)
    model = ConvergentLearning(sign="signed").fit(x, y)
    table = mutual_information(x, y)
    best = model.semi_matching_.correlation.argsort(descending=True)[:8]
    same = (table.argmax(0) == model.semi_matching_.partner)[best].double().mean()
    ranked: Any = spearmanr(model.correlations_.abs().flatten().numpy(), table.flatten().numpy())
    return float(same), float(ranked.statistic)


def stage_moments(models: Sequence[Any], layers: Sequence[Any], images: Tensor) -> Any:
    """Moments of the positions of pretrained networks."""
    return layer_moments(models, layers, images.split(25), forward=lambda m, b: m.extract_features(b))


def pretrained_world(count: int, seed: int) -> tuple[Table, float]:
    """Lite0, 1 and 2 at five depths (positions as rows), Lite0 and 1 in their pooled features (pictures as rows).

    And the least fall of the matched correlation when one of the two is rotated.
    """
    data = labelled_images("cifar100")
    models = [load_model(name) for name in MODELS]
    chosen = np.random.default_rng(seed).permutation(data.test)[:count]
    images = image_encoder(_PIXELS).preprocessing.batch([data.images[i] for i in chosen])
    sides = [
        stage_moments(models, list(STAGES.values()), part) for part in (images[count // 3 :], images[: count // 3])
    ]
    features = [data.split(data.features(name, _PIXELS)) for name in MODELS[:2]]
    pooled = [JointMoments(1280, 1280).update(*(side[part] for side in features)) for part in ("train", "test")]
    rows, falls = [], []
    for i, j in combinations(range(len(MODELS)), 2):
        places = [*zip(STAGES, *(side[i, j] for side in sides)), *([("pooled", *pooled)] if (i, j) == (0, 1) else [])]
        for place, fit, held in places:
            sign = "signed" if place in ("stem", "pooled") else "absolute"
            layer = compared(fit, held, seed, sign=sign, n_groups=64 if place == "pooled" else None)
            rows.append([f"Lite{i} and Lite{j}", place, *cells(layer)])
            falls.append(layer.facts["matching"] - layer.facts["rotated"])
    title = "EfficientNet-Lite on CIFAR-100 pictures"
    return Table(title, ["pair", "layer", "units", *COLUMNS], rows), min(falls)


def tuned_units(steps: int, seed: int) -> float:
    """Matched correlation of Lite0's stage 5 before and after a light fine-tuning, over units whose partner is itself.

    Units that are matched to another one count as 0.
    """
    data = labelled_images("cifar10")
    prepare = image_encoder(96).preprocessing.batch
    before = load_model(MODELS[0])
    chosen = np.random.default_rng(seed).permutation(data.train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = nn.ModuleDict({"network": copy.deepcopy(before), "head": nn.Linear(1280, len(data.classes))})

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model["head"](model["network"].extract_features(batch[0]).mean((2, 3))), batch[1])

    parts = np.array_split(chosen[: 16 * steps], steps)
    batches = ((prepare([data.images[i] for i in part]), torch.from_numpy(data.labels[part])) for part in parts)
    train(tuned, loss, batches, learning_rate=1e-4)
    images = prepare([data.images[i] for i in data.test[:100]])
    moments = stage_moments([before, tuned["network"]], ["_blocks.10"], images)
    found = ConvergentLearning.from_moments(moments[0, 1][0]).matching_
    own = found.partner == torch.arange(len(found.partner))
    return float(torch.where(own, found.correlation.abs(), 0).mean())


def layer_table(world: World, layers: dict[str, list[Layer]]) -> Table:
    """Every layer's agreement, and how good the networks are."""
    scores = [accuracy(network, world.held, world.held_labels) for network in world.trained]
    title = f"{world.name}, {len(scores)} networks of one architecture (accuracy {min(scores):.3f} to {max(scores):.3f}"
    rows = [[name, *cells(*found)] for name, found in layers.items()]
    return Table(f"{title}), mean over pairs, R² held out", ["layer", "units", *COLUMNS], rows)


def control_table(world: World, correlations: dict[str, list[float]]) -> Table:
    """Matched correlations by layer, and the error that the choice of pictures leaves."""
    blocks = [layer_moments(world.trained[:2], LAYERS[:1], [part])[0, 1][0] for part in world.fit.chunk(10)]
    estimate, error = jackknife(
        blocks, lambda moments: ConvergentLearning.from_moments(moments, sign="signed").matching_.mean()
    )
    title = f"mean matched correlation (trained, first layer, first pair: {estimate:.3f}, standard error {error:.3f} "
    rows = [[kind, *values] for kind, values in correlations.items()]
    return Table.rounded(f"{title}by pictures)", ["networks", *LAYERS], rows, 3)


def layer_checks(layers: dict[str, list[Layer]], mean: dict[str, dict[str, float]], untrained: float) -> list[Check]:
    """What training and depth do, what more units than one or the right group explain, what a change of basis hides."""
    first, third = (mean[name]["matching"] for name in (LAYERS[0], LAYERS[2]))

    def least(more: str, less: str) -> float:
        return min(facts[more] - facts[less] for facts in mean.values())

    few, groups = least("R² of few partners", "R² of one partner"), least("group agreement", "random groups")
    every = [layer.facts for found in layers.values() for layer in found]
    rotated = min(facts["matching"] - facts["rotated"] for facts in every)
    moved, change = max(facts["moved"] for facts in every), "largest change of "
    permuted = max(abs(facts["permuted"] - facts["matching"]) for facts in every)
    return [
        Check.at_least("agreement falls with depth", "matched correlation, first - third layer", first - third, 0.1),
        Check.at_least("training makes units agree", "first layer, trained - untrained", first - untrained, 0.15),
        Check.at_least("few partners explain more than one", "least held-out R² difference of the layers", few, 0.1),
        Check.at_least("groups beat random groups of their sizes", "least difference of the layers", groups, 0.1),
        Check.at_least("a rotation hides the units", "least fall of the matched correlation", rotated, 0.2, quick=True),
        Check.at_most("a rotation leaves the subspaces", f"{change}canonical correlations", moved, 1e-6, quick=True),
        Check.at_most("an order of units is undone", f"{change}the matched correlation", permuted, 1e-6, quick=True),
    ]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Units and subspaces that independently trained networks share, by layer, beside what chance and basis give."""
    setting = QUICK if quick else Setting()
    world = small_world(setting, seed, progress)
    progress("layers", 0.35)
    layers = profile(world.trained, world, seed)
    progress("controls", 0.62)
    mean = {name: mean_facts(found) for name, found in layers.items()}
    correlations = {
        "trained, different seeds": [mean[name]["matching"] for name in LAYERS],
        "untrained networks": matched(world.untrained, world.fit),
        "shuffled labels": matched(world.shuffled, world.fit),
        "another picture": matched(world.trained, world.fit, shift=7),
    }
    tables = [layer_table(world, layers), control_table(world, correlations)]
    progress("stitching", 0.66)
    rows, stitched = stitches(world, layers)
    ways = ["cut after", "units as numbered", "one partner", "few partners", "all units"]
    path = [
        [name, penalty, round(partners, 2), round(explained, 4), round((1 - explained) / 2, 4)]
        for name in LAYERS[:2]
        for penalty, partners, explained in layers[name][0].model.sparse_path(PENALTIES)
    ]
    tables += [
        Table.rounded("accuracy of the first network's front joined to the second's back", ways, rows),
        Table("the lasso path, first pair", ["layer", "penalty", "partners", "R²", "half mean squared error"], path),
    ]
    progress("mutual information", 0.7)
    same, alike = information(world, LAYERS[0], seed)
    gain, share = stitched["matching"] - stitched["unaligned"], "share of the eight best pairs with the same"
    checks = [
        *layer_checks(layers, mean, correlations["untrained networks"][0]),
        Check.at_least("matched units can be exchanged", "stitched accuracy, matched - as numbered", gain, 0.05),
        Check.at_least("information ranks pairs alike", "rank correlation with |correlation| over pairs", alike, 0.7),
        Check.at_least("partners by correlation and by information", share, same, 0.75),
    ]
    if setting.pretrained and all(is_installed(name) for name in MODELS):
        progress("EfficientNet-Lite", 0.75)
        table, fall = pretrained_world(setting.pretrained, seed)
        tables.append(table)
        progress("light fine-tuning", 0.95)
        kept = tuned_units(setting.tuning_steps, seed)
        checks += [
            Check.at_least("pretrained units agree beyond a rotation", "least fall when rotated", fall, 0.05),
            Check.at_least("units stay in a light fine-tuning", "mean correlation with itself", kept, 0.9),
        ]
    lowest = {fact: min(facts[fact] for facts in mean.values()) for fact in mean[LAYERS[0]]}
    basis, metric = lowest["basis choice"], "agreement of groups minus that of matched units, least of the layers"
    return Outcome(
        claim="networks that differ in their seed alone learn some units in common, and beyond them subspaces "
        "in common whose basis each chooses for itself; agreement is best in the first layer",
        data=f"{world.name}: {setting.train} pictures train, {len(world.fit)} others fit the moments, "
        f"{len(world.held)} are held out",
        model="convolutional networks of 32, 64 and 128 channels, and EfficientNet-Lite0, 1, 2",
        metric=metric,
        ours=basis,
        baselines={
            "smallest group agreement of a layer": lowest["group agreement"],
            "smallest matched correlation of a layer": lowest["matching"],
        },
        main=Check.at_least("subspaces are shared where units are not", metric, basis, 0.15),
        checks=checks,
        tables=tables,
        notes=[
            "The paper's networks are AlexNet-sized on ImageNet; here they are small, and EfficientNet-Lite0, 1 and 2, "
            "which differ in depth and width too.",
            "The sparse prediction is solved exactly (lasso path on the correlations, then least squares on the chosen "
            "units), where the paper trains by stochastic gradients; penalties are per unit.",
            "Small networks come from the cache where they were trained before; their training is then not in the "
            "seconds.",
        ],
    )
