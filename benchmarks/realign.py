"""What closed-form alignment costs: beside the published four passes, a covariance map and a plain read of the data.

Run: python benchmarks/realign.py [--rows 100000] [--json FILE]. Ratios are of times measured side by side in
this process.
"""

import warnings

import numpy as np

from record import Record, parser, timed
from subspan.align import BlockwiseCovariance, ReAlign

D, CHUNK = 768, 10_000


def embeddings(seed: int, count: int) -> np.ndarray:
    """Unit rows of a cone with a decaying spectrum, float32."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((count, D), dtype=np.float32) * np.arange(1, D + 1, dtype=np.float32) ** -0.7
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
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=100_000)
    options = arguments.parse_args()
    record = Record("realign", f"{options.rows} x {D} float32 in each modality")
    text, image = embeddings(0, options.rows), embeddings(1, options.rows)
    ours = ReAlign().fit(text, image).transform(text)
    theirs = four_passes(text, image)
    apart = float(np.abs(ours - theirs).max())
    del ours, theirs
    runs = {
        "ReAlign, fit and transform": timed(lambda: ReAlign().fit(text, image).transform(text), 2),
        "published four passes": timed(lambda: four_passes(text, image), 1, warm=False),
        "blockwise covariance": timed(lambda: BlockwiseCovariance().fit(text, image).transform(text), 1, warm=False),
        "one product X'X, for scale": timed(lambda: text.T @ text, 2),
    }
    whole = runs["ReAlign, fit and transform"].processor
    rows = [[name, run.seconds, run.processor, run.processor / whole] for name, run in runs.items()]
    record.table("Closed-form alignment", ["", "seconds", "processor seconds", "x ours"], rows)
    four = runs["published four passes"].processor / whole
    record.target("published four passes over ours, processor time", four, least=1)
    record.target("largest difference to the four passes", apart, most=1e-5)
    model = ReAlign()
    for start in range(0, options.rows, CHUNK):
        model.partial_fit(text[start : start + CHUNK], image[start : start + CHUNK])
    model.finalize([text[start : start + CHUNK] for start in range(0, options.rows, CHUNK)])
    state = sum(value.nbytes for value in (model.mean_source_, model.mean_target_, model.drift_))
    record.note(f"The fitted state takes {state / 1024:.0f} KiB, whatever the number of rows.")
    record.save(options.json)


if __name__ == "__main__":
    main()
