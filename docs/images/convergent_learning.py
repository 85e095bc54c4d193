"""Draw docs/images/convergent_learning.png: correlations of two networks' units, as numbered, matched and grouped."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from subspan.probe import ConvergentLearning, layer_moments
from subspan.reproduce.convergent_learning import Setting, small_world

SIDE, GAP = 256, 8
LAYER = "relu2"


def colours(values: np.ndarray) -> np.ndarray:
    """Correlations from 0 to 1, white to dark blue."""
    ends = np.array([[255, 255, 255], [107, 174, 214], [8, 48, 107]], float)
    return np.stack([np.interp(values, [0, 0.5, 1], ends[:, c]) for c in range(3)], -1).astype(np.uint8)


def panel(table: torch.Tensor, rows: list[int], columns: list[int]) -> np.ndarray:
    """|correlation| of the units in this order."""
    pixels = colours(table[rows][:, columns].abs().numpy())
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST))


def main() -> None:
    """Write the picture beside this file."""
    world = small_world(Setting(), 0, lambda message, fraction: None)
    moments = layer_moments(world.trained[:2], [LAYER], world.fit.split(100))[0, 1][0]
    model = ConvergentLearning.from_moments(moments, sign="signed")
    p, q = model.correlations_.shape
    matched = model.matching_.correlation.argsort(descending=True).tolist()
    partners = [int(model.matching_.partner[unit]) for unit in matched]
    groups = model.groups()
    grouped_x = [int(unit) for group in groups for unit in group.x]
    grouped_y = [int(unit) for group in groups for unit in group.y]
    orders = [(list(range(p)), list(range(q))), (partners, matched), (grouped_x, grouped_y)]
    panels = [panel(model.correlations_, rows, columns) for rows, columns in orders]
    blank = np.full((SIDE, GAP, 3), 160, np.uint8)
    strip = np.concatenate([panels[0], blank, panels[1], blank, panels[2]], 1)
    Image.fromarray(strip).save(Path(__file__).with_suffix(".png"), optimize=True)
    best, worst = (float(model.matching_.correlation[matched[place]]) for place in (0, -1))
    print(f"matched correlations from {best:.2f} to {worst:.2f}; groups from {groups[0].agreement:.2f} to "
          f"{groups[-1].agreement:.2f}")  # fmt: skip


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
