"""Stationary representations through tasks and replacements of the network, under one fixed simplex.

Three EfficientNet-Lite networks that were trained apart are the successive models; on the frozen features of each a
network with one hidden layer is trained. Every model can be matched with galleries of every earlier one, or not: that
is measured on classes which nothing was trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from subspan.align import StationaryModule
from subspan.geometry import AffineMap
from subspan.measures import (
    average_accuracy,
    average_compatibility,
    compatibility_matrix,
    neural_collapse,
    template_gallery,
)
from subspan.nn import SimplexClassifier, active_subspace, simplex_vertices
from subspan.nn.training import quiet_trainer
from subspan.statistics import GroupedMoments, JointMoments

from .materials.image_features import LabelledImages, labelled_images
from .protocol import Check, Outcome, Progress, Table
from .trials import Column, Trials

MODELS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
VERTICES, HIDDEN = 128, 256
BATCH, RATE = 64, 0.05
EPOCHS, QUICK_EPOCHS = 30, 12

_LEARNABLE, _ENTROPY, _HOC = "learnable classifier (ER)", "simplex, cross entropy", "simplex, HOC"
# Whether the classifier is fixed, and the share of cross entropy.
TRAINED = {_LEARNABLE: (False, 1.0), _ENTROPY: (True, 1.0), _HOC: (True, 0.1)}
LAMBDAS = (0.3, 0.6)
FACTS = ("AC", "AC across replacements", "AA", "accuracy on trained classes")


@dataclass(frozen=True)
class Plan:
    """Classes by role: `tasks`, one list a task; `elsewhere`, what downloaded models were trained on; `unseen`.

    replacements: task → number of the model that arrives with it; task 0 starts from model 0.
    """

    tasks: list[list[int]]
    elsewhere: list[int]
    unseen: list[int]
    replacements: dict[int, int]

    @property
    def local(self) -> list[int]:
        """The classes of all tasks, in their order."""
        return [label for classes in self.tasks for label in classes]


def plan(classes: int, seed: int) -> Plan:
    """Five tasks of ten of 100 classes, 20 elsewhere, 30 unseen; of ten classes 2, 1 and 1, two and four."""
    order = np.random.default_rng(seed).permutation(classes).tolist()
    if classes < 100:
        return Plan([order[:2], order[2:3], order[3:4]], order[4:6], order[6:], {0: 0, 1: 1, 2: 2})
    return Plan([order[10 * t : 10 * t + 10] for t in range(5)], order[50:70], order[70:], {0: 0, 2: 1, 4: 2})


class Backbone(nn.Module):
    """Features of one encoder, cut out of those of all side by side, → embeddings: linear, ReLU, linear."""

    def __init__(self, model: int, width: int, d: int) -> None:
        super().__init__()
        self.model, self.width = model, width
        self.net = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, d))

    def forward(self, x: Float[Tensor, "n w"]) -> Float[Tensor, "n d"]:
        """Embeddings, not normalised."""
        return self.net(x[:, self.model * self.width : (self.model + 1) * self.width])


class LearnableClassifier(SimplexClassifier):
    """The usual classifier in the simplex's place: learnt weights, one row more for every class that comes."""

    def __init__(self, num_classes: int, preallocated: int) -> None:
        super().__init__(num_classes, preallocated=preallocated)
        self.rows = nn.Linear(preallocated - 1, preallocated)

    def logits(self, embeddings: Float[Tensor, "*n e"]) -> Float[Tensor, "*n k"]:
        """Logits of the classes so far."""
        logits = self.rows(embeddings)
        return logits.masked_fill(torch.arange(self.preallocated, device=logits.device) >= self.num_classes, -torch.inf)


class Stream:
    """The pictures of one plan, as the tasks see them."""

    def __init__(self, features: Float[Tensor, "n w"], data: LabelledImages, roles: Plan) -> None:
        self.x, self.plan = features, roles
        self.labels = torch.as_tensor(data.labels)
        self.rows = {"train": torch.as_tensor(data.train), "test": torch.as_tensor(data.test)}

    def select(self, classes: list[int], part: str) -> tuple[Tensor, Tensor]:
        """Row numbers of classes, and the place of each row's class in the list."""
        place = torch.full((int(self.labels.max()) + 1,), -1)
        place[torch.tensor(classes)] = torch.arange(len(classes))
        rows = self.rows[part]
        kept = rows[place[self.labels[rows]] >= 0]
        return kept, place[self.labels[kept]]


def train(module: StationaryModule, data: TensorDataset, labels: Tensor, epochs: int, seed: int) -> None:
    """One task of training."""
    with torch.random.fork_rng(devices=[]), quiet_trainer(max_epochs=epochs) as trainer:
        warnings.filterwarnings("ignore", message=".*no negatives")
        torch.manual_seed(seed)
        trainer.fit(module.objective(learning_rate=RATE), module.loader(data, labels))


def _module(backbone: nn.Module, head: SimplexClassifier, lam: float, seed: int) -> StationaryModule:
    return StationaryModule(backbone, head, lam=lam, batch_size=BATCH, random_state=seed)


def _head(fixed: bool, classes: int, index: Any) -> SimplexClassifier:
    if fixed:
        return SimplexClassifier(classes, preallocated=VERTICES, index=index)
    return LearnableClassifier(classes, VERTICES)


def pretrained(stream: Stream, fixed: bool, epochs: int, seed: int) -> list[nn.Module]:
    """One backbone for each encoder, trained on the classes elsewhere against the front of the table or freely."""
    rows, labels = stream.select(stream.plan.elsewhere, "train")
    found = []
    for model in range(len(MODELS)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 * seed + model)
            backbone = Backbone(model, stream.x.shape[1] // len(MODELS), VERTICES - 1)
            head = _head(fixed, len(stream.plan.elsewhere), "front")
        module = _module(backbone, head, 1.0, seed)
        module.start_task(len(stream.plan.elsewhere))
        train(module, TensorDataset(stream.x[rows], labels), labels, epochs, seed)
        found.append(module.backbone)
    return found


@dataclass
class History:
    """Unit embeddings of the unseen classes by the model after each task, and what the last one says of the known."""

    gallery: list[Tensor]
    queries: list[Tensor]
    memory: list[tuple[Tensor, Tensor, Tensor]]
    accuracy: float
    module: StationaryModule


def run_tasks(
    stream: Stream, backbones: list[nn.Module], *, fixed: bool, lam: float, epochs: int, seed: int
) -> History:
    """All tasks of a plan; memory: after each task, the remembered rows' embeddings before and after it, and labels."""
    roles = stream.plan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _module(backbones[0], _head(fixed, len(roles.tasks[0]), "back"), lam, seed)
    gallery, queries = (stream.select(roles.unseen, part) for part in ("train", "test"))
    history = History([], [], [], 0.0, module)
    seen = 0
    before: StationaryModule | None = None
    for number, classes in enumerate(roles.tasks):
        replacement = roles.replacements.get(number)
        if replacement is not None and not fixed and number:
            # The downloaded model comes with a classifier of its own; nothing ties it to the old one.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + number)
                module.head = _head(False, seen, "back")
        seen += len(classes)
        module.start_task(seen, None if replacement is None else backbones[replacement])
        rows, place = stream.select(classes, "train")
        labels = place + seen - len(classes)
        data = TensorDataset(stream.x[rows], labels)
        deployed = before
        train(module, data, labels, epochs, seed + number)
        module.end_task(data, labels)
        module.eval()
        with torch.no_grad():
            history.gallery.append(module(stream.x[gallery[0]]))
            history.queries.append(module(stream.x[queries[0]]))
            items, names = _remembered(module)
            old = module(items) if deployed is None else deployed(items)
            history.memory.append((old, module(items), names))
        before = _copy(module)
    rows, place = stream.select(roles.local, "test")
    with torch.no_grad():
        logits = module.head.logits(module.embed(stream.x[rows]))
        known = logits[:, module.head.class_index(torch.arange(len(roles.local)))]
        history.accuracy = float((known.argmax(1) == place).double().mean())
    return history


def _copy(module: StationaryModule) -> StationaryModule:
    copy = StationaryModule(nn.Identity(), module.head)
    copy.start_task(module.head.num_classes, module.backbone)
    return copy.eval()


def _remembered(module: StationaryModule) -> tuple[Tensor, Tensor]:
    parts: list[Subset[Any]] = module.rehearsal.parts
    items = [part.dataset[index] for part in parts for index in part.indices]
    return torch.stack([x for x, _ in items]), torch.stack([label for _, label in items])


def procrustes(source: Tensor, target: Tensor) -> AffineMap:
    """The rotation of unit rows onto their partners, without a shift."""
    both = JointMoments(source.shape[1], target.shape[1])
    # Each pair with its mirror image: the means are zero and the map is linear.
    both.update(torch.cat([source, -source]), torch.cat([target, -target]))
    return both.procrustes()


def onto_previous(history: History) -> list[Tensor]:
    """Rotations of every model onto the one before it by the memory, and so on to the first."""
    turns = [torch.eye(VERTICES - 1, dtype=torch.float64)]
    for old, new, _ in history.memory[1:]:
        turns.append(turns[-1] @ procrustes(new.double(), old.double()).matrix)
    return turns


def onto_vertices(history: History) -> list[Tensor]:
    """Rotations of every model that take the memory's classes nearest to simplex vertices."""
    vertices = simplex_vertices(VERTICES)
    return [procrustes(new.double(), vertices[labels]).matrix for _, new, labels in history.memory]


MAPPED: dict[str, Callable[[History], list[Tensor]]] = {
    "ER, Procrustes onto the model before": onto_previous,
    "ER, Procrustes onto the vertices": onto_vertices,
}


def matrix_of(stream: Stream, gallery: list[Tensor], queries: list[Tensor]) -> Float[np.ndarray, "t t"]:
    """Rank-1 accuracy on the unseen classes, queries of model t against class templates of model s <= t."""
    g_labels, q_labels = (stream.select(stream.plan.unseen, part)[1].numpy() for part in ("train", "test"))
    templates = [template_gallery(rows, g_labels) for rows in gallery]
    return compatibility_matrix(queries, [rows for rows, _ in templates], q_labels, templates[0][1])


def across(matrix: Float[np.ndarray, "t t"], replacements: dict[int, int]) -> float:
    """Average compatibility over the pairs of models with a replacement between them."""
    pairs = [(t, s) for t in range(len(matrix)) for s in range(t) if any(s < r <= t for r in replacements)]
    return float(np.mean([matrix[t, s] > matrix[s, s] for t, s in pairs]))


def diagnostics(stream: Stream, history: History) -> list[float | None]:
    """Collapse of the known classes' test features: within/between, mean angle to vertices, energy off their span."""
    rows, place = stream.select(stream.plan.local, "test")
    with torch.no_grad():
        z = history.module(stream.x[rows]).double()
    head = history.module.head
    index = head.class_index(torch.arange(len(stream.plan.local)))
    found = neural_collapse(GroupedMoments(z.shape[1]).update(z, place), simplex_vertices(VERTICES)[index])
    outside = float(active_subspace(VERTICES, index).residual_energy(z).mean())
    angles = None if isinstance(head, LearnableClassifier) else found.prototype_angles
    angle = None if angles is None else float(angles.mean())
    values = (found.within_between, found.equiangle, angle, outside)
    return [None if value is None or np.isnan(value) else float(value) for value in values]


def scaled_features(data: LabelledImages, size: int, progress: Progress) -> Float[Tensor, "n w"]:
    """Features of all encoders side by side, each about 0 and of unit spread over the training pictures."""
    parts = []
    for number, model in enumerate(MODELS):
        progress(f"features of {model}", 0.1 * number)
        features = data.features(model, size)
        center, spread = features[data.train].mean(0), features[data.train].std(0).mean()
        parts.append((features - center) / spread)
    return torch.cat(parts, 1)


def recipe(arm: str | tuple[float]) -> tuple[bool, float]:
    """Whether the classifier of an arm is fixed, and its share of cross entropy; (share,) is an arm of the sweep."""
    return TRAINED[_LEARNABLE if arm in MAPPED else arm] if isinstance(arm, str) else (True, *arm)


class Study:
    """What every arm trains under every seed, once, and what its models' comparability comes to."""

    def __init__(self, data: LabelledImages, features: Float[Tensor, "n w"], epochs: int) -> None:
        def history(fixed: bool, lam: float, seed: int) -> History:
            stream, backbones = self.stream(seed), self.backbones(fixed, seed)
            return run_tasks(stream, backbones, fixed=fixed, lam=lam, epochs=epochs, seed=seed)

        self.stream = cache(lambda seed: Stream(features, data, plan(len(data.classes), seed)))
        self.backbones = cache(lambda fixed, seed: pretrained(self.stream(seed), fixed, epochs, seed))
        self._history, self.matrix = cache(history), cache(self._matrix)

    def history(self, arm: Any, seed: int) -> History:
        """The models of an arm; those of a map are the learnable classifier's."""
        return self._history(*recipe(arm), seed)

    def _matrix(self, arm: Any, seed: int) -> Float[np.ndarray, "t t"]:
        found = self.history(arm, seed)
        sides = found.gallery, found.queries
        if arm in MAPPED:
            turns = MAPPED[arm](found)
            sides = ([(part.double() @ turn.mT).float() for part, turn in zip(parts, turns)] for parts in sides)
        return matrix_of(self.stream(seed), *sides)

    def facts(self, arm: Any, seed: int) -> dict[str, float]:
        """FACTS of an arm."""
        matrix = self.matrix(arm, seed)
        values = (
            average_compatibility(matrix),
            across(matrix, self.stream(seed).plan.replacements),
            average_accuracy(matrix),
            self.history(arm, seed).accuracy,
        )
        return dict(zip(FACTS, values))

    def matrix_table(self, arm: str, seed: int) -> Table:
        """Every model's queries in every earlier one's templates."""
        rows = [
            [t + 1, *(None if np.isnan(value) else float(value) for value in row)]
            for t, row in enumerate(self.matrix(arm, seed))
        ]
        title = f"{arm}: queries of model (row) in the templates of model (column)"
        return Table.rounded(title, ["model", *(str(s + 1) for s in range(len(rows)))], rows)


def checks(trials: Trials[str]) -> list[Check]:
    """What the fixed classifier and its loss are good for."""
    mean = trials.mean
    share = mean(_HOC, "AA") / mean(_LEARNABLE, "AA")
    lost = "AC of the learnable classifier over pairs with a replacement between"
    trained = "accuracy on trained classes"
    return [
        Check.at_most("no compatibility without a fixed classifier", lost, mean(_LEARNABLE, FACTS[1]), 0.1, quick=True),
        Check.at_least("HOC beside cross entropy alone", "difference of AC", trials.gap(_HOC, _ENTROPY, "AC"), 0),
        Check.above("average accuracy", "AA of HOC over AA of ER", share, 1.5),
        Check.at_least(trained, "HOC - learnable classifier", trials.gap(_HOC, _LEARNABLE, trained), -0.01),
    ]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Learnable head, the same with Procrustes maps, and the simplex with cross entropy alone and with HOC."""
    data = labelled_images("digits" if quick else "cifar100")
    epochs, seeds = (QUICK_EPOCHS, 1) if quick else (EPOCHS, 3)
    study = Study(data, scaled_features(data, 64 if quick else 128, progress), epochs)
    arms = [*TRAINED, *MAPPED]
    trials = Trials(arms, range(seed, seed + seeds), study.facts, progress=progress, span=(0.3, 1.0))
    tables = [
        trials.table(
            f"{seeds} seeds, standard deviation of AC beside",
            "arm",
            {**dict(zip(FACTS, FACTS)), "± AC": Column("AC", np.std)},
            digits=4,
        ),
        *(study.matrix_table(arm, seed) for arm in TRAINED),
        Table.rounded(
            "known classes, last model",
            ["arm", "within/between", "deviation from equal angles", "degrees to the vertex", "energy off their span"],
            [[arm, *diagnostics(study.stream(seed), study.history(arm, seed))] for arm in TRAINED],
        ),
    ]
    if not quick:
        sweep = Trials([(lam,) for lam in LAMBDAS], [seed], study.facts)
        shown = [fact for fact in FACTS if "replacements" not in fact]
        tables.append(sweep.table("share of cross entropy, first seed", ["lambda"], shown, digits=4))
    roles, ours = study.stream(seed).plan, trials.mean(_HOC, "AC")
    return Outcome(
        claim="a fixed simplex classifier with the HOC loss keeps models comparable through tasks and replacements "
        "(CIFAR-100 → CIFAR-10, 7 tasks: AC 0.95, AA 68.9; a learnable classifier: AC 0, AA 35.2)",
        data=f"{data.name}: {len(roles.tasks)} tasks of {len(roles.tasks[0])} or fewer classes, {len(roles.elsewhere)} "
        f"classes for the models trained elsewhere, {len(roles.unseen)} classes to evaluate on",
        model="EfficientNet-Lite0, then Lite1, then Lite2, frozen; a network with one hidden layer trained on each",
        metric="average compatibility on unseen classes, queries against class templates",
        ours=ours,
        baselines=trials.means("AC", but=_HOC),
        main=Check.at_least("compatibility", "AC", ours, 0.8),
        checks=checks(trials),
        tables=tables,
        notes=[
            "Fifty classes make the tasks; twenty others, at the front of the table, train the models that arrive as "
            "replacements; the tasks take its back."
            if not quick
            else "Digits stand in for CIFAR-100 in the quick run.",
            f"All arms share one recipe: {epochs} epochs a task of SGD at {RATE} with a cosine, batches of {BATCH}, "
            "half of them memory (20 items a class); the authors' 70 epochs at 1e-3 are for whole networks.",
            "After a replacement the learnable classifier starts anew, as a downloaded model brings its own.",
        ],
    )
