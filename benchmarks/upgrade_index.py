"""What `subspan upgrade` costs: memory of migrating a large index in a stream, and mapping beside a plain product.

Run: python benchmarks/upgrade_index.py [ROWS]. Ratios are of times measured side by side in this process; the index
lies in a temporary folder (12 GB for a million rows) that is removed at the end.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch

from subspan.align import EmbeddingAdapter
from subspan.datasets.faiss_files import flat_header
from subspan.solvers.neighbours import nearest

D, PAIRS, BLOCK = 768, 4000, 4096


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Best of several runs after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def large_index(path: Path, rows: int) -> np.ndarray:
    """A flat index of unit rows, written as a stream; the rows of its first block, which are all different."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal((BLOCK, D), dtype=np.float32) * np.arange(1, D + 1, dtype=np.float32) ** -0.5
    first = unit(base)
    with path.open("wb") as stream:
        stream.write(flat_header(rows, D, "inner", id_map=None))
        for start in range(0, rows, BLOCK):
            # Shifted copies: no two rows are alike, without a million times 768 draws.
            block = first if start == 0 else unit(base + np.roll(base, start // BLOCK, axis=0))
            block[: rows - start].tofile(stream)
    return first


def stream(rows: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = large_index(folder / "old.faiss", rows)
        turn = np.linalg.qr(np.random.default_rng(1).standard_normal((D, D)))[0].astype(np.float32)
        noise = 0.01 * np.random.default_rng(2).standard_normal((PAIRS, D)).astype(np.float32)
        np.save(folder / "new.npy", unit(first[:PAIRS] @ turn + noise))
        np.save(folder / "ids.npy", np.arange(PAIRS))
        program = "import sys; from subspan import cli; sys.exit(cli.run())"
        command = [
            sys.executable, "-c", program, "upgrade", "old.faiss", "new.npy", "--sample-ids", "ids.npy", "--method",
            "procrustes", "--migrate", "migrated.faiss", "--json",
        ]  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        elapsed = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        if done.returncode not in (0, 1):
            raise SystemExit(done.stderr)
        facts = json.loads(done.stdout)
        size = (folder / "migrated.faiss").stat().st_size / 2**30
        print(f"{rows} x {D} float32, flat FAISS index to flat FAISS index of {size:.2f} GiB")
        print(f"  whole command: peak memory {peak:.2f} GiB, {elapsed:.0f} s")
        print(f"  read back: {facts['written']['migrated_index']['verified']}")


def speed() -> None:
    torch.manual_seed(0)
    old = torch.nn.functional.normalize(torch.randn(50_000, D), dim=-1)
    queries = torch.nn.functional.normalize(torch.randn(2000, D), dim=-1)
    turn = torch.linalg.qr(torch.randn(D, D)).Q.contiguous()
    adapter = EmbeddingAdapter(turn, torch.zeros(D))
    normal = EmbeddingAdapter(turn, torch.zeros(D), normalize_input=True, normalize_output=True)
    with torch.no_grad():
        plain = seconds(lambda: old @ turn.T)
        print(f"mapping {len(old)} rows: plain product {plain:.3f} s")
        for name, module in (("adapter", adapter), ("adapter with both normalisations", normal)):
            print(f"  {name}: {plain / seconds(lambda module=module: module(old)):.0%} of the speed of the product")

        def searched() -> object:
            return nearest(adapter(queries), old, 10, metric="inner")

        def product() -> object:
            return (queries @ turn.T) @ old.T

        plain = seconds(product, 3)
        print(f"mapping {len(queries)} queries and searching {len(old)} rows: products alone {plain:.3f} s")
        print(f"  adapter and subspan's exact search: {plain / seconds(searched, 3):.0%} of their speed")
        index = faiss.IndexFlatIP(D)
        index.add(old.numpy())
        wrapped = faiss.IndexPreTransform(index)
        for transform in reversed(adapter.to_faiss()):
            wrapped.prepend_transform(transform)
        rows = queries.numpy()
        bare = seconds(lambda: index.search(rows, 10), 3)
        print(f"  FAISS behind the transform: {bare / seconds(lambda: wrapped.search(rows, 10), 3):.0%} of FAISS bare")


if __name__ == "__main__":
    stream(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
    speed()
