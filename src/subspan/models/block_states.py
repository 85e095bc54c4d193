"""The states between a transformer's blocks, by number, of all that are asked for in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base.modules import evaluation

from .capture import Site, capture
from .layers import find_blocks, layer_names


def block_numbers(model: nn.Module, layers: Sequence[int] | None = None) -> list[int]:
    """Numbers of layers: 0 is what goes into the first block, i what the i-th gives; negative ones from the end.

    None: all. Raises ValueError for one that there is not, and for none at all.
    """
    count = len(list(model.get_submodule(find_blocks(model)).children())) + 1
    numbers = list(range(count)) if layers is None else list(layers)
    for number in numbers:
        if not -count <= number < count:
            raise ValueError(f"layers: from 0 (what goes into the first block) to {count - 1}, got {number}")
    if not numbers:
        raise ValueError("layers: at least one is needed")
    return list(dict.fromkeys(number % count for number in numbers))


def block_site(model: nn.Module, number: int) -> tuple[str, Site]:
    """The module whose output, or of the first one input, is the layer of this number: what `intervene` takes."""
    name = f"{find_blocks(model)}.{max(number - 1, 0)}".removeprefix(".")
    return name, "output" if number else "input"


@torch.no_grad()
def block_states(
    model: nn.Module, batch: Any, numbers: Sequence[int], pool: Callable[[Tensor], Tensor]
) -> Float[Tensor, "l *n d"]:
    """What `pool` makes of the states (b, t, d) of each layer, on the CPU; the pass ends behind the last of them."""
    sites = [block_site(model, number) for number in numbers]
    first = block_site(model, 0)[0]
    outputs = layer_names(model, [name for name, site in sites if site == "output"] or [first])
    with (
        evaluation(model),
        capture(model, first, site="input", transform=pool) as before,
        capture(model, outputs, transform=pool) as after,
    ):
        after.run(batch)
        return torch.stack([after[name] if site == "output" else before[name] for name, site in sites]).cpu()


def leading_text(tokenizer: Any) -> str:
    """What is put in front of a text so that none of its tokens is the first position; empty where one stands there.

    The first position of a causal model holds a state of another size (it collects attention that goes nowhere).
    """
    first = tokenizer("a")["input_ids"][:1]
    return "" if first and first[0] in tokenizer.all_special_ids else tokenizer.bos_token or "\n"
