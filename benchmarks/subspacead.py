"""SubspaceAD's fit and scoring beside the published code's path and a patch memory bank, on the same patch features.

Run: python benchmarks/subspacead.py [--views 31] [--grid 28] [--columns 384] [--images 4] [--official FOLDER]
[--json FILE]. The published path is written out here from its formulas (two float64 passes, reconstruction in numpy);
with --official FOLDER, a checkout of CLendering/SubspaceAD, its own code runs instead. Every contender runs in a
process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

from record import Record, parser, peak, timed


def ours(normal, official):
    from subspan.detect import SubspaceDetector

    detector = SubspaceDetector(0.99, distance="residual")
    batches = np.array_split(normal, max(1, len(normal) // 8192))

    def fit():
        detector.fit(iter(batches))
        return detector.subspace_.basis.numel() + detector.n_features_in_

    return fit, lambda rows: detector.anomaly_score(rows)


def published(normal, official):
    pca_model, scorer = _published_code(official) if official else (_TwoPasses, _reconstruction)
    batches = np.array_split(normal, max(1, len(normal) // 8192))
    model = {}

    def fit():
        fitted = pca_model(ev=0.99)
        model.update(fitted.fit(lambda: iter(batches), normal.shape[1], len(normal), len(batches)))
        return model["components"].size + normal.shape[1]

    return fit, lambda rows: scorer(rows, model, "reconstruction")


def _published_code(folder):
    sys.path[:0] = [folder, str(Path(folder) / "src")]
    # The scores import OpenCV for their maps, and both import progress bars; neither is used in what is timed.
    for name, content in {"cv2": {}, "tqdm": {"tqdm": lambda items, **_: items}}.items():
        sys.modules.setdefault(name, types.SimpleNamespace(**content))
    from subspacead.core.pca import PCAModel
    from subspacead.post_process.scoring import calculate_anomaly_scores

    return PCAModel, calculate_anomaly_scores


class _TwoPasses:
    def __init__(self, ev):
        self.ratio = ev

    def fit(self, batches, columns, count, _):
        mean = torch.zeros(columns, dtype=torch.float64)
        for batch in batches():
            mean += torch.from_numpy(batch).double().sum(0)
        mean /= count
        covariance = torch.zeros(columns, columns, dtype=torch.float64)
        for batch in batches():
            centred = torch.from_numpy(batch).double() - mean
            covariance += centred.T @ centred
        values, vectors = torch.linalg.eigh(covariance / (count - 1))
        values, vectors = values.flip(0), vectors.flip(1)
        rank = int(torch.searchsorted(values.cumsum(0) / values.sum(), self.ratio)) + 1
        return {"mu": mean.numpy(), "components": vectors[:, :rank].numpy(), "k": rank}


def _reconstruction(rows, model, _):
    mean, components = model["mu"].astype(rows.dtype), model["components"].astype(rows.dtype)
    return ((rows - ((rows - mean) @ components @ components.T + mean)) ** 2).sum(1)


def torch_bank(normal, official):
    from subspan.base import normalize_rows
    from subspan.solvers.neighbours import nearest

    kept = {}

    def fit():
        kept["bank"] = normalize_rows(torch.from_numpy(normal))
        return kept["bank"].numel()

    def score(rows):
        queries = normalize_rows(torch.from_numpy(rows))
        return (1 - nearest(queries, kept["bank"], 1, metric="inner")[0][:, 0]).numpy()

    return fit, score


def faiss_bank(normal, official):
    import faiss

    index = faiss.IndexFlatIP(normal.shape[1])

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def fit():
        index.add(unit(normal))
        return index.ntotal * index.d

    return fit, lambda rows: 1 - index.search(unit(rows), 1)[0][:, 0]


CONTENDERS = {
    "SubspaceDetector": ours,
    "published path": published,
    "memory bank, torch": torch_bank,
    "memory bank, faiss": faiss_bank,
}


def measure(name: str, folder: str, official: str) -> None:
    normal = np.load(Path(folder) / "normal.npy")
    test = np.load(Path(folder) / "test.npy")
    fit, score = CONTENDERS[name](normal, official)
    before = peak()
    kept = {}
    fitting = timed(lambda: kept.update(numbers=fit()), 1, warm=False)
    score_warm_up = np.ascontiguousarray(test[:256])
    score(score_warm_up)
    repeats = 3 if name in ("SubspaceDetector", "published path") else 1
    scoring = timed(lambda: kept.update(scores=score(test)), repeats, warm=False)
    used = peak() - before
    np.save(Path(folder) / "scores.npy", np.asarray(kept["scores"]))
    facts = {"fit": fitting.processor, "score": scoring.processor, "mib": used}
    facts["numbers"] = int(kept["numbers"])
    print(json.dumps(facts))


def patch_features(rng, rows, columns, mix):
    """Rows of a decaying spectrum like that of patch features: half of the variance in a few directions."""
    spectrum = np.arange(1, columns + 1, dtype=np.float32) ** -0.8
    return (rng.standard_normal((rows, columns), dtype=np.float32) * spectrum) @ mix + np.float32(0.5)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--views", type=int, default=31)
    arguments.add_argument("--grid", type=int, default=28)
    arguments.add_argument("--columns", type=int, default=384)
    arguments.add_argument("--images", type=int, default=4)
    arguments.add_argument("--official", default="")
    arguments.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.one:
        measure(*options.one)
        return
    rng = np.random.default_rng(0)
    columns, patches = options.columns, options.grid**2
    mix = np.linalg.qr(rng.standard_normal((columns, columns)))[0].astype(np.float32)
    normal = patch_features(rng, options.views * patches, columns, mix)
    test = patch_features(rng, options.images * patches, columns, mix)
    code = "its own code" if options.official else "its formulas"
    setting = f"fit {normal.shape}, score {test.shape}, float32; the published path runs {code}"
    record = Record("subspacead", setting)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "normal.npy", normal)
        np.save(Path(folder) / "test.npy", test)
        results, scores = {}, {}
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--one", name, folder, options.official]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                record.note(f"{name} failed: {done.stderr.splitlines()[-1]}")
                continue
            results[name] = json.loads(done.stdout.splitlines()[-1])
            scores[name] = np.load(Path(folder) / "scores.npy")
    first = results["SubspaceDetector"]
    ratios = {
        name: {key: run[key] / first[key] for key in ("fit", "score", "numbers")} for name, run in results.items()
    }
    rows = [
        [name, run["fit"], ratios[name]["fit"], run["score"], ratios[name]["score"], run["mib"], run["numbers"]]
        for name, run in results.items()
    ]
    columns = ["", "fit, processor s", "x ours", "score, processor s", "x ours", "MiB over the start", "numbers kept"]
    record.table("Fit to normal patches and score those of test images", columns, rows)
    apart = float(np.abs(scores["SubspaceDetector"] / scores["published path"] - 1).max())
    record.target("published path's fit over ours, processor time", ratios["published path"]["fit"], least=1)
    record.target("published path's scoring over ours, processor time", ratios["published path"]["score"], least=1)
    for name in ratios:
        if name.startswith("memory bank"):
            record.target(f"{name}: scoring over ours, processor time", ratios[name]["score"], least=1)
    record.target("largest relative difference of a score to the published path's", apart, most=1e-2)
    record.save(options.json)


if __name__ == "__main__":
    main()
