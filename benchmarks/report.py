"""Seconds and peak memory of `subspan report` on 100,000 × 768 float32 rows, each kind of file in a process of its own.

    python benchmarks/report.py [--rows 100000] [--columns 768] [--against]

Bars: under 60 s and 3 GiB on two cores. Rows: a power-law spectrum in random directions, a common mean, 30 labels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=768)
    parser.add_argument("--against", action="store_true", help="with a second embedding of the same rows")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.npy", options.rows, options.columns)
        names = [f"class {label}" for label in np.random.default_rng(1).integers(0, 30, options.rows)]
        (folder / "labels.txt").write_text("\n".join(names) + "\n")
        arguments = ["report", "rows.npy", "--labels", "labels.txt"]
        if options.against:
            write_rows(folder / "other.npy", options.rows, options.columns, seed=1)
            arguments += ["--against", "other.npy"]
        found = measure(arguments, folder)
    bars = {"seconds": SECONDS, "gibibytes": GIBIBYTES}
    result = {
        "rows": options.rows,
        "columns": options.columns,
        **{key: round(value, 2) for key, value in found.items()},
        "bars": bars,
        "holds": all(found[key] < bar for key, bar in bars.items()),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
