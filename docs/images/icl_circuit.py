"""Draw docs/images/icl_circuit.png: the heads of SmolLM2 that copy and that retrieve, on the words of the protocol."""

from pathlib import Path

import numpy as np
from drawing import WIDTH, panels, save

from subspan.datasets import load_language_model
from subspan.probe import ICLCircuit, merge_report, retrieval_report
from subspan.reproduce.icl_circuit import BATCH, WORDS
from subspan.reproduce.materials.word_categories import retrieval_examples

PROMPTS = 48
SEED = 7
"""Other draws than those of the recorded run."""


def main() -> None:
    """Write the picture beside this file."""
    circuit = ICLCircuit(*load_language_model(), WORDS, batch_size=BATCH)
    reading = circuit.read(retrieval_examples(PROMPTS, random_state=SEED))
    merged, retrieved = merge_report(reading, neighbours=5), retrieval_report(reading)
    present = np.where(retrieved.induction.numpy() >= 0.5, retrieved.assignment.mean(0).numpy(), np.nan)
    print("heads that copy", merged.heads()[:6], "that retrieve", retrieved.best(6), "chance", retrieved.chance)
    shown = {
        "label ← its forerunner,\nshare of prompts": (merged.counts.numpy(), 0.0),
        "any token ← the one before,\nshare of prompts": (merged.neighbour_counts.numpy(), 0.0),
        "query → labels, share on\nthe right one (0.25 by chance)": (present, retrieved.chance),
    }
    figure, axes = panels(6.4, 1, 3, sharey=True)
    figure.set_size_inches(WIDTH, 6.4)
    for plot, (title, (values, low)) in zip(axes, shown.items(), strict=True):
        image = plot.imshow(values, aspect="auto", cmap="Blues", vmin=low, vmax=1, origin="lower")
        plot.set_facecolor("0.94")
        plot.set_title(title, fontsize=8.5)
        plot.set(xlabel="head", xticks=range(0, values.shape[1], 2))
        figure.colorbar(image, ax=plot, orientation="horizontal", pad=0.02, ticks=[low, 1])
    axes[0].set(ylabel="layer")
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
