"""Matryoshka on frozen features: nested heads against one model a size and against cutting, with cascade and funnel.

Pictures: pooled EfficientNet-Lite0 features under a trainable network with one hidden layer, the "last block". Text:
MiniLM embeddings of functions and of their docstrings under an adapter trained on such pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from subspan.datasets import code_and_docstrings, is_installed, load_sentence_encoder
from subspan.geometry import prefix, smallest_sufficient
from subspan.geometry.grassmann import random_basis
from subspan.models import SentenceEncoder
from subspan.represent import Matryoshka, MatryoshkaCascade, MatryoshkaIndex
from subspan.solvers import nearest

from .materials import labelled_images, text_features
from .protocol import Check, Outcome, Progress, Table
from .trials import Trials

DIMS = (4, 8, 16, 32, 64, 128, 256)
UNSEEN = (6, 12, 24, 48, 96, 192)
QUICK_DIMS = (8, 16, 64, 256)
TEXT_DIMS = (12, 24, 48, 96, 192, 384)
MEASURES = ("linear top-1", "top-1 of a fitted probe", "1-NN", "mAP@10")
HIDDEN, BATCH, PAIRS = 512, 128, 1600

_FF = "FF, one model a size"


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out, with labels."""

    train: Float[Tensor, "n d"]
    train_labels: np.ndarray
    test: Float[Tensor, "m d"]
    test_labels: np.ndarray


def picture_split(*, quick: bool) -> tuple[str, Split]:
    """Features of CIFAR-100 (digits where it is absent); of the first 700 + 300 pictures when quick."""
    data = labelled_images("cifar100")
    if quick:
        data = data.first(700, 300)
    features = data.features("efficientnet-lite0", 128)
    train, test = data.train, data.test
    return data.name, Split(features[train], data.labels[train], features[test], data.labels[test])


def code_pairs(count: int, seed: int) -> tuple[Float[Tensor, "n q"], Float[Tensor, "n q"]]:
    """MiniLM embeddings of functions of Python's standard library and of their docstrings, `count` pairs at random."""
    pairs = code_and_docstrings(max_code=1500)
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:count]
    encoder = SentenceEncoder(*load_sentence_encoder(), max_length=48)
    options = {"output": "mean of the last states", "max_length": 48}
    code, text = (text_features([pairs[row][side] for row in chosen], encoder, options=options) for side in (0, 1))
    return code, text


# ---------------------------------------------------------------------- measures


def probe_accuracy(split: Split, z_train: Tensor, z_test: Tensor) -> float:
    """Accuracy of a linear classifier (shrunk discriminant analysis) on held-out rows."""
    options: Any = {"solver": "lsqr", "shrinkage": "auto"}
    model = LinearDiscriminantAnalysis(**options).fit(z_train.double().numpy(), split.train_labels)
    return float(np.mean(model.predict(z_test.double().numpy()) == split.test_labels))


def neighbour_scores(found: np.ndarray, split: Split) -> tuple[float, float]:
    """1-NN accuracy and mAP@k, AP = (1/k) sum of precision@i where the i-th is relevant, of neighbours (m, k)."""
    relevant = split.train_labels[found] == split.test_labels[:, None]
    precision = relevant.cumsum(1) / np.arange(1, relevant.shape[1] + 1)
    return float(relevant[:, 0].mean()), float((precision * relevant).mean())


def pair_scores(queries: Tensor, items: Tensor) -> tuple[float, float]:
    """nDCG@10 and recall@10 where item i alone answers query i."""
    similarity = queries @ items.mT
    rank = (similarity > similarity.diagonal().unsqueeze(1)).sum(1) + 1
    gain = torch.where(rank <= 10, 1 / torch.log2(rank + 1.0), 0.0)
    return float(gain.mean()), float((rank <= 10).double().mean())


# ---------------------------------------------------------------------- arms


class Pictures:
    """Models of some pictures by seed, the coordinates of every arm, and the scores of their prefixes."""

    def __init__(self, split: Split, epochs: int, sizes: tuple[int, ...]) -> None:
        self.split, self.sizes = split, sizes

        def trained(seed: int, dims: tuple[int, ...], **options: Any) -> Matryoshka:
            """A nested network trained with labels; the published recipe differs between arms in the heads alone."""
            settings: Any = {"kind": "mlp", "hidden": HIDDEN, "normalize": False} | options
            model = Matryoshka(dims, random_state=seed, epochs=epochs, batch_size=BATCH, **settings)
            return model.fit(split.train, split.train_labels)

        self.model: Callable[..., Matryoshka] = cache(trained)

    def scores(self, arm: str, seed: int) -> dict[str, float]:
        """MEASURES of every prefix of an arm, as "measure, size"."""
        if arm == _FF:
            models = {m: self.model(seed, (m,)) for m in self.sizes}
            return {name: value for m, model in models.items() for name, value in self.of_model(model, (m,)).items()}
        if arm in MODELS:
            dims, settings = MODELS[arm]()
            model = self.model(seed, dims, **settings)
            between = between_sizes(self.sizes) if arm == "MRL" else ()
            return self.of_model(model, tuple(sorted({*self.sizes, *between})))
        if arm.startswith("LDA"):
            options: Any = {"solver": "eigen", "shrinkage": 0.1}
            fitted = LinearDiscriminantAnalysis(**options).fit(
                self.split.train.double().numpy(), self.split.train_labels
            )
            rows = (self.split.train, self.split.test)
            train, test = (torch.from_numpy(fitted.transform(x.double().numpy())) for x in rows)
            return self.of(train, test, self.sizes)
        plain = self.model(seed, (DIMS[-1],))
        z_train, z_test = plain.transform(self.split.train), plain.transform(self.split.test)
        if arm == "plain, first m":
            return self.of(z_train, z_test, self.sizes, self.head_accuracies(plain))
        if arm == "plain, PCA":
            flag = Matryoshka((DIMS[-1],), center=True, normalize=False).fit(z_train)
            return self.of(flag.transform(z_train), flag.transform(z_test), self.sizes)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(DIMS[-1], generator=generator)
        if arm == "plain, random m":
            return self.of(z_train[:, order], z_test[:, order], self.sizes)
        turn = random_basis(DIMS[-1], DIMS[-1], generator=generator).float()
        return self.of(z_train @ turn, z_test @ turn, self.sizes)

    def of_model(self, model: Matryoshka, sizes: tuple[int, ...]) -> dict[str, float]:
        """Scores of the prefixes of a model's coordinates, by its own heads where it has them."""
        z_train, z_test = model.transform(self.split.train), model.transform(self.split.test)
        return self.of(z_train, z_test, sizes, self.head_accuracies(model))

    def of(
        self, z_train: Tensor, z_test: Tensor, sizes: tuple[int, ...], own: dict[int, float] | None = None
    ) -> dict[str, float]:
        """Scores of prefixes, neighbours by cosine; own: accuracies of trained heads by size, in a probe's place."""
        found: dict[str, float] = {}
        for m in sizes:
            if m <= z_train.shape[1]:
                first, second = (prefix(z, m, normalize=False) for z in (z_train, z_test))
                neighbours = nearest(second, first, 10, metric="cosine")[1].numpy()
                probe = probe_accuracy(self.split, first, second)
                values = ((own or {}).get(m, probe), probe, *neighbour_scores(neighbours, self.split))
                found |= {f"{name}, {m}": value for name, value in zip(MEASURES, values)}
        return found

    def head_accuracies(self, model: Matryoshka) -> dict[int, float]:
        """Held-out accuracy of each trained head by its size; none for a model without heads."""
        if not hasattr(model, "heads_"):
            return {}
        labels = torch.as_tensor(np.searchsorted(model.classes_, self.split.test_labels))
        right = model.logits(self.split.test).argmax(-1) == labels
        return dict(zip(model.dims_, right.double().mean(1).tolist()))


# Sizes and options of the model of an arm.
MODELS: dict[str, Callable[[], tuple[tuple[int, ...], dict[str, Any]]]] = {
    "MRL": lambda: (DIMS, {}),
    "MRL-E": lambda: (DIMS, {"efficient": True}),
    "rotation of the frozen features": lambda: (DIMS, {"kind": "rotation", "center": True}),
    "linear map of the frozen features": lambda: (DIMS, {"kind": "linear", "center": True}),
    "PCA of the frozen features": lambda: (DIMS[-1:], {"kind": "pca", "center": True}),
}
PLAIN = ("plain, first m", "plain, random m", "plain, random projection", "plain, PCA")
ARMS = (*list(MODELS)[:2], _FF, *PLAIN, *list(MODELS)[2:], "LDA of the frozen features")


def between_sizes(sizes: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """Sizes that nothing was trained for whose trained neighbours are both among `sizes`, with these neighbours."""
    found = {m: next((a, b) for a, b in pairwise(DIMS) if a < m < b) for m in UNSEEN}
    return {m: around for m, around in found.items() if {*around} <= {*sizes}}


def cascade_row(model: Matryoshka, split: Split, seed: int, splits: int) -> list[list[float]]:
    """By cap: accuracy, expected and summed dimensions, over random halves of the held-out rows; last, no cascade."""
    logits = model.logits(split.test)
    labels = torch.as_tensor(np.searchsorted(model.classes_, split.test_labels))
    generator = np.random.default_rng(seed)
    totals, whole = np.zeros((len(DIMS), 3)), 0.0
    for _ in range(splits):
        order = generator.permutation(len(labels))
        fit, test = order[: len(order) // 2], order[len(order) // 2 :]
        cascade = MatryoshkaCascade(DIMS).fit(logits[:, fit], labels[fit])
        whole += float((logits[-1, test].argmax(-1) == labels[test]).double().mean())
        for row, cap in enumerate(DIMS):
            right = cascade.predict(logits[:, test], cap=cap) == labels[test]
            totals[row] += [float(right.double().mean()), cascade.expected_dim_, cascade.expected_total_dim_]
    rows = [[m, *row] for m, row in zip(DIMS, (totals / splits).tolist())]
    return [*rows, [float("inf"), whole / splits, DIMS[-1], DIMS[-1]]]


def funnel_rows(model: Matryoshka, split: Split) -> list[list[Any]]:
    """mAP@10 and multiply-adds a query of exact search by the last size and of funnels."""
    base, queries = model.transform(split.train), model.transform(split.test)
    rows = []
    last = DIMS[-1]
    schedules: dict[str, Any] = {
        "exact": [(last, 10)],
        **{
            f"funnel from {start}": [(m, max(10, 200 >> step)) for step, m in enumerate(DIMS[DIMS.index(start) :])]
            for start in (16, 8)
        },
        **{f"{start} → {last}": [(start, 200), (last, 10)] for start in (16, 8)},
    }
    for name, schedule in schedules.items():
        index = MatryoshkaIndex(schedule=schedule).fit(base)
        first, precision = neighbour_scores(index.kneighbors(queries, 10)[1].numpy(), split)
        rows.append([name, first, precision, index.cost_per_query_])
    return rows


def text_trials(seeds: range, count: int, epochs: int) -> Trials[str]:
    """nDCG@10 and recall@10 by size of docstrings looking for their functions, three quarters of the pairs to fit."""
    code, text = code_pairs(count, 0)

    def measure(arm: str, seed: int) -> dict[str, float]:
        order = torch.randperm(len(code), generator=torch.Generator().manual_seed(seed))
        fit, test = order[: 3 * len(order) // 4], order[3 * len(order) // 4 :]
        model = None
        if arm == "PCA":
            model = Matryoshka(TEXT_DIMS).fit(torch.cat([code[fit], text[fit]]))
        elif arm.startswith("adapter"):
            options: Any = {"kind": arm.removeprefix("adapter, "), "hidden": HIDDEN, "epochs": epochs}
            model = Matryoshka(TEXT_DIMS, batch_size=BATCH, random_state=seed, **options).fit(text[fit], code[fit])
        found = {}
        for m in TEXT_DIMS:
            q, items = (prefix(x[test], m) if model is None else model.shorten(x[test], m) for x in (text, code))
            found[f"nDCG@10, {m}"], found[f"recall@10, {m}"] = pair_scores(q, items)
        return found

    adapters = [f"adapter, {kind}" for kind in ("rotation", "linear", "mlp")]
    return Trials(["first m of MiniLM", "PCA", *adapters], seeds, measure)


def text_checks(trials: Trials[str], m: int) -> list[Check]:
    """The adapter of the best nDCG at m dimensions against principal components and the first m."""
    best = max((arm for arm in trials.arms if arm.startswith("adapter")), key=lambda a: trials.mean(a, f"nDCG@10, {m}"))
    return [
        Check.above(
            f"text at {m} dimensions, {metric}",
            f"best adapter - better of PCA and first {m}",
            min(trials.gap(best, rival, f"{metric}, {m}") for rival in ("PCA", "first m of MiniLM")),
            0,
        )
        for metric in ("nDCG@10", "recall@10")
    ]


def picture_tables(trials: Trials[str], source: str, sizes: tuple[int, ...], seeds: int) -> list[Table]:
    """By measure: every arm at every size."""
    shown = [arm for arm in ARMS if any(trials.runs[arm])]
    return [
        trials.table(
            f"{name}, {source}, {seeds} seeds", "arm", {str(m): f"{name}, {m}" for m in sizes}, digits=4, arms=shown
        )
        for name in MEASURES
    ]


def search_tables(
    between: list[list[float]], cascade: Float[np.ndarray, "r 4"], funnel: list[list[Any]]
) -> list[Table]:
    """What a nested embedding is good for beside its trained sizes."""
    caps = [[int(cap) if np.isfinite(cap) else "none: the largest head", *values] for cap, *values in cascade.tolist()]
    return [
        Table.rounded(
            "MRL at sizes it was not trained for",
            ["size", "top-1 of a fitted probe", "line through its neighbours"],
            between,
        ),
        Table.rounded(
            "cascade by cap (thresholds from half of the held-out rows)",
            ["cap", "accuracy", "expected dimension", "with all prefixes summed"],
            caps,
        ),
        Table(
            "funnel search",
            ["schedule", "1-NN", "mAP@10", "multiply-adds a query"],
            [[name, round(a, 4), round(b, 4), round(cost)] for name, a, b, cost in funnel],
        ),
    ]


def funnel_checks(funnel: list[list[Any]]) -> list[Check]:
    """One check, or none where the rows are so few that no schedule is ten times cheaper than exact search."""
    exact = funnel[0]
    losses = [exact[2] - row[2] for row in funnel[1:] if exact[3] / row[3] >= 10]
    metric = "mAP@10 lost at a tenth of the multiply-adds or fewer"
    return [Check.at_most("funnel", metric, min(losses), 0.005)] if losses else []


def between_rows(trials: Trials[str], sizes: tuple[int, ...]) -> list[list[float]]:
    """Of sizes that nothing was trained for, top-1 of a fitted probe, and the line through the neighbours'."""
    rows = []
    for m, (low, high) in between_sizes(sizes).items():
        probe, first, last = (trials.mean("MRL", f"{MEASURES[1]}, {size}") for size in (m, low, high))
        rows.append([m, probe, first + (last - first) * (m - low) / (high - low)])
    return rows


def least_gain(trials: Trials[str], other: str, sizes: Iterable[int]) -> tuple[str, float]:
    """The smallest gain of MRL on another arm over sizes, and what is measured in words."""
    sizes = list(sizes)
    found = min(trials.gap("MRL", other, f"linear top-1, {m}") for m in sizes)
    return f"smallest difference of linear top-1 at m <= {max(sizes)}, MRL - {other}", found


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Nested heads, one model a size, cutting, principal components and retrofits; cascade, funnel and text pairs."""
    progress("features", 0.0)
    source, split = picture_split(quick=quick)
    seeds = range(seed, seed + (1 if quick else 3))
    sizes = tuple(m for m in DIMS if m in QUICK_DIMS) if quick else DIMS
    arms = Pictures(split, 7 if quick else 15, sizes)
    trials = Trials(ARMS, seeds, arms.scores, progress=progress, span=(0.05, 0.75))
    progress("cascade and funnel", 0.75)
    nested = [arms.model(one, DIMS) for one in seeds]
    cascade = np.mean([cascade_row(m, split, one, 5 if quick else 30) for m, one in zip(nested, seeds)], axis=0)
    funnels = [funnel_rows(model, split) for model in nested]
    funnel = [[rows[0][0], *np.mean([row[1:] for row in rows], axis=0).tolist()] for rows in zip(*funnels)]
    between = between_rows(trials, sizes)
    # Of the caps whose accuracy is within half a point of the whole embedding's.
    narrow, last = min(float(row[2]) for row in cascade if row[1] >= cascade[-1][1] - 0.005), DIMS[-1]
    shorter, above = (
        f"expected dimensions at the accuracy of {last} less 0.005",
        min(row[1] - row[2] for row in between),
    )
    few, many = ([m for m in sizes if m <= most] for most in (8, 16))
    line = "smallest top-1 of a fitted probe above the line"
    checks = [
        Check.at_least("beyond cutting a plain model", *least_gain(trials, "plain, first m", few), 0.2),
        Check.above("beyond principal components", *least_gain(trials, "plain, PCA", many), 0),
        Check.at_least("sizes between the trained ones", line, above, -0.01, quick=True),
        Check.at_most("cascade", shorter, narrow, last / 4),
        *funnel_checks(funnel),
    ]
    tables = [*picture_tables(trials, source, sizes, len(seeds)), *search_tables(between, cascade, funnel)]
    notes = [
        "The paper trains ResNet-50 end to end; here the backbone is frozen and a network with one hidden layer of "
        f"{HIDDEN} units is its trainable last block. Linear top-1 is by the head that was trained with "
        "a prefix; where there is none (a cut model, directions without training) a shrunk discriminant analysis is "
        "fitted, which all arms have in a table of their own.",
        f"Smallest size within a point of {last} dimensions: "
        + ", ".join(
            f"{arm} {smallest_sufficient(sizes, [trials.mean(arm, f'linear top-1, {m}') for m in sizes])}"
            for arm in ("MRL", PLAIN[0], PLAIN[-1])
        )
        + ".",
        "Slimmable networks, a baseline of the paper, were not run.",
    ]
    if is_installed("minilm"):
        progress("text", 0.82)
        text = text_trials(seeds, 200 if quick else PAIRS, 10 if quick else 20)
        checks += text_checks(text, 24)
        for metric in ("nDCG@10", "recall@10"):
            columns = {str(m): f"{metric}, {m}" for m in TEXT_DIMS}
            tables.append(text.table(f"docstring → function, MiniLM: {metric} by size", "arm", columns, digits=4))
    else:
        notes.append("The sentence encoder is not installed; the text part was left out.")
    fact = "linear top-1, 8"
    return Outcome(
        claim="one embedding whose prefixes are as good as models trained for their size (ResNet-50 on ImageNet-1K: "
        "66.6 % at 8 dimensions, a model of 8 dimensions 65.3 %), where cutting or SVD of a plain model fails",
        data=f"{source}: {len(split.train)} pictures to train, {len(split.test)} held out; docstrings and functions "
        "of Python's standard library",
        model="EfficientNet-Lite0 and MiniLM, frozen; a network with one hidden layer trained on top",
        metric="linear top-1 of the first 8 coordinates",
        ours=trials.mean("MRL", fact),
        baselines={f"{arm} (m = 8)": value for arm, value in trials.means(fact, but="MRL").items()},
        main=Check.at_least("as good as one model a size", *least_gain(trials, _FF, sizes), -0.01),
        checks=checks,
        tables=tables,
        notes=notes,
    )
