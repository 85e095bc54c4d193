"""Leverage by streamed moments against the published path, two full decompositions of the pool in memory.

Run: python benchmarks/scalselect.py [--rows N] [--columns D] [--json FILE]. Each path runs in a process of its own, so
that its peak memory is its own; both read the same file of float32 rows. Then the time per row up to 200,000 rows.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from subspan.select import LeverageSelector

BUDGET = 0.16


def pool(path: Path, rows: int, columns: int) -> None:
    """Correlated rows with a mean, written in blocks."""
    random = np.random.default_rng(0)
    mixing = (random.standard_normal((columns, columns)) * np.geomspace(1, 0.02, columns)).astype(np.float32)
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, columns))
    for start in range(0, rows, 8192):
        count = min(8192, rows - start)
        table[start : start + count] = random.standard_normal((count, columns), dtype=np.float32) @ mixing + 2
    table.flush()


def published(path: Path) -> tuple[np.ndarray, int]:
    """Centre, decompose for the rank, decompose again for the scores."""
    rows = np.load(path)
    centred = rows.copy()
    centred -= centred.mean(axis=0, keepdims=True)
    _, s, _ = np.linalg.svd(centred, full_matrices=False)
    k = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9)) + 1
    u, _, _ = np.linalg.svd(centred, full_matrices=False)
    return (u[:, :k] ** 2).sum(axis=1), k


class Blocks:
    """A .npy file read in blocks. The library takes the path as well, but mapped pages would count as memory here."""

    def __init__(self, path: Path):
        table = np.load(path, mmap_mode="r")
        self.path, self.offset, self.shape = path, table.offset, table.shape

    def __iter__(self) -> Iterator[np.ndarray]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while len(block := np.fromfile(file, np.float32, 8192 * self.shape[1])):
                yield block.reshape(-1, self.shape[1])


def streamed(path: Path) -> tuple[np.ndarray, int]:
    selector = LeverageSelector(BUDGET).fit(Blocks(path))
    return selector.scores_, selector.k_


def child(method: str, path: Path) -> None:
    """Run one path once and print its facts."""
    before = peak()
    started, processor = time.perf_counter(), time.process_time()
    scores, k = (published if method == "published" else streamed)(path)
    facts = {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "peak_mib": peak() - before,
        "k": k,
    }
    np.save(path.with_suffix(f".{method}.npy"), scores)
    print(json.dumps(facts))


def peak() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def measured(method: str, path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", method, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--columns", type=int, default=768)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"machine: {machine}; {options.rows} x {options.columns} float32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.npy"
        pool(path, options.rows, options.columns)
        facts = {method: measured(method, path) for method in ("published", "streamed")}
        a, b = (np.load(path.with_suffix(f".{method}.npy")) for method in ("published", "streamed"))
        m = round(BUDGET * options.rows)
        first, second = np.argsort(-a, kind="stable"), np.argsort(-b, kind="stable")
        agreement = {
            "same_rank": facts["published"]["k"] == facts["streamed"]["k"],
            "same_selection": len(set(first[:m]) & set(second[:m])) / m,
            "largest_difference": float(np.abs(a - b).max()),
        }
        scaling = []
        for rows in options.sizes:
            pool(path, rows, options.columns)
            scaling.append({"rows": rows, **measured("streamed", path)})
    for method, found in facts.items():
        print(
            f"{method:10} {found['seconds']:7.2f} s, {found['processor_seconds']:7.2f} processor s, "
            f"{found['peak_mib']:7.0f} MiB above the start, k = {found['k']:.0f}"
        )
    for name, unit in (("processor_seconds", "time"), ("peak_mib", "memory")):
        print(f"published / streamed {unit}: {facts['published'][name] / facts['streamed'][name]:.1f}")
    print(f"same k: {agreement['same_rank']}, same selection: {agreement['same_selection']:.4%} of {m} rows, "
          f"largest difference of a score {agreement['largest_difference']:.1e}")  # fmt: skip
    for found in scaling:
        print(
            f"{found['rows']:8} rows: {1e6 * found['processor_seconds'] / found['rows']:7.2f} processor microseconds "
            f"a row, {found['peak_mib']:6.0f} MiB above the start"
        )
    if options.json:
        record = {"machine": machine, "rows": options.rows, "columns": options.columns}
        options.json.write_text(
            json.dumps({**record, **facts, **agreement, "scaling": scaling}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
