"""ReVision: a language model learns to see from aligned text alone (Yu et al., 2026; extras: llm, train)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subspan.base import require, save_arrays, saved_object
from subspan.base.saved import set_state
from subspan.models.splice import IGNORED, PLACEHOLDER, Spliced, splice_embeddings

from .modality_map import ModalityMap

if TYPE_CHECKING:
    from subspan.nn import Objective

_LEARNING_RATE = {1: 5e-4, 2: 1e-5}
_PROJECTORS = ("mlp2x_gelu", "linear")


class ReVision(nn.Module):
    """A causal language model with an adapter for embeddings of a shared space, trained in two stages.

    Stage 1 (modality substitution): text embeddings, mapped into the image distribution by `aligner`, are the picture
    and the same texts the caption; the language model is frozen, the adapter learns. Stage 2: real image embeddings,
    never mapped; adapter and language model learn, the loss counts answers only. Afterwards `generate` takes images.
    `Trainer.fit(model.objective(), batches)` trains, on batches of `RevisionCollator`. Needs the extras llm and train.

    Parameters
    ----------
    llm
        A transformers causal language model.
    aligner
        A fitted `ReAlign` (or other map), a module, or None for no alignment.
    d
        Dimension of the embeddings; None reads it from a `ModalityMap`.
    n_tokens
        How often the one adapted embedding is repeated in the input; the authors repeat it 576 times, which adds no
        content.
    projector
        "mlp2x_gelu" (linear, GELU, linear) or "linear".
    stage
        1 or 2, see `set_stage`.

    Raises
    ------
    ValueError
        For another projector or stage, n_tokens < 1, and where d is not known.

    References
    ----------
    Yu et al. (2026), arXiv 2602.07026.

    Examples
    --------
    >>> from subspan.align import ReVision, RevisionCollator
    >>> model = ReVision(llm, aligner)  # doctest: +SKIP
    >>> batch = RevisionCollator(tokenizer)(items)  # doctest: +SKIP
    >>> loss = model.training_loss(batch)  # doctest: +SKIP
    """

    def __init__(
        self,
        llm: nn.Module,
        aligner: ModalityMap | nn.Module | None,
        *,
        d: int | None = None,
        n_tokens: int = 8,
        projector: str = "mlp2x_gelu",
        stage: int = 1,
    ) -> None:
        super().__init__()
        if projector not in _PROJECTORS:
            raise ValueError(f"projector: expected one of {_PROJECTORS}, got {projector!r}")
        if n_tokens < 1:
            raise ValueError(f"n_tokens: must be at least 1, got {n_tokens}")
        if isinstance(aligner, ModalityMap):
            d = aligner.n_features_in_ if d is None else d
            aligner = aligner.to_module()
        if d is None:
            raise ValueError("d: the dimension of the embeddings is needed unless the aligner is a fitted map")
        self.llm: Any = llm
        self.aligner = nn.Identity() if aligner is None else aligner
        width = int(self.llm.get_input_embeddings().weight.shape[1])
        first = nn.Linear(d, width)
        self.projector = first if projector == "linear" else nn.Sequential(first, nn.GELU(), nn.Linear(width, width))
        self.n_tokens = n_tokens
        parameters = list(self.llm.parameters())
        self._free = [each for each in parameters if each.requires_grad] or parameters
        self.set_stage(stage)

    def set_stage(self, stage: int) -> None:
        """Freeze (1) or free (2) the language model; free are the parameters that were, all of them where none was."""
        if stage not in (1, 2):
            raise ValueError(f"stage: expected 1 or 2, got {stage}")
        self.stage = stage
        if stage == 1:
            self.llm.requires_grad_(False)
        for parameter in self._free:
            parameter.requires_grad_(stage == 2)
        self.llm.train(stage == 2 and self.training)

    def train(self, mode: bool = True) -> ReVision:
        """Training mode; the frozen language model of stage 1 stays in evaluation mode."""
        super().train(mode)
        if self.stage == 1:
            self.llm.eval()
        return self

    def adapt(self, embeddings: Float[Tensor, "b d"]) -> Float[Tensor, "b n h"]:
        """Embeddings of the image distribution → the tokens that stand for them."""
        return self.projector(embeddings).unsqueeze(1).expand(-1, self.n_tokens, -1)

    def _spliced(self, embeddings: Float[Tensor, "b d"], batch: Mapping[str, Tensor]) -> Spliced:
        return splice_embeddings(
            self.llm, self.adapt(embeddings), batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
        )

    def training_loss(self, batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Mean negative log likelihood of the labelled tokens."""
        embeddings = batch["embedding"]
        if self.stage == 1:
            with torch.no_grad():
                embeddings = self.aligner(embeddings)
        spliced = self._spliced(embeddings, batch)
        return self.llm(**spliced._asdict(), use_cache=False).loss

    @torch.no_grad()
    def log_likelihood(
        self, image_embeddings: Float[Tensor, "b d"], batch: Mapping[str, Tensor]
    ) -> Float[Tensor, " b"]:
        """Log likelihood (nats) of the labelled tokens of each row, given real image embeddings."""
        spliced = self._spliced(image_embeddings, batch)
        assert spliced.labels is not None
        logits = self.llm(
            inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask, use_cache=False
        ).logits
        labels = spliced.labels[:, 1:]
        losses = nn.functional.cross_entropy(logits[:, :-1].mT.float(), labels, ignore_index=IGNORED, reduction="none")
        return -losses.sum(-1)

    @torch.no_grad()
    def generate(
        self,
        image_embeddings: Float[Tensor, "b d"],
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Int[Tensor, "b t"] | None = None,
        **options: Any,
    ) -> Int[Tensor, "b s"]:
        """New token ids given image embeddings, which are not mapped; `options` go to the model's own `generate`.

        input_ids: prompts with one placeholder each, padded on the left; by default the placeholder alone.
        """
        if input_ids is None:
            input_ids = torch.full((len(image_embeddings), 1), PLACEHOLDER, device=image_embeddings.device)
        batch = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        spliced = self._spliced(image_embeddings, batch)
        return self.llm.generate(inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask, **options)

    def objective(
        self, *, learning_rate: float | None = None, weight_decay: float = 0.0, warmup: float = 0.03
    ) -> Objective:
        """Of the stage, for a Trainer (extra: train): AdamW, warm-up and cosine by step.

        learning_rate: by default 5e-4 in stage 1 and 1e-5 in stage 2. What the stage does not train (the language model
        of stage 1) is left out of checkpoints.
        """
        from subspan.nn import Objective

        def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
            transformers = require("transformers", extra="llm")
            return transformers.get_cosine_schedule_with_warmup(optimizer, round(warmup * steps), steps)

        rate = _LEARNING_RATE[self.stage] if learning_rate is None else learning_rate
        options = {"learning_rate": rate, "weight_decay": weight_decay, "save_frozen": False}
        return Objective(self, ReVision.training_loss, schedule=schedule, **options)

    def save_projector(self, path: str | os.PathLike[str]) -> None:
        """Write the adapter to a safetensors file, whole or not at all."""
        save_arrays(path, "revision-projector", self.projector.state_dict(), n_tokens=self.n_tokens)

    def load_projector(self, path: str | os.PathLike[str]) -> None:
        """Read an adapter written by `save_projector`. Raises ValueError when it is another file or does not fit."""
        schema = {"*": Float[Tensor, "..."]}
        with saved_object(path, "revision-projector", schema, {"n_tokens": int}) as (arrays, facts):
            if facts["n_tokens"] != self.n_tokens:
                raise ValueError(f"an adapter for n_tokens = {facts['n_tokens']}, this model has {self.n_tokens}")
            set_state(self.projector, arrays)


@dataclass(frozen=True)
class RevisionCollator:
    """Items → padded batches with one placeholder a row and labels on what is to be learnt.

    Stage-1 items have "embedding" (d,) and "text": placeholder and caption, labels on the caption and its end. Stage-2
    items have "embedding", "prompt" and "answer": the tokenizer's chat template where it has one, else placeholder,
    prompt and answer on lines of their own; labels on the answer alone.

    Parameters
    ----------
    tokenizer
        Of the language model.
    max_length
        Tokens a row, at most.

    Raises
    ------
    ValueError
        On call, for a prompt that leaves no room for an answer or contains the placeholder.
    """

    tokenizer: Any
    max_length: int = 128

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch: embedding, input_ids, attention_mask, labels."""
        rows = [self._encoded(item) for item in items]
        width = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad

        def padded(lists: list[list[int]], value: int) -> Tensor:
            return torch.tensor([[*row, *[value] * (width - len(row))] for row in lists])

        return {
            "embedding": torch.stack([torch.as_tensor(item["embedding"]) for item in items]),
            "input_ids": padded([ids for ids, _ in rows], 0 if pad is None else pad),
            "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
            "labels": padded([labels for _, labels in rows], IGNORED),
        }

    def _encoded(self, item: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        if "text" in item:
            before, after, answer = [], [], self._ids(item["text"])
        else:
            before, after = (self._ids(part) for part in self._around_picture(item["prompt"]))
            answer = self._ids(item["answer"])
        room = self.max_length - len(before) - len(after) - 1
        if room < 1:
            raise ValueError(f"max_length: {self.max_length} tokens leave no room for an answer after the prompt")
        end = self.tokenizer.eos_token_id
        answer = [*answer, *([] if end is None else [end])][:room]
        ids = [*before, PLACEHOLDER, *after, *answer]
        return ids, [*[IGNORED] * (len(ids) - len(answer)), *answer]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _around_picture(self, prompt: str) -> tuple[str, str]:
        mark = "<image>"
        if mark in prompt:
            raise ValueError(f"prompt: must not contain {mark!r}, which marks the picture: {prompt!r}")
        if self.tokenizer.chat_template is None:
            return "", f"\n{prompt}\n"
        messages = [{"role": "user", "content": f"{mark}\n{prompt}"}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(mark)
        return before, after
