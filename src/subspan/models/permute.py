"""The units of a layer put in another order, in a network that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Layers, layer_names


def permute_units(model: nn.Module, producers: Layers, consumers: Layers, order: Sequence[int] | Tensor) -> nn.Module:
    """A copy of the model in which unit i of the producers is what was unit order[i]; its outputs stay the same.

    Parameters
    ----------
    model
        Any torch module.
    producers
        The layer that makes the units and the normalisations that follow it: everything with one number, filter or row
        a unit. As in `layer_names`.
    consumers
        The layers that read them. A linear one behind a flattened feature map reads a block of positions a channel.
    order
        A permutation of the units.

    Returns
    -------
    A copy of the model.

    Raises
    ------
    ValueError
        For an order that is no permutation, or widths that do not fit.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import permute_units
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)), torch.randn(5, 4)
    >>> changed = permute_units(model, "0", "2", [2, 0, 1])
    >>> torch.equal(changed[0](x)[:, 0], model[0](x)[:, 2]), torch.allclose(changed(x), model(x), atol=1e-5)
    (True, True)
    """
    index = torch.as_tensor(order, dtype=torch.int64)
    units = len(index)
    if index.ndim != 1 or sorted(index.tolist()) != list(range(units)):
        raise ValueError(f"order: expected a permutation of 0 … {units - 1}")
    changed = copy.deepcopy(model)
    modules = dict(changed.named_modules())
    with torch.no_grad():
        for name in layer_names(changed, producers):
            _reorder_outputs(modules[name], name, index)
        for name in layer_names(changed, consumers):
            _reorder_inputs(modules[name], name, index)
    return changed


def _reorder_outputs(module: nn.Module, name: str, index: Tensor) -> None:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    sized = [(part, tensor) for part, tensor in tensors if tensor.ndim]
    if not sized:
        raise ValueError(f"producers: {name!r} has no parameters")
    if getattr(module, "groups", 1) != 1 and sized[0][1].shape[1] != 1:
        raise ValueError(f"producers: {name!r} is a grouped convolution, whose units cannot change their group")
    for part, tensor in sized:
        if len(tensor) != len(index):
            raise ValueError(f"producers: {name}.{part} has {len(tensor)} units, the order {len(index)}")
        tensor.copy_(tensor[index.to(tensor.device)])


def _reorder_inputs(module: Any, name: str, index: Tensor) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise ValueError(f"consumers: {name!r} has no weight matrix or filters")
    positions, rest = divmod(weight.shape[1], len(index))
    if rest or (positions > 1 and weight.ndim > 2) or getattr(module, "groups", 1) != 1:
        raise ValueError(f"consumers: {name!r} reads {weight.shape[1]} inputs, which {len(index)} units do not make")
    columns = (index[:, None] * positions + torch.arange(positions)).flatten().to(weight.device)
    weight.copy_(weight[:, columns])
