"""Vectors that stand in a language model's input where a placeholder token was."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

PLACEHOLDER = -200
"""Token id that no tokenizer gives out; it marks where embeddings go."""

IGNORED = -100
"""Label that no loss counts."""


class Spliced(NamedTuple):
    """Inputs of a causal language model: names as transformers takes them; labels None where none were given."""

    inputs_embeds: Float[Tensor, "b s h"]
    attention_mask: Int[Tensor, "b s"]
    labels: Int[Tensor, "b s"] | None


def splice_embeddings(
    model: Any,
    embeddings: Float[Tensor, "b n h"],
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None = None,
    labels: Int[Tensor, "b t"] | None = None,
    *,
    placeholder: int = PLACEHOLDER,
) -> Spliced:
    """Put `embeddings` (b, n, h) where each row of `input_ids` holds its one placeholder, s = t - 1 + n.

    The spliced positions are attended to and carry no label. Raises ValueError when a row has no placeholder or
    several, or the widths differ.
    """
    places = input_ids == placeholder
    wrong = (places.sum(-1) != 1).nonzero()[:, 0]
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"input_ids: row {row} has {int(places[row].sum())} placeholders ({placeholder}), 1 is needed")
    table: Any = model.get_input_embeddings()
    if embeddings.shape[-1] != table.weight.shape[1]:
        raise ValueError(f"embeddings: expected width {table.weight.shape[1]}, got {embeddings.shape[-1]}")
    b, n, _ = embeddings.shape
    start = places.int().argmax(-1, keepdim=True)
    position = torch.arange(input_ids.shape[1] - 1 + n, device=input_ids.device).expand(b, -1)
    offset = position - start
    inside = (offset >= 0) & (offset < n)
    # Left of the splice the token is at the same place, right of it n - 1 places earlier.
    source = torch.where(offset < n, position, position - (n - 1)).clamp_max(input_ids.shape[1] - 1)
    words = table(input_ids.masked_fill(places, 0)).gather(1, source[..., None].expand(-1, -1, embeddings.shape[-1]))
    ours = embeddings.to(words.dtype).gather(1, offset.clamp(0, n - 1)[..., None].expand(-1, -1, embeddings.shape[-1]))
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return Spliced(
        torch.where(inside[..., None], ours, words),
        mask.gather(1, source).masked_fill(inside, 1),
        None if labels is None else labels.gather(1, source).masked_fill(inside, IGNORED),
    )
