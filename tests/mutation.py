"""Change the library in small ways, one at a time, and say which changes no test notices.

    python tests/mutation.py --count 150 --seed 0            # a sample of every room
    python tests/mutation.py --count 20 src/subspan/geometry # of some files or folders

A mutant is one change of one expression: an operator, a comparison, a constant, a reduction, a dropped statement. The
tests that are run for it are those of its module, and those that name what the module defines. Survivors are printed as
differences; each is either a test that is missing or a change that changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Protocols are judged by their records and pages by people; their shared words are in the sample.
LEFT_OUT = re.compile(r"/(reproduce/(?!protocol|runner|trials|training)[\w/]+|report/\w+)\.py$|__init__\.py$")
NUMBERS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Add,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NAMES = {
    "mean": "sum",
    "sum": "mean",
    "max": "min",
    "min": "max",
    "amax": "amin",
    "amin": "amax",
    "argmax": "argmin",
    "argmin": "argmax",
    "clamp_min": "clamp_max",
    "sqrt": "square",
    "square": "abs",
    "log": "exp",
    "exp": "log",
    "any": "all",
    "all": "any",
    "median": "mean",
    "sin": "cos",
    "cos": "sin",
}


@dataclass(frozen=True)
class Mutant:
    """A module of the library and the place in its syntax tree that is changed, with what stands there then."""

    module: Path
    place: int
    variant: int
    line: int
    before: str
    after: str


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Every small change of one node."""
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.BinOp | ast.AugAssign) and type(changed.op) in NUMBERS:
        changed.op = NUMBERS[type(changed.op)]()
        yield changed
    elif isinstance(changed, ast.Compare) and type(changed.ops[0]) in COMPARISONS:
        changed.ops[0] = COMPARISONS[type(changed.ops[0])]()
        yield changed
    elif isinstance(changed, ast.BoolOp):
        changed.op = ast.And() if isinstance(changed.op, ast.Or) else ast.Or()
        yield changed
    elif isinstance(changed, ast.UnaryOp) and isinstance(changed.op, ast.USub | ast.Not):
        yield changed.operand
    elif isinstance(changed, ast.Constant) and isinstance(changed.value, bool):
        changed.value = not changed.value
        yield changed
    elif isinstance(changed, ast.Constant) and isinstance(changed.value, int):
        changed.value += 1
        yield changed
    elif isinstance(changed, ast.Constant) and isinstance(changed.value, float):
        changed.value = changed.value * 2 or 1.0
        yield changed
    elif isinstance(changed, ast.Attribute) and changed.attr in NAMES and isinstance(changed.ctx, ast.Load):
        changed.attr = NAMES[changed.attr]
        yield changed
    elif isinstance(changed, ast.IfExp):
        yield changed.orelse
    elif isinstance(changed, ast.Expr) and isinstance(changed.value, ast.Call):
        yield ast.Pass()


def places(tree: ast.Module) -> list[ast.AST]:
    """Nodes that a change of may be seen in: no annotations, docstrings, messages, or what only types read."""
    found: list[ast.AST] = []

    def visit(node: ast.AST, field: str = "") -> None:
        if field in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise | ast.JoinedStr):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        found.append(node)
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, name)

    visit(tree)
    return found


class Replace(ast.NodeTransformer):
    """Put one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)


def mutants(module: Path) -> list[Mutant]:
    """Every mutant of a module."""
    found = []
    for place, node in enumerate(places(ast.parse(module.read_text(encoding="utf-8")))):
        for variant, changed in enumerate(variants(node)):
            line = getattr(node, "lineno", 0)
            found.append(Mutant(module, place, variant, line, ast.unparse(node), ast.unparse(changed)))
    return found


def source_of(mutant: Mutant) -> str:
    """The module with the change."""
    tree = ast.parse(mutant.module.read_text(encoding="utf-8"))
    node = places(tree)[mutant.place]
    changed = ast.copy_location(list(variants(node))[mutant.variant], node)
    return ast.unparse(ast.fix_missing_locations(Replace(node, changed).visit(tree)))


def sample(modules: list[Path], count: int, seed: int) -> list[Mutant]:
    """As many mutants of each room as its size asks for, and at least three."""
    draw, rooms = random.Random(seed), defaultdict(list)
    for module in modules:
        rooms[module.relative_to(ROOT / "src" / "subspan").parts[0]] += mutants(module)
    total = sum(map(len, rooms.values()))
    chosen: list[Mutant] = []
    for found in rooms.values():
        chosen += draw.sample(found, min(len(found), max(3, round(count * len(found) / total))))
    draw.shuffle(chosen)
    return chosen


def tests_of(module: Path) -> list[str]:
    """Test files of a module: its own first, then those that import what it defines, of its room first."""
    inside = module.relative_to(ROOT / "src" / "subspan")
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    named = re.compile(r"\b(" + "|".join([*map(re.escape, names), f"import {inside.stem}"]) + r")\b")

    def rank(test: Path) -> int:
        if test.stem == f"test_{inside.stem}":
            return 0
        if not named.search(test.read_text(encoding="utf-8")):
            return 9
        return 1 if test.parent.name == inside.parts[0] else 2

    ranked = sorted((rank(test), str(test.relative_to(ROOT))) for test in (ROOT / "tests").rglob("test_*.py"))
    return [test for order, test in ranked if order < 9][:8]


def survives(mutant: Mutant, tree: Path, seconds: int) -> bool:
    """Whether the tests pass with the change."""
    target = tree / mutant.module.relative_to(ROOT)
    original = target.read_bytes()
    target.write_text(source_of(mutant), encoding="utf-8")
    try:
        return passes(mutant.module, tree, seconds)
    finally:
        target.write_bytes(original)


def passes(module: Path, tree: Path, seconds: int) -> bool:
    """Whether the tests of a module pass in a copy of the tree; a child with all heavy packages in it runs them."""
    tests = tests_of(module)
    if not tests:
        return True
    child = os.fork()
    if child == 0:
        os.setpgrp()
        os.chdir(tree)
        quiet = os.open(tree.parent / "tests.log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        import pytest

        sys.path.insert(0, str(tree / "src"))
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
        os._exit(int(code))
    return _exit_code(child, time.monotonic() + seconds) == 0


def _exit_code(child: int, deadline: float) -> int:
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["src/subspan"], help="modules or folders; the library by default")
    parser.add_argument("--count", type=int, default=150, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=240, help="tests that take longer have noticed")
    parser.add_argument("--json", type=Path, help="write what was found to a file, as it comes")
    options = parser.parse_args()
    paths = [Path(path).resolve() for path in options.paths]
    modules = sorted({file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])})
    chosen = sample([m for m in modules if not LEFT_OUT.search(str(m))], options.count, options.seed)
    os.environ["CI"] = "1"  # the same examples of every property each time
    for heavy in ("torch", "numpy", "scipy.stats", "sklearn.utils.estimator_checks", "pytest", "hypothesis"):
        __import__(heavy)
    import torch

    torch.set_num_threads(1)
    left: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / ROOT.name
        kept: Callable[[str, list[str]], set[str]] = shutil.ignore_patterns(".git", ".venv", "dist", "site", ".tools")
        shutil.copytree(ROOT, tree, ignore=kept)
        for module in {mutant.module.parent: mutant.module for mutant in chosen}.values():
            if not passes(module, tree, options.seconds):
                print(f"left out: the tests of {module.relative_to(ROOT)} do not pass without any change", flush=True)
                print((tree.parent / "tests.log").read_text(encoding="utf-8", errors="replace")[-3000:], flush=True)
                chosen = [mutant for mutant in chosen if mutant.module.parent != module.parent]
        for number, mutant in enumerate(chosen, 1):
            alive = survives(mutant, tree, options.seconds)
            where = f"{mutant.module.relative_to(ROOT)}:{mutant.line}"
            print(f"{number}/{len(chosen)} {'SURVIVES' if alive else 'noticed'} {where}", flush=True)
            if alive:
                left.append({"where": where, "before": mutant.before[:300], "after": mutant.after[:300]})
                print(f"  - {mutant.before[:300]}\n  + {mutant.after[:300]}", flush=True)
            if options.json:
                options.json.write_text(json.dumps({"done": number, "survivors": left}, indent=1), encoding="utf-8")
    print(f"{len(left)} of {len(chosen)} survive")


if __name__ == "__main__":
    main()
