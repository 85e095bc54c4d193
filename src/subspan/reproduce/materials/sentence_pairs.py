"""Labelled pairs of sentences, and the states of their tokens in the installed sentence encoder, kept in the cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from subspan.datasets import cached_features, is_available, load, load_sentence_encoder, stdlib_docstrings
from subspan.models import iterate_representations

_MAX_TOKENS, _BATCH, _SORTED_TOGETHER = 48, 64, 16


@dataclass(frozen=True)
class SentencePairs:
    """Premises, hypotheses and class numbers; `classes` in order."""

    premises: list[str]
    hypotheses: list[str]
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def labelled_pairs(train: int, test: int) -> tuple[str, SentencePairs, SentencePairs]:
    """What they are, pairs to train on and to test on: SNLI, or docstrings of one module or of two."""
    if is_available("snli"):
        data = load("snli")
        parts = [_snli(data[part][:count]) for part, count in (("dev", train), ("test", test))]
        return "SNLI (its development part trained on)", parts[0], parts[1]
    return "docstrings of Python's standard library: of the same module or not", *docstring_pairs(train, test)


def _snli(records: Sequence[dict[str, Any]]) -> SentencePairs:
    classes = ("contradiction", "entailment", "neutral")
    kept = [record for record in records if record["label"] in classes]
    labels = torch.tensor([classes.index(record["label"]) for record in kept])
    return SentencePairs([r["premise"] for r in kept], [r["hypothesis"] for r in kept], labels, classes)


def docstring_pairs(train: int, test: int) -> tuple[SentencePairs, SentencePairs]:
    """First lines of functions' docstrings, in pairs of one module (1) and of two (0); no text is in both parts."""
    generator = np.random.default_rng(0)
    modules: dict[str, list[str]] = defaultdict(list)
    for entry in stdlib_docstrings(kinds=("function",)):
        modules[entry.label].append(entry.text.splitlines()[0])
    seen: set[str] = set()
    halves: list[list[list[str]]] = [[], []]
    for name in sorted(modules):
        texts = [text for text in dict.fromkeys(modules[name]) if text not in seen]
        seen.update(texts)
        for half, part in zip(halves, (texts[::2], texts[1::2])):
            if len(part) > 1:
                half.append(part)
    return _drawn(halves[0], train, generator), _drawn(halves[1], test, generator)


def _drawn(modules: list[list[str]], count: int, generator: np.random.Generator) -> SentencePairs:
    sizes = np.array([len(texts) for texts in modules], dtype=float)
    premises, hypotheses = [], []
    for label in np.arange(count) % 2:
        first = int(generator.choice(len(modules), p=sizes / sizes.sum()))
        a, b = generator.permutation(len(modules[first]))[:2]
        premises.append(modules[first][a])
        if label:
            hypotheses.append(modules[first][b])
        else:
            other = (first + int(generator.integers(1, len(modules)))) % len(modules)
            hypotheses.append(modules[other][int(generator.integers(len(modules[other])))])
    return SentencePairs(premises, hypotheses, torch.arange(count) % 2, ("another module", "the same module"))


class TokenStates:
    """Final states of the tokens of some texts, in half precision, one after the other."""

    def __init__(self, texts: Sequence[str]) -> None:
        model, tokenizer = load_sentence_encoder()
        lengths = [len(ids) for ids in tokenizer(list(texts), truncation=True, max_length=_MAX_TOKENS)["input_ids"]]
        # Texts of one length share a batch, so that nothing is spent on padding.
        order = sorted(range(len(texts)), key=lambda index: (lengths[index], texts[index]))
        ordered = [texts[index] for index in order]
        ends = np.cumsum([lengths[index] for index in order])

        def compute(start: int) -> Iterator[Tensor]:
            rest = ordered[int(np.searchsorted(ends, start, side="right")) :]
            limits = {"padding": True, "truncation": True, "max_length": _MAX_TOKENS, "return_tensors": "pt"}
            batches = (dict(tokenizer(rest[i : i + _BATCH], **limits)) for i in range(0, len(rest), _BATCH))
            yield from iterate_representations(model, batches, -1, pool="rows", dtype=torch.float16)

        found = cached_features(compute, model=model, data=ordered, options={"rows": "tokens", "max": _MAX_TOKENS})
        self.rows = torch.from_numpy(np.array(found))
        starts = [0, *ends[:-1].tolist()]
        self.place = {text: (starts[i], int(ends[i])) for i, text in enumerate(ordered)}

    def of(self, texts: Sequence[str]) -> tuple[Float[Tensor, "n t d"], Bool[Tensor, "n t"]]:
        """States, padded to the longest, and which are tokens."""
        places = [self.place[text] for text in texts]
        padded = pad_sequence([self.rows[start:stop] for start, stop in places], batch_first=True).float()
        lengths = torch.tensor([stop - start for start, stop in places])
        return padded, torch.arange(padded.shape[1]) < lengths[:, None]

    def length(self, text: str) -> int:
        """Number of tokens."""
        start, stop = self.place[text]
        return stop - start

    def batches(self, pairs: SentencePairs, size: int, seed: int) -> list[Int[np.ndarray, " b"]]:
        """Rows of the pairs in random batches of similar length, so that little is spent on padding."""
        generator = np.random.default_rng(seed)
        lengths = np.array([self.length(a) + self.length(b) for a, b in zip(pairs.premises, pairs.hypotheses)])
        groups = np.array_split(generator.permutation(len(pairs)), max(1, len(pairs) // (_SORTED_TOGETHER * size)))
        ordered = np.concatenate([group[np.argsort(lengths[group], kind="stable")] for group in groups])
        cut = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return [cut[i] for i in generator.permutation(len(cut))]

    def batch(self, pairs: SentencePairs, rows: Int[np.ndarray, " b"]) -> tuple[tuple[Tensor, ...], Int[Tensor, " b"]]:
        """(premises, hypotheses, their masks) and labels of some rows."""
        premises, premise_mask = self.of([pairs.premises[row] for row in rows])
        hypotheses, hypothesis_mask = self.of([pairs.hypotheses[row] for row in rows])
        return (premises, hypotheses, premise_mask, hypothesis_mask), pairs.labels[torch.from_numpy(rows)]
