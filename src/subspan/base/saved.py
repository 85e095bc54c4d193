"""Saved objects: safetensors files of one kind each, read against the list of what the kind holds, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch
from jaxtyping import jaxtyped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import atomic_write
from .reading import quoted, reading

Schema = Mapping[str, Any]


def optional(annotation: Any) -> Any:
    """The annotation of what may be missing."""
    return annotation | None


@contextlib.contextmanager
def saved_object(
    path: str | os.PathLike[str], kind: str, arrays: Schema, facts: Schema | None = None
) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Yield the tensors and the facts of a file of one `kind`; whatever is wrong with it is a ValueError that names it.

    What the caller makes of the contents belongs into the `with`: what does not fit together there is the file's fault.

    Parameters
    ----------
    path
        Of a file that `save_arrays` wrote.
    kind
        What the file must be.
    arrays
        Name, or pattern of names such as "heads.*" → jaxtyping annotation; equal names of axes are equal lengths.
    facts
        Name → what `fits` takes, or a mapping for an inner object. What may be missing is annotated `| None`.

    Yields
    ------
    Two dicts: tensors and facts by name.

    Raises
    ------
    FileNotFoundError
        Where there is no file.
    ValueError
        For another kind, names that are not listed, what does not fit its annotation, NaN and infinity.

    Examples
    --------
    >>> import torch
    >>> from jaxtyping import Float
    >>> from torch import Tensor
    >>> from subspan.base import save_arrays, saved_object
    >>> save_arrays("map.safetensors", "map", {"weight": torch.eye(3)}, rank=2)
    >>> with saved_object("map.safetensors", "map", {"weight": Float[Tensor, "d d"]}, {"rank": int}) as (arrays, facts):
    ...     tuple(arrays["weight"].shape), facts["rank"]
    ((3, 3), 2)
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file {os.fspath(path)!r}")
    with reading(path, problem="is not a readable safetensors file"), safe_open(path, framework="pt") as stored:
        found = json.loads((stored.metadata() or {}).get("subspan", "{}"), parse_constant=_refuse_constant)
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    with reading(path, problem=f"does not fit a saved {kind}"):
        if not isinstance(found, dict):
            raise ValueError(f"its facts are a {type(found).__name__}")
        holds = found.pop("kind", "something else")
        if holds != kind:
            raise ValueError(f"path: {os.fspath(path)!r} holds {quoted(holds).strip(chr(39))}, expected {kind}")
        double = found.pop("complex", [])
        if not fits(double, list[str]):
            raise ValueError("complex: expected names of tensors")
        for name in double:
            if name not in tensors or tensors[name].dtype != torch.float64 or tensors[name].shape[-1:] != (2,):
                raise ValueError(f"{quoted(name)} is not stored as complex numbers")
            tensors[name] = torch.view_as_complex(tensors[name])
        yield checked_arrays(tensors, arrays), _checked_facts(found, facts or {}, "")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} among the facts")


def checked_arrays(tensors: dict[str, Tensor], schema: Schema) -> dict[str, Tensor]:
    """Tensors that are what `saved_object` would yield for `arrays=schema`; ValueError for others."""
    listed = {name: next((p for p in schema if fnmatchcase(name, p)), None) for name in tensors}
    _check_names(set(tensors), {p for p in listed.values() if p is not None}, schema, listed, "arrays")
    with jaxtyped("context"):
        for name, value in tensors.items():
            annotation = schema[str(listed[name])]
            if not isinstance(value, annotation):
                shape = tuple(value.shape)
                raise ValueError(f"{name} is {_dtype(value)} of shape {shape}, expected {_shown(annotation)}")
            if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} contains NaN or infinity")
    return tensors


def _check_names(names: set[str], used: set[str], schema: Schema, listed: Mapping[str, Any], what: str) -> None:
    unknown = sorted(name for name in names if listed.get(name) is None)
    if unknown:
        raise ValueError(f"{what} that it does not have: {quoted(', '.join(unknown), 200)}")
    missing = sorted(name for name, kind in schema.items() if name not in used and not _may_miss(kind))
    if missing:
        raise ValueError(f"missing {what}: {', '.join(missing)}")


def _may_miss(annotation: Any) -> bool:
    return not isinstance(annotation, Mapping) and (annotation is Any or NoneType in get_args(annotation))


def _checked_facts(found: dict[str, Any], schema: Schema, inside: str) -> dict[str, Any]:
    listed = {name: name if name in schema else None for name in found}
    _check_names(set(found), set(found) & set(schema), schema, listed, f"facts{inside}")
    for name, value in found.items():
        if isinstance(schema[name], Mapping) and isinstance(value, dict):
            _checked_facts(value, schema[name], f" of {name}")
        elif not fits(value, schema[name]):
            raise ValueError(f"{name} is {quoted(value)}, expected {_shown(schema[name])}")
    return {name: found.get(name) for name in schema}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value is of a type: bool, int, float (an int will do), str, None, literals, lists, objects.

    Tuples are lists; data classes and typed dictionaries are objects with their fields.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, inner[1]) for one in value.values())
    if origin is tuple:
        wanted = inner[:1] * len(value) if isinstance(value, list) and inner[1:] == (...,) else inner
        return isinstance(value, list) and len(value) == len(wanted) and all(map(fits, value, wanted))
    if dataclasses.is_dataclass(annotation) or is_typeddict(annotation):
        fields = get_type_hints(annotation)
        return (
            isinstance(value, dict) and value.keys() == fields.keys() and all(fits(value[n], fields[n]) for n in fields)
        )
    if annotation in (None, NoneType):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is annotation


def set_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict`, which must fit; raises ValueError also for integers where the module has floating numbers."""
    for name, value in module.state_dict().items():
        if name in state and state[name].is_floating_point() != value.is_floating_point():
            raise ValueError(f"{name} is {_dtype(state[name])}, expected {_dtype(value)}")
    module.load_state_dict(state)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _shown(annotation: Any) -> str:
    if isinstance(annotation, Mapping):
        return "an object"
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_shown(one) for one in get_args(annotation))
    if get_origin(annotation) is None and isinstance(annotation, type):
        return "None" if annotation is NoneType else annotation.__name__
    return str(annotation).removeprefix("typing.")


def save_arrays(path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Tensor], **facts: Any) -> None:
    """Write tensors of one `kind` to a safetensors file, whole or not at all.

    Such files are read by `saved_object`.

    Parameters
    ----------
    path
        The file.
    kind
        What it is, for `saved_object`.
    arrays
        Tensors by name.
    **facts
        JSON values kept beside.

    Raises
    ------
    ValueError
        For facts that are NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from safetensors.torch import load_file
    >>> from subspan.base import save_arrays
    >>> save_arrays("map.safetensors", "map", {"weight": torch.eye(3)}, rank=2)
    >>> sorted(load_file("map.safetensors"))
    ['weight']
    """
    # Copies, as the format refuses tensors that share memory (a subspace's variances are part of its spectrum).
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in arrays.items()}
    # The format has complex numbers of single precision alone.
    double = [name for name, value in copies.items() if value.dtype == torch.complex128]
    copies |= {name: torch.view_as_real(copies[name].resolve_conj()) for name in double}
    metadata = {
        "subspan": json.dumps({**facts, **({"complex": double} if double else {}), "kind": kind}, allow_nan=False)
    }
    with atomic_write(path) as temporary:
        try:
            save_file(copies, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
