"""Draw docs/images/xfactors.png: swaps of XFactors' blocks on the pictures of `subspan reproduce xfactors`."""

from pathlib import Path

import torch
from drawing import panels, save

from subspan.reproduce import xfactors
from subspan.reproduce.materials import factor_pictures

COLUMNS = 8


def main() -> None:
    """Write the picture beside this file."""
    sizes = xfactors.Sizes()
    data = factor_pictures(sizes.train, sizes.test, 0)
    model = xfactors.trained(xfactors.OURS, data, sizes.epochs, 0)
    x, donor = (part.flatten(1) for part in data.x["test"][: 2 * COLUMNS].chunk(2))
    with torch.no_grad():
        rows = {"picture": x, "donor": donor, "rebuilt": model.decode(model.means(x))}
        rows |= {f"donor's {name}": model.swap(x, donor, name) for name in model.factors}
    height, width = data.x["test"].shape[2:]
    figure, axes = panels(0.62 * len(rows), rows=len(rows), columns=COLUMNS)
    for (name, pictures), line in zip(rows.items(), axes):
        for picture, place in zip(pictures, line):
            place.imshow(picture.view(height, width).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
