"""Changes put into a model's hidden states while it runs, and taken out again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Site
from .checkpointing import Recomputation
from .layers import Layers, first_tensor, layer_names, replace_first_tensor
from .layout import Layout, channels_last, padded, samples_of, tokens_first

Intervention = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def intervene(
    model: nn.Module,
    layers: Layers | Mapping[str, Intervention],
    function: Intervention | None = None,
    *,
    site: Site = "output",
    item: int = 0,
    layout: Layout = "auto",
) -> Iterator[nn.Module]:
    """Within the block the states of layers are replaced by a function of them; the model is as before after it.

    Parameters
    ----------
    model
        Any torch module.
    layers
        As in `layer_names`, or a mapping from layer to its own function.
    function
        Gets vectors along the last axis and returns the same shape: (b, t, d) also where the layer has tokens first,
        nested ones padded with zeros; (b, d); or a feature map moved to (b, h, w, d). Dtype and device are put back to
        the layer's.
    site
        Change what the layer gives ("output") or gets ("input").
    item
        Entry of a tuple output.
    layout
        As in `iterate_representations`.

    Yields
    ------
    The model.

    Raises
    ------
    ValueError
        In the forward pass where the function changes the shape, and at the end of the block where a checkpointed layer
        has still to run again, in a backward pass that would not see the change.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import intervene
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False))
    >>> with intervene(model, "0", torch.zeros_like):
    ...     print(model(torch.randn(1, 4)).detach())
    tensor([[0., 0.]])
    """
    if site not in ("output", "input"):
        raise ValueError(f"site: 'output' or 'input', got {site!r}")
    functions = _functions(model, layers, function)
    modules = dict(model.named_modules())
    with contextlib.ExitStack() as hooks:
        current = _Pass(model)
        hooks.callback(model.register_forward_pre_hook(current.begin, with_kwargs=True).remove)
        for name, change in functions.items():
            replace = _replacing(current, name, change, item, layout)
            if site == "output":
                handle = modules[name].register_forward_hook(lambda _, args, output, replace=replace: replace(output))
            else:
                handle = modules[name].register_forward_pre_hook(_on_inputs(replace), with_kwargs=True)
            hooks.callback(handle.remove)
        yield model
        current.recomputation.check()


def _functions(
    model: nn.Module, layers: Layers | Mapping[str, Intervention], function: Intervention | None
) -> dict[str, Intervention]:
    if isinstance(layers, Mapping):
        if function is not None:
            raise ValueError("function: already given for each layer by the mapping")
        return {name: change for layer, change in layers.items() for name in layer_names(model, layer)}
    if function is None:
        raise ValueError("function: needed where layers is not a mapping")
    return dict.fromkeys(layer_names(model, layers), function)


class _Pass:
    """What is known of the forward pass that is going on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.samples: int | None = None
        self.recomputation = Recomputation()

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.samples = samples_of([*args, kwargs])
        self.recomputation.with_gradient = torch.is_grad_enabled()


def _replacing(
    current: _Pass, name: str, function: Intervention, item: int, layout: Layout
) -> Callable[[object], object]:
    def replace(value: object) -> object:
        given = first_tensor(value, item)
        states, present = padded(given)
        turned = tokens_first(current.model, name, states, current.samples, layout)
        rows = states.transpose(0, 1) if turned else channels_last(states, layout)
        changed = function(rows)
        if not isinstance(changed, Tensor) or changed.shape != rows.shape:
            shape = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(f"function: at layer {name!r} it must return the shape {tuple(rows.shape)}, got {shape}")
        if turned:
            changed = changed.transpose(0, 1)
        elif rows is not states:
            changed = changed.movedim(-1, 1)
        changed = current.recomputation.watched(changed.to(device=states.device, dtype=states.dtype))
        if present is not None:
            changed = torch.nested.nested_tensor([row[kept] for row, kept in zip(changed, present)])
        return replace_first_tensor(value, changed, item)

    return replace


def _on_inputs(replace: Callable[[object], object]) -> Callable[..., tuple[Any, Any]]:
    """A forward pre-hook that replaces the first positional argument, or the first tensor among the keywords."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return (replace(args), kwargs) if args else (args, replace(kwargs))

    return hook
