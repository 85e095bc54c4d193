"""A training step of SimVQ over the number of codes: time, memory for distances, and beside vector-quantize-pytorch.

The peer is measured where it is installed. Run: python benchmarks/simvq.py [--rows 512] [--largest 18] [--json FILE]
"""

import importlib.util
from typing import Any

import torch

from record import Record, parser, timed
from subspan.nn import SimVQ
from subspan.solvers import nearest_code

DIM = 64


def step(layer: torch.nn.Module, z: torch.Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    found: Any = layer(z)
    found[2].sum().backward()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=512)
    arguments.add_argument("--largest", type=int, default=18, help="log2 of the largest codebook")
    options = arguments.parse_args()
    record = Record("simvq", f"{options.rows} latents of {DIM} dimensions, float32")
    peer: Any = None
    if importlib.util.find_spec("vector_quantize_pytorch") is not None:
        from vector_quantize_pytorch import SimVQ as Peer

        peer = Peer
    z = torch.randn(options.rows, DIM)
    rows = []
    for power in range(10, options.largest + 1, 2):
        k = 1 << power
        ours = SimVQ(DIM, k, block=1 << 20)
        codebook = ours.codebook.detach()
        dense = (0.5 * codebook.square().sum(-1) - z @ codebook.mT).argmin(1) if power <= 16 else None
        found = nearest_code(z, codebook, block=1 << 20)
        agree = "" if dense is None else float((found == dense).double().mean())
        seconds = timed(lambda layer=ours: step(layer, z)).processor
        search = timed(lambda e=codebook: nearest_code(z, e, block=1 << 20)).processor
        other: Any = ""
        if peer is not None:
            layer = peer(dim=DIM, codebook_size=k, rotation_trick=False)
            other = timed(lambda layer=layer: step(layer, z.unsqueeze(0))).processor / seconds
        whole, kept = 4 * options.rows * k / 2**20, 4 * min(options.rows * k, 1 << 20) / 2**20
        rows.append([k, 1e3 * seconds, search / seconds, agree, whole, kept, other])
    record.table(
        "A forward and backward pass",
        [
            "codes",
            "ms",
            "share of the search",
            "same as dense",
            "N x K, MB",
            "kept, MB",
            "the peer / ours",
        ],
        rows,
    )
    record.target("memory for distances at the largest codebook, MB", rows[-1][5], most=64)
    record.note(f"Floor: K d² + N K d multiply-adds, {DIM} (d) and {options.rows} (N) of them a code dimension.")
    if peer is not None:
        record.note("The peer is vector-quantize-pytorch's SimVQ with its straight-through estimator.")
    else:
        record.note("The peer, vector-quantize-pytorch, is not installed and was not measured.")
    record.save(options.json)


if __name__ == "__main__":
    main()
