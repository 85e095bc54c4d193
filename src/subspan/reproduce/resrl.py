"""What punishing wrong solutions costs right ones: one step on model-written solutions of word problems.

Of every problem, the wrong solutions are made less likely by one gradient step whose tokens are weighted by one method
after the other, each with the rate that lowers wrong solutions as far; then the right solutions are read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import spearmanr, wilcoxon
from torch import Tensor, nn

from subspan.datasets import load_language_model, model_solutions
from subspan.datasets.solutions import solutions_file
from subspan.edit import ResidualCredit, entropy_mask, head_interference, hidden_reward_weights
from subspan.measures import paired_bootstrap
from subspan.models import Capture

from .materials.language_tail import LanguageTail, Texts
from .protocol import Check, Outcome, Progress, Table

ARMS = ("all alike (NSR)", "ResRL", "ResRL, shuffled", "ResRL, final states", "NTHR", "entropy, top 20 %")
PLAIN, OURS, SHUFFLED, FINAL, HIDDEN, ENTROPY = ARMS
CONSTANT = "one weight, as much in all"


class Setting(NamedTuple):
    """Problems, trained blocks, most tokens of a problem with its solutions, and nats that wrong tokens shall lose."""

    problems: int = 20
    blocks: int = 2
    tokens: int = 480
    drop: float = 0.1


QUICK = Setting(5, 1, 360)


class Problem(NamedTuple):
    """A question, different answers to it, and which of them are right."""

    question: str
    answers: list[str]
    right: list[bool]


def written() -> list[Problem] | None:
    """GSM8K's test problems with four models' solutions each, where that file is in the data folder."""
    if solutions_file() is None:
        return None
    different = [
        (each.question, {text: each.right[by] for by, text in each.solutions.items()}) for each in model_solutions()
    ]
    return [Problem(question, list(judged), list(judged.values())) for question, judged in different]


def made() -> list[Problem]:
    """Sums in words with two right ways to solve each and two wrong ones."""
    problems = []
    for a, b, c in np.random.default_rng(0).integers([20, 10, 2], [60, 40, 10], size=(200, 3)).tolist():
        answers = [
            f"First {a} + {b} = {a + b} apples. Then {a + b} - {c} = {a + b - c} are left.\nA: {a + b - c}",
            f"Without the eaten ones {a} - {c} = {a - c}. Then {a - c} + {b} = {a - c + b}.\nA: {a - c + b}",
            f"First {a} + {b} = {a + b} apples. Then {a + b} + {c} = {a + b + c} are left.\nA: {a + b + c}",
            f"Without the eaten ones {a} - {c} = {a - c}. So {a - c} - {b} = {a - c - b} are left.\nA: {a - c - b}",
        ]
        question = f"Tom has {a} apples. He buys {b} more and eats {c} of all. How many are left?"
        problems.append(Problem(question, answers, [True, True, False, False]))
    return problems


def chosen(problems: list[Problem], setting: Setting, tokenizer: object, seed: int) -> list[Problem]:
    """Problems with right and wrong answers that are not too long, drawn with the seed."""
    found = []
    for place in np.random.default_rng(seed).permutation(len(problems)):
        problem = problems[place]
        if len(found) == setting.problems:
            break
        length = sum(len(tokenizer(f"{problem.question}{answer}")["input_ids"]) for answer in problem.answers)  # pyright: ignore
        if 0 < sum(problem.right) < len(problem.right) and length <= setting.tokens:
            found.append(problem)
    return found


class Group(NamedTuple):
    """A problem as the tail reads it, which answers are right, and for each token wanted whether its answer is."""

    texts: Texts
    right: Bool[Tensor, " b"]

    @property
    def good(self) -> Bool[Tensor, " n"]:
        """Whether the answer of each token is right."""
        return self.right.unsqueeze(1).expand_as(self.texts.predicted)[self.texts.predicted]


class Reading(NamedTuple):
    """Of the untouched tail: weights of the wrong tokens by arm, and how residuals go with what they pull down."""

    weights: dict[str, Float[Tensor, " w"]]
    correlation: float


@torch.no_grad()
def weighted(tail: LanguageTail, group: Group, seed: int) -> Reading:
    """Weights of a problem's wrong tokens by every method."""
    texts, mask = group.texts, group.texts.predicted
    with Capture(tail.body, tail.last, site="input") as seen:
        outputs = tail.outputs(texts)
    before = seen[seen.names[0]][:, :-1]
    chances = tail.logits(texts, outputs).softmax(-1)
    entropies, errors = outputs.new_zeros(mask.shape), outputs.new_zeros(*mask.shape, chances.shape[-1])
    entropies[mask] = -(chances * chances.clamp_min(1e-12).log()).sum(-1)
    errors[mask] = chances - nn.functional.one_hot(texts.targets, chances.shape[-1])
    one, wrong = ["one"] * len(mask), mask & ~group.right.unsqueeze(1)
    right = mask & group.right.unsqueeze(1)
    # With few right tokens, 64 directions would hold nearly all of them.
    credit = ResidualCredit(rank=max(1, min(64, int(right.sum()) // 4)))
    ours = credit.weights(before, mask, group.right, one)[wrong]
    weights = {
        PLAIN: torch.ones_like(ours),
        OURS: ours,
        SHUFFLED: ours[torch.from_numpy(np.random.default_rng(seed).permutation(len(ours)))],
        FINAL: credit.weights(outputs, mask, group.right, one)[wrong],
        HIDDEN: hidden_reward_weights(outputs, errors, mask, group.right, one)[wrong],
        ENTROPY: entropy_mask(entropies, wrong)[wrong].float(),
    }
    pull = head_interference(outputs[right], errors[right], outputs[wrong], errors[wrong]).sum(0)
    (energy,) = [energy for _, energy in credit.residuals(before, mask, group.right, one)]
    return Reading(weights, float(spearmanr(energy.numpy(), pull.numpy())[0]))  # pyright: ignore


class Steps:
    """Gradient steps on a problem's wrong answers, each taken back after it was read."""

    def __init__(self, tail: LanguageTail, group: Group) -> None:
        self.tail, self.parameters, self.group = tail, tail.free, group
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.likelihoods = tail.log_likelihood(group.texts)
        self.plain = self.gradient(torch.ones(int((~group.good).sum())))

    def gradient(self, weights: Float[Tensor, " w"]) -> list[Tensor]:
        """Of the weighted mean log-likelihood of wrong tokens."""
        wanted = (self.likelihoods[~self.group.good] * weights).mean()
        return list(torch.autograd.grad(wanted, self.parameters, retain_graph=True))

    @torch.no_grad()
    def change(self, gradient: list[Tensor], rate: float) -> tuple[float, float]:
        """Mean change of log-likelihood of right tokens and of wrong ones by a step down."""
        # By `data`: the graph of `likelihoods` is used again, and finds every parameter as it was.
        for parameter, direction in zip(self.parameters, gradient):
            parameter.data.sub_(direction, alpha=rate)
        moved = self.tail.log_likelihood(self.group.texts) - self.likelihoods
        for parameter, start in zip(self.parameters, self.start):
            parameter.data.copy_(start)
        return float(moved[self.group.good].mean()), float(moved[~self.group.good].mean())

    def equal(self, gradient: list[Tensor], drop: float) -> tuple[float, float]:
        """The change of right tokens where wrong ones lose `drop`, and the rate of it."""
        slope = float(sum((a * b).sum() for a, b in zip(gradient, self.plain)))
        rate, right, wrong = drop / max(slope, 1e-12), 0.0, 0.0
        for _ in range(3):
            right, wrong = self.change(gradient, rate)
            if abs(wrong + drop) < 0.03 * drop:
                break
            rate *= float(np.clip(drop / max(-wrong, 1e-12), 0.2, 5.0))
        return right * drop / max(-wrong, 1e-12), rate


def measured(tail: LanguageTail, group: Group, drop: float, seed: int) -> dict[str, float]:
    """Of one problem: changes of right answers at an equal drop of wrong ones by arm, and at one rate."""
    reading, steps = weighted(tail, group, seed), Steps(tail, group)
    mass = float(reading.weights[OURS].mean())
    facts = {"correlation": reading.correlation, "mass": mass}
    for arm in ARMS:
        gradient = steps.plain if arm == PLAIN else steps.gradient(reading.weights[arm])
        facts[arm], rate = steps.equal(gradient, drop)
        if arm == PLAIN:
            facts["rate"] = rate
            facts[f"{CONSTANT}, one rate"] = steps.change(gradient, mass * rate)[0]
        if arm in (OURS, SHUFFLED):
            facts[f"{arm}, one rate"] = steps.change(gradient, facts["rate"])[0]
    return facts


def judged(found: Mapping[str, np.ndarray]) -> tuple[Check, list[Check]]:
    """The main check and the others; `found` has an entry a problem."""

    def lower(ours: str, theirs: str) -> float:
        return paired_bootstrap(found[ours], found[theirs])[1]

    def chance(theirs: str) -> float:
        return float(wilcoxon(found[OURS], found[theirs], alternative="greater")[1])  # pyright: ignore

    gap = "right answers' gain over it, nats a token, lower end of 95 %"
    share = float((found[OURS] > found[PLAIN]).mean())
    rank = paired_bootstrap(found["correlation"], np.zeros_like(found["correlation"]))[2]
    main = Check.above("right answers lose less than where all tokens are punished alike", gap, lower(OURS, PLAIN), 0)
    return main, [
        Check.below("and so in most problems", "Wilcoxon's p, one-sided", chance(PLAIN), 0.01),
        Check.at_least("in three of five problems or more", "share of problems", share, 0.6),
        Check.above("which tokens are spared matters: shuffled weights", gap, lower(OURS, SHUFFLED), 0),
        Check.above(
            "nor is it the smaller step: one weight of equal mass, at one rate",
            gap,
            lower(f"{OURS}, one rate", f"{CONSTANT}, one rate"),
            0,
        ),
        Check.below(
            "tokens with large residuals pull right answers down less",
            "rank correlation of residual and head interference, upper end of 95 %",
            rank,
            0,
        ),
        *(
            Check.above(f"better than {name}", gap, lower(OURS, name), 0, required=False)
            for name in (FINAL, HIDDEN, ENTROPY)
        ),
        Check.below(
            "there is something to spare: right answers fall with wrong ones",
            "mean change of right answers, all alike, nats a token",
            float(found[PLAIN].mean()),
            0,
            quick=True,
        ),
    ]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """One step on wrong solutions by each method, problem by problem."""
    setting, problems = QUICK if quick else Setting(), written()
    model, tokenizer = load_language_model("smollm2")
    tail = LanguageTail(model, setting.blocks, norm=True, head=True)
    picked = chosen(problems or made(), setting, tokenizer, seed)
    pieces = [[[(f"Question: {p.question}\nAnswer:", "asked"), (f" {a}", "answer")] for a in p.answers] for p in picked]
    rows = []
    for done, (problem, own) in enumerate(zip(picked, pieces)):
        progress("steps on wrong answers", done / len(picked))
        group = Group(Texts.of(tail.keep(tokenizer, own, "answer")), torch.tensor(problem.right))
        rows.append(measured(tail, group, setting.drop, seed + done))
    found = {fact: np.array([row[fact] for row in rows]) for fact in rows[0]}
    main, checks = judged(found)
    columns = ["method", "right answers", "less all alike", "from", "to", "better in"]
    table = [
        (
            arm,
            float(found[arm].mean()),
            *(paired_bootstrap(found[arm], found[PLAIN]) if arm != PLAIN else (None, None, None)),
            float((found[arm] > found[PLAIN]).mean()) if arm != PLAIN else None,
        )
        for arm in ARMS
    ]
    at_one = [(name, float(found[f"{name}, one rate"].mean())) for name in (OURS, SHUFFLED, CONSTANT)]
    return Outcome(
        claim="Punishing those tokens of wrong answers less that lie near the right answers' subspace spares the right "
        "answers.",
        data=f"{'GSM8K test problems, four model-written solutions each' if problems else 'made sums in words'}: "
        f"{len(picked)} with right and wrong ones, at most {setting.tokens} tokens together",
        model=f"SmolLM2-135M-Instruct; one gradient step on its last {setting.blocks} blocks, norm and output layer",
        metric=f"mean change of right answers' log-likelihood, nats a token, where wrong ones lose {setting.drop:g}",
        ours=float(found[OURS].mean()),
        baselines={arm: float(found[arm].mean()) for arm in ARMS if arm != OURS},
        main=main,
        checks=checks,
        tables=[
            Table.rounded(f"where wrong answers lose {setting.drop:g} nats a token", columns, table, 4),
            Table.rounded("at the rate of all alike", ["weights", "right answers"], at_one, 4),
            Table.rounded(
                "of the weights",
                ["fact", "mean over problems"],
                [
                    ("weight of a wrong token in ResRL", float(found["mass"].mean())),
                    ("rank correlation of residual and head interference", float(found["correlation"].mean())),
                ],
                3,
            ),
        ],
        notes=[
            "One step, no sampling and no reinforcement over time: this is the mechanism that the paper argues from, "
            "not its benchmark scores. The rank is a quarter of the right tokens, at most 64.",
        ],
    )
