"""What a language model predicts at a few positions: its output layer never sees the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn


@contextlib.contextmanager
def output_rows(model: nn.Module, positions: Int[Tensor, "b q"]) -> Iterator[nn.Module]:
    """Within the block the output layer gets some positions alone, so that logits are (b, q, v); all else is the same.

    A vocabulary is wide: for short prompts the output layer can cost as much as all blocks together.

    Parameters
    ----------
    model
        A language model of transformers.
    positions
        (b, q), of the batch that the model is then called on.

    Yields
    ------
    The model.

    Raises
    ------
    ValueError
        For a model without an output layer, and in the forward pass for a batch of another size or positions outside.

    Examples
    --------
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from subspan.models import output_rows
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> with torch.no_grad(), output_rows(model, torch.tensor([[2], [1]])):
    ...     model(input_ids=ids).logits.shape
    torch.Size([2, 1, 9])
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise ValueError(f"model: a language model with an output layer is needed, got {type(model).__name__}")

    def chosen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = args[0]
        at = positions.to(states.device)
        if len(at) != len(states) or int(at.min()) < 0 or int(at.max()) >= states.shape[1]:
            raise ValueError(f"positions: ({len(states)}, q) in [0, {states.shape[1]}) are needed")
        return states.gather(1, at[:, :, None].expand(-1, -1, states.shape[2])), *args[1:]

    handle = head.register_forward_pre_hook(chosen)
    try:
        yield model
    finally:
        handle.remove()
