"""Files from anywhere: whatever reading one raises becomes one ValueError, in one line, that names the file."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 64 * 2**20
MAX_UNPACKED_BYTES = 16 * 2**30
_MAX_FIELD = 2**24
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device"}  # fmt: skip
# Control characters, marks that turn the direction of writing, line separators, halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def quoted(value: Any, limit: int = 80) -> str:
    """`repr` of a value as a message shows it: of a long one the middle is left out."""
    if isinstance(value, str) and len(value) > 4 * limit:
        value = value[: 2 * limit] + value[-2 * limit :]
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 20]}...{text[-17:]}"


def printable(text: str) -> str:
    """Text for a terminal: what would move the cursor, turn the writing or is no character stands as its escape."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def readable_name(path: str | os.PathLike[str]) -> str:
    """A file's name as text that can be written: bytes of it that are not UTF-8 stand as escapes."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")


def characters(text: str, where: str) -> str:
    """`text`, or ValueError where it holds half of a surrogate pair, which is no character and cannot be written."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"{where} holds the code point U+{code:04X}, which is no character") from error
    return text


def regular_file(path: str | os.PathLike[str], name: str = "path") -> Path:
    """`path`, where it is a file; ValueError where it is missing, a folder, or a pipe, which would be waited for."""
    source = Path(path)
    try:
        mode = source.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{name}: {str(source)!r} does not exist") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {quoted(str(source), 200)} cannot be read ({_reason(error)})") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name}: {str(source)!r} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}")
    return source


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], name: str = "path", problem: str = "cannot be read") -> Iterator[None]:
    """Raise one ValueError, `name: 'path' problem (reason)`, for whatever a file makes its reader raise.

    What already names the file passes, and so does the lack of an optional dependency.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        shown = os.fspath(path)
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError) and _names(error, shown):
            raise
        raise ValueError(f"{name}: {shown!r} {problem} ({_reason(error)})") from error


def _names(error: ValueError, shown: str) -> bool:
    return any(form in str(error) for form in (repr(shown), shown))


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "more memory is needed than there is"
    if isinstance(error, RecursionError):
        return "nested too deep"
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
    line = printable(" ".join(text.split()))
    return line if len(line) <= 200 else f"{line[:160]}...{line[-37:]}"


def memory_bytes() -> int:
    """What this process may hold: the machine's memory, or the limit of its container or of the process itself."""
    limits = []
    with contextlib.suppress(AttributeError, OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(file).read_text(encoding="ascii")))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min(limits, default=2**63)


def check_memory(size: int, what: str) -> None:
    """ValueError where `size` bytes, which `what` declares or has come to, are more than this machine holds."""
    if size > memory_bytes():
        raise ValueError(f"{what} takes {size / 2**30:.3g} GiB, this machine has {memory_bytes() / 2**30:.3g}")


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The first `most` bytes of a regular file, unpacked where it ends in .gz."""
    source = regular_file(path)
    parts = []
    with reading(source), gzip.open(source) if source.suffix.lower() == ".gz" else source.open("rb") as stream:
        while most > 0 and (part := stream.read(min(most, 1 << 24))):
            parts.append(part)
            most -= len(part)
        return b"".join(parts)


# ---------------------------------------------------------------------- text


class _Bounded(io.RawIOBase):
    """Bytes of a file, unpacked where it ends in .gz; one line, or all that is unpacked, has an upper size."""

    def __init__(self, source: Path) -> None:
        self._packed = source.suffix.lower() == ".gz"
        self._raw: Any = gzip.open(source, "rb") if self._packed else source.open("rb", buffering=0)  # noqa: SIM115
        self._source = source
        self._line = self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        data = bytes(buffer[:count])
        last = max(data.rfind(b"\n"), data.rfind(b"\r"))
        self._line = self._line + count if last < 0 else count - last - 1
        self._total += count
        if self._line > MAX_LINE_BYTES:
            raise ValueError(f"path: {str(self._source)!r} has a line of over {MAX_LINE_BYTES} bytes")
        if self._packed and self._total > MAX_UNPACKED_BYTES:
            raise ValueError(f"path: {str(self._source)!r} unpacks to over {MAX_UNPACKED_BYTES} bytes")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def text_stream(path: str | os.PathLike[str], newline: str | None = None) -> io.TextIOWrapper:
    """UTF-8 text of a regular file, unpacked where it ends in .gz; ValueError for a line that no honest file has."""
    source = regular_file(path)
    return io.TextIOWrapper(io.BufferedReader(_Bounded(source), 1 << 18), encoding="utf-8-sig", newline=newline)


def text_lines(path: str | os.PathLike[str], newline: str | None = None) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file; ValueError that says after which line it is broken."""
    number = 0
    shown = os.fspath(path)
    try:
        with text_stream(path, newline) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"path: {shown!r} is not UTF-8 text after line {number} (byte {byte:#04x})") from error
    except Exception as error:
        with reading(path, problem=f"is broken after line {number}"):
            raise error


def separated_rows(path: str | os.PathLike[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line of a CSV or TSV file that is not blank; ValueError for what is neither."""
    csv.field_size_limit(_MAX_FIELD)
    reader = csv.reader((line for _, line in text_lines(path, newline="")), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        with reading(path, problem=f"is broken at line {reader.line_num}"):
            raise error


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of JSON text, or ValueError: `where` says what is none, or is nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({_reason(error)})") from error


def json_records(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of JSON lines that is not blank; ValueError for a line that holds none."""
    shown = os.fspath(path)
    for line, text in text_lines(path):
        if text.strip():
            record = parse_json(text, f"path: line {line} of {shown!r}")
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise ValueError(f"path: line {line} of {shown!r} is a JSON {kind}, an object is needed")
            yield line, record


def read_json(path: str | os.PathLike[str], name: str = "path") -> dict[str, Any]:
    """The object of a JSON file. Raises ValueError for anything else."""
    source = regular_file(path, name)
    with reading(source, name):
        check_memory(8 * source.stat().st_size, f"{name}: {str(source)!r}")
        value = parse_json(source.read_bytes(), f"{name}: {str(source)!r}")
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {str(source)!r} holds a JSON {type(value).__name__}, an object is needed")
    return value
