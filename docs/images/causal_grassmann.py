"""Draw docs/images/causal_grassmann.png: planes and gates of a small language model along a held-out sentence.

Model, text and training are those of `subspan reproduce causal-grassmann`, with one seed.
"""

from pathlib import Path

import torch
from drawing import STYLES, panels, save

from subspan.geometry import Subspace, principal_angles
from subspan.geometry.grassmann import orthonormalize
from subspan.reproduce import causal_grassmann as protocol

SENTENCE, BEFORE = b"These storms also bring the risk of tornadoes .", 80


def turns(planes: Subspace) -> torch.Tensor:
    """Largest principal angle, degrees, from each plane of neighbours to the next, with which it shares a token."""
    return torch.rad2deg(principal_angles(planes.basis[0, :-1], planes.basis[0, 1:])[:, -1])


@torch.no_grad()
def main() -> None:
    """Write the picture beside this file."""
    _, train, held = protocol.text()
    with torch.enable_grad():
        model = protocol.trained(protocol.MIXINGS["Grassmann"], train, protocol.STEPS, 0)
    start = bytes(held.tolist()).index(SENTENCE) - BEFORE
    ids = held[start : start + BEFORE + len(SENTENCE)].unsqueeze(0)
    states = model.token(ids) + model.position(torch.arange(ids.shape[1]))
    place = range(len(SENTENCE))
    figure, (above, below) = panels(5.4, 2)
    for number, (block, style) in enumerate(zip(model.blocks, STYLES), 1):
        mixing = block.mixing
        gates: list[torch.Tensor] = []
        handle = mixing.gate.register_forward_hook(lambda _, __, output, gates=gates: gates.append(output.sigmoid()))
        turned = turns(mixing.planes(states, 1))
        states = block(states)
        handle.remove()
        share = 1 - gates[0].mean(-1)[0]
        above.plot(place, turned[-len(SENTENCE) :], **style, markersize=4, label=f"layer {number}")
        below.plot(place, share[-len(SENTENCE) :], **style, markersize=4, label=f"layer {number}")
        print(f"layer {number}: mean turn {turned.mean():.0f} degrees, share of the planes {share.mean():.2f}")
    z = torch.randn(2000, protocol.RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chance = turns(Subspace(orthonormalize(torch.stack([z[1:], z[:-1]], -1)).unsqueeze(0))).mean()
    above.axhline(float(chance), color="0.4", linestyle=":", label="random states")
    above.set(ylabel="turn of the plane, degrees", ylim=(0, 92), yticks=[0, 30, 60, 90])
    below.set(ylabel="share of the planes in the gate", ylim=(0, 1))
    for axes in (above, below):
        axes.set_xticks(place, [chr(byte).replace(" ", "␣") for byte in SENTENCE], fontsize=8)
        axes.tick_params(axis="x", length=0)
        axes.legend(loc="lower right", ncols=3)
    save(figure, Path(__file__))


if __name__ == "__main__":
    main()
