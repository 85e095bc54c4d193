"""Draw docs/images/irepa.png: similarity maps of one token before and after spatial normalisation."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from subspan.base import normalize_rows
from subspan.datasets import image_preprocessing, load, load_model
from subspan.models import FeatureGrid, ImagePreprocessing
from subspan.nn import SpatialNorm

NAME, LAYER, SIZE, SIDE, GAP = "efficientnet-lite0", "_blocks.15", 512, 256, 8
PATCH = (4, 8)


def colours(values: np.ndarray) -> np.ndarray:
    """Cosines from -1 to 1 as blue, white, red."""
    ends = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]], float)
    return np.stack([np.interp(values, [-1, 0, 1], ends[:, c]) for c in range(3)], -1).astype(np.uint8)


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """One square a cell."""
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)).copy()


def framed(panel: np.ndarray, grid: int) -> np.ndarray:
    """The panel with the chosen patch outlined."""
    step = SIDE / grid
    top, left, bottom, right = (round(value * step) for value in (*PATCH, PATCH[0] + 1, PATCH[1] + 1))
    inside = panel[top + 3 : bottom - 3, left + 3 : right - 3].copy()
    panel[top:bottom, left:right] = (220, 20, 20)
    panel[top + 3 : bottom - 3, left + 3 : right - 3] = inside
    return panel


def main() -> None:
    """Write the picture beside this file."""
    photograph = load("photographs")["cat"]
    side = min(photograph.shape[:2])
    left = (photograph.shape[1] - side) // 2
    picture = photograph[:side, left : left + side]
    prepare = ImagePreprocessing(resize="squash", **{**image_preprocessing(NAME), "size": SIZE})
    tokens = FeatureGrid(load_model(NAME), LAYER, preprocessing=prepare)([picture])
    grid = tokens.shape[1]
    panels = [framed(np.asarray(Image.fromarray(picture).resize((SIDE, SIDE))).copy(), grid)]
    for rows in (tokens.flatten(1, 2), SpatialNorm()(tokens.flatten(1, 2))):
        unit = normalize_rows(rows)[0]
        cosines = (unit @ unit[PATCH[0] * grid + PATCH[1]]).reshape(grid, grid).numpy()
        print(f"cosines from {cosines.min():.2f} to {cosines.max():.2f}, mean {cosines.mean():.2f}")
        panels.append(framed(enlarged(colours(cosines)), grid))
    blank = np.full((SIDE, GAP, 3), 255, np.uint8)
    strip = np.concatenate([panels[0], blank, panels[1], blank, panels[2]], 1)
    Image.fromarray(strip).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
