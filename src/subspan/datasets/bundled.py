"""Real data that comes inside scikit-image and scikit-learn, so that nothing has to be fetched."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from subspan.base import require

from .images import open_image


def textures() -> dict[str, np.ndarray]:
    """Photographs of brick, grass and gravel, grey, (512, 512) uint8 each (scikit-image)."""
    return {name: np.asarray(_skimage_file(f"{name}.png")) for name in ("brick", "grass", "gravel")}


def photographs() -> dict[str, np.ndarray]:
    """Photographs of everyday things, colour, (h, w, 3) uint8 of several sizes (scikit-image, scikit-learn)."""
    files = {"astronaut": "astronaut.png", "cat": "chelsea.png", "coffee": "coffee.png", "rocket": "rocket.jpg"}
    found = {name: np.asarray(_skimage_file(file).convert("RGB")) for name, file in files.items()}
    return found | {name: _scikit_learn().load_sample_image(f"{name}.jpg") for name in ("china", "flower")}


def digits() -> dict[str, np.ndarray]:
    """Handwritten digits: x (1797, 8, 8) uint8 with 17 grey levels, y (scikit-learn)."""
    loaded = _scikit_learn().load_digits()
    return {"x": loaded.images.astype(np.uint8), "y": loaded.target}


def breast_cancer() -> dict[str, np.ndarray]:
    """Wisconsin diagnostic breast cancer: x (569, 30) float64, y with 1 = benign, feature_names (scikit-learn)."""
    loaded = _scikit_learn().load_breast_cancer()
    return {"x": loaded.data, "y": loaded.target, "feature_names": np.asarray(loaded.feature_names, dtype=str)}


BUNDLED: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "textures": textures,
    "photographs": photographs,
    "digits": digits,
    "breast_cancer": breast_cancer,
}


def _scikit_learn() -> Any:
    """Imported when asked for, because it takes a second."""
    return importlib.import_module("sklearn.datasets")


def _skimage_file(name: str) -> Any:
    package = require("skimage", extra="vision")
    return open_image(Path(next(iter(package.__path__))) / "data" / name)
