"""Seconds and peak memory of `subspan report` on 100,000 × 768 float32 rows, each kind of file in a process of its own.

    python benchmarks/report.py [--rows 100000] [--columns 768] [--against] [--json FILE]

Bars: under 60 s and 3 GiB on two cores. Rows: a power-law spectrum in random directions, a common mean, 30 labels.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from record import Record, parser

SECONDS, GIBIBYTES = 60.0, 3.0


def write_rows(path: Path, n: int, d: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    scale = np.arange(1, d + 1, dtype=np.float32) ** -0.4
    directions = np.linalg.qr(rng.normal(size=(d, d)))[0].astype(np.float32) * scale[:, None]
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
    mean = rng.normal(size=d).astype(np.float32) / d**0.5
    for start in range(0, n, 10_000):
        block = rng.normal(size=(min(10_000, n - start), d)).astype(np.float32)
        rows[start : start + len(block)] = block @ directions + mean
    rows.flush()


def measure(arguments: list[str], folder: Path) -> dict[str, float]:
    """Seconds, processor seconds and peak resident memory of one command."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "subspan", *arguments], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"subspan {' '.join(arguments)} failed")
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "gibibytes": usage.ru_maxrss / 2**20,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=100_000)
    arguments.add_argument("--columns", type=int, default=768)
    arguments.add_argument("--against", action="store_true", help="with a second embedding of the same rows")
    options = arguments.parse_args()
    beside = ", with a second embedding of the same rows" if options.against else ""
    record = Record("report", f"{options.rows} x {options.columns} float32, 30 labels{beside}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.npy", options.rows, options.columns)
        names = [f"class {label}" for label in np.random.default_rng(1).integers(0, 30, options.rows)]
        (folder / "labels.txt").write_text("\n".join(names) + "\n")
        command = ["report", "rows.npy", "--labels", "labels.txt"]
        if options.against:
            write_rows(folder / "other.npy", options.rows, options.columns, seed=1)
            command += ["--against", "other.npy"]
        found = measure(command, folder)
    columns = ["command", "seconds", "processor seconds", "GiB at most"]
    written = f"`subspan {' '.join(command)}`"
    record.table("The whole command, from start to page", columns, [[written, *found.values()]])
    record.target("seconds", found["seconds"], most=SECONDS)
    record.target("GiB", found["gibibytes"], most=GIBIBYTES)
    record.save(options.json)


if __name__ == "__main__":
    main()
