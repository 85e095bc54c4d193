"""Weights of a checkpoint in safetensors, read and written one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from subspan.base.files import temporary_folder, write_text
from subspan.base.reading import quoted, read_json, reading, regular_file

# Numbers that are worked on at a time: in float32 they and what is made of them stay in the processor's cache.
BLOCK = 1 << 18
_INDEX = ".safetensors.index.json"
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}
_PROBLEM = "is not a readable safetensors file"


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a safetensors file, or of the shards that an index lists: each is read when it is asked for.

    Parameters
    ----------
    path
        A .safetensors file, an index (…safetensors.index.json), or a folder with one of the two.

    Raises
    ------
    ValueError
        Where there is none, a shard is missing, or a file is damaged.

    Examples
    --------
    >>> import tempfile, torch
    >>> from subspan.models import StoredWeights, write_weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_weights({"a": torch.ones(2), "b": torch.zeros(3)}, f"{folder}/model", shard_bytes=8)
    ...     stored = StoredWeights(f"{folder}/model")
    ...     print({name: tuple(stored[name].shape) for name in stored}, len(set(stored.files.values())))
    {'a': (2,), 'b': (3,)} 2
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.files: dict[str, Path] = _files(Path(path))
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._last: tuple[tuple[str, int, int], Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        file = self.files[name]
        with reading(file, problem=_PROBLEM), safe_open(file, framework="pt") as stored:
            return stored.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files  # a mapping's own way is to read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def described(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """(shape, type) of a tensor, which is not read for it."""
        file = self.files[name]
        with reading(file, problem=_PROBLEM):
            part = self._header(file)[1][name]
            if part["dtype"] in _DTYPES:
                return torch.Size(part["shape"]), _DTYPES[part["dtype"]]
            with safe_open(file, framework="pt") as stored:
                value = stored.get_tensor(name)
        return value.shape, value.dtype

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor, not to be written to; the others are not read, nor is the file mapped into memory.

        What was asked for last is kept: an update and its base are often wanted one after the other.
        """
        file = self.files[name]
        with reading(file, problem=_PROBLEM):
            end, header = self._header(file)
            part = header[name]
            shape, dtype = part["shape"], _DTYPES[part["dtype"]]
            start, stop, _ = rows.indices(shape[0])
            last = self._last
            if last is not None and last[0] == (name, start, stop):
                return last[1]
            row = math.prod(shape[1:]) * dtype.itemsize
            found = torch.empty((stop - start) * row, dtype=torch.uint8)
            with file.open("rb", buffering=0) as stream:
                stream.seek(end + part["data_offsets"][0] + start * row)
                if stream.readinto(found.numpy().data) != len(found):
                    raise ValueError("the file ends before its tensors do")
        value = found.view(dtype).view(stop - start, *shape[1:])
        self._last = ((name, start, stop), value)
        return value

    def _header(self, file: Path) -> tuple[int, dict[str, Any]]:
        """Where the header of a file ends, and what it says; checked the first time."""
        if file not in self._headers:
            with safe_open(file, framework="pt"), file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                self._headers[file] = (8 + size, json.loads(stream.read(size)))
        return self._headers[file]


class RowBlocks(ABC, Mapping[str, Tensor]):
    """Tensors by name that can be had some rows at a time, so that none is held whole: `write_weights` takes them so.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import RowBlocks, StateDelta
    >>> base = {"w": torch.zeros(3)}
    >>> tuned = StateDelta.between(base, {"w": torch.ones(3)}).added_to(base)
    >>> isinstance(tuned, RowBlocks), tuned.described("w"), [len(block) for block in tuned.blocks("w")]
    (True, (torch.Size([3]), torch.float32), [3])
    """

    @abstractmethod
    def described(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """(shape, type) of a tensor, which is not computed for it."""

    @abstractmethod
    def blocks(self, name: str) -> Iterator[Tensor]:
        """The rows of a tensor in their order, some at a time."""


def row_slices(shape: Sequence[int]) -> list[slice]:
    """Rows of a tensor of this shape in blocks of a quarter of a million numbers, always the same ones."""
    if not shape or math.prod(shape) <= BLOCK:
        return [slice(None)]
    step = max(1, BLOCK // math.prod(shape[1:]))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _files(path: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    if path.is_dir():
        found = sorted(path.glob(f"*{_INDEX}")) or sorted(path.glob("*.safetensors"))
        pickled = [file.name for suffix in _PICKLED for file in sorted(path.glob(f"*{suffix}"))]
        if not found and pickled:
            raise ValueError(
                f"path: {str(path)!r} has pickled weights ({pickled[0]}), which are not read; safetensors are"
            )
        if len(found) != 1:
            raise ValueError(f"path: {str(path)!r} has {len(found)} safetensors files or indexes, one is needed")
        path = found[0]
    regular_file(path)
    if not path.name.endswith(_INDEX):
        with reading(path, problem=_PROBLEM), safe_open(path, framework="pt") as stored:
            return dict.fromkeys(stored.keys(), path)
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"path: {str(path)!r} has no weight_map of file names")
    for shard in sorted(set(listed.values())):
        if Path(shard).name != shard or not (path.parent / shard).is_file():
            raise ValueError(f"path: {str(path)!r} lists {quoted(shard)}, and there is no such file beside it")
    return {name: path.parent / shard for name, shard in listed.items()}


def weights_of(source: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """Tensors by name, of a module, a mapping or a checkpoint.

    Parameters
    ----------
    source
        A module (tied tensors count once), a mapping, which is returned itself, or the path of a checkpoint
        (`StoredWeights`).

    Returns
    -------
    Mapping of names to tensors; nothing is copied.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import weights_of
    >>> list(weights_of(torch.nn.Linear(4, 2)))
    ['weight', 'bias']
    """
    if isinstance(source, nn.Module):
        kept = source.state_dict().keys()
        return dict(source.named_parameters()) | {n: b for n, b in source.named_buffers() if n in kept}
    return source if isinstance(source, Mapping) else StoredWeights(source)


def write_weights(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: str | os.PathLike[str],
    *,
    shard_bytes: int = 5 << 30,
    resume: str | None = None,
    finish: Callable[[Path], object] | None = None,
) -> None:
    """Write tensors to a new folder as transformers does: one file, or shards and their index; whole or not at all.

    Parameters
    ----------
    tensors
        Mapping, or pairs (name, tensor) that may be made while it is written: no more than one shard is held, and of
        `RowBlocks` no more than a block of rows.
    folder
        Must not exist yet.
    shard_bytes
        Upper size of a shard; a larger tensor has one to itself.
    resume
        What the tensors depend on, in a text: where the process was killed, a call with the same text goes on after
        the shards that it finds. For a mapping, whose tensors are computed when they are asked for.
    finish
        Is called with the folder once the weights are in it, before it gets its name: to add a configuration.

    Raises
    ------
    ValueError
        Where the folder exists, a name comes twice, or there is nothing to write.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StoredWeights, write_weights
    >>> write_weights({"a": torch.ones(2), "b": torch.zeros(3)}, "written")
    >>> StoredWeights("written")["a"]
    tensor([1., 1.])
    """
    target = Path(os.path.realpath(folder))
    if target.exists():
        raise ValueError(f"folder: {str(folder)!r} exists; give a new one")
    if not target.parent.is_dir():
        raise ValueError(f"folder: {str(target.parent)!r} does not exist")
    if resume is not None and not isinstance(tensors, Mapping):
        raise ValueError("resume: needs a mapping, of which the tensors that are written are not computed again")
    with temporary_folder(target, exclusive=True, resumable=resume is not None) as unfinished:
        made, so_far = unfinished / "made", unfinished / "so_far.json"
        settings = f"{resume} in shards of {shard_bytes} bytes"
        shards, total = _so_far(so_far, settings)
        if not shards and made.exists():
            shutil.rmtree(made)
        made.mkdir(exist_ok=True)
        written = {name for listed in shards for name in listed}

        def done(listed: list[str], size: int) -> None:
            nonlocal total
            shards.append(listed)
            total += size
            if resume is not None:
                write_text(so_far, json.dumps({"settings": settings, "shards": shards, "total": total}))

        if isinstance(tensors, RowBlocks):
            left = {name: tensors.described(name) for name in tensors if name not in written}
            for listed in _planned(left, shard_bytes):
                size = _stream_shard(tensors, {name: left[name] for name in listed}, made / f"{len(shards)}")
                done(listed, size)
        else:
            for part in _gathered(tensors, written, shard_bytes):
                _write_shard(part, made / f"{len(shards)}")
                done(list(part), sum(value.nbytes for value in part.values()))
        if not shards:
            raise ValueError("tensors: at least one is needed")
        names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
        names = names if len(names) > 1 else ["model.safetensors"]
        for number, name in enumerate(names):
            (made / f"{number}").replace(made / name)
        if len(names) > 1:
            weight_map = {tensor: name for name, listed in zip(names, shards) for tensor in listed}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (made / f"model{_INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if finish is not None:
            finish(made)
        made.replace(target)


def _so_far(path: Path, settings: str) -> tuple[list[list[str]], int]:
    """The names in the shards that a run of the same settings has finished, and the bytes in them."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            return found["shards"], found["total"]
    except (OSError, ValueError, KeyError):  # no run before, or killed while it wrote this
        pass
    return [], 0


def _gathered(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], written: set[str], shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Tensors of a shard each, but for those that are written."""
    if isinstance(tensors, Mapping):
        mapping: Any = tensors
        left = [name for name in mapping if name not in written]
        pairs: Iterable[tuple[str, Tensor]] = ((name, mapping[name]) for name in left)
    else:
        pairs = tensors
    part: dict[str, Tensor] = {}
    seen, size = set(written), 0
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"tensors: {name!r} comes twice")
        if part and size + value.nbytes > shard_bytes:
            yield part
            part, size = {}, 0
        # A copy, as the format refuses tensors that share memory.
        part[name] = value.detach().cpu().contiguous().clone()
        seen.add(name)
        size += value.nbytes
    if part:
        yield part


def _planned(described: Mapping[str, tuple[torch.Size, torch.dtype]], shard_bytes: int) -> Iterator[list[str]]:
    """Names of a shard each."""
    part: list[str] = []
    size = 0
    for name, (shape, dtype) in described.items():
        more = math.prod(shape) * dtype.itemsize
        if part and size + more > shard_bytes:
            yield part
            part, size = [], 0
        part.append(name)
        size += more
    if part:
        yield part


def _stream_shard(tensors: RowBlocks, described: Mapping[str, tuple[torch.Size, torch.dtype]], path: Path) -> int:
    """Write tensors as the format has them, block by block; returns their bytes."""
    # The widest types first, so that every tensor is aligned.
    names = sorted(described, key=lambda name: (-described[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, dtype = described[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            left = math.prod(described[name][0])
            for block in tensors.blocks(name):
                value = block.detach().to("cpu", described[name][1]).contiguous()
                left -= value.numel()
                file.write(value.flatten().view(torch.uint8).numpy().data)
            if left:
                raise ValueError(f"tensors: the blocks of {name!r} are not as long as it is")
        file.flush()
        os.fsync(file.fileno())
    return end


def _write_shard(part: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(part, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
