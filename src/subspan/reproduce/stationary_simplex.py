"""Stationary representations through tasks and replacements of the network, under one fixed simplex.

Three EfficientNet-Lite networks that were trained apart are the successive models; on the frozen features of each a
network with one hidden layer is trained. Every model can be matched with galleries of every earlier one, or not: that
is measured on classes which nothing was trained on.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
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

MODELS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
VERTICES = 128
LAMBDAS = (0.1, 0.3, 0.6, 1.0)

_HIDDEN = 256
_BATCH = 64
_EPOCHS = 30
_QUICK_EPOCHS = 12
_LEARNABLE = "learnable classifier (ER)"
_ENTROPY = "simplex, cross entropy"
_HOC = "simplex, HOC"


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
        self.net = nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, d))

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

    def dataset(self, rows: Tensor, labels: Tensor) -> TensorDataset:
        """Items (features of all encoders, class number)."""
        return TensorDataset(self.x[rows], labels)


def train(
    module: StationaryModule, data: TensorDataset, labels: Tensor, *, epochs: int, rate: float, seed: int
) -> None:
    """One task of training."""
    with torch.random.fork_rng(devices=[]), quiet_trainer(max_epochs=epochs) as trainer:
        warnings.filterwarnings("ignore", message=".*no negatives")
        torch.manual_seed(seed)
        trainer.fit(module.objective(learning_rate=rate), module.loader(data, labels))


def module_of(backbone: nn.Module, head: SimplexClassifier, lam: float, seed: int) -> StationaryModule:
    """The recipe that all arms share."""
    return StationaryModule(backbone, head, lam=lam, batch_size=_BATCH, seed=seed)


def pretrained(stream: Stream, fixed: bool, epochs: int, rate: float, seed: int) -> list[nn.Module]:
    """One backbone for each encoder, trained on the classes elsewhere against the front of the table or freely."""
    rows, labels = stream.select(stream.plan.elsewhere, "train")
    data = stream.dataset(rows, labels)
    found = []
    for model in range(len(MODELS)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 * seed + model)
            backbone = Backbone(model, stream.x.shape[1] // len(MODELS), VERTICES - 1)
            head = _head(fixed, len(stream.plan.elsewhere), "front")
        module = module_of(backbone, head, 1.0, seed)
        module.start_task(len(stream.plan.elsewhere))
        train(module, data, labels, epochs=epochs, rate=rate, seed=seed)
        found.append(module.backbone)
    return found


def _head(fixed: bool, classes: int, index: Any) -> SimplexClassifier:
    if fixed:
        return SimplexClassifier(classes, preallocated=VERTICES, index=index)
    return LearnableClassifier(classes, VERTICES)


@dataclass
class History:
    """Unit embeddings of the unseen classes by the model after each task, and what the last one says of the known."""

    gallery: list[Tensor]
    queries: list[Tensor]
    memory: list[tuple[Tensor, Tensor, Tensor]]
    accuracy: float
    module: StationaryModule


def run_tasks(
    stream: Stream, backbones: list[nn.Module], *, fixed: bool, lam: float, epochs: int, rate: float, seed: int
) -> History:
    """All tasks of a plan; memory: after each task, the remembered rows' embeddings before and after it, and labels."""
    roles = stream.plan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = module_of(backbones[0], _head(fixed, len(roles.tasks[0]), "back"), lam, seed)
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
        data = stream.dataset(rows, labels)
        deployed = before
        train(module, data, labels, epochs=epochs, rate=rate, seed=seed + number)
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


def onto_previous(history: History) -> tuple[list[Tensor], list[Tensor]]:
    """Galleries and queries, every model rotated onto the one before it by the memory."""
    mapped: tuple[list[Tensor], list[Tensor]] = ([], [])
    total = torch.eye(VERTICES - 1, dtype=torch.float64)
    for number, (old, new, _) in enumerate(history.memory):
        if number:
            total = total @ procrustes(new.double(), old.double()).matrix
        for out, rows in zip(mapped, (history.gallery[number], history.queries[number])):
            out.append((rows.double() @ total.mT).float())
    return mapped


def onto_vertices(history: History) -> tuple[list[Tensor], list[Tensor]]:
    """Galleries and queries, every model rotated so that the memory's classes come nearest to simplex vertices."""
    mapped: tuple[list[Tensor], list[Tensor]] = ([], [])
    vertices = simplex_vertices(VERTICES)
    for number, (_, new, labels) in enumerate(history.memory):
        turn = procrustes(new.double(), vertices[labels]).matrix
        for out, rows in zip(mapped, (history.gallery[number], history.queries[number])):
            out.append((rows.double() @ turn.mT).float())
    return mapped


def matrix_of(stream: Stream, gallery: list[Tensor], queries: list[Tensor]) -> Float[np.ndarray, "t t"]:
    """Rank-1 accuracy on the unseen classes, queries of model t against class templates of model s <= t."""
    g_labels, q_labels = (stream.select(stream.plan.unseen, part)[1].numpy() for part in ("train", "test"))
    templates = [template_gallery(rows, g_labels) for rows in gallery]
    return compatibility_matrix(queries, [rows for rows, _ in templates], q_labels, templates[0][1])


def across(matrix: Float[np.ndarray, "t t"], replacements: dict[int, int]) -> float:
    """Average compatibility over the pairs of models with a replacement between them."""
    pairs = [(t, s) for t in range(len(matrix)) for s in range(t) if any(s < r <= t for r in replacements)]
    return float(np.mean([matrix[t, s] > matrix[s, s] for t, s in pairs]))


def diagnostics(stream: Stream, history: History) -> list[float]:
    """Collapse of the known classes' test features: within/between, mean angle to vertices, energy off their span."""
    rows, place = stream.select(stream.plan.local, "test")
    with torch.no_grad():
        z = history.module(stream.x[rows]).double()
    head = history.module.head
    index = head.class_index(torch.arange(len(stream.plan.local)))
    fixed = not isinstance(head, LearnableClassifier)
    found = neural_collapse(GroupedMoments(z.shape[1]).update(z, place), simplex_vertices(VERTICES)[index])
    outside = float(active_subspace(VERTICES, index).residual_energy(z).mean())
    angle = float(found.prototype_angles.mean()) if found.prototype_angles is not None else float("nan")
    return [found.within_between, found.equiangle, angle if fixed else float("nan"), outside]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Learnable head, the same with Procrustes maps, and the simplex with cross entropy alone and with HOC."""
    data = labelled_images("digits" if quick else "cifar100")
    size = 64 if quick else 128
    parts = []
    for number, model in enumerate(MODELS):
        progress(f"features of {model}", 0.1 * number)
        features = data.features(model, size)
        center, spread = features[data.train].mean(0), features[data.train].std(0).mean()
        parts.append((features - center) / spread)
    x = torch.cat(parts, 1)
    epochs, rate = (_QUICK_EPOCHS if quick else _EPOCHS), 0.05
    seeds = range(seed, seed + (1 if quick else 3))
    results: dict[str, list[tuple[float, float, float, float]]] = {}
    matrices: dict[str, np.ndarray] = {}
    collapse: list[list[Any]] = []
    sweep: dict[float, list[tuple[float, float, float]]] = {}
    roles = plan(len(data.classes), seed)
    for number, one in enumerate(seeds):
        stream = Stream(x, data, plan(len(data.classes), one))
        options: Any = {"epochs": epochs, "rate": rate, "seed": one}
        free, fixed = (pretrained(stream, kind, **options) for kind in (False, True))
        histories = {}
        arms: dict[str, Any] = {_LEARNABLE: (free, False, 1.0), _ENTROPY: (fixed, True, 1.0), _HOC: (fixed, True, 0.1)}
        for name, (backbones, kind, lam) in arms.items():
            progress(f"{name}, seed {one}", 0.3 + 0.7 * number / len(seeds))
            histories[name] = run_tasks(stream, backbones, fixed=kind, lam=lam, **options)
        found = {name: (h.gallery, h.queries, h.accuracy) for name, h in histories.items()}
        learnable = histories[_LEARNABLE]
        found["ER, Procrustes onto the model before"] = (*onto_previous(learnable), learnable.accuracy)
        found["ER, Procrustes onto the vertices"] = (*onto_vertices(learnable), learnable.accuracy)
        for name, (gallery, queries, accuracy) in found.items():
            matrix = matrix_of(stream, gallery, queries)
            if one == seed:
                matrices[name] = matrix
            results.setdefault(name, []).append(
                (
                    average_compatibility(matrix),
                    across(matrix, stream.plan.replacements),
                    average_accuracy(matrix),
                    accuracy,
                )
            )
        if one == seed:
            collapse = [[name, *(round(v, 4) for v in diagnostics(stream, h))] for name, h in histories.items()]
            for lam in () if quick else LAMBDAS[1:-1]:
                h = run_tasks(stream, fixed, fixed=True, lam=lam, **options)
                matrix = matrix_of(stream, h.gallery, h.queries)
                sweep[lam] = [(average_compatibility(matrix), average_accuracy(matrix), h.accuracy)]
    mean = {name: np.mean(rows, axis=0).tolist() for name, rows in results.items()}
    return _outcome(data, roles, mean, results, matrices, collapse, sweep, quick, epochs, len(seeds))


def _outcome(
    data: LabelledImages,
    roles: Plan,
    mean: dict[str, list[float]],
    results: dict[str, list[tuple[float, float, float, float]]],
    matrices: dict[str, np.ndarray],
    collapse: list[list[Any]],
    sweep: dict[float, list[tuple[float, float, float]]],
    quick: bool,
    epochs: int,
    seeds: int,
) -> Outcome:
    er, ce, hoc = (mean[name] for name in (_LEARNABLE, _ENTROPY, _HOC))
    checks = [
        Check(
            "no compatibility without a fixed classifier",
            "AC of the learnable classifier over pairs with a replacement between",
            er[1],
            "<= 0.1",
            er[1] <= 0.1,
        ),
        Check("HOC beside cross entropy alone", "difference of AC", hoc[0] - ce[0], ">= 0", hoc[0] >= ce[0]),
        Check("average accuracy", "AA of HOC over AA of ER", hoc[2] / er[2], "> 1.5", hoc[2] > 1.5 * er[2]),
        Check(
            "accuracy on trained classes",
            "HOC - learnable classifier",
            hoc[3] - er[3],
            ">= -0.01",
            hoc[3] >= er[3] - 0.01,
        ),
    ]
    columns = ["AC", "AC across replacements", "AA", "accuracy on trained classes"]
    tables = [
        Table(
            f"{seeds} seeds, standard deviation of AC beside",
            ["arm", *columns, "± AC"],
            [
                [name, *(round(v, 4) for v in row), round(float(np.std([r[0] for r in results[name]])), 4)]
                for name, row in mean.items()
            ],
        ),
        *(
            Table(
                f"{name}: queries of model (row) in the templates of model (column)",
                ["model", *(str(s + 1) for s in range(len(matrix)))],
                [[t + 1, *(None if np.isnan(v) else round(float(v), 4) for v in row)] for t, row in enumerate(matrix)],
            )
            for name, matrix in matrices.items()
            if name in (_LEARNABLE, _ENTROPY, _HOC)
        ),
        Table(
            "known classes, last model",
            ["arm", "within/between", "deviation from equal angles", "degrees to the vertex", "energy off their span"],
            [[row[0], *(None if np.isnan(v) else v for v in row[1:])] for row in collapse],
        ),
    ]
    if sweep:
        tables.append(
            Table(
                "share of cross entropy, first seed",
                ["lambda", "AC", "AA", "accuracy on trained classes"],
                [[lam, *(round(v, 4) for v in rows[0])] for lam, rows in sweep.items()],
            )
        )
    return Outcome(
        claim="a fixed simplex classifier with the HOC loss keeps models comparable through tasks and replacements "
        "(CIFAR-100 → CIFAR-10, 7 tasks: AC 0.95, AA 68.9; a learnable classifier: AC 0, AA 35.2)",
        data=f"{data.name}: {len(roles.tasks)} tasks of {len(roles.tasks[0])} or fewer classes, {len(roles.elsewhere)} "
        f"classes for the models trained elsewhere, {len(roles.unseen)} classes to evaluate on",
        model="EfficientNet-Lite0, then Lite1, then Lite2, frozen; a network with one hidden layer trained on each",
        metric="average compatibility on unseen classes, queries against class templates",
        ours=hoc[0],
        baselines={name: row[0] for name, row in mean.items() if name != _HOC},
        bar="AC >= 0.8",
        holds=hoc[0] >= 0.8,
        checks=checks,
        tables=tables,
        notes=[
            "Fifty classes make the tasks; twenty others, at the front of the table, train the models that arrive as "
            "replacements; the tasks take its back."
            if not quick
            else "Digits stand in for CIFAR-100 in the quick run.",
            f"All arms share one recipe: {epochs} epochs a task of SGD at 0.05 with a cosine, batches of {_BATCH}, "
            "half of them memory (20 items a class); the authors' 70 epochs at 1e-3 are for whole networks.",
            "After a replacement the learnable classifier starts anew, as a downloaded model brings its own.",
        ],
    )
