"""iREPA on real images: spatial normalisation of encoders' maps, and flow models that are pulled towards them."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from subspan.align import RepresentationAlignment
from subspan.datasets import cached_features, image_preprocessing, is_available, load, load_model
from subspan.measures import gram_agreement, spatial_structure
from subspan.models import Capture, FeatureGrid, ImagePreprocessing
from subspan.nn import FlowTransformer, PatchProjector, SpatialNorm
from subspan.nn.training import quiet_trainer

from .materials.image_features import LabelledImages, cached_maps, labelled_images
from .protocol import Check, Outcome, Progress, Table
from .trials import Column, Trials

MODELS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
SIZE, GRID = 160, 10
"""Input of the encoders, and the side that finer maps are averaged to before the metrics."""

TEACHER, TEACHER_LAYER, TEACHER_SIZE = "efficientnet-lite0", "_blocks.10", 128
"""A 112-channel map of stride 16: an 8 × 8 grid, as the student has."""

N_PHOTOGRAPHS, N_TRAIN, N_TEST = 200, 2000, 1000


def small_images(n_train: int = N_TRAIN) -> LabelledImages:
    """CIFAR-10 where the data folder has it, else crops of the bundled photographs; their classes, the photographs."""
    if is_available("cifar10"):
        return labelled_images("cifar10").first(n_train, N_TEST)
    generator = np.random.default_rng(0)
    found = load("photographs")
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for photograph in found.values():
        border = photograph.shape[1] * 3 // 4
        parts["train"].append(_crops(photograph[:, :border], n_train // 6, 64, 32, generator))
        parts["test"].append(_crops(photograph[:, border:], N_TEST // 6, 64, 32, generator))
    images = np.concatenate(parts["train"] + parts["test"])
    labels = np.concatenate([np.full(len(crops), label) for each in parts.values() for label, crops in enumerate(each)])
    index, border = np.arange(len(images)), sum(map(len, parts["train"]))
    return LabelledImages("crops of photographs", images, labels, index[:border], index[border:], tuple(found))


def photographs(n: int = N_PHOTOGRAPHS) -> tuple[str, Any]:
    """Photographs for the metrics: n of one image an ImageNet class, else crops of the bundled ones."""
    if is_available("imagenet1k_sample"):
        images = load("imagenet1k_sample").images
        return "images of ImageNet classes", images.subset(range(0, len(images), len(images) // n))
    generator = np.random.default_rng(0)
    crops = [_crops(each, n // 6 + 1, 256, 256, generator) for each in load("photographs").values()]
    return "crops of photographs", np.concatenate(crops)[:n]


def _crops(image: np.ndarray, n: int, side: int, size: int, generator: np.random.Generator) -> np.ndarray:
    top, left = (generator.integers(0, length - side + 1, n) for length in image.shape[:2])
    crops = np.stack([image[y : y + side, x : x + side] for y, x in zip(top, left)])
    pooled = crops.reshape(n, size, side // size, size, side // size, 3).mean((2, 4))
    return pooled.astype(np.uint8)


def block_maps(name: str, images: Any) -> list[Float[Tensor, "n d h w"]]:
    """Output of every block of an EfficientNet on `images`, averaged down to at most a 10 × 10 grid; float16."""
    model = load_model(name)
    prepare = ImagePreprocessing(resize="squash", **{**image_preprocessing(name), "size": SIZE})

    def maps(batch: Tensor) -> list[Tensor]:
        with Capture(model, "_blocks.*") as states:
            states.run(batch)
            return [F.adaptive_avg_pool2d(states[each], min(GRID, states[each].shape[-1])) for each in states.names]

    return cached_maps(model, prepare, maps, images, batch=8, about={"layers": "blocks", "grid": GRID})


def teacher_maps(images: np.ndarray) -> Float[Tensor, "n d h w"]:
    """The teacher's map of every image, enlarged to 128 pixels; float16."""
    model = load_model(TEACHER)
    prepare = ImagePreprocessing(resize="squash", **{**image_preprocessing(TEACHER), "size": TEACHER_SIZE})
    grid = FeatureGrid(model, TEACHER_LAYER, preprocessing=prepare)
    rows = cached_features(
        lambda start: (part.movedim(-1, 1).half() for part in grid.iterate(images[start:], 32)),
        model=model,
        data=images,
        options={"layer": TEACHER_LAYER, "size": TEACHER_SIZE, "dtype": "float16"},
    )
    return torch.from_numpy(np.array(rows))


@dataclass(frozen=True)
class Recipe:
    """Size and length of a training run."""

    steps: int = 150
    batch: int = 32
    width: int = 48
    depth: int = 3
    learning_rate: float = 2e-3
    weight: float = 0.5


TAP = "blocks.0"
"""A third of the depth."""

ARMS: dict[str, tuple[str, bool] | None] = {
    "none": None,
    "REPA": ("mlp", False),
    "convolution alone": ("conv", False),
    "norm alone": ("mlp", True),
    "iREPA": ("conv", True),
}
"""Projector and spatial normalisation of each arm; all projectors have the same number of parameters."""


@dataclass(frozen=True)
class Material:
    """Images in [-1, 1] with labels and the teacher's maps, to train on and held out."""

    image: Float[Tensor, "n 3 32 32"]
    label: Int[Tensor, " n"]
    teacher: Float[Tensor, "n d h w"]
    held_image: Float[Tensor, "m 3 32 32"]
    held_label: Int[Tensor, " m"]
    held_teacher: Float[Tensor, "m d h w"]


def material(data: LabelledImages, held_out: int) -> Material:
    """The images as tensors, with the teacher's maps from the cache."""
    parts: list[Tensor] = []
    for rows in (data.train, data.test[:held_out]):
        images = data.images[rows]
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts += [pixels, torch.from_numpy(data.labels[rows].astype(np.int64)), teacher_maps(images).float()]
    return Material(*parts)


def train(data: Material, arm: tuple[str, bool] | None, recipe: Recipe, seed: int) -> Any:
    """A flow model after `recipe.steps` steps; the same seed gives every arm the same denoiser, batches and noise."""
    from subspan.nn.flow_matching import FlowMatching

    torch.manual_seed(seed)
    denoiser = FlowTransformer(32, width=recipe.width, depth=recipe.depth, heads=4, classes=int(data.label.max()) + 1)
    alignment = None
    if arm is not None:
        kind, normalised = arm
        d = data.teacher.shape[1]
        size = 9 * recipe.width * d + d
        projector = PatchProjector(recipe.width, d, kind, hidden=PatchProjector.hidden_for(size, recipe.width, d))
        norm = SpatialNorm() if normalised else None
        alignment = RepresentationAlignment(denoiser, TAP, None, projector, norm, weight=recipe.weight)
    model = FlowMatching(denoiser, alignment=alignment, ema_decay=0.99)
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-recipe.steps * recipe.batch // len(data.image))
    order = torch.cat([torch.randperm(len(data.image), generator=generator) for _ in range(epochs)])
    batches = order[: recipe.steps * recipe.batch].split(recipe.batch)
    rows: Any = [{"image": data.image[i], "label": data.label[i], "teacher": data.teacher[i]} for i in batches]
    torch.manual_seed(seed)
    with quiet_trainer(max_epochs=1, gradient_clip_val=1.0) as trainer:
        objective = model.objective(learning_rate=recipe.learning_rate, warmup=20)
        trainer.fit(objective, torch.utils.data.DataLoader(rows, batch_size=None))
    return model.eval()


_AGREEMENT = "Gram agreement"
TIMES = (0.1, 0.3, 0.5, 0.7)
"""Noise levels of the held-out images that representations are compared on."""


@torch.no_grad()
def judge(model: Any, data: Material) -> dict[str, float]:
    """Held-out images with fixed noise: Gram agreement and structure at the tapped layer, and the denoising loss."""
    generator = torch.Generator().manual_seed(12345)
    teacher = data.held_teacher.flatten(2).mT
    normalised = SpatialNorm()(teacher)
    found: dict[str, list[float]] = {}
    for level in TIMES:
        noise = torch.randn(data.held_image.shape, generator=generator)
        time = torch.full((len(noise),), level)
        x = model.noised(data.held_image, time, noise)
        with Capture(model.denoiser, TAP) as states:
            model.denoiser(x, time, data.held_label)
            tokens = states[TAP]
        measured = {
            _AGREEMENT: gram_agreement(tokens, teacher),
            "with the normalised teacher": gram_agreement(tokens, normalised),
            **spatial_structure(tokens, metrics=("lds", "rmsc")),
            "denoising loss": model.denoising_loss(data.held_image, data.held_label, time, noise),
        }
        for name, value in measured.items():
            found.setdefault(name, []).append(float(value.mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def block_structure(name: str, maps: list[Tensor]) -> list[dict[str, Any]]:
    """Mean metrics of every block, as it is and after `SpatialNorm()`."""
    rows = []
    for index, block in enumerate(maps):
        h, w = block.shape[-2:]
        tokens = block.float().flatten(2).mT
        plain, normed = (spatial_structure(each, (h, w)) for each in (tokens, SpatialNorm()(tokens)))
        row: dict[str, Any] = {"encoder": name, "block": index, "grid": f"{h}×{w}", "late": h < GRID}
        for metric in plain:
            row[metric], row[f"{metric}, normalised"] = float(plain[metric].mean()), float(normed[metric].mean())
        rows.append(row)
    return rows


def mixing(data: Material, seed: int) -> list[list[float]]:
    """α, LDS and linear-probe accuracies (mean token, one random token) with α times the mean token added to each."""
    generator = torch.Generator().manual_seed(seed)
    parts = [part.flatten(2).mT for part in (data.teacher, data.held_teacher)]
    chosen = [torch.randint(part.shape[1], (len(part),), generator=generator) for part in parts]
    rows = []
    for alpha in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        mixed = [part + alpha * part.mean(1, keepdim=True) for part in parts]
        pooled = _probe(mixed[0].mean(1), data.label, mixed[1].mean(1), data.held_label)
        single = [part[torch.arange(len(part)), index] for part, index in zip(mixed, chosen)]
        lds = float(spatial_structure(mixed[1], metrics=["lds"])["lds"].mean())
        rows.append([alpha, lds, pooled, _probe(single[0], data.label, single[1], data.held_label)])
    return rows


def _probe(x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor) -> float:
    scaler = StandardScaler().fit(x.numpy())
    probe = LogisticRegression(C=0.01, max_iter=200).fit(scaler.transform(x.numpy()), y.numpy())
    return float(probe.score(scaler.transform(x_held.numpy()), y_held.numpy()))


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Metrics and normalisation on encoders' maps; then a flow model trained with none, REPA and iREPA, and between."""
    source, pictures = photographs(40 if quick else N_PHOTOGRAPHS)
    blocks: list[dict[str, Any]] = []
    for done, name in enumerate(MODELS[:1] if quick else MODELS):
        progress(f"maps of {name}", 0.1 * done)
        maps = block_maps(name, pictures)
        blocks += block_structure(name, maps)
    images = small_images(N_TRAIN // 2 if quick else N_TRAIN)
    progress("the teacher's maps", 0.3)
    data = material(images, 128 if quick else 256)
    mixed = mixing(data, seed)
    recipe = Recipe(steps=60) if quick else Recipe()
    arms = [name for name in ARMS if not quick or name in ("none", "REPA", "iREPA")]
    seeds = range(seed, seed + (1 if quick else 3))
    trials = Trials(
        arms,
        seeds,
        lambda arm, each: judge(train(data, ARMS[arm], recipe, each), data),
        progress=progress,
        span=(0.4, 1.0),
    )
    return Outcome(
        claim="What makes an encoder a good teacher for a diffusion transformer is spatial structure, not global "
        "information; a convolutional projector and spatial normalisation of the teacher's tokens (iREPA) transfer it "
        "better than REPA, which transfers some.",
        data=f"{len(pictures)} {source} for the metrics; {images.name}, {len(data.image)} images to train on and "
        f"{len(data.held_image)} held out",
        model=f"flow transformer of width {recipe.width} and depth {recipe.depth} on 32 pixels (8 × 8 tokens), "
        f"{recipe.steps} steps of {recipe.batch}, aligned after block 1; teacher {TEACHER} {TEACHER_LAYER}",
        metric="Gram agreement with the teacher on held-out images, at the aligned layer before the projector",
        ours=trials.mean("iREPA", _AGREEMENT),
        baselines=trials.means(_AGREEMENT, but="iREPA"),
        main=_over("iREPA", "REPA", trials),
        checks=[
            *_structure_checks(blocks, mixed),
            _over("REPA", "none", trials),
            *(
                Check.at_most(
                    f"denoising loss of iREPA beside {arm}",
                    "ratio of held-out losses",
                    trials.mean("iREPA", "denoising loss") / trials.mean(arm, "denoising loss"),
                    1,
                    required=False,
                )
                for arm in ("none", "REPA")
            ),
        ],
        tables=_tables(blocks, mixed, trials, seeds),
        notes=[
            "Sample quality is not claimed: no Fréchet distance was measured at this size and length.",
            "Gram agreement is measured against the teacher's tokens as they are, which is what REPA matches; the "
            "column beside it is against the normalised ones.",
            "All arms of a seed share initial denoiser, batches and noise; all projectors have the same number of "
            "parameters to within a percent, and every arm the same weight.",
            "The mean token stands in for the class token that the paper mixes in. It leaves the direction of the "
            "pooled feature as it is, so the probe on it is kept by construction; the probe on one token is not.",
            "The correlation of the metrics with generation quality over encoders was not repeated: it needs a trained "
            "generator an encoder.",
        ],
    )


def _over(arm: str, other: str, trials: Trials[str]) -> Check:
    gap = trials.gap(arm, other, _AGREEMENT, of=min)
    return Check.above(f"{arm} over {other}", "least difference in Gram agreement over seeds", gap, 0)


def _structure_checks(blocks: list[dict[str, Any]], mixed: list[list[float]]) -> list[Check]:
    late = [row for row in blocks if row["late"]]
    pooled = mixed[-1][2] - mixed[0][2]
    return [
        *(
            Check.above(
                f"normalisation raises {metric.upper()} of late blocks",
                "least gain over the stride-32 blocks of every encoder",
                min(row[f"{metric}, normalised"] - row[metric] for row in late),
                0,
                quick=True,
            )
            for metric in ("lds", "cds", "rmsc")
        ),
        Check.below(
            "mixing in the mean token lowers LDS step by step",
            "largest change of LDS from one α to the next",
            np.diff([row[1] for row in mixed]).max(),
            0,
            quick=True,
        ),
        Check.at_least("and keeps the pooled probe", "accuracy difference, α = 0.5 and 0", pooled, -0.01, quick=True),
    ]


def _tables(blocks: list[dict[str, Any]], mixed: list[list[float]], trials: Trials[str], seeds: range) -> list[Table]:
    last = {row["encoder"]: row["block"] for row in blocks}
    shown = [row for row in blocks if row["block"] % 5 == 0 or row["block"] == last[row["encoder"]]]
    columns = [name for name in blocks[0] if name != "late"]
    by_seed = {f"seed {seed}": Column(_AGREEMENT, itemgetter(place)) for place, seed in enumerate(seeds)}
    return [
        trials.table("training, means over seeds", "arm", {name: name for name in trials.runs["none"][0]}, digits=4),
        trials.table("Gram agreement by seed", "arm", by_seed, digits=4),
        Table.rounded(
            "spatial structure of encoders' blocks, before and after normalisation (γ = 0.8)",
            columns,
            [[row[name] for name in columns] for row in shown],
        ),
        Table.rounded(
            "α times the mean token added to every token of the teacher",
            ["α", "LDS", "probe on the mean token", "probe on one token"],
            mixed,
        ),
    ]
