"""The last blocks of a causal language model on states of the frozen ones below, which are computed once a text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.models import Capture, SegmentTokens, find_blocks


class Kept(NamedTuple):
    """A text up to the last token that is wanted: states (t, d) below the tail, tokens (t,), which are wanted (t,)."""

    states: Float[Tensor, "t d"]
    ids: Int[Tensor, " t"]
    wanted: Bool[Tensor, " t"]


class Texts(NamedTuple):
    """Texts as one batch, padded at the right, with the mask (b, t) of their tokens."""

    states: Float[Tensor, "b t d"]
    ids: Int[Tensor, "b t"]
    wanted: Bool[Tensor, "b t"]
    attention: Int[Tensor, "b t"]

    @classmethod
    def of(cls, kept: Sequence[Kept]) -> Texts:
        """One batch of some texts."""
        present = [torch.ones_like(text.ids) for text in kept]
        return cls(*(nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in (*zip(*kept), present)))

    @property
    def batch(self) -> dict[str, Tensor]:
        """What the body of a tail is called with."""
        return {"inputs_embeds": self.states, "attention_mask": self.attention}

    @property
    def predicted(self) -> Bool[Tensor, "b s"]:
        """Where the wanted tokens stand, counted from the second one: s = t - 1."""
        return self.wanted[:, 1:]

    @property
    def targets(self) -> Int[Tensor, " n"]:
        """The wanted tokens, text by text."""
        return self.ids[:, 1:][self.predicted]

    def means(self, values: Float[Tensor, " n"]) -> Float[Tensor, " b"]:
        """Of each text the mean over its wanted tokens."""
        sums = values.new_zeros(len(self.ids)).index_add(0, torch.nonzero(self.predicted)[:, 0], values)
        return sums / self.predicted.sum(1)


def last_blocks(whole: Any, blocks: int) -> Any:
    """A model of the same class without embeddings, whose blocks are the last ones of the whole, and no copies."""
    name = find_blocks(whole)
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers, config.use_cache = blocks, False
    with torch.device("meta"):
        body = type(whole)(config)
    for own, part in whole.named_children():
        setattr(body, own, None if isinstance(part, nn.Embedding) else part)
    setattr(body, name, nn.ModuleList(list(getattr(whole, name))[-blocks:]))
    return body.train(whole.training)


class LanguageTail(nn.Module):
    """Log-likelihoods of tokens by the last blocks, the last norm and the head of a model of transformers.

    Called with `Texts` (b texts) it gives (b,), nats a token. The blocks are free and the model's own, so that the
    whole model changes with them; what lies below must stay as it is. With `norm` the last norm is free as well, with
    `head` the output layer, which is a copy then and not tied to the embeddings.
    """

    def __init__(self, model: Any, blocks: int, *, norm: bool = False, head: bool = False) -> None:
        super().__init__()
        whole = model.requires_grad_(False).base_model
        name = find_blocks(whole)
        self.body, self.head = last_blocks(whole, blocks), model.get_output_embeddings()
        for own, part in self.body.named_children():
            part.requires_grad_(own == name or norm)
        if head:
            self.head = copy.deepcopy(self.head).requires_grad_(True)
        self.last, self._below = f"{name}.{blocks - 1}", f"{name}.{-blocks}"
        # Not a part of this module: its weights are not this one's.
        self._whole = [whole]

    @property
    def free(self) -> list[nn.Parameter]:
        """What is trained, the output layer's last."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def keep(
        self,
        tokenizer: Any,
        texts: Sequence[Sequence[tuple[str, str]]],
        wanted: str,
        *,
        most: int | None = None,
        size: int = 16,
    ) -> list[Kept]:
        """States of texts in pieces (text, role), `size` a pass; of the role `wanted` the first tokens, at `most`."""
        found: list[Kept] = []
        with Capture(self._whole[0], self._below, site="input") as seen:
            for start in range(0, len(texts), size):
                tokens = SegmentTokens.from_segments(
                    tokenizer, texts[start : start + size], add_special_tokens=False, padding_side="right"
                )
                below = seen.run(tokens.batch)[seen.names[0]]
                for states, ids, mask in zip(below, tokens.input_ids, tokens.mask(wanted)):
                    mask = mask & (mask.cumsum(0) <= (len(mask) if most is None else most))
                    end = int(torch.nonzero(mask)[-1]) + 1
                    found.append(Kept(states[:end].clone(), ids[:end], mask[:end]))
        return found

    def outputs(self, texts: Texts) -> Float[Tensor, "b s d"]:
        """Inputs of the output layer, of all tokens but the last."""
        return self.body(**texts.batch).last_hidden_state[:, :-1]

    def logits(self, texts: Texts, outputs: Tensor | None = None) -> Float[Tensor, "n v"]:
        """Of the wanted tokens, text by text."""
        return self.head((self.outputs(texts) if outputs is None else outputs)[texts.predicted])

    def log_likelihood(self, texts: Texts, outputs: Tensor | None = None) -> Float[Tensor, " n"]:
        """Of the wanted tokens, in nats."""
        return -F.cross_entropy(self.logits(texts, outputs), texts.targets, reduction="none")

    def forward(self, texts: Texts) -> Float[Tensor, " b"]:
        """Mean log-likelihood of the wanted tokens of each text."""
        return texts.means(self.log_likelihood(texts))
