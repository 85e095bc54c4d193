"""The work of `subspan detect`: how strange rows and images are, and which labels their neighbours would not give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool

from subspan.base import Progress, require, silent
from subspan.datasets import AnomalyImages, Rows, image_preprocessing, load_model
from subspan.detect import RandomRotations, SubspaceAD, SubspaceDetector, label_votes
from subspan.measures import aupro, auroc
from subspan.models import FeatureGrid, ImagePreprocessing
from subspan.reproduce.subspacead import MIDDLE

from .columns import Found, calling, check_rank, naming

IMAGE_MODEL = "efficientnet-lite0"
_SCORED_ROWS = 8192
_ASKED = 10
# Rotated views of each good image, where there are so few of them.
_VIEWS, _FEW_IMAGES = 8, 16


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
    seed: int = 0,
    progress: Progress = silent,
) -> Found:
    """Score test images by their patches' distance to those of good ones, with AUROC where there are defects.

    shots: fit to so many good images alone. rotations: views of each (default: 8 for up to 16 images, else none).
    """
    good = images.train
    if shots is not None:
        good = good.subset(np.random.default_rng(seed).permutation(len(good))[:shots].tolist())
    preprocessing = ImagePreprocessing(**image_preprocessing(IMAGE_MODEL), resize="squash")
    grid = FeatureGrid(load_model(IMAGE_MODEL), MIDDLE, preprocessing=preprocessing)
    views = (_VIEWS if len(good) <= _FEW_IMAGES else 0) if rotations is None else rotations
    augment = RandomRotations(views) if views else None
    detector = SubspaceAD(grid, augment=augment, rank=rank, normalize=True, random_state=seed)

    def watched(shown: Any, title: str, first: float) -> Iterator[Any]:
        for index in range(len(shown)):
            progress(title, first + 0.5 * index / len(shown))
            yield shown[index]

    detector.fit(watched(good, "fitting", 0.0))
    result = detector.predict(watched(images.test, "scoring", 0.5))
    columns = {"image": list(images.test.names), "type": list(images.test.labels), "score": result.scores.tolist()}
    facts: dict[str, Any] = {"images": len(images.test), "fitted_to": len(good), "rank": detector.subspace_.dim}
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


def _mask(images: AnomalyImages, index: int, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """A defect mask at the size of its score map."""
    pillow = require("PIL.Image", extra="vision")
    mask = pillow.fromarray(images.mask(index))
    return np.asarray(mask.resize((shape[1], shape[0]), pillow.Resampling.NEAREST)).astype(bool)
