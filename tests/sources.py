"""The package's own source, parsed once for all tests that read it."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "subspan"


@functools.cache
def source_files() -> dict[Path, str]:
    """Every module of the package with its text, in order."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}


@functools.cache
def nodes_of(source: str) -> tuple[ast.AST, ...]:
    """All nodes of a text of Python, the module itself first."""
    return tuple(ast.walk(ast.parse(source)))
