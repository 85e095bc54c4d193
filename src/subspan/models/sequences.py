"""Running text as sequences of one length, and how well a causal language model predicts them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from subspan.base.modules import evaluation

from .continuations import target_log_likelihood

_APART = "\n\n"


def token_sequences(
    tokenizer: Any, texts: Iterable[str], *, length: int, count: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Texts one after the other, cut into sequences of so many tokens, one a batch; what is left at the end is not.

    Parameters
    ----------
    tokenizer
        Of transformers; no special tokens are added.
    texts
        Read as far as it is needed; an empty line is put between two.
    length
        Tokens of a sequence.
    count
        Sequences at most.

    Yields
    ------
    dict with input_ids (1, length)

    Examples
    --------
    >>> from subspan.models import token_sequences
    >>> letters = lambda text, add_special_tokens: {"input_ids": [ord(letter) for letter in text]}
    >>> [batch["input_ids"].tolist() for batch in token_sequences(letters, ["ab", "c"], length=3)]
    [[[97, 98, 10]], [[10, 99, 10]]]
    """

    def every() -> Iterator[dict[str, Tensor]]:
        left: list[int] = []
        for text in texts:
            left += tokenizer(text + _APART, add_special_tokens=False)["input_ids"]
            whole = len(left) // length * length
            yield from (
                {"input_ids": torch.tensor([left[start : start + length]])} for start in range(0, whole, length)
            )
            left = left[whole:]

    return islice(every(), count)


@torch.no_grad()
def text_perplexity(model: nn.Module, sequences: Iterable[Mapping[str, Tensor]]) -> float:
    """Perplexity a token of a causal language model, over all tokens of the sequences but their first.

    Parameters
    ----------
    model
        Of transformers, or one that takes input_ids and gives logits (b, t, v), as they are or as `.logits`.
    sequences
        Batches with input_ids (b, t), without padding, such as `token_sequences` gives.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        Where there is no sequence of two tokens.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import text_perplexity
    >>> class Even(torch.nn.Module):
    ...     def forward(self, input_ids):
    ...         return torch.zeros(*input_ids.shape, 5)
    >>> round(text_perplexity(Even(), [{"input_ids": torch.tensor([[1, 2, 3]])}]), 4)
    5.0
    """
    total, count = 0.0, 0
    with evaluation(model):
        for batch in sequences:
            ids = batch["input_ids"]
            every = torch.ones_like(ids, dtype=torch.bool)
            total += float(target_log_likelihood(model, {"input_ids": ids}, every, per="text").sum())
            count += len(ids) * (ids.shape[1] - 1)
    if not count:
        raise ValueError("sequences: one of at least two tokens is needed")
    return math.exp(-total / count)
