"""Weights with which one attention head asks and is asked, cut out of the layers that hold all heads."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from .attention_edges import attention_modules
from .layers import Layer, linear_weight

# Names of the two maps where a model keeps them apart.
_APART = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"))


class HeadWeights(NamedTuple):
    """Query and key maps of a head, d_head × d; see `head_weights`.

    Attributes
    ----------
    query, key
        (d_head, d).
    """

    query: Float[Tensor, "h d"]
    key: Float[Tensor, "h d"]


def head_weights(model: nn.Module, layer: Layer, head: int) -> HeadWeights:
    """Query and key maps of an attention head: of what goes into attention, after the norm before it.

    Where several query heads share a key head, query head h has the key head h // (heads / key heads). Biases, rotary
    positions and norms of queries and keys are not part of the maps.

    Parameters
    ----------
    model
        Of transformers: maps of their own (`q_proj`, `query`, `q_lin`), or joined ones (`c_attn`, `qkv_proj`,
        `query_key_value`).
    layer
        One block, as in `layer_names`.
    head
        Number of the query head.

    Returns
    -------
    HeadWeights

    Raises
    ------
    ValueError
        For a head or layer that there is not, and attention whose maps are not found.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2Model
    >>> from subspan.models import head_weights
    >>> head_weights(GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)), 0, 1).key.shape
    torch.Size([4, 8])
    """
    found = attention_modules(model, layer)
    if len(found) != 1:
        raise ValueError(f"layer: one block is needed, {layer!r} matches {len(found)}")
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = int(config.num_attention_heads)
    shared = int(getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads)
    if not 0 <= head < heads:
        raise ValueError(f"head: from 0 to {heads - 1}, got {head}")
    (part,) = found.values()
    query, key = _maps(part, heads, shared)
    return HeadWeights(query[head].detach(), key[head // (heads // len(key))].detach())


def _maps(part: nn.Module, heads: int, shared: int) -> tuple[Tensor, Tensor]:
    """All query maps (heads, d_head, d) and all key maps (key heads, d_head, d)."""
    for names in _APART:
        if all(hasattr(part, name) for name in names):
            query, key = (linear_weight(getattr(part, name))[0] for name in names)
            width = len(query) // heads
            return query.unflatten(0, (heads, width)), key.unflatten(0, (len(key) // width, width))
    for name in ("c_attn", "qkv_proj"):
        if hasattr(part, name):
            joined = linear_weight(getattr(part, name))[0]
            width = len(joined) // (heads + 2 * shared)
            query, key, _ = joined.split([heads * width, shared * width, shared * width])
            return query.unflatten(0, (heads, width)), key.unflatten(0, (shared, width))
    if hasattr(part, "query_key_value"):
        # Group by group: the query heads of a key head, then its key and its value.
        joined = linear_weight(part.get_submodule("query_key_value"))[0]
        grouped = joined.unflatten(0, (shared, heads // shared + 2, -1))
        return grouped[:, :-2].flatten(0, 1), grouped[:, -2]
    known = ", ".join([*(first for first, _ in _APART), "c_attn", "qkv_proj", "query_key_value"])
    raise ValueError(f"model: {type(part).__name__} has none of {known}, so its query and key maps are not found")
