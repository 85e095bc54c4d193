"""Metric learners that grow beside one and fixed ones, and where their attention looks beside masks of defects."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.nn import functional as F

from subspan.base import normalize_rows
from subspan.datasets import image_preprocessing, is_available, load, load_model
from subspan.measures import auroc, retrieval_scores
from subspan.models import FeatureGrid, ImagePreprocessing
from subspan.represent import DynamicSubspaceLearners

from .materials import cached_maps, labelled_images
from .protocol import Check, Outcome, Progress
from .training import shuffled, train
from .trials import Trials, spread


class Sizes(NamedTuple):
    """Pictures to train and to test on, epochs, the last ones of all learners together, epochs on maps, and seeds."""

    train: int = 800
    test: int = 400
    epochs: int = 14
    final: int = 2
    attention: int = 12
    seeds: int = 3


QUICK = Sizes(400, 300, 6, 2, 2, 1)
WIDTH, PATIENCE, RATE = 128, 2, 1e-3
RAW, CLASSIFIER, ONE = "pooled features", "classifier's layer", "one learner"
GROWN, CHANCE = "grown", "grown, random neurons"
FIXED = {f"{count} fixed learners": count for count in (2, 4)}
# The stage of stride 16 with 112 channels.
MODEL, STAGE, SIZE = "efficientnet-lite0", "_blocks.10", 224


class Split(NamedTuple):
    """Rows and fine classes of the training and the test pictures."""

    x: dict[str, Tensor]
    y: dict[str, np.ndarray]


def material(sizes: Sizes) -> tuple[str, Split]:
    """Pooled features of pictures of twenty classes that fall into unlike groups."""
    data = labelled_images("cifar100")
    chosen = np.isin(data.labels, np.arange(0, len(data.classes), max(1, len(data.classes) // 20)))
    rows = {"train": data.train[chosen[data.train]], "test": data.test[chosen[data.test]]}
    cut = {"train": rows["train"][: sizes.train], "test": rows["test"][: sizes.test]}
    features = data.features().float()
    return data.name, Split(
        {part: features[index] for part, index in cut.items()},
        {part: data.labels[index] for part, index in cut.items()},
    )


def options(sizes: Sizes, seed: int) -> dict[str, Any]:
    """Of the learners, the same for every arm."""
    return {
        "out_dim": WIDTH,
        "epochs": sizes.epochs,
        "final_epochs": sizes.final,
        "patience": PATIENCE,
        "learning_rate": RATE,
        "random_state": seed,
    }


def classifier_layer(split: Split, sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Features of a layer of the embedding's width, trained under a linear head for as many epochs."""
    torch.manual_seed(seed)
    labels = torch.as_tensor(np.unique(split.y["train"], return_inverse=True)[1])
    mean, scale = split.x["train"].mean(0), split.x["train"].std()
    x = {part: (rows - mean) / scale for part, rows in split.x.items()}
    layer = torch.nn.Linear(x["train"].shape[1], WIDTH)
    network = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Linear(WIDTH, int(labels.max()) + 1))
    batches = shuffled(x["train"], labels, batch_size=32, seed=seed)
    train(
        network,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        batches,
        epochs=sizes.epochs,
        learning_rate=RATE,
        weight_decay=1e-4,
    )
    with torch.no_grad():
        return {part: network[:2](rows) for part, rows in x.items()}


def scores(z: Tensor, labels: np.ndarray, seed: int) -> dict[str, float]:
    """NMI of k-means, and recall at 1 and 4 among the test pictures, percent."""
    unit = normalize_rows(z.double())
    means: dict[str, Any] = {"n_init": 3, "random_state": seed}
    clusters = KMeans(len(np.unique(labels)), **means).fit_predict(unit.numpy())
    found = retrieval_scores(unit, unit, labels, labels, exclude_self=True)
    return {
        "NMI": 100 * float(normalized_mutual_info_score(labels, clusters)),
        "R@1": 100 * found.cmc(1),
        "R@4": 100 * found.cmc(4),
    }


def arm_facts(arm: str, split: Split, sizes: Sizes, seed: int) -> dict[str, float]:
    """Scores of one arm, and of learners their number and how far they are apart."""
    if arm == RAW:
        return scores(split.x["test"] - split.x["train"].mean(0), split.y["test"], seed)
    if arm == CLASSIFIER:
        return scores(classifier_layer(split, sizes, seed)["test"], split.y["test"], seed)
    kind: dict[str, Any] = {"n_learners": 1 if arm == ONE else FIXED.get(arm)}
    if arm == CHANCE:
        kind["growth"] = "random"
    model = DynamicSubspaceLearners(**kind, **options(sizes, seed)).fit(split.x["train"], split.y["train"])
    found = scores(model.transform(split.x["test"]), split.y["test"], seed)
    if model.n_learners_ > 1:
        apart = model.separation(split.x["test"])
        found |= {"angle": apart.angle, "agreement": 100 * apart.agreement}
    return {**found, "learners": float(model.n_learners_)}


# ---------------------------------------------------------------------- attention beside masks


class Tiles(NamedTuple):
    """Maps (n, c, h, w) of pictures of tiles, their kinds, the rows to train on, and masks at the maps' size."""

    maps: Tensor
    kinds: np.ndarray
    train: Bool[np.ndarray, " n"]
    masks: Bool[np.ndarray, "n h w"]


def tiles(quick: bool) -> Tiles:
    """Every other magnetic tile, good ones and five kinds of defects; a fifth of them is held out."""
    data = load("magnetic_tile")
    keep = [row for row in range(len(data.test)) if data.located[row]][:: 4 if quick else 2]
    pictures = data.test.subset(keep)
    trained = image_preprocessing(MODEL)
    prepare = ImagePreprocessing(SIZE, mean=trained["mean"], std=trained["std"], resize="squash")
    grid = FeatureGrid(load_model(MODEL), STAGE, preprocessing=prepare)

    def stage(batch: Tensor) -> list[Tensor]:
        return [grid(batch).movedim(-1, 1)]

    (maps,) = cached_maps(grid.model, prepare, stage, pictures, batch=16, about={"layer": STAGE})
    found = [torch.from_numpy(data.mask(row))[None, None].float() for row in keep]
    height, width = maps.shape[-2:]
    shares = torch.cat([F.adaptive_avg_pool2d(mask, (height, width))[:, 0] for mask in found])
    return Tiles(maps.float(), np.asarray(pictures.labels), np.arange(len(keep)) % 5 != 0, shares.numpy() > 0.1)


def otsu(values: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Where values are above the threshold that parts them into the two groups farthest apart (Otsu, 1979)."""
    levels = np.sort(values.ravel())
    below = np.arange(1, len(levels))
    sums = np.cumsum(levels)
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(levels) - below)
    best = int(np.argmax(below * (len(levels) - below) * (high - low) ** 2))
    return values > levels[best]


def overlap(found: Float[np.ndarray, "n h w"], masks: Bool[np.ndarray, "n h w"]) -> dict[str, float]:
    """Dice of the thresholded maps, and AUROC of their values, means over pictures with a defect."""
    pairs = [(each, mask) for each, mask in zip(found, masks) if mask.any()]
    dice = [2 * (otsu(each) & mask).sum() / (otsu(each).sum() + mask.sum()) for each, mask in pairs]
    ranks = [auroc(each.ravel(), mask.ravel()) for each, mask in pairs]
    return {"Dice": 100 * float(np.mean(dice)), "AUROC": 100 * float(np.mean(ranks))}


def class_activation(data: Tiles) -> Float[np.ndarray, "n h w"]:
    """Grad-CAM of a linear classifier of the means over positions, for the class that it says, of the rows held out."""
    pooled = data.maps.mean((2, 3)).numpy()
    mean, scale = pooled[data.train].mean(0), pooled[data.train].std(0) + 1e-6
    model = LogisticRegression(max_iter=300).fit((pooled[data.train] - mean) / scale, data.kinds[data.train])
    held = data.maps[torch.from_numpy(~data.train)].numpy()
    said = model.decision_function((held.mean((2, 3)) - mean) / scale).argmax(1)
    weights = (model.coef_ / scale)[said]
    return np.maximum(np.einsum("nc,nchw->nhw", weights, held), 0)


def map_facts(arm: str, data: Tiles, sizes: Sizes, seed: int) -> dict[str, float]:
    """Overlap of a way to say where with the masks of the defects held out."""
    held = torch.from_numpy(~data.train)
    masks = data.masks[~data.train]
    height, width = masks.shape[1:]
    if arm == "the middle":
        y, x = np.mgrid[:height, :width]
        middle = -np.hypot(y - (height - 1) / 2, x - (width - 1) / 2)
        return overlap(np.broadcast_to(middle, masks.shape), masks)
    if arm == "Grad-CAM":
        return overlap(class_activation(data), masks)
    chosen = {**options(sizes, seed), "epochs": sizes.attention, "final_epochs": min(sizes.final, sizes.attention)}
    rows = torch.from_numpy(data.train)
    model = DynamicSubspaceLearners(**chosen).fit(data.maps[rows], data.kinds[data.train])
    attention = model.attention(data.maps[held])
    facts = scores(model.transform(data.maps[held]), data.kinds[~data.train], seed)
    spread_out = float(attention.flatten(1).std(1).mean())
    return {**overlap(attention.numpy(), masks), **facts, "deviation": spread_out, "learners": float(model.n_learners_)}


MAPS = ("the middle", "Grad-CAM", "attention")


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Every arm on pooled features; attention on maps of tiles, where there are some."""
    sizes = QUICK if quick else Sizes()
    seeds = range(seed, seed + sizes.seeds)
    progress("features", 0.0)
    name, split = material(sizes)
    arms = [RAW, CLASSIFIER, ONE, *FIXED, CHANCE, GROWN]
    trials = Trials(
        arms, seeds, lambda arm, each: arm_facts(arm, split, sizes, each), progress=progress, span=(0.05, 0.7)
    )
    best = max(FIXED, key=lambda arm: trials.mean(arm, "NMI"))
    points = "points of NMI"
    fewest = trials.statistic(GROWN, "learners", min)
    checks = [
        Check.above("metric learning beside none", points, trials.gap(ONE, RAW, "NMI"), 0, quick=True),
        Check.above("it grows without being told", "learners, fewest over seeds", fewest, 1),
        Check.at_least("beside one learner", "points of recall at 1", trials.gap(GROWN, ONE, "R@1"), 1),
        Check.at_least("beside the best fixed number", points, trials.gap(GROWN, best, "NMI"), -1),
        Check.at_least("beside a classifier's features", points, trials.gap(GROWN, CLASSIFIER, "NMI"), 0),
        Check.above(
            "important neurons beside random ones", points, trials.gap(GROWN, CHANCE, "NMI"), 0, required=False
        ),
    ]
    if trials.values(GROWN, "angle"):
        apart = trials.mean(GROWN, "angle")
        checks.append(Check.above("learners read different subspaces", "mean principal angle, degrees", apart, 60))
    tables = [
        trials.table(
            f"{name}, pooled features: means over seeds (range of NMI)",
            "embedding",
            {**spread("NMI", "NMI"), "R@1": "R@1", "R@4": "R@4", "learners": "learners", "angle": "angle",
             "agreement of learners, NMI": "agreement"},
        )
    ]  # fmt: skip
    notes = [
        "The paper fine-tunes a ResNet-50 on medical images (ISIC 2019, MURA, HyperKvasir); here an embedding is "
        "trained on frozen features of natural images, and attention on frozen maps of tiles.",
        f"It grows by the NMI of a fifth of the training pictures, after {PATIENCE} epochs without a new best; the "
        "authors watch the test set, with 10 of 250.",
    ]
    if is_available("magnetic_tile"):
        progress("maps of tiles", 0.7)
        data = tiles(quick)
        where = Trials(
            MAPS, seeds, lambda arm, each: map_facts(arm, data, sizes, each), progress=progress, span=(0.75, 1.0)
        )
        gained, rivals = "points of Dice", where.means("Dice", but="attention")
        for other, value in rivals.items():
            bar = 10 if other == "Grad-CAM" else 0
            title = f"attention beside {other}"
            checks.append(Check.at_least(title, gained, where.mean("attention", "Dice") - value, bar))
        columns = ("Dice", "AUROC", "NMI", "R@1", "learners", "deviation")
        tables.append(where.table("magnetic tiles, defects held out: percent, means over seeds", "where", columns))
        notes.append(
            f"Tiles: {int(data.train.sum())} pictures of six kinds to train on; {STAGE} of {MODEL} at {SIZE} pixels, "
            "14 by 14 places; masks have a place where a tenth of it is defective."
        )
    else:
        notes.append("Attention was not run: it needs magnetic_tile of the data folder (SUBSPAN_DATA).")
    return Outcome(
        claim="The number of metric learners inside an embedding is found while training: as good as the best fixed "
        "number, clearly above a classifier's features, and the attention shows what an image is judged by.",
        data=f"{name}: {len(split.y['train'])} training and {len(split.y['test'])} test pictures of "
        f"{len(np.unique(split.y['test']))} classes; magnetic tiles with masks",
        model=f"an embedding of {WIDTH} on frozen EfficientNet-Lite0 features, {sizes.epochs} epochs",
        metric="NMI (percent) of k-means on the test pictures",
        ours=trials.mean(GROWN, "NMI"),
        baselines=trials.means("NMI", but=GROWN),
        main=Check.at_least("beside one learner", points, trials.gap(GROWN, ONE, "NMI"), 1),
        checks=checks,
        tables=tables,
        notes=notes,
    )
