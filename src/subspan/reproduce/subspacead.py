"""SubspaceAD on real textures with pasted defects, on industrial images, and on table rows."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from sklearn.ensemble import IsolationForest
from sklearn.svm import OneClassSVM
from torch import Tensor
from torch.nn import functional as F

from subspan.base import normalize_rows
from subspan.datasets import image_preprocessing, is_available, load, load_model
from subspan.detect import AnomalyResult, RandomRotations, SubspaceAD, SubspaceDetector, tail_mean
from subspan.detect.maps import smooth, upsample, window_boxes
from subspan.detect.rotations import rotate
from subspan.geometry import oas_shrinkage, shrink_covariance
from subspan.measures import aupro, auroc
from subspan.models import FeatureGrid, ImagePreprocessing, image_tensor
from subspan.solvers import nearest
from subspan.statistics import fit_moments

from .protocol import Check, Outcome, Progress, Table

MODEL = "efficientnet-lite0"
# Stages of stride 8 and 16, and the last one, of stride 32.
MIDDLE = [f"_blocks.{index}" for index in range(3, 11)]
LAST = [f"_blocks.{index}" for index in range(11, 16)]
CROP, QUADRANT, INPUT = 128, 256, 192
# What AnomalyDINO turns its references by.
BANK_ROTATIONS = 8
TURNED = 20


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """One-shot detection and localisation against memory bank, Gaussian, pixel PCA and isolation forest."""
    seeds = range(seed, seed + (1 if quick else 3))
    per_kind, rotations = (12, 10) if quick else (60, 30)
    middle, last = _grid(MIDDLE, INPUT), _grid(LAST, INPUT)
    textures = load("textures")
    trials: list[tuple[str, int]] = [(name, each) for each in seeds for name in textures]
    measured: list[dict[str, float]] = []
    for done, (name, each) in enumerate(trials):
        progress(f"{name}, seed {each}", 0.6 * done / len(trials))
        scene = pasted_defects(textures, name, per_kind=per_kind, seed=each)
        # The last stage costs a pass of its own, so one seed has to do.
        measured.append(_texture_trial(scene, middle, last if each == seed else None, rotations, each))
    mean = {
        key: float(np.mean([trial[key] for trial in measured if key in trial])) for key in measured[0] | measured[-1]
    }
    progress("table rows", 0.6)
    rows = _table_rows(range(seed, seed + (3 if quick else 10)))
    tables = _texture_tables(mean, trials, measured)
    tables.append(
        Table(
            "breast cancer, 50 benign training rows",
            ["method", "AUROC"],
            [[name, round(value, 4)] for name, value in rows.items()],
        )
    )
    notes = [
        "The paper's encoder (DINOv2 giant) and data (MVTec AD, VisA) are not used: EfficientNet-Lite0 patch features, "
        "photographs of three textures with pasted defects.",
        "Patches are scaled to unit length, which is ours: convolutional features vary with contrast. The row 'patches "
        "as they are' is the paper's form.",
        "The memory bank gets 8 rotations of the reference (AnomalyDINO's number), the subspace 30.",
        "Defects are pasted, so the textures show the mechanism rather than industrial difficulty.",
    ]
    if not quick and is_available("magnetic_tile"):
        progress("magnetic_tile", 0.65)
        tables.append(_magnetic_tile(MIDDLE, (1, 4, 16), seeds, progress))
    elif not quick:
        notes.append("magnetic_tile was not run: the data folder (SUBSPAN_DATA) is not set.")
    storage = mean["bank storage"] / mean["ours storage"]
    speed = mean["bank seconds"] / mean["ours seconds"]
    best_row = max(value for key, value in rows.items() if key != "ours")
    pixel_bar, image_bar = (0.90, -0.05) if quick else (0.95, -0.01)
    checks = [
        _at_least(
            "image AUROC beside the memory bank", "difference", mean["ours image"] - mean["bank image"], image_bar
        ),
        _at_least("storage", "numbers kept by the memory bank over ours", storage, 10.0),
        _at_least("scoring speed", "seconds of the memory bank over ours", speed, 1.0),
        _at_least("beyond pixel PCA", "pixel AUROC difference", mean["ours pixel"] - mean["pixels pixel"], 0.10),
        _at_least("rank 0.99 over 0.95", "pixel AUROC difference", mean["ours pixel"] - mean["0.95 pixel"], 0.0),
        _at_least("rank 1.0 collapses", "pixel AUROC lost", mean["ours pixel"] - mean["1.0 pixel"], 0.10),
        _at_least("middle over last stage", "pixel AUROC difference", mean["ours pixel"] - mean["last pixel"], 0.0),
        _at_least(
            "rotations on rotated crops",
            "pixel AUROC with and without",
            mean["turned pixel"] - mean["turned, no rotations pixel"],
            0.0,
        ),
        _at_least("table rows beside the best", "AUROC difference", rows["ours"] - best_row, -0.01),
    ]
    return Outcome(
        claim="Without training, the residual of frozen patch features to a PCA subspace of one to four normal images "
        "detects and localises anomalies as well as or better than memory banks, at a fraction of their storage.",
        data=f"brick, grass, gravel ({len(trials)} texture × seed trials, {per_kind} normal and {per_kind} defective "
        f"crops each, 1 reference image, {rotations} rotations); Wisconsin breast cancer; magnetic tiles where present",
        model=f"{MODEL}, stages of stride 8 and 16",
        metric="pixel AUROC, mean over textures and seeds",
        ours=mean["ours pixel"],
        baselines={
            "memory bank (1-NN)": mean["bank pixel"],
            "Gaussian": mean["gaussian pixel"],
            "PCA on raw pixels": mean["pixels pixel"],
        },
        bar=f"pixel AUROC >= {pixel_bar}",
        holds=mean["ours pixel"] >= pixel_bar,
        checks=checks,
        tables=tables,
        notes=notes,
    )


@dataclass(frozen=True)
class Scene:
    """A reference image, and test crops with their masks: upright, and turned by random angles."""

    reference: Float[Tensor, "3 h w"]
    crops: list[Tensor]
    masks: list[np.ndarray]
    turned: list[Tensor]
    turned_masks: list[np.ndarray]

    @property
    def labels(self) -> Bool[np.ndarray, " n"]:
        """Which crops have a defect."""
        return np.array([mask.any() for mask in self.masks])


def pasted_defects(textures: dict[str, np.ndarray], name: str, *, per_kind: int, seed: int) -> Scene:
    """One quadrant of a photograph as reference; normal and defective crops of the other three.

    Defects in turn: a patch of another texture, a scratch, a blot, a blurred spot; masks are where pixels were changed.
    """
    rng = np.random.default_rng([seed, list(textures).index(name)])
    quadrants = [textures[name][y : y + QUADRANT, x : x + QUADRANT] for y in (0, 256) for x in (0, 256)]
    reference = quadrants.pop(int(rng.integers(4)))
    others = [texture for other, texture in textures.items() if other != name]
    crops, masks, turned, turned_masks = [], [], [], []
    for index in range(2 * per_kind):
        whole = quadrants[int(rng.integers(3))].astype(np.float64)
        mask = np.zeros_like(whole, dtype=bool)
        if index >= per_kind:
            # Near the middle, so that it stays in view when the crop is turned.
            centre = rng.integers(QUADRANT // 2 - 40, QUADRANT // 2 + 40, 2)
            whole, mask = DEFECTS[index % len(DEFECTS)](whole, centre, rng, others)
        else:
            centre = rng.integers(CROP // 2, QUADRANT - CROP // 2, 2)
        # Anywhere in the crop, but 16 pixels from its border at least.
        top, left = np.clip(centre - rng.integers(16, CROP - 16, 2), 0, QUADRANT - CROP)
        window = np.s_[top : top + CROP, left : left + CROP]
        image = image_tensor(whole.round().clip(0, 255).astype(np.uint8))
        crops.append(image[:, window[0], window[1]])
        masks.append(mask[window])
        angle = float(rng.uniform(0, 360))
        inner = np.s_[64 : 64 + CROP]
        turned.append(rotate(image, angle)[:, inner, inner])
        turned_mask = rotate(torch.from_numpy(mask[None].astype(np.float32)), angle, padding="zeros")[0]
        turned_masks.append(turned_mask.numpy()[inner, inner] > 0.5)
    kept = [*range(min(TURNED, per_kind)), *range(per_kind, per_kind + min(TURNED, per_kind))]
    turned, turned_masks = [turned[index] for index in kept], [turned_masks[index] for index in kept]
    return Scene(image_tensor(reference), crops, masks, turned, turned_masks)


def _pasted_patch(
    image: np.ndarray, centre: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    half = int(rng.integers(8, 17))
    source = others[int(rng.integers(len(others)))]
    y, x = rng.integers(0, source.shape[0] - 2 * half, 2)
    patch = source[y : y + 2 * half, x : x + 2 * half].astype(np.float64)
    box = np.s_[centre[0] - half : centre[0] + half, centre[1] - half : centre[1] + half]
    # Brightness is matched, so that only the texture tells.
    patch = patch - patch.mean() + image[box].mean()
    return _replaced(image, box, patch)


def _replaced(image: np.ndarray, box: Any, patch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    changed, mask = image.copy(), np.zeros_like(image, dtype=bool)
    changed[box], mask[box] = patch, True
    return changed, mask


def _scratch(
    image: np.ndarray, centre: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    angle, length, width = rng.uniform(0, np.pi), rng.uniform(16, 32), rng.uniform(1.5, 3)
    y, x = np.indices(image.shape) - centre[:, None, None]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    mask = (np.abs(along) < length) & (np.abs(across) < width)
    changed = image.copy()
    changed[mask] = rng.choice([30.0, 225.0])
    return changed, mask


def _blot(
    image: np.ndarray, centre: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape), 4)
    y, x = np.indices(image.shape) - centre[:, None, None]
    radius = rng.uniform(8, 16)
    mask = np.hypot(y, x) < radius * (1 + 1.5 * noise / noise.std() * 0.2)
    changed = image.copy()
    changed[mask] = 0.25 * changed[mask] + 0.75 * rng.choice([40.0, 215.0])
    return changed, mask


def _blurred_spot(
    image: np.ndarray, centre: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.indices(image.shape) - centre[:, None, None]
    mask = np.hypot(y, x) < rng.uniform(10, 18)
    return np.where(mask, ndimage.gaussian_filter(image, 4), image), mask


DEFECTS: tuple[Callable[..., tuple[np.ndarray, np.ndarray]], ...] = (_pasted_patch, _scratch, _blot, _blurred_spot)


def _grid(layers: list[str], size: int) -> FeatureGrid:
    """Patch features of the packaged network, which sees images at `size` pixels."""
    trained = image_preprocessing(MODEL)
    preprocessing = ImagePreprocessing(size, mean=trained["mean"], std=trained["std"], resize="squash")
    return FeatureGrid(load_model(MODEL), layers, preprocessing=preprocessing)


def _texture_trial(
    scene: Scene, middle: FeatureGrid, last: FeatureGrid | None, rotations: int, seed: int
) -> dict[str, float]:
    """Every method on one texture with one reference image; features are taken once."""
    generator = torch.Generator().manual_seed(seed)
    views = [scene.reference, *RandomRotations(rotations).views(scene.reference, generator)]
    boxes = window_boxes(QUADRANT, QUADRANT, CROP)
    pieces = [view[:, top:bottom, left:right] for view in views for top, left, bottom, right in boxes]
    normal, test, turned = (
        torch.cat(list(middle.iterate(images, 8))) for images in (pieces, scene.crops, scene.turned)
    )
    size = (CROP, CROP)
    measured: dict[str, float] = {}

    def record(name: str, result: AnomalyResult, masks: Sequence[np.ndarray] = scene.masks) -> None:
        measured[f"{name} pixel"] = auroc(result.maps, np.stack(masks))
        measured[f"{name} image"] = auroc(result.scores, [mask.any() for mask in masks])
        measured[f"{name} aupro"] = aupro(result.maps, masks)

    def subspace(name: str, **settings: Any) -> SubspaceAD:
        with warnings.catch_warnings():
            # With rank=1.0 no residual is left, which is what is to be shown.
            warnings.simplefilter("ignore", UserWarning)
            model = SubspaceAD(middle, **{"normalize": True, **settings}).fit_features([normal])
        record(name, model.predict_features([test], size))
        return model

    ours = subspace("ours")
    record("turned", ours.predict_features([turned], size), scene.turned_masks)
    upright = SubspaceAD(middle, normalize=True).fit_features([normal[: len(boxes)]])
    record("turned, no rotations", upright.predict_features([turned], size), scene.turned_masks)
    for name, settings in ABLATIONS.items():
        subspace(name, **settings)
    if last is not None:
        deep = SubspaceAD(last, normalize=True).fit_features(last.iterate(pieces, 8))
        record("last", deep.predict_features(last.iterate(scene.crops, 8), size))

    bank = normalize_rows(normal[: (1 + BANK_ROTATIONS) * len(boxes)].flatten(0, 2))
    queries = normalize_rows(test.flatten(0, 2))
    similarity, measured["bank seconds"] = _timed(lambda: nearest(queries, bank, 1, metric="inner")[0])
    _, measured["ours seconds"] = _timed(lambda: ours.detector_.anomaly_score(queries))
    record("bank", _read_out((1 - similarity).reshape(test.shape[:3]), size))
    measured["bank storage"] = bank.numel()
    measured["ours storage"] = ours.subspace_.ambient_dim * (ours.subspace_.dim + 1)
    measured["rank"] = ours.subspace_.dim
    gaussian = _gaussian_distance(normalize_rows(normal.flatten(0, 2)), queries)
    record("gaussian", _read_out(gaussian.reshape(test.shape[:3]), size))
    pixels = SubspaceAD(_pixel_patches).fit_features([_pixel_patches(torch.stack(pieces))])
    record("pixels", pixels.predict_features([_pixel_patches(torch.stack(scene.crops))], size))
    measured["forest image"] = _pooled_forest(normal, test, scene.labels, seed)
    return measured


def _timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def _read_out(patches: Float[Tensor, "b h w"], size: tuple[int, int]) -> AnomalyResult:
    """Maps and image scores of a baseline, in the way of `SubspaceAD`."""
    maps = smooth(upsample(patches.float(), size), 4.0)
    return AnomalyResult(tail_mean(maps.flatten(1)).double().numpy(), maps.numpy())


def _gaussian_distance(normal: Float[Tensor, "n d"], rows: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """Squared Mahalanobis distance to a Gaussian of full, shrunk covariance."""
    moments = fit_moments(normal)
    covariance = moments.covariance()
    covariance = shrink_covariance(covariance, oas_shrinkage(covariance, moments.count))
    factor = torch.linalg.inv(torch.linalg.cholesky(covariance))
    return ((rows - moments.mean.to(rows)) @ factor.mT.to(rows)).square().sum(-1)


def _pixel_patches(images: Float[Tensor, "b 3 h w"], side: int = 8) -> Float[Tensor, "b h2 w2 d"]:
    """Grey values of the side × side patches themselves."""
    grey = images.mean(1, keepdim=True)
    grid = (images.shape[-2] // side, images.shape[-1] // side)
    return F.unfold(grey, side, stride=side).mT.unflatten(1, grid)


def _pooled_forest(
    normal: Float[Tensor, "b h w d"], test: Float[Tensor, "n h2 w2 d"], labels: np.ndarray, seed: int
) -> float:
    """Image AUROC of an isolation forest on mean-pooled features."""
    forest = IsolationForest(random_state=seed).fit(normal.mean((1, 2)).numpy())
    return auroc(-forest.score_samples(test.mean((1, 2)).numpy()), labels)


def _table_rows(seeds: range) -> dict[str, float]:
    """Mean AUROC of detectors fitted on 50 standardised rows of benign cases, on all other rows."""
    data = load("breast_cancer")
    x, malignant = data["x"], data["y"] == 0
    benign = np.flatnonzero(~malignant)
    found: dict[str, list[float]] = {}
    for seed in seeds:
        train = np.random.default_rng(seed).permutation(benign)[:50]
        test = np.setdiff1d(np.arange(len(x)), train)
        mean, scale = x[train].mean(0), x[train].std(0)
        rows, others = (x[train] - mean) / scale, (x[test] - mean) / scale
        scores = {
            "ours": SubspaceDetector(distance="residual").fit(rows).anomaly_score(others),
            "IsolationForest": -IsolationForest(random_state=seed).fit(rows).score_samples(others),
            "OneClassSVM": -OneClassSVM().fit(rows).score_samples(others),
        }
        if importlib.util.find_spec("pyod") is not None:
            from pyod.models.pca import PCA

            scores["PCA (pyod)"] = PCA(random_state=seed).fit(rows).decision_function(others)
        for name, values in scores.items():
            found.setdefault(name, []).append(auroc(values, malignant[test]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _magnetic_tile(middle: list[str], shots: Sequence[int], seeds: range, progress: Progress) -> Table:
    """Industrial images with defects: image and pixel AUROC and AUPRO by number of normal images."""
    side = 160
    data, grid = load("magnetic_tile"), _grid(middle, side)
    models: dict[tuple[str, int, int], SubspaceAD] = {}
    banks: dict[tuple[str, int, int], Tensor] = {}
    for seed in seeds:
        chosen = np.random.default_rng(seed).permutation(len(data.train))[: max(shots)]
        images = [image_tensor(image) for image in data.train.subset(chosen)]
        features = torch.cat(list(grid.iterate(images, 8)))
        for shot in shots:
            models["ours", shot, seed] = SubspaceAD(grid, normalize=True).fit_features([features[:shot]])
            banks["memory bank", shot, seed] = normalize_rows(features[:shot].flatten(0, 2))
            if shot < 16:
                models["ours, 30 rotations", shot, seed] = SubspaceAD(grid, normalize=True, random_state=seed).fit(
                    images[:shot]
                )
    readings: dict[tuple[str, int, int], list[AnomalyResult]] = {key: [] for key in [*models, *banks]}
    for start in range(0, len(data.test), 16):
        progress("magnetic_tile", 0.75 + 0.25 * start / len(data.test))
        features = grid(data.test[start : start + 16])
        for key, model in models.items():
            readings[key].append(model.predict_features([features], (side, side)))
        for key, bank in banks.items():
            similarity = nearest(normalize_rows(features.flatten(0, 2)), bank, 1, metric="inner")[0]
            readings[key].append(_read_out((1 - similarity).reshape(features.shape[:3]), (side, side)))
    masks = np.stack([_resized_mask(data.mask(index), side) for index in range(len(data.test))])
    rows = []
    for name, shot in dict.fromkeys((name, shot) for name, shot, _ in readings):
        values = []
        for seed in seeds:
            scores = np.concatenate([result.scores for result in readings[name, shot, seed]])
            maps = np.concatenate([result.maps for result in readings[name, shot, seed]])
            values.append((auroc(scores, data.anomalous), auroc(maps, masks), aupro(maps, masks)))
        rows.append([name, shot, *(round(float(value), 3) for value in np.mean(values, axis=0))])
    rows.sort(key=lambda row: (row[1], row[0]))
    return Table(
        f"magnetic_tile: {len(data.test)} test images, mean of {len(seeds)} draws of normal images",
        ["method", "normal images", "image AUROC", "pixel AUROC", "AUPRO 0.3"],
        rows,
    )


def _resized_mask(mask: Bool[np.ndarray, "h w"], side: int) -> Bool[np.ndarray, "side side"]:
    resized = F.interpolate(torch.from_numpy(mask)[None, None].float(), size=(side, side), mode="nearest-exact")
    return resized[0, 0].numpy() > 0.5


ABLATIONS: dict[str, dict[str, Any]] = {"raw": {"normalize": False}, "0.95": {"rank": 0.95}, "1.0": {"rank": 1.0}}
METHODS = {
    "ours": "SubspaceAD, unit-length patches, rank 0.99",
    "raw": "SubspaceAD, patches as they are",
    "0.95": "SubspaceAD, rank 0.95",
    "1.0": "SubspaceAD, rank 1.0",
    "last": "SubspaceAD, last stage (first seed)",
    "bank": f"memory bank, 1-NN, {BANK_ROTATIONS} rotations",
    "gaussian": "Gaussian, shrunk covariance",
    "pixels": "PCA on raw pixels",
    "turned": "turned crops: SubspaceAD",
    "turned, no rotations": "turned crops: SubspaceAD without rotations",
}


def _texture_tables(
    mean: dict[str, float], trials: list[tuple[str, int]], measured: list[dict[str, float]]
) -> list[Table]:
    def cells(name: str, values: dict[str, float]) -> list[float]:
        return [round(values[f"{name} {metric}"], 3) for metric in ("image", "pixel", "aupro")]

    rows = [[title, *cells(name, mean)] for name, title in METHODS.items()]
    rows.append(["IsolationForest on pooled features", round(mean["forest image"], 3), None, None])
    columns = ["method", "image AUROC", "pixel AUROC", "AUPRO 0.3"]
    every = Table(f"pasted defects, one reference image, mean of {len(trials)} trials", columns, rows)
    by_texture = [
        [texture, seed, round(trial["rank"]), *cells("ours", trial), *cells("bank", trial)]
        for (texture, seed), trial in zip(trials, measured)
    ]
    headings = ["texture", "seed", "rank", *columns[1:], *(f"bank {column}" for column in columns[1:])]
    cost = Table(
        "storage and scoring, same features, same machine and run (mean of the trials)",
        ["method", "numbers kept", "seconds to score a trial's crops"],
        [
            ["SubspaceAD", round(mean["ours storage"]), round(mean["ours seconds"], 4)],
            ["memory bank", round(mean["bank storage"]), round(mean["bank seconds"], 4)],
        ],
    )
    return [every, Table("each trial", headings, by_texture), cost]


def _at_least(name: str, metric: str, value: float, bar: float) -> Check:
    return Check(name=name, metric=metric, value=value, bar=f">= {bar:g}", holds=value >= bar)
