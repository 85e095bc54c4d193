"""Is the subspace of an update about one behaviour? By weights always, by behaviours where there are prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subspan.base import Progress
from subspan.base.reading import json_records
from subspan.geometry import Subspace
from subspan.models import SegmentTokens, StateDelta, StoredWeights, find_blocks, weights_of
from subspan.probe import (
    SubspaceAudit,
    TargetLikelihood,
    UpdateComparison,
    activation_overlap,
    compare_updates,
    updates_in_subspace,
)
from subspan.probe.update_comparison import REFERENCE

from .checkpoint_folders import check_tokenizer, load_checkpoint, load_tokenizer, stored_bytes, update_between
from .origin import origin

_CONTROLS = ("randomk", "random", "scaled")
_MODES = ("same", "orth")
# Blocks from which on states are read in the range of depth that the paper has.
_DEEP = 8


@dataclass(frozen=True)
class Prompts:
    """A behaviour: how likely targets are after prompts, or how much likelier than others."""

    name: str
    prompts: tuple[str, ...]
    targets: tuple[str, ...]
    against: tuple[str, ...] | None

    @classmethod
    def read(cls, path: Path) -> Prompts:
        """JSON lines with "prompt", "target" and, in all or none, "against"; named after the file."""
        rows: list[list[Any]] = []
        keys: tuple[str, ...] = ()
        for line, record in json_records(path):
            keys = keys or (("prompt", "target", "against") if "against" in record else ("prompt", "target"))
            texts = [record.get(key) for key in keys]
            if not all(isinstance(text, str) and text for text in texts) or ("against" in record) != (len(keys) == 3):
                raise ValueError(
                    f"--prompts: line {line} of {str(path)!r}: a text is needed at each of "
                    f"{', '.join(map(repr, keys))}, in all lines alike"
                )
            rows.append(texts)
        if len(rows) < 2:
            raise ValueError(f"--prompts: {str(path)!r} has {len(rows)} prompts; two are the fewest for an interval")
        columns = [tuple(column) for column in zip(*rows)]
        return cls(path.name.partition(".")[0], columns[0], columns[1], columns[2] if len(columns) == 3 else None)

    def metric(self, tokenizer: Any, chat: bool) -> TargetLikelihood:
        """What is read of a model."""
        return TargetLikelihood(
            tokenizer, self.asked(tokenizer, chat), self.targets, against=self.against, add_special_tokens=not chat
        )

    def asked(self, tokenizer: Any, chat: bool) -> list[str]:
        """The prompts, in the tokenizer's chat template where that is wanted."""
        if not chat:
            return list(self.prompts)
        if not tokenizer.chat_template:
            raise ValueError("--chat: the tokenizer of ALIGNED has no chat template")
        turns = [[{"role": "user", "content": prompt}] for prompt in self.prompts]
        return [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in turns]


@dataclass(frozen=True)
class Audit:
    """An audit that can be looked at before it is done.

    Parameters
    ----------
    base, aligned
        Checkpoint folders; the directions are those of the update between them.
    tuned
        Checkpoint folders tuned on from `aligned`.
    prompts
        Files of behaviours, two or more, or none: then weights alone are compared.
    chat
        Whether prompts go through the chat template.
    fraction
        Share of each tensor's directions that is judged.
    draws
        Random subspaces of each kind whose behaviour is read.
    seed
        Of all draws.
    subspace
        File of a subspace of the states between blocks, as `subspan probe` writes: what updates write into it is told.
    """

    base: Path
    aligned: Path
    tuned: tuple[Path, ...]
    prompts: tuple[Path, ...] = ()
    chat: bool = False
    fraction: float = 0.25
    draws: int = 3
    seed: int = 0
    subspace: Path | None = None

    def __post_init__(self) -> None:
        folders = [path.resolve() for path in (self.base, self.aligned, *self.tuned)]
        if len(set(folders)) < len(folders):
            raise ValueError("TUNED: the same folder is named twice")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"--fraction: in (0, 1], got {self.fraction:g}")
        if len(self.prompts) == 1:
            raise ValueError("--prompts: one behaviour cannot be told from others; give two files or more, or none")
        if len({path.name.partition(".")[0] for path in self.prompts}) < len(self.prompts):
            raise ValueError("--prompts: two files have the same name, and behaviours are named after them")

    def names(self) -> dict[str, Path]:
        """Name → tuned checkpoint: its folder, from as far up as tells it from the others."""
        paths = [path.resolve() for path in self.tuned]
        depth = 1
        while len({path.parts[-depth:] for path in paths}) < len(paths):
            depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
        return {f"{name} (tuned)" if name == REFERENCE else name: path for name, path in zip(names, self.tuned)}

    def updates(self) -> tuple[StateDelta, dict[str, StateDelta]]:
        """The update to the aligned model, and those from it. Raises ValueError, naming the checkpoint."""
        for path in (self.aligned, *self.tuned):
            check_tokenizer(self.base, path)
        reference = update_between(self.base, self.aligned)
        return reference, {name: update_between(self.aligned, path) for name, path in self.names().items()}

    def behaviours(self) -> list[Prompts]:
        """What the files hold."""
        return [Prompts.read(path) for path in self.prompts]

    def plan(self) -> dict[str, Any]:
        """What would be read and held, and about how long it takes where every tensor is changed."""
        reference, deltas = self.updates()
        shapes = reference.shapes
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        numbers = sum(sizes.values())
        started = time.perf_counter()
        torch.linalg.svd(torch.randn(256, 256), full_matrices=False)
        unit = (time.perf_counter() - started) / 256**3
        probe = max((name for name in sizes if sizes[name] <= 1 << 21), key=lambda name: sizes[name], default=largest)
        started = time.perf_counter()
        for delta in deltas.values():
            delta[probe]
        a_number = (time.perf_counter() - started) / sizes[probe]
        matrices = [(shape[0], math.prod(shape[1:])) for shape in shapes.values() if len(shape) > 1]
        work = sum(max(shape) * min(shape) ** 2 for shape in matrices)
        facts: dict[str, Any] = {
            "tensors": len(shapes),
            "numbers": numbers,
            "read_megabytes": stored_bytes(StoredWeights(self.base)) * (2 + len(deltas)) / 1e6,
            "largest_tensor": largest,
            # Each update, its directions in double precision, and what the decomposition works in.
            "held_megabytes": 4 * sizes[largest] * (5 * len(deltas) + 7) / 1e6,
            "estimated_seconds_at_most": a_number * numbers + 2 * unit * work * (1 + len(deltas)),
        }
        behaviours = self.behaviours()
        if behaviours:
            readings = 1 + len(deltas) * (1 + len(_MODES) * (2 + 2 * self.draws))
            letters = sum(map(len, (text for each in behaviours for part in _texts(each) for text in part)))
            speed = _multiplications_a_second()
            # About four letters are a token; a token takes two operations a number, a projection some passes over them.
            seconds = readings * numbers * (2 * letters / 4 / speed + 20 * a_number / max(1, len(deltas)))
            facts |= {
                "behaviours": len(behaviours),
                "prompts": sum(len(each.prompts) for each in behaviours),
                "readings": readings,
                "held_megabytes": max(facts["held_megabytes"], 4 * numbers * 3 / 1e6),
                "estimated_seconds_at_most": facts["estimated_seconds_at_most"] + unit * work + seconds,
            }
        return facts

    def run(self, progress: Progress) -> dict[str, Any]:
        """All that is found, as JSON values."""
        started = time.perf_counter()
        space = None if self.subspace is None else Subspace.load(self.subspace)
        behaviours = self.behaviours()
        reference, deltas = self.updates()
        inside = None if space is None else self._inside(space, {REFERENCE: reference, **deltas})
        share = 0.3 if behaviours else 1.0
        found = compare_updates(
            reference,
            deltas,
            fraction=self.fraction,
            random_state=self.seed,
            progress=lambda said, done: progress(said, share * done),
        )
        facts = {
            "base": self.base.resolve().name,
            "aligned": self.aligned.resolve().name,
            "tuned": list(deltas),
            "fraction": self.fraction,
            "weights": weight_facts(found),
            "subspace": inside,
            "behaviours": None,
        }
        if behaviours:
            read = self._behaviours(
                behaviours,
                [name for name in reference if any(row.tensor == name for row in found.held)],
                lambda said, done: progress(said, share + (1 - share) * done),
            )
            facts["behaviours"] = read
        judged = facts["behaviours"] or facts["weights"]
        return {
            "verdict": judged["verdict"],
            "reason": judged["reason"],
            "read_from": "behaviours" if behaviours else "weights",
            **facts,
            **origin(started, self.seed),
        }

    def _inside(self, space: Subspace, deltas: dict[str, StateDelta]) -> dict[str, Any]:
        """What the updates write into a subspace."""
        found = updates_in_subspace(deltas, space, random_state=self.seed)
        return {
            "file": "" if self.subspace is None else self.subspace.name,
            "dimensions": space.dim,
            "width": space.ambient_dim,
            "matrices": len({row.tensor for row in found.held}),
            "verdict": found.verdict,
            "reason": found.reason,
            "chance": found.chance,
            "shares": found.shares,
            "beyond": {name: each._asdict() for name, each in found.beyond.items()},
            "layers": found.layers(),
            "unmoved": list(found.unmoved),
        }

    def _behaviours(self, given: Sequence[Prompts], changed: Sequence[str], progress: Progress) -> dict[str, Any]:
        progress("loading the aligned model", 0.0)
        model, tokenizer = self._model()
        there = weights_of(model)
        tied = getattr(model.config, "tie_word_embeddings", False)
        if lacking := [name for name in changed if name not in there and not (tied and name == "lm_head.weight")]:
            raise ValueError(f"ALIGNED: the loaded model has no {lacking[0]!r}, so that its change would not be read")
        audit = SubspaceAudit(
            {each.name: each.metric(tokenizer, self.chat) for each in given},
            [self.fraction],
            _CONTROLS,
            _MODES,
            n_random=self.draws,
            random_state=self.seed,
        )
        # Not strict: a tied head is in the file and not in the model.
        report = audit.run(self.base, model, self.names(), strict=False, progress=progress)
        deep = len(list(model.get_submodule(find_blocks(model)).children())) >= _DEEP
        layers = (0.65, 0.9) if deep else (0.0, 1.0)
        batches = [self._batches(each, tokenizer) for each in given[:2]]
        return {
            "verdict": report.verdict,
            "reason": report.reason,
            "margin": audit.margin,
            "prompts": {each.name: len(each.prompts) for each in given},
            "changes": [row._asdict() for row in report.changes],
            "carried": {
                behaviour: {kind: by_fraction[self.fraction] for kind, by_fraction in kinds.items()}
                for behaviour, kinds in report.curves().items()
            },
            "selectivities": [row._asdict() for row in report.selectivities],
            "states": [asdict_of(row) for row in activation_overlap(model, *batches, layers=layers)],
        }

    def _batches(self, given: Prompts, tokenizer: Any) -> list[Any]:
        pieces = [[(text, "prompt")] for text in given.asked(tokenizer, self.chat)]
        return [
            SegmentTokens.from_segments(tokenizer, pieces[s : s + 8], add_special_tokens=not self.chat).batch
            for s in range(0, len(pieces), 8)
        ]

    def _model(self) -> tuple[Any, Any]:
        # In single precision: a part of a small update would be lost in the rounding of half of it.
        model = load_checkpoint(self.aligned, "ALIGNED", causal=True, dtype=torch.float32)
        return model, load_tokenizer(self.aligned, "ALIGNED")


def weight_facts(found: UpdateComparison) -> dict[str, Any]:
    """A comparison of updates as JSON values: curves, pairs of updates, layers."""
    names = [REFERENCE, *found.beyond]
    pairs: list[dict[str, Any]] = []
    for first, second in combinations(names, 2):
        rows = [row for row in found.pairs if (row.first, row.second) == (first, second)]
        if rows:
            pairs.append(
                {
                    "first": first,
                    "second": second,
                    "matrices": len(rows),
                    "above_twice_chance": sum(row.overlap > 2 * row.chance for row in rows),
                    **{
                        what: float(np.mean([getattr(row, what) for row in rows]))
                        for what in ("overlap", "chance", "smallest", "mean")
                    },
                }
            )
    return {
        "verdict": found.verdict,
        "reason": found.reason,
        "tensors": len({row.tensor for row in found.held}),
        "fractions": list(found.fractions),
        "curves": found.curves(),
        "cosines": found.cosines(),
        "beyond": {name: each._asdict() for name, each in found.beyond.items()},
        "differences": [
            {"one": one, "other": other, **each._asdict()} for (one, other), each in found.differences.items()
        ],
        "pairs": pairs,
        "layers": _layers(found),
    }


def _layers(found: UpdateComparison) -> list[dict[str, Any]]:
    """By layer: the share of each update in the main directions, and the mean angle of each pair of updates."""
    place = found.fractions.index(found.fraction)
    rows: list[dict[str, Any]] = []
    for layer in dict.fromkeys(row.layer for row in found.held):
        kept: dict[str, float] = {}
        chance: list[float] = []
        for tuned in found.beyond:
            own = [row for row in found.held if (row.layer, row.tuned) == (layer, tuned)]
            if energy := sum(row.energy for row in own):
                kept[tuned] = sum(row.energy * row.kept[place] for row in own) / energy
                chance.append(sum(row.energy * row.chance[place] for row in own) / energy)
        angles: dict[str, float] = {}
        for pair in dict.fromkeys((row.first, row.second) for row in found.pairs):
            each = [row.mean for row in found.pairs if (row.layer, row.first, row.second) == (layer, *pair)]
            if each:
                angles[" · ".join(pair)] = float(np.mean(each))
        rows.append({"layer": layer, "kept": kept, "chance": float(np.mean(chance)), "angles": angles})
    return rows


def asdict_of(row: Any) -> dict[str, Any]:
    """A named tuple as JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in row._asdict().items()}


def _texts(given: Prompts) -> list[Sequence[str]]:
    """What is read of a behaviour: prompts once a target."""
    parts: list[Sequence[str]] = [given.prompts, given.targets]
    return parts if given.against is None else [*parts, given.prompts, given.against]


def _multiplications_a_second() -> float:
    """Operations a second of a product of matrices as language models have them."""
    left, right = torch.randn(256, 576), torch.randn(576, 1536)
    started = time.perf_counter()
    for _ in range(4):
        torch.mm(left, right)
    return 4 * 2 * 256 * 576 * 1536 / (time.perf_counter() - started)
