"""Which axis of a layer's states is which: samples, tokens, channels; and states that are no rectangle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

Layout = Literal["auto", "channels_first", "channels_last", "tokens_first"]
_LAYOUTS = ("auto", "channels_first", "channels_last", "tokens_first")


def check_layout(layout: str) -> None:
    """Raise ValueError for a layout that there is not."""
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: one of {', '.join(map(repr, _LAYOUTS))}, got {layout!r}")


def channels_last(states: Tensor, layout: Layout = "auto") -> Tensor:
    """A feature map with its channels as the last axis; "auto" takes maps of four and more axes as channels first."""
    check_layout(layout)
    first = layout == "channels_first" or (layout == "auto" and states.ndim > 3)
    return states.movedim(1, -1) if first else states


def samples_of(batch: Any) -> int | None:
    """Number of samples in what a model is called with, None where it has no tensor: of the token mask or ids first."""
    if isinstance(batch, Mapping):
        named = [batch[name] for name in ("attention_mask", "input_ids") if name in batch]
        batch = [*named, *batch.values()]
    if isinstance(batch, tuple | list):
        return next((count for count in map(samples_of, batch) if count is not None), None)
    return len(batch) if isinstance(batch, Tensor) and batch.ndim else None


def tokens_first(model: nn.Module, name: str, states: Tensor, samples: int | None, layout: Layout = "auto") -> bool:
    """Whether the states (three axes) of a layer are (t, b, d), torch's own default, and not (b, t, d).

    "auto": a layer of torch's says so itself, of others the number of samples does. Raises ValueError where the two
    differ, and where there are as many tokens as samples in a model some of whose layers have tokens first.
    """
    if layout != "auto" or states.ndim != 3:
        return layout == "tokens_first" and states.ndim == 3
    own = _batch_first(model.get_submodule(name))
    first, second = (size == samples for size in states.shape[:2])
    if own is not None:
        if samples is not None and (first, second) == (not own, own):
            raise _undecided(name, states, f"torch says that it has {'samples' if own else 'tokens'} first")
        return not own
    if first and second and any(_batch_first(part) is False for part in model.modules()):
        raise _undecided(name, states, "some layers of the model have tokens first")
    return second and not first


def samples_first(model: nn.Module, name: str, states: Tensor, samples: int | None, layout: Layout = "auto") -> Tensor:
    """States with the samples as first axis; see `tokens_first`."""
    return states.transpose(0, 1) if tokens_first(model, name, states, samples, layout) else states


def padded(states: Tensor) -> tuple[Tensor, Bool[Tensor, "b t"] | None]:
    """Tokens (b, t, d) padded with zeros, and which are no padding, of a nested tensor; others as they are, and None.

    Torch's encoders give such in evaluation, where padding is masked.
    """
    if not states.is_nested:
        return states, None
    lengths = torch.tensor([len(each) for each in states.unbind()], device=states.device)
    dense = torch.nested.to_padded_tensor(states, 0.0)
    return dense, torch.arange(dense.shape[1], device=states.device) < lengths.unsqueeze(1)


def _batch_first(layer: nn.Module) -> bool | None:
    """Whether a layer of torch's own has samples first; None for other layers."""
    if isinstance(layer, nn.TransformerEncoder | nn.TransformerDecoder):
        layer = layer.layers[0]
    if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        layer = layer.self_attn
    if isinstance(layer, nn.Transformer | nn.MultiheadAttention | nn.RNNBase):
        return layer.batch_first
    return None


def _undecided(name: str, states: Tensor, why: str) -> ValueError:
    return ValueError(
        f"layer {name!r}: cannot tell whether {tuple(states.shape)} has the samples or the tokens first, since {why}; "
        "give layout='tokens_first', or 'channels_last' for samples first"
    )
