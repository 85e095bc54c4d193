"""A checkpoint that forgets some answers and keeps the others: `subspan unlearn`."""

from __future__ import annotations

import json
import shutil
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from subspan.base import Progress
from subspan.base.files import empty, temporary_folder, write_text
from subspan.datasets import iterate_records, stdlib_docstrings
from subspan.edit import (
    Unlearner,
    answer_examples,
    answer_log_likelihood,
    question_prompt,
    relearned,
)
from subspan.measures import rouge_l_recall
from subspan.models import StateDelta, StoredWeights, greedy_continuations, linear_names, linear_weight, write_weights
from subspan.weights import round_to_bits

from .checkpoint_folders import ChangedWeights, copy_companions, file_stamp, load_checkpoint, load_tokenizer, stamp
from .origin import origin

METHODS: dict[str, dict[str, Any]] = {
    "reglu": {},
    "fila": {"start": "fila", "orthogonality": 0.0},
    "lora": {"start": "lora", "orthogonality": 0.0},
    "null-space": {"start": "null-space", "orthogonality": 0.0},
    "gradient-difference": {"start": "lora", "forget_loss": "gd", "orthogonality": 0.0},
    "npo": {"start": "lora", "forget_loss": "npo", "orthogonality": 0.0},
    "simnpo": {"start": "lora", "forget_loss": "simnpo", "orthogonality": 0.0},
}
_NAMES = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
_HELD, _READ, _SAID, _UNRELATED, _NEW_TOKENS = 64, 64, 16, 48, 48


class Material(NamedTuple):
    """Texts of the two files: prompts with answers, in tokens; the last retained ones are not trained on."""

    forget: list[tuple[str, str]]
    retain: list[tuple[str, str]]
    held: list[tuple[str, str]]
    tokens: dict[str, list[dict[str, list[int]]]]


@dataclass(frozen=True)
class Unlearning:
    """An unlearning that can be looked at before it is done.

    Parameters
    ----------
    folder
        Checkpoint folder of a causal model of transformers; never written to.
    forget, retain
        Files of records: question and answer (or prompt and completion or response, instruction and output), or text.
    method
        A name of `METHODS`.
    merged
        Write the whole checkpoint with changed weights, not an adapter.
    plain
        Ask by `Question: …` even where the tokenizer has a chat template.
    options
        Of `Unlearner`; those that are None are the method's.
    """

    folder: Path
    forget: Path
    retain: Path
    method: str = "reglu"
    merged: bool = False
    plain: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def plan(self) -> dict[str, Any]:
        """What would be trained and written, and about how long it takes."""
        model, tokenizer, material = self._loaded()
        job = self._job(tokenizer)
        names = job.checked_layers(model)
        shapes = [linear_weight(model.get_submodule(name))[0].shape for name in names]
        numbers = job.rank * sum(sum(shape) for shape in shapes)
        stored = numbers * (2 if job.start in ("rila", "fila") else 1)
        sets = material.tokens
        steps = job.steps(len(sets["forget"]))
        started = time.perf_counter()
        answer_log_likelihood(model, sets["forget"][: job.batch_size], batch_size=job.batch_size)
        unit = (time.perf_counter() - started) / min(job.batch_size, len(sets["forget"]))
        read = sum(min(len(sets[name]), job.samples) for name in ("forget", "retain"))
        # A step runs two texts a pair, forwards and backwards; what is read and said afterwards is some passes more.
        judged = 4 * sum(min(len(each), _READ) for each in sets.values())
        passes = read + 6 * job.batch_size * job.accumulate * steps + judged + 12 * _UNRELATED
        return {
            "method": self.method,
            "forget": len(sets["forget"]),
            "retain": len(sets["retain"]),
            "held_out": len(sets["held"]),
            "layers": len(names),
            "narrowest_layer": min(min(shape) for shape in shapes),
            "rank": job.rank,
            "trained_numbers": numbers,
            "steps": steps,
            "written_megabytes": self._bytes() / 1e6 if self.merged else 4 * stored / 1e6,
            "estimated_seconds": unit * passes,
        }

    def run(
        self, output: Path, progress: Progress, page: Callable[[dict[str, Any]], str] | None = None
    ) -> dict[str, Any]:
        """Write the adapter (or the checkpoint), figures before and after, and a card.

        page: makes a report (HTML) of the facts, which is put beside them. Where the process is killed, the same call
        goes on after the last steps that were kept.
        """
        started = time.perf_counter()
        model, tokenizer, material = self._loaded()
        job = self._job(tokenizer)
        job.checked_layers(model)
        figures: dict[str, dict[str, float]] = {}
        with temporary_folder(output, exclusive=True, resumable=True) as unfinished:
            keep = self._kept(unfinished, job)
            progress("figures before", 0.0)
            figures["before"] = self._figures(model, tokenizer, material)
            job.fit(
                model, material.tokens["forget"], material.tokens["retain"], keep=keep,
                progress=lambda said, part: progress(said, 0.05 + 0.75 * part),
            )  # fmt: skip
            progress("figures after", 0.8)
            figures["after"] = self._figures(model, tokenizer, material)
            made = unfinished / "made"
            shutil.rmtree(made, ignore_errors=True)
            if not self.merged:
                job.edit_.export(made, base_model=str(self.folder.resolve()), task_type="CAUSAL_LM")
            changed = _merged(job)
            progress("in 4 bits", 0.85)
            figures["in_4_bits"] = self._in_4_bits(model, tokenizer, material)
            progress("after tuning on other texts", 0.9)
            figures["tuned_on"] = self._tuned_on(model, tokenizer, material)
            facts = {**self._facts(job, material), "figures": figures}
            if self.merged:
                write_weights(
                    ChangedWeights(StoredWeights(self.folder), changed),
                    made,
                    finish=lambda folder: copy_companions(self.folder, folder),
                )
            write_text(made / "unlearn.json", json.dumps(facts, indent=2) + "\n")
            write_text(made / "README.md", _card(facts, self.merged))
            if page is not None:
                about = origin(started, job.random_state, "torch", "transformers")
                write_text(made / "report.html", page({**facts, **about, "merged": self.merged}))
            made.replace(output)
        return facts

    # ------------------------------------------------------------------ what is read

    def _loaded(self) -> tuple[Any, Any, Material]:
        pairs = {"forget": self._pairs(self.forget, "--forget"), "retain": self._pairs(self.retain, "--retain")}
        held = set(pairs["retain"])
        if both := [number for number, pair in enumerate(pairs["forget"], 1) if pair in held]:
            raise ValueError(f"--forget: {len(both)} of its records are in --retain too, the first is record {both[0]}")
        if len(pairs["forget"]) < 2:
            raise ValueError("--forget: at least 2 records are needed, got 1")
        if len(pairs["retain"]) < 2:
            raise ValueError("--retain: at least 2 records are needed, got 1")
        model = load_checkpoint(self.folder, causal=True)
        broken = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
        if broken:
            raise ValueError(f"MODEL: {broken[0]!r} contains NaN or infinity")
        tokenizer = load_tokenizer(self.folder)
        aside = min(_HELD, len(pairs["retain"]) // 10)
        kept = pairs["retain"][: len(pairs["retain"]) - aside]
        sets = {"forget": pairs["forget"], "retain": kept, "held": pairs["retain"][len(kept) :]}
        chat = self._chat(tokenizer)
        asked = {name: [_asked(tokenizer, pair, chat) for pair in each] for name, each in sets.items()}
        tokens = {
            name: answer_examples(tokenizer, each, add_special_tokens=not chat) if each else []
            for name, each in asked.items()
        }
        most = max(max(example["input_ids"]) for each in tokens.values() for example in each)
        size = model.get_input_embeddings().num_embeddings
        if most >= size:
            raise ValueError(f"MODEL: its tokenizer gives token {most}, and it has {size}; it is another model's")
        return model, tokenizer, Material(asked["forget"], asked["retain"], asked["held"], tokens)

    def _chat(self, tokenizer: Any) -> bool:
        return bool(getattr(tokenizer, "chat_template", None)) and not self.plain

    def _pairs(self, path: Path, option: str) -> list[tuple[str, str]]:
        found = []
        for number, record in enumerate(iterate_records(path), 1):
            names = next((pair for pair in _NAMES if all(name in record for name in pair)), None)
            texts = [record[name] for name in names] if names else ["", record.get("text")]
            if not all(isinstance(text, str) for text in texts) or not texts[1].strip():
                listed = ", or ".join(" and ".join(pair) for pair in _NAMES)
                raise ValueError(f"{option}: record {number} of {str(path)!r} needs texts: {listed}, or text")
            found.append((texts[0], texts[1]))
        if not found:
            raise ValueError(f"{option}: {str(path)!r} holds no records")
        return found

    def _bytes(self) -> int:
        return sum(file.stat().st_size for file in set(StoredWeights(self.folder).files.values()))

    # ------------------------------------------------------------------ the job, and what a killed run has left

    def _job(self, tokenizer: Any) -> Unlearner:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        given = {name: value for name, value in self.options.items() if value is not None}
        return Unlearner(**{**METHODS[self.method], "pad_token_id": pad, **given})

    def _kept(self, unfinished: Path, job: Unlearner) -> Path:
        """The folder of what is kept, emptied where a run of other settings or inputs has left it."""
        inputs = [stamp(self.folder), file_stamp(self.forget), file_stamp(self.retain)]
        settings = json.dumps([self.method, self.plain, job.settings(), inputs])
        noted = unfinished / "settings.json"
        if not noted.is_file() or noted.read_text(encoding="utf-8") != settings:
            empty(unfinished)
            write_text(noted, settings)
        keep = unfinished / "kept"
        keep.mkdir(exist_ok=True)
        return keep

    def _facts(self, job: Unlearner, material: Material) -> dict[str, Any]:
        last = job.history_[-1]
        return {
            "method": self.method,
            "base": self.folder.name,
            "rank": job.rank,
            "stored_rank": max(len(layer.update()[0]) for layer in job.edit_.layers.values()),
            "steps": last.step,
            "forget": len(material.forget),
            "retain": len(material.retain),
            "held_out": len(material.held),
            "layers": len(job.plan_),
            "leakage": job.leakage_.total,
            "leakage_by_chance": job.leakage_.chance,
            "layer_facts": [
                {
                    "name": name,
                    "leakage": job.leakage_.by_layer[name],
                    "by_chance": layer.chance,
                    "start": layer.overlap,
                }
                for name, layer in job.plan_.items()
            ],
            "course": [step._asdict() for step in job.history_],
        }

    # ------------------------------------------------------------------ figures

    def _figures(self, model: Any, tokenizer: Any, material: Material) -> dict[str, float]:
        """Probabilities of answers, and how much of forgotten ones is said; what is said is not kept."""
        sets = material.tokens

        def probability(name: str) -> float:
            return float(answer_log_likelihood(model, sets[name][:_READ]).exp().mean())

        asked = [pair for pair in material.forget if pair[0]][:_SAID]
        said = greedy_continuations(
            model,
            tokenizer,
            [prompt for prompt, _ in asked],
            max_new_tokens=_NEW_TOKENS,
            add_special_tokens=not self._chat(tokenizer),
        )
        figures = {"forget_probability": probability("forget"), "retain_probability": probability("retain")}
        if sets["held"]:
            figures["held_out_probability"] = probability("held")
        if asked:
            figures["forget_rouge"] = float(np.mean([rouge_l_recall(pair[1], text) for pair, text in zip(asked, said)]))
        return figures

    def _in_4_bits(self, model: Any, tokenizer: Any, material: Material) -> dict[str, float]:
        """With all linear layers of the blocks rounded, whether the answers are back."""
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in linear_names(model)}
        weights = {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}
        rounded = {name: round_to_bits(value.float(), 4) for name, value in weights.items()}
        with StateDelta.between(weights, rounded).applied(model):
            return self._figures(model, tokenizer, material)

    def _tuned_on(self, model: Any, tokenizer: Any, material: Material) -> dict[str, float]:
        """After a few steps on texts that have nothing to do with either set."""
        # One package of Python's library: reading all of it takes longer than the tuning.
        folder = Path(sysconfig.get_paths()["stdlib"]) / "email"
        texts = [("", each.text) for each in stdlib_docstrings(folder=folder)[:_UNRELATED]]
        other = answer_examples(tokenizer, texts, max_length=64)
        with relearned(model, other, steps=_UNRELATED // 4):
            return self._figures(model, tokenizer, material)


def _asked(tokenizer: Any, pair: tuple[str, str], chat: bool) -> tuple[str, str]:
    """A question as the model's users ask it, and what follows."""
    question, answer = pair
    if not question:
        return "", answer
    if not chat:
        return question_prompt(question), f" {answer}"
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), answer


def _merged(job: Unlearner) -> dict[str, Any]:
    """The changed weights, by the names that they are stored under; the model is a plain one afterwards."""
    model = job.edit_.merge()
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in job.edit_.layers}
    return {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}


def figure_rows(figures: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row a figure, a column a state of the model."""
    names: Sequence[str] = list(figures["before"])
    return [{"figure": name, **{state: found[name] for state, found in figures.items()}} for name in names]


def _card(facts: Mapping[str, Any], merged: bool) -> str:
    rows = figure_rows(facts["figures"])
    states = list(facts["figures"])
    table = [f"| | {' | '.join(state.replace('_', ' ') for state in states)} |", "|---" * (len(states) + 1) + "|"]
    for row in rows:
        table.append(f"| {row['figure'].replace('_', ' ')} | {' | '.join(f'{row[state]:.3f}' for state in states)} |")
    form = (
        "The weights are changed; load the folder as any checkpoint."
        if merged
        else f"A LoRA adapter of rank {facts['stored_rank']} for the unchanged base: "
        "`peft.PeftModel.from_pretrained(base, folder)`."
    )
    return (
        f"# Unlearned model\n\n`{facts['base']}` after unlearning {facts['forget']} answers by {facts['method']}, "
        f"with {facts['retain']} to keep, in {facts['steps']} steps of `subspan unlearn`. {form}\n\n"
        + "\n".join(table)
        + "\n\nProbability: mean of exp(-loss a token) of the right answers. ROUGE: share of their words that greedy "
        "answers hold in order. In 4 bits: linear layers rounded. Tuned on: after a few steps on other texts, which "
        f"should bring nothing back.\nOf the change of the weights {facts['leakage']:.3f} lies in the main directions "
        f"of what is kept (by chance {facts['leakage_by_chance']:.3f}). Forgetting is measured on these texts alone: "
        "ask in other words before you rely on it.\n"
    )
