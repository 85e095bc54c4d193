"""BT² on two real networks: EfficientNet-Lite0 as the old encoder, Lite2 as the new one, heads trained on CIFAR-100.

The old head has seen half of the classes, the new ones all. Queries and gallery are held-out pictures of every class.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.align import BackwardCompatibleModule, BT2Head, BT2Loss, TeacherDataset, old_class_means, teacher_features
from subspan.geometry import Subspace
from subspan.measures import common_prefix, compatibility_matrix, retrieval_scores
from subspan.nn import influence_loss
from subspan.nn.training import quiet_trainer
from subspan.statistics import JointMoments

from .materials.image_features import labelled_images
from .protocol import Check, Outcome, Progress, Table

MODELS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
# At one resolution the three embed these small pictures equally well; the old one sees fewer pixels, so that there is
# something to upgrade to.
PIXELS = {MODELS[0]: 64, MODELS[1]: 128, MODELS[2]: 128}
EXTRA = (0, 8, 32, 64)
_HIDDEN = 512


class Setting(NamedTuple):
    """Sizes of a run: inputs (leading principal directions), heads, extra dimensions, rows, queries, epochs, seeds."""

    inputs: int = 256
    d: int = 128
    k: int = 32
    train: int | None = None
    test: int | None = None
    queries: int = 1000
    epochs: int = 10
    seeds: int = 3

    @property
    def sweep(self) -> list[int]:
        """Numbers of extra dimensions that are tried, as far as the old width allows."""
        return sorted({k for k in (*EXTRA, self.k) if k <= self.d})


class Data(NamedTuple):
    """Inputs of each model for training and testing, class numbers; `seen`: training rows of the old classes."""

    name: str
    train: dict[str, Float[Tensor, "n p"]]
    test: dict[str, Float[Tensor, "m p"]]
    train_labels: np.ndarray
    test_labels: np.ndarray
    classes: int

    @property
    def seen(self) -> np.ndarray:
        """Training rows of the first half of the classes."""
        return self.train_labels < self.classes // 2


class PrefixFeatures(NamedTuple):
    """Class logits, a vector, and its leading part that is to match the old space."""

    logits: Float[Tensor, "n c"]
    full: Float[Tensor, "n d"]
    compatible: Float[Tensor, "n d_old"]


class PrefixHead(nn.Module):
    """Pooled features → a unit vector of d numbers with a linear classifier; its first d_old numbers are compared."""

    def __init__(self, in_features: int, d: int, d_old: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, d)
        self.classifier = nn.Linear(d, num_classes, bias=False)
        self.d_old = d_old

    def forward(self, features: Float[Tensor, "n p"]) -> PrefixFeatures:
        """Logits, the unit vector and its prefix."""
        full = F.normalize(self.linear(features), dim=-1)
        return PrefixFeatures(self.classifier(full), full, full[:, : self.d_old])


class InfluenceLoss(nn.Module):
    """Cross entropy + α · influence loss on the prefix: backward-compatible training (Shen et al., 2020)."""

    class_means: Tensor

    def __init__(self, class_means: Float[Tensor, "c d_old"], alpha: float) -> None:
        super().__init__()
        self.register_buffer("class_means", class_means)
        self.alpha = alpha

    def forward(
        self, out: PrefixFeatures, labels: Int[Tensor, " n"], old: Tensor, new: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The total and its terms; the teachers' features are not looked at."""
        terms = {"classification": F.cross_entropy(out.logits, labels)}
        if self.alpha:
            compatible = F.normalize(out.compatible, dim=-1)
            terms["influence"] = self.alpha * influence_loss(compatible, self.class_means, labels)
        return torch.stack(list(terms.values())).sum(), terms


def load(setting: Setting, seed: int, models: tuple[str, ...]) -> Data:
    """Leading principal coordinates of each network's features, of unit mean square, for training and testing."""
    images = labelled_images("cifar100")
    if setting.train is not None and setting.test is not None:
        images = images.first(setting.train, setting.test)
    generator = np.random.default_rng(seed)
    rows = [
        generator.permutation(part)[:count]
        for part, count in ((images.train, setting.train), (images.test, setting.test))
    ]
    train, test = {}, {}
    for model in models:
        features = images.features(model, PIXELS[model])
        basis = Subspace.fit(features[rows[0]], rank=min(setting.inputs, len(rows[0]) - 1, features.shape[1]))
        parts = [basis.coordinates(features[part]).float() for part in rows]
        scale = parts[0].square().mean().sqrt()
        train[model], test[model] = parts[0] / scale, parts[1] / scale
    return Data(images.name, train, test, images.labels[rows[0]], images.labels[rows[1]], len(images.classes))


def hidden_layer(inputs: int) -> nn.Sequential:
    """The backbone of every new model; its head adds the second layer."""
    return nn.Sequential(nn.Linear(inputs, _HIDDEN), nn.ReLU())


def trained(
    make: Callable[[], tuple[nn.Module, nn.Module, nn.Module]], data: TeacherDataset, epochs: int, seed: int
) -> BackwardCompatibleModule:
    """A module of backbone, head and loss, trained on the data: the same optimiser and schedule for every method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BackwardCompatibleModule(*make())
        with quiet_trainer(max_epochs=epochs) as trainer:
            trainer.fit(model.objective(learning_rate=2e-3), data.loader(128))
    return model.eval()


class Generation(NamedTuple):
    """A trained model with its full vectors for training rows (memory map) and for test rows."""

    train: np.ndarray
    test: Float[Tensor, "m d"]
    model: BackwardCompatibleModule


def plain(
    data: Data, model: str, rows: np.ndarray, d: int, setting: Setting, seed: int, folder: Path, *, deep: bool
) -> Generation:
    """An embedding trained by cross entropy alone, as every encoder begins; deep: with the new models' hidden layer."""
    inputs = data.train[model]
    width = inputs.shape[1]
    placeholder = np.ones((int(rows.sum()), 1), np.float32)
    chosen = TeacherDataset(inputs[torch.from_numpy(rows)], data.train_labels[rows], placeholder, placeholder)
    none = torch.ones(len(chosen.classes), d)

    def make() -> tuple[nn.Module, nn.Module, nn.Module]:
        backbone, pooled = (hidden_layer(width), _HIDDEN) if deep else (nn.Identity(), width)
        return backbone, PrefixHead(pooled, d, d, len(chosen.classes)), InfluenceLoss(none, 0.0)

    network = trained(make, chosen, setting.epochs, seed)
    path = folder / f"{model}-{'all' if rows.all() else 'half'}-{seed}.npy"
    return Generation(teacher_features(network.encode, inputs, path), network.encode(data.test[model]), network)


class Report(NamedTuple):
    """CMC top-1 and mAP of new queries in the old gallery, and of new queries in the new gallery."""

    cross: float
    cross_map: float
    own: float
    own_map: float


def report(data: Data, old: Tensor, compatible: Float[Tensor, "m d"], full: Float[Tensor, "m e"], count: int) -> Report:
    """The first `count` test rows are queries, left out of their own rankings; cut to the shorter vector, by cosine."""

    def scores(queries: Tensor, gallery: Tensor) -> tuple[float, float]:
        q, g = common_prefix(queries[:count], gallery)
        found = retrieval_scores(q, g, data.test_labels[:count], data.test_labels, exclude_self=True)
        return found.cmc(), found.mean_average_precision

    return Report(*scores(compatible, old), *scores(full, full))


def bt2(
    data: Data, model: str, old: np.ndarray, new: np.ndarray, k: int, setting: Setting, seed: int
) -> BackwardCompatibleModule:
    """A BT² model on one network's inputs, against an old and a new teacher's features of the training rows."""
    dataset = TeacherDataset(data.train[model], data.train_labels, old, new)
    means = old_class_means(old, dataset.labels)
    d_old, d_new = old.shape[1], new.shape[1]

    def make() -> tuple[nn.Module, nn.Module, nn.Module]:
        head = BT2Head(_HIDDEN, d_new, d_old, k, num_classes=len(dataset.classes))
        return hidden_layer(data.train[model].shape[1]), head, BT2Loss(means)

    return trained(make, dataset, setting.epochs, seed)


def influenced(
    data: Data, model: str, old: np.ndarray, extra: int, setting: Setting, seed: int
) -> BackwardCompatibleModule:
    """BCT with α = 10 on the first d_old numbers of a vector with `extra` free ones behind them."""
    dataset = TeacherDataset(data.train[model], data.train_labels, old, old)
    means = old_class_means(old, dataset.labels)
    d_old = old.shape[1]

    def make() -> tuple[nn.Module, nn.Module, nn.Module]:
        head = PrefixHead(_HIDDEN, d_old + extra, d_old, len(dataset.classes))
        return hidden_layer(data.train[model].shape[1]), head, InfluenceLoss(means, 10.0)

    return trained(make, dataset, setting.epochs, seed)


def one_seed(data: Data, setting: Setting, seed: int, folder: Path, tell: Callable[[str], None]) -> dict[str, Report]:
    """Every method and the sweep of k, for one seed."""
    first, last = MODELS[0], MODELS[-1]
    every = np.ones(len(data.train_labels), bool)
    tell("the two independent models")
    old = plain(data, first, data.seen, setting.d, setting, seed, folder, deep=False)
    new = plain(data, last, every, setting.d, setting, seed, folder, deep=True)
    inputs = data.test[last]
    found = {
        "old": report(data, old.test, old.test, old.test, setting.queries),
        "independent": report(data, old.test, new.test, new.test, setting.queries),
    }
    rotation = JointMoments(setting.d, setting.d).update(new.train, old.train).procrustes()
    found["Procrustes"] = report(data, old.test, rotation.map(new.test), new.test, setting.queries)
    for name, extra in (("BCT", 0), (f"BCT + {setting.k} free dimensions", setting.k)):
        tell(name)
        model = influenced(data, last, old.train, extra, setting, seed)
        found[name] = report(data, old.test, model.encode(inputs, "compatible"), model.encode(inputs), setting.queries)
    for k in setting.sweep:
        tell(f"BT², k = {k}")
        model = bt2(data, last, old.train, new.train, k, setting, seed)
        found[f"BT², k = {k}"] = report(
            data, old.test, model.encode(inputs, "compatible"), model.encode(inputs), setting.queries
        )
    return found


def chain(data: Data, setting: Setting, seed: int, folder: Path) -> Float[np.ndarray, "3 3"]:
    """Top-1 of each model's queries in each older gallery, where every model is compatible with the one before it."""
    every = np.ones(len(data.train_labels), bool)
    start = plain(data, MODELS[0], data.seen, setting.d, setting, seed, folder, deep=False)
    train, queries, galleries = start.train, [start.test], [start.test]
    for model in MODELS[1:]:
        target = plain(data, model, every, setting.d, setting, seed, folder, deep=True)
        network = bt2(data, model, train, target.train, setting.k, setting, seed)
        train = teacher_features(network.encode, data.train[model], folder / f"chain-{model}.npy")
        full = F.normalize(network.encode(data.test[model]), dim=-1)
        queries.append(full)
        galleries.append(full)
    asked, labels = [rows[: setting.queries] for rows in queries], data.test_labels
    return compatibility_matrix(asked, galleries, labels[: setting.queries], labels, exclude_self=True)


def _mean(reports: list[dict[str, Report]], name: str) -> Report:
    return Report(*np.mean([found[name] for found in reports], 0).tolist())


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Independent, Procrustes, BCT, BCT with free dimensions and BT² with k = 0, 8, 32, 64; then a chain."""
    setting = Setting(train=800, test=400, epochs=4, seeds=1) if quick else Setting()
    progress("features", 0.0)
    data = load(setting, seed, (MODELS[0], MODELS[-1]) if quick else MODELS)
    reports = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(setting.seeds):

            def tell(message: str, number: int = number) -> None:
                progress(f"seed {number + 1}: {message}", (number + 0.5) / (setting.seeds + 1))

            folder = Path(name) / str(number)
            folder.mkdir()
            reports.append(one_seed(data, setting, seed + number, folder, tell))
        steps = None
        if not quick:
            progress("chain of three models", setting.seeds / (setting.seeds + 1))
            steps = chain(data, setting, seed, Path(name))
    return _outcome(data, setting, reports, steps)


def _outcome(data: Data, setting: Setting, reports: list[dict[str, Report]], steps: np.ndarray | None) -> Outcome:
    ours, naive = f"BT², k = {setting.k}", f"BCT + {setting.k} free dimensions"
    mean = {name: _mean(reports, name) for name in reports[0]}
    worst = min(found[ours].cross - found["old"].own for found in reports)
    loss = {name: mean["independent"].own - mean[name].own for name in (ours, "BCT")}
    margin = mean[ours].cross - mean[naive].cross
    sweep = {k: mean[f"BT², k = {k}"] for k in setting.sweep}
    own = [value.own for value in sweep.values()]
    cross = [value.cross for k, value in sweep.items() if k <= setting.k]
    checks = [
        Check(
            "the new model is as good as one trained alone",
            "top-1 of the independent model - top-1 of BT², new/new",
            loss[ours],
            "<= 0.01",
            loss[ours] <= 0.01,
        ),
        Check(
            "BCT pays more for compatibility",
            "loss of BCT - loss of BT², top-1 new/new",
            loss["BCT"] - loss[ours],
            "> 0",
            loss["BCT"] > loss[ours],
        ),
        Check(
            "free dimensions alone do not do it",
            f"top-1 new/old, BT² - {naive}",
            margin,
            "> 0.02",
            margin > 0.02,
        ),
        Check(
            "new/new does not depend on k",
            "largest - smallest top-1 new/new over k",
            max(own) - min(own),
            "<= 0.02",
            max(own) - min(own) <= 0.02,
        ),
        Check(
            f"new/old does not fall up to k = {setting.k}",
            "largest fall of top-1 new/old from one k to the next",
            max(0.0, *(a - b for a, b in pairwise(cross))),
            "<= 0.01",
            all(b >= a - 0.01 for a, b in pairwise(cross)),
        ),
    ]
    columns = ["new/old top-1", "new/old mAP", "new/new top-1", "new/new mAP"]
    spread = {name: np.std([found[name].cross for found in reports]) for name in mean}
    tables = [
        Table(
            f"held-out pictures of all {data.classes} classes, mean of {len(reports)} seeds (old: old/old twice)",
            ["method", *columns, "standard deviation of new/old top-1"],
            [[name, *(round(v, 4) for v in value), round(float(spread[name]), 4)] for name, value in mean.items()],
        )
    ]
    if steps is not None:
        tables.append(
            Table(
                "Lite0 → Lite1 → Lite2, each compatible with the one before (top-1; one seed)",
                ["queries", *(f"gallery of {model}" for model in MODELS)],
                [
                    [model, *(round(float(v), 4) if np.isfinite(v) else "" for v in row)]
                    for model, row in zip(MODELS, steps)
                ],
            )
        )
        checks.append(
            Check(
                "compatibility lasts over two upgrades",
                "top-1 of the third model in the first gallery - the first model's own",
                float(steps[2, 0] - steps[0, 0]),
                "> 0",
                bool(steps[2, 0] > steps[0, 0]),
            )
        )
    return Outcome(
        claim="a new model trained by BT² searches the old gallery better than the old model did, and its own gallery "
        "as well as a model trained alone; backward-compatible training pays for one with the other",
        data=f"{data.name}: {len(data.train_labels)} training pictures (old model: the first half of the classes), "
        f"{len(data.test_labels)} held-out pictures as gallery, {min(setting.queries, len(data.test_labels))} of them "
        "as queries",
        model=f"heads on frozen EfficientNet-Lite0 (old) and Lite2 (new) features at 64 and 128 px, {setting.inputs} "
        f"principal directions; d = {setting.d}, k = {setting.k}, {setting.epochs} epochs",
        metric="CMC top-1, new queries in the old gallery",
        ours=mean[ours].cross,
        baselines={"old/old": mean["old"].own}
        | {name: mean[name].cross for name in ("independent", "Procrustes", "BCT", naive)},
        bar="above old/old on every seed",
        holds=worst > 0,
        checks=checks,
        tables=tables,
        notes=[
            "The paper trains ResNet-50 from scratch for 100 epochs; here small networks on frozen features of two "
            "independently pretrained encoders. The old one gets its pictures at half the resolution: at one "
            "resolution the two networks embed them equally well, and the method supposes a better new model.",
            "Teachers see the same deterministic views as the student; the authors' code caches one random flip.",
        ],
    )
