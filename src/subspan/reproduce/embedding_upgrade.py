"""Changing the encoder under a search index: real pairs of encoders, what a fitted map saves, and when it does not.

An upgrade is two encoders' embeddings of the same items. A part of the items fits the maps; queries are other items,
and the index holds the old embeddings of all. Every number is a recall of queries that fitted nothing.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from subspan.align import UpgradeMap, backfill_order
from subspan.align.upgrade.held_out import CLOSED_FORMS, Retrieval, closed_forms
from subspan.base import normalize_rows
from subspan.datasets import code_and_docstrings, is_available, load, load_language_model, load_sentence_encoder
from subspan.measures import backfill_curve, recall_at_k, retrieval_scores
from subspan.models import SentenceEncoder
from subspan.solvers import nearest
from subspan.statistics import Moments

from .materials import image_encoder, labelled_images, pooled_features, text_features
from .protocol import Check, Outcome, Progress, Table

_SIZE = 128
_WIDTH = 256
_SENTENCES = 1500
_FUNCTIONS = 1000
_TOKENS = 48
_SHARE = 0.7
_LABELLED_QUERIES = 600
_UNPAIRED_ROWS = 1500


@dataclass(frozen=True)
class Upgrade:
    """Embeddings of the same items by a new and an old encoder; `target` says what a query is to find."""

    name: str
    new: Float[Tensor, "n d_x"]
    old: Float[Tensor, "n d_y"]
    target: Literal["neighbours", "pair"] = "neighbours"
    labels: np.ndarray | None = None

    def split(self, seed: int) -> tuple[Tensor, Tensor]:
        """Rows that fit the maps, and rows that are queries."""
        order = torch.randperm(len(self.new), generator=torch.Generator().manual_seed(seed))
        cut = round(_SHARE * len(order))
        return order[:cut].sort().values, order[cut:].sort().values

    def shortened(self, fit: Tensor, width: int = _WIDTH) -> list[Float[Tensor, "n p"]]:
        """New and old rows along principal axes of the rows `fit`, centred, of unit length, as an index keeps them."""
        found = []
        for rows in (self.new, self.old):
            moments = Moments(rows.shape[1]).update(rows[fit])
            axes = torch.linalg.eigh(moments.covariance())[1].flip(1)[:, : min(width, rows.shape[1])]
            found.append(normalize_rows((rows.double() - moments.mean) @ axes).float())
        return found


def small_pictures(source: str = "cifar100") -> Upgrade:
    """EfficientNet-Lite0 and Lite2 on labelled pictures (handwritten digits where there are no others)."""
    data = labelled_images(source)
    x, y = (data.features(f"efficientnet-lite{n}", _SIZE) for n in (2, 0))
    return Upgrade(f"Lite0 → Lite2, {data.name}", x, y, labels=np.asarray(data.labels))


def photographs(new: int, old: int) -> Upgrade:
    """EfficientNet-Lite of two sizes on the ImageNet sample and Flickr8k, 2000 photographs."""
    sources = [load(name).images.subset(range(1000)) for name in ("imagenet1k_sample", "flickr8k_1000")]
    x, y = (
        torch.cat([pooled_features(images, image_encoder(_SIZE, f"efficientnet-lite{n}"), _SIZE) for images in sources])
        for n in (new, old)
    )
    return Upgrade(f"Lite{old} → Lite{new}, photographs", x, y)


def _texts(texts: list[str], encoder: SentenceEncoder | None = None) -> Float[Tensor, "n d"]:
    encoder = encoder or SentenceEncoder(*load_sentence_encoder(), max_length=_TOKENS)
    options = {"pool": encoder.pool, "max_length": encoder.max_length, "normalize": encoder.normalize}
    return text_features(texts, encoder, options=options)


def sentences_pair() -> Upgrade:
    """Sentences of the STS benchmark: mean-pooled hidden states of SmolLM2 in the space of MiniLM."""
    records = load("stsb")["train"]
    found = list(dict.fromkeys(text for record in records for text in (record["sentence1"], record["sentence2"])))
    texts = [found[i] for i in np.random.default_rng(0).permutation(len(found))[:_SENTENCES]]
    language_model, tokenizer = load_language_model()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    states = SentenceEncoder(language_model.model, tokenizer, max_length=_TOKENS, normalize=False)
    return Upgrade("MiniLM → SmolLM2 states, sentences", _texts(texts, states), _texts(texts))


def code_pair() -> Upgrade:
    """Functions of the standard library and their docstrings, both by MiniLM; a function is to find its docstring."""
    rows = code_and_docstrings(max_code=1500)
    chosen = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:_FUNCTIONS]]
    code, texts = (_texts([row[part] for row in chosen]) for part in (0, 1))
    return Upgrade("docstring ← code, standard library", code, texts, "pair")


def captions_pair() -> Upgrade:
    """Flickr8k photographs by EfficientNet-Lite0 and their first captions by MiniLM; a caption finds its photograph."""
    photos = load("flickr8k_1000")
    captions = [photos.records[i]["captions"][0] for i in range(1000)]
    pictures = pooled_features(photos.images.subset(range(1000)), image_encoder(_SIZE), _SIZE)
    return Upgrade("image ← caption, frozen encoders", _texts(captions), pictures, "pair")


def upgrades(quick: bool) -> list[Upgrade]:
    """The pairs of encoders, labelled pictures first; where the shared data sets are absent, digits alone."""
    if not is_available("cifar100"):
        return [small_pictures("digits")]
    first = small_pictures()
    if quick:
        part = slice(0, 2000)
        assert first.labels is not None
        return [Upgrade(first.name, first.new[part], first.old[part], labels=first.labels[part])]
    photos = [photographs(1, 0), photographs(2, 1), photographs(2, 0)]
    return [first, *photos, sentences_pair(), code_pair(), captions_pair()]


@dataclass(frozen=True)
class Measured:
    """What one upgrade gave: recall by map, how telling the confidence was (facts by name), areas of `backfilled`."""

    name: str
    queries: int
    fitted: int
    recall: dict[str, float]
    model: Any
    seconds: float
    facts: dict[str, float]
    filled: dict[str, float]

    def gain(self, over: str) -> float:
        """Recall of the chosen map less that of another."""
        return self.recall["auto"] - self.recall[over]


def measure(upgrade: Upgrade, *, seed: int) -> Measured:
    """Recall@10 of held-out queries in the index of all old rows: no map, each single method, and "auto"."""
    fit, test = upgrade.split(seed)
    new, old = upgrade.shortened(fit)
    started = time.perf_counter()
    model = UpgradeMap(candidates=CLOSED_FORMS, target=upgrade.target, normalize=True, random_state=seed)
    model.fit(new[fit], old[fit])
    seconds = time.perf_counter() - started
    neighbours = upgrade.target == "neighbours"
    retrieval = Retrieval(old, 10, "cosine", upgrade.target)
    truth = retrieval.neighbours(old[test], test) if neighbours else None

    def recall(mapped: Tensor) -> Tensor:
        return retrieval.recall(normalize_rows(mapped), test, truth)

    scores = {}
    for row in model.scores_:
        if row["recall"] is not None:
            single = next(iter(closed_forms(row["method"], model.moments_, [row["parameters"]])))
            scores[row["method"]] = float(recall(single.map(new[test])).mean())
    ours = recall(model.transform(new[test]))
    confidence = model.confidence(new[test]).double()
    high = (ours > ours.median()) if neighbours else ours > 0
    thirds = [float(ours[part].mean()) for part in confidence.argsort().tensor_split(3)]
    ranked: Any = spearmanr(confidence.numpy(), ours.numpy())
    both = bool(high.any()) and not bool(high.all())
    facts = {
        "rank correlation": float(ranked.statistic),
        "AUROC": float(roc_auc_score(high.numpy(), confidence.numpy())) if both else 0.5,
        **dict(zip(("recall, least confident third", "middle", "most confident"), thirds)),
    }
    scores["auto"] = float(ours.mean())
    facts["standard error"] = float(ours.std()) / len(test) ** 0.5
    filled = backfilled(upgrade, model, seed) if neighbours else {}
    return Measured(upgrade.name, len(test), len(fit), scores, model, seconds, facts, filled)


def compatibility(upgrade: Upgrade, model: UpgradeMap, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Top-1 accuracy by label of query/index combinations, and the area under the backfill curve by order."""
    assert upgrade.labels is not None
    fit, test = upgrade.split(seed)
    new, old = upgrade.shortened(fit)
    mapped, labels = model.transform(new), upgrade.labels
    test = test[:_LABELLED_QUERIES]
    gallery, queries = fit.numpy(), test.numpy()

    def top1(q: Tensor, g: Tensor) -> float:
        return retrieval_scores(q[test], g[fit], labels[queries], labels[gallery]).cmc(1)

    accuracy = {
        "old/old": top1(old, old),
        "new/old, no map": top1(new, old),
        "mapped/old": top1(mapped, old),
        "mapped/mapped": top1(mapped, mapped),
        "new/new": top1(new, new),
    }
    farthest = backfill_order(old[fit], labels[gallery], "cosine", order="farthest")
    # What is expected to be asked: a third of the queries, none of which is counted.
    expected, test = test[::3], test[torch.arange(len(test)) % 3 > 0]
    queries = test.numpy()
    orders = {
        "density of expected queries": backfill_order(old[fit], metric="cosine", queries=mapped[expected]),
        "density of the index": backfill_order(old[fit], metric="cosine", random_state=seed),
        "farthest first": farthest,
        "farthest first, k-means": backfill_order(old[fit], metric="cosine", order="farthest", random_state=seed),
        "random": np.random.default_rng(seed).permutation(len(fit)),
        "nearest first": farthest[::-1],
    }
    areas = {
        name: backfill_curve(mapped[test], old[fit], mapped[fit], order.copy(), labels[queries], labels[gallery]).area
        for name, order in orders.items()
    }
    return accuracy, areas


def backfilled(upgrade: Upgrade, model: UpgradeMap, seed: int) -> dict[str, float]:
    """Area under recall@10 of new queries in migrated vectors, more and more of them replaced by new ones, by order.

    What counts are the neighbours that the new encoder alone would find. Of the items that fitted nothing two thirds
    are the collection and the others the queries; those that fitted the map stand for expected queries.
    """
    fit, test = upgrade.split(seed)
    new, old = (rows.double() for rows in upgrade.shortened(fit))
    asked = torch.arange(len(test)) % 3 == 0
    queries, collection = test[asked], test[~asked]
    migrated = normalize_rows(model.inverse_transform(old[collection]))
    truth = nearest(new[queries], new[collection], 10, metric="cosine")[1]

    def area(order: np.ndarray) -> float:
        scores = []
        for share in np.linspace(0, 1, 11):
            mixed, done = migrated.clone(), torch.from_numpy(order[: round(share * len(order))].copy())
            mixed[done] = new[collection[done]]
            scores.append(float(recall_at_k(nearest(new[queries], mixed, 10, metric="cosine")[1], truth).mean()))
        return float(np.trapezoid(scores, dx=0.1))

    rng = np.random.default_rng(seed)
    return {
        "density of expected queries": area(backfill_order(migrated, metric="cosine", queries=new[fit])),
        "density of the collection": area(backfill_order(migrated, metric="cosine", random_state=seed)),
        "farthest first, k-means": area(backfill_order(migrated, metric="cosine", order="farthest", random_state=seed)),
        "random, mean of 5": float(np.mean([area(rng.permutation(len(collection))) for _ in range(5)])),
    }


def without_pairs(upgrade: Upgrade, seed: int) -> list[list[Any]]:
    """`fit_unpaired` on a planted rotation of the old embeddings, and on the two encoders, of few and of all rows."""
    fit, test = upgrade.split(seed)
    new, old = upgrade.shortened(fit, 64)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))).Q
    everything = fit[torch.randperm(len(fit), generator=torch.Generator().manual_seed(seed))]
    sources = {"planted rotation": old @ rotation, upgrade.name: new}
    rows = []
    sizes = sorted({min(_UNPAIRED_ROWS, len(everything)), len(everything)})
    for size, (name, source) in product(sizes, sources.items()):
        chosen, half = everything[:size], size // 2
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fit_unpaired: failed")
            # The pairs are measured by, but the verdict is to be right without them.
            model = UpgradeMap(random_state=seed).fit_unpaired(source[chosen[:half]], old[chosen[half:]])
        report = model.unpaired_
        found = nearest(model.transform(source[test]), old[test], 10, metric="cosine")[1]
        recall = float((found == torch.arange(len(test)).unsqueeze(1)).any(1).double().mean())
        numbers = (round(value, 4) for value in (report.agreement, report.chance, recall, 10 / len(test)))
        rows.append([f"{name}, {half} rows each", *numbers, "yes" if report.succeeded else "no"])
    return rows


def upgrade_tables(found: list[Measured]) -> list[Table]:
    """By upgrade: recall by map, what the confidence says of it, and backfill."""
    columns, telling, filled = [*CLOSED_FORMS, "auto"], list(found[0].facts)[:-1], [one for one in found if one.filled]
    return [
        Table(
            "recall@10 of held-out queries in the index of old embeddings (old/old is 1 by definition; code and "
            "captions: whether the paired item is among the 10)",
            ["upgrade", "pairs fitted", "queries", *columns, "standard error", "chosen", "fit, s"],
            [
                [one.name, one.fitted, one.queries,
                 *(round(one.recall[name], 4) if name in one.recall else "" for name in columns),
                 round(one.facts["standard error"], 4), one.model.method_, round(one.seconds, 1)]
                for one in found
            ],
        ),
        Table.rounded("confidence beside the recall of held-out queries", ["upgrade", *telling],
                      [[one.name, *(one.facts[fact] for fact in telling)] for one in found], 3),
        Table.rounded("backfill: area under recall@10 of new queries in migrated vectors, against the new encoder's "
                      "neighbours", ["upgrade", *filled[0].filled],
                      [[one.name, *one.filled.values()] for one in filled]),
    ]  # fmt: skip


def checks(
    found: list[Measured], accuracy: dict[str, float], areas: dict[str, float], unpaired: list[list[Any]]
) -> list[Check]:
    """What a map, its confidence, an order of backfill and an alignment without pairs are worth."""
    queries, chance = "density of expected queries", "random, mean of 5"
    return [
        Check.at_least("a map is needed and helps", "least gain of auto over no map, recall",
                       min(one.gain("none") for one in found), 0.1, quick=True),
        Check.at_least("mapped new queries serve the old index no worse than old queries",
                       "top-1 of mapped/old over old/old", accuracy["mapped/old"] / accuracy["old/old"], 1),
        Check.at_least("confidence is informative", "least AUROC of high recall by confidence",
                       min(one.facts["AUROC"] for one in found), 0.6),
        Check.above("farthest first is worth it", "area of farthest first less that of a random order",
                    areas["farthest first"] - areas["random"], 0),
        Check.above("nearest first is not", "area of a random order less that of nearest first",
                    areas["random"] - areas["nearest first"], 0),
        Check.above("embedding first what lies nearest to the expected queries is worth it",
                    "least area of that order less that of random ones, recall@10",
                    min(one.filled[queries] - one.filled[chance] for one in found if one.filled), 0),
        Check.at_least("a planted rotation is found without pairs", "recall@10 of pairs", unpaired[0][3], 0.9,
                       quick=True),
        Check.at_least("whether alignment without pairs worked is said truly",
                       "share of verdicts that agree with the recall of known pairs (bar of success: 0.5)",
                       np.mean([(row[5] == "yes") == (row[3] >= 0.5) for row in unpaired]), 1),
    ]  # fmt: skip


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Recall of mapped queries for every pair of encoders, compatibility, backfill, confidence, and no pairs at all."""
    progress("features", 0.0)
    cases = upgrades(quick)
    found: list[Measured] = []
    for done, case in enumerate(cases):
        progress(case.name, 0.2 + 0.6 * done / len(cases))
        found.append(measure(case, seed=seed))
    progress("compatibility and backfill", 0.8)
    accuracy, areas = compatibility(cases[0], found[0].model, seed)
    progress("without pairs", 0.9)
    unpaired = without_pairs(cases[0], seed)
    means = {name: float(np.mean([one.recall[name] for one in found])) for name in found[0].recall}
    behind = min(one.gain(max((n for n in one.recall if n != "auto"), key=one.recall.__getitem__)) for one in found)
    return Outcome(
        claim="a linear map fitted to pairs lets a new encoder's queries search the old encoder's index, and held-out "
        "retrieval says which map and how far to trust it",
        data="; ".join(f"{one.name} ({one.fitted} pairs, {one.queries} queries)" for one in found),
        model="EfficientNet-Lite0/1/2, MiniLM and SmolLM2, frozen; embeddings cut to 256 principal axes, unit length",
        metric="recall@10 of mapped queries, mean over upgrades",
        ours=means["auto"],
        baselines={name: value for name, value in means.items() if name != "auto"},
        main=Check.at_least("the chosen map is as good as the best", "least over upgrades of auto less the best single "
                            "method", behind, -0.01),
        checks=checks(found, accuracy, areas, unpaired),
        tables=[
            *upgrade_tables(found),
            Table.rounded(f"top-1 by label, {cases[0].name}", ["query/index", "top-1"], accuracy.items()),
            Table.rounded(f"backfill: area under top-1 by label of mapped queries in the old space, {cases[0].name}",
                          ["order", "area"], areas.items()),
            Table("without pairs", ["case", "agreement of two starts", "chance", "recall@10 of pairs", "chance of that",
                                    "says it worked"], unpaired),
        ],
        notes=[
            "The old index is taken at its word: recall counts the old encoder's own neighbours, so old/old is 1 and a "
            "better encoder that disagrees with it loses. Top-1 by label says what the map is worth beyond that.",
            "The residual network is left out here: it is trained once a fold, and the protocol compares closed forms.",
        ],
    )  # fmt: skip
