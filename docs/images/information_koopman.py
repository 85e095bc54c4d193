"""Draw docs/images/information_koopman.png: what the entropy does to latents of Lorenz-63, and the wake."""

from pathlib import Path

import numpy as np
from drawing import STYLES, WIDTH, panels, save

from subspan.dynamics import KoopmanAutoencoder
from subspan.reproduce.information_koopman import ALONE, DIM, PLAIN, RELEASED, STRONG, TRAINED
from subspan.reproduce.materials import lorenz, vortex_street

SEED, STEPS = 7, 400
"""Other trajectories than those of the recorded run, and fewer steps."""


def main() -> None:
    """Write the picture beside this file."""
    *train, test = lorenz(65, 200, seed=SEED)
    figure, axes = panels(8.2, 3, 2)
    figure.set_size_inches(WIDTH, 8.2)
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
    shares, spectrum, near, far, *flow = axes.flat
    near.plot(np.arange(120), test[:120, 0], color="black", linewidth=1, label="truth")
    for arm, style in zip((PLAIN, ALONE, RELEASED, STRONG), STYLES):
        options = {"trainer": {"max_steps": STEPS}, "epochs": STEPS, "clip_spectral_radius": 1.0, "random_state": SEED}
        model = KoopmanAutoencoder(DIM, **TRAINED[arm], **options).fit(train)
        share = model.subspace_.variances.numpy() / model.subspace_.variances.sum().item()
        shares.semilogy(np.arange(1, len(share) + 1), share, label=arm.replace(" (code)", ""), **style, markersize=3)
        if arm in (PLAIN, STRONG):
            values = np.asarray(model.eigenvalues_)
            spectrum.plot(values.real, values.imag, label=arm, **{**style, "linestyle": "none"}, markersize=4)
            told = model.predict(test[[20]], 60)[0]
            near.plot(np.arange(21, 81), told[:, 0], **{**style, "marker": None})
            far.plot(np.arange(21, 81), np.abs(told - test[21:81]).mean(axis=1), label=arm, **{**style, "marker": None})
        print(arm, round(model.effective_dimension_, 1), "dimensions")
    spectrum.plot(circle.real, circle.imag, color="0.6", linewidth=0.8)
    shares.set(title="share of latent variance", xlabel="direction", ylim=(1e-6, 1))
    spectrum.set(title="eigenvalues", aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    near.set(title="Lorenz, x from row 20 on", xlabel="row")
    far.set(title="distance to the truth", xlabel="row")
    fields = vortex_street(300)
    for plot, channel, name in zip(flow, (0, 1), ("along", "across"), strict=True):
        plot.imshow(fields[200, channel], origin="lower", cmap="RdBu_r", vmin=-1.2, vmax=1.2)
        plot.set(title=f"wake, {name} the stream", xticks=[], yticks=[])
    handles, labels = shares.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
