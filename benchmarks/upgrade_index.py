"""What `subspan upgrade` costs: memory of migrating a large index in a stream, and mapping beside a plain product.

Run: python benchmarks/upgrade_index.py [--rows ROWS]. Ratios are of processor times measured side by side in this
process; the index lies in a temporary folder (12 GB for a million rows) that is removed at the end.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from record import Record, by_turns, parser
from subspan.align import EmbeddingAdapter
from subspan.datasets.faiss_files import flat_header
from subspan.solvers.neighbours import nearest

D, PAIRS, BLOCK = 768, 4000, 4096


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


def stream(record: Record, rows: int) -> None:
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
        columns = ["rows", "written, GiB", "peak memory, GiB", "seconds"]
        record.table("A flat FAISS index migrated by the command", columns, [[rows, size, peak, elapsed]])
        record.note(f"Read back: {facts['written']['migrated_index']['verified']}")
        record.target("peak memory of the whole command, GiB", peak, most=2)


def speed(record: Record) -> None:
    torch.manual_seed(0)
    old = torch.nn.functional.normalize(torch.randn(50_000, D), dim=-1)
    queries = torch.nn.functional.normalize(torch.randn(2000, D), dim=-1)
    turn = torch.linalg.qr(torch.randn(D, D)).Q.contiguous()
    adapter = EmbeddingAdapter(turn, torch.zeros(D))
    normal = EmbeddingAdapter(turn, torch.zeros(D), normalize_input=True, normalize_output=True)
    index = faiss.IndexFlatIP(D)
    index.add(old.numpy())
    wrapped = faiss.IndexPreTransform(index)
    for transform in reversed(adapter.to_faiss()):
        wrapped.prepend_transform(transform)

    with torch.no_grad():
        took = by_turns(
            {
                "product": lambda: old @ turn.T,
                "map": lambda: adapter(old),
                "normal": lambda: normal(old),
                "two products": lambda: (queries @ turn.T) @ old.T,
                "search": lambda: nearest(adapter(queries), old, 10, metric="inner"),
                "FAISS": lambda: index.search(queries.numpy(), 10),
                "FAISS behind": lambda: wrapped.search(queries.numpy(), 10),
            },
            rounds=5,
        )
    mapping, retrieval = took["product"] / took["map"], took["two products"] / took["search"]
    rows = [
        [f"mapping {len(old)} rows, over the product", mapping],
        ["the same with both normalisations", took["product"] / took["normal"]],
        [
            f"mapping {len(queries)} queries and searching {len(old)} rows, over the two products",
            retrieval,
        ],
        ["FAISS's search behind the map, over FAISS's search alone", took["FAISS"] / took["FAISS behind"]],
    ]
    record.table("Speed", ["", "ratio"], rows)
    record.target("speed of mapping over that of the plain product", mapping, least=0.8)
    record.target("speed of mapping and retrieval over that of the two products", retrieval, least=0.8)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=1_000_000)
    chosen = arguments.parse_args()
    made = Record("upgrade_index", f"{chosen.rows} x {D} float32; a temporary folder, removed at the end")
    stream(made, chosen.rows)
    speed(made)
    made.save(chosen.json)
