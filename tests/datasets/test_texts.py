from __future__ import annotations

import ast
import gzip
from pathlib import Path

import pytest

from subspan.datasets import code_and_docstrings, iterate_records, read_texts, stdlib_docstrings

JSON = '{"text": "one", "label": "a"}\n\n{"text": "two\\nlines", "label": "b"}\n'
CSV = 'label,text\na,one\nb,"two\nlines"\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.jsonl", JSON.encode()),
        ("t.jsonl.gz", gzip.compress(JSON.encode(), mtime=0)),
        ("t.csv", CSV.encode()),
        ("t.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("t.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("t.tsv", CSV.replace(",", "\t").encode()),
    ],
)
def test_texts_and_labels_from_every_format(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    read = read_texts(tmp_path / name, label_column="label")
    assert read.texts == ("one", "two\nlines")
    assert read.labels == ("a", "b")
    assert len(read_texts(tmp_path / name, limit=1)) == 1


def test_ids_come_with_the_texts(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,text\n7,one\n8,two\n")
    assert read_texts(tmp_path / "t.csv", id_column="id").ids == ("7", "8")
    assert read_texts(tmp_path / "t.csv").ids is None
    with pytest.raises(ValueError, match="key"):
        read_texts(tmp_path / "t.csv", id_column="key")


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("first line\n\n  second\n")
    assert read_texts(tmp_path / "t.txt").texts == ("first line", "  second")


def test_the_only_column_of_texts_is_found(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"score": 1, "sentence": "hello"}\n')
    assert read_texts(tmp_path / "t.jsonl").texts == ("hello",)


def test_records_are_read_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": 1}\nnonsense\n')
    records = iterate_records(tmp_path / "t.jsonl")
    assert next(records) == {"a": 1}
    with pytest.raises(ValueError, match="line 2"):
        next(records)


# The checks of deflate fail here, not those of the container.
_PACKED = gzip.compress(b"".join(b"line %d\n" % (i * i) for i in range(2000)))
DAMAGED = _PACKED[:3000] + b"\xff\x00" * 40 + _PACKED[3080:]

MEGABYTE = b'{"text": [' + b"1," * 2**19 + b"1]}\n"

MALFORMED = {
    "empty": ("t.jsonl", b"", {}, "holds no records"),
    "not JSON": ("t.jsonl", b'{"text": "x"}\n{"text": \n', {}, "line 2 .* is not JSON"),
    "deep JSON": ("t.jsonl", b"[" * 100_000, {}, "line 1 .* is not JSON"),
    "no object": ("t.jsonl", b"[1]\n", {}, "line 1 .* is a JSON list, an object is needed"),
    "not UTF-8": ("t.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', {}, "not UTF-8 text"),
    "UTF-16": ("t.csv", "text\nx\n".encode("utf-16"), {}, "not UTF-8 text"),
    "no text": ("t.jsonl", b'{"text": 3}\n', {"column": "text"}, "of record 1 .* is 3, not a text"),
    "no column": ("t.jsonl", b'{"body": "x"}\n', {"column": "text"}, "has no 'text'; it has body"),
    "no label": ("t.jsonl", b'{"text": "x"}\n', {"label_column": "y"}, "has no 'y'"),
    "two columns": ("t.csv", b"a,b\nx,y\n", {}, "has the columns a, b; say which"),
    "ragged": ("t.csv", b"text,b\nx,y\nz\n", {}, "line 3 .* has 1 fields, the header has 2"),
    "a column twice": ("t.csv", b"a,a\nx,y\n", {}, "several columns called a"),
    "an open quote": ("t.csv", b'text\n"x\n', {}, "is broken at line 2"),
    "header only": ("t.csv", b"text\n", {}, "holds no records"),
    "cut off": ("t.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 99)[:-9], {}, "is broken after line"),
    "not packed": ("t.jsonl.gz", b'{"text": "x"}\n', {}, "is broken after line 0"),
    "damaged": ("t.txt.gz", DAMAGED, {}, "is broken after line"),
    "half a character": (
        "t.jsonl",
        b'{"text": "\\ud800"}\n',
        {},
        r"'text' of record 1 .* U\+D800, which is no character",
    ),
    "half a character in a label": (
        "t.jsonl",
        b'{"text": "x", "y": "\\udfff"}\n',
        {"label_column": "y"},
        r"'y' of record 1 .* U\+DFFF",
    ),
    "a megabyte for a text": (
        "t.jsonl",
        b'{"text": [' + b"1," * 2**19 + b"1]}\n",
        {"column": "text"},
        r"is \[1, .{60,90}, not",
    ),
    "another format": ("t.doc", b"x", {}, "is not one of"),
}


@pytest.mark.parametrize("case", MALFORMED, ids=str)
def test_a_malformed_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    name, data, options, message = MALFORMED[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        read_texts(tmp_path / name, **options)
    assert "\n" not in str(raised.value)


SOURCE = '''"""A module that says what it is for."""
form = "\x0cfeed"

class Thing:
    """A thing, described at some length for the test."""

    @property
    def size(self):
        """How large the thing is, in metres, of course."""
        return 3

    def short(self):
        """Short."""

async def wait(seconds):
    r"""Wait for so many seconds, \\\\ and no longer than that."""
    def inner():
        """Never found, because it is inside of a function."""
    return seconds
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "package" / "test").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text(SOURCE)
    (tmp_path / "package" / "test" / "ignored.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "latin.py").write_bytes(b'"""\xe9"""\n')
    return tmp_path


def test_docstrings_of_a_source_tree(library: Path) -> None:
    assert stdlib_docstrings(folder=library) == stdlib_docstrings(folder=library)
    found = stdlib_docstrings(min_length=20, folder=library)
    assert [(entry.name, entry.kind) for entry in found] == [
        ("package", "module"),
        ("package.Thing", "class"),
        ("package.Thing.size", "function"),
        ("package.wait", "function"),
        ("package.wait.inner", "function"),
    ]
    assert {entry.label for entry in found} == {"package"}
    size = found[2]
    assert size.text == "How large the thing is, in metres, of course."
    assert size.code == "@property\ndef size(self):\n    return 3\n"
    assert "no longer" not in found[3].code
    ast.parse(found[3].code)


def test_a_tree_without_docstrings_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no docstrings"):
        stdlib_docstrings(folder=tmp_path)


def test_the_standard_library_has_thousands_in_a_fixed_order() -> None:
    found = stdlib_docstrings()
    assert len(found) > 3000
    assert len({entry.label for entry in found}) > 100
    # a module's docstrings stand together, and packages in the order of their files
    assert [entry.label for entry in found if entry.kind == "module"] == sorted(
        entry.label for entry in found if entry.kind == "module"
    )
    assert any(entry.name == "json.dumps" for entry in found)
    assert not any(entry.module.startswith(("test.", "idlelib")) for entry in found)


@pytest.mark.slow
def test_functions_come_without_their_docstring() -> None:
    pairs = code_and_docstrings()
    assert len(pairs) > 2000
    assert all(text.splitlines()[0] not in code for code, text, _ in pairs[:200] if len(text.splitlines()[0]) > 40)
