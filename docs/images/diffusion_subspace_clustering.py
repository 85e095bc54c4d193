"""Draw docs/images/diffusion_subspace_clustering.png: faces moved along directions of a denoiser's Jacobian."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from subspan.nn.denoising import flow
from subspan.reproduce.diffusion_subspace_clustering import Setting, edited, face_models, faces
from subspan.solvers import jacobian_subspace

SIGMA, ROWS, SCALES, ENLARGED, GAP = 0.2, (3, 41, 150), (-12.0, -6.0, 0.0, 6.0, 12.0), 3, 6


def panel(rows: torch.Tensor) -> np.ndarray:
    """Pictures side by side, enlarged."""
    side = round(rows.shape[1] ** 0.5)
    pixels = (rows.reshape(-1, side, side).clamp(0, 1) * 255).round().numpy().astype(np.uint8)
    size = (side * ENLARGED, side * ENLARGED)
    big = [np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)) for picture in pixels]
    blank = np.full((big[0].shape[0], GAP), 255, np.uint8)
    return np.concatenate([part for picture in big for part in (picture, blank)][:-1], 1)


def main() -> None:
    """Write the picture beside this file."""
    setting = Setting()
    data = faces(setting.people, 0)
    denoiser = face_models(data, setting.people, setting.dim, 0)["mixture"].denoiser_
    generator = torch.Generator().manual_seed(0)
    strips = []
    for row in ROWS:
        picture = data.held[row]
        at = flow(denoiser, picture.unsqueeze(0), torch.linspace(0.02, SIGMA, 12))[0]
        found = jacobian_subspace(lambda z: denoiser(z.unsqueeze(0), SIGMA)[0], at, 2, generator=generator)
        random = torch.randn(len(at), dtype=at.dtype, generator=generator)
        for direction in (*found.input.basis.mT, random / torch.linalg.vector_norm(random)):
            moved = edited(denoiser, picture, direction, list(SCALES), SIGMA)
            strips.append(panel(torch.cat([picture.unsqueeze(0), moved])))
    blank = np.full((GAP, strips[0].shape[1]), 255, np.uint8)
    whole = np.concatenate([part for strip in strips for part in (strip, blank)][:-1], 0)
    Image.fromarray(whole).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
