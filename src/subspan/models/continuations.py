"""What causal language models say after prompts: how likely given texts are, and what they say greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base.modules import evaluation

from .capture import to_device_of
from .tokens import SegmentTokens


def continuation_log_likelihood(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    continuations: Sequence[str],
    *,
    per: Literal["token", "text"] = "token",
    batch_size: int = 8,
    add_special_tokens: bool = True,
) -> Float[Tensor, " n"]:
    """Log-likelihood (nats) of a text after its prompt; with its sign turned it is the loss of supervised tuning.

    Parameters
    ----------
    model
        A causal model of transformers, or one that takes input_ids and attention_mask and gives logits (b, t, v), as
        they are or as `.logits`.
    tokenizer
        A fast one.
    prompts, continuations
        (n,) texts; put together as they are, so that a space between them belongs to one of them.
    per
        "token": the mean over the continuation's tokens; "text": their sum.
    batch_size
        Texts a pass.
    add_special_tokens
        False for prompts that come from a chat template.

    Returns
    -------
    Tensor (n,), on the CPU.

    Raises
    ------
    ValueError
        For unequal numbers, none, and a continuation without a token of its own.

    Examples
    --------
    >>> prompts, texts = ["The capital of France is"] * 2, [" Paris.", " Rome."]
    >>> likelihood = continuation_log_likelihood(model, tokenizer, prompts, texts)  # doctest: +SKIP
    """
    if len(prompts) != len(continuations) or not len(prompts):
        raise ValueError(f"continuations: one a prompt is needed, got {len(continuations)} for {len(prompts)} prompts")
    if per not in ("token", "text"):
        raise ValueError(f"per: 'token' or 'text', got {per!r}")
    pieces = [[(prompt, "prompt"), (text, "continuation")] for prompt, text in zip(prompts, continuations)]
    found = []
    for start in range(0, len(pieces), batch_size):
        tokens = SegmentTokens.from_segments(
            tokenizer,
            pieces[start : start + batch_size],
            add_special_tokens=add_special_tokens,
            padding_side="right",
        )
        tokens.last("continuation")  # says which text has no token
        with torch.no_grad(), evaluation(model):
            found.append(target_log_likelihood(model, tokens.batch, tokens.mask("continuation"), per=per).cpu())
    return torch.cat(found)


def target_log_likelihood(
    model: nn.Module, batch: dict[str, Tensor], targets: Tensor, *, per: Literal["token", "text"] = "token"
) -> Float[Tensor, " b"]:
    """The same of one batch in tokens, with gradients: of those where `targets` (b, t) is true."""
    batch = to_device_of(model, batch)
    given = model(**batch)
    logits = getattr(given, "logits", given)
    wanted = targets[:, 1:].to(logits.device)
    # Only where something is wanted: a vocabulary is wide.
    rows, ids = logits[:, :-1][wanted].float(), batch["input_ids"][:, 1:][wanted]
    likelihood = -torch.nn.functional.cross_entropy(rows, ids, reduction="none")
    owner = torch.nonzero(wanted)[:, 0]
    total = likelihood.new_zeros(len(wanted)).index_add(0, owner, likelihood)
    return total if per == "text" else total / wanted.sum(1).clamp_min(1)


def greedy_continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    add_special_tokens: bool = True,
) -> Iterator[str]:
    """What the model says after each prompt, one most likely token after the other, a batch at a time.

    Parameters
    ----------
    model
        A causal model of transformers.
    tokenizer
        Its tokenizer; prompts are padded at the left whatever its setting.
    prompts
        Texts.
    max_new_tokens
        Where a text ends that has not ended itself.
    batch_size
        Prompts a pass.
    add_special_tokens
        False for prompts that come from a chat template.

    Yields
    ------
    str, without the prompt and special tokens.

    Examples
    --------
    >>> next(greedy_continuations(model, tokenizer, ["The capital of France is"]))  # doctest: +SKIP
    ' Paris.'
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        tokens = SegmentTokens.from_segments(
            tokenizer, [[(prompt, "prompt")] for prompt in part], add_special_tokens=add_special_tokens
        )
        with torch.no_grad(), evaluation(model):
            said = model.generate(
                **to_device_of(model, tokens.batch),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        yield from tokenizer.batch_decode(said[:, tokens.input_ids.shape[1] :], skip_special_tokens=True)
