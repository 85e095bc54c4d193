"""The state of each text in every layer of a model: the mean over its tokens or the last one, of all or of a part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from subspan.base import Progress, silent

from .block_states import block_numbers, block_states, leading_text

TextPool = Literal["mean", "last"]
Span = tuple[int, int]
_SORTED_TOGETHER = 16
_NO_LIMIT = 10**6


class TokenisedText(NamedTuple):
    """Token numbers of a text with what stands in front, which of them are its own, and which of these count."""

    ids: list[int]
    own: list[bool]
    counts: list[bool]


@dataclass(frozen=True)
class TextTokens:
    """Texts in tokens, ready to be read; see `text_tokens`.

    Attributes
    ----------
    rows
        One a text that is read.
    kept
        Numbers of these texts.
    cut
        How many of them are longer than what is read.
    pad
        The token that fills up.
    """

    rows: tuple[TokenisedText, ...]
    kept: tuple[int, ...]
    cut: int
    pad: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True)
class TextStates:
    """States of n texts in some layers of a model; see `text_states`.

    Attributes
    ----------
    states
        (layers, n, d).
    words
        (n, d): the mean over all tokens of what goes into the first block, which knows words and not their order.
    layers
        0 what goes into the first block, i what the i-th gives.
    kept
        Numbers of the texts.
    cut
        How many of them were read in part.
    """

    states: Float[Tensor, "l n d"]
    words: Float[Tensor, "n d"]
    layers: tuple[int, ...]
    kept: tuple[int, ...]
    cut: int = 0


def text_tokens(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Span] | None = None, *, max_length: int = 256
) -> TextTokens:
    """Texts in tokens, the special ones told apart, and where there are spans the tokens that end in them.

    Padding, and the side on which the tokenizer puts it, play no part: each text is tokenised alone.

    Parameters
    ----------
    tokenizer
        Of transformers; a fast one where there are spans.
    texts
        Each of one token at least.
    spans
        Of each text the characters [start, stop) that count; None: all.
    max_length
        Tokens that are read of a text, special ones counted. A text whose span lies behind them is left out.

    Returns
    -------
    TextTokens

    Raises
    ------
    ValueError
        For a text or a span without a token, a tokenizer that does not say where its tokens are, and where no span is
        within reach.

    Examples
    --------
    >>> from subspan.models import text_tokens
    >>> class Letters:
    ...     all_special_ids, unk_token_id, pad_token_id, bos_token = [], None, None, None
    ...     def __call__(self, text, **options):
    ...         return {"input_ids": [ord(letter) for letter in text]}
    >>> found = text_tokens(Letters(), ["ab"])
    >>> found.rows[0].ids, found.rows[0].own
    ([10, 97, 98], [False, True, True])
    """
    if spans is not None and not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer: does not say where its tokens are in the text (a fast one does), as spans need")
    head = leading_text(tokenizer)
    front = list(tokenizer(head, add_special_tokens=False)["input_ids"]) if head else []
    special = _special(tokenizer)
    rows: list[TokenisedText] = []
    kept: list[int] = []
    cut = 0
    for number, text in enumerate(texts):
        options: dict[str, Any] = {"verbose": False}
        if spans is not None:
            options["return_offsets_mapping"] = True
        encoded = tokenizer(text, **options)
        longer = len(front) + len(encoded["input_ids"]) > max_length
        if longer:
            encoded = tokenizer(text, **options, truncation=True, max_length=max_length - len(front))
        ids = list(encoded["input_ids"])
        own = [token not in special for token in ids]
        counts = own
        if spans is not None:
            start, stop = spans[number]
            ends = [end if end > begin else 0 for begin, end in encoded["offset_mapping"]]
            counts = [mine and start < end <= stop for mine, end in zip(own, ends)]
            if longer and (stop > max(ends, default=0) or not any(counts)):
                continue
        if not any(counts):
            what = "its span" if spans is not None and any(own) else "it"
            raise ValueError(f"texts: text {number} cannot be read: {what} has no token")
        blank = [False] * len(front)
        rows.append(TokenisedText([*front, *ids], [*blank, *own], [*blank, *counts]))
        kept.append(number)
        cut += longer
    if not rows:
        raise ValueError(f"texts: none has its span within the {max_length} tokens that are read")
    return TextTokens(tuple(rows), tuple(kept), cut, tokenizer.pad_token_id or 0)


def text_states(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int] | None = None,
    *,
    spans: Sequence[Span] | None = None,
    pool: TextPool = "mean",
    max_length: int = 256,
    batch_size: int = 16,
    progress: Progress = silent,
) -> TextStates:
    """The state of every text in all layers that are asked for, in one pass over the texts.

    Special tokens do not count. A tokenizer that begins a text with none gets its start-of-text token in front (or a
    line break), which does not count either: the first position of a causal model holds a state of another size.

    Parameters
    ----------
    model
        Of transformers, with one list of blocks (see `find_blocks`).
    tokenizer, texts, spans
        As of `text_tokens`.
    layers
        0 is what goes into the first block, i what the i-th block gives (before a final norm), negative ones count
        from the end. Default: all.
    pool
        Over the tokens that count: "mean", or "last".
    max_length
        Tokens that are read of a text, at most as many as the model takes (`context_length`).
    batch_size
        Texts that are read at a time.
    progress
        Is told the share that is done.

    Returns
    -------
    TextStates, float32.

    Raises
    ------
    ValueError
        As `text_tokens`, for a layer out of range, and states that are not finite.

    Examples
    --------
    >>> from subspan.datasets import load_sentence_encoder
    >>> from subspan.models import text_states
    >>> text_states(*load_sentence_encoder(), ["A cat sat."], [0, 6]).states.shape  # doctest: +SKIP
    torch.Size([2, 1, 384])
    """
    length = min(max_length, context_length(model, tokenizer))
    tokens = text_tokens(tokenizer, texts, spans, max_length=length)
    numbers = block_numbers(model, layers)
    blocks, done = [], 0
    for block in iterate_text_states(model, tokens, numbers, pool=pool, batch_size=batch_size):
        blocks.append(block)
        done += len(block)
        progress("reading states", done / len(tokens))
    return stacked_states(torch.cat(blocks), tokens, numbers)


def iterate_text_states(
    model: nn.Module,
    tokens: TextTokens,
    numbers: Sequence[int],
    *,
    pool: TextPool = "mean",
    batch_size: int = 16,
    start: int = 0,
) -> Iterator[Float[Tensor, "b s d"]]:
    """Blocks of texts in their order from one on: of each its words' mean, then its state in each of the layers."""
    if pool not in ("mean", "last"):
        raise ValueError(f"pool: 'mean' or 'last', got {pool!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: at least 1, got {batch_size}")
    whole = batch_size * _SORTED_TOGETHER
    for first in range(start, len(tokens), whole):
        # Texts of like length share a batch, so that little is spent on padding.
        places = list(range(first, min(first + whole, len(tokens))))
        order = sorted(places, key=lambda place: len(tokens.rows[place].ids))
        found: dict[int, Tensor] = {}
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            states = _read(model, [tokens.rows[place] for place in chosen], numbers, pool, tokens.pad)
            for place, own in zip(chosen, states.unbind(1)):
                if not bool(own.isfinite().all()):
                    raise ValueError(f"model: its states for text {tokens.kept[place]} are not finite")
                found[place] = own
        yield torch.stack([found[place] for place in places])


def stacked_states(rows: Float[Tensor, "n s d"], tokens: TextTokens, numbers: Sequence[int]) -> TextStates:
    """What `iterate_text_states` gave, layer by layer."""
    return TextStates(rows[:, 1:].transpose(0, 1).contiguous(), rows[:, 0], tuple(numbers), tokens.kept, tokens.cut)


def context_length(model: Any, tokenizer: Any) -> int:
    """Tokens that a model takes, as far as it or its tokenizer says."""
    config = getattr(model, "config", None)
    said = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits = [*said, getattr(tokenizer, "model_max_length", None)]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=_NO_LIMIT)


def _special(tokenizer: Any) -> set[int]:
    """Tokens that are no part of a text; what stands for an unknown word is one, where it is not used otherwise."""
    names = ("bos", "eos", "cls", "sep", "pad", "mask")
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in names}
    return set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - used)


def _read(
    model: nn.Module, rows: Sequence[TokenisedText], numbers: Sequence[int], pool: TextPool, pad: int
) -> Float[Tensor, "s b d"]:
    """Of a batch the words' mean, then the states layer by layer. Padding is on the right, where no token sees it."""
    length = max(len(row.ids) for row in rows)

    def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*own, *[fill] * (length - len(own))] for own in values])

    own, counts = (padded([getattr(row, name) for row in rows], 0) > 0 for name in ("own", "counts"))
    batch = {
        "input_ids": padded([row.ids for row in rows], pad),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
    }

    def pooled(states: Tensor) -> Tensor:
        # The words' mean is read with every layer, as which of them comes first is not known here.
        return torch.stack([_pooled(states, own, "mean"), _pooled(states, counts, pool)])

    # The layer before all others is read even where it is not asked for.
    wanted = list(dict.fromkeys([0, *numbers]))
    found = block_states(model, batch, wanted, pooled)
    return torch.stack([found[0, 0], *(found[wanted.index(number), 1] for number in numbers)])


def _pooled(states: Float[Tensor, "b t d"], selected: Bool[Tensor, "b t"], pool: TextPool) -> Float[Tensor, "b d"]:
    chosen = selected.to(states.device)
    wide = states.to(torch.float32)
    if pool == "last":
        last = (chosen * torch.arange(1, chosen.shape[1] + 1, device=states.device)).argmax(1)
        return wide[torch.arange(len(wide), device=states.device), last]
    return torch.einsum("btd,bt->bd", wide, chosen.float()) / chosen.sum(1, keepdim=True)
