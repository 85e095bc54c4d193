"""What metrics of spatial structure and alignment cost: beside loops over images, and beside a plain training step.

Run: python benchmarks/irepa.py. Ratios are of times measured side by side in this process.
"""

import os
import platform
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from subspan.align import RepresentationAlignment
from subspan.geometry import spatial_structure
from subspan.geometry.spatial import manhattan_distances
from subspan.nn import FlowTransformer, PatchProjector, SpatialNorm

IMAGES, SIDE, D = 32, 16, 384


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Best of several runs after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def by_distance(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """As the authors' program: each metric its own Gram matrices, each distance its own mean."""
    t = features.shape[1]
    side = int(t**0.5)
    distance = manhattan_distances(side, side)

    def gram() -> torch.Tensor:
        unit = F.normalize(features, dim=-1)
        return torch.einsum("btd,bsd->bts", unit, unit)

    grid = F.normalize(features, dim=-1).unflatten(1, (side, side))
    down = (grid[:, 1:] * grid[:, :-1]).sum(-1).flatten(1)
    across = (grid[:, :, 1:] * grid[:, :, :-1]).sum(-1).flatten(1)
    far = distance >= 6
    lds = torch.cat([down, across], 1).mean(1) - gram().masked_fill(~far, 0).sum((1, 2)) / far.sum()
    cosines = gram()
    means = torch.stack([cosines[:, distance == step].mean(1) for step in range(1, 9)], 1)
    steps = torch.arange(1.0, 9) - 4.5
    cds = -((means - means.mean(1, keepdim=True)) @ steps) / steps.square().sum()
    unit = F.normalize(features, dim=-1)
    rmsc = (unit - unit.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()
    return {"lds": lds, "cds": cds, "rmsc": rmsc}


def by_image(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same, one image after another."""
    found = [by_distance(image[None]) for image in features]
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def training_step(denoiser: FlowTransformer, alignment: RepresentationAlignment | None) -> Callable[[], object]:
    """One forward and backward pass on a batch of 32, with cached teacher features."""
    images, time_, label = torch.randn(32, 3, 32, 32), torch.rand(32), torch.randint(10, (32,))
    teacher = torch.randn(32, 112, 8, 8)

    def step() -> None:
        loss = (denoiser(images, time_, label) - images).square().mean()
        if alignment is not None:
            loss = loss + alignment.loss(teacher)
        loss.backward()

    return step


def main() -> None:
    torch.manual_seed(0)
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} threads")
    features = torch.randn(IMAGES, SIDE * SIDE, D)
    ours, theirs = spatial_structure(features), by_distance(features)
    print(f"largest difference: {max(float((ours[name] - theirs[name]).abs().max()) for name in ours):.1e}")
    whole = seconds(lambda: spatial_structure(features))
    print(f"LDS, CDS, RMSC of {IMAGES} × {SIDE}×{SIDE} tokens of width {D}")
    print(f"ours                              {whole:.3f} s")
    for name, function in (("a mean a distance, batched", by_distance), ("the same, image by image", by_image)):
        other = seconds(lambda function=function: function(features))
        print(f"{name:<34}{other:.3f} s   {other / whole:.1f} × ours")
    denoiser = FlowTransformer(32, width=192, depth=6, heads=6)
    plain = seconds(training_step(denoiser, None))
    print(f"training step without alignment   {plain:.3f} s")
    for name, projector, norm in (
        ("REPA (MLP 2048)", PatchProjector(192, 112, "mlp"), None),
        ("iREPA", PatchProjector(192, 112), SpatialNorm()),
    ):
        with RepresentationAlignment(denoiser, "blocks.1", None, projector, norm) as alignment:
            other = seconds(training_step(denoiser, alignment))
        print(f"{name:<34}{other:.3f} s   {other / plain:.2f} × the plain step")


if __name__ == "__main__":
    main()
