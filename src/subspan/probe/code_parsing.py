"""Syntax trees of source code, by tree-sitter's grammars or by Python's own parser."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from subspan.base import require

from .syntax_trees import Constituent, SyntaxTree

LANGUAGES = ("python", "javascript", "go")
"""Languages of tree-sitter's grammars that the extra `code` brings."""
# Only their text matters, not what they are made of.
_STRINGS = ("string", "string_literal", "template_string", "interpreted_string_literal", "raw_string_literal")
_NO_TOKENS = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)
# Later Pythons part f-strings (and t-strings) into tokens.
_OPEN, _CLOSE = ([getattr(tokenize, f"{kind}STRING_{end}", None) for kind in "FT"] for end in ("START", "END"))


class ParsedCode(NamedTuple):
    """Trees of sources; see `code_trees`.

    Attributes
    ----------
    trees
        Of the sources that parse.
    kept
        Numbers of these sources.
    """

    trees: list[SyntaxTree]
    kept: list[int]


def code_trees(
    sources: Sequence[str],
    *,
    language: str = "python",
    parser: str | None = None,
    min_tokens: int = 2,
    max_tokens: int | None = None,
) -> ParsedCode:
    """Syntax trees of those sources that parse and have as many tokens as asked for.

    Parameters
    ----------
    sources
        Source code.
    language, parser
        As in `code_tree`.
    min_tokens, max_tokens
        Of a tree; others are left out.

    Returns
    -------
    ParsedCode: the trees, and the numbers of their sources.

    Raises
    ------
    ValueError
        Where no source is left.

    Examples
    --------
    >>> from subspan.probe import code_trees
    >>> code_trees(["x = 1", "not code ("], parser="ast").kept
    [0]
    """
    trees, kept = [], []
    for number, source in enumerate(sources):
        try:
            tree = code_tree(source, language=language, parser=parser)
        except _NotParsed:
            continue
        if min_tokens <= len(tree) and (max_tokens is None or len(tree) <= max_tokens):
            trees.append(tree)
            kept.append(number)
    if not trees:
        raise ValueError(f"sources: none of {len(sources)} is {language} that parses and has so many tokens")
    return ParsedCode(trees, kept)


def code_tree(source: str, *, language: str = "python", parser: str | None = None) -> SyntaxTree:
    """The syntax tree of source code over its tokens, without comments and docstrings; a string is one token.

    Parameters
    ----------
    source
        Source code.
    language
        "python"; with tree-sitter also "javascript" and "go".
    parser
        "tree-sitter", whose concrete trees have a node for each construct of the grammar (extra: code), or "ast",
        Python's own, whose nodes are those of the module `ast`. Default: tree-sitter where it is installed.

    Returns
    -------
    SyntaxTree

    Raises
    ------
    ValueError
        For a source that does not parse or has no tokens, and another language or parser.

    Examples
    --------
    >>> from subspan.probe import code_tree
    >>> print(code_tree("x = f(1)  # one", parser="ast"))
    (Module (Assign (Name x) = (Call (Name f) ( (Constant 1) ))))
    """
    if language not in LANGUAGES:
        raise ValueError(f"language: one of {', '.join(LANGUAGES)}, got {language!r}")
    if parser not in ("tree-sitter", "ast", None):
        raise ValueError(f"parser: 'tree-sitter' or 'ast', got {parser!r}")
    if parser is None:
        parser = "tree-sitter" if language != "python" or _has_tree_sitter() else "ast"
    if parser == "ast" and language != "python":
        raise ValueError(f"parser: 'ast' reads Python alone, not {language}")
    try:
        return _by_ast(source) if parser == "ast" else _by_tree_sitter(source, language)
    except (SyntaxError, tokenize.TokenError, RecursionError, MemoryError, UnicodeEncodeError) as error:
        raise _NotParsed(f"source: is not {language} that parses ({error})") from error


class _NotParsed(ValueError):
    """A source without a tree."""


def _has_tree_sitter() -> bool:
    try:
        require("tree_sitter_python", extra="code")
        require("tree_sitter", extra="code")
    except ImportError:
        return False
    return True


# ---------------------------------------------------------------------- tree-sitter


def _by_tree_sitter(source: str, language: str) -> SyntaxTree:
    tree_sitter = require("tree_sitter", extra="code")
    grammar = tree_sitter.Language(require(f"tree_sitter_{language}", extra="code").language())
    encoded = source.encode()
    root = tree_sitter.Parser(grammar).parse(encoded).root_node
    if root.has_error:
        raise _NotParsed(f"source: is not {language} that parses")
    tokens: list[str] = []
    nodes: list[list[Any]] = []
    # A node is entered, and left once everything inside of it is: its label is None then.
    waiting: list[tuple[Any, int | None]] = [(root, None)]
    while waiting:
        node, place = waiting.pop()
        if place is not None:
            nodes[place][2] = len(tokens)
            continue
        children = _children(node)
        if not children:
            if node.end_byte > node.start_byte:
                tokens.append(encoded[node.start_byte : node.end_byte].decode())
            continue
        waiting.append((node, len(nodes)))
        nodes.append([node.type, len(tokens), 0])
        waiting += [(child, None) for child in reversed(children)]
    return _tree(tokens, nodes, language)


def _children(node: Any) -> list[Any]:
    """Without comments and docstrings; none of strings."""
    if node.type in _STRINGS:
        return []
    found = [child for child in node.children if not child.type.endswith("comment")]
    if found and node.type in ("block", "module") and _is_docstring(found[0]):
        del found[0]
    # A body that was nothing but a docstring is no token.
    return [child for child in found if child.type != "block" or _children(child)]


def _is_docstring(node: Any) -> bool:
    return node.type == "expression_statement" and [child.type for child in node.children] in (
        ["string"],
        ["concatenated_string"],
    )


def _tree(tokens: list[str], nodes: Sequence[Sequence[Any]], language: str) -> SyntaxTree:
    if not tokens:
        raise _NotParsed(f"source: has no {language} but comments and docstrings")
    return SyntaxTree(tuple(tokens), tuple(Constituent(*node) for node in nodes if node[2] > node[1]))


# ---------------------------------------------------------------------- Python's own parser


class _Token(NamedTuple):
    """A token with its place as (line, column in bytes)."""

    text: str
    start: tuple[int, int]
    stop: tuple[int, int]


def _by_ast(source: str) -> SyntaxTree:
    # The tokenizer keeps carriage returns and the mark at the start, which the parser does not count.
    source = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in source:
        raise _NotParsed("source: holds a null character")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        module = ast.parse(source)
    found = list(_tokens(source))
    starts = [token.start for token in found]
    nodes: list[tuple[str, int, int]] = []
    dropped: set[int] = set()

    def place(node: ast.AST) -> tuple[int, int] | None:
        """First token, and the one after the last, of a node and all that is inside."""
        if not hasattr(node, "lineno"):
            spans = [span for child in ast.iter_child_nodes(node) if (span := place(child))]
            return (min(start for start, _ in spans), max(stop for _, stop in spans)) if spans else None
        here: Any = node
        start = bisect_left(starts, (here.lineno, here.col_offset))
        if decorators := getattr(node, "decorator_list", []):
            start = bisect_left(starts, (decorators[0].lineno, decorators[0].col_offset)) - 1
        return start, bisect_left(starts, (here.end_lineno, here.end_col_offset))

    waiting: list[tuple[ast.AST, int, int]] = [(module, 0, len(found))]
    while waiting:
        node, start, stop = waiting.pop()
        if start >= stop:
            continue
        nodes.append((type(node).__name__, start, stop))
        if isinstance(node, ast.Constant | ast.JoinedStr):
            continue
        spans = [(child, *span) for child in ast.iter_child_nodes(node) if (span := place(child))]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _documented(node):
            begin, end = place(node.body[0]) or (0, 0)
            dropped.update(range(begin, end))
        waiting += sorted(spans, key=lambda span: (span[1], -span[2]), reverse=True)
    return _tree(*_without(found, nodes, dropped), "python")


def _documented(node: Any) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def _without(
    tokens: list[_Token], nodes: list[tuple[str, int, int]], dropped: set[int]
) -> tuple[list[str], list[tuple[str, int, int]]]:
    """Texts of the tokens that stay, and the nodes counted in these."""
    new = [0]
    for number in range(len(tokens)):
        new.append(new[-1] + (number not in dropped))
    texts = [token.text for number, token in enumerate(tokens) if number not in dropped]
    return texts, [(label, new[start], new[stop]) for label, start, stop in nodes]


def _tokens(source: str) -> Iterator[_Token]:
    """Those that carry text, columns in bytes as `ast` counts them; an f-string is one."""
    lines = io.StringIO(source).readlines()
    depth, begun = 0, (0, 0)

    def in_bytes(place: tuple[int, int]) -> tuple[int, int]:
        row, column = place
        line = lines[row - 1] if row <= len(lines) else ""
        return row, column if line.isascii() else len(line[:column].encode())

    for kind, text, start, stop, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind in _OPEN:
            depth, begun = depth + 1, begun if depth else start
        elif kind in _CLOSE:
            depth -= 1
            if not depth:
                yield _Token(_between(lines, begun, stop), in_bytes(begun), in_bytes(stop))
        elif not depth and kind not in _NO_TOKENS and text:
            yield _Token(text, in_bytes(start), in_bytes(stop))


def _between(lines: Sequence[str], start: tuple[int, int], stop: tuple[int, int]) -> str:
    """The text between two places (line, column)."""
    (first, left), (last, right) = start, stop
    if first == last:
        return lines[first - 1][left:right]
    return "".join([lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]])
