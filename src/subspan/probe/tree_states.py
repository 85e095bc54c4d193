"""The states of every token of every tree in some layers of a model, kept as one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subspan.base import Progress, silent
from subspan.models import SegmentTokens
from subspan.models.block_states import block_numbers, block_states, leading_text

from .syntax_trees import SyntaxTree


@dataclass(frozen=True)
class TokenStates:
    """States of the tokens of n snippets in some layers of a model.

    Parameters
    ----------
    states
        (layers, tokens of all snippets, d).
    lengths
        (n,) tokens of each snippet.
    layers
        Their numbers: 0 what goes into the first block, i what the i-th gives.
    kept
        Numbers of the snippets, among those that were given.

    Raises
    ------
    ValueError
        For lengths that do not add up.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import TokenStates
    >>> states = TokenStates(torch.zeros(2, 5, 3), torch.tensor([2, 3]), (0, 4), (0, 1))
    >>> len(states), states[1].shape, states.layer(4).states.shape
    (2, torch.Size([2, 3, 3]), torch.Size([1, 5, 3]))
    """

    states: Float[Tensor, "l m d"]
    lengths: Int[Tensor, " n"]
    layers: tuple[int, ...]
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.states.ndim != 3 or int(self.lengths.sum()) != self.states.shape[1] or int(self.lengths.min()) < 1:
            raise ValueError(
                f"lengths: {int(self.lengths.sum())} tokens in all, for states of shape {tuple(self.states.shape)}"
            )
        if len(self.layers) != len(self.states) or len(self.kept) != len(self.lengths):
            raise ValueError("layers, kept: one number for each layer and each snippet is needed")

    def __len__(self) -> int:
        """Number of snippets."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> Float[Tensor, "l t d"]:
        """The states of one snippet in all layers."""
        stop = int(self.lengths[: index + 1].sum()) if index >= 0 else None
        if stop is None or index >= len(self):
            raise IndexError(f"index: from 0 to {len(self) - 1}, got {index}")
        return self.states[:, stop - int(self.lengths[index]) : stop]

    def __iter__(self) -> Iterator[Float[Tensor, "l t d"]]:
        return iter(self.states.split(self.lengths.tolist(), 1))

    def layer(self, *numbers: int) -> TokenStates:
        """Of some of the layers alone. Raises ValueError for one that there is not."""
        if unknown := [number for number in numbers if number not in self.layers]:
            raise ValueError(f"layer: of {', '.join(map(str, self.layers))}, got {', '.join(map(str, unknown))}")
        places = [self.layers.index(number) for number in numbers]
        return TokenStates(self.states[places], self.lengths, tuple(numbers), self.kept)

    def part(self, start: int, stop: int) -> TokenStates:
        """The snippets [start, stop)."""
        before = int(self.lengths[:start].sum())
        own = self.lengths[start:stop]
        states = self.states[:, before : before + int(own.sum())]
        return TokenStates(states, own, self.layers, self.kept[start:stop])


def token_states(
    model: nn.Module,
    tokenizer: Any,
    trees: Sequence[SyntaxTree],
    layers: Sequence[int] | None = None,
    *,
    max_tokens: int = 512,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float16,
    progress: Progress = silent,
) -> TokenStates:
    """The mean state of the sub-tokens of every token, in one pass over the trees for all layers.

    Tokens are parted by single spaces, so that none shares a sub-token with its neighbour. A tokenizer that begins a
    text with no special token gets its start-of-text token in front (or a line break): the first position of a causal
    model holds a state of another size. Neither it nor the spaces count.

    Parameters
    ----------
    model
        Of transformers, with one list of blocks (see `find_blocks`).
    tokenizer
        A fast one.
    trees
        Whose tokens are read.
    layers
        0 is what goes into the first block, i what the i-th block gives (before a final norm), negative ones count
        from the end. Default: all.
    max_tokens
        Trees of more sub-tokens, special ones counted, are left out; and those of which a token has no sub-token.
    batch_size
        Trees that are read at a time.
    dtype
        Of the states that are kept.
    progress
        Is told the share that is done.

    Returns
    -------
    TokenStates

    Raises
    ------
    ValueError
        For a layer out of range, a tokenizer that does not say where its tokens are, states that are not finite, and
        where no tree is left.

    Examples
    --------
    >>> from subspan.datasets import load_language_model
    >>> from subspan.probe import code_trees, token_states
    >>> trees = code_trees(["x = f(1)"], parser="ast").trees  # doctest: +SKIP
    >>> token_states(*load_language_model(), trees, [0, 12]).states.shape  # doctest: +SKIP
    torch.Size([2, 6, 576])
    """
    numbers = block_numbers(model, layers)
    # What stands in front is no token of the tree.
    head = [(text, "start") for text in [leading_text(tokenizer)] if text]
    prompts = [[*head, *_pieces(tree)] for tree in trees]
    counted = [(number, _length(tokenizer, prompt, max_tokens)) for number, prompt in enumerate(prompts)]
    kept = [(number, length) for number, length in counted if length is not None]
    if not kept:
        raise ValueError(f"trees: none of {len(trees)} has at most {max_tokens} sub-tokens, one or more a token")
    # Trees of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(kept)), key=lambda place: kept[place][1])
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        progress("reading states", start / len(order))
        places = order[start : start + batch_size]
        own = [prompts[kept[place][0]] for place in places]
        tokens = SegmentTokens.from_segments(tokenizer, own, padding_side="right")
        rows = block_states(model, tokens.batch, numbers, partial(tokens.pool, role="token"))
        sizes = [len(trees[kept[place][0]]) for place in places]
        for place, states in zip(places, rows.split(sizes, 1)):
            if not bool(states.isfinite().all()):
                raise ValueError(f"model: its states for tree {kept[place][0]} are not finite")
            found[place] = states.to(dtype)
            if not bool(found[place].isfinite().all()):
                raise ValueError(f"dtype: {dtype} does not hold tree {kept[place][0]}; take torch.float32")
    lengths = torch.tensor([len(trees[number]) for number, _ in kept])
    states = torch.cat([found[place] for place in range(len(kept))], 1)
    return TokenStates(states, lengths, tuple(numbers), tuple(number for number, _ in kept))


def _pieces(tree: SyntaxTree) -> list[tuple[str, str]]:
    return [(tree.tokens[0], "token"), *(piece for t in tree.tokens[1:] for piece in ((" ", "space"), (t, "token")))]


def _length(tokenizer: Any, prompt: list[tuple[str, str]], most: int) -> int | None:
    """Sub-tokens of a prompt; None where they are too many, or one of its tokens has none."""
    tokens = SegmentTokens.from_segments(tokenizer, [prompt])
    length = tokens.input_ids.shape[1]
    seen = set(tokens.segment[0].tolist())
    whole = all(number in seen for number, (_, role) in enumerate(prompt) if role == "token")
    return length if whole and length <= most else None
