"""Draw docs/images/crate.png from the recorded run: rate and sparsity of CRATE's layers, before and after training."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from subspan.reproduce import recorded


def columns(record: dict, start: str) -> dict[str, list[float]]:
    """The table whose title starts so, by column."""
    table = next(one for one in record["tables"] if one["title"].startswith(start))
    return dict(zip(table["columns"], map(list, zip(*table["rows"]))))


def main() -> None:
    """Write the picture beside this file."""
    record = recorded("crate")
    if record is None:
        raise SystemExit("no run of crate is recorded")
    ours, others = columns(record, "CRATE, layer by layer"), columns(record, "R^c of the other arms")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for when, style in (("before", "--"), ("after", "-")):
        left.plot(ours["layer"], ours[f"R^c {when}"], f"o{style}", color="#2166ac", label=f"CRATE, {when} training")
        values = others[f"ViT, equal width, {when}"]
        left.plot(others["layer"], values, f"s{style}", color="#b2182b", label=f"ViT of equal width, {when}")
        strict = others[f"CRATE, strict (our experiment), {when}"]
        left.plot(others["layer"], strict, f"^{style}", color="#4d9221", label=f"CRATE, strict, {when}")
        right.plot(ours["layer"], ours[f"zeros {when}"], f"o{style}", color="#2166ac", label=f"CRATE, {when} training")
    left.set(xlabel="layer", ylabel="$R^c$ of held-out pictures, nats")
    right.set(xlabel="layer", ylabel="share of zeros")
    left.legend(fontsize=7, loc="lower left", handlelength=3.5)
    right.legend(fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})
    print(json.dumps(ours))


if __name__ == "__main__":
    main()
