"""Varieties of a language inside a language model: where they can be told apart, and whether keeping them apart helps.

First the diagnosis, layer by layer, beside shuffled labels. Then the last blocks are tuned to rewrite verses of modern
English, of which the model has seen most, in early modern English and back: as it is, and with penalties on what of
the states lies in the subspace that tells the modern ones.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from subspan.datasets import is_available, load, load_language_model, stdlib_docstrings
from subspan.edit import Refresh, SubspaceDecoupling, VarietyReading, leace, variety_report
from subspan.geometry import AffineMap
from subspan.measures import chrf_scores, paired_bootstrap
from subspan.models import SegmentTokens, greedy_continuations, intervene
from subspan.statistics import GroupedMoments

from .materials.language_tail import LanguageTail, Texts
from .protocol import Check, Outcome, Progress, Table
from .training import train
from .trials import Trials

ARMS = ("plain", "online", "fixed", "random", "shrinkage", "LEACE")
_PLAIN: Any = {"add_special_tokens": False, "padding_side": "right"}
PROBE = {"epochs": 12, "learning_rate": 5e-3, "class_weight": "balanced"}
TO_OTHER, TO_DOMINANT = DIRECTIONS = ("into the other variety", "into the dominant variety")
LIKELIHOOD = "log-likelihood "


class Setting(NamedTuple):
    """Sizes: blocks trained, steps, texts a step, pairs held out, λ, steps between estimates, pairs for probes; layers
    and texts a variety of the diagnosis; seeds, learning rate; held-out pairs that are said."""

    blocks: int = 2
    steps: int = 30
    batch: int = 4
    held: int = 32
    weight: float = 5.0
    every: int = 10
    probed: int = 24
    layers: tuple[int, ...] = (0, 9, 19, 29)
    diagnosed: int = 30
    seeds: int = 3
    rate: float = 1e-4
    said: int = 10


QUICK = Setting(1, 6, 2, 6, 5.0, 3, 8, (29,), 10, 1, said=3)


class Material(NamedTuple):
    """Texts by variety, the dominant one first; and pairs (dominant, other) to train on and held out."""

    name: str
    varieties: dict[str, list[str]]
    pairs: tuple[list[tuple[str, str]], list[tuple[str, str]]]


def material() -> Material:
    """Dialects of Arabic and verses in two Englishes; where they are not at hand, docstrings with words exchanged."""
    if is_available("arabic_dialects") and is_available("english_varieties"):
        tweets, verses = load("arabic_dialects/dial2msa_train"), load("english_varieties")
        # From all over the file: tweets near each other are of one dialect, and their topics would tell.
        tweets = [tweets[i] for i in np.random.default_rng(0).permutation(len(tweets))]
        varieties: dict[str, list[str]] = {"msa": [row["msa"] for row in tweets]}
        for dialect in sorted({row["dialect"] for row in tweets}):
            varieties[dialect] = [row["text"] for row in tweets if row["dialect"] == dialect]
        train_pairs, test_pairs = (
            [(row["modern"], row["early_modern"]) for row in verses[split] if 40 < len(row["modern"]) < 100]
            for split in ("train", "test")
        )
        return Material("tweets in Arabic dialects and standard Arabic; verses", varieties, (train_pairs, test_pairs))
    texts = [text[:160] for entry in stdlib_docstrings() if len(text := entry.text.split("\n")[0]) > 40]
    turned = [[_exchanged(text, words) for text in texts] for words in ({"the": "ye", "a": "ane"}, {"of": "von"})]
    pairs = list(zip(texts, turned[0]))
    return Material(
        "first lines of docstrings, words exchanged by rule",
        {"plain": texts[:200], "first": turned[0][200:400], "second": turned[1][400:600]},
        (pairs[:400], pairs[400:]),
    )


def _exchanged(text: str, words: Mapping[str, str]) -> str:
    return " ".join(words.get(word, word) for word in text.split(" "))


def diagnosed(model: Any, tokenizer: Any, data: Material, setting: Setting, progress: Progress) -> list[VarietyReading]:
    """Bits and angles of the varieties in some layers of the whole model."""
    texts = [(text[:60], name) for name, all_texts in data.varieties.items() for text in all_texts[: setting.diagnosed]]
    batches = [
        SegmentTokens.from_segments(tokenizer, [[(text, "text")] for text, _ in texts[s : s + 16]], **_PLAIN).batch
        for s in range(0, len(texts), 16)
    ]
    return variety_report(
        model.base_model,
        batches,
        [name for _, name in texts],
        next(iter(data.varieties)),
        layers=list(setting.layers),
        drop_tokens=1,
        settings=PROBE | {"epochs": 20, "learning_rate": 2e-2, "batch_size": 256},
        progress=progress,
    )


def lessons(pairs: list[tuple[str, str]], turned: bool) -> list[list[tuple[str, str]]]:
    """Prompts and answers in pieces: into the other variety, or (turned) into the dominant one."""
    said = "Modern English" if turned else "Early modern English"
    return [
        [(f"{first}\n{said}:", "asked"), (f" {second}\n", "answer")]
        for first, second in ((pair[::-1] if turned else pair) for pair in pairs)
    ]


class Tuned:
    """The tail, the texts that it is tuned and read on, and its weights as they were."""

    def __init__(
        self, model: Any, tokenizer: Any, data: Material, setting: Setting, seed: int, progress: Progress
    ) -> None:
        self.setting, size, self.model, self.tokenizer = setting, setting.batch, model, tokenizer
        # An answer is a line.
        model.generation_config.eos_token_id = tokenizer("\n", add_special_tokens=False)["input_ids"]
        self.tail = LanguageTail(model, setting.blocks, norm=True)
        train_pairs, test_pairs = data.pairs
        order = np.random.default_rng(seed).permutation(len(train_pairs))
        drawn = [train_pairs[i] for i in order[: setting.steps * size // 2]]
        half = max(1, size // 2)
        groups = [drawn[s : s + half] for s in range(0, len(drawn), half)]
        told = [lessons(group, False) + lessons(group, True) for group in groups]
        held = [test_pairs[i] for i in np.random.default_rng(seed).permutation(len(test_pairs))[: setting.held]]
        read = [lessons(held[s : s + 4], turned) for turned in (False, True) for s in range(0, len(held), 4)]
        self.asked = [lesson for turned in (False, True) for lesson in lessons(held[: setting.said], turned)]
        known = [train_pairs[i] for i in order[-setting.probed :]]
        plain = [[[(pair[side], "answer")] for pair in known] for side in (0, 1)]
        batches, found = [*told, *read, *plain], []
        for done, texts in enumerate(batches):
            progress("states below the trained blocks", done / len(batches))
            found.append(Texts.of(self.tail.keep(tokenizer, texts, "answer")))
        self.told, self.read, self.known = found[: len(told)], found[len(told) : -2], found[-2:]
        self.sides = ["dominant"] * len(known) + ["other"] * len(known)
        self.parameters = self.tail.free
        self.start = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def reset(self) -> None:
        """Weights as they were."""
        for parameter, start in zip(self.parameters, self.start):
            parameter.copy_(start)

    @torch.no_grad()
    def eraser(self) -> AffineMap:
        """LEACE on the inputs of the output layer, of the texts that probes are fitted to."""
        moments = GroupedMoments(self.tail.outputs(self.known[0]).shape[-1])
        for side, texts in zip(("dominant", "other"), self.known):
            rows = self.tail.outputs(texts)[texts.predicted]
            moments.update(rows, [side] * len(rows))
        return leace(moments)

    @torch.no_grad()
    def scores(self, erase: AffineMap | None = None) -> dict[str, np.ndarray]:
        """chrF++ of what is said, and log-likelihood a token of what should be, held-out verse by verse."""

        def through(states: Tensor) -> Tensor:
            return states if erase is None else erase.map(states)

        values = [
            texts.means(self.tail.log_likelihood(texts, through(self.tail.outputs(texts)))) for texts in self.read
        ]
        both = torch.cat(values).view(2, -1).numpy()
        with intervene(self.model, {f"{self.model.base_model_prefix}.norm": through}):
            prompts = [asked for (asked, _), _ in self.asked]
            said = greedy_continuations(
                self.model, self.tokenizer, prompts, max_new_tokens=40, batch_size=20, add_special_tokens=False
            )
            lines = [text.strip().partition("\n")[0] for text in said]
        found = chrf_scores(lines, [answer.strip() for _, (answer, _) in self.asked]).reshape(2, -1)
        return dict(zip(DIRECTIONS, found)) | {LIKELIHOOD + name: own for name, own in zip(DIRECTIONS, both)}

    def run(self, arm: str, seed: int) -> tuple[dict[str, np.ndarray], list[Refresh]]:
        """Scores after a tuning by one method, and what its probes found."""
        self.reset()
        setting, tail = self.setting, self.tail
        erase = self.eraser() if arm == "LEACE" else None

        with penalised(self, arm, seed) as decoupling:

            def loss(model: nn.Module, texts: Texts) -> Tensor:
                outputs = tail.outputs(texts)
                found = -tail.log_likelihood(texts, outputs if erase is None else erase.map(outputs)).mean()
                return found if decoupling is None else found + decoupling.penalty()

            def after(_: Any, step: int) -> None:
                if decoupling is not None:
                    decoupling.step(step)

            order = np.random.default_rng(seed).permutation(len(self.told))
            batches = [self.told[i] for i in order]
            train(tail, loss, batches, learning_rate=setting.rate, clip=1.0, after_step=after)
        return self.scores(erase), [] if decoupling is None else decoupling.history_


@contextlib.contextmanager
def penalised(tuned: Tuned, arm: str, seed: int) -> Iterator[SubspaceDecoupling | None]:
    """The penalty of an arm, None for those without one."""
    kinds: dict[str, Any] = {"online": "variety"} | {kind: kind for kind in ("fixed", "random", "shrinkage")}
    if arm not in kinds:
        yield None
        return
    options = {"weight": tuned.setting.weight, "every": tuned.setting.every, "kind": kinds[arm], "settings": PROBE}
    batches = [texts.batch for texts in tuned.known]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the probe is at chance")
        with SubspaceDecoupling(
            tuned.tail.body, "norm", batches, tuned.sides, "dominant", random_state=seed, **options
        ) as decoupling:
            yield decoupling


def judged(
    scores: Mapping[tuple[str, int], dict[str, np.ndarray]],
    seeds: range,
    readings: list[VarietyReading],
    estimates: list[Refresh],
) -> tuple[Check, list[Check]]:
    """The main check and the others; scores by arm and seed, a number a verse."""

    def gap(arm: str, fact: str, chosen: Sequence[int] = seeds, over: str = "plain") -> tuple[float, float, float]:
        ours, theirs = (np.mean([scores[name, seed][fact] for seed in chosen], axis=0) for name in (arm, over))
        return paired_bootstrap(ours, theirs)

    metric = "gain in chrF++ over plain tuning"
    main = Check.above(
        "the online penalty helps the other variety", f"{metric}, lower end of 95 %", gap("online", TO_OTHER)[1], 0
    )
    helped = sum(gap("online", TO_OTHER, [seed])[0] > 0 for seed in seeds)
    angles = [(r.angle, r.angle_shuffled) for r in readings if r.angle is not None and r.angle_shuffled is not None]
    return main, [
        Check.at_least("and does so in two of three seeds", "seeds", helped, 2),
        *(
            Check.at_most(f"{name} does not help", f"{metric}, lower end of 95 %", gap(arm, TO_OTHER)[1], 0)
            for arm, name in (("random", "a random subspace"), ("shrinkage", "shrinking all states"))
        ),
        Check.below(
            "the dominant variety pays for it", f"{metric}, upper end of 95 %", gap("online", TO_DOMINANT)[2], 0
        ),
        Check.above(
            "estimating again is better than one estimate",
            "online less fixed, chrF++, lower end of 95 %",
            gap("online", TO_OTHER, over="fixed")[1],
            0,
            required=False,
        ),
        Check.above(
            "references become likelier",
            "gain in log-likelihood over plain tuning, nats a token, lower end of 95 %",
            gap("online", LIKELIHOOD + TO_OTHER)[1],
            0,
            required=False,
        ),
        Check.above(
            "every layer tells every variety, beside shuffled labels",
            "smallest ratio of compressions, less 1",
            min(r.compression / r.compression_shuffled for r in readings) - 1,
            0,
        ),
        Check.above(
            "and names it more often than by chance, answers alike",
            "smallest mean of both answers' accuracies, less 0.5",
            min(r.accuracy - r.chance for r in readings),
            0,
            required=False,
        ),
        Check.above(
            "every estimate of the penalty finds a subspace",
            "smallest mean of both answers' accuracies, less 0.5",
            min(each.accuracy - each.chance for each in estimates),
            0,
            quick=True,
        ),
        Check.below(
            "varieties lie nearer to the dominant one than directions of shuffled labels",
            "mean angle less that of shuffled labels, degrees",
            float(np.mean([a - b for a, b in angles])),
            0,
        ),
    ]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Bits and angles a layer, then tuning with and without penalties."""
    setting, data = QUICK if quick else Setting(), material()
    model, tokenizer = load_language_model("smollm2")
    readings = diagnosed(model, tokenizer, data, setting, lambda said, done: progress(said, 0.2 * done))
    tuned = Tuned(model, tokenizer, data, setting, seed, lambda said, done: progress(said, 0.2 + 0.1 * done))
    scores: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    estimates: dict[tuple[str, int], list[Refresh]] = {}

    def measure(arm: str, seed: int) -> dict[str, float]:
        scores[arm, seed], estimates[arm, seed] = tuned.run(arm, seed)
        return {fact: float(values.mean()) for fact, values in scores[arm, seed].items()}

    seeds = range(seed, seed + setting.seeds)
    trials = Trials(ARMS, seeds, measure, progress=progress, span=(0.3, 1.0))
    main, checks = judged(scores, seeds, readings, [each for seed in seeds for each in estimates["online", seed]])
    tuned.reset()
    before = {fact: float(values.mean()) for fact, values in tuned.scores().items()}
    rows = [
        (
            each.step,
            each.accuracy,
            each.accuracy_before,
            each.bits,
            None if each.angle is None else float(np.rad2deg(each.angle)),
        )
        for each in estimates["online", seed]
    ]
    return Outcome(
        claim="Fine-tuning that keeps states out of a dominant variety's subspace helps the related varieties, at the "
        "dominant one's cost.",
        data=f"{data.name}: {setting.held} pairs held out, {setting.said} of them said, "
        f"{len(tuned.told) * setting.batch // 2} to tune on; "
        f"{setting.diagnosed} texts a variety in the diagnosis",
        model=f"SmolLM2-135M-Instruct, its last {setting.blocks} blocks tuned for {len(tuned.told)} steps of "
        f"{setting.batch} texts, {setting.seeds} seeds; penalty on the last normalised state, relative, λ = "
        f"{setting.weight:g}, estimated every {setting.every} steps",
        metric="mean chrF++ of what is said in the other variety, 0 to 100",
        ours=trials.mean("online", TO_OTHER),
        baselines={**trials.means(TO_OTHER, but="online"), "untuned": before[TO_OTHER]},
        main=main,
        checks=checks,
        tables=[
            trials.table(
                "chrF++ and log-likelihood a token, means over seeds",
                "tuned",
                [*DIRECTIONS, *(LIKELIHOOD + name for name in DIRECTIONS)],
                digits=4,
            ),
            Table.rounded(
                "the diagnosis: bits of the labels alone over bits by the probe, and angles in degrees",
                ["layer", "variety", "accuracy", "chance", "bits", "shuffled", "angle", "shuffled "],
                [tuple(vars(reading).values()) for reading in readings],
                3,
            ),
            Table.rounded(
                "estimates of the online penalty, first seed",
                ["after steps", "accuracy", "of the one before", "bits", "angle to the one before"],
                rows,
                3,
            ),
        ],
        notes=[
            "The pair is early modern and modern English, as the model spells Arabic nearly byte by byte; the "
            "diagnosis is of Arabic. Texts are said greedily, a line each. In probes both answers count alike, however "
            "many rows they have, and accuracies are means over the two.",
            "The layer, the rank and the unit of λ are not published: here the last state, one direction, and a "
            "penalty relative to the length of the states.",
        ],
    )
