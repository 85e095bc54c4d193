"""Files worth keeping between runs, in one folder that several processes may use at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock


def cache_folder() -> Path:
    """SUBSPAN_CACHE, else `subspan` in the platform's folder for caches; made when absent."""
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


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path | None]:
    """Yield an empty folder that becomes `folder` when the block ends well, or None where `folder` is there already.

    One process fills it, others that ask meanwhile wait and get None.
    """
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            yield None
            return
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            yield unfinished
            unfinished.chmod(0o755)
            unfinished.replace(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
