"""Moments and streamed subspace fits beside the plain product and scikit-learn's and TorchDR's PCA.

Run: python benchmarks/moments.py [--rows 200000] [--columns 768]. Every peer runs in a process of its own on the same
rows, read from one memory map, so that peak memory is its own. The floor of one pass is the product X'X: 2 n d^2 flops.
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
from pathlib import Path

import numpy as np

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
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    basis = fit()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.save(out, basis)
    print(json.dumps({"seconds": seconds, "mib": (peak - baseline) / 1024}))


def best(function, repeats=5):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--columns", type=int, default=768)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(*options.one)
        return
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores; {options.rows} x {options.columns} float32")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "x.npy")
        rows = np.lib.format.open_memmap(path, "w+", np.float32, (options.rows, options.columns))
        mix = rng.standard_normal((RANK, options.columns), dtype=np.float32) * np.geomspace(4, 0.5, RANK)[:, None]
        for start in range(0, options.rows, 8192):
            part = rows[start : start + 8192]
            part[:] = rng.standard_normal((len(part), RANK), dtype=np.float32) @ mix.astype(np.float32)
            part += rng.standard_normal(part.shape, dtype=np.float32) + 3
        rows.flush()
        block = np.array(rows)
        floor, ours_seconds = best(product(block)), best(update(block))
        flops = 2 * options.rows * options.columns**2
        print(f"X'X {floor:.2f} s ({flops / floor / 1e9:.0f} GFLOP/s), Moments.update {ours_seconds:.2f} s")
        print(f"  speed of Moments.update / X'X = {floor / ours_seconds:.2f}")
        del block, rows
        results, bases = {}, {}
        for index, name in enumerate(FITS):
            out = str(Path(folder) / f"{index}.npy")
            runs = []
            for _ in range(2):
                command = [sys.executable, __file__, "--one", name, path, out]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{name}: failed\n{done.stderr[-600:]}")
                    break
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            if runs:
                results[name] = min(runs, key=lambda run: run["seconds"])
                bases[name] = np.load(out)
        first = next(iter(FITS))
        for name, run in results.items():
            cosine = np.linalg.svd(bases[first].T @ bases[name], compute_uv=False).min()
            print(
                f"{name:42s} {run['seconds']:7.2f} s, {run['seconds'] / results[first]['seconds']:6.2f} x ours, "
                f"{run['mib']:6.0f} MiB over the start, largest angle to ours {np.arccos(min(1, cosine)):.1e}"
            )


if __name__ == "__main__":
    main()
