"""Draw docs/images/crate.png from the recorded run: rate and sparsity of CRATE's layers, before and after training."""

from pathlib import Path

from drawing import BLUE, GREEN, RED, panels, save, titled

from subspan.reproduce import recorded


def main() -> None:
    """Write the picture beside this file."""
    record = recorded("crate")
    if record is None:
        raise SystemExit("no run of crate is recorded")
    ours, others = titled(record, "CRATE, layer by layer"), titled(record, "R^c of the other arms")
    figure, (above, below) = panels(6.6, 2, height_ratios=(1.4, 1))
    for when, style in (("before", "--"), ("after", "-")):
        above.plot(ours["layer"], ours[f"R^c {when}"], f"o{style}", color=BLUE, label=f"CRATE, {when} training")
        values = others[f"ViT, equal width, {when}"]
        above.plot(others["layer"], values, f"s{style}", color=RED, label=f"ViT of equal width, {when}")
        strict = others[f"CRATE, strict (our experiment), {when}"]
        above.plot(others["layer"], strict, f"^{style}", color=GREEN, label=f"CRATE, strict, {when}")
        below.plot(ours["layer"], ours[f"zeros {when}"], f"o{style}", color=BLUE, label=f"CRATE, {when} training")
    above.set(ylabel="$R^c$ of held-out pictures, nats")
    below.set(xlabel="layer", ylabel="share of zeros")
    above.legend(loc="lower left")
    below.legend()
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
