"""Draw docs/images/sifo.png: two stations of Munich, users coloured by what is captured of their channels."""

from pathlib import Path

import numpy as np
from drawing import WIDTH, panels, save

from subspan.datasets import SionnaSites
from subspan.reproduce.sifo import BANK, FEW, OURS, Sizes, World
from subspan.wireless import channel_covariance

SEED = 7
"""Another draw than those of the recorded run."""
CITY = "munich"


def main() -> None:
    """Write the picture beside this file."""
    sites = SionnaSites().load()
    world = World(sites, Sizes(), SEED)
    shown = [site for site in sites if site.city == CITY]
    figure, axes = panels(6.2, len(shown), 2, sharex="row", sharey="row")
    figure.set_size_inches(WIDTH, 6.2)
    for row, site in zip(axes, shown, strict=True):
        here = world.places[site.name]
        held = np.random.default_rng(SEED).permutation(len(site))[:FEW]
        asked = np.setdiff1d(np.arange(len(site)), held)
        truth = channel_covariance(site.channels[asked])
        for plot, arm in zip(row, (BANK, OURS), strict=True):
            model = world.pretrained(CITY)[arm].forget().calibrate(here.powers[held], here.labels[held])
            share = model.predict(here.powers[asked]).captured_energy(truth).numpy()
            print(site.name, arm, "mean", share.mean().round(3), "tenth", np.quantile(share, 0.1).round(3))
            east, north, _ = site.positions.numpy().T
            image = plot.scatter(east[asked], north[asked], 9, share, cmap="viridis", vmin=0.5, vmax=1)
            plot.scatter(east[held], north[held], 34, facecolors="none", edgecolors="#b2182b", linewidths=1.1)
            plot.scatter(*site.station[:2].numpy(), 90, "black", marker="^")
            plot.set_title(f"{site.name}, {arm}\nmean {share.mean():.2f}", fontsize=8.5)
            plot.set(aspect="equal", xlabel="metres east")
        row[0].set(ylabel="metres north")
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.7, pad=0.02, extend="min")
    bar.set_label("share of the channel's energy captured")
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
