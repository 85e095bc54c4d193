"""A pretrained network thinned by spatial attention: blocks replaced, beside the same blocks simply deleted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.datasets import image_preprocessing, load_model
from subspan.models import ImagePreprocessing, Surgery, multiply_adds, replace
from subspan.nn import SubspaceAttention, attention_entropy, shape_preserving_blocks

from .materials import LabelledImages, cached_maps, labelled_images, parameter_count
from .protocol import Check, Outcome, Progress, Table
from .training import one_cycle, train
from .trials import Column, Trials, spread

MODEL, SIZE, CUT = "efficientnet-lite0", 96, 8
"""The network, its input, and the block that the tail begins with: the first of the stage of 112 channels."""

N_TRAIN, N_TEST, BATCH, EPOCHS, RATE = 320, 480, 32, 2, 1e-3


class SqueezeExcite(nn.Module):
    """Channels reweighted by what their means say (Hu et al., 2018), with a bottleneck of a sixteenth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, channels // 16), nn.ReLU(), nn.Linear(channels // 16, channels), nn.Sigmoid()
        )

    def forward(self, x: Float[Tensor, "n m h w"]) -> Float[Tensor, "n m h w"]:
        """The reweighted maps."""
        return x * self.layers(x.mean((2, 3)))[..., None, None]


Maker = Callable[[int], nn.Module]
_WHOLE, _DELETED, _ONE, _FOUR = "the network as it is", "blocks deleted", "ULSAM, 1 group", "ULSAM, 4 groups"
ARMS: dict[str, Maker | None] = {
    _WHOLE: None,
    _DELETED: lambda channels: nn.Identity(),
    _ONE: lambda channels: SubspaceAttention(channels, 1),
    _FOUR: lambda channels: SubspaceAttention(channels, 4),
    "squeeze and excite": SqueezeExcite,
}


def tail(classes: int) -> nn.Sequential:
    """The network from block `CUT` on, with a head of its own."""
    model: Any = load_model(MODEL)
    parts = [model._conv_head, model._bn1, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes)]
    made = copy.deepcopy(nn.Sequential(*model._blocks[CUT:], *parts)).requires_grad_(True)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            # The network's own 0.01 would keep the statistics of the whole network through a short fine-tuning.
            part.momentum = 0.1
    return made


def middle_blocks(model: nn.Sequential, x: Float[Tensor, "n m h w"]) -> list[str]:
    """A repeated block in the middle of each of the stages of 112 and 192 channels: the headline's two."""
    widths: dict[int, list[str]] = {}
    for name, shape in shape_preserving_blocks(model, x).items():
        widths.setdefault(shape[1], []).append(name)
    return [names[len(names) // 2] for channels, names in sorted(widths.items()) if channels in (112, 192)]


def operate(model: nn.Sequential, names: list[str], make: Maker | None, x: Float[Tensor, "n m h w"]) -> Surgery | None:
    """Put an arm's layers in the places of the named blocks."""
    if make is None:
        return None
    shapes = shape_preserving_blocks(model, x)
    return replace(model, {name: make(shapes[name][1]) for name in names}, x)


def stage_inputs(images: np.ndarray) -> Float[Tensor, "n m h w"]:
    """What reaches the tail, for every image; float16 in the cache."""
    model: Any = load_model(MODEL)
    prepare = ImagePreprocessing(**{**image_preprocessing(MODEL), "size": SIZE, "crop_fraction": 1.0})

    def maps(batch: Tensor) -> list[Tensor]:
        x = model._swish(model._bn0(model._conv_stem(batch)))
        for block in model._blocks[:CUT]:
            x = block(x)
        return [x]

    (found,) = cached_maps(model, prepare, maps, images, batch=16, about={"input of block": CUT})
    return found.float()


def tune(model: nn.Sequential, x: Any, y: Any, epochs: int, seed: int) -> float:
    """Test accuracy, percent, of a fine-tuned tail; all arms of a seed see the same batches."""
    generator = torch.Generator().manual_seed(seed)
    rows = [part for _ in range(epochs) for part in torch.randperm(len(y["train"]), generator=generator).split(BATCH)]
    batches = [(x["train"][each], y["train"][each]) for each in rows]
    torch.manual_seed(seed)
    train(
        model.train(),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        batches,
        learning_rate=RATE,
        optimizer="adamw",
        weight_decay=1e-2,
        schedule=one_cycle(0.1),
        clip=1.0,
    )
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in x["test"].split(250)])
    return 100 * float((predicted == y["test"]).double().mean())


def material(most: int | None = None) -> tuple[LabelledImages, dict[str, Tensor], dict[str, Tensor]]:
    """Pictures, the maps of both parts that reach the tail, and their classes; of at most so many of each part."""
    data = labelled_images("cifar10").first(N_TRAIN, N_TEST)
    images = data.images.astype(np.uint8)
    images = images if images.ndim == 4 else images[..., None].repeat(3, -1)
    x = {part: stage_inputs(rows)[:most] for part, rows in data.split(images).items()}
    y = {part: torch.from_numpy(rows[:most]) for part, rows in data.split(data.labels.astype(np.int64)).items()}
    return data, x, y


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Fine-tune every arm from the same pretrained tail."""
    progress("maps that reach the tail", 0.0)
    data, x, y = material(128 if quick else None)
    epochs, seeds = (1, 1) if quick else (EPOCHS, 3)
    names = middle_blocks(tail(10), x["test"][:1])
    entropies: dict[str, list[list[Any]]] = {}

    def measure(arm: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = tail(10)
        operate(model, names, ARMS[arm], x["test"][:1])
        cost = {"parameters": parameter_count(model), "multiply-adds": multiply_adds(model, x["test"][:1])}
        accuracy = tune(model, x, y, epochs, seed)
        entropies[arm] = _entropies(model, x["test"][:250])
        return {"accuracy": accuracy, **cost}

    arms = [_WHOLE, _DELETED, _FOUR] if quick else list(ARMS)
    trials = Trials(arms, range(seed, seed + seeds), measure, progress=progress, span=(0.05, 1.0))
    mean = trials.means("accuracy")
    best = max((arm for arm in arms if arm.startswith("ULSAM")), key=lambda arm: mean[arm])
    gain = mean[best] - mean[_DELETED]
    between_seeds = float(np.mean(list(trials.means("accuracy", of=np.ptp).values())))
    saved = 1 - trials.mean(best, "multiply-adds") / trials.mean(_WHOLE, "multiply-adds")
    checks = [
        Check.at_least("beside the whole network", "points, mean of seeds", mean[best] - mean[_WHOLE], -1),
        Check.above("multiply-adds drop", "share of the tail's", saved, 0.05, quick=True),
        Check.above(
            "beyond the spread of seeds",
            "gain over deletion less the mean range of seeds, points",
            gain - between_seeds,
            0,
            required=False,
        ),
    ]
    if _ONE in mean:
        gap = trials.gap(_FOUR, _ONE, "accuracy")
        checks.append(Check.above("several groups over one", "points, mean of seeds", gap, 0, required=False))
    return Outcome(
        claim="Two residual blocks of MobileNet-V2 replaced by spatial attention maps of groups of channels: 71.52 on "
        "ImageNet with 2.96 M parameters and 262 M multiply-adds, against 71.25 with 3.4 M and 300 M.",
        data=f"{data.name}, {len(y['train'])} training and {len(y['test'])} test pictures at {SIZE} pixels",
        model=f"{MODEL} from block {CUT} on, pretrained, blocks {' and '.join(str(CUT + int(n)) for n in names)} "
        f"replaced; {epochs} epochs of AdamW",
        metric="test accuracy (percent) of the best number of groups, mean of seeds",
        ours=mean[best],
        baselines={arm: value for arm, value in mean.items() if arm != best},
        main=Check.at_least("beside the same blocks deleted", "points, mean of seeds", gain, 0),
        checks=checks,
        tables=[
            trials.table(
                "fine-tuned tails",
                "arm",
                {
                    **spread("accuracy", "accuracy"),
                    "parameters": Column("parameters", max),
                    "multiply-adds a picture": Column("multiply-adds", max),
                },
            ),
            Table(
                "entropy of the maps over that of a uniform one, after training, last seed",
                ["arm", "block", "lowest group", "highest group"],
                [[arm, *row] for arm, rows in entropies.items() for row in rows],
            ),
        ],
        notes=[
            "No such control was published: without it a gain over the whole network may be that of a shorter one.",
            "The paper trains from scratch on ImageNet; here a pretrained tail is fine-tuned briefly.",
        ],
    )


def _entropies(model: nn.Sequential, x: Float[Tensor, "n m h w"]) -> list[list[Any]]:
    rows = []
    with torch.no_grad():
        for number, part in enumerate(model):
            if isinstance(part, SubspaceAttention):
                found = attention_entropy(part.attention(x))
                rows.append([CUT + number, round(float(found.min()), 4), round(float(found.max()), 4)])
            x = part(x)
    return rows
