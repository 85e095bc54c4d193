"""Draw docs/images/simvq.png: how often each code is chosen, SimVQ beside codebooks trained on the same patches.

The autoencoders are those of `subspan reproduce simvq`, with one seed.
"""

from pathlib import Path

import numpy as np
import torch
from drawing import STYLES, loglog, panels, save

from subspan.reproduce import simvq

NAMES = ("SimVQ", "EMA, dead codes restarted", "basis trained, map frozen", "plain VQ")


@torch.no_grad()
def main() -> None:
    """Write the picture beside this file."""
    _, train, held = simvq.material()
    figure, axes = panels(3.8)
    for name, style in zip(NAMES, STYLES):
        with torch.enable_grad():
            model = simvq.trained(train, lambda name=name: simvq.ARMS[name](simvq.MANY), simvq.STEPS, 0)
        codes = model.quantizer(model.encoder(held)).codes
        counts = np.sort(torch.bincount(codes, minlength=simvq.MANY).numpy())[::-1]
        used = counts[counts > 0]
        print(f"{name}: {len(used)} codes in use, the commonest {used[0] / len(codes):.1%}")
        axes.plot(np.arange(1, len(used) + 1), 100 * used / len(codes), **style, markevery=0.12, label=name)
        axes.plot(len(used), 100 * used[-1] / len(codes), **style)
    loglog(axes, f"codes in order of use, of {simvq.MANY:,}", "share of the held-out patches, %")
    axes.legend(loc="lower left")
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
