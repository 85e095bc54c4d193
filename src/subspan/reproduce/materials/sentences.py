"""Texts with classes, and embeddings of texts by an installed encoder, kept in the cache folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subspan.datasets import cached_features, is_available, load, stdlib_docstrings
from subspan.models import SentenceEncoder

_MODULES = 10


def text_features(
    texts: Sequence[str], encoder: SentenceEncoder, *, options: dict[str, Any] | None = None, repeated: bool = False
) -> Float[Tensor, "n d"]:
    """Embeddings of texts, from the cache where they were computed before.

    options: what they depend on beside the encoder's weights and the texts (pooling, length, …). repeated: the same
    text comes many times; each different one is then encoded once.
    """
    rows, place = (part.tolist() for part in np.unique(list(texts), return_inverse=True)) if repeated else (texts, None)
    found = cached_features(
        lambda start: encoder.iterate(rows[start:]), model=encoder.model, data=list(rows), options=options
    )
    return torch.from_numpy(np.array(found if place is None else found[place]))


def labelled_texts(train: int, test: int, seed: int) -> tuple[str, tuple[list[str], Tensor], tuple[list[str], Tensor]]:
    """What they are, and texts with class numbers to fit and to test: AG News, or docstrings by top-level module."""
    if is_available("icl_text"):
        data, name = load("icl_text/agnews"), "AG News"
        records = [(record["text"], record["label"]) for part in ("train", "test") for record in data[part]]
    else:
        entries, name = stdlib_docstrings(), "docstrings of the standard library by module"
        counts = Counter(entry.label for entry in entries)
        largest = sorted(counts, key=lambda label: (-counts[label], label))[:_MODULES]
        records = [(entry.text, entry.label) for entry in entries if entry.label in largest]
    chosen = [records[i] for i in np.random.default_rng(seed).permutation(len(records))]
    classes = sorted({label for _, label in records})
    cut = min(train, len(chosen) * 3 // 4)
    fit, held = (
        ([text for text, _ in part], torch.tensor([classes.index(label) for _, label in part]))
        for part in (chosen[:cut], chosen[cut : cut + test])
    )
    return name, fit, held
