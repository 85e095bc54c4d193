"""The last blocks of a causal language model, which alone are trained, on states that the blocks before gave once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from subspan.base import Progress
from subspan.models import Capture, SegmentTokens, find_blocks

_PLAIN: Any = {"add_special_tokens": False, "padding_side": "right"}


class Texts(NamedTuple):
    """Texts as states (b, t, d) below the tail, their attention mask and tokens (b, t), and which tokens are wanted."""

    states: Float[Tensor, "b t d"]
    attention: Int[Tensor, "b t"]
    ids: Int[Tensor, "b t"]
    wanted: Bool[Tensor, "b t"]

    @property
    def batch(self) -> dict[str, Tensor]:
        """What the tail is called with."""
        return {"inputs_embeds": self.states, "attention_mask": self.attention}

    @property
    def predicted(self) -> Bool[Tensor, "b s"]:
        """Where the tokens stand that are wanted, counted from the second one: s = t - 1."""
        return self.wanted[:, 1:]

    @property
    def targets(self) -> Int[Tensor, " n"]:
        """The tokens that are wanted, text by text."""
        return self.ids[:, 1:][self.predicted]


class TokenTail:
    """A model of transformers of which only the last blocks, the norm after them and an untied output layer are left.

    `texts` first: cutting frees what comes before. `decoder` is then an ordinary model called with `inputs_embeds`.
    """

    def __init__(self, model: Any, tokenizer: Any, blocks: int) -> None:
        self.model, self.tokenizer, self.blocks = model, tokenizer, blocks
        self.path = find_blocks(model.base_model)
        self.last = f"{self.path}.{blocks - 1}"

    @torch.no_grad()
    def texts(self, prompts: Iterable[list[list[tuple[str, str]]]], wanted: str, progress: Progress) -> list[Texts]:
        """Batches of texts in pieces (text, role); tokens of the role `wanted` are wanted."""
        batches, found = list(prompts), []
        with Capture(self.model.base_model, f"{self.path}.{-self.blocks}", site="input") as seen:
            for done, pieces in enumerate(batches):
                progress("states below the trained blocks", done / len(batches))
                tokens = SegmentTokens.from_segments(self.tokenizer, pieces, **_PLAIN)
                states = seen.run(tokens.batch)[seen.names[0]]
                found.append(Texts(states, tokens.attention_mask, tokens.input_ids, tokens.mask(wanted)))
        return found

    def cut(self) -> list[nn.Parameter]:
        """Leave only the tail, and return its parameters, the output layer's last."""
        model = self.model
        parent, _, name = self.path.rpartition(".")
        owner = model.base_model.get_submodule(parent)
        setattr(owner, name, nn.ModuleList(list(getattr(owner, name))[-self.blocks :]))
        model.config.num_hidden_layers, model.config.use_cache = self.blocks, False
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.requires_grad_(False)
        unused = model.get_input_embeddings().weight
        kept = [*(each for each in self.decoder.parameters() if each is not unused), head.weight]
        for parameter in kept:
            parameter.requires_grad_(True)
        return kept

    @property
    def decoder(self) -> Any:
        """The model without its output layer."""
        return self.model.base_model

    def outputs(self, texts: Texts) -> Float[Tensor, "b s d"]:
        """Inputs of the output layer, of all tokens but the last."""
        return self.decoder(**texts.batch).last_hidden_state[:, :-1]

    def logits(self, texts: Texts, outputs: Tensor | None = None) -> Float[Tensor, "n v"]:
        """Of the tokens that are wanted, text by text."""
        outputs = self.outputs(texts) if outputs is None else outputs
        return self.model.get_output_embeddings()(outputs[texts.predicted])

    def log_likelihood(self, texts: Texts, outputs: Tensor | None = None) -> Float[Tensor, " n"]:
        """Of the tokens that are wanted, in nats."""
        logits = self.logits(texts, outputs)
        return -nn.functional.cross_entropy(logits, texts.targets, reduction="none")
