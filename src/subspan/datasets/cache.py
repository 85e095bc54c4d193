"""The folder of what is kept between runs, which several processes may use at once: its entries, finished and not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from subspan.base.files import (
    discard,
    remove_left,
    remove_unfinished,
    temporary_folder,
    unfinished_folders,
    unfinished_target,
)
from subspan.base.reading import read_json

KINDS = (
    "features", "models", "dual-encoder", "point-network", "small-networks", "sts-views", "style-generators",
    "taught-blocks", "channels", "vortex-street",
)  # fmt: skip
"""All that the library keeps in its cache; each kind has a folder there."""


def cache_folder() -> Path:
    """The folder that features and converted models are kept in; made when absent.

    It is SUBSPAN_CACHE, else `subspan` in the platform's folder for caches.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        Where the folder cannot be made.

    Examples
    --------
    >>> import os
    >>> from unittest import mock
    >>> from subspan.datasets import cache_folder
    >>> with mock.patch.dict(os.environ, SUBSPAN_CACHE="kept"):
    ...     print(cache_folder().name)
    kept
    """
    chosen = os.environ.get("SUBSPAN_CACHE")
    if chosen:
        folder = Path(chosen).expanduser()
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "subspan"
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "subspan" / "Cache"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "subspan"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"SUBSPAN_CACHE: the folder {str(folder)!r} cannot be made ({error.strerror})") from error
    return folder


def entry_folder(kind: str, key: str) -> Path:
    """Where an entry of one of `KINDS` is, or is to be."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    folder = cache_folder() / kind
    return folder / key[:2] / key if kind == "features" else folder / key


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """One set of features, converted model or other thing in the cache; unfinished ones are being made or left over."""

    folder: Path
    kind: str
    key: str
    megabytes: float
    modified: float
    options: Mapping[str, str]
    finished: bool = True


def cache_entries() -> list[CacheEntry]:
    """What the cache holds, finished or not, oldest first.

    Returns
    -------
    list of CacheEntry
        Each with folder, kind, key, megabytes, modified (seconds since 1970), options, and whether it is finished.

    Examples
    --------
    >>> import os
    >>> from unittest import mock
    >>> from subspan.datasets import cache_entries
    >>> with mock.patch.dict(os.environ, SUBSPAN_CACHE="empty"):
    ...     print(cache_entries())
    []
    """
    entries = []
    for kind in KINDS:
        for parent in _parents(kind):
            unfinished = unfinished_folders(parent)
            finished = [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
            entries += [_entry(kind, folder, finished=folder not in unfinished) for folder in finished + unfinished]
    return sorted(entries, key=lambda entry: entry.modified)


def clear_cache(*, older_than_days: float = 0.0) -> float:
    """Remove the entries of the cache that are old enough and that no process is making.

    Parameters
    ----------
    older_than_days
        The least age, in days; 0: all.

    Returns
    -------
    float: the megabytes freed.

    Examples
    --------
    >>> import os
    >>> from unittest import mock
    >>> from subspan.datasets import cache_entries, clear_cache
    >>> with mock.patch.dict(os.environ, SUBSPAN_CACHE="cleared"):
    ...     freed = clear_cache(older_than_days=30)
    >>> freed
    0.0
    """
    freed = 0.0
    for entry in cache_entries():
        if time.time() - entry.modified < older_than_days * 86400:
            continue
        if entry.finished:
            discard(entry.folder)
        elif not remove_left(entry.folder, resumable=True):
            continue
        freed += entry.megabytes
    return freed


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path | None]:
    """Yield an empty folder that becomes `folder` when the block ends well, or None where `folder` is there already.

    One process fills it, others that ask meanwhile wait and get None.
    """
    if folder.is_dir():
        remove_unfinished(folder)
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder, exclusive=True, wait=True) as unfinished:
        if folder.is_dir():
            yield None
            return
        made = unfinished / "made"
        made.mkdir()
        yield made
        made.replace(folder)


def _parents(kind: str) -> list[Path]:
    """The folders that hold the entries of a kind."""
    folder = cache_folder() / kind
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir()) if kind == "features" else [folder]


def _entry(kind: str, folder: Path, *, finished: bool) -> CacheEntry:
    size, modified = 0, 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # of a living process, which removes its temporary files
            stat = path.stat()
            size, modified = size + (stat.st_size if path.is_file() else 0), max(modified, stat.st_mtime)
    key = folder.name if finished else unfinished_target(folder)
    return CacheEntry(folder, kind, key, size / 2**20, modified, entry_description(folder).get("options", {}), finished)


def entry_description(folder: Path) -> dict[str, Any]:
    """What an entry says of itself, {} where it says nothing."""
    try:
        return read_json(folder / "entry.json")
    except ValueError:
        return {}
