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

    Stage 1 of ScalSelect: the block's attention is averaged over heads and over the query tokens and normalised over
    the context tokens. Of these the fewest are kept whose share first exceeds `mass` (all of them alike where the query
    attends to none), and their states are averaged without weights, in float32. The forward pass ends after the block.

    Parameters
    ----------
    model
        One whose attention returns its weights: of transformers, loaded with attn_implementation="eager".
    batch
        What the model takes as keywords.
    query_mask, context_mask
        (b, t), nonzero = in; padding (`attention_mask` of the batch) is taken out of both.
    mass
        Share of the attention, in (0, 1].
    block
        An index, or a name where the model has several lists of blocks.
    on_empty
        A sample without query or context tokens raises ValueError ("error") or gives NaN ("nan").

    Returns
    -------
    Tensor, (b, d)

    Raises
    ------
    ValueError
        For empty samples, masks of another shape, and attention that returns no weights.

    References
    ----------
    Wu et al. (2026), ScalSelect.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import attended_representation
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    ...     def forward(self, x):
    ...         return x + self.attention(x, x, x, average_attn_weights=False)[0]
    >>> query = torch.tensor([[0, 0, 0, 1]] * 2)
    >>> batch = {"input": torch.randn(2, 4, 8)}
    >>> attended_representation(torch.nn.Sequential(Block()), batch, query, 1 - query).shape
    torch.Size([2, 8])
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
    """Indices of the fewest largest weights whose share of the sum first exceeds `mass`; ties by position.

    Parameters
    ----------
    weights
        (n,), none negative; where all are 0 their shares are equal.
    mass
        Share of the sum; all indices where it is never exceeded.

    Returns
    -------
    Tensor of integers, (k,), ascending.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import attended_tokens
    >>> attended_tokens(torch.tensor([0.1, 0.6, 0.3]), mass=0.8)
    tensor([1, 2])
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
    """Attention weights of one block and the states after it, of a forward pass that ends there; no gradients.

    They are the full pass's `attentions[block]` and `hidden_states[block + 1]` (of the last block, before any final
    normalisation).

    Parameters
    ----------
    model
        One whose attention returns its weights: of transformers, loaded with attn_implementation="eager".
    batch
        What the model takes as keywords.
    block
        An index, or a name where the model has several lists of blocks.

    Returns
    -------
    (weights, states)
        (b, heads, t, t) and (b, t, d).

    Raises
    ------
    ValueError
        Where the block's attention returns no weights, or `block` is more than one.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import block_attention
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    ...     def forward(self, x):
    ...         return x + self.attention(x, x, x, average_attn_weights=False)[0]
    >>> weights, states = block_attention(torch.nn.Sequential(Block(), Block()), {"input": torch.randn(3, 5, 8)})
    >>> weights.shape, states.shape
    (torch.Size([3, 2, 5, 5]), torch.Size([3, 5, 8]))
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
