"""Changing the encoder under a search index: real pairs of encoders, what a fitted map saves, and when it does not.

An upgrade is two encoders' embeddings of the same items. A part of the items fits the maps; queries are other items, and
the index holds the old embeddings of all. Every number is a recall of queries that fitted nothing.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ..align import UpgradeMap, backfill_order
from ..align.held_out import Retrieval, closed_forms
from ..datasets import code_and_docstrings, load
from ..datasets.cache import cached_features
from ..datasets.packages import load_language_model, load_sentence_encoder
from ..datasets.shared import is_available
from ..geometry.arrays import normalize_rows
from ..models import SentenceEncoder
from ..solvers import backfill_curve, retrieval_scores
from ..statistics import Moments
from .image_features import image_encoder, labelled_images, pooled_features
from .protocol import Check, Outcome, Progress, Table

_SIZE = 128
_WIDTH = 256
_SENTENCES = 1500
_FUNCTIONS = 1000
_TOKENS = 48
_SHARE = 0.7


@dataclass(frozen=True)
class Upgrade:
    """Embeddings of the same items by a new and an old encoder; `target` says what a query is to find."""

    name: str
    new: Float[Tensor, "n d_x"]
    old: Float[Tensor, "n d_y"]
    target: str = "neighbours"
    labels: np.ndarray | None = None


def photographs(new: int, old: int) -> Upgrade:
    """EfficientNet-Lite of two sizes on the ImageNet sample and Flickr8k, 2000 photographs."""
    sources = [load(name).images.subset(range(1000)) for name in ("imagenet1k_sample", "flickr8k_1000")]
    x, y = (
        torch.cat([pooled_features(images, image_encoder(_SIZE, f"efficientnet-lite{n}"), _SIZE) for images in sources])
        for n in (new, old)
    )
    return Upgrade(f"Lite{old} → Lite{new}, photographs", x, y)


def small_pictures(new: int, old: int, source: str = "cifar100") -> Upgrade:
    """EfficientNet-Lite of two sizes on labelled pictures (handwritten digits where there are no others)."""
    data = labelled_images(source)
    x, y = (data.features(f"efficientnet-lite{n}", _SIZE) for n in (new, old))
    return Upgrade(f"Lite{old} → Lite{new}, {data.name}", x, y, labels=np.asarray(data.labels))


def sentences_pair() -> Upgrade:
    """Sentences of the STS benchmark: mean-pooled hidden states of SmolLM2 in the space of MiniLM."""
    records = load("stsb")["train"]
    found = list(dict.fromkeys(text for record in records for text in (record["sentence1"], record["sentence2"])))
    texts = [found[i] for i in np.random.default_rng(0).permutation(len(found))[:_SENTENCES]]
    language_model, tokenizer = load_language_model()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    states = _texts(SentenceEncoder(language_model.model, tokenizer, max_length=_TOKENS, normalize=False), texts)
    return Upgrade("MiniLM → SmolLM2 states, sentences", states, _texts(_minilm(), texts))


def code_pair() -> Upgrade:
    """Functions of the standard library and their docstrings, both by MiniLM; a function is to find its docstring."""
    rows = code_and_docstrings(max_code=1500)
    chosen = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:_FUNCTIONS]]
    code, texts = ([row[part] for row in chosen] for part in (0, 1))
    return Upgrade("docstring ← code, standard library", _texts(_minilm(), code), _texts(_minilm(), texts), "pair")


def captions_pair() -> Upgrade:
    """Flickr8k photographs by EfficientNet-Lite0 and their first captions by MiniLM; a caption finds its photograph."""
    photos = load("flickr8k_1000")
    images = photos.images.subset(range(1000))
    captions = [photos.records[i]["captions"][0] for i in range(1000)]
    pictures = pooled_features(images, image_encoder(_SIZE), _SIZE)
    return Upgrade("image ← caption, frozen encoders", _texts(_minilm(), captions), pictures, "pair")


def _minilm() -> SentenceEncoder:
    return SentenceEncoder(*load_sentence_encoder(), max_length=_TOKENS)


def _texts(encoder: SentenceEncoder, texts: list[str]) -> Float[Tensor, "n d"]:
    found = cached_features(
        lambda start: encoder.iterate(texts[start:]),
        model=encoder.model,
        data=texts,
        options={"pool": encoder.pool, "max_length": encoder.max_length, "normalize": encoder.normalize},
    )
    return torch.from_numpy(np.array(found))
