"""The spike filter's cost: beside the encoder it protects, beside JPEG purification, and fitted from moments or rows.

Run: python benchmarks/eigenshield.py [--json FILE]. Ratios are of times measured side by side in this process.
"""

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.decomposition import PCA

from record import Record, parser, timed
from subspan.edit import RobustSpikes, SpikeFilter, jpeg
from subspan.geometry import Subspace
from subspan.reproduce.materials import PooledFeatures

D, ROWS, BLOCK, SPIKES = 1280, 5120, 1024, 200


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Processor seconds, the least of several runs."""
    return timed(function, repeats).processor


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
    options = parser(__doc__).parse_args()
    record = Record("eigenshield", f"16 images at 224 px; {ROWS} pairs of {D} dimensions, {SPIKES} spikes")
    clean, perturbed = embeddings()

    subspace = Subspace.random(D, 160, generator=torch.Generator().manual_seed(0))
    module = SpikeFilter(subspace.basis.float())
    dense = subspace.projector.float()
    images = torch.rand(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    encoder = PooledFeatures().eval()
    with torch.no_grad():
        batch = encoder(images)
        encode = seconds(lambda: encoder(images), 3)
        purify = seconds(lambda: jpeg(images, quality=75), 3)
        project = seconds(lambda: module(batch), 50)
        rows = clean[:2048]
        factored = seconds(lambda: module(rows), 20)
        squared = seconds(lambda: rows @ dense, 20)
    rows = [
        ["encoder", 1e3 * encode, encode / project],
        ["spike filter", 1e3 * project, 1.0],
        ["JPEG purification", 1e3 * purify, purify / project],
    ]
    record.table("Purifying 16 images", ["", "processor ms", "x the filter"], rows)
    rows = [["factored", 1e3 * factored, 1.0], ["as a matrix", 1e3 * squared, squared / factored]]
    record.table("Projecting 2048 vectors on 160 directions", ["", "processor ms", "x factored"], rows)
    record.target("JPEG purification over the filter, processor time", purify / project, least=1)

    a, b = clean.numpy(), perturbed.numpy()
    fitted = RobustSpikes(rank=SPIKES).fit(a, b)
    np.testing.assert_allclose(fitted.rbns_, scores_from_rows(a, b), rtol=1e-2)
    ours = seconds(lambda: RobustSpikes(rank=SPIKES).fit(a, b), 2)
    theirs = seconds(lambda: scores_from_rows(a, b), 2)
    rows = [["from moments", ours, 1.0], ["PCA and all coordinates", theirs, theirs / ours]]
    record.table("Calibration, equal scores", ["", "processor seconds", "x ours"], rows)
    record.target("PCA and all coordinates over moments, processor time", theirs / ours, least=1)

    peaks = []
    for count in (ROWS, 4 * ROWS):
        tracemalloc.start()
        RobustSpikes(rank=SPIKES).fit(blocks(count, 1.0), blocks(count, 1.1))
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    rows = [[ROWS, peaks[0]], [4 * ROWS, peaks[1]]]
    record.table("Streamed calibration", ["pairs", "MiB of rows held at once"], rows)
    record.save(options.json)


if __name__ == "__main__":
    main()
