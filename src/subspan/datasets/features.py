"""Extracted features kept between runs, under what they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import numbers
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from subspan.base.files import atomic_write, new_array, remove_unfinished, temporary_folder, write_text

from .cache import entry_description, entry_folder


def cached_features(
    compute: Callable[[int], Iterable[Any]],
    *,
    model: nn.Module | None = None,
    data: Any = None,
    options: Mapping[str, Any] | None = None,
    shard_rows: int = 4096,
) -> np.ndarray:
    """The rows that a function gives, from the cache where they were computed before.

    The key is what `fingerprint` makes of model, data, options and the version of this library. Rows are kept in shards
    until all are there, so that a run that was stopped goes on where it was. Of several processes with the same key one
    computes, the others wait for it. Damaged files are computed again.

    Parameters
    ----------
    compute
        compute(start) yields blocks of rows (arrays or tensors) from row `start` on: 0 at first, the number of finished
        rows where an earlier run was stopped.
    model, data
        What the rows are computed with and of; anything that `fingerprint` takes.
    options
        Everything else that the rows depend on: layers, pooling, sizes, …
    shard_rows
        The least number of rows in a shard.

    Returns
    -------
    Read-only memory map, (n, …)

    Raises
    ------
    ValueError
        Where `compute` yields no rows or blocks of different widths.

    Examples
    --------
    >>> import os
    >>> from unittest import mock
    >>> import numpy as np
    >>> from subspan.datasets import cached_features
    >>> with mock.patch.dict(os.environ, SUBSPAN_CACHE="rows"):
    ...     first = cached_features(lambda start: [np.eye(3)[start:]], options={"pool": "mean"})
    ...     again = cached_features(lambda start: [], options={"pool": "mean"})
    >>> first.shape, bool((first == again).all())
    ((3, 3), True)
    """
    if shard_rows < 1:
        raise ValueError(f"shard_rows: at least 1, got {shard_rows}")
    key = fingerprint({"model": model, "data": data, "options": options, "version": _version()})
    folder = entry_folder("features", key)
    finished = _finished(folder)
    if finished is not None:
        remove_unfinished(folder)  # of a run that was killed when it had all but tidied up
        return finished
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder, resumable=True, after_errors=True, wait=True) as unfinished:
        finished = _finished(folder)
        if finished is not None:  # another process made it meanwhile
            return finished
        _compute_shards(unfinished, compute, shard_rows)
        made = unfinished / "made"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        _join_shards(unfinished, made, {name: repr(value) for name, value in (options or {}).items()})
        if folder.exists():  # a damaged one
            folder.replace(unfinished / "damaged")
        made.replace(folder)
        finished = _finished(folder)
    if finished is None:
        raise OSError(f"{str(folder)!r} was removed as soon as it was made")
    return finished


def fingerprint(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value's content.

    Parameters
    ----------
    value
        None, numbers, texts, bytes, paths (a file's content), arrays, tensors, modules (class, and every parameter's
        and buffer's name, type, shape and content), dataclasses, image collections (the files' content), and mappings
        and sequences of these.

    Returns
    -------
    str of 64 digits.

    Raises
    ------
    TypeError
        For other values.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.datasets import fingerprint
    >>> fingerprint([np.eye(2), "a"]) == fingerprint([np.eye(2), "a"]) != fingerprint([np.eye(2), "b"])
    True
    """
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def _version() -> str:
    return importlib.metadata.version("subspan")


def _finished(folder: Path) -> np.ndarray | None:
    """The joined rows, or None where they are missing, cut off or not what was described."""
    described = entry_description(folder)
    if not described:
        return None
    rows = _mapped(folder / "features.npy")
    if rows is None or list(rows.shape) != described.get("shape") or str(rows.dtype) != described.get("dtype"):
        return None
    return rows


def _mapped(file: Path) -> np.ndarray | None:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _shards(folder: Path) -> list[np.ndarray]:
    """The whole shards from the first on; what follows a missing or damaged one is removed."""
    files, shards = sorted(folder.glob("part-*.npy")), []
    for index, file in enumerate(files):
        shard = _mapped(file) if file.name == f"part-{index:06d}.npy" else None
        if shard is None or (shards and shard.shape[1:] != shards[0].shape[1:]):
            for rest in files[index:]:
                rest.unlink()
            break
        shards.append(shard)
    return shards


def _compute_shards(folder: Path, compute: Callable[[int], Iterable[Any]], shard_rows: int) -> None:
    shards = _shards(folder)
    index, done = len(shards), sum(len(shard) for shard in shards)
    width = shards[0].shape[1:] if shards else None
    waiting: list[np.ndarray] = []
    for block in compute(done):
        rows = block.detach().cpu().numpy() if isinstance(block, Tensor) else np.asarray(block)
        if rows.dtype == object or rows.ndim < 1:
            raise ValueError(f"compute: blocks of numeric rows are needed, got {rows.dtype} of shape {rows.shape}")
        width = rows.shape[1:] if width is None else width
        if rows.shape[1:] != width:
            raise ValueError(f"compute: a block of rows {rows.shape[1:]} follows blocks of rows {width}")
        waiting.append(rows)
        if sum(map(len, waiting)) >= shard_rows:
            _write_shard(folder, index, waiting)
            index, waiting = index + 1, []
    if sum(map(len, waiting)):
        _write_shard(folder, index, waiting)
    elif not index:
        raise ValueError("compute: no rows were given")


def _write_shard(folder: Path, index: int, blocks: list[np.ndarray]) -> None:
    with atomic_write(folder / f"part-{index:06d}.npy") as unfinished:
        np.save(unfinished, np.concatenate(blocks), allow_pickle=False)


def _join_shards(folder: Path, made: Path, options: dict[str, str]) -> None:
    shards = _shards(folder)
    shape = (sum(len(shard) for shard in shards), *shards[0].shape[1:])
    dtype = np.result_type(*shards)
    with atomic_write(made / "features.npy") as temporary:
        joined = new_array(temporary, dtype, shape)
        start = 0
        for shard in shards:
            joined[start : start + len(shard)] = shard
            start += len(shard)
        joined.flush()
        del joined
    write_text(made / "entry.json", json.dumps({"shape": list(shape), "dtype": str(dtype), "options": options}))


def _pieces(value: Any) -> Iterator[bytes | memoryview]:
    """The content as bytes, each kind marked, so that different values never give the same sequence."""
    if value is None or isinstance(value, bool | numbers.Number | np.generic):
        yield f"{type(value).__name__}:{value!r}".encode()
    elif isinstance(value, str):
        yield b"text"
        yield value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        yield b"bytes"
        yield value
    elif isinstance(value, torch.dtype | torch.device):
        yield f"torch:{value}".encode()
    elif isinstance(value, Path):
        yield b"file"
        with value.open("rb") as stream:
            yield hashlib.file_digest(stream, "sha256").digest()
    elif isinstance(value, Tensor):
        yield f"tensor:{value.dtype}:{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("data: an array of Python objects has no fingerprint")
        yield f"array:{value.dtype.str}:{value.shape}".encode()
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    elif isinstance(value, nn.Module):
        yield f"module:{type(value).__module__}.{type(value).__qualname__}".encode()
        yield from _pieces({name: tensor for name, tensor in value.state_dict().items() if isinstance(tensor, Tensor)})
    elif hasattr(value, "names") and callable(getattr(value, "read", None)):
        yield b"images"
        for name in value.names:
            yield name.encode()
            yield value.read(name)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"dataclass:{type(value).__qualname__}".encode()
        yield from _pieces({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        yield f"mapping:{len(value)}".encode()
        for name, entry in sorted(value.items(), key=lambda item: str(item[0])):
            yield from _pieces(name)
            yield from _pieces(entry)
    elif isinstance(value, Sequence):
        yield f"sequence:{len(value)}".encode()
        for entry in value:
            yield from _pieces(entry)
    else:
        raise TypeError(
            f"data: {type(value).__name__} has no fingerprint; give arrays, texts, paths or numbers instead"
        )
