"""What metrics of spatial structure and alignment cost: beside loops over images, and beside a plain training step.

Run: python benchmarks/irepa.py. Ratios are of processor times measured side by side in this process.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from record import Record, parser, timed
from subspan.align import RepresentationAlignment
from subspan.measures import spatial_structure
from subspan.measures.spatial import manhattan_distances
from subspan.nn import FlowTransformer, PatchProjector, SpatialNorm

IMAGES, SIDE, D = 32, 16, 384


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
    options = parser(__doc__).parse_args()
    torch.manual_seed(0)
    record = Record("irepa", f"{IMAGES} images of {SIDE} × {SIDE} tokens of width {D}; a denoiser of 32 px, batch 32")
    features = torch.randn(IMAGES, SIDE * SIDE, D)
    ours, theirs = spatial_structure(features), by_distance(features)
    gap = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    whole = timed(lambda: spatial_structure(features)).processor
    rows = [["ours", whole, 1.0]]
    for name, function in (("a mean a distance, batched", by_distance), ("the same, image by image", by_image)):
        other = timed(lambda function=function: function(features)).processor
        rows.append([name, other, other / whole])
    record.table("LDS, CDS and RMSC", ["", "processor seconds", "x ours"], rows)
    denoiser = FlowTransformer(32, width=192, depth=6, heads=6)
    plain = timed(training_step(denoiser, None)).processor
    rows = [["without alignment", plain, 1.0]]
    for name, projector, norm in (
        ("REPA (MLP 2048)", PatchProjector(192, 112, "mlp"), None),
        ("iREPA", PatchProjector(192, 112), SpatialNorm()),
    ):
        with RepresentationAlignment(denoiser, "blocks.1", None, projector, norm) as alignment:
            other = timed(training_step(denoiser, alignment)).processor
        rows.append([name, other, other / plain])
    record.table("A training step with cached teacher features", ["", "processor seconds", "x without alignment"], rows)
    record.target("largest difference of the metrics from the loop, float32", gap, most=1e-4)
    record.save(options.json)


if __name__ == "__main__":
    main()
