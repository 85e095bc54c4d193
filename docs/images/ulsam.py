"""Draw docs/images/ulsam.png: the attention maps of ULSAM's groups of channels on photographs.

The network, its two replaced blocks and the fine-tuning are those of `subspan reproduce ulsam`, with four groups.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import panels, save
from PIL import Image

from subspan.datasets import image_preprocessing, load, load_model
from subspan.models import ImagePreprocessing
from subspan.nn import SubspaceAttention, attention_entropy
from subspan.reproduce import ulsam

ARM, SIZE = "ULSAM, 4 groups", 320
PHOTOGRAPHS = ("cat", "coffee", "rocket")


def squares() -> list[np.ndarray]:
    """The middles of some bundled photographs, of one size."""
    photographs, found = load("photographs"), []
    for picture in (photographs[name] for name in PHOTOGRAPHS):
        side = min(picture.shape[:2])
        top, left = ((each - side) // 2 for each in picture.shape[:2])
        found.append(np.asarray(Image.fromarray(picture[top : top + side, left : left + side]).resize((SIZE, SIZE))))
    return found


@torch.no_grad()
def reaching(model: Any, images: list[np.ndarray]) -> torch.Tensor:
    """What reaches the tail from pictures of this size."""
    prepare = ImagePreprocessing(**{**image_preprocessing(ulsam.MODEL), "size": SIZE, "crop_fraction": 1.0})
    x = model._swish(model._bn0(model._conv_stem(prepare.batch(images))))
    for block in model._blocks[: ulsam.CUT]:
        x = block(x)
    return x


def main() -> None:
    """Write the picture beside this file."""
    _, x, y = ulsam.material()
    torch.manual_seed(0)
    model = ulsam.tail(10)
    ulsam.operate(model, ulsam.middle_blocks(model, x["test"][:1]), ulsam.ARMS[ARM], x["test"][:1])
    print(f"accuracy {ulsam.tune(model, x, y, ulsam.EPOCHS, 0):.1f} %")
    images = squares()
    maps = reaching(load_model(ulsam.MODEL).eval(), images)
    with torch.no_grad():
        for part in model:
            if isinstance(part, SubspaceAttention):
                break
            maps = part(maps)
        attention = part.attention(maps)
    print("entropy over that of a uniform map", attention_entropy(attention).round(decimals=3).tolist())
    times = (attention * attention[0, 0].numel()).numpy()
    figure, axes = panels(1.25 * len(images) + 0.4, len(images), 1 + part.groups)
    for row, picture, groups in zip(axes, images, times):
        row[0].imshow(picture)
        for each, values in zip(row[1:], groups):
            image = each.imshow(values, cmap="viridis", vmin=0, vmax=float(times.max()))
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
        each.spines[:].set_visible(False)
    for number, each in enumerate(axes[0, 1:], 1):
        each.set_title(f"group {number}", fontsize=9.5)
    figure.colorbar(image, ax=axes, label="attention, times that of a uniform map", location="bottom", shrink=0.6)
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
