"""What closed-form alignment costs: beside the published four passes, a covariance map and a plain read of the data.

Run: python benchmarks/realign.py. Ratios are of times measured side by side in this process.
"""

import os
import platform
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from subspan.align import BlockwiseCovariance, ReAlign

ROWS, D, CHUNK = 100_000, 768, 10_000


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Best of several runs after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def embeddings(seed: int) -> np.ndarray:
    """Unit rows of a cone with a decaying spectrum, float32."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((ROWS, D), dtype=np.float32) * np.arange(1, D + 1, dtype=np.float32) ** -0.7
    rows += generator.standard_normal(D, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def four_passes(text: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The published operator as its authors run it, in memory: means, traces, drift, application, in chunks."""

    def unit(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        scale = np.abs(rows).max(1, keepdims=True)
        return rows / (scale * np.linalg.norm(rows / scale, axis=1, keepdims=True))

    def chunks(rows: np.ndarray):
        return (unit(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK))

    means = [sum(part.sum(0) for part in chunks(rows)) / len(rows) for rows in (text, image)]
    traces = [
        sum(((part - mean) ** 2).sum() for part in chunks(rows)) / len(rows) for rows, mean in zip((text, image), means)
    ]
    scale = np.sqrt(traces[1] / (traces[0] + 1e-10))

    def moved(part: np.ndarray) -> np.ndarray:
        return unit((part - means[0]) * scale + means[1])

    drift = sum(moved(part).sum(0) for part in chunks(text)) / len(text)
    return np.concatenate([unit(moved(part) - drift + means[1]).astype(np.float32) for part in chunks(text)])


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} threads")
    print(f"{ROWS} × {D} float32 in each modality")
    text, image = embeddings(0), embeddings(1)
    ours = ReAlign().fit(text, image).transform(text)
    theirs = four_passes(text, image)
    print(f"largest difference from the four passes: {np.abs(ours - theirs).max():.1e}")
    whole = seconds(lambda: ReAlign().fit(text, image).transform(text))
    published = seconds(lambda: four_passes(text, image), 1)
    covariance = seconds(lambda: BlockwiseCovariance().fit(text, image).transform(text), 1)
    product = seconds(lambda: text.T @ text)
    print(f"ReAlign, fit and transform        {whole:.2f} s")
    print(f"published four passes             {published:.2f} s   {published / whole:.1f} × ours")
    print(f"blockwise covariance              {covariance:.2f} s   {covariance / whole:.1f} × ours")
    print(f"one product XᵀX, for scale        {product:.2f} s   {product / whole:.1f} × ours")
    model = ReAlign()
    for start in range(0, ROWS, CHUNK):
        model.partial_fit(text[start : start + CHUNK], image[start : start + CHUNK])
    model.finalize([text[start : start + CHUNK] for start in range(0, ROWS, CHUNK)])
    state = sum(value.nbytes for value in (model.mean_source_, model.mean_target_, model.drift_))
    print(f"fitted state {state / 1024:.0f} KiB, independent of the number of rows")


if __name__ == "__main__":
    main()
