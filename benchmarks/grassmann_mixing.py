"""Grassmann mixing beside causal self-attention over the length of the sequence: where they cross, how they rise.

Both are whole sub-layers, input to output, of the same width. Run: python benchmarks/grassmann_mixing.py [--json FILE]
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from record import Record, parser, timed
from subspan.models.surgery import multiply_adds
from subspan.nn import GrassmannMixing

WIDTH, RANK, HEADS = 256, 32, 8


class Attention(nn.Module):
    """Causal self-attention by torch's fused kernel, with its four linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.maps(h).chunk(3, -1))
        return self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def seconds(layer: nn.Module, x: Tensor, *, backward: bool) -> float:
    def step() -> None:
        layer(x).square().mean().backward()

    def run() -> None:
        with torch.no_grad():
            layer(x)

    return timed(step if backward else run, 3 if x.shape[1] <= 4096 else 1).processor


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--largest", type=int, default=65_536)
    arguments.add_argument(
        "--attention", type=int, default=16_384, help="the longest sequence that attention is run on"
    )
    options = arguments.parse_args()
    record = Record("grassmann_mixing", f"one sequence, width {WIDTH}, rank {RANK}, {HEADS} heads, float32")
    torch.manual_seed(0)
    ours, attention = GrassmannMixing(WIDTH, RANK), Attention()
    rows, length = [], 64
    while length <= options.largest:
        x = torch.randn(1, length, WIDTH)
        row = [length]
        for backward in (False, True):
            spent = seconds(ours, x, backward=backward)
            other = seconds(attention, x, backward=backward) if length <= options.attention else None
            row += [1e3 * spent, None if other is None else 1e3 * other]
        rows.append(row)
        length *= 2
    record.table(
        "Sub-layer",
        ["tokens", "mixing, ms", "attention, ms", "mixing with backward, ms", "attention with backward, ms"],
        rows,
    )
    for title, column in (("forward", 1), ("forward and backward", 3)):
        crossing = next((row[0] for row in rows if row[column + 1] is not None and row[column] < row[column + 1]), None)
        record.note(
            f"{title}: attention is the slower from {crossing} tokens on." if crossing else f"{title}: no crossing."
        )
    first, last = next((row for row in rows if row[0] >= 1024), rows[0]), rows[-1]
    growth = (last[1] / last[0]) / (first[1] / first[0])
    record.target(f"time a token at {last[0]} tokens over that at {first[0]}", growth, most=1.5)
    x = torch.randn(1, 128, WIDTH)
    mixing, attending = (multiply_adds(layer, x) // x.shape[1] for layer in (ours, attention))
    record.note(
        f"Floor: {mixing:,} multiply-adds a token in linear maps, and {RANK * (RANK - 1) // 2} coordinates in memory; "
        f"{attending:,} for attention, and {2 * WIDTH} more for every token before it."
    )
    record.save(options.json)


if __name__ == "__main__":
    main()
