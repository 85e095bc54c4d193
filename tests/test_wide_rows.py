"""Few rows of many columns: no verb makes a square of the columns, and a map between two such spaces is made once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from subspan import cli
from subspan.align import SpaceMap, UpgradeMap
from subspan.geometry import affine

pytest.importorskip("resource", reason="how much memory a process held is asked of POSIX")

ROWS = 80
# Each verb with the size of its two tables and its options. The peak of a process never falls: light ones come first.
VERBS = {
    "detect": ("wide", "detect {0} -o scores.csv"),
    "select": ("wide", "select {0} -m 5 -o rows.csv"),
    "shorten": ("wide", "shorten {0} --rank 5 -o short.npy"),
    "report --against": ("wide", "report {0} --against {1} -o both.html"),
    "align --method ridge": ("mapped", "align {0} {1} --method ridge -o map.safetensors --apply moved.npy"),
    "align --method cca": ("mapped", "align {0} {1} --method cca -o map.safetensors --apply moved.npy"),
    "upgrade": ("mapped", "upgrade {0} {1} --report upgrade.html --backfill-order order.txt"),
}
RUN = """
import json, resource, sys
from subspan import cli

def peak(name, line):
    # 1: a good answer, that the new encoder cannot serve.
    assert cli.run(line.format(name + ".npy", name + "_other.npy").split()) in (0, 1), line
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

verbs = json.loads(sys.argv[1])
before = max(peak("small", line) for _, line in verbs.values())
unit = 1 if sys.platform == "darwin" else 1024
print("peaks", json.dumps({verb: (peak(*use) - before) * unit for verb, use in verbs.items()}))
"""


@pytest.mark.long
def test_memory_grows_with_the_rows_not_with_the_square_of_the_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {"small": 60, "wide": 8000, "mapped": 1200}
    for name, d in columns.items():
        hidden = rng.normal(size=(ROWS, 6))
        for file in (name, f"{name}_other"):
            rows = hidden @ rng.normal(size=(6, d)) + rng.normal(size=(ROWS, d))
            np.save(tmp_path / f"{file}.npy", rows.astype(np.float32))
    ran = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(VERBS)],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    peaks = json.loads(ran.stdout.rsplit("peaks ", 1)[1])
    table, square = 4 * ROWS * columns["wide"], 8 * columns["mapped"] ** 2
    # A square of the columns in double precision would be 200 times the table.
    assert max(peaks[verb] for verb, (size, _) in VERBS.items() if size == "wide") < 40 * table, peaks
    # The map itself, and the copies that are applied and written; with squares of both sides together, 24 and 57.
    assert max(peaks[verb] for verb in VERBS if verb.startswith("align")) < 10 * square, peaks
    assert peaks["upgrade"] < 30 * square, peaks


@pytest.mark.parametrize("estimator", [SpaceMap(), SpaceMap("ridge"), UpgradeMap()])
def test_a_map_beyond_the_memory_is_refused_before_it_is_made(estimator, monkeypatch):
    monkeypatch.setattr(affine, "memory_bytes", lambda: 2**20)
    rows = np.random.default_rng(0).normal(size=(ROWS, 200))
    with pytest.raises(ValueError, match=r"200 to 200 dimensions takes 0\.000298 GiB.*shorten the rows first"):
        estimator.fit(rows, rows[:, ::-1])


@pytest.mark.parametrize("command", ["align {0} {1}", "upgrade {0} {1}"])
def test_the_command_line_refuses_a_map_beyond_the_memory_in_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(affine, "memory_bytes", lambda: 2**20)
    names = [str(tmp_path / name) for name in ("old.npy", "new.npy")]
    for seed, name in enumerate(names):
        np.save(name, np.random.default_rng(seed).normal(size=(ROWS, 200)).astype(np.float32))
    assert cli.run(command.format(*names).split()) == 2
    assert "200 to 200 dimensions" in capsys.readouterr().err


def test_two_wide_tables_are_compared_where_no_map_would_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(affine, "memory_bytes", lambda: 2**20)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, 4))
    names = [str(tmp_path / name) for name in ("old.npy", "new.npy")]
    for name in names:
        np.save(name, (hidden @ rng.normal(size=(4, 300))).astype(np.float32))
    assert cli.run(["report", names[0], "--against", names[1], "-o", str(tmp_path / "page.html")]) == 0
