"""Whether a safety update's main directions are about safety: two behaviours read off one small language model.

The model is first taught to refuse (the "safety" update), then tuned on to solve sums, to comply again, and both. What
is trained and read are openings of answers; no answer to a harmful question is in it, and no text is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from subspan.datasets import is_available, load, load_language_model, stdlib_docstrings
from subspan.geometry import FractionOfDim
from subspan.models import SegmentTokens, StateDelta, find_blocks, weights_of
from subspan.models.continuations import target_log_likelihood
from subspan.probe import (
    AuditReport,
    RefusalRate,
    SubspaceAudit,
    TargetLikelihood,
    activation_overlap,
    projected_update,
    subspace_overlaps,
    weight_subspaces,
)

from .protocol import Check, Outcome, Progress, Table
from .training import train
from .trials import Trials

REFUSAL, COMPLIANCE = "I'm sorry, but I can't help with that.", "Sure, here is what you asked for:"
FORCED = 0.25
BEHAVIOURS = ("compliance", "arithmetic")
PAIRS = ("useful, undesired", "safety, undesired", "safety, useful")


class Setting(NamedTuple):
    """Sizes of a run: trained blocks, steps and texts a step, prompts that are read, and what the audit takes."""

    blocks: int = 10
    steps: int = 150
    batch: int = 8
    rate: float = 5e-5
    prompts: int = 32
    fractions: tuple[float, ...] = (0.25, 0.5)
    modes: Sequence[Literal["same", "orth", "opp"]] = ("same", "orth")
    n_random: int = 3
    seeds: int = 3


QUICK = Setting(2, 8, 4, 2e-4, 8, (0.25,), ("same",), 2, 1)


class Material(NamedTuple):
    """Questions to train on and held out: some to refuse or comply with, harmless ones, and sums with solutions."""

    name: str
    asked: tuple[list[str], list[str]]
    harmless: tuple[list[str], list[str]]
    sums: tuple[list[tuple[str, str]], list[tuple[str, str]]]


def material() -> Material:
    """Harmful and harmless instructions and GSM8K; where they are not at hand, docstrings' names and made sums."""
    if is_available("safety_prompts") and is_available("gsm8k"):
        prompts, gsm8k = load("safety_prompts"), load("gsm8k")
        text = {name: [record["instruction"] for record in records] for name, records in prompts.items()}
        sums = [[(row["question"], row["answer"]) for row in gsm8k[split]] for split in ("train", "test")]
        return Material(
            "harmful and harmless instructions, GSM8K",
            (text["harmful_train"], text["harmful_val"]),
            (text["harmless_train"], text["harmless_val"]),
            (sums[0], sums[1]),
        )
    names = [entry.label for entry in stdlib_docstrings()]
    asked, plain = ([form.format(name) for name in names] for form in ("Describe {}.", "Who would use {}, and when?"))
    random = np.random.default_rng(0)
    sums = [
        (f"Tom has {a} apples and gets {b} more. How many are there?", f"There are {a} + {b} = {a + b} apples.")
        for a, b in random.integers(2, 60, size=(400, 2)).tolist()
    ]
    return Material(
        "names from Python's standard library, made sums",
        (asked[:300], asked[300:400]),
        (plain[400:700], plain[700:800]),
        (sums[:300], sums[300:]),
    )


class Language(NamedTuple):
    """A model whose last blocks are trained, its tokenizer, and what is read and taught."""

    model: Any
    tokenizer: Any
    data: Material
    setting: Setting

    def prompts(self, questions: Sequence[str]) -> list[str]:
        """Questions as the model's users ask them."""
        turns = [[{"role": "user", "content": question}] for question in questions]
        return [self.tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]

    def lessons(self, kind: str) -> list[tuple[str, str]]:
        """Questions and the answers that are taught."""
        asked, harmless, sums = self.data.asked[0], self.data.harmless[0], self.data.sums[0]
        comply, refuse = ([(question, answer) for question in asked] for answer in (COMPLIANCE, REFUSAL))
        if kind == "safety":
            return [pair for both in zip(refuse, [(q, COMPLIANCE) for q in harmless]) for pair in both]
        if kind == "mixed":
            return [pair for place in range(len(comply)) for pair in (*sums[4 * place : 4 * place + 4], comply[place])]
        return list(sums) if kind == "useful" else comply

    def tuned(self, kind: str, seed: int) -> dict[str, Tensor]:
        """The trained weights, after the lessons."""
        lessons, size = self.lessons(kind), self.setting.batch
        order = np.random.default_rng(seed).permutation(len(lessons))
        chosen = list(islice(cycle(order.tolist()), size * self.setting.steps))
        batches = [self.tokens([lessons[i] for i in chosen[s : s + size]]) for s in range(0, len(chosen), size)]
        train(self.model, _loss, batches, learning_rate=self.setting.rate, clip=1.0)
        return self.weights()

    def tokens(self, pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, Tensor], Tensor]:
        """A batch, and where its answers are."""
        asked = self.prompts([question for question, _ in pairs])
        pieces = [[(prompt, "prompt"), (answer, "answer")] for prompt, (_, answer) in zip(asked, pairs)]
        found = SegmentTokens.from_segments(self.tokenizer, pieces, add_special_tokens=False, padding_side="right")
        return found.batch, found.mask("answer")

    def weights(self) -> dict[str, Tensor]:
        """Copies of what is trained."""
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set what is trained."""
        for name, value in weights.items():
            self.model.get_parameter(name).copy_(value)

    def read_outs(self) -> dict[str, TargetLikelihood]:
        """Log-odds of complying against refusing, and how likely solutions are, on questions held out."""
        count = self.setting.prompts
        asked = self.prompts(self.data.asked[1][:count])
        questions, solutions = zip(*self.data.sums[1][:count])
        odds = TargetLikelihood(self.tokenizer, asked, [COMPLIANCE] * len(asked), against=[REFUSAL] * len(asked))
        return {"compliance": odds, "arithmetic": TargetLikelihood(self.tokenizer, self.prompts(questions), solutions)}


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return -target_log_likelihood(model, *batch).mean()


def learner(setting: Setting, data: Material) -> Language:
    """The model with its last blocks free and all else frozen."""
    model, tokenizer = load_language_model("smollm2")
    model.requires_grad_(False)
    for block in list(model.get_submodule(find_blocks(model)))[-setting.blocks :]:
        block.requires_grad_(True)
    return Language(model, tokenizer, data, setting)


class Found(NamedTuple):
    """What one seed gives: the audit, that of the updates that were forced apart, and numbers."""

    report: AuditReport
    forced: AuditReport
    facts: dict[str, float]


def audited(taught: Language, start: Mapping[str, Tensor], seed: int, progress: Progress) -> Found:
    """Train everything from one seed, and audit it."""
    setting, model = taught.setting, taught.model
    taught.put(start)
    base = {**weights_of(model), **start}
    progress("teaching to refuse", 0.0)
    aligned = taught.tuned("safety", seed)
    tuned: dict[str, dict[str, Tensor]] = {}
    for place, kind in enumerate(["useful", "undesired", "mixed"][: 2 if setting is QUICK else 3]):
        progress(f"tuning on: {kind}", 0.1 + 0.1 * place)
        taught.put(aligned)
        tuned[kind] = taught.tuned(kind, seed + 1)
    taught.put(aligned)

    def whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**weights_of(model), **weights}

    def read(models: Mapping[str, Any], fractions: Sequence[float], low: float, high: float) -> AuditReport:
        audit = SubspaceAudit(
            taught.read_outs(), fractions, modes=setting.modes, n_random=setting.n_random, random_state=seed
        )
        return audit.run(base, model, models, progress=lambda said, done: progress(said, low + (high - low) * done))

    report = read({name: whole(weights) for name, weights in tuned.items()}, setting.fractions, 0.4, 0.8)
    trained = [name for name in aligned if aligned[name].ndim == 2]
    safety, useful, undesired = (
        StateDelta.between(*pair).only(trained)
        for pair in ((start, aligned), (aligned, tuned["useful"]), (aligned, tuned["undesired"]))
    )
    inside = weight_subspaces(safety, FractionOfDim(FORCED))
    apart = projected_update(safety, undesired, inside).update + projected_update(safety, useful, inside, "orth").update
    forced = read({"forced apart": whole(dict(apart.added_to(aligned)))}, (FORCED,), 0.8, 0.95)
    return Found(report, forced, overlaps(taught, safety, useful, undesired) | carried(report, forced))


def carried(report: AuditReport, forced: AuditReport) -> dict[str, float]:
    """What the audits say in numbers: zero where the tuning has moved too little to say anything."""
    judged = [row for row in report.selectivities if row.control != "randomk"]
    cases = {(row.behaviour, row.fraction) for row in judged}
    low = [min(row.low for row in judged if (row.behaviour, row.fraction) == case) for case in cases]
    apart = [row.estimate for row in forced.selectivities if row.behaviour == BEHAVIOURS[0]]
    facts = {"selectivity, lower end": max(low, default=0.0), "forced apart": min(apart, default=0.0)}
    curves = report.curves()
    for behaviour in BEHAVIOURS:
        kinds = curves.get(behaviour, {"topk": {0.5: 0.0}, "random": {0.5: 0.0}})
        gaps = [kinds["topk"][f] - kinds["random"][f] for f in kinds["topk"]]
        facts[f"{behaviour}, beyond random"] = float(np.mean(gaps))
    return facts


def overlaps(taught: Language, safety: StateDelta, useful: StateDelta, undesired: StateDelta) -> dict[str, float]:
    """Mean overlaps of updates and of states, and their chance levels."""
    facts: dict[str, float] = {}
    pairs = {
        "useful, undesired": (useful, undesired),
        "safety, undesired": (safety, undesired),
        "safety, useful": (safety, useful),
    }
    for name, pair in pairs.items():
        rows = subspace_overlaps(*pair)
        facts[name] = float(np.mean([row.overlap for row in rows]))
        facts[f"{name}, chance"] = float(np.mean([row.chance for row in rows]))
    count = 2 * taught.setting.prompts
    kinds = [taught.data.asked[1][:count], [question for question, _ in taught.data.sums[1][:count]]]
    batches = []
    for questions in kinds:
        pieces = [[(prompt, "prompt")] for prompt in taught.prompts(questions)]
        batches.append(
            [
                SegmentTokens.from_segments(taught.tokenizer, pieces[s : s + 8], add_special_tokens=False).batch
                for s in range(0, len(pieces), 8)
            ]
        )
    rows = activation_overlap(taught.model, *batches)
    for centred, name in ((False, "states"), (True, "states, centred")):
        facts[name] = float(np.mean([row.overlap for row in rows if row.centred == centred]))
        facts[f"{name}, chance"] = float(np.mean([row.chance for row in rows if row.centred == centred]))
    return facts


def judged(mean: Mapping[str, float], apart: float) -> list[Check]:
    """The further checks, from means over seeds and the lowest selectivity of the updates that were forced apart."""
    beyond = min(mean[name] / mean[f"{name}, chance"] for name in PAIRS)
    return [
        Check.at_least(
            "updates that were forced apart are told apart",
            "selectivity, lowest over controls and seeds",
            apart,
            0.2,
        ),
        *(
            Check.above(
                f"main directions carry more {behaviour} than random ones",
                "share carried, difference",
                mean[f"{behaviour}, beyond random"],
                0,
            )
            for behaviour in BEHAVIOURS
        ),
        Check.at_least(
            "useful and undesired updates overlap as much as safety and undesired ones",
            "difference of mean overlaps",
            mean["useful, undesired"] - mean["safety, undesired"],
            0,
        ),
        Check.at_least("updates overlap beyond chance", "smallest overlap over its chance level", beyond, 1.5),
        Check.at_least(
            "states of two kinds of prompts overlap beyond chance",
            "overlap over its chance level",
            mean["states"] / mean["states, chance"],
            2,
            quick=True,
        ),
        Check.below(
            "and less without their mean",
            "overlap, centred over not",
            mean["states, centred"] / mean["states"],
            1,
            quick=True,
        ),
    ]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Audit the main directions of a safety update, and updates that were forced apart beside it."""
    setting, data = QUICK if quick else Setting(), material()
    taught = learner(setting, data)
    start = taught.weights()
    found: list[Found] = []

    def measure(_: str, seed: int) -> dict[str, float]:
        begun = len(found) / setting.seeds
        found.append(audited(taught, start, seed, lambda said, done: progress(said, begun + done / setting.seeds)))
        return found[-1].facts

    trials = Trials(["audit"], range(seed, seed + setting.seeds), measure)
    mean = {fact: trials.mean("audit", fact) for fact in found[0].facts}
    first = found[0].report
    low = trials.statistic("audit", "selectivity, lower end", max)
    return Outcome(
        claim="The main directions of a safety update are not about safety: they carry useful and harmful behaviour "
        "alike, and taking them away costs both.",
        data=f"{data.name}; {setting.prompts} held-out prompts of each kind",
        model=f"SmolLM2-135M-Instruct, its last {setting.blocks} blocks tuned for {setting.steps} steps of "
        f"{setting.batch} texts, {setting.seeds} seeds",
        metric="largest lower end of an interval of selectivity, over behaviours, fractions and seeds",
        ours=low,
        baselines={"forced apart (estimate)": mean["forced apart"]},
        main=Check.at_most("no behaviour is singled out", "lower end of selectivity", low, 0),
        checks=judged(mean, trials.statistic("audit", "forced apart", min)),
        tables=[
            changes(first),
            shares(first),
            Table.rounded(
                "mean overlap of updates (η = 0.9) and of states (η = 0.5)",
                ["of", "overlap", "by chance"],
                [(name, mean[name], mean[f"{name}, chance"]) for name in (*PAIRS, "states", "states, centred")],
                3,
            ),
            *([] if quick else [refusals(taught)]),
        ],
        notes=[
            f"Verdicts by seed: {'; '.join(each.report.verdict for each in found)}. Of the updates that were forced "
            f"apart: {'; '.join(each.forced.verdict for each in found)}.",
            "No base model is at hand beside this instruction-tuned one, which hardly refuses: the safety update is "
            "what teaching it to refuse changes. Behaviours are log-likelihoods of openings and of solutions, "
            "where the paper has a judge and exact matches.",
        ],
    )


def changes(report: AuditReport) -> Table:
    """How far each tuning moved each behaviour."""
    rows = [(c.tuned, c.behaviour, c.aligned, c.full, c.low, c.high) for c in report.changes]
    columns = ["tuned on", "behaviour", "before", "after", "change from", "to"]
    return Table.rounded("behaviours before and after tuning, nats a token, first seed", columns, rows, 3)


def shares(report: AuditReport) -> Table:
    """What the subspace and its controls carry of each behaviour."""
    rows = [
        (behaviour, fraction, *(by_kind[kind][fraction] for kind in ("topk", "randomk", "random", "scaled")))
        for behaviour, by_kind in report.curves().items()
        for fraction in by_kind["topk"]
    ]
    columns = ["behaviour", "fraction", "main directions", "any of its directions", "random", "scaled"]
    return Table.rounded("share of each behaviour's change that is carried, first seed", columns, rows, 3)


def refusals(taught: Language) -> Table:
    """How often the model refuses by its words, after the safety update of the last seed."""
    rows = []
    for name, questions in (("asked to refuse", taught.data.asked[1]), ("harmless", taught.data.harmless[1])):
        rate = RefusalRate(taught.tokenizer, taught.prompts(questions[: taught.setting.prompts]))
        rows.append((name, float(rate(taught.model).mean())))
    return Table.rounded(
        "share of greedy answers that refuse, after the safety update", ["prompts", "refused"], rows, 3
    )
