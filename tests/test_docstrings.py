"""Public docstrings say what each parameter is and show a use that runs (`test_examples.py` runs it)."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "subspan"
ROOMS: tuple[str, ...] = (
    "align",
    "base",
    "cluster",
    "datasets",
    "detect",
    "dynamics",
    "edit",
    "geometry",
    "measures",
    "models",
    "nn",
    "probe",
    "represent",
    "select",
    "solvers",
    "statistics",
    "weights",
    "wireless",
)


def public(room: str) -> list[str]:
    tree = ast.parse((SOURCE / room.replace(".", "/") / "__init__.pyi").read_text(encoding="utf-8"))
    found = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    assert isinstance(found, ast.List)
    return [ast.literal_eval(each) for each in found.elts]


def sections(docstring: str) -> dict[str, str]:
    """Text under each title that is underlined with dashes."""
    parts = re.split(r"^([A-Z][A-Za-z ]+)\n-{3,}$", docstring, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(section: str) -> set[str]:
    """Names at the left margin of a section: `x`, `x : (n, d)` or `x, y`."""
    lines = re.findall(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: :.*)?$", section, flags=re.MULTILINE)
    return {name.strip(" *") for line in lines for name in line.split(",")}


def parameters(found: object) -> set[str]:
    assert callable(found)
    try:
        signature = inspect.signature(found)
    except ValueError:
        return set()
    return {name for name in signature.parameters if name != "self" and not name.startswith("_")}


def is_result(found: object) -> bool:
    """What functions return and users rarely make: fields are said, a use is not needed."""
    if not isinstance(found, type):
        return False
    options = getattr(found, "__dataclass_params__", None)
    return issubclass(found, tuple | Exception) or (dataclasses.is_dataclass(found) and bool(options.frozen))


CASES = [(room, name) for room in ROOMS for name in public(room)]


@pytest.mark.parametrize(("room", "name"), CASES, ids=[f"{room}.{name}" for room, name in CASES])
def test_a_public_docstring_is_whole(room: str, name: str) -> None:
    found = getattr(importlib.import_module(f"subspan.{room}"), name)
    if not callable(found) or not (inspect.isfunction(found) or inspect.isclass(found)):
        return
    text = inspect.getdoc(found) or ""
    assert re.match(r"\S[^\n]*[.?:]\n?", text), "the first line is one sentence"
    have = sections(text)
    said = named(have.get("Parameters", "")) | named(have.get("Attributes", ""))
    if getattr(found, "_is_protocol", False):
        return
    missing = parameters(found) - said
    assert not missing, f"Parameters: says nothing of {sorted(missing)}"
    invented = named(have.get("Parameters", "")) - parameters(found)
    assert not invented, f"Parameters: {sorted(invented)} are none"
    if inspect.isfunction(found) and inspect.signature(found).return_annotation not in (None, "None"):
        assert "Returns" in have or "Yields" in have
    assert ">>> " in have.get("Examples", "") or is_result(found), "no example"
