"""Checkpoint folders of transformers: loaded, told apart by what is in them, and written anew with other weights."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from subspan.base import require
from subspan.base.reading import quoted, read_json
from subspan.datasets.pretrained import without_progress_bars
from subspan.models import StateDelta, StoredWeights

_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".md")


def load_checkpoint(folder: Path, argument: str = "MODEL", *, causal: bool = False, dtype: Any = "auto") -> Any:
    """The model of a folder in evaluation mode; with its head where it is a causal one, or one is needed.

    Raises ValueError, in one line that names the argument, for what is no checkpoint, and for pickled weights.
    """
    transformers = require("transformers", extra="llm")
    StoredWeights(folder)  # pickled weights are refused
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
        whole = causal or "CausalLM" in str(names[0])
        kind = transformers.AutoModelForCausalLM if whole else transformers.AutoModel
        with without_progress_bars(transformers):
            return kind.from_pretrained(str(folder), use_safetensors=True, local_files_only=True, dtype=dtype).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{argument}: {str(folder)!r} cannot be loaded: {str(error).splitlines()[0]}") from None


def load_tokenizer(folder: Path, argument: str = "MODEL") -> Any:
    """The tokenizer of a folder. Raises ValueError, in one line that names the argument, where there is none."""
    transformers = require("transformers", extra="llm")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{argument}: the tokenizer of {str(folder)!r} cannot be loaded: {reason}") from None


def copy_companions(source: Path, target: Path) -> None:
    """What stands beside the weights: configuration and tokenizer, no weights of other kinds and no card."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_NOT_COPIED):
            shutil.copyfile(file, target / file.name)


def stamp(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the weights' files: whether a run that goes on has the same input."""
    return [file_stamp(file) for file in sorted(set(StoredWeights(folder).files.values()))]


def file_stamp(file: Path) -> tuple[str, int, int]:
    """The same of one file."""
    return file.name, file.stat().st_size, file.stat().st_mtime_ns


class ChangedWeights(Mapping[str, Tensor]):
    """A checkpoint's tensors, some of them others, in the stored ones' types; read one at a time.

    Raises ValueError for a changed tensor that the checkpoint does not have.
    """

    def __init__(self, stored: StoredWeights, changed: Mapping[str, Tensor]) -> None:
        if absent := [name for name in changed if name not in stored]:
            raise ValueError(f"MODEL: has no tensor {absent[0]!r}, which the loaded model has")
        self._stored, self._changed = stored, changed

    def __getitem__(self, name: str) -> Tensor:
        old = self._stored[name]
        return self._changed[name].to(old.dtype) if name in self._changed else old

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@contextlib.contextmanager
def naming(path: Path, base: Path) -> Iterator[None]:
    """What is wrong is said of the checkpoint."""
    try:
        yield
    except ValueError as error:
        reason = str(error).removeprefix("base, tuned: ").removeprefix("path: ").removeprefix("delta: ")
        reason = reason.partition("; strict=False")[0].replace("only in base:", f"only in {base.name}:")
        raise ValueError(f"{path}: {reason.replace('only in tuned:', f'only in {path.name}:')}") from None


def update_between(base: Path, path: Path, stored: StoredWeights | None = None) -> StateDelta:
    """The update from `base` (stored: its weights, where several updates share them) to `path`, tensor by tensor.

    Raises ValueError that names `path`, now or when a tensor is read, where it is none of this base.
    """
    with naming(path, base):
        delta = StateDelta.between(stored or StoredWeights(base), StoredWeights(path))

    def block(name: str, rows: slice = slice(None)) -> Tensor:
        with naming(path, base):
            return delta.block(name, rows)

    return StateDelta(delta.shapes, block, block=block)


def stored_bytes(weights: StoredWeights) -> int:
    """Size of a checkpoint's files."""
    return sum(file.stat().st_size for file in set(weights.files.values()))


def check_tokenizer(base: Path, path: Path) -> None:
    """Raise ValueError where both have a tokenizer and the two are not the same. Those of no file are not compared."""
    files = [folder / "tokenizer.json" for folder in (base, path)]
    if not all(file.is_file() for file in files):
        return
    first, second = (_tokens(read_json(file)) for file in files)
    if first == second:
        return
    other = [text for text in first if first[text] != second.get(text)] or [
        each for each in second if each not in first
    ]
    raise ValueError(f"{path}: has another tokenizer than {base}, such as for {quoted(other[0])}")


def _tokens(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Token → id, of the vocabulary and what was added to it; and each merge → its place."""
    model = tokenizer.get("model") or {}
    vocabulary, merges = model.get("vocab") or {}, model.get("merges") or []
    found = dict(vocabulary) if isinstance(vocabulary, dict) else {str(row): i for i, row in enumerate(vocabulary)}
    found |= {f"merge {each}": place for place, each in enumerate(merges)}
    return found | {each["content"]: each["id"] for each in tokenizer.get("added_tokens") or []}
