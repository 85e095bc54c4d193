"""Tensors in safetensors files, with the kind of thing that they are and facts beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.files import atomic_write


def save_arrays(path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Tensor], **facts: Any) -> None:
    """Write tensors of one `kind` to a safetensors file, whole or not at all; `facts` are JSON values kept beside."""
    metadata = {"subspan": json.dumps({**facts, "kind": kind})}
    # Copies, as the format refuses tensors that share memory (a subspace's variances are part of its spectrum).
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in arrays.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(copies, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_arrays(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file written by `save_arrays`. Raises ValueError when it is damaged or of another kind."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as stored:
            facts = json.loads((stored.metadata() or {}).get("subspan", "{}"))
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"path: {os.fspath(path)!r} is not a readable safetensors file ({error})") from error
    found = facts.pop("kind", "something else")
    if found != kind:
        raise ValueError(f"path: {os.fspath(path)!r} holds {found}, expected {kind}")
    return arrays, facts
