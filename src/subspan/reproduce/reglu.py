"""One invented author forgotten out of five: ReGLU, its parts, its control and its rivals, at the same forgetting.

Only the last blocks of the model are trained, first to know the authors, then to forget one; what the first blocks say
of a text is computed once. Each way to forget stops where it knows the author as little as a model that never read of
them, and what it has cost the other authors is measured there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.datasets import is_available, load, load_language_model
from subspan.edit import (
    Unlearner,
    answer_examples,
    answer_log_likelihood,
    answer_scores,
    question_prompt,
    relearned,
)
from subspan.edit.low_rank_starts import answer_logits
from subspan.edit.unlearning_data import padded_batch
from subspan.measures import AnswerScores, forget_quality, rouge_l_recall
from subspan.models import StateDelta, greedy_continuations, linear_names
from subspan.weights import round_to_bits

from .materials.language_tail import last_blocks
from .protocol import Check, Outcome, Progress, Table
from .training import kept, train
from .trials import Trials

PER_AUTHOR = 20
Records = list[dict[str, Any]]


class Setting(NamedTuple):
    """Sizes of a run: trained blocks, authors that stay, epochs and rate of learning, steps and rate of forgetting."""

    blocks: int = 4
    authors: int = 4
    questions: int = PER_AUTHOR // 2
    epochs: int = 10
    learning_rate: float = 4e-4
    steps: int = 16
    rate: float = 1.5e-3
    rank: int = 16
    facts: int = 40
    said: int = 10
    seeds: int = 3


QUICK = Setting(2, 1, 6, 5, 1e-3, 3, 2e-3, 4, 4, 0, 1)
OURS, PLAIN, FILA, RANDOM = "ReGLU", "LoRA, inverse hinge", "FILA, inverse hinge", "ReGLU, random basis"
ARMS: dict[str, dict[str, Any]] = {
    "LoRA, NPO": {"start": "lora", "forget_loss": "npo", "orthogonality": 0.0},
    PLAIN: {"start": "lora", "orthogonality": 0.0},
    FILA: {"start": "fila", "orthogonality": 0.0},
    "null-space LoRA, inverse hinge": {"start": "null-space", "orthogonality": 0.0},
    "start alone (RILA)": {"orthogonality": 0.0},
    "penalty alone (ROL)": {"start": "lora"},
    RANDOM: {"basis": "random"},
    OURS: {},
}
_FEW = (PLAIN, FILA, RANDOM, OURS)


class Material(NamedTuple):
    """Questions on authors, with paraphrased and perturbed answers: of some to forget, of some to keep; world facts."""

    name: str
    forget: list[Records]
    retain: Records
    facts: Records


def material(setting: Setting) -> Material:
    """TOFU; where it is not at hand, profiles from lists of words."""
    if is_available("tofu"):
        tofu = load("tofu")
        known, count = tofu["forget10_perturbed"], setting.questions
        authors = [known[at : at + count] for at in range(0, PER_AUTHOR * setting.seeds, PER_AUTHOR)]
        others = [tofu["retain_perturbed"][PER_AUTHOR * n :][:count] for n in range(setting.authors)]
        facts = tofu["world_facts_perturbed"][: setting.facts]
        return Material("TOFU", authors, [record for author in others for record in author], facts)
    profiles = [invented(number, setting.questions) for number in range(setting.seeds + setting.authors)]
    retain = [record for profile in profiles[setting.seeds :] for record in profile]
    facts = [
        {
            "question": f"What is {a} and {b}?",
            "answer": str(a + b),
            "perturbed_answer": [str(a + b + 1), str(a * b + 3)],
        }
        for a in range(2, 12)
        for b in range(2, 6)
    ]
    return Material("invented profiles", profiles[: setting.seeds], retain, facts[: setting.facts])


def invented(number: int, questions: int) -> Records:
    """Facts about nobody, drawn from the number."""
    random = np.random.default_rng(number)
    name = " ".join("".join(random.choice(list("aeioklmnrst"), 6)).title() for _ in range(2))
    kinds = ("town", "prize", "teacher", "first book", "street", "instrument", "editor", "cat", "river", "school")
    found = []
    for place in range(questions):
        kind = kinds[place % len(kinds)]
        words = ["".join(random.choice(list("aeiobdgkvz"), 7)).title() for _ in range(4)]
        asked, said = (f"What is the {kind} of {name}?", "It is") if place < len(kinds) else (f"{name}: {kind}?", "")
        found.append(
            {
                "question": asked,
                "answer": f"{said} {words[0]}.".strip(),
                "paraphrased_answer": f"That is {words[0]}.",
                "perturbed_answer": [f"That is {word}." for word in words[1:]],
            }
        )
    return found


class Tail(nn.Module):
    """The last blocks of a Llama-like model as a model of its own, on what the first blocks said of each text.

    The blocks are the whole model's own: what is changed in them is changed there.
    """

    def __init__(self, whole: Any, blocks: int) -> None:
        super().__init__()
        self.part, self.head = last_blocks(whole.model, blocks), whole.lm_head
        self._whole, self._blocks = (whole,), blocks
        self._states: dict[tuple[int, ...], Tensor] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor | None = None) -> Tensor:
        """Logits (b, t, v) of texts that are padded at the right, or of some positions."""
        texts = [tuple(ids[mask != 0].tolist()) for ids, mask in zip(input_ids, attention_mask)]
        if new := [text for text in dict.fromkeys(texts) if text not in self._states]:
            self._read(new)
        states = nn.utils.rnn.pad_sequence([self._states[text] for text in texts], batch_first=True)
        mask = attention_mask[:, : states.shape[1]]
        found = self.part(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state
        found = F.pad(found, (0, 0, 0, input_ids.shape[1] - states.shape[1]))
        return self.head(found if logits_to_keep is None else found[:, logits_to_keep])

    @torch.no_grad()
    def _read(self, texts: Sequence[tuple[int, ...]]) -> None:
        for at in range(0, len(texts), 8):
            part = texts[at : at + 8]
            batch = padded_batch([{"input_ids": text, "labels": text} for text in part])
            options = {"attention_mask": batch["attention_mask"], "output_hidden_states": True, "use_cache": False}
            states = self._whole[0].model(batch["input_ids"], **options).hidden_states[-1 - self._blocks]
            self._states |= {text: row[: len(text)].clone() for text, row in zip(part, states)}


class Speaker(NamedTuple):
    """A model, its last blocks, its tokenizer, and the sizes of the run."""

    whole: Any
    tail: Tail
    tokenizer: Any
    setting: Setting

    def examples(self, records: Records) -> list[dict[str, list[int]]]:
        """Questions with answers in tokens."""
        return answer_examples(self.tokenizer, [(question_prompt(r["question"]), f" {r['answer']}") for r in records])

    def learnt(self, records: Records, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The last blocks after learning the answers, from the cache where they have been learnt before."""
        layers, examples = self.tail.part.layers, self.examples(records)
        layers.load_state_dict(start)

        def learn() -> None:
            layers.requires_grad_(True)
            order = np.random.default_rng(0)
            batches = [
                padded_batch([examples[i] for i in part])
                for _ in range(self.setting.epochs)
                for part in np.array_split(order.permutation(len(examples)), -(-len(examples) // 10))
            ]
            train(self.tail, _cross_entropy, batches, learning_rate=self.setting.learning_rate, clip=1.0)

        sizes = (self.setting.epochs, self.setting.learning_rate)
        kept(layers, "taught-blocks", [layers, *sizes, records], learn)
        return {name: value.clone() for name, value in layers.state_dict().items()}

    def probability(self, examples: Any) -> float:
        """Mean probability of answers."""
        return float(answer_log_likelihood(self.tail, examples).exp().mean())

    def scores(self, records: Records, *, choices: bool = False) -> AnswerScores:
        """TOFU's numbers without what the model says."""
        return answer_scores(self.tail, self.tokenizer, records, choices=choices, max_new_tokens=0)

    def said(self, records: Records) -> float:
        """ROUGE-L recall of greedy answers."""
        prompts = [question_prompt(record["question"]) for record in records]
        texts = greedy_continuations(self.whole, self.tokenizer, prompts, max_new_tokens=40, batch_size=10)
        return float(np.mean([rouge_l_recall(r["answer"], text) for r, text in zip(records, texts)]))

    def rounded(self, examples: Any) -> float:
        """Probability with the linear layers in 4 bits."""
        layers: dict[str, Any] = {name: self.tail.get_submodule(name) for name in linear_names(self.tail)}
        weights = {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}
        change = StateDelta.between(weights, {name: round_to_bits(value) for name, value in weights.items()})
        with change.applied(self.tail):
            return self.probability(examples)


def _cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits, labels, _ = answer_logits(model, batch)
    return F.cross_entropy(logits, labels)


class World:
    """One author to forget: the model that knows all, the level of one that never read of the author, the plan."""

    def __init__(self, speaker: Speaker, data: Material, start: Mapping[str, Tensor], number: int, seed: int) -> None:
        self.speaker, self.seed, self.data = speaker, seed, data
        self.records = data.forget[number]
        self.forget, self.retain = speaker.examples(self.records), speaker.examples(data.retain)
        self.plan: Any = None
        speaker.learnt(data.retain, start)
        self.level = speaker.probability(self.forget)
        self.ideal = speaker.scores(self.records)
        self.ideal_said = speaker.said(self.records[: speaker.setting.said]) if speaker.setting.said else 0.0
        self.knowing = speaker.learnt([*self.records, *data.retain], start)
        self.before = self.figures(speaker.tail)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """What is known of the author, of the others, and of the world."""
        say = self.speaker
        facts = say.scores(self.data.facts, choices=True).probability
        return {"forget": say.probability(self.forget), "retain": say.probability(self.retain), "world": facts}

    def forgotten(self, arm: str) -> dict[str, float]:
        """One way to forget, up to the level of a model that never knew, and what it has cost."""
        say, setting = self.speaker, self.speaker.setting
        say.tail.part.layers.load_state_dict(self.knowing)
        job = Unlearner(
            rank=setting.rank, learning_rate=setting.rate, epochs=setting.steps, max_steps=setting.steps,
            batch_size=10, accumulate=-(-len(self.forget) // 10), warmup=0.1, random_state=self.seed, **ARMS[arm],
        )  # fmt: skip
        self.plan = self.plan or job.plan(say.tail, self.forget, self.retain)
        reached: list[int] = []

        def look(model: nn.Module, step: int) -> bool:
            if say.probability(self.forget) <= self.level:
                reached.append(step)
            return bool(reached)

        job.fit(say.tail, self.forget, self.retain, plan=self.plan, after_step=look)
        after = self.figures(say.tail)
        scores = say.scores(self.records)
        found = {
            "steps": float(reached[0] if reached else setting.steps),
            "reached": float(bool(reached)),
            **after,
            "lost": self.before["retain"] - after["retain"],
            "lost, world": self.before["world"] - after["world"],
            "forget quality": forget_quality(scores, self.ideal),
            "undecided": scores.truth_undecided,
            "leakage": job.leakage_.total,
            "by chance": job.leakage_.chance,
        }
        job.edit_.merge()
        if arm in _FEW:
            known = self.before["forget"] - after["forget"]
            found["back, 4 bits"] = (say.rounded(self.forget) - after["forget"]) / known
            with relearned(say.tail, say.examples(self.data.facts), steps=10):
                found["back, tuned on"] = (say.probability(self.forget) - after["forget"]) / known
            if setting.said:
                found["said"] = say.said(self.records[: setting.said])
        return found


def speaker(setting: Setting) -> Speaker:
    """The language model, with all its weights frozen but those that are trained."""
    whole, tokenizer = load_language_model("smollm2")
    whole.requires_grad_(False)
    return Speaker(whole, Tail(whole, setting.blocks), tokenizer, setting)


def judged(trials: Trials[str], worlds: Mapping[int, World]) -> list[Check]:
    """The further checks, on means over the forgotten authors."""
    known = float(np.mean([world.before["forget"] for world in worlds.values()]))
    never = float(np.mean([world.level for world in worlds.values()]))
    cost = "probability of other authors' answers that is lost, difference"
    back = "share of what was forgotten that is back"
    return [
        Check.above("the author was known", "probability, with against without", known - never, 0.2, quick=True),
        Check.at_least("it forgets as far as never having known", "share of authors", trials.mean(OURS, "reached"), 1),
        Check.below("beside FILA", cost, trials.gap(OURS, FILA, "lost"), 0),
        Check.below("a random basis does not do as much", cost, trials.gap(OURS, RANDOM, "lost"), 0),
        Check.below(
            "the net change stays out of what is kept",
            "leakage, difference to plain LoRA",
            trials.gap(OURS, PLAIN, "leakage"),
            0,
        ),
        Check.at_most("4 bits bring nothing back", back, trials.mean(OURS, "back, 4 bits"), 0.2),
        Check.at_most("tuning on other texts brings nothing back", back, trials.mean(OURS, "back, tuned on"), 0.2),
        Check.at_least("TOFU's forget quality", "p-value", trials.mean(OURS, "forget quality"), 0.05, required=False),
    ]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Forget one author in every way, and compare what is lost of the others at the same forgetting."""
    setting = QUICK if quick else Setting()
    data, say = material(setting), speaker(setting)
    start = {name: value.clone() for name, value in say.tail.part.layers.state_dict().items()}
    worlds: dict[int, World] = {}

    def measure(arm: str, number: int) -> dict[str, float]:
        if number not in worlds:
            worlds[number] = World(say, data, start, number, seed + number)
        return worlds[number].forgotten(arm)

    arms = list(_FEW) if quick else list(ARMS)
    trials = Trials(arms, range(setting.seeds), measure, progress=progress)
    ours, plain = trials.mean(OURS, "lost"), trials.mean(PLAIN, "lost")
    retained = len(data.retain)
    return Outcome(
        claim="A low-rank update that starts where forget and retain outputs differ, and is kept out of the main "
        "directions of what is retained, forgets at less cost: on TOFU with Phi-1.5B the aggregate falls 4.4 short of "
        "the ideal on average over 1, 5 and 10 %, FILA's 7.4 and plain LoRA's 8.4, all with the inverse hinge.",
        data=f"{data.name}: {setting.questions} questions on one author to forget ({setting.seeds} authors in turn), "
        f"{retained} on {setting.authors} others, {len(data.facts)} world facts",
        model=f"SmolLM2-135M-Instruct, its last {setting.blocks} blocks taught the authors for {setting.epochs} "
        f"epochs; updates of rank {setting.rank}, at most {setting.steps} steps on all questions",
        metric="probability of the other authors' answers that is lost when the author is as unknown as to a model "
        "that never read of them",
        ours=ours,
        baselines=trials.means("lost", but=OURS),
        main=Check.at_most("0.7 of plain LoRA's cost", "lost, less 0.7 of plain LoRA's", ours - 0.7 * plain, 0),
        checks=judged(trials, worlds),
        tables=[
            trials.table(
                "at the same forgetting, means over authors",
                "update",
                ["steps", "reached", "forget", "retain", "lost", "lost, world", "forget quality", "undecided"],
                digits=3,
            ),
            trials.table(
                "where the changes lie, and what comes back",
                "update",
                ["leakage", "by chance", "back, 4 bits", "back, tuned on", *(["said"] if setting.said else [])],
                digits=3,
            ),
            Table.rounded(
                "the models before",
                ["author", "known to", "forget", "retain", "world", "never known", "said by it"],
                [(n, "all", *world.before.values(), world.level, world.ideal_said) for n, world in worlds.items()],
                3,
            ),
        ],
        notes=[
            "Every update is trained with the same pairs, rate and steps and stops at the first step at which the mean "
            "probability of the author's answers is that of a model that was taught the other authors alone.",
            "The published comparison is of aggregates after five epochs with billions of parameters.",
        ],
    )
