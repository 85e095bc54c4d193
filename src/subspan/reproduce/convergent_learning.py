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

from .materials.image_features import image_encoder, labelled_images
from .materials.small_networks import accuracy, pixels, small_network, trained_network
from .protocol import Check, Outcome, Progress, Table

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
    """Pictures and labels for training, for the moments (seen by no network) and held out, and the networks."""

    name: str
    fit: Float[Tensor, "n c h w"]
    held: Float[Tensor, "m c h w"]
    held_labels: np.ndarray
    trained: list[nn.Module]
    shuffled: list[nn.Module]
    untrained: list[nn.Module]
    accuracies: list[float]


def small_world(setting: Setting, seed: int, progress: Progress) -> World:
    """The pictures, and networks that are trained, trained on shuffled labels, and untrained."""
    data = labelled_images("cifar10")
    images = pixels(data.images)
    train = data.train[: setting.train]
    rest = np.concatenate([data.train[setting.train :], data.test])
    held = data.test[: setting.held]
    fit = rest[~np.isin(rest, held)][: setting.fit]
    labels = data.labels[train]
    shuffled = np.random.default_rng(seed).permutation(labels)
    classes = int(data.labels.max()) + 1

    def networks(kind: str, targets: np.ndarray, seeds: range, epochs: int) -> list[nn.Module]:
        found = []
        for number in seeds:
            progress(f"network {number + 1}, {kind}", 0.05 * (number - seed))
            found.append(trained_network(images[train], targets, seed=number, epochs=epochs))
        return found

    n = setting.networks
    trained = networks("trained", labels, range(seed, seed + n), setting.epochs)
    others = networks("shuffled labels", shuffled, range(seed + n, seed + n + 2), max(1, setting.epochs // 3))
    untrained = [small_network(images.shape[1], classes, seed).eval() for seed in range(seed, seed + 2)]
    scores = [accuracy(network, images[held], data.labels[held]) for network in trained]
    return World(data.name, images[fit], images[held], data.labels[held], trained, others, untrained, scores)


class Layer(NamedTuple):
    """A layer of one pair of networks: the comparison, its read-out on held-out pictures, and its controls."""

    model: ConvergentLearning
    report: dict[str, float]
    chance_groups: float
    rotated: ConvergentLearning
    permuted: float


def compared(
    moments: JointMoments, held: JointMoments, seed: int, *, sign: str = "signed", n_groups: int | None = None
) -> Layer:
    """Everything about one pair of layers."""
    model = ConvergentLearning.from_moments(moments, sign=sign, n_groups=n_groups, random_state=seed)
    groups = model.groups()
    chance = mean_agreement(model.random_groups(groups, seed))
    return Layer(
        model, model.report(held, groups=groups), chance, model.rotated(seed), model.permuted(seed).matching_.mean()
    )


def profile(world: World, networks: Sequence[nn.Module], seed: int, progress: Progress) -> dict[str, list[Layer]]:
    """Layer → one comparison for every pair of networks."""
    with torch.no_grad():
        fit = layer_moments(networks, LAYERS, world.fit.split(100))
        held = layer_moments(networks, LAYERS, world.held.split(100))
    found: dict[str, list[Layer]] = {name: [] for name in LAYERS}
    for done, pair in enumerate(fit):
        progress(f"networks {pair[0] + 1} and {pair[1] + 1}", 0.35 + 0.25 * done / len(fit))
        for name, moments, other in zip(LAYERS, fit[pair], held[pair]):
            found[name].append(compared(moments, other, seed))
    return found


def matched(networks: Sequence[nn.Module], images: Tensor, *, shift: int = 0) -> dict[str, float]:
    """Mean matched correlation of one pair of networks, by layer."""
    moments = layer_moments(networks[:2], LAYERS, images.split(100), shift=shift)[0, 1]
    return {
        name: ConvergentLearning.from_moments(part, sign="signed").matching_.mean()
        for name, part in zip(LAYERS, moments)
    }


@torch.no_grad()
def stitched_accuracy(
    front: nn.Module, back: nn.Module, layer: str, units: AffineMap, images: Tensor, labels: np.ndarray
) -> float:
    """Accuracy of `front` up to `layer`, its units mapped, then `back` from there on."""
    parts = list(dict(front.named_children()))
    cut = parts.index(layer) + 1
    ahead = nn.Sequential(*list(front.children())[:cut])
    rest = nn.Sequential(*list(back.children())[cut:])
    right = 0
    for batch, truth in zip(images.split(200), torch.from_numpy(labels).split(200)):
        states = ahead(batch)
        if states.ndim == 4:
            states = units.map(states.movedim(1, -1)).movedim(-1, 1)
        else:
            states = units.map(states)
        right += int((rest(states).argmax(1) == truth).sum())
    return right / len(labels)


def stitches(world: World, layers: dict[str, list[Layer]]) -> tuple[Table, dict[str, float]]:
    """Accuracy of the first network's front with the second one's back, by how the units in between are mapped."""
    front, back = world.trained[:2]
    rows: list[list[Any]] = []
    mean: dict[str, float] = dict.fromkeys(("unaligned", "matching", "sparse", "linear"), 0.0)
    for name in LAYERS:
        model = layers[name][0].model
        d = model.moments_.d_x
        # Each unit onto the unit of the same number: mean and deviation are matched, the order is not.
        scale = (model.moments_.cov_yy.diagonal() / model.moments_.cov_xx.diagonal().clamp_min(1e-12)).sqrt()
        plain = AffineMap(torch.diag(scale), model.moments_.mean_y - scale * model.moments_.mean_x)
        maps = {"unaligned": plain} | {method: model.alignment(method) for method in list(mean)[1:]}
        assert all(len(part.matrix) == d for part in maps.values())
        scores = {
            method: stitched_accuracy(front, back, name, part.to(torch.float32), world.held, world.held_labels)
            for method, part in maps.items()
        }
        rows.append([name, *(round(score, 4) for score in scores.values())])
        for method, score in scores.items():
            mean[method] += score / len(LAYERS)
    title = "accuracy of the first network's front joined to the second's back"
    return Table(title, ["cut after", "units as numbered", "one partner", "few partners", "all units"], rows), mean


def information(world: World, layer: str, seed: int) -> tuple[float, float]:
    """Mutual information beside correlation as the measure of what two units have in common.

    Share of the eight best correlated pairs of different units that are partners in information too, and the rank
    correlation of the two measures over all pairs.
    """
    cut = list(dict(world.trained[0].named_children())).index(layer) + 1
    rows = []
    with torch.no_grad():
        for network in world.trained[:2]:
            states = nn.Sequential(*list(network.children())[:cut])(world.fit[:200])
            rows.append(states.movedim(1, -1).flatten(0, -2) if states.ndim == 4 else states)
    chosen = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(seed))[:20_000]
    x, y = (part[chosen] for part in rows)
    model = ConvergentLearning(sign="signed").fit(x, y)
    table = mutual_information(x, y)
    best = model.semi_matching_.correlation.argsort(descending=True)[:8]
    same = (table.argmax(0) == model.semi_matching_.partner)[best].double().mean()
    ranked: Any = spearmanr(model.correlations_.abs().flatten().numpy(), table.flatten().numpy())
    return float(same), float(ranked.statistic)


def pretrained_world(count: int, seed: int) -> tuple[Table, dict[str, float]]:
    """Lite0, 1 and 2 at five depths (positions as rows), Lite0 and 1 in their pooled features (pictures as rows)."""
    data = labelled_images("cifar100")
    encoder = image_encoder(_PIXELS)
    models = [load_model(name) for name in MODELS]
    chosen = np.random.default_rng(seed).permutation(data.test)[:count]
    images = encoder.preprocessing.batch([data.images[i] for i in chosen])
    third = count // 3
    sides = [
        layer_moments(models, list(STAGES.values()), part.split(25), forward=lambda m, b: m.extract_features(b))
        for part in (images[third:], images[:third])
    ]
    features = [data.features(name, _PIXELS) for name in MODELS[:2]]
    rows, agreement = [], {}
    for i, j in combinations(range(len(MODELS)), 2):
        places = list(zip(STAGES, *(side[i, j] for side in sides)))
        if (i, j) == (0, 1):
            pooled = [
                JointMoments(1280, 1280).update(*(side[part] for side in features)) for part in (data.train, data.test)
            ]
            places.append(("pooled", *pooled))
        for place, fit, held in places:
            sign = "signed" if place in ("stem", "pooled") else "absolute"
            layer = compared(fit, held, seed, sign=sign, n_groups=64 if place == "pooled" else None)
            pair = f"Lite{i} and Lite{j}"
            rows.append([pair, place, *_cells(layer)])
            agreement[f"{pair}, {place}"] = layer.report["matching"]
            agreement[f"{pair}, {place}, rotated"] = layer.rotated.matching_.mean()
    return Table("EfficientNet-Lite on CIFAR-100 pictures", ["pair", "layer", *_COLUMNS], rows), agreement


def tuned_units(steps: int, seed: int) -> float:
    """Matched correlation of Lite0's stage 5 before and after a light fine-tuning, over units whose partner is itself.

    Units that are matched to another one count as 0.
    """
    data = labelled_images("cifar10")
    encoder = image_encoder(96)
    before = load_model(MODELS[0])
    after: Any = copy.deepcopy(before)
    chosen = np.random.default_rng(seed).permutation(data.train)
    prepare = encoder.preprocessing.batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(1280, len(data.classes))
    optimizer = torch.optim.Adam([*after.parameters(), *head.parameters()], 1e-4)
    for part in np.array_split(chosen[: 16 * steps], steps):
        logits = head(after.extract_features(prepare([data.images[i] for i in part])).mean((2, 3)))
        loss = F.cross_entropy(logits, torch.from_numpy(data.labels[part]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = prepare([data.images[i] for i in data.test[:100]])
    moments = layer_moments(
        [before, after.eval()], ["_blocks.10"], images.split(25), forward=lambda m, b: m.extract_features(b)
    )
    found = ConvergentLearning.from_moments(moments[0, 1][0]).matching_
    own = found.partner == torch.arange(len(found.partner))
    return float(torch.where(own, found.correlation.abs(), 0).mean())


_EXPLAINED = ("R² of one partner", "R² of few partners", "R² of its group", "R² of all units")
_COLUMNS = [
    "units",
    "semi-matching",
    "matching",
    "same partner",
    "R² one",
    "R² few",
    "R² group",
    "R² all",
    "groups",
    "random groups",
    "matching, rotated",
    "CKA",
]


def _cells(*layers: Layer) -> list[Any]:
    """The columns for one layer, the mean over pairs of networks."""

    def mean(values: list[float]) -> float:
        return round(float(np.mean(values)), 3)

    reports = [layer.report for layer in layers]
    widths = f"{reports[0]['units x']:.0f}, {reports[0]['units y']:.0f}"
    names = ("semi-matching", "matching", "same partner", *_EXPLAINED, "group agreement")
    return [
        widths,
        *(mean([report[name] for report in reports]) for name in names),
        mean([layer.chance_groups for layer in layers]),
        mean([layer.rotated.matching_.mean() for layer in layers]),
        mean([report["CKA"] for report in reports]),
    ]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Units and subspaces that independently trained networks share, by layer, beside what chance and basis give."""
    setting = QUICK if quick else Setting()
    world = small_world(setting, seed, progress)
    layers = profile(world, world.trained, seed, progress)
    progress("controls", 0.62)
    nulls = {
        "untrained networks": matched(world.untrained, world.fit),
        "shuffled labels": matched(world.shuffled, world.fit),
        "another picture": matched(world.trained, world.fit, shift=7),
    }
    mean = {
        name: {key: float(np.mean([part.report[key] for part in found])) for key in found[0].report}
        for name, found in layers.items()
    }
    first, last = mean[LAYERS[0]], mean[LAYERS[2]]
    blocks = [layer_moments(world.trained[:2], LAYERS[:1], [part])[0, 1][0] for part in world.fit.chunk(10)]
    estimate, error = jackknife(
        blocks, lambda moments: ConvergentLearning.from_moments(moments, sign="signed").matching_.mean()
    )
    tables = [
        Table(
            f"{world.name}, {len(world.trained)} networks of one architecture (accuracy "
            f"{min(world.accuracies):.3f} to {max(world.accuracies):.3f}), mean over pairs, R² held out",
            ["layer", *_COLUMNS],
            [[name, *_cells(*found)] for name, found in layers.items()],
        ),
        Table(
            f"mean matched correlation (trained, first layer, first pair: {estimate:.3f}, standard error {error:.3f} "
            "by pictures)",
            ["networks", *LAYERS],
            [
                ["trained, different seeds", *(round(mean[name]["matching"], 3) for name in LAYERS)],
                *([kind, *(round(value, 3) for value in by_layer.values())] for kind, by_layer in nulls.items()),
            ],
        ),
    ]
    progress("stitching", 0.66)
    table, stitched = stitches(world, layers)
    tables.append(table)
    path_rows = []
    for name in LAYERS[:2]:
        for penalty, partners, explained in layers[name][0].model.sparse_path(PENALTIES):
            path_rows.append([name, penalty, round(partners, 2), round(explained, 4), round((1 - explained) / 2, 4)])
    tables.append(
        Table(
            "the lasso path, first pair", ["layer", "penalty", "partners", "R²", "half mean squared error"], path_rows
        )
    )
    progress("mutual information", 0.7)
    same_partner, alike = information(world, LAYERS[0], seed)
    rotation_gap = min(
        part.report["matching"] - part.rotated.matching_.mean() for found in layers.values() for part in found
    )
    moved = max(
        float((part.rotated.canonical_correlations() - part.model.canonical_correlations()).abs().max())
        for found in layers.values()
        for part in found
    )
    permuted = max(abs(part.permuted - part.report["matching"]) for found in layers.values() for part in found)
    beyond_null = first["matching"] - nulls["untrained networks"][LAYERS[0]]
    few = min(part["R² of few partners"] - part["R² of one partner"] for part in mean.values())
    basis = min(part["basis choice"] for part in mean.values())
    in_groups = min(part["group agreement"] for part in mean.values())
    by_units = min(part["matching"] for part in mean.values())
    chance_gap = min(
        float(np.mean([part.report["group agreement"] - part.chance_groups for part in found]))
        for found in layers.values()
    )
    exchanged = stitched["matching"] - stitched["unaligned"]
    checks = [
        _at_least(
            "agreement falls with depth",
            "matched correlation, first - third layer",
            first["matching"] - last["matching"],
            0.1,
        ),
        _at_least("training makes units agree", "first layer, trained - untrained", beyond_null, 0.15),
        _at_least("few partners explain more than one", "least held-out R² difference of the layers", few, 0.1),
        _at_least("groups beat random groups of their sizes", "least difference of the layers", chance_gap, 0.1),
        _at_least("a rotation hides the units", "least fall of the matched correlation", rotation_gap, 0.2),
        _at_most("a rotation leaves the subspaces", "largest change of canonical correlations", moved, 1e-6),
        _at_most("an order of units is undone", "largest change of the matched correlation", permuted, 1e-6),
        _at_least("matched units can be exchanged", "stitched accuracy, matched - as numbered", exchanged, 0.05),
        _at_least("information ranks pairs alike", "rank correlation with |correlation| over pairs", alike, 0.7),
        Check(
            "partners by correlation and by information",
            "share of the eight best pairs with the same",
            same_partner,
            "reported",
            True,
            required=False,
        ),
    ]
    notes = [
        "The paper's networks are AlexNet-sized on ImageNet; here they are small, and EfficientNet-Lite0, 1 and 2, "
        "which differ in depth and width too.",
        "The sparse prediction is solved exactly (lasso path on the correlations, then least squares on the chosen "
        "units), where the paper trains by stochastic gradients; penalties are per unit.",
        "Small networks come from the cache where they were trained before; their training is then not in the seconds.",
    ]
    if setting.pretrained and all(is_installed(name) for name in MODELS):
        progress("EfficientNet-Lite", 0.75)
        table, agreement = pretrained_world(setting.pretrained, seed)
        tables.append(table)
        gap = min(agreement[key] - agreement[f"{key}, rotated"] for key in agreement if not key.endswith("rotated"))
        checks.append(_at_least("pretrained units agree beyond a rotation", "least fall when rotated", gap, 0.05))
        progress("light fine-tuning", 0.95)
        kept = tuned_units(setting.tuning_steps, seed)
        checks.append(_at_least("units stay in a light fine-tuning", "mean correlation with itself", kept, 0.9))
    return Outcome(
        claim="networks that differ in their seed alone learn some units in common, and beyond them subspaces "
        "in common whose basis each chooses for itself; agreement is best in the first layer",
        data=f"{world.name}: {setting.train} pictures train, {len(world.fit)} others fit the moments, "
        f"{len(world.held)} are held out",
        model="convolutional networks of 32, 64 and 128 channels, and EfficientNet-Lite0, 1, 2",
        metric="agreement of groups minus that of matched units, least of the layers",
        ours=basis,
        baselines={
            "smallest group agreement of a layer": in_groups,
            "smallest matched correlation of a layer": by_units,
        },
        bar=">= 0.15 at every layer: subspaces are shared where units are not",
        holds=basis >= 0.15,
        checks=checks,
        tables=tables,
        notes=notes,
    )


def _at_least(name: str, metric: str, value: float, bar: float) -> Check:
    return Check(name, metric, value, f">= {bar:g}", value >= bar)


def _at_most(name: str, metric: str, value: float, bar: float) -> Check:
    return Check(name, metric, value, f"<= {bar:g}", value <= bar)
