"""Damaged files of every kind are read, or refused by their names: nothing else happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pyarrow comes with the extra tables")
pytest.importorskip("PIL", reason="Pillow comes with the extra vision")
SCRIPT = Path(__file__).with_name("fuzz_readers.py")
SOURCE = SCRIPT.parent.parent / "src"


def fuzzed(count: int, seed: int) -> str:
    """What the script prints: every failure, and how many files it damaged."""
    command = [sys.executable, str(SCRIPT), "--count", str(count), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.long
def test_damaged_files_are_read_or_refused_by_their_names() -> None:
    printed = fuzzed(150, seed=0)
    assert printed.startswith("150 damaged files: ")
    assert " read, " in printed
    assert " refused; " in printed


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_thousand_damaged_files() -> None:
    assert fuzzed(5000, seed=1).startswith("5000 damaged files: ")
