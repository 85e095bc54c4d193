"""Draw docs/images/householder_projector.png: a garment edited along directions of the untouched and projected net.

Left SeFa, right the projector's canonical axes; one direction a row, of the layer at 8 pixels; the step from -2 to 2
deviations of the latents. The generator is that of `subspan reproduce householder-projector`, from the cache.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from subspan.reproduce import householder_projector as protocol
from subspan.reproduce.materials.style_generator import FeatureDistance, garments

ROWS, STEPS, SCALE, GAP, PICTURE, LAYER = 5, (-2.0, -1.0, 0.0, 1.0, 2.0), 2, 12, 4, 0


@torch.no_grad()
def block(model, images, directions) -> np.ndarray:
    """Rows of edits of one picture."""
    w = model.latents(images)
    spread, one = protocol.deviation(w), w[PICTURE : PICTURE + 1]
    edit = partial(protocol.edited, model, one, LAYER)
    rows = [torch.cat([edit(one + a * spread * v)[0, 0] for a in STEPS], 1) for v in directions[LAYER].mT[:ROWS]]
    pixels = ((torch.cat(rows).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    return pixels.repeat(SCALE, 0).repeat(SCALE, 1)


def main() -> None:
    """Write the picture beside this file."""
    data, distance = garments(protocol.N_TRAIN, protocol.N_TEST), FeatureDistance()
    base = protocol.base_model(data, distance, protocol.BASE_STEPS, 0)
    ours = protocol.projected(base, protocol.RANK, cold=False, seed=0)
    images = data.train[protocol.N_CHECK :]
    protocol.tuned(ours, images, distance, protocol.TUNED_STEPS, 0)
    blocks = [
        block(model, data.test, protocol.found_directions(model, data.test, method, 0))
        for model, method in ((base, "sefa"), (ours, "jacobian"))
    ]
    blank = np.full((len(blocks[0]), GAP), 255, np.uint8)
    picture = np.concatenate([blocks[0], blank, blocks[1]], 1)
    Image.fromarray(picture).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
