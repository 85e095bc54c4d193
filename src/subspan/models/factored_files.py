"""Files of factored layers, in which every number takes the bits that are counted for it."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from jaxtyping import Inexact, UInt8
from torch import Tensor, nn

from subspan.base import save_arrays, saved_object
from subspan.base.bits import pack_bits, unpack_bits
from subspan.base.saved import checked_arrays, optional

from .factored import LowRankLinear, SparseDictLinear, index_width
from .layers import linear_weight
from .surgery import Surgery, replace

_KINDS: dict[str, Any] = {"low rank": LowRankLinear, "sparse dictionary": SparseDictLinear}
_Matrix, _Bytes = Inexact[Tensor, "_ _"], UInt8[Tensor, "_ _"]
_SCHEMAS: dict[str, Any] = {
    "low rank": {"up": _Matrix, "down": _Matrix, "bias": optional(Inexact[Tensor, "_"])},
    "sparse dictionary": {
        "dictionary": optional(_Matrix),
        "mask": optional(_Bytes),
        "indices": optional(_Bytes),
        "values": optional(_Matrix),
        "codes": optional(_Bytes),
        "bias": optional(Inexact[Tensor, "_"]),
    },
}
_CODE_BITS = 14


def save_factored(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the factored layers of a model, and nothing else of it, to one safetensors file.

    Parameters
    ----------
    model
        With `LowRankLinear` or `SparseDictLinear` layers.
    path
        Of the file; one that is there is replaced, whole or not at all.

    Raises
    ------
    ValueError
        Where the model has no such layers.

    Examples
    --------
    >>> import torch
    >>> from safetensors.torch import load_file
    >>> from subspan.models import LowRankLinear, save_factored
    >>> layer = LowRankLinear.from_linear(torch.nn.Linear(6, 4), rank=2)
    >>> save_factored(torch.nn.Sequential(layer), "saved.safetensors")
    >>> sorted(load_file("saved.safetensors"))
    ['0:bias', '0:down', '0:up']
    """
    words = {kind: word for word, kind in _KINDS.items()}
    layers: dict[str, Any] = {name: part for name, part in model.named_modules() if type(part) in words}
    if not layers:
        raise ValueError("model: has no LowRankLinear or SparseDictLinear")
    arrays: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, layer in layers.items():
        parts = _sparse_arrays(layer) if isinstance(layer, SparseDictLinear) else layer.arrays()
        if isinstance(layer, SparseDictLinear) and owners.setdefault(id(layer.dictionary), name) != name:
            shared[name] = owners[id(layer.dictionary)]
            parts = {part: value for part, value in parts.items() if part != "dictionary"}
        arrays |= {f"{name}:{part}": _narrow(value) for part, value in parts.items()}
    kinds = {name: words[type(layer)] for name, layer in layers.items()}
    types = {name: str(next(layer.parameters()).dtype).removeprefix("torch.") for name, layer in layers.items()}
    save_arrays(path, "factored layers", arrays, layers=kinds, types=types, shared=shared)


def _narrow(value: Tensor) -> Tensor:
    """In half the width, where that is the same number."""
    if not value.is_floating_point():
        return value
    half = value.detach().to(torch.bfloat16)
    return half if torch.equal(half.to(value.dtype), value.detach()) else value


def _sparse_arrays(layer: SparseDictLinear) -> dict[str, Tensor]:
    """Atoms in rising order as a mask or as indices, whichever is less; codes in 14 bits where the last two are 0."""
    (outputs, s), k = layer.values.shape, layer.dictionary.shape[1]
    codes = layer.codes().detach().mT
    read = torch.zeros_like(codes, dtype=torch.int8).scatter(1, layer.indices.long(), 1)
    # An atom that an output reads twice is stored once, and others with weight 0 beside it.
    places = read.argsort(dim=1, descending=True, stable=True)[:, :s].sort(dim=1).values
    values, width = _narrow(codes.gather(1, places)), index_width(k)
    arrays: dict[str, Tensor] = {"dictionary": layer.dictionary}
    if k <= s * width:
        arrays["mask"] = pack_bits(torch.zeros(outputs, k, dtype=torch.int8).scatter(1, places.cpu(), 1), 1)
    else:
        arrays["indices"] = pack_bits(places, width)
    bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else None
    if bits is not None and not bool((bits & 3).any()):
        arrays["codes"] = pack_bits((bits.int() >> 2) & ((1 << _CODE_BITS) - 1), _CODE_BITS)
    else:
        arrays["values"] = values
    return arrays if layer.bias is None else arrays | {"bias": layer.bias}


def _sparse_layer(arrays: dict[str, Tensor], dictionary: Tensor) -> SparseDictLinear:
    """The layer of these arrays; ValueError where they do not fit together."""
    if ("mask" in arrays) == ("indices" in arrays) or ("codes" in arrays) == ("values" in arrays):
        raise ValueError("a mask or indices, and codes or values, are needed")
    k = dictionary.shape[1]
    s = arrays["values"].shape[1] if "values" in arrays else 8 * arrays["codes"].shape[1] // _CODE_BITS
    if "mask" in arrays:
        taken = unpack_bits(arrays["mask"], 1, k)
        if not bool((taken.sum(1) == s).all()):
            raise ValueError(f"the mask of an output has not {s} atoms")
        indices = taken.nonzero()[:, 1].view(-1, s)
    else:
        indices = unpack_bits(arrays["indices"], index_width(k), s)
    values = arrays.get("values")
    if values is None:
        bits = unpack_bits(arrays["codes"], _CODE_BITS, s) << 2
        values = bits.to(torch.int32).to(torch.int16).view(torch.bfloat16)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("codes contain NaN or infinity")
    return SparseDictLinear(dictionary, indices, values, arrays.get("bias"))


def load_factored(model: nn.Module, path: str | os.PathLike[str]) -> Surgery:
    """Put the layers of a file by `save_factored` into a model in place of its own.

    Parameters
    ----------
    model
        Changed in place.
    path
        Of the file.

    Returns
    -------
    Surgery, whose `undo()` takes them out again.

    Raises
    ------
    ValueError
        For another file, and where the model has no such layers or of other sizes.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import LowRankLinear, load_factored, save_factored
    >>> layer, model = torch.nn.Linear(6, 4), torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> save_factored(torch.nn.Sequential(LowRankLinear.from_linear(layer, rank=4)), "loaded.safetensors")
    >>> surgery, x = load_factored(model, "loaded.safetensors"), torch.randn(3, 6)
    >>> torch.allclose(model(x), layer(x), atol=1e-5)
    True
    """
    facts = {
        "layers": dict[str, Literal["low rank", "sparse dictionary"]],
        "types": dict[str, Literal["float16", "bfloat16", "float32", "float64"]],
        "shared": dict[str, str],
    }
    parts = {part for schema in _SCHEMAS.values() for part in schema}
    schema = {f"*:{part}": optional(Inexact[Tensor, "..."] | UInt8[Tensor, "..."]) for part in parts}
    with saved_object(path, "factored layers", schema, facts) as (arrays, found):
        made = _layers(arrays, **found)
    names = {name for name, _ in model.named_modules()}
    for name, layer in made.items():
        if name not in names:
            raise ValueError(f"path: {os.fspath(path)!r} has a layer {name!r}, the model has none")
        weight, _ = linear_weight(model.get_submodule(name))
        if tuple(weight.shape) != layer.shape:
            shapes = f"a weight {layer.shape}, the model {tuple(weight.shape)}"
            raise ValueError(f"path: {os.fspath(path)!r} has for {name!r} {shapes}")
    return replace(model, made)


def _layers(
    arrays: dict[str, Tensor], layers: dict[str, str], types: dict[str, str], shared: dict[str, str]
) -> dict[str, Any]:
    """Layers by name; ValueError where the contents of a file do not fit together."""
    stored: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for key, value in arrays.items():
        name, _, part = key.rpartition(":")
        if name not in stored:
            raise ValueError(f"{key} belongs to no layer")
        stored[name][part] = value
    if types.keys() != layers.keys() or not shared.keys() <= layers.keys():
        raise ValueError("types or shared dictionaries are those of other layers")
    made: dict[str, Any] = {}
    for name, kind in layers.items():
        own = checked_arrays(stored[name], _SCHEMAS[kind])
        if kind == "low rank":
            made[name] = LowRankLinear(**own).to(getattr(torch, types[name]))
            continue
        owner = shared.get(name, name)
        if ("dictionary" in own) != (owner == name) or (
            owner != name and type(made.get(owner)) is not SparseDictLinear
        ):
            raise ValueError(f"{name} has no dictionary")
        dictionary = own["dictionary"] if owner == name else made[owner].dictionary
        made[name] = _sparse_layer(own, dictionary).to(getattr(torch, types[name]))
        if owner != name:
            made[name].dictionary = made[owner].dictionary
    return made
