"""Files and folders that are whole or absent.

What is written is made in a folder beside its place, under a name that nobody can guess, locked while its process
lives, and renamed at the end. Several files are renamed together or not at all. What killed processes have left is
known by a marker inside and goes with the next write in the same folder.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .reading import read_json

_MARKER = "subspan.json"
_NAME = re.compile(r"\..+\.subspan-[a-z0-9_]{8}")
_LONGEST_NAME = 200
_TRIES = 5


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; what is written there is renamed to `path` on success and removed on any error.

    A link is followed; into a pipe or terminal the bytes are copied at the end. Raises ValueError where `path` can be
    no file, OSError that names it where it cannot be written.
    """
    with written_together([Target(Path(path))], exclusive=False) as (temporary,), naming(temporary):
        yield temporary


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors without a file's name, as of a disk that is full in the middle of one, say that `path` is not written."""
    try:
        yield
    except OSError as error:
        if error.filename is None and str(path.parent) not in str(error):
            raise OSError(_unwritten(path, error.strerror or str(error))) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_rows(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns as a table, .csv or .json, whole or not at all."""
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    if path.suffix.lower() == ".json":
        write_text(path, json.dumps(rows, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
        return
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, stream.getvalue())


def write_array(path: Path, values: Any) -> None:
    """Write an array as .npy, whole or not at all."""
    import numpy as np  # the command line asks for help without it

    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.asarray(values), allow_pickle=False)


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """A memory map of a new .npy file, to be filled; its space on the disk is taken before."""
    import numpy as np

    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    reserve(path, path.stat().st_size)
    return mapped


def reserve(path: Path, size: int) -> None:
    """Take `size` bytes on the disk for a file that is there.

    Where the disk is full that is an OSError now, instead of a crash when a memory map of the file is written to.
    """
    with path.open("r+b") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            # A system or file system without it: what is written is there.
            stream.seek(0, os.SEEK_END)
            while (missing := size - stream.tell()) > 0:
                stream.write(bytes(min(missing, 1 << 24)))


class Target(NamedTuple):
    """Where something is to be written.

    resumable: what a killed or stopped run has done stays and is handed to the next one; its path may then be of a
    folder too. overwrite: whether there may be an older one.
    """

    path: Path
    resumable: bool = False
    overwrite: bool = True


@contextlib.contextmanager
def written_together(targets: Sequence[Target], *, exclusive: bool = True) -> Iterator[list[Path]]:
    """Yield a temporary path for each target; those that were written get their names together at the end, or none.

    On an error nothing of this run stays, and everything that was there before. exclusive: ValueError where another
    living process is writing one of the targets. Resumable ones get their names last, so that a run killed in between
    is finished by the next.
    """
    places = [_checked(target.path) for target in targets]
    with contextlib.ExitStack() as stack:
        drafts = []
        for target, place in zip(targets, places):
            folder = stack.enter_context(
                _device_folder()
                if is_device(place)
                else temporary_folder(place, resumable=target.resumable, exclusive=exclusive)
            )
            drafts.append(_Draft(target, place, folder / f"unfinished{target.path.suffix}"))
        with _naming({draft.temporary: draft.target.path for draft in drafts}):
            yield [draft.temporary for draft in drafts]
            written = [draft for draft in drafts if draft.temporary.exists()]
            for draft in written:
                _settle(draft)
            # Pipes first, as writing to one may fail or end the process; what can be resumed last.
            _rename_together(sorted(written, key=lambda draft: (not is_device(draft.place), draft.target.resumable)))


class _Draft(NamedTuple):
    target: Target
    place: Path
    temporary: Path


def _checked(path: Path) -> Path:
    """The place itself, behind links, or ValueError where nothing can be written."""
    if is_device(path):
        return path
    place = Path(os.path.realpath(path))
    if not place.parent.is_dir():
        raise ValueError(f"path: the folder {str(path.parent)!r} does not exist")
    if place.exists() and not place.is_file() and not place.is_dir():
        raise ValueError(f"path: {str(path)!r} is no regular file")
    if place.is_file() and not os.access(place, os.W_OK):
        raise ValueError(f"path: {str(path)!r} must not be written to")
    return place


def is_device(path: Path) -> bool:
    """Whether bytes can be put into it while it must not be replaced: a pipe, a terminal, /dev/null, /dev/stdout."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    # /dev/stdout may lead to a regular file, which its owner has open and whose name is not ours to give away.
    opened = path.is_symlink() and os.path.abspath(path).startswith(("/dev/", "/proc/"))
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or (opened and stat.S_ISREG(mode))


@contextlib.contextmanager
def _device_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="subspan-") as folder:
        yield Path(folder)


def _settle(draft: _Draft) -> None:
    """Give a written file the rights that its place has, or a new file there would have, and put it on the disk."""
    if is_device(draft.place) or draft.temporary.is_dir():
        return
    model = draft.place if draft.place.exists() else draft.temporary.parent / _MARKER
    draft.temporary.chmod(stat.S_IMODE(model.stat().st_mode) & 0o777)
    with draft.temporary.open("rb") as written:
        os.fsync(written.fileno())


def _rename_together(drafts: Sequence[_Draft]) -> None:
    """Rename all; where one fails, those before it are put back as they were."""
    renamed: list[tuple[_Draft, Path | None]] = []
    try:
        for draft in drafts:
            if is_device(draft.place):
                with draft.temporary.open("rb") as written, draft.place.open("wb") as stream:
                    shutil.copyfileobj(written, stream)
                continue
            if not draft.target.overwrite and os.path.lexists(draft.place):
                raise ValueError(f"{str(draft.target.path)!r} appeared while it was written")
            before = _kept(draft) if len(drafts) > 1 else None
            draft.temporary.replace(draft.place)
            renamed.append((draft, before))
    except BaseException:
        for draft, before in reversed(renamed):
            draft.place.replace(draft.temporary)
            if before is not None:
                before.replace(draft.place)
        raise


def _kept(draft: _Draft) -> Path | None:
    """The older file under a second name, or None where there is none."""
    if not draft.place.exists():
        return None
    before = draft.temporary.parent / "before"
    before.unlink(missing_ok=True)
    try:
        os.link(draft.place, before)
    except OSError:  # a file system without hard links
        shutil.copy2(draft.place, before)
    return before


@contextlib.contextmanager
def _naming(paths: dict[Path, Path]) -> Iterator[None]:
    """Errors name the file that was asked for, and not the temporary one."""
    try:
        yield
    except (OSError, ValueError) as error:
        text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        named = str(error.filename) if isinstance(error, OSError) and error.filename is not None else ""
        for temporary, path in paths.items():
            if str(temporary) in text and type(error) in (OSError, ValueError):
                raise type(error)(text.replace(str(temporary), str(path))) from error
            if str(temporary.parent) in named:
                raise OSError(_unwritten(path, text)) from error
        raise


def _unwritten(path: Path, reason: str) -> str:
    return f"{str(path)!r} cannot be written ({reason})"


# ---------------------------------------------------------------------- folders for what is not finished


@contextlib.contextmanager
def temporary_folder(
    target: Path, *, resumable: bool = False, after_errors: bool = False, exclusive: bool = False, wait: bool = False
) -> Iterator[Path]:
    """Yield a locked folder beside `target` to make it in, which is removed at the end with all that is in it.

    A folder, as some writers make temporary files of their own beside the one that they are asked for. resumable: it
    stays where the process is killed or stopped (after_errors: and where it fails), and the next run with the same
    target gets it as it was left; where that one fails it stays too, unless `empty` was called. exclusive (resumable is
    that too): where a living process is writing `target` that is a ValueError, or waited for.
    """
    claim = _claimed(target, resumable, exclusive or resumable, wait)
    keep = False
    try:
        yield claim.folder
    except BaseException as error:
        left = claim.adopted and any(entry.name != _MARKER for entry in claim.folder.iterdir())
        keep = resumable and (left or after_errors or not isinstance(error, Exception))
        raise
    finally:
        _release(claim, remove=not keep)


def discard(path: Path) -> None:
    """Remove a folder so that it is never seen in part, whenever the process is killed."""
    with temporary_folder(path) as folder, contextlib.suppress(FileNotFoundError):
        path.replace(folder / "discarded")


def unfinished_folders(parent: Path) -> list[Path]:
    """What runs have left in a folder, or are making there."""
    return [folder for folder in _folders(parent) if _is_ours(folder)]


def unfinished_target(folder: Path) -> str:
    """The name of what was to be made in an unfinished folder."""
    return str(_marker(folder).get("target", folder.name))


def remove_unfinished(target: Path) -> None:
    """Remove what killed processes have left of writing in the folder of `target`.

    What living ones make is locked and stays, as does what can be resumed, unless it is of `target` itself.
    """
    with contextlib.suppress(OSError):
        for folder in _folders(target.parent):
            remove_left(folder, resumable=folder.name.startswith(_prefix(target)))


def remove_left(folder: Path, *, resumable: bool) -> bool:
    """Remove an unfinished folder that no living process has, one that can be resumed only if `resumable`."""
    claim = _locked(folder)
    try:
        gone = claim.handle is not None and _is_ours(folder) and (resumable or not _marker(folder).get("resumable"))
        if gone:
            _remove(folder)
        return gone
    finally:
        _release(claim, remove=False)


class _Claim(NamedTuple):
    """A folder and the handle that locks it; `held`: another process has it; `adopted`: an earlier run made it."""

    folder: Path
    handle: int | None = None
    held: bool = False
    adopted: bool = False


def _claimed(target: Path, resumable: bool, exclusive: bool, wait: bool) -> _Claim:
    tries = 0
    while True:
        if not exclusive or not _written_elsewhere(target):
            left = _left_over(target) if resumable else None
            remove_unfinished(target)
            claim = left or _new_folder(target, resumable)
            if not exclusive or not _written_elsewhere(target, claim.folder):
                return claim
            # Of two that start at once each may see the other: they try again at different times.
            _release(claim, remove=not claim.adopted)
        tries += 1
        if tries == _TRIES and not wait:
            raise ValueError(f"{str(target)!r} is being written by another process")
        time.sleep(random.uniform(0.01, 0.1) * min(tries, _TRIES))


def _new_folder(target: Path, resumable: bool) -> _Claim:
    claim = None
    try:
        while claim is None:
            folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
            claim = _locked(folder, wait=True)
            if not folder.exists():  # another process took it for a left one before it was locked
                _release(claim, remove=False)
                claim = None
        facts = {"made by": "subspan", "process": os.getpid(), "host": socket.gethostname(), "target": target.name,
                 "resumable": resumable}  # fmt: skip
        # Made so that it has the rights of any new file: asking for the umask would change it for a moment, for all.
        handle = os.open(claim.folder / _MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(facts, stream)
    except PermissionError as error:
        raise ValueError(f"path: the folder {str(target.parent)!r} cannot be written to") from error
    except OSError as error:
        if claim is not None:
            _release(claim, remove=True)
        raise OSError(_unwritten(target, error.strerror or str(error))) from error
    return claim


def _left_over(target: Path) -> _Claim | None:
    """What a killed or stopped run has left of a resumable `target`, locked."""
    with contextlib.suppress(OSError):
        for folder in _folders(target.parent, _prefix(target)):
            claim = _locked(folder)
            if claim.handle is not None and _marker(folder).get("resumable"):
                return claim._replace(adopted=True)
            _release(claim, remove=False)
    return None


def _written_elsewhere(target: Path, own: Path | None = None) -> bool:
    for folder in _folders(target.parent, _prefix(target)):
        if folder != own:
            claim = _locked(folder)
            _release(claim, remove=False)
            if claim.held:
                return True
    return False


def _prefix(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME // 8]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".{name}.subspan-"


def _folders(parent: Path, prefix: str = ".") -> list[Path]:
    """Folders that have names as `_new_folder` gives them; no links."""
    with os.scandir(parent) as entries:
        return [
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(prefix) and _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]


def _marker(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / _MARKER)
    except ValueError:
        return {}


def _is_ours(folder: Path) -> bool:
    """Whether it has the marker, or its process was killed before it wrote that and put nothing else in."""
    if _marker(folder).get("made by") == "subspan":
        return True
    try:
        return all(entry.name == _MARKER and not entry.stat().st_size for entry in folder.iterdir())
    except OSError:  # a living process has removed it meanwhile
        return False


def empty(folder: Path) -> None:
    """Remove what is in a temporary folder, so that there is nothing to resume."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _MARKER:
            entry.unlink()


def _remove(folder: Path) -> None:
    """Remove a folder, its marker last, so that what a kill leaves of it is still known."""
    with contextlib.suppress(OSError):
        empty(folder)
        (folder / _MARKER).unlink(missing_ok=True)
        folder.rmdir()


# ---------------------------------------------------------------------- locks


def _locked(folder: Path, *, wait: bool = False) -> _Claim:
    """A lock on a folder, until it is released or its process ends; no handle where it is held or none can be had."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return _Claim(folder)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        return _Claim(folder, held=isinstance(error, BlockingIOError))
    return _Claim(folder, handle)


def _release(claim: _Claim, *, remove: bool) -> None:
    if remove:
        _remove(claim.folder)
    if claim.handle is not None:
        import fcntl

        # Said, and not only closed: a process that was forked meanwhile has the handle too.
        fcntl.flock(claim.handle, fcntl.LOCK_UN)
        os.close(claim.handle)
