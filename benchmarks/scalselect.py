"""Leverage by streamed moments against the published path, two full decompositions of the pool in memory.

Run: python benchmarks/scalselect.py [--rows N] [--columns D] [--json FILE]. Each path runs in a process of its own, so
that its peak memory is its own; both read the same file of float32 rows. Then the time per row up to 200,000 rows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from record import Record, parser, peak
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


def measured(method: str, path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", method, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=20_000)
    arguments.add_argument("--columns", type=int, default=768)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    arguments.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    record = Record("scalselect", f"{options.rows} x {options.columns} float32, {BUDGET:.0%} selected")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.npy"
        pool(path, options.rows, options.columns)
        facts = {method: measured(method, path) for method in ("published", "streamed")}
        a, b = (np.load(path.with_suffix(f".{method}.npy")) for method in ("published", "streamed"))
        m = round(BUDGET * options.rows)
        first, second = np.argsort(-a, kind="stable"), np.argsort(-b, kind="stable")
        same = len(set(first[:m]) & set(second[:m])) / m
        apart = float(np.abs(a - b).max())
        scaling = []
        for rows in options.sizes:
            pool(path, rows, options.columns)
            scaling.append({"rows": rows, **measured("streamed", path)})
    names = {"published": "published: two full decompositions", "streamed": "LeverageSelector, streamed"}
    ratio = {key: facts["published"][key] / facts["streamed"][key] for key in ("processor_seconds", "peak_mib")}
    rows = [
        [names[method], found["seconds"], found["processor_seconds"], found["peak_mib"], found["k"]]
        for method, found in facts.items()
    ]
    columns = ["", "seconds", "processor seconds", "MiB over the start", "directions kept"]
    record.table("Leverage scores of a pool", columns, rows)
    record.target("published path over ours, processor time", ratio["processor_seconds"], least=1)
    record.target("published path over ours, memory", ratio["peak_mib"], least=1)
    record.target("share of the selection in common", same, least=1)
    record.target("largest difference of a score", apart, most=1e-5)
    rows = [[found["rows"], 1e6 * found["processor_seconds"] / found["rows"], found["peak_mib"]] for found in scaling]
    record.table("Streamed, more rows", ["rows", "processor microseconds a row", "MiB over the start"], rows)
    record.save(options.json)


if __name__ == "__main__":
    main()
