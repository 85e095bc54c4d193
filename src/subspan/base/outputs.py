"""What a run writes: checked against what it reads before any work, and given its names together at the end."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from .files import Target, is_device, remove_unfinished, written_together

# Files that no reader of a folder takes for a part of it.
_NEVER_INPUT = (".html", ".htm", ".csv", ".json", ".txt")


class Output(NamedTuple):
    """A file to write, as the option `option` names it; None where it is not wanted.

    suffixes: what it may end in (anything, where there are none). resumable, overwrite: as of `files.Target`.
    """

    option: str
    path: Path | None
    suffixes: tuple[str, ...] = ()
    resumable: bool = False
    overwrite: bool = True


class Outputs:
    """The outputs of a run, to be entered for its work; `outputs[path]` is where to write what becomes `path`.

    inputs: files and folders that are read; names of other things (columns, addresses, None) do not matter. Raises
    ValueError, before anything is done, for an output that is an input or lies in one, for two that are one file, for
    a wrong suffix, a missing folder, or a place that cannot be written. All outputs get their names when the work is
    done, or none: on an error those of an earlier run stay.
    """

    def __init__(self, *outputs: Output, inputs: Iterable[str | os.PathLike[str] | None] = ()) -> None:
        self._outputs = [output for output in outputs if output.path is not None]
        self._stack = contextlib.ExitStack()
        self._temporary: dict[Path, Path] = {}
        read = [Path(name) for name in inputs if name is not None and _exists(name)]
        for place, output in enumerate(self._outputs):
            for name in read:
                _check_apart(output, name)
            for other in self._outputs[:place]:
                if _key(output) == _key(other) or _is_same(_path(output), _path(other)):
                    raise ValueError(f"{output.option}: {str(output.path)!r} is the file of {other.option} too")
        for output in self._outputs:
            _check(output)

    def __enter__(self) -> Outputs:
        targets = [Target(_path(output), output.resumable, output.overwrite) for output in self._outputs]
        written = self._stack.enter_context(written_together(targets))
        self._temporary = dict(zip((_path(output) for output in self._outputs), written))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def __getitem__(self, path: Path) -> Path:
        return self._temporary[path]


def _path(output: Output) -> Path:
    assert output.path is not None
    return output.path


def _exists(name: str | os.PathLike[str]) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _check(output: Output) -> None:
    option, path, suffixes = output.option, _path(output), output.suffixes
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option}: {str(path)!r} must end in {', '.join(suffixes)}")
    if is_device(path):
        return
    if path.is_dir():
        raise ValueError(f"{option}: {str(path)!r} is a folder")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option}: {str(path)!r} is no regular file")
    parent = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not parent.is_dir():
        raise ValueError(f"{option}: the folder {str(parent)!r} does not exist")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{option}: the folder {str(parent)!r} cannot be written to")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option}: {str(path)!r} cannot be written to")
    if not output.overwrite and os.path.lexists(path):
        remove_unfinished(path)  # of a run that was killed when it had all but tidied up
        raise ValueError(f"{option}: {str(path)!r} exists; remove it or choose another name")


def _check_apart(output: Output, name: Path) -> None:
    path = _path(output)
    if _is_same(path, name):
        raise ValueError(f"{output.option}: {str(path)!r} is input, which is never overwritten; choose another name")
    place, folder = Path(os.path.realpath(path)), Path(os.path.realpath(name))
    inside = folder.is_dir() and any(_is_same(parent, folder) for parent in place.parents)
    if inside and not (path.suffix.lower() in _NEVER_INPUT and path.name != "meta.json"):
        raise ValueError(f"{output.option}: {str(path)!r} lies in {str(name)!r}, which is input; choose another place")


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths are one file: by other names, links of both kinds, or another case where that is ignored."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def _key(output: Output) -> str:
    """What is the same for names that some file system takes for one."""
    return unicodedata.normalize("NFC", os.path.realpath(_path(output))).casefold()
