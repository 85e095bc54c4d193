"""What one pass over few-shot prompts shows of a model: states at their roles, and attention between them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from subspan.models import attention_rows, capture, find_blocks, layer_names, output_rows

from .few_shot import FewShotBatch

# Rows of attention, evenly spread over a prompt, that say how much any token attends to the one before it.
_BASELINE = 8


@dataclass(frozen=True)
class CircuitReading:
    """States and attention of n prompts, at the positions that count; `ICLCircuit.read` makes it.

    Attributes
    ----------
    roles
        "text" (the last token of the query's text), "forerunner" (where the answer is predicted) and, where a label was
        put after the query, "label".
    states
        (roles, layers + 1, n, d); layer 0 is what goes into the first block.
    similarity
        (n, layers + 1, k): cosine of the states at each demonstration's forerunner and at the query's.
    retrieval
        (n, layers, heads, k): attention of the query's forerunner to the demonstrations' labels.
    copying
        (n, layers, heads): attention of the label after the query to its forerunner; None without one.
    neighbours
        (n, layers, heads): mean attention of some tokens to the one before them.
    lengths
        (n,): tokens of each prompt.
    owners, targets
        (n, k) and (n,): numbers of the labels.
    logits
        (n, classes): of the labels' tokens at the query's forerunner.
    """

    roles: tuple[str, ...]
    states: Float[Tensor, "r l1 n d"]
    similarity: Float[Tensor, "n l1 k"]
    retrieval: Float[Tensor, "n l h k"]
    copying: Float[Tensor, "n l h"] | None
    neighbours: Float[Tensor, "n l h"]
    lengths: Int[Tensor, " n"]
    owners: Int[Tensor, "n k"]
    targets: Int[Tensor, " n"]
    logits: Float[Tensor, "n c"]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.targets)

    def role(self, name: str) -> Float[Tensor, "l1 n d"]:
        """The states at a role. Raises ValueError for one that was not read."""
        if name not in self.roles:
            hint = "; read with append='right'" if name == "label" else ""
            raise ValueError(f"role: one of {', '.join(self.roles)}, got {name!r}{hint}")
        return self.states[self.roles.index(name)]

    def part(self, index: Any) -> CircuitReading:
        """Of some of the prompts (indices, a slice or a mask)."""
        own = {
            field.name: value[index]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and field.name != "states"
        }
        return replace(self, states=self.states[:, :, index], **own)

    @classmethod
    def joined(cls, readings: Sequence[CircuitReading]) -> CircuitReading:
        """Of the prompts of all, one after another."""
        own = {
            field.name: torch.cat([getattr(each, field.name) for each in readings], 2 if field.name == "states" else 0)
            for field in fields(cls)
            if isinstance(getattr(readings[0], field.name), Tensor)
        }
        return replace(readings[0], **own)


def read_batch(model: nn.Module, inputs: dict[str, Any], batch: FewShotBatch, ids: Sequence[int]) -> CircuitReading:
    """One pass over a batch: states are gathered and rows of attention made block by block, nothing else is kept."""
    blocks = layer_names(model, f"{find_blocks(model)}.*".removeprefix("."))
    with_label = batch.appended is not None
    at = [batch.text, batch.query, *([batch.appended] if batch.appended is not None else [])]
    positions = torch.cat([torch.stack(at, 1), batch.forerunners], 1)
    # Predecessors from the second token on: the first is a sink.
    steps = (torch.linspace(0, 1, _BASELINE) * (batch.lengths.unsqueeze(1) - 3).clamp_min(0)).long()
    later = batch.first.unsqueeze(1) + (2 + steps).clamp_max((batch.lengths - 1).unsqueeze(1))
    queries = torch.cat([torch.stack(at[1:], 1), later], 1)

    def gathered(states: Tensor) -> Tensor:
        index = positions.to(states.device)[:, :, None].expand(-1, -1, states.shape[-1])
        return states.gather(1, index).float()

    logits: list[Tensor] = []
    with (
        capture(model, blocks[:1], site="input", transform=gathered) as first,
        capture(model, blocks, transform=gathered) as after,
        output_rows(model, batch.query.unsqueeze(1)),
        contextlib.ExitStack() as hooks,
    ):
        handle = model.register_forward_hook(lambda _, args, output: logits.append(output.logits[:, 0, list(ids)]))
        hooks.callback(handle.remove)
        rows = attention_rows(model, inputs, queries)
        states = torch.stack([first[blocks[0]], *(after[name] for name in blocks)]).cpu()
    weights = torch.stack(list(rows.values()), 1).cpu()
    retrieval = weights[:, :, :, 0].gather(3, _spread(batch.labels, weights))
    at_label = weights[:, :, :, 1].gather(3, _spread(batch.query.unsqueeze(1), weights))[..., 0] if with_label else None
    before = weights[:, :, :, -_BASELINE:]
    index = (later - 1)[:, None, None, :, None].expand(*before.shape[:3], -1, 1)
    own, demonstrations = states[:, :, : len(at)], states[:, :, len(at) :]
    similarity = functional.cosine_similarity(demonstrations, own[:, :, 1:2], dim=-1)
    return CircuitReading(
        roles=("text", "forerunner", "label")[: len(at)],
        states=own.permute(2, 0, 1, 3).contiguous(),
        similarity=similarity.transpose(0, 1),
        retrieval=retrieval,
        copying=at_label,
        neighbours=before.gather(4, index)[..., 0].mean(3),
        lengths=batch.lengths,
        owners=batch.owners,
        targets=batch.targets,
        logits=logits[0].float().cpu(),
    )


def _spread(positions: Int[Tensor, "b k"], weights: Tensor) -> Int[Tensor, "b l h k"]:
    """Positions of keys for every layer and head."""
    return positions[:, None, None].expand(-1, weights.shape[1], weights.shape[2], -1)
