"""Draw docs/images/convergent_learning.png from the recorded run: agreement of units by layer, beside its controls."""

from pathlib import Path
from typing import Any

import numpy as np
from drawing import STYLES, panels, save, titled

from subspan.reproduce import recorded


def lines(axes: Any, names: list[str], series: dict[str, list[float]], ylabel: str) -> None:
    """A line a series over named layers."""
    for (label, values), style in zip(series.items(), STYLES):
        axes.plot(range(len(names)), values, **style, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel=ylabel, ylim=(0, 1))
    axes.grid(color="0.9", axis="y")
    axes.legend(fontsize=8.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)


def main() -> None:
    """Write the picture beside this file."""
    record = recorded("convergent-learning")
    if record is None:
        raise SystemExit("no run of convergent-learning is recorded")
    small, controls = titled(record, "cifar10"), titled(record, "mean matched correlation")
    large = titled(record, "EfficientNet-Lite")
    layers = small["layer"]
    by_control = dict(zip(controls["networks"], zip(*(controls[layer] for layer in layers))))
    figure, axes = panels(8.6, 3)
    matched = {
        "trained": by_control["trained, different seeds"],
        "one of them rotated": small["matching, rotated"],
        "untrained": by_control["untrained networks"],
        "trained on shuffled labels": by_control["shuffled labels"],
        "another picture": by_control["another picture"],
    }
    lines(axes[0], layers, matched, "matched correlation")
    explained = {
        "all units": small["R² all"],
        "five partners": small["R² few"],
        "a group": small["R² group"],
        "one partner": small["R² one"],
    }
    lines(axes[1], layers, explained, "variance explained")
    stages = [stage for stage in dict.fromkeys(large["layer"]) if stage != "pooled"]
    rows = {stage: [index for index, name in enumerate(large["layer"]) if name == stage] for stage in stages}
    pretrained = {
        label: [float(np.mean([large[key][index] for index in rows[stage]])) for stage in stages]
        for label, key in (("units of EfficientNet-Lite", "matching"), ("one network rotated", "matching, rotated"))
    }
    lines(axes[2], stages, pretrained, "matched correlation")
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
