"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; what is written there is renamed to `path` on success and removed on any error."""
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path: the folder {str(target.parent)!r} does not exist")
    with temporary_folder(target) as folder:
        temporary = folder / f"unfinished{target.suffix}"
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that is removed at the end, with all that was put into it.

    A folder, as some writers make temporary files of their own beside the one that they are asked for. What processes
    that were killed have left of such folders is removed first.
    """
    remove_unfinished(target)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        handle = _lock(folder, wait=True)
        if folder.exists():
            break
        _unlock(handle)  # another process took it for a left one before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(handle)


def remove_unfinished(target: Path) -> None:
    """Remove what killed processes have left of writing `target`; the folders of living ones are locked and stay."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.????????"):
        handle = _lock(folder, wait=False) if folder.is_dir() else None
        if handle is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(handle)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A handle that locks a folder until it is closed or its process ends; None where no lock can be had."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


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
