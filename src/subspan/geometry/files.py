"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed to `path` on success and removed on any error."""
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path: the folder {str(target.parent)!r} does not exist")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def save_arrays(path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Tensor], **facts: Any) -> None:
    """Write tensors of one `kind` to a safetensors file, whole or not at all; `facts` are JSON values kept beside."""
    metadata = {"subspan": json.dumps({**facts, "kind": kind})}
    # Copies, as the format refuses tensors that share memory (a subspace's variances are part of its spectrum).
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in arrays.items()}
    with atomic_write(path) as temporary:
        save_file(copies, temporary, metadata=metadata)


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
