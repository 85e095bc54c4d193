"""λ-orthogonality on two real networks: EfficientNet-Lite0 embeddings as the old gallery, Lite2 as the new queries.

Maps are fitted on training pictures of CIFAR-100. Its held-out pictures measure adaptation, pictures of another kind
(Fashion-MNIST), which no map has seen, what is left of the new model elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subspan.align import LambdaOrthogonalAdapter, SpaceMap, backfill_order
from subspan.base import normalize_rows
from subspan.datasets import is_available
from subspan.geometry import Subspace
from subspan.measures import backfill_curve, common_prefix, retrieval_scores

from .materials.image_features import image_encoder, labelled_images, pooled_features
from .protocol import Check, Outcome, Progress, Table
from .trials import Trials

OLD, NEW = "efficientnet-lite0", "efficientnet-lite2"
# At one resolution both embed these small pictures equally well, and the method supposes a better new model.
PIXELS = {OLD: 64, NEW: 128}
LIMITS = (0.1, 0.2, 0.375, 0.75, 1.5)
"""λ / √n of the sweep; the third is the paper's."""
SOFT_WEIGHTS = (1.0, 0.1, 0.01)

SHARES = np.linspace(0, 1, 6)
PAIRS = ("F(old)/old", "F(old)/F(old)", "B(new)/F(old)", "B(new)/old", "B(new)/B(new)")
COLUMNS = {name: name for name in (*PAIRS, "ZS", "defect")}

_OURS = {limit: f"λ-orthogonal, {limit}" for limit in LIMITS}
_PUBLISHED = _OURS[0.375]


class Setting(NamedTuple):
    """Dimensions kept of each model, old width of the unequal pair, rows, queries, epochs, seeds."""

    d: int = 128
    narrow: int = 64
    train: int = 4000
    test: int = 2000
    queries: int = 600
    elsewhere: int = 1000
    epochs: int = 30
    seeds: int = 3


QUICK = Setting(d=64, narrow=32, train=900, test=450, queries=450, elsewhere=400, epochs=16, seeds=1)


class Data(NamedTuple):
    """Unit rows of both models: training pairs, test pairs, and new embeddings of other pictures."""

    name: str
    other: str
    train_old: Float[Tensor, "n d"]
    train_new: Float[Tensor, "n d"]
    train_labels: np.ndarray
    old: Float[Tensor, "m d"]
    new: Float[Tensor, "m d"]
    labels: np.ndarray
    elsewhere: Float[Tensor, "p d"]
    elsewhere_labels: np.ndarray


class SoftOrthogonalAdapter(LambdaOrthogonalAdapter):
    """The same adapter with soft orthogonality, |W W' - I|² times `penalty`, instead of the gated penalty."""

    def _regularizer(self, weight: Float[Tensor, "d d"]) -> Float[Tensor, ""]:
        return (weight @ weight.mT - torch.eye(len(weight))).square().sum()


def load(setting: Setting, seed: int, *, quick: bool = False) -> Data:
    """Features of both networks, each in its own leading principal directions, at unit length."""
    images = labelled_images("cifar100")
    if quick:
        images = images.first(setting.train, setting.test)
    generator = np.random.default_rng(seed)
    train, test = generator.permutation(images.train), generator.permutation(images.test)[: setting.test]
    labels = images.labels
    distant = is_available("fashion_mnist") and images.name != "digits"
    if distant:
        others = labelled_images("fashion_mnist")
        rows = np.random.default_rng(0).permutation(others.test)[: setting.elsewhere]
        name, other_labels = others.name, others.labels[rows]
        other = pooled_features(others.images[rows], image_encoder(PIXELS[NEW], NEW), PIXELS[NEW])
    else:
        # Without a second set of pictures, half of the classes is withheld and stands for it.
        half = len(images.classes) // 2
        rows = test[labels[test] >= half]
        train, test = train[labels[train] < half], test[labels[test] < half]
        name, other_labels, other = f"the other classes of {images.name}", labels[rows], None
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    elsewhere = torch.empty(0)
    for model in (OLD, NEW):
        features = images.features(model, PIXELS[model])
        basis = Subspace.fit(features[train], rank=min(setting.d, len(train) - 1))
        fit, held_out = (normalize_rows(basis.coordinates(features[part]).float()) for part in (train, test))
        parts[model] = fit, held_out
        if model == NEW:
            elsewhere = normalize_rows(basis.coordinates(features[rows] if other is None else other).float())
    return Data(
        images.name,
        name,
        parts[OLD][0],
        parts[NEW][0],
        labels[train],
        parts[OLD][1],
        parts[NEW][1],
        labels[test],
        elsewhere,
        other_labels,
    )


def draw(data: Data, count: int, seed: int) -> Data:
    """The data with `count` training pairs drawn by seed."""
    chosen = np.random.default_rng(seed).permutation(len(data.train_labels))[:count]
    return data._replace(
        train_old=data.train_old[chosen], train_new=data.train_new[chosen], train_labels=data.train_labels[chosen]
    )


class Maps(NamedTuple):
    """What brings new embeddings to the old space, what lifts old ones, and the backward map's orthogonality defect."""

    new: Callable[[Tensor], Tensor]
    old: Callable[[Tensor], Tensor]
    defect: float
    lam: float | None = None


def _same(rows: Tensor) -> Tensor:
    return rows


def top_one(queries: Tensor, gallery: Tensor, labels: np.ndarray, count: int) -> float:
    """CMC top-1 of the first `count` rows among all others, cut to the narrower width."""
    q, g = common_prefix(queries[:count], gallery)
    return retrieval_scores(q, g, labels[:count], labels, exclude_self=True).cmc()


def five_ways(data: Data, maps: Maps, queries: int) -> dict[str, float]:
    """Top-1 of the five pairs of query and gallery, and what the map costs on other pictures."""
    rows = {"old": data.old, "F(old)": maps.old(data.old), "B(new)": maps.new(data.new)}
    sides = {pair: pair.split("/") for pair in PAIRS}
    found = {pair: top_one(rows[a], rows[b], data.labels, queries) for pair, (a, b) in sides.items()}
    elsewhere = maps.new(data.elsewhere)
    count = min(queries, len(elsewhere))
    kept, before = (top_one(rows, rows, data.elsewhere_labels, count) for rows in (elsewhere, data.elsewhere))
    over = {"defect / λ": maps.defect / maps.lam} if maps.lam else {}
    return {**found, "ZS": kept - before, "defect": maps.defect, **over}


def arms(epochs: int) -> dict[str, Callable[[Data, int], Maps]]:
    """Every method: how its maps come from the training pairs and a seed."""

    def space(method: Any) -> Callable[[Data, int], Maps]:
        def fit(data: Data, seed: int) -> Maps:
            model = SpaceMap(method).fit(data.train_new, data.train_old)
            return Maps(model.transform, _same, model.map_.orthogonality_defect)

        return fit

    def adapter(kind: type[LambdaOrthogonalAdapter] = LambdaOrthogonalAdapter, **more: Any) -> Any:
        def fit(data: Data, seed: int) -> Maps:
            options: dict[str, Any] = {"epochs": epochs, "batch_size": 256, "random_state": seed}
            model = kind(**(options | more))
            with warnings.catch_warnings():
                # A defect above λ is reported as a number here.
                warnings.filterwarnings("ignore", message="the orthogonality defect")
                model.fit(data.train_new, data.train_old, data.train_labels)
            return Maps(model.transform, model.transform_old, model.orthogonality_defect_, model.lam_)

        return fit

    fct = {"backward": "none", "forward": "mlp", "weights": (1.0, 0.0, 0.0)}
    return {
        "no map": lambda data, seed: Maps(_same, _same, 0.0),
        "Procrustes": space("procrustes"),
        "ridge": space("ridge"),
        "FCT (MLP)": adapter(**fct, learning_rate=5e-4, weight_decay=2**-15),
        "strict": adapter(backward="strict"),
        **{name: adapter(lam_rel=limit) for limit, name in _OURS.items()},
        "affine": adapter(backward="affine"),
        **{f"soft, weight {w:g}": adapter(SoftOrthogonalAdapter, penalty=w) for w in SOFT_WEIGHTS},
    }


def backfilled(data: Data, maps: Maps, queries: int, seed: int) -> dict[str, float]:
    """Top-1 of B(new) queries by the share of F(old) rows replaced, in three orders, and the area under each curve."""
    lifted, mapped = (normalize_rows(rows) for rows in (maps.old(data.old), maps.new(data.new)))
    far = backfill_order(lifted, data.labels, "cosine", order="farthest")
    orders = {
        "farthest first": far,
        "random": np.random.default_rng(seed).permutation(len(far)),
        "nearest first": far[::-1].copy(),
    }
    found = {}
    for name, order in orders.items():
        labels = data.labels[:queries], data.labels
        curve = backfill_curve(mapped[:queries], lifted, mapped, order, *labels, shares=SHARES, exclude_self=True)
        found[f"{name}, area"] = curve.area
        found |= {f"{name}, {share:.0%}": float(score) for share, score in zip(SHARES, curve.scores)}
    return found


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """No map, Procrustes, ridge, FCT, strict, λ sweep, affine, soft orthogonality; unequal widths; backfilling."""
    setting = QUICK if quick else Setting()
    progress("features", 0.0)
    data = load(setting, seed, quick=quick)
    count, seeds = min(setting.train, len(data.train_labels)), range(seed, seed + setting.seeds)
    methods = arms(setting.epochs)
    drawn = cache(lambda seed: draw(data, count, seed))

    def measure(arm: str, seed: int) -> dict[str, float]:
        maps = methods[arm](drawn(seed), seed)
        curves = backfilled(data, maps, setting.queries, seed) if arm == _PUBLISHED else {}
        return five_ways(data, maps, setting.queries) | curves

    def measure_narrow(arm: str, seed: int) -> dict[str, float]:
        part = drawn(seed)
        thin = part._replace(train_old=part.train_old[:, : setting.narrow], old=part.old[:, : setting.narrow])
        return five_ways(thin, methods[arm](thin, seed), setting.queries)

    trials = Trials(methods, seeds, measure, progress=progress, span=(0.0, 0.9))
    narrow = Trials(("no map", "strict", _PUBLISHED), seeds, measure_narrow, progress=progress, span=(0.9, 1.0))
    alone = {"old/old": data.old, "new/new": data.new, "narrow old/old": data.old[:, : setting.narrow]}
    own = {name: top_one(rows, rows, data.labels, setting.queries) for name, rows in alone.items()}
    tables = [
        trials.table(
            f"top-1 on {data.name}, ZS on {data.other} (old/old {own['old/old']:.4f}, new/new {own['new/new']:.4f}), "
            f"mean of {setting.seeds} seeds",
            "map",
            COLUMNS,
            digits=4,
        ),
        trials.table(
            "how far from orthogonal: mean defect over λ",
            "map",
            {
                "λ": {name: round(limit * setting.d**0.5, 3) for limit, name in _OURS.items()},
                "defect / λ": "defect / λ",
            },
            arms=_OURS.values(),
            digits=4,
        ),
        narrow.table(
            f"old embeddings of {setting.narrow} numbers (old/old {own['narrow old/old']:.4f})",
            "map",
            COLUMNS,
            digits=4,
        ),
        _curves(trials),
    ]
    return Outcome(
        claim="with a backward map held to a rotation new queries search an old gallery better than old ones; with λ "
        "it adapts to the pairs and keeps what the new model knows elsewhere; the farthest items are re-embedded first",
        data=f"{data.name}: {count} training pairs a seed, {len(data.labels)} held-out pictures as gallery, "
        f"{min(setting.queries, len(data.labels))} of them as queries; elsewhere: {data.other}, "
        f"{len(data.elsewhere_labels)} pictures",
        model=f"EfficientNet-Lite0 at 64 px (old) and Lite2 at 128 px (new), frozen; {setting.d} principal directions "
        f"each, {setting.epochs} epochs",
        metric="CMC top-1, new queries in the old gallery",
        ours=trials.mean("strict", "B(new)/old"),
        baselines={"old/old": own["old/old"]}
        | {name: trials.mean(name, "B(new)/old") for name in ("no map", "Procrustes", "ridge")},
        main=Check.above(
            "new queries in the old gallery, strict",
            "B(new)/old - old/old, top-1, worst seed",
            trials.statistic("strict", "B(new)/old", min) - own["old/old"],
            0,
        ),
        checks=_checks(trials, own, LIMITS[2] * setting.d**0.5),
        tables=tables,
        notes=[
            "The paper's encoders are a ResNet-18 and a ViT-L. Of these two the old one gets its pictures at half the "
            "resolution: at one resolution they embed them equally well, and the method supposes a better new model.",
            "Each network was pretrained on ImageNet; a second set of labelled pictures stands for the original data.",
        ],
    )


def _curves(trials: Trials[str]) -> Table:
    columns = ["area", *(f"{share:.0%}" for share in SHARES)]
    return Table.rounded(
        "backfilling: top-1 of B(new) by the share of F(old) that is embedded anew",
        ["order", *columns],
        [
            [order, *(trials.mean(_PUBLISHED, f"{order}, {column}") for column in columns)]
            for order in ("farthest first", "random", "nearest first")
        ],
    )


def _checks(trials: Trials[str], own: dict[str, float], target: float) -> list[Check]:
    """The paper's effects; target: the λ that a soft penalty should hit."""
    along = ["strict", *_OURS.values()]
    adapts, keeps = ([trials.mean(arm, fact) for arm in along] for fact in ("B(new)/B(new)", "ZS"))
    better = [
        min(trials.gap(arm, "strict", "B(new)/B(new)"), trials.gap(arm, "affine", "ZS")) for arm in _OURS.values()
    ]
    soft = [abs(trials.mean(f"soft, weight {w:g}", "defect") / target - 1) for w in SOFT_WEIGHTS]
    farthest, chance, nearest = (
        trials.mean(_PUBLISHED, f"{order}, area") for order in ("farthest first", "random", "nearest first")
    )
    return [
        Check.above(
            "old embeddings gain, strict",
            "F(old)/F(old) - old/old, top-1, worst seed",
            trials.statistic("strict", "F(old)/F(old)", min) - own["old/old"],
            0,
        ),
        Check.at_most(
            "a rotation changes nothing of the new model",
            "|B(new)/B(new) - new/new|, strict",
            abs(trials.mean("strict", "B(new)/B(new)") - own["new/new"]),
            1e-3,
            quick=True,
        ),
        Check.at_most(
            "more freedom never adapts less",
            "largest fall of B(new)/B(new) along strict, λ ascending",
            max(0.0, *(a - b for a, b in pairwise(adapts))),
            0.005,
        ),
        Check.above(
            "more freedom adapts more", "B(new)/B(new) of the largest λ - that of strict", adapts[-1] - adapts[0], 0
        ),
        Check.below("more freedom forgets more", "ZS of the largest λ - ZS of strict", keeps[-1] - keeps[0], 0),
        Check.above(
            "some λ beats strict where it adapts and affine where it forgets",
            "largest over λ of the smaller advantage (top-1)",
            max(better),
            0,
        ),
        Check.within(
            "λ says how orthogonal the map ends",
            "defect / λ at λ/√n = 0.375",
            trials.mean(_PUBLISHED, "defect / λ"),
            0.85,
            1.15,
        ),
        Check.above(
            "a soft penalty does not", "least |defect / λ - 1| over its weights", min(soft), 0.15, required=False
        ),
        Check.above(
            "which items first: farthest > random > nearest",
            "smaller of the two differences in area",
            min(farthest - chance, chance - nearest),
            0,
        ),
    ]
