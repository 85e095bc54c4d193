"""BT² on two real networks: EfficientNet-Lite0 as the old encoder, Lite2 as the new one, heads trained on CIFAR-100.

The old head has seen half of the classes, the new ones all. Queries and gallery are held-out pictures of every class.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.align import BackwardCompatibleModule, BT2Head, BT2Loss, TeacherDataset, old_class_means, teacher_features
from subspan.align.compatible.bt2 import BT2Features
from subspan.geometry import Subspace
from subspan.measures import common_prefix, compatibility_matrix, retrieval_scores
from subspan.nn import influence_loss
from subspan.nn.training import quiet_trainer
from subspan.statistics import JointMoments

from .materials import labelled_images
from .protocol import Check, Outcome, Progress, Table
from .trials import Column, Trials

MODELS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
# At one resolution the three embed these small pictures equally well; the old one sees fewer pixels, so that there is
# something to upgrade to.
PIXELS = {MODELS[0]: 64, MODELS[1]: 128, MODELS[2]: 128}
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
        return sorted({k for k in (0, 8, 32, 64, self.k) if k <= self.d})


class Data(NamedTuple):
    """Inputs of each model for training and testing, and class numbers."""

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


class PrefixHead(nn.Module):
    """Pooled features → a unit vector of d numbers with a linear classifier; its first d_old numbers are compared."""

    def __init__(self, in_features: int, d: int, d_old: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, d)
        self.classifier = nn.Linear(d, num_classes, bias=False)
        self.d_old = d_old

    def forward(self, features: Float[Tensor, "n p"]) -> BT2Features:
        """Logits, the unit vector and its prefix."""
        full = F.normalize(self.linear(features), dim=-1)
        return BT2Features(self.classifier(full), full, full[:, :0], full, full[:, : self.d_old])


class InfluenceLoss(nn.Module):
    """Cross entropy + α · influence loss on the prefix: backward-compatible training (Shen et al., 2020)."""

    class_means: Tensor

    def __init__(self, class_means: Float[Tensor, "c d_old"], alpha: float) -> None:
        super().__init__()
        self.register_buffer("class_means", class_means)
        self.alpha = alpha

    def forward(self, out: BT2Features, labels: Tensor, *teachers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
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


class Generation(NamedTuple):
    """Full vectors of a trained model for training rows (memory map) and for test rows."""

    train: np.ndarray
    test: Float[Tensor, "m d"]


Vectors = tuple[Float[Tensor, "m d"], Float[Tensor, "m e"]]
"""Of test rows: those compared with the old gallery, and the full ones."""


@dataclass(frozen=True)
class Study:
    """The models of one seed, all trained by one optimiser and schedule, each when it is first asked for."""

    data: Data
    setting: Setting
    seed: int
    folder: Path

    def trained(self, dataset: TeacherDataset, make: Callable[[], tuple[Any, Any, Any]]) -> BackwardCompatibleModule:
        """A module of the backbone, head and loss that `make` draws."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = BackwardCompatibleModule(*make())
            with quiet_trainer(max_epochs=self.setting.epochs) as trainer:
                trainer.fit(module.objective(learning_rate=2e-3), dataset.loader(128))
        return module.eval()

    def hidden(self, model: str) -> nn.Sequential:
        """The backbone of every new model; its head adds the second layer."""
        return nn.Sequential(nn.Linear(self.data.train[model].shape[1], _HIDDEN), nn.ReLU())

    def plain(self, model: str, rows: np.ndarray, *, deep: bool = True) -> Generation:
        """An embedding trained by cross entropy alone, as every encoder begins."""
        inputs, d = self.data.train[model], self.setting.d
        nothing = np.ones((int(rows.sum()), 1), np.float32)
        chosen = TeacherDataset(inputs[torch.from_numpy(rows)], self.data.train_labels[rows], nothing, nothing)
        classes, loss = len(chosen.classes), InfluenceLoss(torch.ones(len(chosen.classes), d), 0.0)

        def make() -> tuple[Any, Any, Any]:
            backbone, width = (self.hidden(model), _HIDDEN) if deep else (nn.Identity(), inputs.shape[1])
            return backbone, PrefixHead(width, d, d, classes), loss

        network = self.trained(chosen, make)
        path = self.folder / f"{model}-{rows.mean():.2f}-{self.seed}.npy"
        return Generation(teacher_features(network.encode, inputs, path), network.encode(self.data.test[model]))

    @cached_property
    def old(self) -> Generation:
        """The old model: half of the classes, one layer."""
        return self.plain(MODELS[0], self.data.seen, deep=False)

    @cached_property
    def new(self) -> Generation:
        """The new model trained alone."""
        return self.plain(MODELS[-1], np.ones(len(self.data.train_labels), bool))

    def compatible(self, model: str, old: np.ndarray, new: np.ndarray, head: Any, loss: Any) -> Any:
        """A model of the head and loss that are made of the number of classes and of their means in the old space."""
        dataset = TeacherDataset(self.data.train[model], self.data.train_labels, old, new)
        classes, means = len(dataset.classes), old_class_means(old, dataset.labels)

        def make() -> tuple[Any, Any, Any]:
            made = head(classes)
            return self.hidden(model), made, loss(means)

        return self.trained(dataset, make)

    def bt2(self, model: str, old: np.ndarray, new: np.ndarray, k: int) -> BackwardCompatibleModule:
        """A BT² model on one network's inputs, against an old and a new teacher's features of the training rows."""
        sizes = _HIDDEN, new.shape[1], old.shape[1], k
        return self.compatible(model, old, new, lambda classes: BT2Head(*sizes, num_classes=classes), BT2Loss)

    def vectors(self, network: BackwardCompatibleModule) -> Vectors:
        """Of the new model's test rows."""
        inputs = self.data.test[MODELS[-1]]
        return network.encode(inputs, "compatible"), network.encode(inputs)

    def influenced(self, extra: int) -> Vectors:
        """BCT with α = 10 on the first d numbers of a vector with `extra` free ones behind them."""
        d, old = self.setting.d, self.old.train
        head, loss = partial(PrefixHead, _HIDDEN, d + extra, d), partial(InfluenceLoss, alpha=10.0)
        return self.vectors(self.compatible(MODELS[-1], old, old, head, loss))

    def upgraded(self, k: int) -> Vectors:
        """BT² with k extra dimensions."""
        return self.vectors(self.bt2(MODELS[-1], self.old.train, self.new.train, k))

    def rotated(self) -> Vectors:
        """The new model, turned onto the old one by a rotation."""
        d = self.setting.d
        rotation = JointMoments(d, d).update(self.new.train, self.old.train).procrustes()
        return rotation.map(self.new.test), self.new.test

    def scores(self, vectors: Vectors) -> dict[str, float]:
        """Of new queries (the first test rows, left out of their own rankings) in the old and in the new gallery."""
        count, labels, found = self.setting.queries, self.data.test_labels, {}
        for name, q, g in (("new/old", vectors[0], self.old.test), ("new/new", vectors[1], vectors[1])):
            q, g = common_prefix(q[:count], g)
            each = retrieval_scores(q, g, labels[:count], labels, exclude_self=True)
            found |= {f"{name} top-1": each.cmc(), f"{name} mAP": each.mean_average_precision}
        return found

    def chain(self) -> Float[np.ndarray, "3 3"]:
        """Top-1 of each model's queries in each older gallery, where every model is compatible with the one before."""
        every = np.ones(len(self.data.train_labels), bool)
        train, galleries = self.old.train, [self.old.test]
        for model in MODELS[1:]:
            network = self.bt2(model, train, self.plain(model, every).train, self.setting.k)
            train = teacher_features(network.encode, self.data.train[model], self.folder / f"chain-{model}.npy")
            galleries.append(F.normalize(network.encode(self.data.test[model]), dim=-1))
        count, labels = self.setting.queries, self.data.test_labels
        asked = [rows[:count] for rows in galleries]
        return compatibility_matrix(asked, galleries, labels[:count], labels, exclude_self=True)


def arms(setting: Setting) -> dict[str, Callable[[Study], Vectors]]:
    """Every method by name; "old" is the old model in the place of the new one."""
    return {
        "old": lambda study: (study.old.test, study.old.test),
        "independent": lambda study: (study.new.test, study.new.test),
        "Procrustes": Study.rotated,
        "BCT": lambda study: study.influenced(0),
        f"BCT + {setting.k} free dimensions": lambda study: study.influenced(setting.k),
        **{f"BT², k = {k}": lambda study, k=k: study.upgraded(k) for k in setting.sweep},
    }


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Independent, Procrustes, BCT, BCT with free dimensions and BT² with k = 0, 8, 32, 64; then a chain."""
    setting = Setting(train=800, test=400, epochs=4, seeds=1) if quick else Setting()
    progress("features", 0.0)
    data = load(setting, seed, (MODELS[0], MODELS[-1]) if quick else MODELS)
    with tempfile.TemporaryDirectory() as folder:
        study = cache(lambda number: Study(data, setting, number, Path(folder)))
        methods = arms(setting)
        trials = Trials(
            methods,
            range(seed, seed + setting.seeds),
            lambda arm, number: study(number).scores(methods[arm](study(number))),
            progress=progress,
            span=(0.1, 0.8),
        )
        steps = None
        if not quick:
            progress("chain of three models", 0.8)
            steps = study(seed).chain()
    return outcome(data, setting, trials, steps)


def outcome(data: Data, setting: Setting, trials: Trials[str], steps: np.ndarray | None) -> Outcome:
    """The bars, on what was measured."""
    ours, naive = f"BT², k = {setting.k}", f"BCT + {setting.k} free dimensions"
    old, new = "new/old top-1", "new/new top-1"
    swept = [f"BT², k = {k}" for k in setting.sweep]
    own = [trials.mean(name, new) for name in swept]
    cross = [trials.mean(f"BT², k = {k}", old) for k in setting.sweep if k <= setting.k]
    columns = {name: name for name in (old, "new/old mAP", new, "new/new mAP")}
    table = trials.table(
        f"held-out pictures of all {data.classes} classes, mean of {setting.seeds} seeds (old: old/old twice)",
        "method",
        {**columns, f"standard deviation of {old}": Column(old, np.std)},
        digits=4,
    )
    alone, paid = trials.gap("independent", ours, new), trials.gap(ours, "BCT", new)
    free, fall = trials.gap(ours, naive, old), max(0.0, *(a - b for a, b in pairwise(cross)))
    checks = [
        Check.at_most("the new model is as good as one trained alone",
                      "top-1 of the independent model - top-1 of BT², new/new", alone, 0.01),
        Check.above("BCT pays more for compatibility", "loss of BCT - loss of BT², top-1 new/new", paid, 0),
        Check.above("free dimensions alone do not do it", f"top-1 new/old, BT² - {naive}", free, 0.02),
        Check.at_most("new/new does not depend on k", "largest - smallest top-1 new/new over k", max(own) - min(own),
                      0.02),
        Check.at_most(f"new/old does not fall up to k = {setting.k}",
                      "largest fall of top-1 new/old from one k to the next", fall, 0.01),
    ]  # fmt: skip
    tables = [table]
    if steps is not None:
        rows = [
            [model, *(round(float(v), 4) if np.isfinite(v) else "" for v in row)] for model, row in zip(MODELS, steps)
        ]
        title = "Lite0 → Lite1 → Lite2, each compatible with the one before (top-1; one seed)"
        tables.append(Table(title, ["queries", *(f"gallery of {model}" for model in MODELS)], rows))
        metric = "top-1 of the third model in the first gallery - the first model's own"
        checks.append(Check.above("compatibility lasts over two upgrades", metric, steps[2, 0] - steps[0, 0], 0))
    return Outcome(
        claim="a new model trained by BT² searches the old gallery better than the old model did, and its own gallery "
        "as well as a model trained alone; backward-compatible training pays for one with the other",
        data=f"{data.name}: {len(data.train_labels)} training pictures (old model: the first half of the classes), "
        f"{len(data.test_labels)} held-out pictures as gallery, {min(setting.queries, len(data.test_labels))} of them "
        "as queries",
        model=f"heads on frozen EfficientNet-Lite0 (old) and Lite2 (new) features at 64 and 128 px, {setting.inputs} "
        f"principal directions; d = {setting.d}, k = {setting.k}, {setting.epochs} epochs",
        metric="CMC top-1, new queries in the old gallery",
        ours=trials.mean(ours, old),
        baselines={"old/old" if name == "old" else name: trials.mean(name, old)
                   for name in ("old", "independent", "Procrustes", "BCT", naive)},
        main=Check.above("new queries beat old ones in the old gallery",
                         "least gain of top-1 over old/old on any seed", trials.gap(ours, "old", old, of=min), 0),
        checks=checks,
        tables=tables,
        notes=[
            "The paper trains ResNet-50 from scratch for 100 epochs; here small networks on frozen features of two "
            "independently pretrained encoders. The old one gets its pictures at half the resolution: at one "
            "resolution the two networks embed them equally well, and the method supposes a better new model.",
            "Teachers see the same deterministic views as the student; the authors' code caches one random flip.",
        ],
    )  # fmt: skip
