"""Where does a checkpoint keep the syntax of code? The trees of functions, read by `ASTProbe`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subspan.base import Progress
from subspan.datasets import read_texts, stdlib_docstrings
from subspan.edit import erase_subspace
from subspan.geometry import Subspace
from subspan.measures import paired_bootstrap
from subspan.models.block_states import block_numbers, block_site
from subspan.probe import (
    ASTProbe,
    SyntaxTree,
    TokenStates,
    code_trees,
    permuted_trees,
    rank_sweep,
    right_branching,
    token_states,
    tree_score,
)

from .probing import load_named, neutral_perplexity, write_found

_TOKENS = (8, 60)
_FEWEST = 40
_MOST = 300
_LAYERS = 7
_RANK, _RANKS = 64, (4, 16)

Part = tuple[TokenStates, list[SyntaxTree]]


@dataclass(frozen=True)
class CodeProbing:
    """A search for syntax that can be looked at before it is done.

    Parameters
    ----------
    model
        Checkpoint folder of transformers, or the name of an installed model.
    texts, text_column
        File of Python functions; None: those of the standard library.
    layers
        Their numbers; None: seven, evenly spaced. The first is always among them.
    max_texts
        Functions that are read, at most 300.
    neutral
        File of texts on which the perplexity is measured; None: docstrings.
    seed
        Of all draws.
    """

    model: str
    texts: Path | None = None
    text_column: str | None = None
    layers: tuple[int, ...] | None = None
    max_texts: int = 600
    neutral: Path | None = None
    seed: int = 0

    def trees(self) -> list[SyntaxTree]:
        """Of different functions of a few to some dozen tokens, drawn at random."""
        if self.texts is None:
            sources = [entry.code for entry in stdlib_docstrings(kinds=("function",), min_length=1)]
        else:
            sources = list(read_texts(self.texts, column=self.text_column).texts)
        try:
            found = code_trees(sources, min_tokens=_TOKENS[0], max_tokens=_TOKENS[1]).trees
        except ValueError as error:
            raise ValueError(f"--texts: {str(error).removeprefix('sources: ')}") from None
        trees = list({tree.tokens: tree for tree in found}.values())
        if len(trees) < _FEWEST:
            raise ValueError(
                f"--texts: {_FEWEST} different pieces of Python of {_TOKENS[0]} to {_TOKENS[1]} tokens are the fewest, "
                f"{len(trees)} of {len(sources)} are such"
            )
        order = np.random.default_rng(self.seed).permutation(len(trees))[: min(self.max_texts, _MOST)]
        return [trees[place] for place in order]

    def plan(self) -> dict[str, Any]:
        """How much would be read and held, and about how long it takes."""
        trees = self.trees()
        model, tokenizer = load_named(self.model)
        numbers = self._numbers(model)
        started = time.perf_counter()
        some = token_states(model, tokenizer, trees[:4], numbers)
        a_token = (time.perf_counter() - started) / sum(len(tree) for tree in trees[:4])
        tokens, width = sum(map(len, trees)), some.states.shape[2]
        # An epoch multiplies each state with a projection some times; there are twenty epochs of ten probes.
        work = 20 * (len(numbers) + 9) * tokens * width * _RANK * 6
        return {
            "texts": len(trees),
            "tokens": tokens,
            "layers": len(numbers),
            "width": width,
            "held_megabytes": 2 * tokens * len(numbers) * width / 1e6,
            "estimated_seconds": a_token * tokens + work / 4e9,
        }

    def run(
        self, output: Path | None, progress: Progress, page: Callable[[dict[str, Any]], str] | None = None
    ) -> dict[str, Any]:
        """Find the trees, measure what erasing them costs, and write the folder where there is one to write."""
        started = time.perf_counter()
        progress("parsing", 0.0)
        wanted = self.trees()
        model, tokenizer = load_named(self.model)
        numbers = self._numbers(model)
        states = token_states(
            model, tokenizer, wanted, numbers, progress=lambda said, done: progress(said, 0.02 + 0.28 * done)
        )
        trees = [wanted[number] for number in states.kept]
        learnt, held, test = _parts(states, trees)
        progress("reading all layers", 0.3)
        rank = min(_RANK, states.states.shape[2] // 2)
        probe = ASTProbe(rank=rank, learning_rate=3e-3, batch_size=8, max_epochs=20, random_state=self.seed)
        probe.fit(*learnt, held)
        scores = probe.snippet_scores(*test)[:, :, 2]
        best = numbers.index(probe.layer_)
        own = [(part.layer(probe.layer_), those) for part, those in (learnt, held, test)]
        ranks = rank_sweep(
            probe,
            own[0],
            own[1],
            own[2],
            [k for k in _RANKS if k < rank],
            progress=lambda said, done: progress(said, 0.5 + 0.2 * done),
        )
        progress("controls", 0.7)
        controls = self._controls(probe, own)
        facts = self._facts(model, probe, trees, numbers, scores, best, ranks, controls)
        progress("erasing it", 0.8)
        taken = {"subspace": probe.subspace_, "random subspace": controls.space}
        facts["erased"] = [_row("nothing", scores[best], controls.branching)]
        for way, space in taken.items():
            facts["erased"].append(_row(way, _without(space, probe, own), controls.branching))
        maps = {way: erase_subspace(space) for way, space in taken.items()}
        facts["perplexity"] = neutral_perplexity(
            model, tokenizer, self.neutral, probe.layer_, maps, lambda said, done: progress(said, 0.9 + 0.1 * done)
        )
        facts |= {
            "seconds": round(time.perf_counter() - started, 2),
            "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": {name: version(name) for name in ("subspan", "torch", "transformers")},
        }
        if output is not None:
            write_found(output, facts, probe.subspace_, None, page)
        return facts

    def _numbers(self, model: Any) -> list[int]:
        if self.layers is not None:
            return block_numbers(model, sorted({0, *block_numbers(model, self.layers)}))
        last = max(block_numbers(model))
        return sorted({round(step * last / (_LAYERS - 1)) for step in range(_LAYERS)})

    def _controls(self, probe: ASTProbe, own: Sequence[Part]) -> _Controls:
        """Of each test snippet: a random subspace, trees in another order, and the majority's right-branching tree."""
        learnt, held, test = own
        width, rank = learnt[0].states.shape[2], probe.subspace_.dim
        generator = torch.Generator().manual_seed(self.seed)
        space = Subspace.random(width, rank, generator=generator, dtype=torch.float32)
        orders = np.random.default_rng(self.seed)
        mixed = [(states, permuted_trees(trees, orders)) for states, trees in (learnt, held)]
        fresh = replace(probe, subspace=None)
        guessed = right_branching(learnt[1], map(len, test[1]))
        return _Controls(
            space,
            replace(probe, subspace=space).fit(*learnt, held).snippet_scores(*test)[0, :, 2],
            fresh.fit(*mixed[0], mixed[1]).snippet_scores(*test)[0, :, 2],
            np.array([tree_score(*pair).f1 for pair in zip(test[1], guessed)]),
        )

    def _facts(
        self,
        model: Any,
        probe: ASTProbe,
        trees: Sequence[SyntaxTree],
        numbers: Sequence[int],
        scores: np.ndarray,
        best: int,
        ranks: Sequence[Any],
        controls: _Controls,
    ) -> dict[str, Any]:
        rows = [
            {"layer": number, **_estimate(row), "shuffled": None} for number, row in zip(numbers, scores, strict=True)
        ]
        floor = max((controls.permuted, controls.branching), key=lambda each: float(each.mean()))
        above = paired_bootstrap(scores[best], floor)
        beyond = dict(zip(("value", "low", "high"), paired_bootstrap(scores[best], scores[0])))
        near = [paired_bootstrap(scores[best], row)[1] <= 0 for row in scores]
        first = best - next((step for step in range(best + 1) if not near[best - step]), best + 1) + 1
        last = best + next((step for step in range(len(near) - best) if not near[best + step]), len(near) - best) - 1
        found = [row._asdict() for row in ranks]
        curve = [
            {"rank": row["rank"], "score": row["f1"], "low": None, "high": None}
            | {"random": row["random"], "shuffled": row["permuted"]}
            for row in found
        ]
        whole = _estimate(scores[best])
        curve.append(
            {"rank": probe.subspace_.dim, **whole}
            | {"random": float(controls.random.mean()), "shuffled": float(controls.permuted.mean())}
        )
        verdict = "not found" if above[1] <= 0 else "in the words" if beyond["low"] <= 0 else "kept"
        layers = f"layers {numbers[first]} to {numbers[last]}" if last > first else f"layer {numbers[best]}"
        said = {
            "not found": "no layer reads syntax above the labels' statistics",
            "in the words": "not found beyond the words themselves",
            "kept": f"kept in {layers} of those read, in {probe.subspace_.dim} dimensions",
        }[verdict]
        reason = (
            f"{said}: F1 {whole['score']:.2f} ({whole['low']:.2f} to {whole['high']:.2f}) in functions held out; "
            f"{probe.subspace_.dim} random dimensions give {controls.random.mean():.2f}, trees in another order "
            f"{controls.permuted.mean():.2f}, the words alone {scores[0].mean():.2f}, right-branching trees "
            f"{controls.branching.mean():.2f}"
        )
        return {
            "model": Path(self.model).resolve().name if Path(self.model).is_dir() else self.model,
            "property": "syntax",
            "kind": "code",
            "source": "functions of Python's standard library" if self.texts is None else self.texts.name,
            "classes": None,
            "read_at": "each token",
            "texts": len(trees),
            "left_out": {},
            "cut": 0,
            "max_tokens": 512,
            "verdict": verdict,
            "reason": reason,
            "score": {"value": whole["score"], "low": whole["low"], "high": whole["high"]},
            "chance": float(controls.branching.mean()),
            "shuffled": float(controls.permuted.mean()),
            "words": {name: rows[0][key] for name, key in (("value", "score"), ("low", "low"), ("high", "high"))},
            "beyond_words": beyond,
            "layers": rows,
            "layer": probe.layer_,
            "site": list(block_site(model, probe.layer_)),
            "first_layer": numbers[first],
            "last_layer": numbers[last],
            "blocks": max(block_numbers(model)),
            "ranks": curve,
            "rank": probe.subspace_.dim,
            "dimensions": probe.subspace_.dim,
            "width": probe.subspace_.ambient_dim,
            "coordinates": {},
            "erased": [],
            "perplexity": None,
            "downstream": None,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class _Controls:
    space: Subspace
    random: np.ndarray
    permuted: np.ndarray
    branching: np.ndarray


def _parts(states: TokenStates, trees: list[SyntaxTree]) -> tuple[Part, Part, Part]:
    """Seven tenths to learn from, a tenth to choose with, a fifth to test on."""
    n = len(trees)
    cuts = [0, n * 7 // 10, n * 8 // 10, n]
    parts = [(states.part(a, b), trees[a:b]) for a, b in pairwise(cuts)]
    return parts[0], parts[1], parts[2]


def _without(space: Subspace, probe: ASTProbe, own: Sequence[Part]) -> np.ndarray:
    """F1 of test snippets by a probe that is learnt anew on states without a subspace."""
    left = [
        (TokenStates(space.residual(states.states.float()), states.lengths, states.layers, states.kept), trees)
        for states, trees in own
    ]
    return replace(probe, subspace=None).fit(*left[0], left[1]).snippet_scores(*left[2])[0, :, 2]


def _estimate(scores: np.ndarray) -> dict[str, float]:
    value, low, high = paired_bootstrap(scores, np.zeros_like(scores))
    return {"score": value, "low": low, "high": high}


def _row(way: str, scores: np.ndarray, branching: np.ndarray) -> dict[str, Any]:
    return {"name": "", "way": way, **_estimate(scores), "chance": float(branching.mean()), "neighbours": None}
