"""Draw docs/images/interventions.png from the recorded run: what is left of the state where assumptions fail."""

from pathlib import Path

from drawing import BLUE, RED, panels, save, titled

from subspan.reproduce import recorded


def main() -> None:
    """Write the picture beside this file."""
    record = recorded("rep4ex")
    if record is None:
        raise SystemExit("no run of rep4ex is recorded")
    figure, axes = panels(3.4)
    whole, failing = titled(record, "vectors, 2"), titled(record, "where assumptions fail")
    rows = [("as assumed", whole["R² of the state"][whole["effects by"].index("Rep4Ex")])]
    rows += [
        (what, score)
        for what, arm, score in zip(failing["what"], failing["effects by"], failing["R² of the state"])
        if arm == "Rep4Ex"
    ]
    plain = whole["R² of the state"][whole["effects by"].index("autoencoder")]
    axes.plot([score for _, score in rows], [name for name, _ in rows], "o", color=BLUE)
    for place, (_, score) in enumerate(rows):
        axes.annotate(f"{score:.3f}", (score, place), (-8, 0), textcoords="offset points", ha="right", va="center")
    axes.axvline(plain, color=RED, linestyle="--", label=f"autoencoder, as assumed: {plain:.3f}")
    axes.grid(color="0.9", axis="y")
    axes.set(xlim=(0.8, 1), ylim=(-0.6, len(rows) - 0.4), xlabel="R² of the state from latents")
    axes.invert_yaxis()
    axes.legend(fontsize=8.5, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
