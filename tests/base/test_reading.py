"""What reading a file can raise becomes one ValueError that names it; sizes are known before memory is taken."""

from __future__ import annotations

import gzip
import os
import time
import zlib
from pathlib import Path

import pytest

from subspan.base import reading as module
from subspan.base.reading import (
    characters,
    check_memory,
    memory_bytes,
    parse_json,
    printable,
    quoted,
    read_json,
    readable_name,
    reading,
    regular_file,
    separated_rows,
    text_lines,
)


@pytest.mark.parametrize(
    "error",
    [
        zlib.error("Error -3 while decompressing data"),
        EOFError(),
        OSError(5, "Input/output error"),
        RecursionError("maximum recursion depth exceeded"),
        MemoryError(),
        OverflowError("int too large to convert to float"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        KeyError("shape"),
        ValueError("two\nlines " + "x" * 10**6),
    ],
)
def test_whatever_is_raised_names_the_file_in_one_line(error: Exception) -> None:
    with pytest.raises(ValueError, match=r"^path: 'a/b\.csv' cannot be read \(.+\)$") as raised, reading("a/b.csv"):
        raise error
    assert len(str(raised.value)) < 300


def test_what_names_the_file_already_and_missing_extras_pass() -> None:
    said = ValueError("path: line 3 of 'a/b.csv' is short")
    with pytest.raises(ValueError, match="line 3") as raised, reading("a/b.csv"):
        raise said
    assert raised.value is said
    with pytest.raises(ImportError), reading("a/b.csv"):
        raise ImportError("no pyarrow")


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    started = time.monotonic()
    for path, what in [(tmp_path / "pipe.csv", "a pipe"), ("/dev/zero", "a device"), (tmp_path, "a folder")]:
        with pytest.raises(ValueError, match=f"is {what}"):
            regular_file(path)
    with pytest.raises(ValueError, match="is a pipe"):
        list(text_lines(tmp_path / "pipe.csv"))
    with pytest.raises(ValueError, match="does not exist"):
        regular_file(tmp_path / "absent")
    with pytest.raises(ValueError, match="cannot be read"):
        regular_file("a\0b")
    assert time.monotonic() - started < 5


def test_lines_come_with_their_numbers_and_faults_with_the_line(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    text = "\ufeffone\ntwo\n\nthrée\n".encode()
    plain.write_bytes(text)
    packed.write_bytes(gzip.compress(text))
    expected = [(1, "one\n"), (2, "two\n"), (3, "\n"), (4, "thrée\n")]
    assert list(text_lines(plain)) == list(text_lines(packed)) == expected
    data = bytearray(gzip.compress(os.urandom(5000).hex().encode()))
    data[2000:2100] = bytes(100)
    packed.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"a\.txt\.gz' is broken after line 0"):
        list(text_lines(packed))
    plain.write_bytes(b"one\n\xff\n")
    with pytest.raises(ValueError, match="not UTF-8 text after line"):
        list(text_lines(plain))


def test_a_line_that_unpacks_without_end_is_refused_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1" * 2**23))
    with pytest.raises(ValueError, match="has a line of over 1048576 bytes"):
        list(separated_rows(tmp_path / "a.csv.gz", ","))
    monkeypatch.setattr(module, "MAX_UNPACKED_BYTES", 2**20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"12345\n" * 2**20))
    with pytest.raises(ValueError, match="unpacks to over 1048576 bytes"):
        list(text_lines(tmp_path / "a.txt.gz"))


def test_a_declared_size_is_held_against_the_memory() -> None:
    assert 2**28 < memory_bytes() < 2**50
    check_memory(1000, "x")
    with pytest.raises(ValueError, match=r"x takes .* GiB, this machine has"):
        check_memory(2**62, "x")


def test_messages_stay_short_and_terminals_whole() -> None:
    assert quoted("a" * 10**6) == "'" + "a" * 59 + "..." + "a" * 16 + "'"
    assert quoted("ab") == "'ab'"
    assert printable("a\x1b[31m\x9b\u202eb\udcffé中") == "a\\x1b[31m\\x9b\\u202eb\\udcffé中"
    assert readable_name(os.fsdecode(b"caf\xe9.npy")) == "caf\\udce9.npy"
    assert characters("é", "x") == "é"
    with pytest.raises(ValueError, match=r"line 3 holds the code point U\+D800"):
        characters("a\ud800", "line 3")


def test_json_that_is_none_too_deep_or_no_object(tmp_path: Path) -> None:
    assert parse_json('{"a": 1}', "x") == {"a": 1}
    for text in ("{", "[" * 10**5, "9" * 5000):
        with pytest.raises(ValueError, match=r"^line 1 is not JSON") as raised:
            parse_json(text, "line 1")
        assert len(str(raised.value)) < 300
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json' holds a JSON list, an object is needed"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
