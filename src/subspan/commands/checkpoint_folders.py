"""Checkpoint folders of transformers: loaded, told apart by what is in them, and written anew with other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from subspan.base import require
from subspan.datasets.pretrained import without_progress_bars
from subspan.models import StoredWeights

_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".md")


def load_checkpoint(folder: Path, *, causal: bool = False, dtype: Any = "auto") -> Any:
    """The model of a folder in evaluation mode; with its head where it is a causal one, or one is needed.

    Raises ValueError, in one line, for what is no checkpoint, and for pickled weights.
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
        raise ValueError(f"MODEL: {str(folder)!r} cannot be loaded: {str(error).splitlines()[0]}") from None


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
