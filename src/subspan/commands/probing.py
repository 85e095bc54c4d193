"""Where does a checkpoint keep a property of texts, in how many dimensions, and what does erasing it cost?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.utils import check_random_state
from torch import Tensor

from subspan.base import Progress, require
from subspan.base.files import temporary_folder, write_text
from subspan.datasets import (
    WEIGHT_PACKAGES,
    cached_features,
    load_language_model,
    load_sentence_encoder,
    read_texts,
    stdlib_docstrings,
)
from subspan.edit import erase_differences, erase_subspace
from subspan.geometry import AffineMap, Subspace
from subspan.measures import knn_overlap
from subspan.models import TextStates, TextTokens, intervene, text_perplexity, text_tokens, token_sequences
from subspan.models.block_states import block_numbers, block_site
from subspan.models.text_states import TextPool, context_length, iterate_text_states, stacked_states
from subspan.probe import PropertyProbe, Target, property_subspace, target_of
from subspan.probe.linear_readings import folds_of, read_held_out

from .checkpoint_folders import load_checkpoint
from .property_texts import PropertyTexts, column_texts, docstring_texts

_SEQUENCES, _LENGTH = 16, 128
_BATCH = 16
# Texts that are read again while the property is erased, of a third that is not learnt from.
_AGAIN = 300
_RARE = "(rare)"


@dataclass(frozen=True)
class Probing:
    """A search for a property that can be looked at before it is done.

    Parameters
    ----------
    model
        Checkpoint folder of transformers, or the name of an installed model.
    texts
        File of records; None: docstrings by module.
    columns
        As of `column_texts`.
    layers
        Their numbers; None: all.
    pool
        Of the tokens that are read.
    max_texts, max_tokens
        Texts, and tokens of each, that are read.
    neutral
        File of texts on which the perplexity is measured; None: docstrings.
    seed
        Of all draws.
    """

    model: str
    texts: Path | None = None
    columns: Mapping[str, Any] | None = None
    layers: tuple[int, ...] | None = None
    pool: TextPool = "mean"
    max_texts: int = 600
    max_tokens: int = 128
    neutral: Path | None = None
    seed: int = 0

    def data(self) -> PropertyTexts:
        """The texts that are read. Raises ValueError for what is missing or cannot be told apart."""
        if self.texts is None:
            every = docstring_texts()
        else:
            every = column_texts(self.texts, **(self.columns or {}))
        return every.without_copies().drawn(self.max_texts, self.seed)

    def plan(self) -> dict[str, Any]:
        """How much would be read and held, and about how long it takes."""
        data = self.data()
        model, tokenizer = load_named(self.model)
        numbers = block_numbers(model, self.layers)
        tokens = self._tokens(model, tokenizer, data)
        some = TextTokens(tokens.rows[:4], tokens.kept[:4], 0, tokens.pad)
        started = time.perf_counter()
        width = next(iterate_text_states(model, some, numbers, pool=self.pool)).shape[2]
        a_token = (time.perf_counter() - started) / some.tokens
        neutral = _SEQUENCES * _LENGTH * 4 if _predicts(model) else 0
        again = 2 * min(_AGAIN, len(data) // 3) / len(data)
        return {
            "texts": len(tokens),
            "tokens": tokens.tokens,
            "cut": tokens.cut,
            "layers": len(numbers),
            "width": width,
            "held_megabytes": 4 * len(tokens) * (len(numbers) + 1) * width / 1e6,
            "estimated_seconds": a_token * (tokens.tokens * (1 + again) + neutral),
        }

    def run(
        self, output: Path | None, progress: Progress, page: Callable[[dict[str, Any]], str] | None = None
    ) -> dict[str, Any]:
        """Find the property, measure what erasing it costs, and write the folder where there is one to write."""
        started = time.perf_counter()
        data = self.data()
        progress("loading the model", 0.0)
        model, tokenizer = load_named(self.model)
        numbers = block_numbers(model, self.layers)
        tokens = self._tokens(model, tokenizer, data)
        own = data.rows(tokens.kept, f"whose span lies behind {self.max_tokens} tokens")
        states = self._states(model, tokens, numbers, lambda said, done: progress(said, 0.02 + 0.5 * done))
        probe = PropertyProbe(numeric=data.numeric, random_state=self.seed)
        probe.fit(states, list(own.values), progress=lambda said, done: progress(said, 0.52 + 0.18 * done))
        facts = self._facts(model, own, tokens, probe, numbers)
        found = states.states[numbers.index(probe.layer_)]
        eraser = None
        if probe.verdict_ != "not found":
            progress("erasing it", 0.7)
            ways = {"eraser": lambda rows, target: least_eraser(rows, target, probe.shrinkage_).map}
            others = _others(own)
            erased = probe.erased(found, ways, others)
            facts["erased"] = [row._asdict() for row in erased]
            eraser = least_eraser(found, probe.target_, probe.shrinkage_)
            facts["perplexity"] = self._perplexity(
                model, tokenizer, probe, eraser, lambda said, done: progress(said, 0.74 + 0.12 * done)
            )
            facts["downstream"] = self._downstream(
                model, tokens, states, probe, lambda said, done: progress(said, 0.86 + 0.13 * done)
            )
        facts |= {
            "seconds": round(time.perf_counter() - started, 2),
            "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": {name: version(name) for name in ("subspan", "torch", "transformers")},
        }
        if output is not None:
            write_found(output, facts, probe.subspace_, eraser, page)
        return facts

    def _tokens(self, model: Any, tokenizer: Any, data: PropertyTexts) -> TextTokens:
        most = min(self.max_tokens, context_length(model, tokenizer))
        return text_tokens(tokenizer, data.texts, data.spans, max_length=most)

    def _states(self, model: Any, tokens: TextTokens, numbers: list[int], progress: Progress) -> TextStates:
        """From the cache where they were read before: for another column, or by a run that was stopped."""

        def compute(start: int) -> Iterator[Tensor]:
            done = start
            for block in iterate_text_states(model, tokens, numbers, pool=self.pool, batch_size=_BATCH, start=start):
                yield block
                done += len(block)
                progress(f"reading {len(tokens)} texts", done / len(tokens))

        progress(f"reading {len(tokens)} texts", 0.0)
        options = {"layers": tuple(numbers), "pool": self.pool, "states": "texts"}
        data = [[row.ids, row.counts, row.own] for row in tokens.rows]
        rows = cached_features(compute, model=model, data=data, options=options, shard_rows=_BATCH * 8)
        return stacked_states(torch.from_numpy(np.array(rows)), tokens, numbers)

    def _facts(
        self, model: Any, data: PropertyTexts, tokens: TextTokens, probe: PropertyProbe, numbers: Sequence[int]
    ) -> dict[str, Any]:
        whole = "the last token" if self.pool == "last" else "the mean over all tokens"
        where = (
            whole if data.spans is None else f"{whole} of the span" if self.pool == "mean" else "the span's last token"
        )
        sizes = None
        if not data.numeric:
            sizes = {name: data.values.count(name) for name in probe.target_.names}
        return {
            "model": Path(self.model).resolve().name if Path(self.model).is_dir() else self.model,
            "property": data.name,
            "kind": "numbers" if data.numeric else "labels",
            "source": "docstrings of Python's standard library" if self.texts is None else self.texts.name,
            "classes": sizes,
            "read_at": where.replace("all tokens of the span", "the span's tokens"),
            "texts": len(data),
            "left_out": dict(data.left_out or {}),
            "cut": tokens.cut,
            "max_tokens": self.max_tokens,
            "verdict": probe.verdict_,
            "reason": probe.reason_,
            "score": probe.score_._asdict(),
            "chance": probe.chance_,
            "shuffled": probe.shuffled_,
            "words": probe.words_._asdict(),
            "beyond_words": probe.beyond_words_._asdict(),
            "layers": [row._asdict() for row in probe.layers_],
            "layer": probe.layer_,
            "site": list(block_site(model, probe.layer_)),
            "first_layer": probe.first_layer_,
            "last_layer": probe.last_layer_,
            "blocks": max(block_numbers(model)),
            "ranks": [row._asdict() for row in probe.ranks_],
            "rank": probe.rank_,
            "dimensions": probe.subspace_.dim,
            "width": probe.subspace_.ambient_dim,
            "coordinates": probe.coordinates_,
            "erased": [],
            "perplexity": None,
            "downstream": None,
            "seed": self.seed,
        }

    def _perplexity(
        self, model: Any, tokenizer: Any, probe: PropertyProbe, eraser: AffineMap, progress: Progress
    ) -> dict[str, float] | None:
        return neutral_perplexity(
            model, tokenizer, self.neutral, probe.layer_, {"eraser": eraser, **_projections(probe, self.seed)}, progress
        )

    def _downstream(
        self, model: Any, tokens: TextTokens, states: TextStates, probe: PropertyProbe, progress: Progress
    ) -> dict[str, Any] | None:
        """What later layers still tell while the property is erased at the best one, in texts not learnt from."""
        place = states.layers.index(probe.layer_)
        later = [number for number in states.layers if number > probe.layer_]
        if not later:
            return None
        random = check_random_state(self.seed)
        learnt, held = folds_of(probe.target_, 3, random).split(0)
        tried = held[torch.from_numpy(random.permutation(len(held)))[:_AGAIN]].sort().values
        target = probe.target_.rows(tried)
        space = property_subspace(states.states[place, learnt], probe.target_.rows(learnt), probe.shrinkage_)
        drawn = _random_like(space, self.seed)
        rows = tuple(tokens.rows[row] for row in tried.tolist())
        again = TextTokens(rows, tuple(range(len(rows))), 0, tokens.pad)
        folds = folds_of(target, 5, random)
        shown = {number: states.states[states.layers.index(number), tried] for number in later}
        found: dict[str, Any] = {"texts": len(tried), "layers": later}
        for step, (name, taken) in enumerate({"nothing": None, "subspace": space, "random": drawn}.items()):
            progress("reading later layers", step / 3)
            if taken is not None:
                name_of, site = block_site(model, probe.layer_)
                with intervene(model, name_of, _beyond_first(erase_subspace(taken)), site=site):
                    blocks = list(iterate_text_states(model, again, later, pool=self.pool, batch_size=_BATCH))
                read = torch.cat(blocks)[:, 1:].transpose(0, 1)
            else:
                read = torch.stack([shown[number] for number in later])
            held_out = read_held_out(read.contiguous(), [target], folds, shrinkages=[probe.shrinkage_])
            found[name] = held_out.scores().tolist()
            if taken is not None:
                found[f"{name}_neighbours"] = float(knn_overlap(shown[later[-1]], read[-1], k=10).mean())
        return found


def load_named(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, or of an installed package. Raises ValueError for neither."""
    folder = Path(name)
    if not folder.is_dir():
        package = WEIGHT_PACKAGES.get(name)
        if package is None or package.extra not in ("text", "llm"):
            known = ", ".join(key for key, each in WEIGHT_PACKAGES.items() if each.extra in ("text", "llm"))
            raise ValueError(f"MODEL: {name!r} is neither a folder nor an installed model ({known})")
        return load_sentence_encoder(name) if package.extra == "text" else load_language_model(name)
    transformers = require("transformers", extra="llm")
    model = load_checkpoint(folder, dtype=torch.float32)
    try:
        return model, transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"MODEL: the tokenizer of {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None


def least_eraser(states: Float[Tensor, "n d"], target: Target, shrinkage: float) -> AffineMap:
    """The map after which no linear probe reads a target, and which moves states least."""
    x, y = states.double(), target.columns()
    mean = x.mean(0)
    covariance = torch.cov(x.mT)
    covariance = (1 - shrinkage) * covariance + shrinkage * torch.diag(covariance.diagonal().clamp_min(1e-12))
    differences = (y - y.mean(0)).mT @ (x - mean) / len(x)
    exact = erase_differences(differences, covariance, mean)
    return exact.to(torch.float32)


def neutral_perplexity(
    model: Any,
    tokenizer: Any,
    neutral: Path | None,
    layer: int,
    maps: Mapping[str, AffineMap],
    progress: Progress,
) -> dict[str, float] | None:
    """Of a causal model on texts that are not about the property, as it is and with each map at a layer."""
    if not _predicts(model):
        return None
    texts = [each.text for each in stdlib_docstrings()] if neutral is None else read_texts(neutral).texts
    every = list(islice(token_sequences(tokenizer, texts, length=_LENGTH), _SEQUENCES))
    if not every:
        raise ValueError(f"--neutral: has too few tokens for one sequence of {_LENGTH}")
    name, site = block_site(model, layer)
    progress("perplexity of neutral text", 0.0)
    found = {"nothing": text_perplexity(model, every)}
    for step, (way, taken) in enumerate(maps.items()):
        progress("perplexity of neutral text", (1 + step) / (1 + len(maps)))
        with intervene(model, name, _beyond_first(taken), site=site):
            found[way] = text_perplexity(model, every)
    return found


def write_found(
    output: Path,
    facts: dict[str, Any],
    subspace: Subspace,
    eraser: AffineMap | None,
    page: Callable[[dict[str, Any]], str] | None,
) -> None:
    """The folder: page, facts, and where something was found the subspace, and the eraser where there is one."""
    with temporary_folder(output, exclusive=True) as unfinished:
        made = unfinished / "made"
        made.mkdir()
        if facts["verdict"] != "not found":
            subspace.save(made / "subspace.safetensors")
            if eraser is not None:
                eraser.save(made / "eraser.safetensors")
        write_text(made / "probe.json", json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        if page is not None:
            write_text(made / "report.html", page(facts))
        made.replace(output)


def _predicts(model: Any) -> bool:
    return model.get_output_embeddings() is not None and not getattr(model.config, "is_encoder_decoder", False)


def _beyond_first(taken: AffineMap) -> Callable[[Tensor], Tensor]:
    """The map on all positions but the first, whose state is of another size."""

    def change(states: Tensor) -> Tensor:
        return torch.cat([states[:, :1], taken.map(states[:, 1:])], 1)

    return change


def _projections(probe: PropertyProbe, seed: int) -> dict[str, AffineMap]:
    """What takes the subspace out, and one as large in random directions."""
    space = probe.subspace_
    return {"subspace": erase_subspace(space), "random subspace": erase_subspace(_random_like(space, seed))}


def _random_like(space: Subspace, seed: int) -> Subspace:
    generator = torch.Generator().manual_seed(seed)
    drawn = Subspace.random(space.ambient_dim, space.dim, generator=generator, dtype=torch.float32)
    return Subspace(drawn.basis, center=space.center)


def _others(data: PropertyTexts) -> dict[str, Target]:
    """Further labels, rare ones together. Raises ValueError for one that is the same in all texts."""
    found: dict[str, Target] = {}
    for name, labels in (data.others or {}).items():
        joined = [label if labels.count(label) >= 2 * 5 else _RARE for label in labels]
        if len(set(joined)) < 2:
            raise ValueError(f"--other: {name!r} has no two labels of ten texts each")
        found[name] = target_of(joined)
    return found
