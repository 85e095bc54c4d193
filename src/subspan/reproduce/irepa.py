"""iREPA on real images: spatial normalisation of encoders' maps, and flow models that are pulled towards them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from subspan.align import RepresentationAlignment
from subspan.base.modules import evaluation
from subspan.datasets import cached_features, image_preprocessing, is_available, load, load_model
from subspan.measures import gram_agreement, spatial_structure
from subspan.models import Capture, FeatureGrid, ImagePreprocessing
from subspan.nn import FlowTransformer, PatchProjector, SpatialNorm
from subspan.nn.training import quiet_trainer

from .protocol import Check, Outcome, Progress, Table

MODELS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
SIZE, GRID = 160, 10
"""Input of the encoders, and the side that finer maps are averaged to before the metrics."""

TEACHER, TEACHER_LAYER, TEACHER_SIZE = "efficientnet-lite0", "_blocks.10", 128
"""A 112-channel map of stride 16: an 8 × 8 grid, as the student has."""

N_PHOTOGRAPHS, N_TRAIN, N_TEST = 200, 2000, 1000


@dataclass(frozen=True)
class LabelledImages:
    """uint8 images (n, 32, 32, 3) with class labels, to train on and held out."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def small_images(n_train: int = N_TRAIN) -> LabelledImages:
    """CIFAR-10 where the data folder has it, else crops of the bundled photographs; their classes, the photographs."""
    if is_available("cifar10"):
        data = load("cifar10")
        train, test = (data[f"x_{part}"][:n] for part, n in (("train", n_train), ("test", N_TEST)))
        return LabelledImages("CIFAR-10", train, data["y_train"][:n_train], test, data["y_test"][:N_TEST])
    generator = np.random.default_rng(0)
    parts: dict[str, Any] = {"x_train": [], "y_train": [], "x_test": [], "y_test": []}
    for label, photograph in enumerate(load("photographs").values()):
        border = photograph.shape[1] * 3 // 4
        for part, side, n in (("train", photograph[:, :border], n_train), ("test", photograph[:, border:], N_TEST)):
            crops = _crops(side, n // 6, 64, 32, generator)
            parts[f"x_{part}"].append(crops)
            parts[f"y_{part}"].append(np.full(len(crops), label))
    return LabelledImages("crops of photographs", **{name: np.concatenate(each) for name, each in parts.items()})


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
    shapes: list[tuple[int, ...]] = []

    def maps(batch: Tensor) -> Tensor:
        with torch.no_grad(), evaluation(model), Capture(model, "_blocks.*") as states:
            states.run(batch)
            found = [F.adaptive_avg_pool2d(states[each], min(GRID, states[each].shape[-1])) for each in states.names]
        shapes[:] = [tuple(each.shape[1:]) for each in found]
        return torch.cat([each.flatten(1) for each in found], 1).half()

    def compute(start: int):
        for first in range(start, len(images), 8):
            yield maps(prepare.batch(images[index] for index in range(first, min(first + 8, len(images)))))

    rows = cached_features(
        compute, model=model, data=images, options={"layers": "blocks", "size": SIZE, "grid": GRID, "dtype": "float16"}
    )
    maps(torch.zeros(1, 3, SIZE, SIZE))
    parts = torch.from_numpy(np.array(rows)).split([int(np.prod(shape)) for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]


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

    def pixels(images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1

    return Material(
        pixels(data.x_train),
        torch.from_numpy(data.y_train.astype(np.int64)),
        teacher_maps(data.x_train).float(),
        pixels(data.x_test[:held_out]),
        torch.from_numpy(data.y_test[:held_out].astype(np.int64)),
        teacher_maps(data.x_test[:held_out]).float(),
    )


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
    order = torch.cat([torch.randperm(len(data.image), generator=generator) for _ in range(_epochs(data, recipe))])
    batches = order[: recipe.steps * recipe.batch].split(recipe.batch)
    rows: Any = [{"image": data.image[i], "label": data.label[i], "teacher": data.teacher[i]} for i in batches]
    torch.manual_seed(seed)
    with quiet_trainer(max_epochs=1, gradient_clip_val=1.0) as trainer:
        objective = model.objective(learning_rate=recipe.learning_rate, warmup=20)
        trainer.fit(objective, torch.utils.data.DataLoader(rows, batch_size=None))
    return model.eval()


def _epochs(data: Material, recipe: Recipe) -> int:
    return -(-recipe.steps * recipe.batch // len(data.image))


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
            "Gram agreement": gram_agreement(tokens, teacher),
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
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for done, (each, name) in enumerate((each, name) for each in seeds for name in arms):
        progress(f"{name}, seed {each}", 0.4 + 0.6 * done / (len(seeds) * len(arms)))
        runs[name].append(judge(train(data, ARMS[name], recipe, each), data))
    agreement = {name: [run["Gram agreement"] for run in each] for name, each in runs.items()}
    over_repa = min(a - b for a, b in zip(agreement["iREPA"], agreement["REPA"]))
    over_none = min(a - b for a, b in zip(agreement["REPA"], agreement["none"]))
    mean = {name: float(np.mean(values)) for name, values in agreement.items()}
    return Outcome(
        claim="What makes an encoder a good teacher for a diffusion transformer is spatial structure, not global "
        "information; a convolutional projector and spatial normalisation of the teacher's tokens (iREPA) transfer it "
        "better than REPA, which transfers some.",
        data=f"{len(pictures)} {source} for the metrics; {images.name}, {len(data.image)} images to train on and "
        f"{len(data.held_image)} held out",
        model=f"flow transformer of width {recipe.width} and depth {recipe.depth} on 32 pixels (8 × 8 tokens), "
        f"{recipe.steps} steps of {recipe.batch}, aligned after block 1; teacher {TEACHER} {TEACHER_LAYER}",
        metric="Gram agreement with the teacher on held-out images, at the aligned layer before the projector",
        ours=mean["iREPA"],
        baselines={name: value for name, value in mean.items() if name != "iREPA"},
        bar="iREPA > REPA > none for every seed",
        holds=over_repa > 0 and over_none > 0,
        checks=[*_structure_checks(blocks, mixed), *_training_checks(runs, over_repa, over_none)],
        tables=_tables(blocks, mixed, runs, seeds),
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


def _structure_checks(blocks: list[dict[str, Any]], mixed: list[list[float]]) -> list[Check]:
    late = [row for row in blocks if row["late"]]
    checks = []
    for metric in ("lds", "cds", "rmsc"):
        gain = min(row[f"{metric}, normalised"] - row[metric] for row in late)
        name = f"normalisation raises {metric.upper()} of late blocks"
        checks.append(Check(name, "least gain over the stride-32 blocks of every encoder", gain, "> 0", gain > 0))
    steps = np.diff([row[1] for row in mixed])
    pooled = mixed[-1][2] - mixed[0][2]
    return [
        *checks,
        Check(
            "mixing in the mean token lowers LDS step by step",
            "largest change of LDS from one α to the next",
            float(steps.max()),
            "< 0",
            bool((steps < 0).all()),
        ),
        Check("and keeps the pooled probe", "accuracy difference, α = 0.5 and 0", pooled, ">= -0.01", pooled >= -0.01),
    ]


def _training_checks(runs: dict[str, list[dict[str, float]]], over_repa: float, over_none: float) -> list[Check]:
    loss = {name: float(np.mean([run["denoising loss"] for run in each])) for name, each in runs.items()}
    return [
        Check("iREPA over REPA", "least difference in Gram agreement over seeds", over_repa, "> 0", over_repa > 0),
        Check("REPA over none", "least difference in Gram agreement over seeds", over_none, "> 0", over_none > 0),
        Check(
            "denoising loss of iREPA beside none",
            "ratio of held-out losses",
            loss["iREPA"] / loss["none"],
            "<= 1",
            loss["iREPA"] <= loss["none"],
            required=False,
        ),
        Check(
            "denoising loss of iREPA beside REPA",
            "ratio of held-out losses",
            loss["iREPA"] / loss["REPA"],
            "<= 1",
            loss["iREPA"] <= loss["REPA"],
            required=False,
        ),
    ]


def _tables(
    blocks: list[dict[str, Any]], mixed: list[list[float]], runs: dict[str, list[dict[str, float]]], seeds: range
) -> list[Table]:
    last = {row["encoder"]: row["block"] for row in blocks}
    shown = [row for row in blocks if row["block"] % 5 == 0 or row["block"] == last[row["encoder"]]]
    columns = [name for name in blocks[0] if name != "late"]
    names = list(next(iter(runs.values()))[0])
    return [
        Table(
            "training, means over seeds",
            ["arm", *names],
            [
                [arm, *(round(float(np.mean([run[name] for run in each])), 4) for name in names)]
                for arm, each in runs.items()
            ],
        ),
        Table(
            "Gram agreement by seed",
            ["arm", *(f"seed {seed}" for seed in seeds)],
            [[arm, *(round(run["Gram agreement"], 4) for run in each)] for arm, each in runs.items()],
        ),
        Table(
            "spatial structure of encoders' blocks, before and after normalisation (γ = 0.8)",
            columns,
            [[round(row[name], 4) if isinstance(row[name], float) else row[name] for name in columns] for row in shown],
        ),
        Table(
            "α times the mean token added to every token of the teacher",
            ["α", "LDS", "probe on the mean token", "probe on one token"],
            [[round(value, 4) for value in row] for row in mixed],
        ),
    ]
