"""The spike filter's cost: beside the encoder it protects, beside JPEG purification, and fitted from moments or rows.

Run: python benchmarks/eigenshield.py. Ratios are of times measured side by side in this process.
"""

import os
import platform
import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.decomposition import PCA

from subspan.edit import RobustSpikes, SpikeFilter, jpeg
from subspan.geometry import Subspace
from subspan.reproduce.eigenshield import ImageFeatures

D, ROWS, BLOCK, SPIKES = 1280, 5120, 1024, 200


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Best of several runs after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    """Clean rows with a decaying spectrum over noise, and their perturbed versions."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(D)
    scale[:SPIKES] += torch.linspace(8, 1, SPIKES)
    clean = torch.randn(ROWS, D, generator=generator) * scale
    return clean, clean + 0.5 * torch.randn(ROWS, D, generator=generator)


def scores_from_rows(clean: np.ndarray, perturbed: np.ndarray) -> np.ndarray:
    """The same score the direct way: PCA of the rows, then every row's coordinates."""
    found = PCA(svd_solver="covariance_eigh").fit(clean)
    axes = found.components_[:SPIKES]
    change = ((perturbed - clean) @ axes.T) ** 2
    signal = ((clean - found.mean_) @ axes.T) ** 2
    return change.mean(0) / signal.mean(0)


def blocks(count: int, scale: float) -> Iterator[np.ndarray]:
    """Rows that are made as they are read."""
    for seed in range(count // BLOCK):
        yield scale * np.random.default_rng(seed).standard_normal((BLOCK, D), dtype=np.float32)


def main() -> None:
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} threads")
    clean, perturbed = embeddings()

    subspace = Subspace.random(D, 160, generator=torch.Generator().manual_seed(0))
    module = SpikeFilter(subspace.basis.float())
    dense = subspace.projector.float()
    images = torch.rand(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    encoder = ImageFeatures().eval()
    with torch.no_grad():
        batch = encoder(images)
        encode = seconds(lambda: encoder(images), 3)
        purify = seconds(lambda: jpeg(images, quality=75), 3)
        project = seconds(lambda: module(batch), 50)
        rows = clean[:2048]
        factored = seconds(lambda: module(rows), 20)
        squared = seconds(lambda: rows @ dense, 20)
    print(
        f"16 images at 224 px: encoder {encode * 1e3:.1f} ms, filter {project * 1e3:.3f} ms, JPEG {purify * 1e3:.1f} ms"
    )
    print(f"  filter / encoder = {project / encode:.2%}, JPEG / filter = {purify / project:.0f}")
    print(f"2048 vectors of {D}, 160 directions kept: factored {factored * 1e3:.2f} ms, dense {squared * 1e3:.2f} ms")
    print(f"  dense / factored = {squared / factored:.2f}")

    a, b = clean.numpy(), perturbed.numpy()
    fitted = RobustSpikes(rank=SPIKES).fit(a, b)
    np.testing.assert_allclose(fitted.rbns_, scores_from_rows(a, b), rtol=1e-2)
    ours = seconds(lambda: RobustSpikes(rank=SPIKES).fit(a, b), 2)
    theirs = seconds(lambda: scores_from_rows(a, b), 2)
    print(f"calibration on {ROWS} pairs of {D}: from moments {ours:.2f} s, PCA and all coordinates {theirs:.2f} s")
    print(f"  moments / rows = {ours / theirs:.2f}, equal scores")

    peaks = []
    for count in (ROWS, 4 * ROWS):
        tracemalloc.start()
        RobustSpikes(rank=SPIKES).fit(blocks(count, 1.0), blocks(count, 1.1))
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    print(f"streamed rows held at once: {peaks[0]:.1f} MiB for {ROWS} pairs, {peaks[1]:.1f} MiB for {4 * ROWS}")


if __name__ == "__main__":
    main()
