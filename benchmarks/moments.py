"""Moments and streamed subspace fits beside the plain product and scikit-learn's and TorchDR's PCA.

Run: python benchmarks/moments.py [--rows 200000] [--columns 768] [--repeats 2] [--json FILE]. Every peer runs in a
process of its own on the same rows, read from one memory map, so that peak memory is its own. The floor of one pass is
the product X'X: 2 n d^2 flops.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from record import Record, parser, peak, timed

RANK = 64


def product(rows):
    import torch

    x = torch.from_numpy(rows)
    return lambda: x.T @ x


def update(rows):
    import torch

    from subspan.statistics import Moments

    x = torch.from_numpy(rows)
    return lambda: Moments(x.shape[1]).update(x)


def ours(path):
    from subspan.statistics import fit_moments

    return lambda: fit_moments(path).subspace(RANK).basis.numpy()


def covariance_eigh(path):
    from sklearn.decomposition import PCA

    return lambda: PCA(RANK, svd_solver="covariance_eigh").fit(np.load(path)).components_.T


def incremental(path):
    from sklearn.decomposition import IncrementalPCA

    def fit():
        rows = np.load(path, mmap_mode="r")
        model = IncrementalPCA(RANK)
        for start in range(0, len(rows), 8192):
            model.partial_fit(np.array(rows[start : start + 8192]), check_input=False)
        return model.components_.T

    return fit


def torchdr_exact(path):
    import torch
    from torchdr import ExactIncrementalPCA

    def fit():
        rows = torch.from_numpy(np.load(path, mmap_mode="r+"))
        model = ExactIncrementalPCA(n_components=RANK, device="cpu")
        parts = [rows[start : start + 8192] for start in range(0, len(rows), 8192)]
        model.compute_mean(parts)
        model.fit(parts)
        return model.components_.numpy().T

    return fit


def torchdr_pca(path):
    import torch
    from torchdr import PCA

    def fit():
        model = PCA(n_components=RANK, device="cpu")
        model.fit_transform(torch.from_numpy(np.load(path)))
        return np.asarray(model.components_).T

    return fit


FITS = {
    "subspan, one pass": ours,
    "scikit-learn covariance_eigh, in memory": covariance_eigh,
    "scikit-learn IncrementalPCA": incremental,
    "TorchDR ExactIncrementalPCA, two passes": torchdr_exact,
    "TorchDR PCA, in memory": torchdr_pca,
}


def measure(name: str, path: str, out: str) -> None:
    fit = FITS[name](path)
    before = peak()
    wall, processor = time.perf_counter(), time.process_time()
    basis = fit()
    seconds, processor = time.perf_counter() - wall, time.process_time() - processor
    used = peak() - before
    np.save(out, basis)
    print(json.dumps({"seconds": seconds, "processor": processor, "mib": used}))


def write_rows(path: str, count: int, columns: int) -> None:
    """Rows of rank 64 with unit noise and a mean of 3 in every column, float32, written in blocks."""
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (count, columns))
    mix = rng.standard_normal((RANK, columns), dtype=np.float32) * np.geomspace(4, 0.5, RANK)[:, None]
    for start in range(0, count, 8192):
        part = rows[start : start + 8192]
        part[:] = rng.standard_normal((len(part), RANK), dtype=np.float32) @ mix.astype(np.float32)
        part += rng.standard_normal(part.shape, dtype=np.float32) + 3
    rows.flush()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=200_000)
    options.add_argument("--columns", type=int, default=768)
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.one:
        measure(*options.one)
        return
    record = Record("moments", f"{options.rows} x {options.columns} float32, rank {RANK}")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "x.npy")
        write_rows(path, options.rows, options.columns)
        block = np.load(path)
        floor, one = timed(product(block), options.repeats), timed(update(block), options.repeats)
        del block
        flops = 2 * options.rows * options.columns**2
        rows = [
            [name, run.seconds, run.processor, flops / run.processor / 1e9]
            for name, run in (("X'X in torch", floor), ("Moments.update", one))
        ]
        title = "One pass over rows in memory (GFLOP/s: of the plain product's work)"
        record.table(title, ["", "seconds", "processor seconds", "GFLOP/s"], rows)
        record.target("speed of Moments.update over that of X'X", floor.processor / one.processor, least=0.7)
        results, bases = {}, {}
        for index, name in enumerate(FITS):
            out = str(Path(folder) / f"{index}.npy")
            runs = []
            for _ in range(options.repeats):
                command = [sys.executable, __file__, "--one", name, path, out]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    record.note(f"{name} failed: {done.stderr.splitlines()[-1]}")
                    break
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            if runs:
                results[name] = min(runs, key=lambda run: run["processor"])
                bases[name] = np.load(out)
    ours_name = next(iter(FITS))
    rows, ratios, angles = [], {}, {}
    for name, run in results.items():
        a, b = (np.linalg.qr(bases[key].astype(np.float64))[0] for key in (ours_name, name))
        angles[name] = float(np.arcsin(min(1.0, np.linalg.norm(b - a @ (a.T @ b), 2))))
        ratios[name] = run["processor"] / results[ours_name]["processor"]
        rows.append([name, run["seconds"], run["processor"], ratios[name], run["mib"], angles[name]])
    columns = ["fit", "seconds", "processor seconds", "x ours", "MiB over the start", "largest angle to ours, rad"]
    record.table("Principal subspace of a file of rows, each fit in a process of its own", columns, rows)
    bounds = {
        "scikit-learn covariance_eigh, in memory": (1 / 1.1, "level with"),
        "scikit-learn IncrementalPCA": (10, "faster than"),
        "TorchDR ExactIncrementalPCA, two passes": (1.5, "faster than"),
        "TorchDR PCA, in memory": (4, "faster than"),
    }
    for name, (bound, word) in bounds.items():
        if name in ratios:
            record.target(f"{word} {name}: its processor time over ours", ratios[name], least=bound)
    exact = [angle for name, angle in angles.items() if name != "scikit-learn IncrementalPCA"]
    record.target("largest angle to the exact peers, radians", max(exact), most=1e-3)
    record.save(options.json)


if __name__ == "__main__":
    main()
