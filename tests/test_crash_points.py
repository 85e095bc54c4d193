"""Killed wherever it touches a file, no work leaves anything half done: the next run ends as an undisturbed one.

What counts as a point, and what is looked at afterwards, stands in `crash_points.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crash_points import JOBS

SCRIPT = Path(__file__).with_name("crash_points.py")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be forked")


def tried(points: int, *names: str) -> None:
    pytest.importorskip("faiss", reason="faiss comes with the extra index")
    pytest.importorskip("pyarrow", reason="pyarrow comes with the extra tables")
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), str(points), *names], capture_output=True, text=True, timeout=3000, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]


@pytest.mark.long
def test_a_sample_of_points() -> None:
    tried(2, "upgrade", "features")


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_point(name: str) -> None:
    tried(0, name)
