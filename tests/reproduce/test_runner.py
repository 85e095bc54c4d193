import json
import subprocess
import sys
from pathlib import Path

import pytest

from subspan.reproduce import SYSTEMS, Check, Outcome, Table, find, listing, recorded, run
from subspan.reproduce.protocol import status, tally

ROOT = Path(__file__).resolve().parents[2]


def outcome(holds=True, check=True, required=True):
    return Outcome(
        claim="c",
        data="d",
        model="m",
        metric="accuracy",
        ours=0.9,
        baselines={"chance": 0.1},
        bar=">= 0.8",
        holds=holds,
        checks=[Check("effect", "gap", 0.2, "> 0", check, required)],
        tables=[Table("t", ["a", "b"], [[1, 2.0]])],
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((True, True), True), ((False, True), False), ((True, False), False), ((True, False, False), True)],
)
def test_the_whole_holds_only_with_every_required_check(arguments, expected):
    assert outcome(*arguments).all_hold is expected
    assert outcome(*arguments).facts()["holds"] is expected


def test_numbers_must_be_finite_and_tables_rectangular():
    with pytest.raises(ValueError, match="ours: a measured number must be finite"):
        Outcome("c", "d", "m", "x", float("nan"), {}, "b", True)
    with pytest.raises(ValueError, match="expected 2 cells"):
        Table("t", ["a", "b"], [[1]])


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
    assert seen == [(True, 3)]
    wanted = {"system", "claim", "data", "model", "metric", "ours", "baselines", "bar", "holds", "seconds", "versions"}
    assert wanted <= set(record)
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


def test_a_status_counts_the_claim_and_the_required_checks():
    checks = [Check("a", "m", 1.0, "> 0", True), Check("b", "m", 0.0, "> 0", False)]
    aside = Check("c", "m", 0.0, "> 0", False, required=False)
    record = Outcome("c", "d", "m", "x", 1.0, {}, "> 0", True, [*checks, aside]).facts()
    assert tally(record) == (True, 2, 3)
    assert status(record) == "main claim yes · 2 of 3 checks"
    assert status({**record, "main_bar_holds": False}) == "main claim no · 1 of 3 checks"


def test_the_readme_shows_what_was_recorded():
    pytest.importorskip("latex2mathml", reason="the docs extra is not installed")
    done = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
