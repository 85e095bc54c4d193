"""ReAlign on a real image-text space: the gap step by step, what happens to the geometry, and use without pairs.

The space is the trained one of `subspan.reproduce.materials`. Texts and pictures that fit the maps come from
different halves of pictures that trained nothing; what is held out shares no picture with either.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from subspan.align import C3, BlockwiseCovariance, MeanShift, ModalityGap, ReAlign, cosine_divergence, mixing_rate
from subspan.geometry import power_law_exponent
from subspan.measures import knn_overlap
from subspan.statistics import Moments

from .materials.shared_space import TEMPLATES, Pairs, SharedSpace, dual_encoder
from .protocol import Check, Outcome, Progress, Table

NOISE = (0.01, 0.02, 0.05, 0.1)
"""Standard deviations tried for C3; the paper does not name its own."""

_FULL = "ReAlign"


class Domain(NamedTuple):
    """Unit vectors of one domain: unpaired texts and pictures to fit on, and pairs that are held out."""

    fit_text: Float[Tensor, "n d"]
    fit_image: Float[Tensor, "m d"]
    test_text: Float[Tensor, "t d"]
    test_image: Float[Tensor, "t d"]


def domain(space: SharedSpace, source: str) -> Domain:
    """Texts of every second picture of the "fit" split, the pictures of the others, and the "test" pairs."""
    fit, test = space.splits[source]["fit"], space.splits[source]["test"]
    picture = torch.unique(fit.image, dim=0, return_inverse=True)[1] % 2 == 0
    texts, pictures = fit.select(picture), fit.select(~picture)
    return Domain(
        space.encode_text_features(texts.text),
        space.encode_image_features(torch.unique(pictures.image, dim=0)),
        space.encode_text_features(test.text),
        space.encode_image_features(test.image),
    )


def methods(sigma: float, seed: int) -> dict[str, Any]:
    """Every map that is compared, unfitted."""
    return {
        "mean shift (step 1)": MeanShift(),
        "anchor and trace (steps 1, 2)": ReAlign(("anchor", "trace")),
        _FULL: ReAlign(),
        "ReAlign, 3 centroid rounds": ReAlign(n_centroid=3),
        f"C3 (noise {sigma:g})": C3(sigma, random_state=seed),
        "blockwise covariance": BlockwiseCovariance(),
    }


def fitted(model: Any, data: Domain) -> Callable[[Tensor], Tensor]:
    """The map, fitted to the unpaired halves."""
    with warnings.catch_warnings():
        # A few thousand rows are below ten times the dimension, which the notes say once.
        warnings.filterwarnings("ignore", message=".*rows are few")
        model.fit(data.fit_text, data.fit_image)
    return _quiet(model.transform)


def _quiet(transform: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def mapped(rows: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*another domain")
            return transform(rows)

    return mapped


def spectrum_exponent(rows: Float[Tensor, "n d"]) -> float:
    """Power-law exponent of the covariance spectrum over the first 100 ranks (fewer in fewer dimensions)."""
    values = torch.linalg.eigvalsh(Moments(rows.shape[1]).update(rows).covariance()).flip(0)
    return float(power_law_exponent(values, last=min(100, len(values) // 2)))


def sampling_floor(*parts: Float[Tensor, "_ d"]) -> float:
    """Distance expected between the means of samples of these sizes if the populations' means were equal."""
    return math.sqrt(sum(float((part - part.mean(0)).square().sum(1).mean()) / len(part) for part in parts))


def geometry(mapped: Tensor, data: Domain, mapped_fit: Tensor) -> dict[str, float]:
    """What a map did: gaps where it was fitted and on held-out rows, and how the texts' geometry fared."""
    text, kept = torch.unique(data.test_text, dim=0, return_inverse=True)
    first = torch.empty(len(text), dtype=torch.int64).scatter_(0, kept, torch.arange(len(kept)))
    distinct = mapped[first]
    return {
        "gap, fitted corpus": ModalityGap.gap(mapped_fit, data.fit_image),
        "gap, held out": ModalityGap.gap(mapped, data.test_image),
        "exponent": spectrum_exponent(distinct),
        "divergence from texts": cosine_divergence(distinct, text),
        "divergence from images": cosine_divergence(distinct, data.test_image),
        "neighbours kept": float(knn_overlap(text, distinct, 10).mean()),
        "mixing": mixing_rate(distinct, data.test_image[: len(distinct)], 20),
    }


def substitution(
    train_text: Tensor, labels: np.ndarray, images: Tensor, truth: np.ndarray, seeds: range, epochs: int
) -> list[float]:
    """Accuracy on real images of MLP classifiers that were trained on (mapped) texts alone, one a seed.

    One factor brings the training rows to unit variance per dimension: a cone's spread is far below what an MLP
    expects.
    """
    factor = 1 / float(train_text.std(0).mean())
    accuracies = []
    for seed in seeds:
        options: Any = {"batch_size": 128, "max_iter": epochs, "random_state": seed}
        classifier = MLPClassifier((256,), **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Stochastic Optimizer")
            classifier.fit((factor * train_text).numpy(), labels)
        accuracies.append(float(np.mean(classifier.predict((factor * images).numpy()) == truth)))
    return accuracies


def caption_corpus(space: SharedSpace, pairs: Pairs) -> tuple[Tensor, np.ndarray]:
    """Every template of every class name: unit vectors, and the class name of each."""
    names = sorted(set(pairs.names))
    texts = [template.format(name) for name in names for template in TEMPLATES]
    return space.encode_texts(texts), np.repeat(names, len(TEMPLATES))


def sample_size_curve(data: Domain, sizes: list[int], draws: int, seed: int) -> list[list[Any]]:
    """Held-out gap of ReAlign against the number of rows of each modality that it was fitted to."""
    generator = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        gaps = []
        for _ in range(draws):
            text, image = (
                part[generator.choice(len(part), size, replace=False)] for part in (data.fit_text, data.fit_image)
            )
            mapped = fitted(ReAlign(), data._replace(fit_text=text, fit_image=image))(data.test_text)
            gaps.append(ModalityGap.gap(mapped, data.test_image))
        rows.append([size, round(float(np.mean(gaps)), 5)])
    return rows


def planted_curve(sizes: list[int], seed: int, *, held_out: int = 100_000, d: int = 128) -> list[list[Any]]:
    """The same where the truth is known: gaps of two cones with power-law spectra, against the rows fitted to."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, d + 1, dtype=torch.float64)
    centers = torch.linalg.qr(torch.randn(d, 2, dtype=torch.float64, generator=generator)).Q.mT

    def draw(n: int, which: int) -> Tensor:
        exponent, length = ((1.33, 0.7), (1.83, 0.8))[which]
        variances = ranks**-exponent
        rows = torch.randn(n, d, dtype=torch.float64, generator=generator) * (variances / variances.sum()).sqrt()
        rows = rows * math.sqrt(1 - length**2) + length * centers[which]
        return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)

    test = Domain(draw(2, 0), draw(2, 1), draw(held_out, 0), draw(held_out, 1))
    rows = []
    for size in sizes:
        data = test._replace(fit_text=draw(size, 0), fit_image=draw(size, 1))
        gaps = []
        for steps in (("anchor",), ("anchor", "trace"), ("anchor", "trace", "centroid")):
            gaps.append(ModalityGap.gap(fitted(ReAlign(steps), data)(data.test_text), data.test_image))
        rows.append([size, round(ModalityGap.gap(data.test_text, data.test_image), 4), *(round(g, 5) for g in gaps)])
    return rows


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Gap, geometry and use of texts as images: no map, step 1, steps 1 and 2, ReAlign, C3, blockwise covariance."""
    space = dual_encoder(quick=quick, progress=lambda message, fraction: progress(message, 0.5 * fraction))
    source = next(iter(space.splits))
    data = domain(space, source)
    test = space.splits[source]["test"]
    truth = np.array(test.names)
    train_text, labels = caption_corpus(space, test)
    seeds = range(seed, seed + (2 if quick else 5))
    epochs = 15 if quick else 30

    progress("noise of C3", 0.5)
    validation = space.splits[source]["fit"]
    fit_images, fit_truth = space.encode_image_features(validation.image), np.array(validation.names)
    noise_rows = []
    for sigma in NOISE:
        model = C3(sigma, random_state=seed)
        mapped = fitted(model, data)(train_text)
        score = substitution(mapped, labels, fit_images, fit_truth, seeds[:1], epochs)[0]
        noise_rows.append([sigma, round(model.gap_after_, 5), round(score, 4)])
    sigma = max(noise_rows, key=lambda row: row[2])[0]

    maps: dict[str, Callable[[Tensor], Tensor]] = {"no alignment": lambda rows: rows}
    measured: dict[str, dict[str, float]] = {}
    accuracy: dict[str, list[float]] = {}
    every = methods(sigma, seed)
    for done, (name, model) in enumerate({"no alignment": None, **every}.items()):
        progress(name, 0.55 + 0.35 * done / (len(every) + 1))
        if model is not None:
            maps[name] = fitted(model, data)
        measured[name] = geometry(maps[name](data.test_text), data, maps[name](data.fit_text))
        accuracy[name] = substitution(maps[name](train_text), labels, data.test_image, truth, seeds, epochs)
    progress("trained on images", 0.9)
    accuracy["trained on images"] = substitution(fit_images, fit_truth, data.test_image, truth, seeds, epochs)

    floor = sampling_floor(data.fit_text, data.fit_image, data.test_text, data.test_image)
    columns = list(next(iter(measured.values())))
    tables = [
        Table(
            f"gap and geometry, {source} (exponent of the images {spectrum_exponent(data.test_image):.3f}; "
            f"sampling floor of the held-out gap {floor:.4f})",
            ["map", *columns],
            [[name, *(round(row[column], 5) for column in columns)] for name, row in measured.items()],
        ),
        Table(
            f"classifier trained on texts alone, tested on {len(truth)} real images, {len(seeds)} seeds",
            ["trained on", "accuracy", "standard deviation"],
            [[name, round(float(np.mean(v)), 4), round(float(np.std(v)), 4)] for name, v in accuracy.items()],
        ),
        Table("C3's noise", ["standard deviation", "gap, fitted corpus", "validation accuracy"], noise_rows),
    ]
    progress("sample size", 0.92)
    largest = min(len(data.fit_text), len(data.fit_image))
    sizes = sorted({*(size for size in (30, 100, 300, 1000) if size < largest), largest})
    curve = sample_size_curve(data, sizes, 3 if quick else 10, seed)
    planted = planted_curve(
        [100, 1000, 10_000, 30_000 if quick else 100_000], seed, held_out=30_000 if quick else 100_000
    )
    tables += [
        Table("held-out gap of ReAlign against the rows fitted to", ["rows", "gap"], curve),
        Table(
            "planted cones (d = 128), held-out gap against the rows fitted to",
            ["rows", "raw", "step 1", "steps 1, 2", "ReAlign"],
            planted,
        ),
        Table(
            "the gap taken apart (paired, held out; frame: 90 % of the variance)",
            ["part", "value"],
            [
                [name, round(value, 4)]
                for name, value in ModalityGap(0.9).fit(data.test_image, data.test_text).table_.items()
            ],
        ),
    ]
    checks = _checks(measured, accuracy, floor, planted)
    if "flickr8k_1000" in space.splits:
        progress("captions", 0.96)
        tables += _captions(domain(space, "flickr8k_1000"), data, source, every, checks)
    full, raw, first = (measured[name]["gap, fitted corpus"] for name in (_FULL, "no alignment", "mean shift (step 1)"))
    return Outcome(
        claim="three closed-form steps put unpaired text embeddings into the image distribution (gap 0.39 to 2.6e-4 on "
        "100k rows) and keep their geometry, so that texts can stand in for images in training",
        data=f"{source}: {len(data.fit_text)} texts and {len(data.fit_image)} pictures, unpaired, to fit; "
        f"{len(data.test_image)} pairs held out",
        model="EfficientNet-Lite0 and MiniLM, frozen, with heads trained by symmetric InfoNCE (d = 256)",
        metric="distance between the means of mapped texts and images, on the corpus the statistics come from",
        ours=full,
        baselines={name: row["gap, fitted corpus"] for name, row in measured.items() if name != _FULL},
        bar="a raw gap > 0.2 must be there; full <= raw / 100 and <= step 1 / 5",
        holds=raw > 0.2 and full <= raw / 100 and full <= first / 5,
        checks=checks,
        tables=tables,
        notes=[
            "The paper measures the gap on the corpus that its statistics come from, and so does the main bar. On rows "
            "that were held out the gap is bounded below by the sampling error of four means, sqrt(sum T/n), which is "
            "given beside it: a hundredth of the raw gap needs some 10^5 rows.",
            "Blockwise covariance keeps more neighbourhoods here (about half) than the paper's 10 %, so ReAlign, which "
            "keeps nearly all, cannot keep twice as many.",
            "C3's noise is not stated in the paper: the best of a sweep by accuracy on images that fit nothing.",
            "ReVision (language model) is checked by a slow test on the CPU, not here.",
        ],
    )


def _captions(captions: Domain, other: Domain, source: str, every: dict[str, Any], checks: list[Check]) -> list[Table]:
    """The same geometry on written captions, and what statistics of another domain do to them."""
    rows = {"no alignment": geometry(captions.test_text, captions, captions.fit_text)}
    for name, model in every.items():
        mapped = fitted(model, captions)
        rows[name] = geometry(mapped(captions.test_text), captions, mapped(captions.fit_text))
    across = ModalityGap.gap(fitted(ReAlign(), other)(captions.test_text), captions.test_image)
    inside = rows[_FULL]["gap, held out"]
    kept, block = (rows[name]["neighbours kept"] for name in (_FULL, "blockwise covariance"))
    checks += [
        Check(
            "neighbourhoods of captions kept, beside blockwise covariance",
            "ratio of the shares of the 10 nearest neighbours",
            kept / block,
            ">= 2",
            kept >= 2 * block,
        ),
        Check(
            "statistics belong to their domain",
            "held-out gap with another domain's statistics over in-domain gap",
            across / inside,
            ">= 1.5",
            across >= 1.5 * inside,
        ),
    ]
    columns = list(rows[_FULL])
    return [
        Table(
            f"gap and geometry, Flickr8k captions ({len(captions.fit_text)} texts and {len(captions.fit_image)} "
            f"pictures to fit, {len(captions.test_text)} captions held out; exponent of the images "
            f"{spectrum_exponent(torch.unique(captions.test_image, dim=0)):.3f})",
            ["map", *columns],
            [[name, *(round(row[column], 5) for column in columns)] for name, row in rows.items()],
        ),
        Table(
            "held-out gap on Flickr8k captions, by where the statistics come from",
            ["statistics", "gap"],
            [
                ["none", round(rows["no alignment"]["gap, held out"], 4)],
                ["Flickr8k (in domain)", round(inside, 4)],
                [f"{source} (another domain)", round(across, 4)],
            ],
        ),
    ]


def _checks(
    measured: dict[str, dict[str, float]],
    accuracy: dict[str, list[float]],
    floor: float,
    planted: list[list[Any]],
) -> list[Check]:
    full, raw = measured[_FULL], measured["no alignment"]
    noisy = next(row for name, row in measured.items() if name.startswith("C3"))
    text_exponent = raw["exponent"]
    score = {name: float(np.mean(values)) for name, values in accuracy.items()}
    held_out = full["gap, held out"]
    beyond_step_one = np.subtract(accuracy[_FULL], accuracy["mean shift (step 1)"])
    return [
        Check(
            "held-out gap at the sampling floor",
            "held-out gap over the sampling floor",
            held_out / floor,
            "<= 1.5",
            held_out <= 1.5 * floor,
        ),
        Check(
            "held-out gap, the literal bar",
            "raw gap over full gap, held out",
            raw["gap, held out"] / held_out,
            ">= 100 (below the sampling floor of this many rows)",
            raw["gap, held out"] >= 100 * held_out,
            required=False,
        ),
        Check(
            "neighbourhoods kept",
            "share of the 10 nearest neighbours",
            full["neighbours kept"],
            ">= 0.80",
            full["neighbours kept"] >= 0.8,
        ),
        Check(
            "the spectrum keeps its exponent",
            "|exponent - exponent of the texts|",
            abs(full["exponent"] - text_exponent),
            "< 0.02",
            abs(full["exponent"] - text_exponent) < 0.02,
        ),
        Check(
            "C3 flattens the spectrum",
            "exponent of C3 - exponent of the texts",
            noisy["exponent"] - text_exponent,
            "< 0",
            noisy["exponent"] < text_exponent,
        ),
        Check(
            "texts stand in for images: ReAlign against step 1",
            "accuracy difference",
            float(beyond_step_one.mean()),
            ">= 0",
            float(beyond_step_one.mean()) >= 0,
        ),
        Check(
            "texts stand in for images: step 1 against none",
            "accuracy difference",
            score["mean shift (step 1)"] - score["no alignment"],
            ">= 0",
            score["mean shift (step 1)"] >= score["no alignment"],
        ),
        Check(
            "texts stand in for images: beside training on images",
            "accuracy over that of training on images",
            score[_FULL] / score["trained on images"],
            ">= 0.90",
            score[_FULL] >= 0.9 * score["trained on images"],
        ),
        Check(
            "the curve flattens near 10^4 rows",
            "planted gap at 10^4 rows over that at the most rows",
            planted[2][-1] / planted[-1][-1],
            "<= planted gap at 100 rows over that at 10^4",
            planted[2][-1] / planted[-1][-1] <= planted[0][-1] / planted[2][-1],
        ),
    ]
