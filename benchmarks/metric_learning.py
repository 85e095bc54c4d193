"""Losses of pairs with their gradient, beside pytorch-metric-learning's on the same rows and the same pairs.

Hydra's rival (supervised contrast) and the loss of Dynamic Subspace Learners (margin, nearest negatives). Its loss of
pairs takes lists of index triplets, ours masks. Run: python benchmarks/metric_learning.py [--batch 1024] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from torch.nn import functional as F

from record import Record, by_turns, parser
from subspan.nn import info_nce
from subspan.represent import MarginLoss, NearestNegativeSampler

TEMPERATURE, BETA, MARGIN = 0.1, 1.2, 0.2


def contrast(z: Tensor, labels: Tensor) -> Tensor:
    itself = torch.eye(len(z), dtype=torch.bool)
    return info_nce(z, z, (labels[:, None] == labels) & ~itself, itself, temperature=TEMPERATURE)


class Fixed(nn.Module):
    """Masks that are given, in place of a sampler."""

    def __init__(self, *masks: Tensor) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, distances: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return self.masks


def triplets(positives: Tensor, negatives: Tensor) -> Tensor:
    """Pairs of masks as index triplets: an anchor's i-th positive with its i-th negative, as many of both."""
    anchors, near = positives.nonzero().T
    others, far = negatives.nonzero().T
    assert anchors.equal(others)
    return torch.stack([anchors, near, far])


def step(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z.grad = None
    value = loss(z)
    value.backward()
    assert z.grad is not None
    return value.detach(), z.grad


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=1024)
    arguments.add_argument("--dim", type=int, default=128)
    options = arguments.parse_args()
    torch.manual_seed(0)
    labels = torch.randint(options.batch // 16, (options.batch,))
    z = F.normalize(torch.randn(options.batch, options.dim), dim=-1).requires_grad_()
    ours, theirs = MarginLoss(BETA, MARGIN), losses.MarginLoss(MARGIN, beta=BETA)
    theirs_contrast = losses.SupConLoss(TEMPERATURE)
    with torch.no_grad():
        masks = NearestNegativeSampler()(torch.cdist(z, z), labels)
        pairs = tuple(triplets(*masks))
    given = MarginLoss(BETA, MARGIN, Fixed(*masks))
    forms: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
        "supervised contrast": {
            "subspan": lambda z: contrast(z, labels),
            "pytorch-metric-learning": lambda z: theirs_contrast(z, labels),
        },
        "margin, the same pairs": {
            "subspan": lambda z: given(F.normalize(z, dim=-1), labels),
            "pytorch-metric-learning": lambda z: theirs(z, labels, pairs),
        },
        "margin and sampling of pairs": {
            "subspan": lambda z: ours(F.normalize(z, dim=-1), labels),
            "pytorch-metric-learning": sampled(labels),
        },
    }
    record = Record("metric_learning", f"{options.batch} rows of {options.dim} dimensions, 16 a class, float32")
    rows = []
    for name, pair in forms.items():
        seconds = by_turns({who: lambda loss=loss: step(loss, z) for who, loss in pair.items()})
        mine, other = seconds.values()
        (value, slope), (their_value, their_slope) = (step(loss, z) for loss in pair.values())
        apart = float((value - their_value).abs() / value)
        rows.append([name, 1e3 * mine, 1e3 * other, other / mine, apart, float((slope - their_slope).abs().max())])
        if "and" not in name:
            record.target(f"{name}: relative difference of the losses", apart, most=1e-5)
        record.target(f"{name}: times as fast", other / mine, least=1)
    columns = ["loss and gradient", "subspan ms", "pytorch-metric-learning ms", "times", "apart", "gradients apart"]
    record.table("Beside pytorch-metric-learning", columns, rows)
    record.note("The last row compares time only: its miner draws negatives by distance, ours takes the nearest.")
    record.save(options.json)


def sampled(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Its margin loss behind its own miner of weighted draws, the published partner of this loss."""
    miner, loss = (
        miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4),
        losses.MarginLoss(MARGIN, beta=BETA),
    )
    return lambda z: loss(z, labels, miner(z, labels))


if __name__ == "__main__":
    main()
