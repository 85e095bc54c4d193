"""Draw docs/images/rep4ex.png from the recorded run: effects along an action, and errors by how far actions lie."""

from pathlib import Path

from drawing import STYLES, panels, save, titled

from subspan.reproduce import recorded

ARMS = ("Rep4Ex", "autoencoder", "linear projection of X", "Y on A", "the state itself")


def main() -> None:
    """Write the picture beside this file."""
    record = recorded("rep4ex")
    if record is None:
        raise SystemExit("no run of rep4ex is recorded")
    figure, axes = panels(7.6, 2)
    curve = titled(record, "effects along")
    axes[0].axvspan(-1, 1, color="0.93", zorder=0)
    axes[0].text(
        0, 0.03, "actions tried", transform=axes[0].get_xaxis_transform(), ha="center", color="0.35", fontsize=9
    )
    axes[0].plot(curve["action"], curve["truth"], color="black", linewidth=4, alpha=0.25, label="truth")
    low, high = min(curve["truth"]), max(curve["truth"])
    for name, style in zip(ARMS, STYLES):
        axes[0].plot(curve["action"], curve[name], **{**style, "markersize": 4}, label=name)
    reach = high - low
    axes[0].set(xlabel="action", ylabel="effect, E[Y | do(A = a)]", ylim=(low - 0.6 * reach, high + 0.6 * reach))
    errors = titled(record, "vectors, 2")
    radii = ["1", "1.5", "2"]
    for name, style in zip(ARMS, STYLES):
        row = errors["effects by"].index(name)
        axes[1].plot([float(r) for r in radii], [errors[f"error at {r}"][row] for r in radii], **style, label=name)
    axes[1].set(yscale="log", xlabel="distance of the action from the mean, 2 dimensions", ylabel="squared error")
    axes[1].set_xticks([float(r) for r in radii], radii)
    for each in axes:
        each.grid(color="0.9", axis="y")
        each.legend(fontsize=8.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
