"""What a Grassmann head costs beside a linear one: logits, optimiser step, and a whole training step of a network.

All rows are measured side by side in one run. Run: python benchmarks/gcr.py [--classes 1000] [--rank 8] [--json FILE]
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from record import Record, by_turns, parser, timed
from subspan.geometry.grassmann import geodesic, gram_geodesic, tangent_projection
from subspan.nn import GrassmannHead, RiemannianSGD, with_riemannian

WIDTH, BATCH = 1280, 64


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if any(isinstance(part, GrassmannHead) for part in model.modules()):
        return with_riemannian(optimizer, 0.1)
    return optimizer


def network(head: nn.Module, size: int) -> nn.Module | None:
    from subspan.datasets import is_installed, load_model

    if not is_installed("efficientnet-lite0"):
        return None
    model = load_model("efficientnet-lite0").train()
    model.requires_grad_(True)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model, head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.backbone.extract_features(x).mean((2, 3)))

    return Whole()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--classes", type=int, default=1000)
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--size", type=int, default=160)
    arguments.add_argument("--images", type=int, default=8)
    options = arguments.parse_args()
    torch.manual_seed(0)
    c, k = options.classes, options.rank
    record = Record("gcr", f"{c} classes, k = {k}, {WIDTH} features, batch {BATCH}")
    heads = {"linear": nn.Linear(WIDTH, c), "Grassmann": GrassmannHead(WIDTH, c, k)}
    x, y = torch.randn(BATCH, WIDTH), torch.randint(c, (BATCH,))
    rows, costs = [], {}
    for name, head in heads.items():
        with torch.no_grad():
            forward = timed(lambda head=head: head(x)).processor
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        if name == "Grassmann":
            optimizer = RiemannianSGD(head.parameters(), lr=0.1)
        whole = timed(lambda head=head, optimizer=optimizer: step(head, optimizer, x, y)).processor
        alone = timed(optimizer.step).processor
        costs[name] = (forward, whole, alone)
        rows.append([name, sum(p.numel() for p in head.parameters()), 1e3 * forward, 1e3 * alone, 1e3 * whole])
    record.table("The head alone", ["head", "parameters", "logits, ms", "optimiser, ms", "step, ms"], rows)
    record.table(
        "Against the linear head",
        ["", "logits", "optimiser", "step"],
        [["ratio", *(b / a for a, b in zip(costs["linear"], costs["Grassmann"]))]],
    )

    base = heads["Grassmann"].planes.detach().mT.contiguous()
    tangent = tangent_projection(base, torch.randn_like(base)) * 1e-3
    difference = float((gram_geodesic(base, tangent)[0] - geodesic(base, tangent)).abs().max())
    ours = timed(lambda: gram_geodesic(base, tangent)).processor
    plain = timed(lambda: geodesic(base, tangent), repeats=1, warm=False).processor
    record.table(
        "One geodesic step of all planes",
        ["from", "ms", "x"],
        [["the k x k Gram matrix", 1e3 * ours, 1.0], ["an SVD and a QR of d x k", 1e3 * plain, plain / ours]],
    )
    record.target("largest difference of the two steps, float32", difference, most=1e-5)

    images, labels = torch.randn(options.images, 3, options.size, options.size), torch.randint(c, (options.images,))
    runs = {}
    for name, head in (("linear", nn.Linear(WIDTH, c)), ("Grassmann", GrassmannHead(WIDTH, c, k))):
        model = network(head, options.size)
        if model is None:
            break
        runs[name] = partial(step, model, trained(model), images, labels)
    steps = by_turns(runs)
    if steps:
        record.table(
            f"A training step of EfficientNet-Lite0, {options.images} images of {options.size} pixels, AdamW",
            ["head", "s", "x"],
            [[name, each, each / steps["linear"]] for name, each in steps.items()],
        )
        record.target(
            "training step with the Grassmann head over that with the linear one",
            steps["Grassmann"] / steps["linear"],
            most=1.25,
        )
    record.note(f"Floor: logits cost k = {k} times the multiply-adds of a linear layer, the step O(C d k²) more.")
    record.save(options.json)


if __name__ == "__main__":
    main()
