"""Dictionaries with sparse codes beside one subspace, other dictionaries, masks and rounding, at equal bits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from subspan.datasets import is_available, load, load_language_model, load_sentence_encoder, stdlib_docstrings
from subspan.geometry import Whitener
from subspan.geometry.grassmann import random_basis
from subspan.models import (
    LowRankLinear,
    SentenceEncoder,
    SiteMoments,
    SparseDictLinear,
    collect_moments,
    find_blocks,
    linear_names,
    linear_weight,
    text_perplexity,
    token_sequences,
)
from subspan.solvers import coding_error, top_s
from subspan.weights import CoSpaDi, factorise, round_to_bits
from subspan.weights.factorising import weighted_error, whitener_of

from .protocol import Check, Outcome, Progress, Table


class Sizes(NamedTuple):
    """Sequences to calibrate on and held out, their tokens, ratios; sentences and pairs; blocks, and K-SVD's."""

    sequences: int = 32
    held: int = 16
    tokens: int = 256
    ratios: tuple[float, ...] = (0.2, 7 / 16)
    encoder_ratios: tuple[float, ...] = (0.2, 0.3, 0.4)
    sentences: int = 256
    pairs: int = 1379
    encoder_blocks: int | None = None
    blocks: int | None = None
    few: int = 4
    few_layers: str = ""
    turns: int = 2


QUICK = Sizes(12, 4, 192, (0.3,), (0.3,), 256, 60, 1, 1, 1, "self_attn", 1)
OURS, LOW, CUT, ROCKET = "procrustes", "whitened SVD", "truncated SVD", "ROCKET's eigenbasis"
NO_DATA, ROUND, MASK, FOUR = "procrustes without data", "rounding", "2:4 magnitude", "4 bits"
KSVD = "K-SVD from procrustes"
# The solver of each, and whether it sees the data.
ARMS: dict[str, tuple[Any, bool]] = {
    CUT: ("svd", False),
    LOW: ("svd", True),
    ROCKET: ("rocket", True),
    OURS: ("procrustes", True),
    NO_DATA: ("procrustes", False),
    KSVD: ("ksvd", True),
    ROUND: ("round", False),
    MASK: ("2:4", False),
    FOUR: ("round", False),
}
MATRICES = (CUT, LOW, ROCKET, OURS)
DENSITIES = (1.5, 2.0, 3.0, 5.0)


class World(NamedTuple):
    """A model, the second moments of what goes into its linear layers, and what it is worth."""

    model: Any
    moments: SiteMoments
    held: dict[str, Whitener | None]
    names: list[str]
    score: Callable[[], float]

    def small(self, arm: str, ratio: float, names: list[str] | None = None, **options: Any) -> Arm:
        """What one arm gives."""
        return self.judged(*self.factored(arm, ratio, names, **options))

    def factored(
        self, arm: str, ratio: float, names: list[str] | None = None, **options: Any
    ) -> tuple[dict[str, nn.Module], float, float]:
        """Layers of one arm, the share of the bits that they save, and processor seconds."""
        solver, on_data = ARMS[arm]
        started = time.process_time()
        fitted = CoSpaDi(ratio, solver, layers=names or self.names, **options)
        fitted.fit(self.model, self.moments if on_data else None)
        return fitted.layers_, fitted.saved(), time.process_time() - started

    def judged(self, layers: Mapping[str, nn.Module], saved: float, seconds: float = 0.0) -> Arm:
        """Errors of layers on held-out data, and what the model is worth with their weights in place of its own."""
        errors = {}
        with torch.no_grad():
            kept = {name: self.model.get_submodule(name).weight.clone() for name in layers}
            for name, layer in layers.items():
                own = linear_weight(self.model.get_submodule(name))[0]
                errors[name] = weighted_error(own, layer, self.held[name])
            for name, layer in layers.items():
                dense = layer.to_dense() if isinstance(layer, LowRankLinear | SparseDictLinear) else layer.weight
                self.model.get_submodule(name).weight.copy_(dense)
            score = self.score()
            for name, weight in kept.items():
                self.model.get_submodule(name).weight.copy_(weight)
        return Arm(errors, score, saved, seconds)


class Arm(NamedTuple):
    """Error of each layer's outputs on held-out data, the model's score, share of the bits saved, processor seconds."""

    errors: dict[str, float]
    score: float
    saved: float
    seconds: float

    @property
    def error(self) -> float:
        """Mean over layers."""
        return float(np.mean(list(self.errors.values())))

    def over(self, other: Arm) -> np.ndarray:
        """Errors over those of another arm, layer by layer."""
        return np.array([self.errors[name] / other.errors[name] for name in self.errors])


def texts() -> tuple[str, list[str], list[str]]:
    """What it is, text to calibrate on and held-out text: WikiText-2, or the halves of Python's docstrings."""
    if is_available("wikitext2"):
        data = load("wikitext2")
        return "WikiText-2 (its training text calibrated on, its test text held out)", [data["train"]], [data["test"]]
    every = [entry.text for entry in stdlib_docstrings()]
    return "docstrings of Python's standard library", every[::2], every[1::2]


def language_world(sizes: Sizes) -> tuple[str, World]:
    """SmolLM2 with its perplexity on held-out text."""
    model, tokenizer = load_language_model("smollm2")
    name, fit, held = texts()
    calibration, test = (
        list(token_sequences(tokenizer, part, length=sizes.tokens, count=count))
        for part, count in ((fit, sizes.sequences), (held, sizes.held))
    )
    names = last_blocks(model, sizes.blocks)
    moments = collect_moments(model, calibration, names, not_finite="skip")
    held_out = norms_of(collect_moments(model, test, names, not_finite="skip"))
    return name, World(model, moments, held_out, names, lambda: text_perplexity(model, test))


def norms_of(moments: SiteMoments) -> dict[str, Whitener | None]:
    """The norms in which errors of weights are those of outputs, by layer."""
    made = {leader: whitener_of(each, each.d) for leader, each in moments.distinct.items()}
    return {name: made[leader] for name, leader in moments.leaders.items()}


def encoder_world(sizes: Sizes) -> tuple[str, World]:
    """MiniLM with its correlation to what people say of pairs of sentences, or to its own similarities."""
    model, tokenizer = load_sentence_encoder()
    encoder = SentenceEncoder(model, tokenizer)
    if is_available("stsb"):
        data, what = load("stsb"), "STS-B (sentences of its training part, its test part held out)"
        fit, pairs = [record["sentence1"] for record in data["train"]], data["test"][: sizes.pairs]
        first, second = ([record[key] for record in pairs] for key in ("sentence1", "sentence2"))
        truth: Any = [record["score"] for record in pairs]
    else:
        every, what = (
            [entry.text[:200] for entry in stdlib_docstrings()],
            "docstrings, the untouched model as the truth",
        )
        fit, first, second = every[::3], every[1::3][: sizes.pairs], every[2::3][: sizes.pairs]
        truth = similarities(encoder, first, second)
    names = last_blocks(model, sizes.encoder_blocks)

    def moments(sentences: list[str]) -> SiteMoments:
        options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
        batches = [dict(tokenizer(sentences[i : i + 16], **options)) for i in range(0, len(sentences), 16)]
        return collect_moments(model, batches, names)

    def score() -> float:
        ranked: Any = spearmanr(truth, similarities(encoder, first, second))
        return float(ranked.statistic)

    held = norms_of(moments(first[: sizes.sentences]))
    return what, World(model, moments(fit[: sizes.sentences]), held, names, score)


def similarities(encoder: SentenceEncoder, first: list[str], second: list[str]) -> np.ndarray:
    """Cosines of pairs of texts."""
    a, b = (np.asarray(encoder.encode(part)) for part in (first, second))
    return (a * b).sum(1)


def by_block(model: nn.Module) -> list[list[str]]:
    """Names of the linear layers of each block."""
    prefix, found = find_blocks(model), {}
    for name in linear_names(model):
        found.setdefault(name.removeprefix(f"{prefix}.").split(".")[0], []).append(name)
    return list(found.values())


def last_blocks(model: nn.Module, count: int | None) -> list[str]:
    """Names of the linear layers of the last blocks, or of all."""
    return [name for block in by_block(model)[-(count or 0) :] for name in block]


def random_error(weight: Tensor, metric: Any, k: int, s: int, seed: int) -> float:
    """Error of a weight coded by random orthonormal atoms of the span of its rows."""
    white = whitener_of(metric, weight.shape[1])
    rows = weight.detach().double() if white is None else white.weigh(weight.detach().double())
    rows = rows @ torch.linalg.qr(rows.mT)[0] if len(rows) < rows.shape[1] else rows
    atoms = random_basis(rows.shape[1], k, generator=torch.Generator().manual_seed(seed), dtype=rows.dtype).mT
    return float((coding_error(rows, top_s(rows, atoms, s), atoms) / rows.square().sum()).sqrt())


def in_four_bits(layers: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], float]:
    """Layers with their dictionaries and codes rounded to four bits, and the share of the bits that is saved."""
    made: dict[str, nn.Module] = {}
    bits = dense = 0.0
    for name, layer in layers.items():
        assert isinstance(layer, SparseDictLinear)
        small = copy.deepcopy(layer)
        for part in (small.dictionary.data.mT, small.values.data):
            part.copy_(round_to_bits(part))
            bits += 4 * part.numel() + 32 * len(part) * -(-part.shape[1] // 32)
        made[name] = small
        bits += layer.bits(0)
        dense += 16 * layer.dictionary.shape[0] * len(layer.values)
    return made, 1 - bits / dense


class Encoder(NamedTuple):
    """What the sentence encoder gave: arms by ratio; over our errors those of random atoms; errors by density."""

    data: str
    dense: float
    arms: dict[tuple[str, float], Arm]
    drawn: list[float]
    densities: dict[float, float]


class Language(NamedTuple):
    """What the language model gave: arms by ratio, masks and rounding, and arms on a few blocks."""

    data: str
    dense: float
    arms: dict[tuple[str, float], Arm]
    others: dict[str, Arm]
    few: dict[str, Arm]


def encoder_part(sizes: Sizes, seed: int, progress: Progress) -> Encoder:
    """All of the small part."""
    progress("reading the inputs of the encoder's layers", 0.0)
    data, world = encoder_world(sizes)
    plan = [(arm, ratio) for ratio in sizes.encoder_ratios for arm in MATRICES]
    plan.append((NO_DATA, sizes.encoder_ratios[-1]))
    arms = {}
    for place, (arm, ratio) in enumerate(plan):
        progress(f"{arm}, sentence encoder, {ratio:.2f}", 0.15 * place / len(plan))
        arms[arm, ratio] = world.small(arm, ratio)
    drawn, some = [], world.names[:6]
    for name in some:
        weight, metric = linear_weight(world.model.get_submodule(name))[0], world.moments[name]
        found = factorise(weight, metric, sizes.encoder_ratios[-1])
        drawn.append(random_error(weight, metric, found.rank, found.nonzero or 1, seed) / found.error)
    densities = {each: world.small(OURS, sizes.encoder_ratios[-1], some, density=each).error for each in DENSITIES}
    return Encoder(data, world.score(), arms, drawn, densities)


def language_part(sizes: Sizes, progress: Progress) -> Language:
    """All of the large part."""
    progress("reading the inputs of the language model's layers", 0.15)
    data, world = language_world(sizes)
    dense = world.score()
    plan = [(arm, sizes.ratios[0]) for arm in MATRICES] + [
        (arm, ratio) for ratio in sizes.ratios[1:] for arm in (LOW, OURS)
    ]
    plan += [(ROUND, ratio) for ratio in sizes.ratios]
    arms, others = {}, {}
    for place, (arm, ratio) in enumerate(plan):
        progress(f"{arm}, language model, {ratio:.2f}", 0.2 + 0.5 * place / len(plan))
        layers, *facts = world.factored(arm, ratio)
        arms[arm, ratio] = world.judged(layers, *facts)
        if arm == OURS:
            others[f"procrustes at {ratio:.2g}, then 4 bits"] = world.judged(*in_four_bits(layers))
    progress("masks and rounding", 0.7)
    others |= {MASK: world.small(MASK, 7 / 16), FOUR: world.small(FOUR, 1 - 5 / 16)}
    blocks = by_block(world.model)[-(sizes.blocks or 0) :]
    chosen = np.linspace(0, len(blocks) - 1, sizes.few).round().astype(int)
    some = [name for place in chosen for name in blocks[place] if sizes.few_layers in name]
    few = {}
    for place, arm in enumerate((LOW, NO_DATA, OURS, KSVD)):
        progress(f"{arm}, a few blocks", 0.8 + 0.05 * place)
        few[arm] = world.small(arm, sizes.ratios[0], some, **({"max_iter": sizes.turns} if arm == KSVD else {}))
    return Language(data, dense, arms, others, few)


def judged(encoder: Encoder, language: Language) -> list[Check]:
    """The further checks."""

    def ratios(arms: Mapping[tuple[str, float], Arm], other: str) -> list[np.ndarray]:
        return [arms[OURS, ratio].over(each) for (arm, ratio), each in arms.items() if arm == other]

    low = [*ratios(encoder.arms, LOW), *ratios(language.arms, LOW)]
    last = max(ratio for _, ratio in encoder.arms)
    gain = min(
        encoder.arms[OURS, ratio].score - encoder.arms[LOW, ratio].score for arm, ratio in encoder.arms if arm == OURS
    )
    strong = max(ratio for _, ratio in language.arms)
    return [
        Check.at_least(
            "lower errors than whitened SVD", "share of matrices, least over models and ratios",
            min(float((each < 1).mean()) for each in low), 0.9, quick=True,
        ),
        Check.at_least(
            "and by a margin", "mean share by which they are lower, least over models and ratios",
            min(1 - float(each.mean()) for each in low), 0.15,
        ),
        Check.above("what the encoder says of sentences", "Spearman correlation over whitened SVD's, least", gain, 0),
        Check.below(
            "beside ROCKET's eigenbasis", "mean error over its own, largest over models and ratios",
            max(float(each.mean()) for each in (*ratios(encoder.arms, ROCKET), *ratios(language.arms, ROCKET))), 1,
        ),
        Check.at_least(
            "data are needed", "error without data over that with, mean of the encoder's matrices",
            1 / float(encoder.arms[OURS, last].over(encoder.arms[NO_DATA, last]).mean()), 1.2, quick=True,
        ),
        Check.at_least(
            "random atoms are worse", "their error over ours, least of six layers", min(encoder.drawn), 1.2, quick=True
        ),
        Check.at_most(
            "K-SVD gains little on its start", "our mean error over its own, a few blocks",
            language.few[OURS].error / language.few[KSVD].error, 1.1,
        ),
        Check.at_most(
            "two atoms for each that is read is near the best", "error over that of the best density",
            encoder.densities[2.0] / min(encoder.densities.values()), 1.02, required=False,
        ),
        Check.below(
            "beside 2:4 at equal bits", "perplexity over that of 2:4",
            language.arms[OURS, strong].score / language.others[MASK].score, 1, required=False,
        ),
        Check.below(
            "beside rounding at equal bits", "perplexity over that of rounding, least over ratios",
            min(language.arms[OURS, r].score / language.arms[ROUND, r].score for a, r in language.arms if a == OURS),
            1, required=False,
        ),
    ]  # fmt: skip


def tables(encoder: Encoder, language: Language) -> list[Table]:
    """All numbers."""

    def rows(arms: Mapping[tuple[str, float], Arm]) -> list[list[Any]]:
        found = [[arm, f"{ratio:.3g}", each.score, each.error, each.seconds] for (arm, ratio), each in arms.items()]
        return found

    columns = ["bits by", "saved", "mean error", "processor s"]
    others = [[arm, f"{each.saved:.3g}", each.score, each.error, each.seconds] for arm, each in language.others.items()]
    few = [[arm, each.score, each.error, each.seconds] for arm, each in language.few.items()]
    return [
        Table.rounded(
            f"language model: perplexity (dense {language.dense:.2f}) and errors of outputs",
            [*columns[:2], "perplexity", *columns[2:]],
            rows(language.arms) + others,
            3,
        ),
        Table.rounded(
            "only a few blocks of the language model", ["bits by", "perplexity", "mean error", "processor s"], few, 3
        ),
        Table.rounded(
            f"sentence encoder: Spearman correlation (dense {encoder.dense:.4f}) and errors of outputs",
            [*columns[:2], "correlation", *columns[2:]],
            rows(encoder.arms),
            3,
        ),
        Table.rounded(
            "mean error of six matrices by atoms an atom read", ["density", "error"], encoder.densities.items(), 4
        ),
    ]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Every way to fewer bits on the same layers, moments and held-out text."""
    sizes = QUICK if quick else Sizes()
    encoder = encoder_part(sizes, seed, progress)
    language = language_part(sizes, progress)
    worst = max(language.arms[OURS, r].score / language.arms[LOW, r].score for a, r in language.arms if a == OURS)
    first = sizes.ratios[0]
    measured = {arm: language.arms[arm, first].score for arm in (*MATRICES, ROUND)}
    return Outcome(
        claim="One dictionary with sparse codes for each linear layer, learnt on calibration data, loses less than a "
        "low rank of equal size: Llama-3-8B at 0.2 fewer parameters keeps perplexity 20 where SVD-LLM has 41 (dense "
        "7.3), Qwen3-8B 18 where it has 21.",
        data=f"{language.data}: {sizes.sequences} and {sizes.held} sequences of {sizes.tokens} tokens; {encoder.data}",
        model=f"SmolLM2-135M-Instruct ({'all' if sizes.blocks is None else sizes.blocks} blocks), all-MiniLM-L6-v2 "
        f"({'all' if sizes.encoder_blocks is None else sizes.encoder_blocks} blocks), no training",
        metric=f"perplexity at {first:g} of the linear layers' bits saved",
        ours=measured.pop(OURS),
        baselines={"dense": language.dense, **measured},
        main=Check.below("beside whitened SVD at equal bits", "perplexity over its own, largest over ratios", worst, 1),
        checks=judged(encoder, language),
        tables=tables(encoder, language),
        notes=[
            "Bits are counted with the mask and after rounding, 16 a number of the dense layer; the paper counts "
            "parameters and sets the mask against two bits of each code, which is the same at two atoms an atom read.",
            "The language model's own weights were rounded to four bits in groups of 32 before they came here, so that "
            "rounding them to four bits again changes almost nothing: that line is no measure of rounding in general.",
            "Errors are of outputs on held-out text and sentences, for moments that were collected on others. "
            f"K-SVD starts at the procrustes solution and does {sizes.turns} turns on {sizes.few} blocks; the paper's "
            "60 turns on all layers take hours on a CPU. ROCKET's route is ours, from its paper.",
        ],
    )
