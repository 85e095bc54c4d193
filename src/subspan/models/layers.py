"""Layers of a torch module, found by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Layer = str | int | re.Pattern[str]
Layers = Layer | Sequence[Layer]


def find_blocks(model: nn.Module) -> str:
    """Dotted name of the model's one outermost list of like blocks (`model.layers`, `encoder.layer`, `blocks`, …).

    Parameters
    ----------
    model
        Any torch module; of a list or a sequence the name is empty.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        Where there is none, or several (encoder–decoder and vision–language models): then name it.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import find_blocks
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> find_blocks(torch.nn.TransformerEncoder(layer, 3))
    'layers'
    """
    if isinstance(model, nn.Sequential | nn.ModuleList):
        return ""
    found: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if nested or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = list(module)
        alike = len({type(child) for child in children}) == 1
        if len(children) >= 2 and alike and any(True for _ in children[0].children()):
            found.append(name)
    if len(found) != 1:
        what = f"several lists of blocks ({', '.join(found)})" if found else "no list of like blocks"
        raise ValueError(f"layers: {type(model).__name__} has {what}, so an index is not enough; give the layer's name")
    return found[0]


def layer_names(model: nn.Module, layers: Layers) -> list[str]:
    """Dotted names of the modules that are asked for, in the order asked for and without repeats.

    Parameters
    ----------
    model
        Any torch module.
    layers
        One or several of: a dotted name (`"model.layers.3"`, an index may be negative: `"model.layers.-1"`), a glob in
        which `*` stays within a dot and `**` crosses it (`"encoder.layer.*"`), a compiled regular expression (full
        match), or an int into the model's list of blocks (see `find_blocks`).

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        With the nearest names when nothing matches, and for an empty list.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import layer_names
    >>> model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
    >>> layer_names(model, ["layers.*.self_attn", -1])
    ['layers.0.self_attn', 'layers.1.self_attn', 'layers.2.self_attn', 'layers.2']
    """
    asked = [layers] if isinstance(layers, str | int | re.Pattern) else list(layers)
    if not asked:
        raise ValueError("layers: at least one layer is needed, got an empty list")
    names = [name for name, _ in model.named_modules()]
    found = [name for layer in asked for name in _matches(model, names, layer)]
    return list(dict.fromkeys(found))


def linear_names(model: nn.Module, inside: Layers | None = None) -> list[str]:
    """Dotted names of the linear layers (torch's, and transformers' `Conv1D`) in some part of a model.

    Parameters
    ----------
    model
        Any torch module.
    inside
        As in `layer_names`. Default: the model's blocks (see `find_blocks`), so that embeddings and heads are left out.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        Where there are none.

    Examples
    --------
    >>> from torch import nn
    >>> from subspan.models import linear_names
    >>> linear_names(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 1))))
    ['0', '1.1']
    """
    roots = [find_blocks(model)] if inside is None else layer_names(model, inside)
    found = [
        f"{root}.{name}".strip(".")
        for root in roots
        for name, module in model.get_submodule(root).named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    ]
    if not found:
        raise ValueError(f"inside: {', '.join(map(repr, roots))} of {type(model).__name__} has no linear layer")
    return list(dict.fromkeys(found))


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def linear_weight(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a linear layer, of transformers' `Conv1D` too: no copies.

    Parameters
    ----------
    module
        The layer.

    Returns
    -------
    (weight, bias)
        (d_out, d_in), and (d_out,) or None.

    Raises
    ------
    ValueError
        For other layers, and for weights that are not floating-point (quantised).

    Examples
    --------
    >>> import torch
    >>> from subspan.models import linear_weight
    >>> weight, bias = linear_weight(torch.nn.Linear(4, 3))
    >>> weight.shape, bias.shape
    (torch.Size([3, 4]), torch.Size([3]))
    """
    weight = getattr(module, "weight", None)
    if not (isinstance(module, nn.Linear) or is_conv1d(module)) or not isinstance(weight, torch.Tensor):
        raise ValueError(f"layer: a linear one is needed, got {type(module).__name__}")
    if not weight.is_floating_point():
        raise ValueError(f"layer: its weight is {str(weight.dtype).removeprefix('torch.')}, floating point is needed")
    bias: Any = module.bias
    return (weight.mT if is_conv1d(module) else weight), bias


def is_single(layers: Layers) -> bool:
    """Whether `layers` is one plain layer (a name or an index), not a list or a pattern."""
    return isinstance(layers, int) or (isinstance(layers, str) and not re.search(r"[*?\[]", layers))


def _matches(model: nn.Module, names: list[str], layer: Layer) -> list[str]:
    if isinstance(layer, bool) or not isinstance(layer, str | int | re.Pattern):
        raise TypeError(f"layers: a layer is a name, an index or a compiled pattern, got {layer!r}")
    if isinstance(layer, int):
        blocks = find_blocks(model)
        return [_indexed(model, f"{blocks}.{layer}".removeprefix("."))]
    if isinstance(layer, str) and layer in names:
        return [layer]
    if isinstance(layer, str) and re.search(r"(^|\.)-\d+(\.|$)", layer):
        return [_indexed(model, layer)]
    pattern = layer if isinstance(layer, re.Pattern) else re.compile(_glob(layer))
    found = [name for name in names if pattern.fullmatch(name)]
    if not found:
        text = layer.pattern if isinstance(layer, re.Pattern) else layer
        raise ValueError(f"layers: {type(model).__name__} has no layer {text!r}{_nearest(text, names)}")
    return found


def _glob(pattern: str) -> str:
    translated = {r"\*\*": ".*", r"\*": r"[^.]*", r"\?": r"[^.]"}
    return re.sub(r"\\\*\\\*|\\\*|\\\?", lambda match: translated[match.group()], re.escape(pattern))


def _indexed(model: nn.Module, name: str) -> str:
    """`name` with every negative index in it counted from the end of its list."""
    module, resolved = model, []
    for part in name.split("."):
        children = dict(module.named_children())
        if re.fullmatch(r"-?\d+", part) and isinstance(module, nn.ModuleList | nn.Sequential):
            if not -len(children) <= int(part) < len(children):
                where = ".".join(resolved) or type(model).__name__
                raise ValueError(f"layers: index {part} is out of range, {where} has {len(children)} blocks")
            part = str(int(part) % len(children))
        if part not in children:
            names = [known for known, _ in model.named_modules()]
            raise ValueError(f"layers: {type(model).__name__} has no layer {name!r}{_nearest(name, names)}")
        resolved.append(part)
        module = children[part]
    return ".".join(resolved)


def _nearest(name: str, names: list[str]) -> str:
    tail = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    near += [known for known in names if known.endswith(tail) and known not in near][:2] if tail else []
    top = [known for known in names if known and "." not in known]
    return f"; nearest: {', '.join(near)}" if near else f"; its top layers are {', '.join(top)}"


def first_tensor(value: object, item: int = 0) -> torch.Tensor:
    """The tensor a module's input or output stands for: itself, item `item` of a tuple, a mapping's first tensor."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        tensors = [entry for entry in value.values() if isinstance(entry, torch.Tensor)]
    elif isinstance(value, tuple | list):
        chosen = value[item] if -len(value) <= item < len(value) else None
        tensors = [chosen] if isinstance(chosen, torch.Tensor) else []
    else:
        tensors = []
    if not tensors:
        raise ValueError(f"{type(value).__name__} without a tensor at item {item}; choose another layer or item")
    return tensors[0]


def replace_first_tensor(value: object, tensor: torch.Tensor, item: int = 0) -> object:
    """`value` (see `first_tensor`) with its tensor replaced; the container's type is kept."""
    if isinstance(value, torch.Tensor):
        return tensor
    old = first_tensor(value, item)
    if isinstance(value, dict):
        key = next(name for name, entry in value.items() if entry is old)
        changed = type(value)(**value)
        changed[key] = tensor
        return changed
    assert isinstance(value, tuple | list)
    entries = list(value)
    entries[item] = tensor
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
