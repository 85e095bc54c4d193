"""Draw docs/images/crate_heads.png: what the class token of CRATE attends to in the last layer, a head a column.

Model, pictures and training are those of `subspan reproduce crate`, with one seed.
"""

from pathlib import Path

import numpy as np
import torch
from drawing import panels, save
from torch.nn import functional as F

from subspan.reproduce import crate
from subspan.reproduce.materials.image_features import labelled_images
from subspan.reproduce.materials.small_networks import accuracy

CLASSES = ("Sneaker", "Bag", "Trouser", "Coat")
MOST = 5.0
"""Where the colours end: single patches have far more and would hide the rest."""


def main() -> None:
    """Write the picture beside this file."""
    name, patch, images, labels = crate.pictures(quick=False)
    classes = labelled_images(name).classes
    y, sizes = torch.from_numpy(labels["train"].astype(np.int64)), (images["train"].shape[-1], patch, len(classes))
    _, model = crate.classifier("CRATE", sizes, images["train"], y, crate.EPOCHS, 0)
    print(f"accuracy {100 * accuracy(model, images['test'], labels['test']):.1f} %")
    chosen = [int(np.flatnonzero(labels["test"] == classes.index(each))[0]) for each in CLASSES]
    shown = images["test"][chosen]
    maps = model.attention_maps(shown)
    maps = maps / maps.mean((-2, -1), keepdim=True)
    # Does a head tell the garment from its black ground? The correlation of its map with the brightness of patches.
    bright = F.avg_pool2d(images["test"], patch).flatten(1).unsqueeze(1).double()
    for layer in range(crate.DEPTH):
        every = model.attention_maps(images["test"], layer).flatten(2).double()
        pair = (F.normalize(each - each.mean(-1, keepdim=True), dim=-1) for each in (every, bright))
        found = torch.stack(torch.broadcast_tensors(*pair)).prod(0).sum(-1).mean(0)
        print(f"layer {layer + 1}: correlation with the brightness by head {found.numpy().round(2).tolist()}")

    figure, axes = panels(4.1, len(chosen), 1 + maps.shape[1])
    for row, picture, heads in zip(axes, shown, maps):
        row[0].imshow(picture[0], cmap="gray")
        for each, values in zip(row[1:], heads):
            image = each.imshow(values, cmap="viridis", vmin=0, vmax=MOST)
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
        each.spines[:].set_visible(False)
    for number, each in enumerate(axes[0, 1:], 1):
        each.set_title(f"head {number}", fontsize=9)
    label = {"label": "attention over its mean", "extend": "max"}
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=30, **label)
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
