"""Spectrum-aware test-time steering on small pictures under noise, low contrast, coarse pixels and blur.

Two joint image-text spaces made of installed models stand in for CLIP: a linear one, in which a ridge map takes
sentence embeddings of ImageNet's class names to the rows of an ImageNet classifier, and the trained dual encoder.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_type_hints

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import normalize_rows, save_arrays, saved_object
from subspan.datasets import is_available, load, load_model, load_sentence_encoder
from subspan.datasets.cache import entry_folder, whole_folder
from subspan.edit import (
    ENSEMBLE_TEMPLATES,
    SINGLE_TEMPLATE,
    ConfidentAverage,
    PrototypeShift,
    SpectralSteering,
    gaussian_blur,
    marginal_entropy,
    select_confident,
    zero_shot_prototypes,
)
from subspan.geometry import Subspace
from subspan.geometry.grassmann import random_basis
from subspan.measures import expected_calibration_error, paired_bootstrap
from subspan.models import ImageEncoder, SentenceEncoder, image_tensor
from subspan.models.views import random_views
from subspan.statistics import JointMoments

from .materials.image_features import image_encoder
from .materials.shared_space import dual_encoder
from .protocol import Check, Outcome, Progress, Table

SHIFTS = ("noise", "contrast", "pixelate", "blur")

# Strengths at severity 3, 4, 5 (Hendrycks & Dietterich, 2019): CIFAR-10-C for small pictures, ImageNet-C for large.
_SMALL = {
    "noise": (0.08, 0.09, 0.10),
    "contrast": (0.4, 0.3, 0.15),
    "pixelate": (0.85, 0.75, 0.65),
    "blur": (0.7, 0.8, 1.0),
}
_LARGE = {
    "noise": (0.18, 0.26, 0.38),
    "contrast": (0.2, 0.1, 0.05),
    "pixelate": (0.4, 0.3, 0.25),
    "blur": (3.0, 4.0, 6.0),
}


@dataclass(frozen=True)
class Sample:
    """Pooled features of the views of some pictures (b, n, d), the original first, with the pictures' classes (b,)."""

    features: Float[Tensor, "b n d"]
    labels: Int[Tensor, " b"]


@dataclass(frozen=True)
class Draw:
    """Which pictures, how disturbed, and how they are seen; all that the features depend on."""

    source: str
    split: str
    shift: str
    images: int
    views: int
    seed: int
    size: int = 128
    crop_scale: tuple[float, float] = (0.08, 1.0)

    @property
    def key(self) -> str:
        """Digest of all fields, which names the cached features."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def corrupt(image: Float[Tensor, "3 h w"], shift: str, severity: int, generator: torch.Generator) -> Tensor:
    """A picture in [0, 1] under one of SHIFTS at severity 3, 4 or 5; "clean" leaves it as it is."""
    if shift == "clean":
        return image
    strength = (_SMALL if min(image.shape[1:]) < 64 else _LARGE)[shift][severity - 3]
    if shift == "noise":
        changed = image + strength * torch.randn(image.shape, generator=generator)
    elif shift == "contrast":
        mean = image.mean((1, 2), keepdim=True)
        changed = (image - mean) * strength + mean
    elif shift == "pixelate":
        height, width = image.shape[-2:]
        small = F.interpolate(image[None], size=(int(height * strength), int(width * strength)), mode="area")
        changed = F.interpolate(small, size=(height, width), mode="nearest")[0]
    else:
        changed = gaussian_blur(image[None], sigma=strength)[0]
    return changed.clamp(0, 1)


def pictures(source: str, split: str) -> tuple[Any, Tensor, list[str]]:
    """Pictures, their classes, and the class names; "imagenet1k_sample" has one picture a class and no splits."""
    data = load(source)
    if source == "digits":
        words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        # The rows that the dual encoder's recipe leaves for testing.
        kept = np.flatnonzero((np.arange(len(data["y"])) % 10 > 7) == (split == "test"))
        names = [f"handwritten digit {word}" for word in words]
        return data["x"][kept] * 15, torch.from_numpy(data["y"][kept]).long(), names
    if source == "imagenet1k_sample":
        names = [f"{', '.join(record['synonyms'])}: {record['gloss']}" for record in data.records]
        return data.images, torch.arange(len(names)), names
    names = [str(name).replace("_", " ") for name in data["classes"]]
    return data[f"x_{split}"], torch.from_numpy(data[f"y_{split}"]).long(), names


def sample(draw: Draw, progress: Callable[[float], None] = lambda fraction: None) -> Sample:
    """Features of the views of a stratified draw of pictures, from the cache where they are there."""
    folder = entry_folder("sts-views", draw.key)
    with whole_folder(folder) as unfinished:
        if unfinished is not None:
            save_arrays(unfinished / "views.safetensors", "views", _encode(draw, progress), **asdict(draw))
    schema = {"features": Float[Tensor, "n v d"], "labels": Int[Tensor, " n"]}
    with saved_object(folder / "views.safetensors", "views", schema, get_type_hints(Draw)) as (arrays, _):
        return Sample(arrays["features"], arrays["labels"])


def _encode(draw: Draw, progress: Callable[[float], None]) -> dict[str, Tensor]:
    images, y, names = pictures(draw.source, draw.split)
    # The same seed gives every shift other pictures, so that the union over shifts is as varied as it is large.
    place = ("clean", *SHIFTS).index(draw.shift)
    generator = torch.Generator().manual_seed(1000 * draw.seed + place)
    order = torch.randperm(len(y), generator=generator)
    each = -(-draw.images // len(names))
    chosen = torch.cat([order[y[order] == label][:each] for label in range(len(names))])
    chosen = chosen[torch.randperm(len(chosen), generator=generator)][: draw.images]
    whole = image_encoder(draw.size)
    preprocessing: Any = whole.preprocessing
    whole.model.to(memory_format=torch.channels_last)
    encoder = ImageEncoder(whole.model, lambda view: view, forward=whole.forward)
    features = []
    for number, index in enumerate(chosen.tolist()):
        image = corrupt(image_tensor(images[index]), draw.shift, 3 + number % 3, generator)
        views = random_views(image, draw.views, preprocessing, scale=draw.crop_scale, generator=generator)
        # Small batches stay in the cache of the processor, which is three times faster here.
        views = views.contiguous(memory_format=torch.channels_last)
        features.append(torch.from_numpy(encoder.encode(views, 16)).half())
        progress((number + 1) / len(chosen))
    return {"features": torch.stack(features), "labels": y[chosen]}


# ---------------------------------------------------------------- joint spaces


@dataclass(frozen=True)
class JointSpace:
    """Heads that take image features and sentence embeddings to one space, and the factor of cosines there."""

    name: str
    image_head: Callable[[Tensor], Tensor]
    text_head: Callable[[Tensor], Tensor]
    logit_scale: float

    def views(self, drawn: Sample) -> Float[Tensor, "b n d"]:
        """Unit embeddings of the views of a sample."""
        flat = self.image_head(drawn.features.float().flatten(0, 1))
        return normalize_rows(flat).unflatten(0, drawn.features.shape[:2])

    def prototypes(self, encoder: SentenceEncoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit prototypes of class names."""

        def encode(texts: list[str]) -> Tensor:
            return self.text_head(torch.from_numpy(encoder.encode(texts)))

        return zero_shot_prototypes(encode, names, templates)


def classifier_rows() -> Float[Tensor, "c d"]:
    """The rows of EfficientNet-Lite0's ImageNet classifier without their mean, which no softmax sees."""
    rows: Tensor = load_model("efficientnet-lite0").get_parameter("_fc.weight").detach()
    return rows - rows.mean(0)


def linear_space(
    embeddings: Float[Tensor, "c e"], rows: Float[Tensor, "c d"], feature_mean: Float[Tensor, " d"], logit_scale: float
) -> JointSpace:
    """Sentence embeddings of class names sent to their classifier rows by ridge; features need only be centred."""
    fold = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)) % 5

    def held_out_cosine(alpha: float) -> float:
        cosines = []
        for number in range(5):
            kept = fold != number
            fitted = JointMoments(embeddings.shape[1], rows.shape[1]).update(embeddings[kept], rows[kept])
            predicted = fitted.ridge(alpha).map(embeddings[~kept])
            cosines.append(F.cosine_similarity(predicted, rows[~kept]).mean())
        return float(torch.stack(cosines).mean())

    alpha = max((0.3, 1.0, 3.0, 10.0), key=held_out_cosine)
    mapped = JointMoments(embeddings.shape[1], rows.shape[1]).update(embeddings, rows).ridge(alpha).to(torch.float32)
    return JointSpace(
        f"ridge map from MiniLM to EfficientNet-Lite0 classifier rows (alpha {alpha:g})",
        lambda features: features - feature_mean,
        mapped.map,
        logit_scale,
    )


def fitted_logit_scale(views: Float[Tensor, "b d"], prototypes: Float[Tensor, "c d"], labels: Tensor) -> float:
    """The factor of cosines with the lowest cross-entropy on labelled rows (temperature scaling)."""
    cosines = views @ prototypes.mT
    grid = torch.logspace(math.log10(5), math.log10(200), 60).tolist()
    return min(grid, key=lambda scale: float(F.cross_entropy(scale * cosines, labels)))


# ---------------------------------------------------------------- methods


def prompt_tuning(
    space: JointSpace,
    encoder: SentenceEncoder,
    names: Sequence[str],
    views: Float[Tensor, "b n d"],
    *,
    lr: float = 5e-3,
) -> Float[Tensor, "b c"]:
    """Test-time prompt tuning: one AdamW step on the context tokens, back through the text tower, for each image."""
    model = encoder.model
    tokens = encoder.tokenizer([f"a photo of a {name}." for name in names], padding=True, return_tensors="pt")
    mask = tokens["attention_mask"]
    words = model.get_input_embeddings()(tokens["input_ids"]).detach()
    context = slice(1, 5)  # "a photo of a", after the opening token

    def prototypes(offset: Tensor) -> Tensor:
        prompted = torch.cat([words[:, :1], words[:, context] + offset, words[:, context.stop :]], dim=1)
        states = model(inputs_embeds=prompted, attention_mask=mask).last_hidden_state
        pooled = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(space.text_head(F.normalize(pooled, dim=-1)), dim=-1)

    probabilities = []
    for image in views:
        offset = torch.zeros(4, words.shape[-1], requires_grad=True)
        optimizer = torch.optim.AdamW([offset], lr)
        cosines = image @ prototypes(offset).mT
        kept, _ = select_confident(space.logit_scale * cosines.detach(), 0.1)
        marginal_entropy(space.logit_scale * cosines[kept]).backward()
        optimizer.step()
        with torch.no_grad():
            adapted = space.logit_scale * image[kept] @ prototypes(offset).mT
            probabilities.append(adapted.softmax(-1).mean(0))
    return torch.stack(probabilities)


def methods(prototypes: Tensor, ensemble: Tensor | None, scale: float, seed: int) -> dict[str, nn.Module]:
    """Every row of the comparison by its name."""
    steering = SpectralSteering(prototypes, scale)
    k, d = steering.subspace.dim, prototypes.shape[1]
    random = Subspace.random(d, k, generator=torch.Generator().manual_seed(seed))
    compared: dict[str, nn.Module] = {
        "zero-shot, original view": ConfidentAverage(prototypes, scale, predict="original"),
        "average of all views": ConfidentAverage(prototypes, scale, keep=1.0),
        "confident-view average": ConfidentAverage(prototypes, scale),
        "TPS shared": PrototypeShift(prototypes, scale),
        "TPS per class": PrototypeShift(prototypes, scale, per_class=True),
        "TPS shared, confident mean": PrototypeShift(prototypes, scale, predict="confident_mean"),
        "random basis, equal k": SpectralSteering(prototypes, scale, subspace=random),
        "STS, SGD": SpectralSteering(prototypes, scale, optimizer="sgd"),
        "STS": steering,
        "STS, 5 steps, reg 0.1": SpectralSteering(prototypes, scale, steps=5, reg=0.1),
        "STS, original view": SpectralSteering(prototypes, scale, predict="original"),
        "STS, centred SVD": SpectralSteering(prototypes, scale, center=True),
        "STS, per class": SpectralSteering(prototypes, scale, per_class=True),
    }
    if ensemble is not None:
        compared["confident-view average, ensemble"] = ConfidentAverage(ensemble, scale)
        compared["STS, ensemble"] = SpectralSteering(ensemble, scale)
    return compared


@dataclass(frozen=True)
class Setting:
    """One classification problem: a space, the prototypes in it, and the views of the pictures by (shift, seed)."""

    title: str
    space: JointSpace
    prototypes: Tensor
    ensemble: Tensor | None
    views: dict[tuple[str, int], Tensor]
    labels: dict[tuple[str, int], Tensor]

    @property
    def shifted(self) -> list[tuple[str, int]]:
        """The disturbed parts."""
        return [part for part in self.views if part[0] != "clean"]

    def joined(self, parts: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        """Views and labels of several parts."""
        return torch.cat([self.views[part] for part in parts]), torch.cat([self.labels[part] for part in parts])

    def probabilities(self) -> dict[str, dict[tuple[str, int], Tensor]]:
        """Class probabilities of each method and part."""
        found: dict[str, dict[tuple[str, int], Tensor]] = {}
        for part, views in self.views.items():
            for name, method in methods(self.prototypes, self.ensemble, self.space.logit_scale, part[1]).items():
                found.setdefault(name, {})[part] = method(views)
        return found


class Scores:
    """Accuracy, calibration and paired differences of the methods of one setting on its disturbed pictures."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.probabilities = setting.probabilities()
        self.parts = setting.shifted
        self.labels = setting.joined(self.parts)[1]

    def joined(self, name: str) -> Tensor:
        """Probabilities of a method on all disturbed pictures."""
        return torch.cat([self.probabilities[name][part] for part in self.parts])

    def right(self, name: str) -> Tensor:
        """1 where the method is right, else 0, in per cent."""
        return 100 * (self.joined(name).argmax(-1) == self.labels).double()

    def accuracy(self, name: str) -> float:
        """Per cent right."""
        return float(self.right(name).mean())

    def against(self, name: str, other: str) -> tuple[float, float, float]:
        """Points gained on another method, with a 95 % interval."""
        return paired_bootstrap(self.right(name), self.right(other))

    def table(self) -> Table:
        """All methods side by side."""
        columns = ["method", "accuracy %", "against zero-shot", "against confident average", "ECE", "clean %"]
        clean = [part for part in self.setting.views if part[0] == "clean"]
        shifts = [shift for shift in SHIFTS if any(part[0] == shift for part in self.parts)]
        rows = []
        for name in self.probabilities:
            row = [name, _points(self.accuracy(name))]
            row += [_interval(self.against(name, other)) for other in (_ZERO_SHOT, _CONFIDENT)]
            row.append(f"{expected_calibration_error(self.joined(name), self.labels):.3f}")
            for parts in ([clean] if clean else []) + [[p for p in self.parts if p[0] == shift] for shift in shifts]:
                answers = torch.cat([self.probabilities[name][part] for part in parts]).argmax(-1)
                truth = torch.cat([self.setting.labels[part] for part in parts])
                row.append(_points(100 * float((answers == truth).double().mean())))
            rows.append(row)
        columns = [*(columns if clean else columns[:-1]), *shifts]
        return Table(f"{self.setting.title}: {len(self.labels)} disturbed pictures", columns, rows)


_ZERO_SHOT = "zero-shot, original view"
_CONFIDENT = "confident-view average"


def _points(value: float) -> str:
    return f"{value:.1f}"


def _interval(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def sweep(setting: Setting) -> tuple[Table, Table, list[tuple[float, float]]]:
    """Accuracy over the number of directions, and over the step size; the latter also as (lr, accuracy) pairs."""
    views, labels = setting.joined(setting.shifted)
    scale, prototypes = setting.space.logit_scale, setting.prototypes

    def row(**options: Any) -> list[Any]:
        steering = SpectralSteering(prototypes, scale, **options)
        report = steering.explain(views)
        accuracy = 100 * float((report.probabilities.argmax(-1) == labels).double().mean())
        return [
            accuracy,
            float(report.entropy_before.mean()),
            float(report.entropy_after.mean()),
            steering.subspace.dim,
        ]

    most = min(*prototypes.shape)
    ranks = [k for k in (1, 2, 3, 4, 6, 9, 16, 32, 64) if k < most]
    by_rank = [[k, *(_shown(value) for value in row(rank=k)[:3])] for k in ranks]
    rates = (1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)
    by_rate = [(lr, row(rank=min(6, most), learning_rate=lr)) for lr in rates]
    measured = ["accuracy %", "entropy before", "entropy after"]
    return (
        Table("Number of directions k_t, lr 5e-3", ["k_t", *measured], by_rank),
        Table(
            f"Step size, k_t = {min(6, most)}",
            ["lr", *measured],
            [[lr, *(_shown(v) for v in values[:3])] for lr, values in by_rate],
        ),
        [(lr, values[0]) for lr, values in by_rate],
    )


def _shown(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def rotation_effect(setting: Setting, lr: float = 5e-3) -> dict[str, float]:
    """Mean change (total variation) of the probabilities when the basis is turned inside its span, by optimiser."""
    views, _ = setting.joined(setting.shifted)
    subspace = Subspace.fit(setting.prototypes, rank=min(6, *setting.prototypes.shape), center=False)
    turn = random_basis(subspace.dim, subspace.dim, generator=torch.Generator().manual_seed(0)).to(subspace.basis)
    changes = {}
    for optimizer in ("adamw", "sgd"):
        given, turned = (
            SpectralSteering(
                setting.prototypes, setting.space.logit_scale, subspace=basis, optimizer=optimizer, learning_rate=lr
            )(views)
            for basis in (subspace, Subspace.span(subspace.basis @ turn))
        )
        changes[optimizer] = 0.5 * float((given - turned).abs().sum(-1).mean())
    return changes


def cost(setting: Setting, encoder: SentenceEncoder, names: Sequence[str], count: int) -> tuple[Table, float, float]:
    """Time and memory per image beyond encoding; milliseconds of the batch, and prompt tuning's multiple of them.

    Processor time summed over threads, so that other work on the machine does not count.
    """
    views, labels = setting.joined(setting.shifted)
    chosen = torch.randperm(len(views), generator=torch.Generator().manual_seed(0))[:count]
    few, truth = views[chosen], labels[chosen]
    steering = SpectralSteering(setting.prototypes, setting.space.logit_scale)
    rows = []

    def measure(name: str, images: int, run: Callable[[], Tensor], repeats: int) -> float:
        run()
        seconds = []
        for _ in range(repeats):
            started = time.process_time()
            answer = run()
            seconds.append(time.process_time() - started)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
        each = 1000 * min(seconds) / images
        accuracy = 100 * float((answer == truth).double().mean()) if len(answer) == len(truth) else float("nan")
        shown = _points(accuracy) if math.isfinite(accuracy) else "see above"
        rows.append([name, images, f"{each:.3f}", f"{taken / images / 2**20:.2f}", shown])
        return each

    batch = measure("STS, one batch", len(views), lambda: steering(views).argmax(-1), 5)
    measure("STS, image by image", count, lambda: torch.cat([steering(image) for image in few]).argmax(-1), 3)
    tuned = measure(
        "prompt tuning through MiniLM",
        count,
        lambda: prompt_tuning(setting.space, encoder, names, few).argmax(-1),
        1,
    )
    columns = ["adaptation", "images", "processor ms an image", "MiB allocated an image", "accuracy %"]
    return Table(f"Cost beyond encoding the views, {len(names)} classes", columns, rows), batch, tuned / batch


# ---------------------------------------------------------------- the protocol


def _setting(title: str, space: JointSpace, encoder: SentenceEncoder, names: Sequence[str], drawn: dict) -> Setting:
    return Setting(
        title,
        space,
        space.prototypes(encoder, names, SINGLE_TEMPLATE),
        space.prototypes(encoder, names, ENSEMBLE_TEMPLATES),
        {part: space.views(found) for part, found in drawn.items()},
        {part: found.labels for part, found in drawn.items()},
    )


def _cifar_linear(encoder: SentenceEncoder, pictures_used: int) -> JointSpace:
    """The linear space, centred and scaled on CIFAR-100 pictures, whose names are not those under test."""
    records = load("imagenet1k_sample").records
    embeddings = encoder.encode([SINGLE_TEMPLATE[0].format(record["name"]) for record in records])
    other = sample(Draw("cifar100", "train", "clean", pictures_used, 1, 0))
    mean = other.features[:, 0].float().mean(0)
    space = linear_space(torch.from_numpy(embeddings), classifier_rows(), mean, 1.0)
    prototypes = space.prototypes(
        encoder, [str(name).replace("_", " ") for name in load("cifar100")["classes"]], SINGLE_TEMPLATE
    )
    return replace(space, logit_scale=fitted_logit_scale(space.views(other)[:, 0], prototypes, other.labels))


def _imagenet(encoder: SentenceEncoder, logit_scale: float, seed: int) -> Setting:
    """ImageNet pictures among the classes drawn, whose rows the ridge map has not seen; texts are glosses."""
    drawn = {(shift, seed): sample(Draw("imagenet1k_sample", "all", shift, 50, 32, seed)) for shift in SHIFTS}
    classes = torch.cat([found.labels for found in drawn.values()]).unique()
    _, _, names = pictures("imagenet1k_sample", "all")
    kept = torch.ones(len(names), dtype=torch.bool)
    kept[classes] = False
    clean = sample(Draw("imagenet1k_sample", "all", "clean", 100, 1, seed))
    mean = clean.features[kept[clean.labels], 0].float().mean(0)
    embeddings = torch.from_numpy(encoder.encode(names))
    space = linear_space(embeddings[kept], classifier_rows()[kept], mean, logit_scale)
    prototypes = space.prototypes(encoder, [names[i] for i in classes.tolist()], ("{}",))
    return Setting(
        f"{len(classes)} ImageNet classes held out of the map, severity 3 to 5, views of 8 to 100 % of the area",
        space,
        prototypes,
        None,
        {part: space.views(found) for part, found in drawn.items()},
        {part: torch.searchsorted(classes, found.labels) for part, found in drawn.items()},
    )


def _chosen_crop(space: JointSpace, encoder: SentenceEncoder, seed: int) -> tuple[tuple[float, float], Table]:
    """The crop scale under which averaging confident views is best on training pictures, before any steering."""
    _, _, names = pictures("cifar10", "train")
    best, rows = {}, []
    for scale in ((0.08, 1.0), (0.4, 1.0)):
        drawn = {
            (shift, seed): sample(Draw("cifar10", "train", shift, 40, 20, seed, crop_scale=scale)) for shift in SHIFTS
        }
        scores = Scores(_setting("development", space, encoder, names, drawn))
        best[scale] = scores.accuracy(_CONFIDENT)
        shown = (_ZERO_SHOT, "average of all views", _CONFIDENT, "STS")
        rows.append([f"{scale[0]:g} to {scale[1]:g}", *(_points(scores.accuracy(name)) for name in shown)])
    columns = ["area of the crops", "zero-shot", "all views", "confident views", "STS"]
    title = f"Choice of the crops on {len(scores.labels)} disturbed CIFAR-10 training pictures, 20 views"
    return max(best, key=lambda scale: best[scale]), Table(title, columns, rows)


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Run the comparison, its controls and its costs."""
    progress("text encoder", 0.0)
    encoder = SentenceEncoder(*load_sentence_encoder())
    bundled = not all(is_available(name) for name in ("cifar10", "cifar100", "imagenet1k_sample"))
    source, split = ("digits", "test") if bundled else ("cifar10", "test")
    spaces: list[JointSpace] = []
    tables: list[Table] = []
    crop = (0.4, 1.0)
    if not bundled:
        progress("linear joint space", 0.05)
        spaces.append(_cifar_linear(encoder, 60 if quick else 200))
    if bundled or not quick:
        progress("dual encoder", 0.1)
        trained = dual_encoder(quick=quick, seed=seed)
        spaces.append(
            JointSpace(
                "dual encoder: heads on EfficientNet-Lite0 and MiniLM",
                trained.encode_image_features,
                trained.heads.encode_text_features,
                trained.logit_scale,
            )
        )
    if not (bundled or quick):
        progress("choice of the crops", 0.15)
        crop, table = _chosen_crop(spaces[0], encoder, seed)
        tables.append(table)
    views, images, clean, seeds = (16, 12, 20, 1) if quick else (32, 42, 20, 3)
    draws = [
        Draw(source, split, shift, clean if shift == "clean" else images, views, seed + repeat, crop_scale=crop)
        for repeat in range(seeds)
        for shift in (*SHIFTS, "clean")
    ]
    drawn = {}
    for number, draw in enumerate(draws):
        start = 0.2 + 0.6 * number / len(draws)
        progress(f"views, {draw.shift}", start)
        drawn[draw.shift, draw.seed] = sample(
            draw, lambda done, start=start, draw=draw: progress(f"views, {draw.shift}", start + 0.6 * done / len(draws))
        )
    progress("adaptation", 0.8)
    _, _, names = pictures(source, split)
    about = f"{len(names)} {'digits' if bundled else 'CIFAR-10'} names"
    compared = [Scores(_setting(f"{about}, {space.name}", space, encoder, names, drawn)) for space in spaces]

    def clean_accuracy(scores: Scores) -> float:
        parts = [part for part in drawn if part[0] == "clean"]
        right = [scores.probabilities[_ZERO_SHOT][part].argmax(-1) == drawn[part].labels for part in parts]
        return float(torch.cat(right).double().mean())

    main = max(compared, key=clean_accuracy)
    tables += [main.table(), *(scores.table() for scores in compared if scores is not main)]
    if not (bundled or quick):
        progress("held-out ImageNet classes", 0.85)
        tables.append(Scores(_imagenet(encoder, spaces[0].logit_scale, seed)).table())
    progress("controls", 0.9)
    by_rank, by_rate, rates = sweep(main.setting)
    turned = rotation_effect(main.setting)
    costs, batch, multiple = cost(main.setting, encoder, names, 5 if quick else 20)
    tables += [by_rank, by_rate, costs]
    over_zero, over_average = main.against("STS", _ZERO_SHOT), main.against("STS", _CONFIDENT)
    accuracies = [accuracy for _, accuracy in rates]
    rise, fall = max(accuracies) - accuracies[0], max(accuracies) - accuracies[-1]
    checks = [
        Check(
            "STS against confident-view average",
            "points of accuracy, 95 % interval " + _interval(over_average),
            over_average[0],
            ">= 0",
            over_average[0] >= 0,
        ),
        Check(
            "gain of the steering itself",
            "lower end of that interval",
            over_average[1],
            "> 0 (otherwise the change came from choosing and averaging views)",
            over_average[1] > 0,
            required=False,
        ),
        Check("time of adaptation, batched", "processor ms an image", batch, "< 1", batch < 1),
        Check("cost of prompt tuning", "multiple of ours", multiple, ">= 5", multiple >= 5),
        Check(
            "AdamW's step depends on the basis",
            f"change of probabilities under a turn of the basis, SGD's being {turned['sgd']:.1e}",
            turned["adamw"],
            "> 100 times that of SGD",
            turned["adamw"] > 100 * turned["sgd"],
        ),
        Check(
            "accuracy over lr rises, then falls",
            "smaller of rise and fall, points",
            min(rise, fall),
            "> 0",
            min(rise, fall) > 0,
            required=False,
        ),
    ]
    bar = 1.0 if not quick else -10.0
    how = "points or more above the zero-shot classifier of the original view"
    return Outcome(
        claim="One entropy step on a few coefficients in the SVD coordinates of the class prototypes raises the "
        "accuracy of a zero-shot classifier under distribution shift, for a fraction of the cost of prompt tuning",
        data=f"{len(main.labels)} pictures of {source} under {', '.join(SHIFTS)} (severity 3 to 5), {views} views "
        f"of {crop[0]:g} to {crop[1]:g} of the area at 128 pixels, {seeds} draws",
        model=main.setting.space.name,
        metric="accuracy on disturbed pictures, %",
        ours=main.accuracy("STS"),
        baselines={name: main.accuracy(name) for name in main.probabilities if not name.startswith("STS")},
        bar=f"STS {bar:g} {how}; here {_interval(over_zero)}",
        holds=over_zero[0] >= bar,
        checks=checks,
        tables=tables,
        notes=_notes(main, bundled, quick),
    )


def _notes(main: Scores, bundled: bool, quick: bool) -> list[str]:
    steering = SpectralSteering(main.setting.prototypes, main.setting.space.logit_scale)
    notes = [
        f"The rank rule keeps {steering.subspace.dim} of {steering.prototypes.shape[0]} possible directions; the shift "
        f"has length lr sqrt(k_t) = {5e-3 * steering.subspace.dim**0.5:.4f}. Logit scale {steering.logit_scale:.1f}.",
        "No CLIP weights are used: the joint spaces are made of an ImageNet classifier and a sentence encoder. The "
        "space with the better clean zero-shot accuracy is the main one; the others are tabled.",
        "The weight of the penalty, centring, the template texts and the views averaged at prediction are not "
        "confirmed from the paper; they are arguments, and the defaults are tabled with their alternatives.",
    ]
    if quick:
        notes.append("The quick form only checks that nothing breaks: its bar tolerates a loss of 10 points.")
    if bundled:
        notes.append(
            "The data folder is not there: handwritten digits, whose names the dual encoder has been trained on."
        )
    return notes
