"""Texts from JSON lines, CSV and plain text files, and the docstrings of the running Python's standard library."""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspan.base.columns import listed
from subspan.base.kinds import suffix_of
from subspan.base.reading import characters, json_records, quoted, regular_file, separated_rows, text_lines

_UNCOUNTED_PACKAGES = frozenset(
    {"__pycache__", "config", "ensurepip", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests",
     "turtledemo"}
)  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Texts with a label and an id each, or none: `texts[i]`, `labels[i]`, `ids[i]`.

    Attributes
    ----------
    texts, labels, ids
        One a text; labels and ids None where the file has none.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    ids: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)


def read_texts(
    path: str | os.PathLike[str],
    *,
    column: str | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
    limit: int | None = None,
) -> Texts:
    r"""Read a column of texts from .jsonl, .csv, .tsv (also .gz), or the lines of .txt (also .gz).

    Parameters
    ----------
    path
        Of the file.
    column
        Needed unless it is called "text" or is the only column of texts.
    label_column, id_column
        Columns that are read beside it.
    limit
        Only the first so many.

    Returns
    -------
    Texts

    Raises
    ------
    ValueError
        Naming file and line, for what is not UTF-8, not JSON, ragged, empty, or no text.

    Examples
    --------
    >>> from pathlib import Path
    >>> from subspan.datasets import read_texts
    >>> _ = Path("reviews.csv").write_text("text,stars\ngood,5\nbad,1\n")
    >>> read_texts("reviews.csv", label_column="stars")
    Texts(texts=('good', 'bad'), labels=('5', '1'), ids=None)
    """
    source = Path(path)
    records = iterate_records(source)
    texts: list[str] = []
    named: dict[str, list[str]] = {name: [] for name in (label_column, id_column) if name is not None}
    for number, record in enumerate(records, start=1):
        if column is None:
            column = _text_column(record, source)
        texts.append(_entry(record, column, source, number))
        for name, values in named.items():
            value = record.get(name)
            if value is None:
                raise ValueError(_missing(name, record, source, number))
            values.append(characters(str(value), f"column: {name!r} of record {number} in {str(source)!r}"))
        if len(texts) == limit:
            break
    if not texts:
        raise ValueError(f"path: {str(source)!r} holds no records")
    labels, ids = (None if name is None else tuple(named[name]) for name in (label_column, id_column))
    return Texts(tuple(texts), labels, ids)


def iterate_records(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    r"""The records of a .jsonl, .csv, .tsv or .txt file (also .gz) one at a time.

    Parameters
    ----------
    path
        Of the file.

    Yields
    ------
    dict; of a line of .txt {"text": line}.

    Raises
    ------
    ValueError
        For another kind of file, and lines that are none of it.

    Examples
    --------
    >>> from pathlib import Path
    >>> from subspan.datasets import iterate_records
    >>> _ = Path("lines.txt").write_text("first\nsecond\n")
    >>> list(iterate_records("lines.txt"))
    [{'text': 'first'}, {'text': 'second'}]
    """
    source = Path(path)
    kind = suffix_of(source)
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".txt": _plain_lines, ".csv": _comma, ".tsv": _tab}
    if kind not in readers:
        raise ValueError(f"path: {str(source)!r} is not one of {', '.join(readers)} (also .gz)")
    yield from readers[kind](regular_file(source))


@dataclass(frozen=True)
class Docstring:
    """A docstring of the standard library, and what it is of.

    Attributes
    ----------
    module, name
        Dotted names of the module and of the object, the module's included.
    kind
        "module", "class" or "function".
    text
        The docstring.
    code
        The source without it.
    """

    module: str
    name: str
    kind: str
    text: str
    code: str

    @property
    def label(self) -> str:
        """The top-level module."""
        return self.module.split(".")[0]


def stdlib_docstrings(
    *, min_length: int = 40, kinds: Sequence[str] = ("module", "class", "function"), folder: Path | None = None
) -> tuple[Docstring, ...]:
    r"""Docstrings of the running Python's standard library, read from its source files without importing them.

    Sorted by module and place, so the order is the same each time. Takes some seconds.

    Parameters
    ----------
    min_length
        In characters; shorter ones are left out.
    kinds
        Of "module", "class" and "function".
    folder
        Another tree of Python sources.

    Returns
    -------
    tuple of Docstring

    Raises
    ------
    ValueError
        For other kinds, and where no docstring is there.

    Examples
    --------
    >>> from pathlib import Path
    >>> from subspan.datasets import stdlib_docstrings
    >>> Path("sources").mkdir()
    >>> _ = Path("sources/area.py").write_text("def area(side):\n    'Area of a square.'\n    return side**2\n")
    >>> [(entry.name, entry.text) for entry in stdlib_docstrings(min_length=5, folder=Path("sources"))]
    [('area.area', 'Area of a square.')]
    """
    unknown = set(kinds) - {"module", "class", "function"}
    if unknown:
        raise ValueError(f"kinds: of 'module', 'class', 'function', got {sorted(unknown)}")
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    with _paused_collector():
        found = tuple(
            entry
            for file in _python_files(root)
            for entry in _docstrings_of(file, root)
            if entry.kind in kinds and len(entry.text) >= min_length
        )
    if not found:
        raise ValueError(f"folder: no docstrings in the Python sources under {str(root)!r}")
    return found


def code_and_docstrings(*, min_length: int = 40, max_code: int = 4000) -> tuple[tuple[str, str, str], ...]:
    """Code, docstring and label of the standard library's functions; the code does not hold the docstring.

    Takes some seconds. The label is the top-level module.

    Parameters
    ----------
    min_length
        Of a docstring, in characters; shorter ones are left out.
    max_code
        Of a function, in characters; longer ones are left out.

    Returns
    -------
    tuple of (code, docstring, label)

    Examples
    --------
    >>> from subspan.datasets import code_and_docstrings
    >>> code, docstring, label = code_and_docstrings()[0]  # doctest: +SKIP
    """
    functions = stdlib_docstrings(min_length=min_length, kinds=("function",))
    return tuple((entry.code, entry.text, entry.label) for entry in functions if 0 < len(entry.code) <= max_code)


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """Syntax trees hold no cycles, and looking for some in them takes half of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _python_files(root: Path) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in _UNCOUNTED_PACKAGES and not name.startswith((".", "config-", "lib-dynload"))
        ]
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _docstrings_of(file: Path, root: Path) -> Iterator[Docstring]:
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return
    module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    lines = io.StringIO(source).readlines()
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        node, name = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
                code = "" if kind == "module" else _without_docstring(node, lines)
                yield Docstring(module, f"{module}{name}", kind, text, code)
        stack += [
            (child, f"{name}.{child.name}")
            for child in reversed(list(ast.iter_child_nodes(node)))
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]


def _without_docstring(node: Any, lines: list[str]) -> str:
    """Source of a definition whose first statement is its docstring, without that statement."""
    first = node.body[0]
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    head = lines[start - 1 : first.lineno - 1]
    rest = lines[first.end_lineno : node.end_lineno]
    text = "".join(head + rest)
    indent = len(text) - len(text.lstrip(" "))
    return "".join(line[indent:] if line[:indent].isspace() else line for line in text.splitlines(keepends=True))


def _text_column(record: dict[str, Any], source: Path) -> str:
    if isinstance(record.get("text"), str):
        return "text"
    texts = [name for name, value in record.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise ValueError(f"column: {str(source)!r} has the columns {listed(record)}; say which one holds the texts")
    return texts[0]


def _entry(record: dict[str, Any], column: str, source: Path, number: int) -> str:
    value = record.get(column)
    if value is None:
        raise ValueError(_missing(column, record, source, number))
    if not isinstance(value, str):
        shown = quoted(value)
        raise ValueError(f"column: {column!r} of record {number} in {str(source)!r} is {shown}, not a text")
    return characters(value, f"column: {column!r} of record {number} in {str(source)!r}")


def _missing(column: str, record: dict[str, Any], source: Path, number: int) -> str:
    return f"column: record {number} of {str(source)!r} has no {column!r}; it has {listed(record)}"


def _json_lines(source: Path) -> Iterator[dict[str, Any]]:
    return (record for _, record in json_records(source))


def _plain_lines(source: Path) -> Iterator[dict[str, Any]]:
    for _, line in text_lines(source):
        if line.strip():
            yield {"text": line.rstrip("\n")}


def _comma(source: Path) -> Iterator[dict[str, Any]]:
    return _separated(source, ",")


def _tab(source: Path) -> Iterator[dict[str, Any]]:
    return _separated(source, "\t")


def _separated(source: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    header: list[str] | None = None
    for line, row in separated_rows(source, delimiter):
        if header is None:
            header = row
            repeated = {name for name in row if row.count(name) > 1} if len(set(row)) < len(row) else ()
            if repeated:
                raise ValueError(f"path: {str(source)!r} has several columns called {listed(sorted(repeated))}")
        elif len(row) != len(header):
            place = f"line {line} of {str(source)!r}"
            raise ValueError(f"path: {place} has {len(row)} fields, the header has {len(header)}")
        else:
            yield dict(zip(header, row))
