"""ScalSelect on a pool of instructions about texts: what the selected samples keep of the pool, and what they teach."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from subspan.datasets import WEIGHT_PACKAGES, cached_features, data_folder, load, load_language_model, stdlib_docstrings
from subspan.models import TokenRoles, capture
from subspan.select import LeverageSelector, ScalSelect, reconstruction_error, retention, retention_curve, select_rows
from subspan.select.baselines import herding, k_center, k_medoids, largest_rows, random_rows, token_losses

from .protocol import Check, Outcome, Progress, Table
from .trials import Column, Trials

BUDGET = 0.16
_BATCH = 16
_OURS, _WHOLE = "ScalSelect", "whole pool"


class Sample(NamedTuple):
    """A document, one instruction about it, and the answer; `kind` numbers the instruction."""

    document: str
    instruction: str
    answer: str
    kind: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, the document marked as context."""
        asked = [{"type": "context", "text": self.document}, {"type": "text", "text": self.instruction}]
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": self.answer}]


def _yes(found: object) -> str:
    return "yes" if found else "no"


_DAYS = re.compile(r"\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b")

NEWS: list[tuple[str, Callable[[dict[str, str]], str]]] = [
    ("Which topic is this news item about: World, Sports, Business or Sci/Tech?", lambda record: record["label"]),
    ("Does the text contain a number? Answer yes or no.", lambda record: _yes(re.search(r"\d", record["text"]))),
    ("Does the text name a day of the week? Answer yes or no.", lambda record: _yes(_DAYS.search(record["text"]))),
]

DOCSTRINGS: list[tuple[str, Callable[[dict[str, str]], str]]] = [
    ("Does this document a module, a class or a function?", lambda record: record["label"]),
    ("Does the text say what is returned? Answer yes or no.", lambda record: _yes("eturn" in record["text"])),
    ("Does the text mention an argument? Answer yes or no.", lambda record: _yes("argument" in record["text"])),
]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Select 16 % of an instruction pool for SmolLM2-135M-Instruct; see docs/systems/scalselect.md for the setting.

    quick: 300 + 150 samples, probe features after block 6 of 30, no perplexity baseline, no repeated-document pool.
    """
    random = np.random.default_rng(seed)
    source, *records, instructions = _records(random, *((300, 150) if quick else (3000, 750)))
    pool, exam = (
        [_sample(record, instructions, int(random.integers(len(instructions)))) for record in part] for part in records
    )
    progress("representations after the first block", 0.02)
    model, tokenizer = load_language_model("smollm2", attn_implementation="eager")
    scal, rows = _represent(model, tokenizer, pool)
    m = len(scal.select(BUDGET))
    progress("features for the probe", 0.15 if quick else 0.1)
    model = load_language_model("smollm2", dtype=torch.bfloat16)[0]
    depth = 6 if quick else None
    features, means, losses = _deep(model, tokenizer, pool + exam, depth)
    del model
    progress("selections", 0.8)
    lengths = np.array([len(tokenizer("".join(sample[:3]))["input_ids"]) for sample in pool])
    selections = _selections(scal, rows, m, lengths, seed)
    uncentred = LeverageSelector(m, center=False).fit(rows)
    selections["leverage, mean-pooled late layer"] = [LeverageSelector(m).fit(means[: len(pool)]).indices_]
    selections["leverage, not centred"] = [uncentred.indices_]
    if not quick:
        selections["highest perplexity"] = [largest_rows(losses[: len(pool)], m)]
    progress("retention and probes", 0.85)
    study = Study(rows, scal.k_, features, np.asarray([f"{s.kind} {s.answer}" for s in pool + exam]), seed)
    trials = Trials(
        selections,
        range(20),
        lambda name, draw: study.facts(selections[name][draw], lengths),
        where=lambda name, draw: draw < len(selections[name]),
    )
    progress("scaling", 0.93)
    scaling, *costs = _scaling((20_000, 80_000) if quick else (50_000, 100_000, 200_000), 256)
    checks = [*_use(trials), *collapse(uncentred, scal.k_), *parity(rows, scal.scores_, m), *_cost(*costs)]
    if not quick:
        progress("a pool that repeats its documents", 0.96)
        checks.append(_repeated_documents(records[0][: len(pool) // len(instructions)], instructions, tokenizer, seed))
    metric = "standard deviations above the random mean"
    return Outcome(
        claim="A training-free 16 % of the pool keeps over 97.5 % of full-data performance, above random (95.7 %).",
        data=f"{source}: {len(pool)} samples, one of {len(instructions)} instructions each; probe tested on "
        f"{len(exam)} others",
        model="SmolLM2-135M-Instruct (4-bit weights), block 1 for selection, "
        + (f"block {depth} of 30 for the probe" if quick else "last layer for the probe"),
        metric=f"retention of the pool's dominant subspace (k = {scal.k_}) by {m} samples",
        ours=trials.mean(_OURS, "retention"),
        baselines={name: value for name, value in trials.means("retention", but=_OURS).items() if name != _WHOLE},
        main=Check.above("retention", metric, _above_chance(trials, "retention"), 2, quick=True),
        checks=checks,
        tables=[_side_by_side(trials, m, study), _as_followed(rows, scal, seed), scaling],
        notes=[
            "The paper tunes vision-language models on images; here the context is text and a frozen-feature probe "
            "stands for tuning. Its benchmark scores were not reproduced.",
            "Retention and reconstruction are measured in the space of stage 1, the same for every selection.",
            "Near-copies score alike, so the top list takes all of them: it does not thin out repeated documents.",
        ],
    )


def _records(random: np.random.Generator, n: int, held_out: int) -> tuple[str, list[Any], list[Any], list[Any]]:
    """(source, pool records, held-out records, instructions): AG News from the data folder, else docstrings."""
    if data_folder() is not None:
        train, test = load("icl_text/agnews_train"), load("icl_text/agnews_test")
        instructions, source = NEWS, "AG News"
    else:
        entries = [{"text": entry.text[:400], "label": entry.kind} for entry in stdlib_docstrings()]
        cut = int(0.75 * len(entries))
        order = random.permutation(len(entries))
        train, test = [entries[i] for i in order[:cut]], [entries[i] for i in order[cut:]]
        instructions, source = DOCSTRINGS, "docstrings of the standard library"
    chosen = [train[i] for i in random.permutation(len(train))[:n]]
    return source, chosen, [test[i] for i in random.permutation(len(test))[:held_out]], instructions


def _sample(record: dict[str, str], instructions: list[Any], kind: int) -> Sample:
    instruction, answer = instructions[kind]
    return Sample(record["text"].strip(), instruction, answer(record), kind)


def _represent(model: Any, tokenizer: Any, pool: list[Sample]) -> tuple[ScalSelect, np.ndarray]:
    """ScalSelect fitted to the pool, and the representations it scored."""
    scal = ScalSelect(model, tokenizer, batch_size=_BATCH).fit([sample.messages for sample in pool])
    return scal, torch.cat(list(scal.representations())).numpy()


def _deep(
    model: Any, tokenizer: Any, samples: list[Sample], depth: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(state before the answer, mean state of all tokens, mean loss a token) late in the network; cached.

    depth: the block whose states are taken, then no loss is computed (0); None = the last, with its normalisation.
    """

    # Samples of like length share a pass, so that little is spent on padding.
    order = np.argsort([len(sample.document) + len(sample.instruction) for sample in samples], kind="stable")
    samples = [samples[i] for i in order]

    def compute(start: int) -> Iterator[Tensor]:
        for first in range(start, len(samples), _BATCH):
            yield block(samples[first : first + _BATCH])

    def block(part: list[Sample]) -> Tensor:
        roles = TokenRoles.from_messages(tokenizer, [sample.messages for sample in part], padding_side="right")
        ids, mask = roles.input_ids, roles.attention_mask
        with torch.no_grad():
            if depth is None:
                states = model.model(**roles.batch, use_cache=False).last_hidden_state
                loss = token_losses(model.lm_head(states), ids, mask)
            else:
                with capture(model, f"model.layers.{depth - 1}") as captured:
                    states = captured.run(roles.batch)[f"model.layers.{depth - 1}"]
                loss = torch.zeros(len(part))
        states = states.float()
        before = roles.assistant.int().argmax(1) - 1
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.cat([states[torch.arange(len(part)), before], mean, loss[:, None]], dim=1)

    table = cached_features(
        compute,
        data=[sample._asdict() for sample in samples],
        options={
            "model": WEIGHT_PACKAGES["smollm2"],
            "depth": depth,
            "dtype": str(next(model.parameters()).dtype),
            "columns": "state before the answer, mean state, mean loss",
        },
        shard_rows=256,
    )
    rows = np.empty_like(table)
    rows[order] = table
    width = (table.shape[1] - 1) // 2
    return rows[:, :width], rows[:, width:-1], rows[:, -1]


def _selections(scal: Any, rows: np.ndarray, m: int, lengths: np.ndarray, seed: int) -> dict[str, list[np.ndarray]]:
    """Ways to choose m samples in the space of stage 1 or by length: one choice, or one a draw."""
    n = len(rows)
    drawn = [select_rows(scal.scores_, m, strategy="sample", random_state=seed + draw)[0] for draw in range(5)]
    return {
        _WHOLE: [np.arange(n)],
        _OURS: [scal.select(m)],
        "leverage, sampled": drawn,
        "random": [random_rows(n, m, random_state=seed + draw) for draw in range(20)],
        "longest": [largest_rows(lengths, m)],
        "k-centre": [k_center(rows, m, random_state=seed)],
        "k-medoids": [k_medoids(rows, m, random_state=seed)],
        "herding": [herding(rows, m)],
    }


def _probe(c: float) -> Pipeline:
    """A logistic head on frozen features; `c` is the inverse of its penalty."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000, tol=1e-3))


def _penalty(x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """The inverse penalty that does best on the whole pool in cross-validation; every selection's probe uses it."""
    folds = StratifiedKFold(3, shuffle=True, random_state=seed)
    return max((0.001, 0.01, 0.1, 1.0), key=lambda c: cross_val_score(_probe(c), x, y, cv=folds).mean())


class Study:
    """What a selection keeps of the pool's rows, and what a probe learns from it of the exam.

    features, labels: of the pool, then of the exam.
    """

    def __init__(self, rows: np.ndarray, k: int, features: np.ndarray, labels: np.ndarray, seed: int) -> None:
        self.rows, self.k, n = rows, k, len(rows)
        self.pool, self.exam = (features[:n], labels[:n]), (features[n:], labels[n:])
        self.penalty = _penalty(*self.pool, seed)
        self.full = self.accuracy(np.arange(n))

    def accuracy(self, chosen: np.ndarray) -> float:
        """Of a probe that is trained on the chosen samples."""
        return float(_probe(self.penalty).fit(*(part[chosen] for part in self.pool)).score(*self.exam))

    def facts(self, chosen: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
        """Of one selection; lengths: tokens of the samples."""
        return {
            "retention": retention(self.rows, chosen, self.k),
            "error": reconstruction_error(self.rows, chosen, self.k),
            "accuracy": 1.0 if len(chosen) == len(self.rows) else self.accuracy(chosen) / self.full,
            "answers": _effective_classes(self.pool[1][chosen]),
            "tokens": float(lengths[chosen].mean()),
        }


def _side_by_side(trials: Trials[str], m: int, study: Study) -> Table:
    title = f"{m} of {len(study.rows)} samples; random: 20 draws, mean ± sd (accuracy of the whole pool: "
    columns = {
        "retention": Column("retention", _shown),
        "reconstruction error": Column("error", _shown),
        "relative probe accuracy": Column("accuracy", _shown),
        "effective number of answers": "answers",
        "tokens a sample": Column("tokens", digits=0),
    }
    return trials.table(f"{title}{study.full:.4f})", "selection", columns)


def _as_followed(rows: np.ndarray, scal: Any, seed: int) -> Table:
    """Retention by the number of samples taken from the head of the ranking, and of a random order."""
    curve = retention_curve(rows, scal.ranking_, scal.k_)
    order = np.random.default_rng(seed).permutation(len(rows))
    by_chance = retention_curve(rows, order, scal.k_, sizes=curve.sizes.tolist())
    found = zip(curve.sizes.tolist(), curve.retention, by_chance.retention)
    return Table.rounded("Retention as the ranking is followed", ["samples", "ScalSelect", "random"], found)


def _above_chance(trials: Trials[str], fact: str) -> float:
    """How far ours lies above the mean of the random selections, in their standard deviations."""
    drawn = np.asarray(trials.values("random", fact))
    return float((trials.mean(_OURS, fact) - drawn.mean()) / drawn.std(ddof=1))


def _use(trials: Trials[str]) -> list[Check]:
    """What a probe learns from the samples, and what they leave out."""
    relative, above = trials.mean(_OURS, "accuracy"), _above_chance(trials, "accuracy")
    beside = relative - trials.mean("random", "accuracy")
    chance, outside = "standard deviations above the random mean", "energy outside their leading row space, standard "
    return [
        Check.at_least("probe accuracy relative to the full pool", "accuracy(subset) / accuracy(pool)", relative, 0.97),
        Check.at_least("probe accuracy beside random selection", "relative accuracy less the random mean", beside, 0),
        Check.above("probe accuracy above chance selection", chance, above, 1, required=False),
        Check.below("reconstruction from the selected rows", f"{outside}deviations from the random mean",
                    _above_chance(trials, "error"), -2, quick=True),
    ]  # fmt: skip


def _cost(ratio: float, growth: float) -> list[Check]:
    """What more rows cost."""
    per_row = "time per row at the largest size over that at the smallest"
    peak = "growth of the peak from the smallest size to the largest (MiB)"
    return [
        Check.within("time is linear in the number of rows", per_row, ratio, 0.85, 1.15),
        Check.at_most("memory is constant in the number of rows", peak, growth, 32, quick=True),
    ]


def collapse(uncentred: LeverageSelector, k: int) -> list[Check]:
    """What becomes of the spectrum without centring, beside the rank k with it."""
    spectrum = uncentred.subspace_.spectrum
    assert spectrum is not None
    name, share = "without centring the rank collapses", float(spectrum[0] / spectrum.sum())
    return [
        Check.at_least(f"{name}: one direction", "energy of the first direction", share, 0.8, quick=True),
        Check.at_most(name, f"rank, beside {k} with centring", uncentred.k_, max(1, k / 4), quick=True),
    ]


def parity(rows: np.ndarray, scores: np.ndarray, m: int) -> list[Check]:
    """Streamed scores against the decomposition of the whole matrix."""
    wide = rows.astype(np.float64)
    u, s, _ = np.linalg.svd(wide - wide.mean(0), full_matrices=False)
    k = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9)) + 1
    dense = (u[:, :k] ** 2).sum(1)
    first, second = (set(np.argsort(-values, kind="stable")[:m]) for values in (dense, scores))
    name, difference = "equal to the full decomposition", np.abs(dense - scores).max()
    return [
        Check.at_most(name, "largest difference of a score", difference, 1e-9, quick=True),
        Check.at_most(f"{name}: selection", "samples selected by one alone", len(first - second), 0, quick=True),
    ]


class _Synthetic:
    """Correlated rows made batch by batch, so that nothing but the method's own memory grows."""

    def __init__(self, n: int, d: int):
        self.n, self.d = n, d
        self.mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.05, d)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1)
        for start in range(0, self.n, 5000):
            yield torch.randn(min(5000, self.n - start), self.d, generator=generator) @ self.mixing


def _scaling(sizes: tuple[int, ...], d: int) -> tuple[Table, float, float]:
    """(table, time per row at the largest over the smallest size, growth of peak memory in MiB)."""
    LeverageSelector().fit(_Synthetic(5000, d))
    seconds = [float("inf")] * len(sizes)
    for _ in range(5):
        # The sizes take turns: what else runs on the machine slows memory for a while, and would slow one size only.
        for position, n in enumerate(sizes):
            source = _Synthetic(n, d)
            started = time.process_time()
            LeverageSelector().fit(source)
            seconds[position] = min(seconds[position], time.process_time() - started)
    # In processes of their own: this one has been larger before.
    alone = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=alone, max_tasks_per_child=1) as pool:
        peaks = list(pool.map(_peak, sizes, [d] * len(sizes)))
    per_row = [1e6 * spent / n for spent, n in zip(seconds, sizes)]
    table = Table(
        f"Fitting and scoring synthetic rows with {d} columns, made on the fly",
        ["rows", "processor seconds", "microseconds a row", "peak memory (MiB)"],
        [[n, round(a, 3), round(b, 2), round(c)] for n, a, b, c in zip(sizes, seconds, per_row, peaks)],
    )
    return table, per_row[-1] / per_row[0], peaks[-1] - peaks[0]


def _peak(rows: int, d: int) -> float:
    """Peak resident memory in MiB of a process that has fitted so many rows."""
    LeverageSelector().fit(_Synthetic(rows, d))
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count the pages of the parent that a child has before it becomes a program of its own.
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _repeated_documents(records: list[Any], instructions: list[Any], tokenizer: Any, seed: int) -> Check:
    """Retention where every document comes with every instruction, in random deviations above chance."""
    model = load_language_model("smollm2", attn_implementation="eager")[0]
    pool = [_sample(record, instructions, kind) for record in records for kind in range(len(instructions))]
    scal, rows = _represent(model, tokenizer, pool)
    chosen = scal.select(BUDGET)
    ours = retention(rows, chosen, scal.k_)
    chance = [
        retention(rows, random_rows(len(pool), len(chosen), random_state=seed + draw), scal.k_) for draw in range(20)
    ]
    documents = len({position // len(instructions) for position in chosen})
    return Check.above(
        "retention where each document comes with every instruction",
        f"standard deviations of the top list above random ({ours:.4f}, random {_shown(chance)}), rank {scal.k_}, "
        f"{documents} documents in {len(chosen)}",
        (ours - np.mean(chance)) / np.std(chance, ddof=1),
        2,
        required=False,
    )


def _effective_classes(labels: np.ndarray) -> float:
    """exp of the entropy of the classes' shares."""
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _shown(values: list[float]) -> str:
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")
