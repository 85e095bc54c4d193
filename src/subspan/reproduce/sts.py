"""Spectrum-aware test-time steering on small pictures under noise, low contrast, coarse pixels and blur.

Two joint image-text spaces made of installed models stand in for CLIP: a linear one, in which a ridge map takes
sentence embeddings of ImageNet's class names to the rows of an ImageNet classifier, and the trained dual encoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.datasets import is_available, load, load_sentence_encoder
from subspan.edit import (
    ENSEMBLE_TEMPLATES,
    SINGLE_TEMPLATE,
    ConfidentAverage,
    PrototypeShift,
    SpectralSteering,
    marginal_entropy,
    select_confident,
)
from subspan.geometry import Subspace
from subspan.geometry.grassmann import random_basis
from subspan.measures import expected_calibration_error, paired_bootstrap
from subspan.models import SentenceEncoder

from .materials.disturbed_views import SHIFTS, Draw, drawn_views, named_pictures
from .materials.joint_spaces import JointSpace, classifier_rows, fitted_logit_scale, linear_space
from .materials.shared_space import dual_encoder
from .protocol import Check, Outcome, Progress, Table

_ZERO_SHOT = "zero-shot, original view"
_CONFIDENT = "confident-view average"


def _cifar_linear(encoder: SentenceEncoder, images: int) -> JointSpace:
    """The linear space, centred and scaled on CIFAR-100 pictures, whose names are not those under test."""
    records = load("imagenet1k_sample").records
    embeddings = encoder.encode([SINGLE_TEMPLATE[0].format(record["name"]) for record in records])
    other = drawn_views(Draw("cifar100", "train", "clean", images, 1, 0))
    mean = other.features[:, 0].float().mean(0)
    space = linear_space(torch.from_numpy(embeddings), classifier_rows(), mean, 1.0)
    prototypes = space.prototypes(encoder, named_pictures("cifar100", "train")[2], SINGLE_TEMPLATE)
    return replace(space, logit_scale=fitted_logit_scale(space.views(other)[:, 0], prototypes, other.labels))


def _spaces(encoder: SentenceEncoder, *, bundled: bool, quick: bool, seed: int, progress: Progress) -> list[JointSpace]:
    """The joint spaces: the linear one where its data is there, the trained one without it and in a full run."""
    spaces = []
    if not bundled:
        progress("linear joint space", 0.05)
        spaces.append(_cifar_linear(encoder, 60 if quick else 200))
    if bundled or not quick:
        progress("dual encoder", 0.1)
        trained = dual_encoder(quick=quick, seed=seed)
        heads = (trained.encode_image_features, trained.heads.encode_text_features)
        spaces.append(JointSpace("dual encoder: heads on EfficientNet-Lite0 and MiniLM", *heads, trained.logit_scale))
    return spaces


# ---------------------------------------------------------------- methods


def prompt_tuning(
    space: JointSpace,
    encoder: SentenceEncoder,
    names: Sequence[str],
    views: Float[Tensor, "b n d"],
    *,
    learning_rate: float = 5e-3,
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
        optimizer = torch.optim.AdamW([offset], learning_rate)
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
        _ZERO_SHOT: ConfidentAverage(prototypes, scale, predict="original"),
        "average of all views": ConfidentAverage(prototypes, scale, keep=1.0),
        _CONFIDENT: ConfidentAverage(prototypes, scale),
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
    """A classification problem: a space, prototypes in it, views of pictures by (shift, seed); every method on it."""

    title: str
    space: JointSpace
    prototypes: Tensor
    ensemble: Tensor | None
    views: dict[tuple[str, int], Tensor]
    labels: dict[tuple[str, int], Tensor]

    def parts(self, shifts: Sequence[str] = SHIFTS) -> list[tuple[str, int]]:
        """The parts under some shifts, by default the disturbed ones."""
        return [part for part in self.views if part[0] in shifts]

    def disturbed(self) -> tuple[Tensor, Tensor]:
        """Views and labels of all disturbed pictures."""
        views, labels = ([held[part] for part in self.parts()] for held in (self.views, self.labels))
        return torch.cat(views), torch.cat(labels)

    @cached_property
    def probabilities(self) -> dict[str, dict[tuple[str, int], Tensor]]:
        """Class probabilities of each method and part."""
        found: dict[str, dict[tuple[str, int], Tensor]] = {}
        for part, views in self.views.items():
            for name, method in methods(self.prototypes, self.ensemble, self.space.logit_scale, part[1]).items():
                found.setdefault(name, {})[part] = method(views)
        return found

    def right(self, name: str, shifts: Sequence[str] = SHIFTS) -> Float[Tensor, " b"]:
        """100 where a method is right, else 0."""
        parts = self.parts(shifts)
        answers = torch.cat([self.probabilities[name][part].argmax(-1) for part in parts])
        return 100 * (answers == torch.cat([self.labels[part] for part in parts])).double()

    def accuracy(self, name: str, shifts: Sequence[str] = SHIFTS) -> float:
        """Per cent right."""
        return float(self.right(name, shifts).mean())

    def against(self, name: str, other: str) -> tuple[float, float, float]:
        """Points gained on another method, with a 95 % interval."""
        return paired_bootstrap(self.right(name), self.right(other))

    def table(self) -> Table:
        """All methods side by side."""
        labels = self.disturbed()[1]
        shifts = [shift for shift in ("clean", *SHIFTS) if self.parts([shift])]
        rows = []
        for name, found in self.probabilities.items():
            error = expected_calibration_error(torch.cat([found[part] for part in self.parts()]), labels)
            rows.append(
                [
                    name,
                    f"{self.accuracy(name):.1f}",
                    *(_interval(self.against(name, other)) for other in (_ZERO_SHOT, _CONFIDENT)),
                    f"{error:.3f}",
                    *(f"{self.accuracy(name, [shift]):.1f}" for shift in shifts),
                ]
            )
        columns = ["method", "accuracy %", "against zero-shot", "against confident average", "ECE"]
        columns += ["clean %" if shift == "clean" else shift for shift in shifts]
        return Table(f"{self.title}: {len(labels)} disturbed pictures", columns, rows)


def _interval(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _setting(title: str, space: JointSpace, encoder: SentenceEncoder, names: Sequence[str], drawn: dict) -> Setting:
    single, ensemble = (space.prototypes(encoder, names, words) for words in (SINGLE_TEMPLATE, ENSEMBLE_TEMPLATES))
    views = {part: space.views(found) for part, found in drawn.items()}
    return Setting(title, space, single, ensemble, views, {part: found.labels for part, found in drawn.items()})


def _imagenet(encoder: SentenceEncoder, logit_scale: float, seed: int) -> Setting:
    """ImageNet pictures among the classes drawn, whose rows the ridge map has not seen; texts are glosses."""
    drawn = {(shift, seed): drawn_views(Draw("imagenet1k_sample", "all", shift, 50, 32, seed)) for shift in SHIFTS}
    classes = torch.cat([found.labels for found in drawn.values()]).unique()
    names = named_pictures("imagenet1k_sample", "all")[2]
    kept = torch.ones(len(names), dtype=torch.bool)
    kept[classes] = False
    clean = drawn_views(Draw("imagenet1k_sample", "all", "clean", 100, 1, seed))
    mean = clean.features[kept[clean.labels], 0].float().mean(0)
    space = linear_space(torch.from_numpy(encoder.encode(names))[kept], classifier_rows()[kept], mean, logit_scale)
    return Setting(
        f"{len(classes)} ImageNet classes held out of the map, severity 3 to 5, views of 8 to 100 % of the area",
        space,
        space.prototypes(encoder, [names[i] for i in classes.tolist()], ("{}",)),
        None,
        {part: space.views(found) for part, found in drawn.items()},
        {part: torch.searchsorted(classes, found.labels) for part, found in drawn.items()},
    )


def _chosen_crop(space: JointSpace, encoder: SentenceEncoder, seed: int) -> tuple[tuple[float, float], Table]:
    """The crop scale under which averaging confident views is best on training pictures, before any steering."""
    names = named_pictures("cifar10", "train")[2]
    shown = (_ZERO_SHOT, "average of all views", _CONFIDENT, "STS")
    tried = {}
    for crop in ((0.08, 1.0), (0.4, 1.0)):
        draws = {shift: Draw("cifar10", "train", shift, 40, 20, seed, crop_scale=crop) for shift in SHIFTS}
        drawn = {(shift, seed): drawn_views(draw) for shift, draw in draws.items()}
        tried[crop] = _setting("development", space, encoder, names, drawn)
    table = Table(
        f"Choice of the crops on {len(SHIFTS) * 40} disturbed CIFAR-10 training pictures, 20 views",
        ["area of the crops", "zero-shot", "all views", "confident views", "STS"],
        [[f"{low:g} to {high:g}", *(f"{s.accuracy(n):.1f}" for n in shown)] for (low, high), s in tried.items()],
    )
    return max(tried, key=lambda crop: tried[crop].accuracy(_CONFIDENT)), table


# ---------------------------------------------------------------- controls


def sweep(setting: Setting) -> tuple[Table, Table, list[float]]:
    """Accuracy over the number of directions, and over the step size; the latter also as numbers, by rising rate."""
    views, labels = setting.disturbed()

    def row(**options: Any) -> list[float]:
        report = SpectralSteering(setting.prototypes, setting.space.logit_scale, **options).explain(views)
        right = 100 * (report.probabilities.argmax(-1) == labels).double()
        return [float(values.mean()) for values in (right, report.entropy_before, report.entropy_after)]

    def shown(values: list[float]) -> list[str]:
        return [f"{value:.3f}" if value < 10 else f"{value:.1f}" for value in values]

    most = min(*setting.prototypes.shape)
    by_rank = [[k, *shown(row(rank=k))] for k in (1, 2, 3, 4, 6, 9, 16, 32, 64) if k < most]
    rates = (1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)
    by_rate = [(rate, row(rank=min(6, most), learning_rate=rate)) for rate in rates]
    measured = ["accuracy %", "entropy before", "entropy after"]
    return (
        Table("Number of directions k_t, lr 5e-3", ["k_t", *measured], by_rank),
        Table(f"Step size, k_t = {min(6, most)}", ["lr", *measured], [[rate, *shown(row)] for rate, row in by_rate]),
        [row[0] for _, row in by_rate],
    )


def rotation_effect(setting: Setting, learning_rate: float = 5e-3) -> dict[str, float]:
    """Mean change (total variation) of the probabilities when the basis is turned inside its span, by optimiser."""
    views, _ = setting.disturbed()
    subspace = Subspace.fit(setting.prototypes, rank=min(6, *setting.prototypes.shape), center=False)
    turn = random_basis(subspace.dim, subspace.dim, generator=torch.Generator().manual_seed(0)).to(subspace.basis)
    changes = {}
    for optimizer in ("adamw", "sgd"):
        options: Any = {"optimizer": optimizer, "learning_rate": learning_rate}
        given, turned = (
            SpectralSteering(setting.prototypes, setting.space.logit_scale, subspace=basis, **options)(views)
            for basis in (subspace, Subspace.span(subspace.basis @ turn))
        )
        changes[optimizer] = 0.5 * float((given - turned).abs().sum(-1).mean())
    return changes


def cost(setting: Setting, encoder: SentenceEncoder, names: Sequence[str], count: int) -> tuple[Table, float, float]:
    """Time and memory per image beyond encoding; milliseconds of the batch, and prompt tuning's multiple of them.

    Processor time summed over threads, so that other work on the machine does not count.
    """
    views, labels = setting.disturbed()
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
        same = len(answer) == len(truth)
        accuracy = f"{100 * float((answer == truth).double().mean()):.1f}" if same else "see above"
        rows.append([name, images, f"{each:.3f}", f"{taken / images / 2**20:.2f}", accuracy])
        return each

    def tune() -> Tensor:
        return prompt_tuning(setting.space, encoder, names, few).argmax(-1)

    batch = measure("STS, one batch", len(views), lambda: steering(views).argmax(-1), 5)
    measure("STS, image by image", count, lambda: torch.cat([steering(image) for image in few]).argmax(-1), 3)
    tuned = measure("prompt tuning through MiniLM", count, tune, 1)
    columns = ["adaptation", "images", "processor ms an image", "MiB allocated an image", "accuracy %"]
    return Table(f"Cost beyond encoding the views, {len(names)} classes", columns, rows), batch, tuned / batch


# ---------------------------------------------------------------- the protocol


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Run the comparison, its controls and its costs."""
    progress("text encoder", 0.0)
    encoder = SentenceEncoder(*load_sentence_encoder())
    bundled = not all(is_available(name) for name in ("cifar10", "cifar100", "imagenet1k_sample"))
    source, crop = "digits" if bundled else "cifar10", (0.4, 1.0)
    views, images, clean, seeds = (16, 12, 20, 1) if quick else (32, 42, 20, 3)
    spaces = _spaces(encoder, bundled=bundled, quick=quick, seed=seed, progress=progress)
    tables: list[Table] = []
    if not (bundled or quick):
        progress("choice of the crops", 0.15)
        crop, table = _chosen_crop(spaces[0], encoder, seed)
        tables.append(table)
    drawn = {}
    parts = [(shift, seed + repeat) for repeat in range(seeds) for shift in (*SHIFTS, "clean")]
    for number, (shift, each) in enumerate(parts):

        def say(done: float, number: int = number, shift: str = shift) -> None:
            progress(f"views, {shift}", 0.2 + 0.6 * (number + done) / len(parts))

        say(0.0)
        count = clean if shift == "clean" else images
        drawn[shift, each] = drawn_views(Draw(source, "test", shift, count, views, each, crop_scale=crop), say)
    progress("adaptation", 0.8)
    names = named_pictures(source, "test")[2]
    about = f"{len(names)} {'digits' if bundled else 'CIFAR-10'} names"
    compared = [_setting(f"{about}, {space.name}", space, encoder, names, drawn) for space in spaces]
    main = max(compared, key=lambda setting: setting.accuracy(_ZERO_SHOT, ["clean"]))
    tables += [main.table(), *(setting.table() for setting in compared if setting is not main)]
    if not (bundled or quick):
        progress("held-out ImageNet classes", 0.85)
        tables.append(_imagenet(encoder, spaces[0].logit_scale, seed).table())
    progress("controls", 0.9)
    by_rank, by_rate, accuracies = sweep(main)
    turned = rotation_effect(main)
    costs, batch, multiple = cost(main, encoder, names, 5 if quick else 20)
    over_zero, over_average = main.against("STS", _ZERO_SHOT), main.against("STS", _CONFIDENT)
    off_ends = max(accuracies) - max(accuracies[0], accuracies[-1])
    points = "points of accuracy, 95 % interval "
    return Outcome(
        claim="One entropy step on a few coefficients in the SVD coordinates of the class prototypes raises the "
        "accuracy of a zero-shot classifier under distribution shift, for a fraction of the cost of prompt tuning",
        data=f"{len(main.disturbed()[1])} pictures of {source} under {', '.join(SHIFTS)} (severity 3 to 5), {views} "
        f"views of {crop[0]:g} to {crop[1]:g} of the area at 128 pixels, {seeds} draws",
        model=main.space.name,
        metric="accuracy on disturbed pictures, %",
        ours=main.accuracy("STS"),
        baselines={name: main.accuracy(name) for name in main.probabilities if not name.startswith("STS")},
        main=Check.at_least("STS against the zero-shot classifier of the original view", points + _interval(over_zero),
                            over_zero[0], 1),
        checks=[
            Check.at_least("STS against confident-view average", points + _interval(over_average), over_average[0], 0),
            # Otherwise the change came from choosing and averaging views.
            Check.above("gain of the steering itself", "lower end of that interval", over_average[1], 0,
                        required=False),
            Check.below("time of adaptation, batched", "processor ms an image", batch, 1, quick=True),
            Check.at_least("cost of prompt tuning", "multiple of ours", multiple, 5, quick=True),
            Check.above("AdamW's step depends on the basis", f"change of probabilities ({turned['adamw']:.1e}) under a "
                        "turn of the basis, over that of SGD", turned["adamw"] / max(turned["sgd"], 1e-12), 100,
                        quick=True),
            Check.above("accuracy over lr rises, then falls", "smaller of rise and fall, points", off_ends, 0,
                        required=False),
        ],
        tables=[*tables, by_rank, by_rate, costs],
        notes=_notes(main, bundled),
    )  # fmt: skip


def _notes(main: Setting, bundled: bool) -> list[str]:
    steering = SpectralSteering(main.prototypes, main.space.logit_scale)
    return [
        f"The rank rule keeps {steering.subspace.dim} of {steering.prototypes.shape[0]} possible directions; the shift "
        f"has length lr sqrt(k_t) = {5e-3 * steering.subspace.dim**0.5:.4f}. Logit scale {steering.logit_scale:.1f}.",
        "No CLIP weights are used: the joint spaces are made of an ImageNet classifier and a sentence encoder. The "
        "space with the better clean zero-shot accuracy is the main one; the others are tabled.",
        "The weight of the penalty, centring, the template texts and the views averaged at prediction are not "
        "confirmed from the paper; they are arguments, and the defaults are tabled with their alternatives.",
        *(["The data folder is not there: digits, whose names the dual encoder was trained on."] if bundled else []),
    ]
