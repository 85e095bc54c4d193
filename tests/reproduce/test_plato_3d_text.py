from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the sentence encoder is a transformers model (extra: text)")

from subspan.datasets import stdlib_docstrings
from subspan.reproduce import plato_3d_text as plato
from subspan.reproduce.materials import paired_worlds
from subspan.reproduce.materials.paired_worlds import World, first_sentence, functions, masked


def world(name: str, n: int, *, shapes: bool = False) -> World:
    """Ten shared dimensions under stronger private ones; of shapes, three families and points that are their rows."""
    g = torch.Generator().manual_seed(len(name))
    label = torch.arange(n) % 3
    common = torch.randn(n, 10, generator=g) + 2 * torch.eye(10)[label]
    sides = []
    for d in (24, 20):
        rest = 2.5 * torch.randn(n, d - 10, generator=g)
        turn = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
        sides.append(torch.cat([common + 0.25 * torch.randn(n, 10, generator=g), rest], 1) @ turn.mT)
    points = (common[:, None, :3] + 0.3 * torch.randn(n, 16, 3, generator=g)).numpy() if shapes else None
    labels = tuple("abc"[i] for i in label.tolist()) if shapes else ()
    return World(name, *sides, np.arange(n) // 4, 100, (100, 600), points, labels)


@pytest.fixture(scope="module")
def outcome():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plato, "code_world", lambda *_: world("code and docstrings", 900))
        patch.setattr(plato, "shape_worlds", lambda *_: [world("made shapes and captions", 800, shapes=True)])
        patch.setattr(plato, "QUICK_METHODS", plato.METHODS)
        patch.setattr(plato, "QUICK_COMPONENTS", (2, 10, 20))
        return plato.protocol(quick=True, seed=0, progress=lambda message, fraction: None)


def test_the_planted_effect_is_seen(outcome):
    assert outcome.ours > 0.8
    assert outcome.main.value == pytest.approx(outcome.ours / outcome.baselines["full, affine"])
    dominant = next(value for name, value in outcome.baselines.items() if name.startswith("PCA"))
    assert dominant < outcome.ours
    table = outcome.tables[0]
    cells = {(row[0], row[1]) for row in table.rows}
    methods = {"none", "affine", "ridge", "local cka", "relative"}
    spaces = {f"{s}-{k}" for s in ("PCA", "CCA") for k in (2, 10, 20)}
    assert cells == {("full", m) for m in methods - {"none"}} | {(s, m) for s in spaces for m in methods}


def test_shuffled_pairs_are_at_chance_and_the_subspace_is_purer(outcome):
    by_name = {check.name: check for check in outcome.checks}
    assert by_name["code and docstrings: shuffled pairs"].holds
    assert by_name["made shapes and captions: neighbours in the 3D subspace share the family"].holds


def test_identifiers_are_masked_and_the_rest_stays():
    code = """@wraps
def add(first, *, second=2):
    import os as system
    total = first.size + second
    return call(total, key='text')
"""
    kinds, source = masked(code) or ("", "")
    names = {"add", "first", "second", "total", "size", "call", "key", "os", "system", "wraps"}
    found = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert found == {"v"}
    assert not any(name in source for name in names)
    assert "'text'" in source
    assert kinds.split()[:2] == ["Module", "Import"]
    assert masked("def broken(:") is None
    assert masked("x = 1") is None


def test_the_first_sentence_of_a_docstring():
    assert first_sentence("Return the\n    sum. Of two.\n\nMore.") == "Return the sum"
    assert first_sentence("Only this.") == "Only this"


def test_functions_are_documented_distinct_and_named_by_module(monkeypatch):
    entries = stdlib_docstrings(min_length=20, kinds=("function",), folder=Path(asyncio.__file__).parent)
    monkeypatch.setattr(paired_worlds, "stdlib_docstrings", lambda **_: [*entries, *entries])
    found = list(functions(()))
    assert len(found) > 50
    assert len({sentence.lower() for _, sentence, _, _ in found}) == len(found)
    assert all(module.startswith(".") for module, *_ in found)
