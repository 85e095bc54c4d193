import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sources import nodes_of, source_files
from subspan.reproduce import SYSTEMS, Check, Outcome, find, listing, recorded, run

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "minilm")


def outcome():
    checks = [Check.above("effect", "gap", 0.2, 0.5), Check.above("identity", "gap", 0.2, 0, quick=True)]
    claim = Check.at_least("claim", "accuracy", 0.9, 0.8)
    return Outcome("c", "d", "m", "accuracy", 0.9, {"chance": 0.1}, main=claim, checks=checks)


def test_a_run_is_recorded_whole(tmp_path, monkeypatch):
    import types

    module = types.ModuleType("subspan.reproduce.sts")
    seen = []

    def protocol(*, quick, seed, progress):
        progress("half", 0.5)
        seen.append((quick, seed))
        return outcome()

    module.protocol = protocol
    monkeypatch.setitem(sys.modules, "subspan.reproduce.sts", module)
    (system,) = find(["sts"])
    record = run(system, quick=True, seed=3, results=tmp_path / "r")
    assert seen[0] == (True, 3)
    wanted = {"system", "claim", "data", "model", "metric", "ours", "baselines", "bar", "holds", "seconds", "versions"}
    assert wanted <= set(record)
    # Quick, it is too small for the claim and for the effect that would fail.
    assert (record["main_bar_holds"], record["holds"]) == (None, True)
    assert run(system)["holds"] is False
    assert json.loads((tmp_path / "r" / "sts.quick.json").read_text()) == record
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["sts.quick.json"]


def test_names():
    assert find(["all"]) == list(SYSTEMS)
    assert [s.name for s in find(["sts", "sts", "realign"])] == ["sts", "realign"]
    for bad in (["nothing"], []):
        with pytest.raises(ValueError, match="name: "):
            find(bad)


def test_every_system_has_its_protocol_its_page_and_its_public_name():
    import importlib

    for system in SYSTEMS:
        assert callable(importlib.import_module(f"subspan.reproduce.{system.module}").protocol)
        assert hasattr(importlib.import_module(f"subspan.{system.room}"), system.public)
        page = (ROOT / "docs" / "systems" / f"{system.name}.md").read_text(encoding="utf-8")
        assert f"<!-- results: {system.name} -->" in page or f"subspan reproduce {system.name}" in page
    assert [entry["name"] for entry in listing()] == [system.name for system in SYSTEMS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_a_quick_run_measures_everything_and_what_it_judges_holds(system):
    pytest.importorskip("lightning", reason="protocols train with Lightning (extra: train)")
    from subspan.datasets import is_installed

    if missing := [name for name in WEIGHTS if not is_installed(name)]:
        pytest.skip(f"{missing} are not installed")
    said = []
    record = run(system, quick=True, progress=lambda message, fraction: said.append(fraction))
    assert record["tables"]
    assert all(0 <= fraction <= 1 for fraction in said)
    assert all((check["holds"] is None) != check["judged"] for check in record["checks"])
    assert all(check["holds"] for check in record["checks"] if check["judged"] and check["required"])


def test_every_bar_comes_from_a_bound_and_training_from_one_module():
    """`Check(…)` spells out text and verdict, and could state another bar than it tests."""
    for path, source in source_files().items():
        if path.stem == "protocol" or "reproduce" not in path.parts:
            continue
        for node in nodes_of(source):
            called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            assert called != "Check", f"{path.name}:{node.lineno} spells a check out"
            assert not any("LightningModule" in base for base in bases), f"{path.name}:{node.lineno} trains by itself"


def test_recorded_runs_are_full_and_agree_with_their_bars():
    for system in SYSTEMS:
        record = recorded(system.name)
        if record is None:
            continue
        assert record["system"] == system.name
        assert record["quick"] is False
        required = [check["holds"] for check in record["checks"] if check["required"]]
        assert record["holds"] == (record["main_bar_holds"] and all(required))
    assert recorded("nothing") is None


def test_the_readme_shows_what_was_recorded():
    pytest.importorskip("latex2mathml", reason="the docs extra is not installed")
    done = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
