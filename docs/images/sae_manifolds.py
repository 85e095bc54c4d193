"""Draw docs/images/sae_manifolds.png from the recorded run: how atoms share planted manifolds, and years in a model."""

from pathlib import Path

from drawing import STYLES, panels, save, titled

from subspan.reproduce import recorded


def main() -> None:
    """Write the picture beside this file."""
    record = recorded("sae-manifolds")
    if record is None:
        raise SystemExit("no run of sae-manifolds is recorded")
    planted, years = titled(record, "planted manifolds"), titled(record, "years")
    figure, axes = panels(6.4, 2)
    k = [int(each) for each in planted["k"]]
    lines = {
        "capture by as many atoms as dimensions, R²": planted["R²(n = dim)"],
        "receptive field, share of the manifold": planted["spread"],
        "support, of the largest": [each / max(planted["support"]) for each in planted["support"]],
    }
    for (label, values), style in zip(lines.items(), STYLES):
        axes[0].plot(k, values, **style, label=label)
    axes[0].set(xscale="log", xlabel="atoms a row, k", ylim=(0, 1.05))
    axes[0].set_xticks(k, [str(each) for each in k])
    axes[0].minorticks_off()
    for name, style in zip(("PCA", "geometric", "random dictionary", "affine", "statistical"), STYLES):
        axes[1].plot(years["atoms"], years[name], **style, label=name)
    axes[1].set(xscale="log", xlabel="atoms or directions", ylabel="share of the variance of years", ylim=(0, 1.05))
    axes[1].set_xticks(ticks := [1, 4, 16, 64, 192], [str(each) for each in ticks])
    axes[1].minorticks_off()
    for each in axes:
        each.grid(color="0.9", axis="y")
        each.legend(fontsize=8.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
