"""Matryoshka on frozen features: nested heads against one model a size and against cutting, with cascade and funnel.

Pictures: pooled EfficientNet-Lite0 features under a trainable network with one hidden layer, the "last block". Text:
MiniLM embeddings of functions and of their docstrings under an adapter trained on such pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from subspan.datasets import cached_features, code_and_docstrings, is_installed, load_sentence_encoder
from subspan.geometry import prefix, smallest_sufficient
from subspan.geometry.grassmann import random_basis
from subspan.models import SentenceEncoder
from subspan.represent import Matryoshka, MatryoshkaCascade, MatryoshkaIndex
from subspan.solvers import nearest

from .materials.image_features import labelled_images
from .protocol import Check, Outcome, Progress, Table

DIMS = (4, 8, 16, 32, 64, 128, 256)
UNSEEN = (6, 12, 24, 48, 96, 192)
TEXT_DIMS = (12, 24, 48, 96, 192, 384)

_PAIRS = 1600
_TOKENS = 48
_HIDDEN = 512
_BATCH = 128
_QUICK = (8, 16, 64, 256)

Scores = tuple[float, float, float, float]
"""Linear top-1 (by the head trained with the prefix, where there is one), top-1 of a fitted probe, 1-NN and mAP@10."""


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
    encoder = SentenceEncoder(*load_sentence_encoder(), max_length=_TOKENS)
    sides = []
    for side in (1, 0):
        texts = [pairs[row][side] for row in chosen]
        found = cached_features(
            lambda start, texts=texts: encoder.iterate(texts[start:], 32),
            model=encoder.model,
            data=texts,
            options={"output": "mean of the last states", "max_length": _TOKENS},
            shard_rows=512,
        )
        sides.append(torch.from_numpy(np.array(found)))
    return sides[1], sides[0]


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


def measures(split: Split, z_train: Tensor, z_test: Tensor, own: float | None = None) -> Scores:
    """The scores of a prefix (neighbours by cosine); own: the accuracy of its trained head, where it has one."""
    found = nearest(z_test, z_train, 10, metric="cosine")[1].numpy()
    probe = probe_accuracy(split, z_train, z_test)
    return probe if own is None else own, probe, *neighbour_scores(found, split)


def pair_scores(queries: Tensor, items: Tensor) -> tuple[float, float]:
    """nDCG@10 and recall@10 where item i alone answers query i."""
    similarity = queries @ items.mT
    rank = (similarity > similarity.diagonal().unsqueeze(1)).sum(1) + 1
    gain = torch.where(rank <= 10, 1 / torch.log2(rank + 1.0), 0.0)
    return float(gain.mean()), float((rank <= 10).double().mean())


# ---------------------------------------------------------------------- arms


class Pictures:
    """All arms of one seed and the scores of each at each size."""

    def __init__(self, split: Split, seed: int, epochs: int, sizes: tuple[int, ...]) -> None:
        self.split = split
        self.seed = seed
        self.epochs = epochs
        self.scores: dict[str, dict[int, Scores]] = {}
        self.sizes = sizes

    def model(self, dims: tuple[int, ...], **options: Any) -> Matryoshka:
        """A nested network trained with labels; the published recipe differs between arms in the heads alone."""
        settings: Any = {"kind": "mlp", "hidden": _HIDDEN, "normalize": False} | options
        settings |= {"epochs": self.epochs, "batch_size": _BATCH}
        return Matryoshka(dims, random_state=self.seed, **settings).fit(self.split.train, self.split.train_labels)

    def add(
        self, name: str, z_train: Tensor, z_test: Tensor, sizes: tuple[int, ...], own: dict[int, float] | None = None
    ) -> None:
        """Measure the prefixes of coordinates; own: accuracies of trained heads by size."""
        for m in sizes:
            if m <= z_train.shape[1]:
                first, second = (prefix(z, m, normalize=False) for z in (z_train, z_test))
                self.scores.setdefault(name, {})[m] = measures(self.split, first, second, (own or {}).get(m))

    def add_model(self, name: str, model: Matryoshka, sizes: tuple[int, ...]) -> None:
        """Measure the prefixes of a model's coordinates."""
        z_train, z_test = model.transform(self.split.train), model.transform(self.split.test)
        self.add(name, z_train, z_test, sizes, self.head_accuracies(model))

    def head_accuracies(self, model: Matryoshka) -> dict[int, float]:
        """Held-out accuracy of each trained head by its size; none for a model without heads."""
        if not hasattr(model, "heads_"):
            return {}
        labels = torch.as_tensor(np.searchsorted(model.classes_, self.split.test_labels))
        right = model.logits(self.split.test).argmax(-1) == labels
        return dict(zip(model.dims_, right.double().mean(1).tolist()))

    def run(self) -> tuple[Matryoshka, Matryoshka]:
        """Every arm; returns the nested models with separate heads and with a shared one."""
        split, sizes = self.split, self.sizes
        nested = self.model(DIMS)
        self.add_model("MRL", nested, tuple(sorted({*sizes, *between_sizes(sizes)})))
        shared = self.model(DIMS, efficient=True)
        self.add_model("MRL-E", shared, sizes)
        for m in sizes:
            self.add_model("FF, one model a size", self.model((m,)), (m,))
        plain = self.model((DIMS[-1],))
        z_train, z_test = plain.transform(split.train), plain.transform(split.test)
        self.add("plain, first m", z_train, z_test, sizes, self.head_accuracies(plain))
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(DIMS[-1], generator=generator)
        self.add("plain, random m", z_train[:, order], z_test[:, order], sizes)
        turn = random_basis(DIMS[-1], DIMS[-1], generator=generator).float()
        self.add("plain, random projection", z_train @ turn, z_test @ turn, sizes)
        flag = Matryoshka((DIMS[-1],), center=True, normalize=False).fit(z_train)
        self.add("plain, PCA", flag.transform(z_train), flag.transform(z_test), sizes)
        for name, kind in (("rotation", "rotation"), ("linear map", "linear")):
            self.add_model(f"{name} of the frozen features", self.model(DIMS, kind=kind, center=True), sizes)
        self.add_model("PCA of the frozen features", self.model((DIMS[-1],), kind="pca", center=True), sizes)
        options: Any = {"solver": "eigen", "shrinkage": 0.1}
        directions = LinearDiscriminantAnalysis(**options).fit(split.train.double().numpy(), split.train_labels)
        train, test = (torch.from_numpy(directions.transform(x.double().numpy())) for x in (split.train, split.test))
        self.add("LDA of the frozen features", train, test, sizes)
        return nested, shared


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


def text_table(seeds: range, count: int, epochs: int) -> list[list[Any]]:
    """[arm, size, nDCG@10, recall@10] of docstrings looking for their functions, three quarters of the pairs to fit."""
    code, text = code_pairs(count, 0)
    scores: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed in seeds:
        order = torch.randperm(len(code), generator=torch.Generator().manual_seed(seed))
        fit, test = order[: 3 * len(order) // 4], order[3 * len(order) // 4 :]
        options: dict[str, Any] = {"epochs": epochs, "batch_size": _BATCH, "random_state": seed}
        arms: dict[str, Matryoshka | None] = {"first m of MiniLM": None}
        arms["PCA"] = Matryoshka(TEXT_DIMS).fit(torch.cat([code[fit], text[fit]]))
        for kind in ("rotation", "linear", "mlp"):
            model = Matryoshka(TEXT_DIMS, kind=kind, hidden=_HIDDEN, **options)
            arms[f"adapter, {kind}"] = model.fit(text[fit], code[fit])
        for name, model in arms.items():
            for m in TEXT_DIMS:
                q, items = (
                    prefix(rows[test], m) if model is None else model.shorten(rows[test], m) for rows in (text, code)
                )
                scores.setdefault((name, m), []).append(pair_scores(q, items))
    return [[name, m, *np.mean(values, axis=0).round(4).tolist()] for (name, m), values in scores.items()]


# ---------------------------------------------------------------------- the protocol


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Nested heads, one model a size, cutting, principal components and retrofits; cascade, funnel and text pairs."""
    progress("features", 0.0)
    source, split = picture_split(quick=quick)
    seeds = range(seed, seed + (1 if quick else 3))
    epochs = 7 if quick else 15
    sizes = tuple(m for m in DIMS if m in _QUICK) if quick else DIMS
    runs: list[dict[str, dict[int, Scores]]] = []
    cascades, funnels = [], []
    for number, one in enumerate(seeds):
        progress(f"pictures, seed {one}", 0.05 + 0.75 * number / len(seeds))
        arms = Pictures(split, one, epochs, sizes)
        nested, _ = arms.run()
        runs.append(arms.scores)
        cascades.append(cascade_row(nested, split, one, 5 if quick else 30))
        funnels.append(funnel_rows(nested, split))
    score = {name: {m: np.mean([run[name][m] for run in runs], axis=0) for m in runs[0][name]} for name in runs[0]}
    top, probe = ({name: {m: float(row[m][i]) for m in row} for name, row in score.items()} for i in (0, 1))
    mrl, ff, first, pca = (top[name] for name in ("MRL", "FF, one model a size", "plain, first m", "plain, PCA"))
    cascade = np.mean(cascades, axis=0)
    funnel = [[rows[0][0], *np.mean([row[1:] for row in rows], axis=0).tolist()] for rows in zip(*funnels)]
    checks = [
        Check(
            "as good as one model a size",
            "smallest difference of linear top-1 over sizes, MRL - FF",
            min(mrl[m] - ff[m] for m in sizes),
            ">= -0.01",
            all(mrl[m] - ff[m] >= -0.01 for m in sizes),
        ),
        Check(
            "beyond cutting a plain model",
            "smallest difference of linear top-1 at m <= 8, MRL - plain first m",
            min(mrl[m] - first[m] for m in sizes if m <= 8),
            ">= 0.2",
            all(mrl[m] - first[m] >= 0.2 for m in sizes if m <= 8),
        ),
        Check(
            "beyond principal components",
            "smallest difference of linear top-1 at m <= 16, MRL - plain PCA",
            min(mrl[m] - pca[m] for m in sizes if m <= 16),
            "> 0",
            all(mrl[m] > pca[m] for m in sizes if m <= 16),
        ),
        _between(probe["MRL"], sizes),
        _cascade_check(cascade),
        *_funnel_checks(funnel),
    ]
    tables = [
        Table(
            f"{measure}, {source}, {len(seeds)} seeds",
            ["arm", *(str(m) for m in sizes)],
            [
                [name, *(round(float(row[m][place]), 4) if m in row else None for m in sizes)]
                for name, row in score.items()
            ],
        )
        for place, measure in enumerate(("linear top-1", "top-1 of a fitted probe", "1-NN", "mAP@10"))
    ]
    tables += [
        Table(
            "MRL at sizes it was not trained for",
            ["size", "top-1 of a fitted probe", "line through its neighbours"],
            [
                [m, round(probe["MRL"][m], 4), round(_line(probe["MRL"], m, *around), 4)]
                for m, around in between_sizes(sizes).items()
            ],
        ),
        Table(
            "cascade by cap (thresholds from half of the held-out rows)",
            ["cap", "accuracy", "expected dimension", "with all prefixes summed"],
            [
                [
                    int(row[0]) if np.isfinite(row[0]) else "none: the largest head",
                    *(round(float(v), 4) for v in row[1:]),
                ]
                for row in cascade
            ],
        ),
        Table(
            "funnel search",
            ["schedule", "1-NN", "mAP@10", "multiply-adds a query"],
            [[name, round(a, 4), round(b, 4), round(cost)] for name, a, b, cost in funnel],
        ),
    ]
    notes = [
        "The paper trains ResNet-50 end to end; here the backbone is frozen and a network with one hidden layer of "
        f"{_HIDDEN} units is its trainable last block. Linear top-1 is by the head that was trained with "
        "a prefix; where there is none (a cut model, directions without training) a shrunk discriminant analysis is "
        "fitted, which all arms have in a table of their own.",
        f"Smallest size within a point of {DIMS[-1]} dimensions: "
        + ", ".join(
            f"{name} {smallest_sufficient(sizes, [top[name][m] for m in sizes])}"
            for name in ("MRL", "plain, first m", "plain, PCA")
        )
        + ".",
        "Slimmable networks, a baseline of the paper, were not run.",
    ]
    if is_installed("minilm"):
        progress("text", 0.82)
        rows = text_table(seeds, 200 if quick else _PAIRS, 10 if quick else 20)
        tables.append(Table("docstring → function, MiniLM", ["arm", "size", "nDCG@10", "recall@10"], rows))
        checks.append(_text_check(rows))
    else:
        notes.append("The sentence encoder is not installed; the text part was left out.")
    baselines = {f"{name} (m = 8)": row[8] for name, row in top.items() if name != "MRL" and 8 in row}
    return Outcome(
        claim="one embedding whose prefixes are as good as models trained for their size (ResNet-50 on ImageNet-1K: "
        "66.6 % at 8 dimensions, a model of 8 dimensions 65.3 %), where cutting or SVD of a plain model fails",
        data=f"{source}: {len(split.train)} pictures to train, {len(split.test)} held out; docstrings and functions "
        "of Python's standard library",
        model="EfficientNet-Lite0 and MiniLM, frozen; a network with one hidden layer trained on top",
        metric="linear top-1 of the first 8 coordinates",
        ours=mrl[8],
        baselines=baselines,
        bar="MRL >= FF - 0.01 at every size",
        holds=checks[0].holds,
        checks=checks,
        tables=tables,
        notes=notes,
    )


def _line(scores: dict[int, float], m: int, low: int, high: int) -> float:
    """What linear interpolation between the trained sizes low and high says of m."""
    return scores[low] + (scores[high] - scores[low]) * (m - low) / (high - low)


def _between(mrl: dict[int, float], sizes: tuple[int, ...]) -> Check:
    worst = min(mrl[m] - _line(mrl, m, *around) for m, around in between_sizes(sizes).items())
    return Check(
        "sizes between the trained ones",
        "smallest top-1 of a fitted probe above the line",
        worst,
        ">= -0.01",
        worst >= -0.01,
    )


def _cascade_check(cascade: np.ndarray) -> Check:
    """The cap with the fewest expected dimensions whose accuracy is within half a point of the whole embedding's."""
    enough = [row for row in cascade if row[1] >= cascade[-1][1] - 0.005]
    fewest = min(float(row[2]) for row in enough)
    return Check(
        "cascade",
        f"expected dimensions at the accuracy of {DIMS[-1]} less 0.005",
        fewest,
        f"<= {DIMS[-1] // 4}",
        fewest <= DIMS[-1] / 4,
    )


def _funnel_checks(funnel: list[list[Any]]) -> list[Check]:
    """One check, or none where the rows are so few that no schedule is ten times cheaper than exact search."""
    exact = funnel[0]
    losses = [exact[2] - row[2] for row in funnel[1:] if exact[3] / row[3] >= 10]
    name, metric = "funnel", "mAP@10 lost at a tenth of the multiply-adds or fewer"
    return [Check(name, metric, min(losses), "<= 0.005", min(losses) <= 0.005)] if losses else []


def _text_check(rows: list[list[Any]]) -> Check:
    at = {row[0]: row[2:] for row in rows if row[1] == 24}
    best = max((values for name, values in at.items() if name.startswith("adapter")), key=lambda values: values[0])
    rivals = [at["PCA"], at["first m of MiniLM"]]
    gap = min(best[0] - rival[0] for rival in rivals)
    holds = all(best[0] > rival[0] and best[1] > rival[1] for rival in rivals)
    return Check("text at 24 dimensions", "nDCG@10, best adapter - better of PCA and first 24", gap, "> 0", holds)
