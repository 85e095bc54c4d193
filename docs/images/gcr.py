"""Draw docs/images/gcr.png: principal angles between the planes that a Grassmann head learns for CIFAR-10.

Adapter, head and training are those of `subspan reproduce gcr`; features come from the cache.
"""

from pathlib import Path

import numpy as np
import torch
from drawing import STYLES, panels, save

from subspan.geometry import Subspace, principal_angles
from subspan.nn import GrassmannHead
from subspan.reproduce import gcr
from subspan.reproduce.materials.image_features import labelled_images
from subspan.statistics import GroupedMoments

RANK, TRAIN, TEST = 8, 4000, 500
PAIRS = (("cat", "dog"), ("airplane", "frog"))


def angles(bases: torch.Tensor) -> np.ndarray:
    """Principal angles in degrees of every pair of classes (c, c, k), ascending."""
    return torch.rad2deg(principal_angles(bases.unsqueeze(1), bases.unsqueeze(0))).numpy()


def main() -> None:
    """Write the picture beside this file."""
    data = labelled_images("cifar10").first(TRAIN, TEST)
    features = data.features().float()
    x = {"train": features[data.train], "test": features[data.test]}
    labels = {part: torch.from_numpy(data.labels[rows]) for part, rows in (("train", data.train), ("test", data.test))}
    network = gcr.trained(lambda d, c: GrassmannHead(d, c, RANK), x, labels, gcr.EPOCHS, 0)
    with torch.no_grad():
        unit = torch.nn.functional.normalize(network[0](x["train"]), dim=-1)
    principal = GrassmannHead(gcr.WIDTH, len(data.classes), RANK)
    principal.init_from(GroupedMoments(gcr.WIDTH).update(unit, labels["train"]))
    learnt, own = (angles(head.subspaces().basis.double()) for head in (network[1], principal))
    chance = angles(Subspace.random(gcr.WIDTH, RANK, batch=(64,), generator=torch.Generator().manual_seed(0)).basis)
    chance = chance[np.triu_indices(64, 1)].mean(0)

    figure, (above, below) = panels(7.6, 2, height_ratios=(2.2, 1))
    lower = np.tril(np.ones(learnt.shape[:2], bool), -1)
    shown = np.where(lower, learnt[..., 0], own[..., 0])
    np.fill_diagonal(shown, np.nan)
    image = above.imshow(shown, cmap="viridis", vmin=0, vmax=90)
    for (row, column), value in np.ndenumerate(shown):
        if row != column:
            colour = "black" if value > 50 else "white"
            above.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8.5, color=colour)
    above.set_xticks(range(len(data.classes)), data.classes, rotation=45, ha="right", rotation_mode="anchor")
    above.set_yticks(range(len(data.classes)), data.classes)
    figure.colorbar(image, ax=above, label="smallest principal angle, degrees", ticks=[0, 30, 60, 90], shrink=0.8)
    number = {name: index for index, name in enumerate(data.classes)}
    order = range(1, RANK + 1)
    for (first, second), style in zip(PAIRS, STYLES):
        below.plot(order, learnt[number[first], number[second]], **style, label=f"{first}, {second}")
    below.plot(order, chance, **STYLES[3], label="random planes")
    below.plot(order, own[number["cat"], number["dog"]], **STYLES[2], label="cat, dog, own planes")
    below.set(xlabel="principal angle, in order", ylabel="degrees", ylim=(0, 95), yticks=[0, 30, 60, 90])
    below.legend(loc=(0.03, 0.23))
    save(figure, Path(__file__))
    off = np.triu_indices(len(learnt), 1)
    print("learnt", learnt[off].mean(0).round(1), "own", own[off].mean(0).round(1), "chance", chance.round(1))


if __name__ == "__main__":
    main()
