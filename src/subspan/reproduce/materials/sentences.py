"""Embeddings of texts by an installed encoder, kept in the cache folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subspan.datasets import cached_features
from subspan.models import SentenceEncoder


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
