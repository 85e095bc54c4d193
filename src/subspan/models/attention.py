"""What a model's attention looks at: one vector a sample from the tokens that the query attends to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subspan.base.modules import evaluation

from .capture import Capture
from .layers import layer_names


def attended_representation(
    model: nn.Module,
    batch: Mapping[str, Any],
    query_mask: Tensor,
    context_mask: Tensor,
    mass: float = 0.9,
    block: int | str = 0,
    *,
    on_empty: Literal["error", "nan"] = "error",
) -> Float[Tensor, "b d"]:
    """Mean state, after one block, of the context tokens that the query tokens attend to most.

    ScalSelect (Wu et al., 2026), stage 1: the block's attention is averaged over heads and over the query tokens and
    normalised over the context tokens; of these the fewest are kept whose share first exceeds `mass` (all of them
    alike where the query attends to none), and their states are averaged without weights, in float32.
    query_mask, context_mask (b, t): nonzero = in; padding (`attention_mask`) is taken out of both. block: an index,
    or a name where the model has several lists of blocks; the forward pass ends after it. on_empty: a sample without
    query or context tokens raises ValueError, or gives NaN. Raises ValueError where the model's attention returns no
    weights.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass: in (0, 1], got {mass}")
    if on_empty not in ("error", "nan"):
        raise ValueError(f"on_empty: 'error' or 'nan', got {on_empty!r}")
    present = batch.get("attention_mask")
    query, context = (_tokens(name, mask, present) for name, mask in (("query", query_mask), ("context", context_mask)))
    empty = torch.nonzero(~(query.any(1) & context.any(1))).flatten().tolist()
    if empty and on_empty == "error":
        raise ValueError(f"sample {', '.join(map(str, empty))} of the batch has no query or no context tokens")
    attention, states = block_attention(model, batch, block)
    query, context = query.to(attention.device), context.to(attention.device)
    pooled = torch.full((len(states), states.shape[-1]), torch.nan, device=states.device)
    for index in set(range(len(states))) - set(empty):
        weights = attention[index].float().mean(0)[query[index]].mean(0)
        positions = torch.nonzero(context[index]).flatten()
        kept = positions[attended_tokens(weights[positions], mass)]
        pooled[index] = states[index, kept].float().mean(0)
    return pooled


def attended_tokens(weights: Float[Tensor, " n"], mass: float = 0.9) -> Int[Tensor, " k"]:
    """Indices, ascending, of the fewest largest weights whose share of the sum first exceeds `mass`; ties by position.

    Equal shares where all weights are 0; all indices where the mass is never exceeded.
    """
    wide = weights.double()
    total = wide.sum()
    shares = wide / total if total > 0 else torch.full_like(wide, 1 / len(wide))
    ordered, order = torch.sort(shares, descending=True, stable=True)
    count = min(len(wide), int((ordered.cumsum(0) <= mass).sum()) + 1)
    return order[:count].sort().values


def block_attention(
    model: nn.Module, batch: Mapping[str, Any], block: int | str = 0
) -> tuple[Float[Tensor, "b h t t"], Float[Tensor, "b t d"]]:
    """(attention weights of one block, states after it), of a forward pass that ends there; no gradients.

    They are the full pass's `attentions[block]` and `hidden_states[block + 1]` (of the last block, before any final
    normalisation). Raises ValueError where the block's attention returns no weights.
    """
    name, *more = layer_names(model, block)
    if more:
        raise ValueError(f"block: one block is needed, {block!r} matches {1 + len(more)}")
    weights: list[Tensor] = []
    with torch.no_grad(), evaluation(model), contextlib.ExitStack() as hooks:
        for module in model.get_submodule(name).modules():
            hooks.callback(module.register_forward_hook(_keep_weights(weights)).remove)
        states = hooks.enter_context(Capture(model, name)).run(batch).by_sample(name)
    if not weights:
        raise ValueError(
            f"model: the attention of {name!r} returns no weights; load the model with attn_implementation='eager'"
        )
    return weights[0], states


def _keep_weights(kept: list[Tensor]) -> Callable[..., None]:
    """A hook that keeps square (b, h, t, t) weights, which attention modules return beside their output."""

    def hook(_: nn.Module, args: object, output: object) -> None:
        if isinstance(output, tuple | list):
            tensors = [entry for entry in output[1:] if isinstance(entry, Tensor)]
            kept.extend(entry for entry in tensors if entry.ndim == 4 and entry.shape[-1] == entry.shape[-2])

    return hook


def _tokens(name: str, mask: Tensor, present: Tensor | None) -> Tensor:
    if mask.ndim != 2 or (present is not None and mask.shape != present.shape):
        shape = "(b, t)" if present is None else tuple(present.shape)
        raise ValueError(f"{name}_mask: shape {shape} is needed, got {tuple(mask.shape)}")
    selected = mask != 0
    return selected if present is None else selected & (present.to(selected.device) != 0)
