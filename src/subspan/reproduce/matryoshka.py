"""Matryoshka on frozen features."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..datasets import code_and_docstrings, load_sentence_encoder
from ..datasets.cache import cached_features
from ..models import SentenceEncoder

_TOKENS = 48


def code_pairs(count: int, seed: int) -> tuple[Float[Tensor, "n q"], Float[Tensor, "n q"]]:
    """MiniLM embeddings of functions of Python's standard library and of their docstrings, `count` pairs at random."""
    pairs = code_and_docstrings(max_code=1500)
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:count]
    encoder = SentenceEncoder(*load_sentence_encoder(), max_length=_TOKENS)
    sides = []
    for side in (1, 0):
        texts = [pairs[row][side] for row in chosen]
        found = cached_features(
            lambda start, texts=texts: encoder.iterate(texts[start:], 32),
            model=encoder.model,
            data=texts,
            options={"output": "mean of the last states", "max_length": _TOKENS},
            shard_rows=512,
        )
        sides.append(torch.from_numpy(np.array(found)))
    return sides[1], sides[0]
