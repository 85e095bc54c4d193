"""Checkpoints that were tuned from one base, made one: `subspan merge`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subspan.base import Progress
from subspan.base.files import write_text
from subspan.geometry import expected_overlap
from subspan.models import StateDelta, StoredWeights, write_weights
from subspan.models.weight_files import BLOCK
from subspan.weights import average, dare, iso_c, iso_cts, task_arithmetic, ties, tsv_merge

from .checkpoint_folders import copy_companions, stamp, stored_bytes, update_between
from .origin import origin

METHODS: dict[str, Callable[..., StateDelta]] = {
    "average": average,
    "task-arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "tsv": tsv_merge,
    "iso-c": iso_c,
    "iso-cts": iso_cts,
}
_DECOMPOSED = ("tsv", "iso-c", "iso-cts")
_OPTIONS = {
    "scaling": ("task-arithmetic", "ties", "dare", "tsv", "iso-c", "iso-cts"),
    "density": ("ties",),
    "drop": ("dare",),
    "common_share": ("iso-cts",),
    "random_state": ("dare",),
}
_ENERGY = 0.9
_SHARD = 1 << 30


@dataclass(frozen=True)
class Merge:
    """A merge that can be looked at before it is done.

    Parameters
    ----------
    base
        Checkpoint folder that the experts were tuned from.
    experts
        Checkpoint folders; never written to.
    method
        A name of `METHODS`.
    options
        Of the method; those that are None are its defaults.
    """

    base: Path
    experts: tuple[Path, ...]
    method: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len({path.resolve() for path in self.experts}) < len(self.experts):
            raise ValueError("EXPERT: the same folder is named twice")
        for name, value in self.options.items():
            if value is not None and self.method not in _OPTIONS[name]:
                flag = "--seed" if name == "random_state" else f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag}: {self.method} has no such option; it is for {', '.join(_OPTIONS[name])}")

    def deltas(self, stored: StoredWeights | None = None) -> list[StateDelta]:
        """The update of every expert. Raises ValueError, naming the expert, where it is none of this base."""
        stored = StoredWeights(self.base) if stored is None else stored
        return [update_between(self.base, path, stored) for path in self.experts]

    def plan(self) -> dict[str, Any]:
        """What would be read, written and held, and about how long it takes."""
        deltas = self.deltas()
        shapes = deltas[0].shapes
        sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        started = time.perf_counter()
        probe = max((name for name in sizes if sizes[name] <= 1 << 23), key=lambda name: sizes[name], default=largest)
        for delta in deltas:
            delta[probe]
        a_byte = (time.perf_counter() - started) / sizes[probe]
        seconds = a_byte * sum(sizes.values()) * (3 if self.method == "ties" else 1)
        if self.method in _DECOMPOSED:
            seconds += self._decomposing(shapes)
        return {
            "method": self.method,
            "tensors": len(shapes),
            "numbers": sum(sizes.values()) // 4,
            "written_megabytes": stored_bytes(StoredWeights(self.base)) / 1e6,
            "largest_tensor": largest,
            "held_megabytes": self._held(len(deltas), sizes[largest]) / 1e6,
            "estimated_seconds": seconds,
        }

    def _held(self, experts: int, largest: int) -> float:
        """Bytes: of a large tensor some rows at a time, but where it is decomposed."""
        if self.method in _DECOMPOSED:
            return (experts + 3) * largest
        # As measured on models of 200 MB: what is made between reading and writing, once more where values are ranked.
        return (experts + 3) * min(largest, 4 * BLOCK) * (9 if self.method == "ties" else 4)

    def _decomposing(self, shapes: Mapping[str, Any]) -> float:
        """Seconds for the singular value decompositions, from one of a middling matrix."""
        matrices = [shape for shape in shapes.values() if len(shape) == 2]
        started = time.perf_counter()
        torch.linalg.svd(torch.randn(256, 256), full_matrices=False)
        unit = (time.perf_counter() - started) / 256**3
        times = {"tsv": len(self.experts) + 2, "iso-c": 1, "iso-cts": len(self.experts) + 3}[self.method]
        return unit * times * sum(max(shape) * min(shape) ** 2 for shape in matrices)

    def overlaps(self, progress: Progress) -> list[dict[str, Any]]:
        """How the experts' updates lie to one another, a row a matrix, the most overlapping first.

        Mean squared cosine of the principal angles of the output subspaces that hold 0.9 of each update's energy, the
        mean over pairs, beside that of random subspaces of the same ranks.
        """
        deltas = self.deltas()
        names = [name for name, shape in deltas[0].shapes.items() if len(shape) == 2]
        rows = []
        for number, name in enumerate(names):
            progress(f"overlap of {name}", number / len(names))
            parts = [d.only([name]).subspaces(_ENERGY).get(name) for d in deltas]
            found = [part for part in parts if part is not None]
            pairs = [(a, b) for place, a in enumerate(found) for b in found[:place]]
            if pairs:
                chance = [expected_overlap(a.dim, b.dim, a.ambient_dim) for a, b in pairs]
                rows.append(
                    {
                        "tensor": name,
                        "overlap": float(np.mean([float(a.overlap(b)) for a, b in pairs])),
                        "by_chance": float(np.mean(chance)),
                        "rank": round(float(np.mean([each.dim for each in found]))),
                        "of": min(deltas[0].shapes[name]),
                    }
                )
        return sorted(rows, key=lambda row: row["by_chance"] - row["overlap"])

    def run(
        self, output: Path, progress: Progress, page: Callable[[dict[str, Any]], str] | None = None
    ) -> dict[str, Any]:
        """Write the merged checkpoint: weights, what stands beside the base's, and a model card.

        page: makes a report (HTML) of the facts, which is put beside them. Where the process is killed, the same call
        goes on after the shards that are written.
        """
        started = time.perf_counter()
        stored = StoredWeights(self.base)
        deltas = self.deltas(stored)
        chosen = {name: value for name, value in self.options.items() if value is not None}
        merged = METHODS[self.method](deltas, **chosen)
        begun = dict.fromkeys(merged, False)

        def noted(name: str, value: torch.Tensor) -> torch.Tensor:
            if not begun[name]:
                progress(f"merging {name}", sum(begun.values()) / len(begun))
                begun[name] = True
            return value

        facts = {"method": self.method, **chosen, "base": self.base.name, "experts": [p.name for p in self.experts]}

        def finish(folder: Path) -> None:
            copy_companions(self.base, folder)
            write_text(folder / "merge.json", json.dumps(facts, indent=2) + "\n")
            write_text(folder / "README.md", _card(facts))
            if page is not None:
                about = {
                    "options": chosen,
                    "tensors": len(merged),
                    "megabytes": stored_bytes(StoredWeights(folder)) / 1e6,
                    **origin(started, chosen.get("random_state", 0), "torch"),
                }
                write_text(folder / "report.html", page({**facts, **about}))

        stamps = [f"{path.resolve()} {stamp(path)}" for path in (self.base, *self.experts)]
        write_weights(
            merged.map(noted, elementwise=True).added_to(stored),
            output,
            shard_bytes=_SHARD,
            resume=json.dumps([facts, stamps]),
            finish=finish,
        )
        return {"tensors": len(merged), "megabytes": stored_bytes(StoredWeights(output)) / 1e6}


def overlap_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The overlaps in one line: medians over the matrices, and how many are above twice what chance gives."""
    if not rows:
        return {"overlap": "no matrix is changed by two experts"}
    return {
        "matrices": len(rows),
        "overlap_median": float(np.median([row["overlap"] for row in rows])),
        "by_chance_median": float(np.median([row["by_chance"] for row in rows])),
        "above_twice_chance": sum(row["overlap"] > 2 * row["by_chance"] for row in rows),
    }


def _card(facts: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name} {facts[name]}" for name in _OPTIONS if name in facts) or "defaults"
    experts = "\n".join(f"- {name}" for name in facts["experts"])
    return (
        f"# Merged model\n\n`{facts['base']}` with the updates of\n\n{experts}\n\n"
        f"merged by {facts['method']} ({options}) with `subspan merge`. Tokenizer and configuration are the base's.\n"
        "It was not evaluated: measure it on the tasks of the experts before use.\n"
    )
