"""The house stands: imports go down, and nothing in it can run code from a file."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from sources import SOURCE, nodes_of, source_files

# From the ground up; a room may import the floors below its own, and nothing of its own floor but itself.
FLOORS = (
    {"base"},
    {"geometry"},
    {"statistics", "solvers"},
    {"measures"},
    {"models", "datasets"},
    {"nn"},
    {"detect", "select", "cluster", "align", "edit", "probe", "represent", "dynamics", "weights"},
    {"wireless"},  # stands on the bank of `represent`
    {""},  # the package's own front page, `subspan/__init__.py`
    {"reproduce"},
    {"commands"},
    {"report"},
    {"cli"},
    {"__main__"},
)
BELOW = {room: frozenset().union(*FLOORS[:floor]) for floor, rooms in enumerate(FLOORS) for room in rooms}

UNSAFE_MODULES = frozenset({"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"})
MODULE_NAME = re.compile(rf"subspan\.({'|'.join(filter(None, BELOW))})(\.\w+)*")
# Docstrings are not counted: the better a thing is described, the longer they are.
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 500, 80
# One loop, compiled by numba, whose steps share all of their scratch space.
LONG_FUNCTIONS = {"subspan.solvers.homotopy.elastic_net_homotopy"}
NAMES_THAT_SAY_NOTHING = frozenset({"utils", "util", "helpers", "helper", "common", "misc"})


def room(module: str) -> str:
    """The room of a dotted module name: `subspan.detect.subspacead` is in `detect`."""
    return [*module.split("."), ""][1]


def imported(source: str, module: str, *, package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a module imports: at the top, inside functions, for types only, or by name."""
    here = module.split(".") if package else module.split(".")[:-1]
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = here[: len(here) - node.level + 1] if node.level else []
            origin = ".".join([*origin, *([node.module] if node.module else [])])
            # `from subspan import geometry` imports a room, `from subspan import __version__` the front page.
            names = [alias.name for alias in node.names] if origin == "subspan" else [""]
            yield from ((node.lineno, f"{origin}.{name}" if name in BELOW and name else origin) for name in names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            yield node.lineno, node.value


def climbing_imports(source: str, module: str, *, package: bool = False) -> list[str]:
    """Imports of a module that go up, or across to a neighbour."""
    own = room(module)
    if own not in BELOW:
        return [f"{module}: the house has no room {own!r}"]
    return [
        f"{module}:{line} imports {name}"
        for line, name in imported(source, module, package=package)
        if name.split(".")[0] == "subspan" and room(name) != own and room(name) not in BELOW[own]
    ]


def crooked_imports(source: str, module: str, *, package: bool = False) -> list[str]:
    """Imports of a neighbour in the own room that are absolute, and of another room that are relative."""
    found = []
    for node in nodes_of(source):
        if not isinstance(node, ast.ImportFrom):
            continue
        level = len(module.split(".")) - (0 if package else 1) - node.level + 1
        own = node.module is not None and room(node.module) == room(module) != ""
        if (node.level and level < 2 and room(module)) or (
            not node.level and own and node.module.startswith("subspan.")
        ):
            found.append(f"{module}:{node.lineno} imports {'.' * node.level}{node.module or ''}")
    return found


def unsafe_reads(source: str, module: str) -> list[str]:
    """Places where a module could unpickle, or leaves that to a default."""
    found = [
        (line, f"imports {name}")
        for line, name in imported(source, module, package=False)
        if name.split(".")[0] in UNSAFE_MODULES
    ]
    required = {"torch": ("weights_only", True), "np": ("allow_pickle", False), "numpy": ("allow_pickle", False)}
    for node in nodes_of(source):
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if given.get("allow_pickle") is True or given.get("weights_only") is False:
            found.append((node.lineno, "allows pickles"))
        function = node.func
        if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
            continue
        owner, name = function.value.id, function.attr
        if name == "load" and owner in required and given.get(required[owner][0]) is not required[owner][1]:
            found.append((node.lineno, f"calls {owner}.load without {'='.join(map(str, required[owner]))}"))
        if (owner, name) in {("torch", "save"), ("joblib", "load")} or name in {"read_pickle", "to_pickle"}:
            found.append((node.lineno, f"calls {owner}.{name}"))
    return [f"{module}:{line} {what}" for line, what in sorted(found)]


def lines_of(node: ast.AST, total: int) -> int:
    """Of `total` lines those that are not the docstring, nor the docstrings of what is defined inside."""
    texts = [
        each.body[0]
        for each in ast.walk(node)
        if isinstance(each, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(each, clean=False) is not None
    ]
    return total - sum((text.end_lineno or 0) - text.lineno + 1 for text in texts)


def long_functions(source: str, module: str) -> list[str]:
    """Functions, and methods by their own name, of more lines of code than one can take in at once."""
    return [
        f"{module}.{node.name}"
        for node in nodes_of(source)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and lines_of(node, (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    ]


def modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every module of the package."""
    result = []
    for path in source_files():
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        result.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return result


def test_imports_go_down() -> None:
    found = [
        fault
        for module, path in modules()
        for fault in climbing_imports(source_files()[path], module, package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_imports_are_relative_inside_a_room_and_absolute_outside() -> None:
    found = [
        fault
        for module, path in modules()
        for fault in crooked_imports(source_files()[path], module, package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "crooked"),
    [
        ("from ..geometry import Subspace", 1),
        ("from .. import geometry", 1),
        ("from subspan.align.bt2 import BT2Loss", 1),
        ("from .bt2 import BT2Loss\nfrom ..spaces.irepa import RepresentationAlignment", 0),
        ("from subspan.geometry import Subspace\nfrom subspan import nn\nimport torch", 0),
    ],
)
def test_the_style_of_an_import_is_seen(source: str, crooked: int) -> None:
    module = "subspan.align.compatible.training" if ".." in source and "spaces" in source else "subspan.align.training"
    assert len(crooked_imports(source, module)) == crooked


def test_nothing_is_unpickled() -> None:
    found = [fault for module, path in modules() for fault in unsafe_reads(source_files()[path], module)]
    # Qdrant's folders hold pickles, which are read by a reader that makes inert objects of two names and nothing else.
    allowed = [fault for fault in found if fault.startswith("subspan.datasets.qdrant_folder:")]
    assert [fault.split()[1:] for fault in allowed] == [["imports", "pickle"]]
    source = source_files()[SOURCE / "datasets" / "qdrant_folder.py"]
    assert re.findall(r"\bpickle\.\w+", source) == ["pickle.Unpickler"]
    assert found == allowed, "\n".join(found)


def test_no_function_and_no_file_is_too_long() -> None:
    sources = {module: source_files()[path] for module, path in modules()}
    assert {fault for module, source in sources.items() for fault in long_functions(source, module)} == LONG_FUNCTIONS
    lengths = {module: lines_of(nodes_of(source)[0], len(source.splitlines())) for module, source in sources.items()}
    assert not {module: lines for module, lines in lengths.items() if lines > MOST_LINES}


def test_a_long_function_is_seen() -> None:
    def source(lines: int) -> str:
        text = '        """Says\n\n        much."""\n'
        return f"class A:\n    @staticmethod\n    async def f():\n{text}" + "        pass\n" * (lines - 1)

    assert long_functions(source(MOST_LINES_OF_A_FUNCTION), "subspan.a") == []
    assert long_functions(source(MOST_LINES_OF_A_FUNCTION + 1), "subspan.a") == ["subspan.a.f"]


def test_every_module_has_a_telling_name() -> None:
    found = [module for module, _ in modules() if NAMES_THAT_SAY_NOTHING & {p.strip("_") for p in module.split(".")}]
    assert not found, f"named for nothing: {found}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("subspan.geometry.subspace", "from subspan.statistics import Moments"),
        ("subspan.geometry.subspace", "from ..statistics import Moments"),
        ("subspan.geometry.subspace", "from .. import statistics"),
        ("subspan.geometry.subspace", "from subspan import statistics"),
        ("subspan.geometry.subspace", "import subspan.detect.subspacead as s"),
        ("subspan.geometry.subspace", "import numpy, subspan.nn"),
        ("subspan.solvers.ista", "def late():\n    from subspan.models import capture"),
        ("subspan.detect.subspacead", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import subspan.select"),
        ("subspan.detect.subspacead", "import importlib\nimportlib.import_module('subspan.select.scalselect')"),
        ("subspan.detect.subspacead", "from subspan.reproduce import run"),
        ("subspan.detect.subspacead", "from subspan import __version__"),
        ("subspan.datasets.texts", "from subspan.models import capture"),
        ("subspan.reproduce.realign", "from subspan.report import page"),
        ("subspan.models.capture", "from subspan.nn import heads"),
        ("subspan.attic.box", "import math"),
    ],
)
def test_an_import_that_climbs_is_seen(module: str, source: str) -> None:
    assert len(climbing_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "subspan.statistics.moments",
            "from subspan.geometry import Subspace\nfrom ..geometry.rank import select_rank",
        ),
        ("subspan.detect.images", "from .subspacead import SubspaceDetector\nfrom subspan.detect import subspacead"),
        ("subspan.detect.images", "from subspan.models.features import FeatureGrid\nimport torch.nn"),
        (
            "subspan.reproduce.realign",
            "from subspan import __version__, align, datasets\nfrom subspan.align import ReAlign",
        ),
        ("subspan.cli", "from subspan.report import page\nfrom subspan.reproduce import run"),
        (
            "subspan.geometry.files",
            '"""Beside subspan.detect this says nothing."""\nraise ValueError("subspan.detect: no")',
        ),
    ],
)
def test_an_import_that_goes_down_is_let_through(module: str, source: str) -> None:
    assert climbing_imports(source, module) == []


def test_relative_imports_of_a_package_count_from_itself() -> None:
    assert climbing_imports("from . import subspacead", "subspan.detect", package=True) == []
    assert len(climbing_imports("from ..select import ScalSelect", "subspan.detect", package=True)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "joblib.load(path)",
        "def late():\n    import cloudpickle as safe",
        "np.load(path)",
        "numpy.load(path, allow_pickle=flag)",
        "np.load(path, allow_pickle=False) if x else np.lib.format.read_array(f, allow_pickle=True)",
        "torch.load(path)",
        "loader(path, weights_only=False)",
        "torch.save(state, path)",
        "frame.to_pickle(path)",
    ],
)
def test_a_pickle_is_seen(source: str) -> None:
    assert unsafe_reads(textwrap.dedent(source), "subspan.datasets.tables")


def test_safe_reads_are_let_through() -> None:
    source = "np.load(p, mmap_mode='r', allow_pickle=False)\ntorch.load(p, weights_only=True)\njson.load(f)"
    assert unsafe_reads(source, "subspan.datasets.tables") == []
