"""`subspan merge`: plans, overlaps beside chance, a checkpoint that is written whole, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from subspan import cli
from subspan.commands.merging import Merge
from subspan.models import StateDelta, StoredWeights, write_weights
from subspan.weights import average, iso_cts


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A base of two matrices and a vector; the experts share the subspace of one matrix, and none of the other."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(40, 30, generator=generator), "b": torch.randn(40, 30, generator=generator)}
    base["bias"] = torch.zeros(40)
    basis = torch.linalg.qr(torch.randn(40, 6, generator=generator)).Q
    write_weights(base, "base", finish=lambda made: (made / "config.json").write_text('{"model_type": "x"}'))
    for number, own in enumerate((basis[:, :3], basis[:, 3:])):
        change = {"a": basis[:, :3] @ torch.randn(3, 30), "b": own @ torch.randn(3, 30), "bias": torch.ones(40)}
        write_weights({name: base[name] + change[name] for name in base}, f"e{number}", shard_bytes=5000)
    return tmp_path


def said(capsys, *arguments):
    assert cli.run(["merge", *arguments]) == 0
    return capsys.readouterr().out


def test_a_plan_writes_nothing(folders, capsys):
    before = sorted(folders.iterdir())
    found = json.loads(said(capsys, "base", "e0", "e1", "-o", "merged", "--plan", "--json"))
    assert found["tensors"] == 3
    assert found["numbers"] == 40 * 30 * 2 + 40
    assert found["estimated_seconds"] > 0
    assert found["held_megabytes"] == pytest.approx(5 * 4 * 40 * 30 / 1e6)
    assert found["largest_tensor"] in "ab"
    assert sorted(folders.iterdir()) == before


def test_overlaps_tell_shared_directions_from_others(folders, capsys):
    found = json.loads(said(capsys, "base", "e0", "e1", "--json"))
    rows = {row["tensor"]: row for row in found["overlaps"]}
    assert list(rows) == ["a", "b"]  # the most overlapping first
    assert rows["a"]["overlap"] > 0.6
    assert rows["b"]["overlap"] < 1e-5
    assert rows["a"]["by_chance"] == pytest.approx(rows["a"]["rank"] / 40, abs=0.02)
    assert found["above_twice_chance"] == 1
    assert found["overlap_seconds"] > 0
    assert "merge_seconds" not in found  # nothing is written without -o
    assert "overlap" in said(capsys, "base", "e0", "e1", "--top", "1")


@pytest.mark.parametrize(("method", "function"), [("average", average), ("iso-cts", iso_cts)])
def test_what_is_written_is_the_merge(folders, capsys, method, function):
    said(capsys, "base", "e0", "e1", "-o", "merged", "--method", method)
    expected = function([StateDelta.between("base", expert) for expert in ("e0", "e1")]).added_to("base")
    found = StoredWeights("merged")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    merged = folders / "merged"
    assert (merged / "config.json").read_text() == '{"model_type": "x"}'
    assert json.loads((merged / "merge.json").read_text())["experts"] == ["e0", "e1"]
    assert method in (merged / "README.md").read_text()
    assert "How the experts overlap" in (merged / "report.html").read_text()
    assert not [path for path in folders.iterdir() if path.name.startswith(".")]


_MEASURED = """
import json, os, sys
from pathlib import Path
import torch
from subspan.commands.merging import Merge
from subspan.models import weight_files

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

def merged(size):
    paths = [Path(size, name) for name in ("base", "one", "two")]
    Merge(paths[0], tuple(paths[1:]), method, {}).run(Path(size, method), lambda *_: None)

torch.set_num_threads(1)
weight_files.BLOCK = 1 << 16
for method in sys.argv[1:]:  # each in a child, whose mark of the memory is its own
    if not os.fork():
        merged("small")  # what is loaded once is loaded with the first
        start = peak()
        merged("large")
        print(json.dumps([method, peak() - start]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, method
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel keeps no mark of the memory")
def test_a_merge_takes_a_third_of_the_models_memory(tmp_path):
    methods = ["average", "task-arithmetic", "ties", "dare"]
    part = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0)).bfloat16()
    for size, times in (("small", 1), ("large", 128)):
        (tmp_path / size).mkdir()
        for factor, name in enumerate(("base", "one", "two"), 1):
            write_weights({"w": (factor * part).repeat(times).view(-1, 512)}, tmp_path / size / name)
    run = [sys.executable, "-c", _MEASURED, *methods]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    peaks = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(peaks) == methods
    assert max(peaks.values()) < 2 * 128 * len(part) / 3, peaks


def test_options_reach_the_method(folders, capsys):
    said(capsys, "base", "e0", "-o", "half", "--method", "task-arithmetic", "--scaling", "0.5")
    delta = StateDelta.between("base", "e0")
    torch.testing.assert_close(StoredWeights("half")["a"], (0.5 * delta).added_to("base")["a"])


def test_a_killed_merge_goes_on(folders, capsys, monkeypatch):
    job = Merge(folders / "base", (folders / "e0", folders / "e1"), "average", {})

    def stop(message, fraction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(folders / "merged", stop)
    assert not (folders / "merged").exists()
    assert job.run(folders / "merged", lambda *_: None)["tensors"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "e0", "e0"], "EXPERT: the same folder is named twice"),
        (["base", "e0", "--density", "0.5"], "--density: tsv has no such option; it is for ties"),
        (["base", "e0", "--seed", "1"], "--seed: tsv has no such option; it is for dare"),
        (["base", "absent"], "EXPERT: 'absent' is not a folder"),
        (["base", "e0", "-o", "e1"], "-o: 'e1' exists"),
        (["base", "e0", "-o", "base/merged"], "-o: "),
        (["base", "other"], "other: tensors only in base"),
        (["base", "empty"], "empty: "),
        (["base", "broken", "-o", "merged"], "broken: 'a' contains NaN"),
        (["base", "e0", "--method", "ties", "--density", "2", "-o", "merged"], "density: in (0, 1], got 2"),
    ],
)
def test_refused_with_one_line_and_nothing_written(folders, capsys, arguments, message):
    (folders / "empty").mkdir()
    write_weights({"a": torch.zeros(40, 30)}, "other")
    base = dict(StoredWeights("base"))
    write_weights({**base, "a": torch.full((40, 30), float("nan"))}, "broken")
    before = {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
    assert cli.run(["merge", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()} == before
