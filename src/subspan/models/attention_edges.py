"""Attention of a language model, seen row by row and cut edge by edge, without a change of its code."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from subspan.base.modules import evaluation

from .capture import call_model, to_device_of
from .layers import Layers, find_blocks, layer_names


def attention_modules(model: nn.Module, blocks: Layers | None = None) -> dict[str, nn.Module]:
    """The attention inside each block of a transformers model.

    Parameters
    ----------
    model
        Of transformers: its attention modules have `is_causal`.
    blocks
        As in `layer_names`; None: every block.

    Returns
    -------
    dict of block names to modules.

    Raises
    ------
    ValueError
        Where a block has no attention, or several.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import attention_modules
    >>> class Attention(torch.nn.Module):
    ...     is_causal = True
    >>> attention_modules(torch.nn.Sequential(Attention(), Attention()), -1)
    {'1': Attention()}
    """
    names = layer_names(model, f"{find_blocks(model)}.*".lstrip(".") if blocks is None else blocks)
    found: dict[str, nn.Module] = {}
    for name in names:
        inside = [part for part in model.get_submodule(name).modules() if hasattr(part, "is_causal")]
        if len(inside) != 1:
            raise ValueError(f"blocks: one attention of transformers is needed inside {name!r}, found {len(inside)}")
        found[name] = inside[0]
    return found


def attention_rows(
    model: nn.Module, batch: Mapping[str, Any], queries: Int[Tensor, "b q"], blocks: Layers | None = None
) -> dict[str, Float[Tensor, "b h q t"]]:
    """Attention weights of some query positions, by the name of the block; no gradients.

    Parameters
    ----------
    model
        Of transformers. Loaded with "sdpa", its own default, no (t, t) weights are made at all: rows are computed from
        queries and keys as the block has them, rotated and with all its masks. With "eager" each block's weights are
        made, and dropped but for the rows.
    batch
        What the model is called with.
    queries
        Positions (b, q) in [0, t); rows of padding mean nothing.
    blocks
        As in `layer_names`; default every block.

    Returns
    -------
    Mapping to (b, heads, q, t) in float32: what was attended to, summing to 1.

    Raises
    ------
    ValueError
        For positions outside, another number of samples, and where attention is computed in another way.

    Examples
    --------
    Rows of the last block for the last token of each text:

    >>> from subspan.datasets import load_language_model
    >>> from subspan.models import attention_rows
    >>> model, tokenizer = load_language_model("smollm2")  # doctest: +SKIP
    >>> batch = tokenizer(["A short text.", "Another text."], return_tensors="pt")  # doctest: +SKIP
    >>> rows = attention_rows(model, batch, batch["attention_mask"].sum(1, keepdim=True) - 1, [-1])  # doctest: +SKIP
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = {id(part): name for name, part in attention_modules(model, blocks).items()}
    rows: dict[str, Tensor] = {}
    length = batch["input_ids"].shape[1]
    if len(queries) != len(batch["input_ids"]) or int(queries.min()) < 0 or int(queries.max()) >= length:
        raise ValueError(f"queries: positions ({len(batch['input_ids'])}, q) in [0, {length}) are needed")
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if id(module) in names:
            rows[names[id(module)]] = _rows(module, query, key, mask, queries.to(query.device), options)
        return sdpa(module, query, key, value, mask, **options)

    def kept(module: nn.Module, _: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4:
            index = queries.to(weights.device)[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])
            rows[names[id(module)]] = weights.gather(2, index).float()

    with torch.no_grad(), evaluation(model), contextlib.ExitStack() as stack:
        for part in attention_modules(model, blocks).values():
            stack.callback(part.register_forward_hook(kept).remove)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = watched
        stack.callback(ALL_ATTENTION_FUNCTIONS.__setitem__, "sdpa", sdpa)
        call_model(model, to_device_of(model, dict(batch)))
    missing = [name for name in names.values() if name not in rows]
    if missing:
        wanted = "load it with attn_implementation 'sdpa' or 'eager'"
        raise ValueError(f"model: the attention of {missing[0]!r} gives no weights; {wanted}")
    return {name: rows[name] for name in names.values()}


def _rows(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, at: Tensor, options: dict[str, Any]
) -> Float[Tensor, "b h q t"]:
    if options.get("position_bias") is not None:
        raise ValueError("model: has a position bias; load it with attn_implementation='eager'")
    heads, width = query.shape[1], query.shape[3]
    asked = query.gather(2, at[:, None, :, None].expand(-1, heads, -1, width)).float()
    keys = key.repeat_interleave(heads // key.shape[1], 1).float()
    scores = asked @ keys.mT * (options.get("scaling") or width**-0.5)
    if mask is not None:
        # One mask may be for all samples or heads.
        shape = (len(at), mask.shape[1], -1, -1)
        chosen = mask.expand(*shape).gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        chosen = chosen[..., : keys.shape[2]]
        scores = scores.masked_fill(~chosen, -torch.inf) if chosen.dtype == torch.bool else scores + chosen
    elif options.get("is_causal") is not False and module.is_causal:
        later = torch.arange(keys.shape[2], device=at.device) > at[:, None, :, None]
        scores = scores.masked_fill(later, -torch.inf)
    return torch.softmax(scores, -1)


@contextlib.contextmanager
def cut_attention(
    model: nn.Module,
    edges: Bool[Tensor, "b t t"],
    blocks: Layers | None = None,
    *,
    heads: Sequence[int] | None = None,
    keep_self: bool = True,
) -> Iterator[nn.Module]:
    """Within the block of code no query looks along the edges that are cut; the model is as before after it.

    Parameters
    ----------
    model
        Of transformers, with attention "sdpa" or "eager"; called on whole sequences of the batch that edges are for.
    edges
        (b, query, key): true = cut. See `edges_between`.
    blocks
        As in `layer_names`; default every block. No blocks (an empty list) change nothing.
    heads
        Heads that the edges are cut in; default all.
    keep_self
        Leave what a token sees of itself. A row without any key left attends to all alike.

    Yields
    ------
    The model.

    Raises
    ------
    ValueError
        For edges of another shape than the batch, and heads that there are not.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import cut_attention, edges_between
    >>> class Attention(torch.nn.Module):
    ...     is_causal = True
    ...     def forward(self, hidden_states, attention_mask=None):
    ...         qkv = [hidden_states[:, None]] * 3
    ...         return torch.nn.functional.scaled_dot_product_attention(*qkv, attention_mask)[:, 0]
    >>> first, last = torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])
    >>> with cut_attention(torch.nn.Sequential(Attention()), edges_between(last, first)) as model:
    ...     states = model(torch.eye(3)[None])
    >>> states[0, 2] > 0  # what the last token has of each of the three
    tensor([False,  True,  True])
    """
    chosen = {} if isinstance(blocks, list | tuple) and not blocks else attention_modules(model, blocks)
    config: Any = getattr(model, "config", None)
    number = int(getattr(config, "num_attention_heads", 0)) if heads is not None else 1
    if heads is not None and not all(0 <= head < number for head in heads):
        raise ValueError(f"heads: must lie in [0, {number - 1}], got {list(heads)}")
    if keep_self:
        edges = edges & ~torch.eye(edges.shape[1], dtype=torch.bool, device=edges.device)
    in_head = torch.zeros(number, dtype=torch.bool)
    in_head[slice(None) if heads is None else list(heads)] = True
    cut = edges[:, None] & in_head[:, None, None].to(edges.device)
    with contextlib.ExitStack() as hooks:
        for part in chosen.values():
            hooks.callback(part.register_forward_pre_hook(_cutting(cut), with_kwargs=True).remove)
        yield model


def _cutting(cut: Bool[Tensor, "b h t t"]) -> Callable[..., tuple[Any, Any]]:
    """A forward pre-hook that takes edges out of the mask that an attention module is given."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        states = given.arguments["hidden_states"]
        shape = (states.shape[0], states.shape[1])
        if (cut.shape[0], cut.shape[2]) != shape:
            raise ValueError(
                f"edges: {(shape[0], shape[1], shape[1])} are needed here, got {(len(cut), *cut.shape[2:])}"
            )
        mask = given.arguments.get("attention_mask")
        if mask is None:
            mask = torch.ones(1, 1, shape[1], shape[1], dtype=torch.bool, device=states.device)
            mask = mask.tril() if module.is_causal else mask
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=states.dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(states.dtype).min
            )
        given.arguments["attention_mask"] = mask.masked_fill(cut.to(mask.device), torch.finfo(mask.dtype).min)
        return given.args, given.kwargs

    return hook


def edges_between(queries: Bool[Tensor, "b t"], keys: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t t"]:
    """The edges from every token of some to every earlier token (or itself) of others.

    Parameters
    ----------
    queries, keys
        True for the tokens that look and for those looked at, (b, t).

    Returns
    -------
    Boolean tensor, (b, query, key), for `cut_attention`.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import edges_between
    >>> edges_between(torch.tensor([[False, True, True]]), torch.tensor([[True, True, False]])).int()
    tensor([[[0, 0, 0],
             [1, 1, 0],
             [1, 1, 0]]], dtype=torch.int32)
    """
    return (queries[:, :, None] & keys[:, None, :]).tril()
