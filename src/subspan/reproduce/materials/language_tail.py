"""The last blocks of a causal language model on states of the frozen ones below, which are computed once a text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.models import SegmentTokens, find_blocks


class Kept(NamedTuple):
    """A text: states (t, d) below the last blocks of all its tokens but the last, and its last tokens (n,), to say."""

    states: Float[Tensor, "t d"]
    targets: Int[Tensor, " n"]


class Texts(NamedTuple):
    """Texts as one batch, padded at the right; for each of all targets its row, the place before it, and its id."""

    states: Float[Tensor, "b t d"]
    rows: Int[Tensor, " n"]
    places: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]

    @classmethod
    def of(cls, kept: Sequence[Kept]) -> Texts:
        """One batch of some texts."""
        counts = torch.tensor([len(text.targets) for text in kept])
        places = [torch.arange(len(text.states) - len(text.targets), len(text.states)) for text in kept]
        return cls(
            nn.utils.rnn.pad_sequence([text.states for text in kept], batch_first=True),
            torch.repeat_interleave(torch.arange(len(kept)), counts),
            torch.cat(places),
            torch.cat([text.targets for text in kept]),
        )


class LanguageTail(nn.Module):
    """Log-likelihoods of targets by the last blocks, the last norm and the head of a model of transformers.

    Called with `Texts` (b texts) it gives (b,), nats a token. Only the blocks are free; they are the model's own, so
    that the whole model changes with them. What lies below must stay as it is.
    """

    def __init__(self, model: Any, blocks: int) -> None:
        super().__init__()
        place, _, name = find_blocks(model).rpartition(".")
        whole = model.requires_grad_(False).get_submodule(place)
        layers = list(whole.get_submodule(name))[-blocks:]
        # The same module with fewer blocks and without embeddings: its own code makes positions and masks.
        body = copy.copy(whole)
        body._modules = {"layers": nn.ModuleList(layers).requires_grad_(True)} | {
            own: part for own, part in whole.named_children() if own != name and not isinstance(part, nn.Embedding)
        }
        body.config = copy.copy(whole.config)
        body.config.num_hidden_layers = blocks
        self.body, self.head = body, model.get_output_embeddings()
        # Not a part of this module: its weights are not this one's.
        self._whole, self._blocks = [whole], blocks

    @torch.no_grad()
    def keep(self, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, most: int, size: int = 16) -> list[Kept]:
        """States of (prompt, answer), `size` a pass; of an answer the first tokens, at `most`, are the targets."""
        found: list[Kept] = []
        for start in range(0, len(pairs), size):
            pieces = [[(prompt, "prompt"), (answer, "answer")] for prompt, answer in pairs[start : start + size]]
            tokens = SegmentTokens.from_segments(tokenizer, pieces, add_special_tokens=False, padding_side="right")
            below = self._whole[0](**tokens.batch, output_hidden_states=True).hidden_states[-1 - self._blocks]
            for row, mask in enumerate(tokens.mask("answer")):
                places = torch.nonzero(mask).flatten()[:most]
                found.append(Kept(below[row, : places[-1]].clone(), tokens.input_ids[row, places]))
        return found

    def forward(self, texts: Texts) -> Float[Tensor, " b"]:
        """Mean log-likelihood of the targets of each text."""
        states = self.body(inputs_embeds=texts.states, use_cache=False).last_hidden_state
        logits = self.head(states[texts.rows, texts.places])
        likelihood = -F.cross_entropy(logits, texts.targets, reduction="none")
        sums = likelihood.new_zeros(len(texts.states)).index_add(0, texts.rows, likelihood)
        return sums / torch.bincount(texts.rows, minlength=len(sums))
