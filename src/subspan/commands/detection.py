"""The work of `subspan detect`: how strange rows and images are, and which labels their neighbours would not give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from subspan.base import Progress, require, silent
from subspan.base.files import temporary_folder
from subspan.datasets import AnomalyImages, Rows, image_preprocessing, load_model
from subspan.detect import RandomRotations, SubspaceAD, SubspaceDetector, label_votes
from subspan.measures import aupro, auroc
from subspan.models import FeatureGrid, ImagePreprocessing, image_tensor
from subspan.reproduce.subspacead import MIDDLE

from .columns import Found, calling, check_rank, naming

IMAGE_MODEL = "efficientnet-lite0"
_SCORED_ROWS = 8192
_ASKED = 10
# Rotated views of each good image, where there are so few of them.
_VIEWS, _FEW_IMAGES = 8, 16
# Good images that a threshold needs at least, and that are left out for one at most.
_FEWEST, _HELD_OUT = 3, 64


def detect_rows(
    data: Rows,
    good: Rows | None = None,
    *,
    rank: int | float | str = 0.99,
    distance: Any = "combined",
    by_label: bool = False,
    progress: Progress = silent,
) -> Found:
    """Score rows by their distance to the subspace of `good` ones (default: of themselves, or of those of their label).

    Raises ValueError where there are no labels to go by, and where a label has fewer than 3 rows.
    """
    if by_label and data.labels is None:
        raise ValueError("--by-label: needs --labels")
    fitted_to = data if good is None else good
    check_rank(rank, fitted_to)
    names = np.unique(data.labels) if by_label and data.labels is not None else [None]
    scores, outlying = np.empty(len(data)), np.zeros(len(data), dtype=bool)
    for step, name in enumerate(names):
        rows = np.arange(len(data)) if name is None else np.flatnonzero(data.labels == name)
        if name is not None and len(rows) < 3:
            raise ValueError(f"--by-label: {name!r} has {len(rows)} rows; a subspace of its own needs at least 3")
        normal = fitted_to.array() if name is None else data.take(rows)
        with calling(fitted_to):
            detector = SubspaceDetector(rank, distance=distance, contamination="fence").fit(normal)
        for start in range(0, len(rows), _SCORED_ROWS):
            part = rows[start : start + _SCORED_ROWS]
            scores[part] = detector.anomaly_score(data.take(part))
            outlying[part] = scores[part] > -detector.offset_
            progress("scoring", (step + (start + len(part)) / len(rows)) / len(names))
    columns = naming(data, range(len(data))) | {"score": scores.tolist(), "outlier": outlying.tolist()}
    facts = {"rows": len(data), "fitted_to": len(fitted_to), "rank": rank, "distance": distance}
    return Found(columns, {**facts, "outliers": int(outlying.sum())})


def detect_label_errors(data: Rows, *, progress: Progress = silent) -> Found:
    """Ask the ten nearest rows of each for its label. Raises ValueError without labels and for fewer than 3 rows."""
    if data.labels is None:
        raise ValueError("--label-errors: needs --labels")
    if len(data) < 3:
        raise ValueError(f"--label-errors: {len(data)} rows are too few to have neighbours")
    progress("asking the neighbours", 0.5)
    votes = label_votes(data.array(), data.labels, min(_ASKED, len(data) - 1))
    columns = naming(data, range(len(data))) | {
        "suggested": [str(name) for name in votes.suggested],
        "score": votes.scores.tolist(),
        "suspect": votes.suspect.tolist(),
    }
    labels = len(set(data.labels.tolist()))
    return Found(columns, {"rows": len(data), "labels": labels, "suspects": int(votes.suspect.sum())})


def detect_images(
    images: AnomalyImages,
    *,
    rank: int | float | str = 0.99,
    shots: int | None = None,
    rotations: int | None = None,
    maps: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Found:
    """Score test images by their patches' distance to those of good ones, with AUROC where there are defects.

    shots: fit to so many good images alone. rotations: views of each (default: 8 for up to 16 images, else none).
    maps: new folder for a picture of each test image with its scores over it.
    """
    good, spare = images.train, images.train.subset([])
    if shots is not None:
        order = np.random.default_rng(seed).permutation(len(good)).tolist()
        good, spare = good.subset(order[:shots]), good.subset(order[shots:])
    preprocessing = ImagePreprocessing(**image_preprocessing(IMAGE_MODEL), resize="squash")
    grid = FeatureGrid(load_model(IMAGE_MODEL), MIDDLE, preprocessing=preprocessing)
    views = (_VIEWS if len(good) <= _FEW_IMAGES else 0) if rotations is None else rotations
    augment = RandomRotations(views) if views else None
    detector = SubspaceAD(grid, augment=augment, rank=rank, normalize=True, random_state=seed)

    def watched(shown: Any, title: str, first: float, share: float) -> Iterator[Any]:
        for index in range(len(shown)):
            progress(title, first + share * index / len(shown))
            yield shown[index]

    detector.fit(watched(good, "fitting", 0.0, 0.4))
    progress("scoring good images that were left out", 0.4)
    highest = _highest_of_good(detector, good, spare)
    result = detector.predict(watched(images.test, "scoring", 0.6, 0.4))
    columns = {"image": list(images.test.names), "type": list(images.test.labels), "score": result.scores.tolist()}
    facts: dict[str, Any] = {"images": len(images.test), "fitted_to": len(good), "rank": detector.subspace_.dim}
    if highest is not None:
        limit, _, held_out = highest
        above = result.scores > limit
        columns["above"] = above.tolist()
        facts |= {"threshold": limit, "held_out_good": held_out, "above_threshold": int(above.sum())}
        if images.anomalous.any():
            facts["defects_above"] = f"{int(above[images.anomalous].sum())} of {int(images.anomalous.sum())}"
    if maps is not None:
        pixel = 0.5 * max(float(one.max()) for one in result.maps) if highest is None else highest[1]
        _write_maps(images, result.maps, pixel, maps)
    if 0 < images.anomalous.sum() < len(images.anomalous):
        facts["image_auroc"] = float(auroc(result.scores, images.anomalous))
        located = np.flatnonzero(images.located).tolist()
        facts["defects_without_mask"] = len(images.test) - len(located)
        masks = [_mask(images, index, result.maps[index].shape) for index in located]
        if any(mask.any() for mask in masks):
            pixels, defects = np.stack([result.maps[index] for index in located]), np.stack(masks)
            facts["pixel_auroc"] = float(auroc(pixels, defects))
            facts["aupro"] = float(aupro(pixels, defects))
    return Found(columns, facts)


def _highest_of_good(detector: SubspaceAD, good: Any, spare: Any) -> tuple[float, float, int] | None:
    """The highest score and pixel score of good images that a fit had not seen, and how many they are.

    Spare ones where there are; else each of a few good ones is left out of a fit in turn, or a quarter of many. None
    for fewer than three.
    """
    again = SubspaceAD(**detector.get_params(deep=False))
    if len(spare) >= _FEWEST:
        found = [detector.predict(spare[:_HELD_OUT])]
    elif len(good) < _FEWEST:
        return None
    elif len(good) <= _FEW_IMAGES:
        grid: Any = detector.backbone
        generator = torch.Generator().manual_seed(detector.random_state or 0)
        features = []
        for index in range(len(good)):
            image = image_tensor(good[index])
            views = [] if detector.augment is None else detector.augment.views(image, generator)
            features.append(grid([image, *views]))
        found = [
            again.fit_features([each for place, each in enumerate(features) if place != left]).predict_features(
                [features[left][:1]], grid.preprocessing.height_width
            )
            for left in range(len(features))
        ]
    else:
        order = np.random.default_rng(detector.random_state).permutation(len(good)).tolist()
        count = min(_HELD_OUT, len(good) // 4)
        found = [again.fit(good.subset(order[count:])).predict(good.subset(order[:count]))]
    scores = np.concatenate([each.scores for each in found])
    return float(scores.max()), max(float(one.max()) for each in found for one in each.maps), len(scores)


def _write_maps(images: AnomalyImages, maps: Any, limit: float, folder: Path) -> None:
    """Every test image with its scores over it, yellow at half of the limit to red, and what is above it outlined."""
    pillow = require("PIL.Image", extra="vision")
    with temporary_folder(folder, exclusive=True) as unfinished:
        made = unfinished / "made"
        for index, name in enumerate(images.test.names):
            image = images.test[index].convert("RGB")
            whole = pillow.fromarray(np.asarray(maps[index], dtype=np.float32))
            scores = np.asarray(whole.resize(image.size, pillow.Resampling.BILINEAR))
            parts = [part for part in PurePosixPath(name).parts if part not in ("..", "/", "test")]
            target = made.joinpath(*parts)
            target = target if target.suffix.lower() == ".png" else target.with_name(f"{target.name}.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            pillow.fromarray(_laid_over(np.asarray(image, dtype=np.float32), scores / limit)).save(target)
        made.replace(folder)


def _laid_over(image: Float[np.ndarray, "h w 3"], scores: Float[np.ndarray, "h w"]) -> np.ndarray:
    """An image (0 to 255) under scores of which 1 is the limit."""
    heat = np.clip(scores - 0.5, 0, 1)[..., None]
    colour = np.concatenate([np.full_like(heat, 255), 255 * (1 - heat), np.zeros_like(heat)], axis=-1)
    found = image * (1 - 0.6 * heat) + colour * 0.6 * heat
    above = np.pad(scores > 1, 1)
    inner = above[:-2, 1:-1] & above[2:, 1:-1] & above[1:-1, :-2] & above[1:-1, 2:]
    found[above[1:-1, 1:-1] & ~inner] = (255, 0, 0)
    return found.round().astype(np.uint8)


def _mask(images: AnomalyImages, index: int, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """A defect mask at the size of its score map."""
    pillow = require("PIL.Image", extra="vision")
    mask = pillow.fromarray(images.mask(index))
    return np.asarray(mask.resize((shape[1], shape[0]), pillow.Resampling.NEAREST)).astype(bool)
