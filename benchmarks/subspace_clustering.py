"""Sparse self-expression beside the published code, spams and scikit-learn, and how clusterers grow with the rows.

Run: python benchmarks/subspace_clustering.py [--official FOLDER] [--rows 10000] [--json FILE] [--scaling FILE].
FOLDER is a checkout of ChongYou/subspace-clustering; its elastic net needs spams (spams-bin), without which it is left
out. Each measurement runs in a process of its own, for its peak memory.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from record import Record, parser, peak
from subspan.measures import clustering_accuracy

CLUSTERS, DIM, WIDTH, NOISE = 10, 6, 100, 0.05
GAMMA, RATIO, GREEDY = 50.0, 0.95, 6
# Rows of a first run that is not measured, and measured runs, of which the one with the least time counts.
_WARM, _TURNS = 200, 2
SETTING = f"{CLUSTERS} random subspaces of dimension {DIM} in {WIDTH}, noise {NOISE} a coordinate, rows of unit length"


def union_of_subspaces(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, WIDTH) of unit length near CLUSTERS random subspaces of dimension DIM, with noise, and their labels."""
    random = np.random.default_rng(0)
    labels = np.arange(rows) % CLUSTERS
    bases = np.linalg.qr(random.standard_normal((CLUSTERS, WIDTH, DIM)))[0]
    x = np.empty((rows, WIDTH), np.float32)
    for cluster in range(CLUSTERS):
        own = labels == cluster
        x[own] = random.standard_normal((own.sum(), DIM)) @ bases[cluster].T
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x += NOISE * random.standard_normal(x.shape, dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels


def published(x: np.ndarray, method: str, folder: str) -> sparse.csr_matrix:
    sys.modules["progressbar"] = types.SimpleNamespace(progressbar=lambda rows: rows)  # pyright: ignore[reportArgumentType]
    sys.path.insert(0, folder)
    from cluster import selfrepresentation as code  # pyright: ignore[reportMissingImports]

    x = x.astype(np.float64)
    if method == "omp":
        return code.sparse_subspace_clustering_orthogonal_matching_pursuit(x, GREEDY)
    return code.elastic_net_subspace_clustering(x, GAMMA, True, RATIO, "spams")


def scikit_learn(x: np.ndarray, method: str) -> sparse.csr_matrix:
    """One row after the other, the row itself left out of the dictionary."""
    from sklearn.decomposition import sparse_encode

    found = []
    for index in range(len(x)):
        others = np.delete(x, index, axis=0)
        if method == "omp":
            code = sparse_encode(x[index : index + 1], others, algorithm="omp", n_nonzero_coefs=GREEDY)
        else:
            alpha = np.abs(others @ x[index]).max() / GAMMA
            code = sparse_encode(x[index : index + 1], others, algorithm="lasso_cd", alpha=alpha)
        found.append(sparse.csr_matrix(np.insert(code, index, 0, axis=1)))
    return sparse.vstack(found, format="csr")


def ours(x: np.ndarray, method: str) -> sparse.csr_matrix:
    import torch

    from subspan.solvers.self_expression import elastic_net_self_expression, omp_self_expression

    rows = torch.from_numpy(x)
    if method == "omp":
        return omp_self_expression(rows, GREEDY)
    return elastic_net_self_expression(rows, gamma=GAMMA, l1_ratio=RATIO if method == "ensc" else 1.0)


def objective(x: np.ndarray, c: sparse.csr_matrix, ratio: float) -> float:
    """Mean over rows of the elastic net's objective, in float64."""
    alpha = np.array([np.delete(np.abs(x @ row), i).max() for i, row in enumerate(x)]) / ratio / GAMMA
    squares = 0.5 * ((x - c @ x) ** 2).sum(1)
    penalty = ratio * np.asarray(abs(c).sum(1)).ravel() + (1 - ratio) / 2 * np.asarray(c.multiply(c).sum(1)).ravel()
    return float((squares + alpha * penalty).mean())


def estimator(name: str) -> Any:
    from subspan import cluster

    shared = {"n_clusters": CLUSTERS, "random_state": 0}
    return {
        "OMP": lambda: cluster.OMPSubspaceClustering(n_nonzero=GREEDY, n_init=5, **shared),
        "EnSC": lambda: cluster.ElasticNetSubspaceClustering(gamma=GAMMA, l1_ratio=RATIO, n_init=5, **shared),
        "K-subspaces": lambda: cluster.KSubspaces(rank=DIM, n_init=3, **shared),
    }[name]()


def child(path: str, method: str, rows: int, folder: str | None) -> None:
    x, labels = union_of_subspaces(rows)
    run = {
        "fit": lambda x: estimator(method).fit(x),
        "ours": lambda x: ours(x, method),
        "without numba": lambda x: ours(x, method),
        "scikit-learn": lambda x: scikit_learn(x, method),
        "published": lambda x: published(x, method, str(folder)),
    }[path]
    if path == "without numba":
        sys.modules["numba"] = None  # pyright: ignore[reportArgumentType]
    # Code is loaded, and compiled, before the clock starts.
    run(x[:_WARM])
    before, started = peak(), time.process_time()
    found = run(x)
    seconds = time.process_time() - started
    if path == "fit":
        facts = {"accuracy": clustering_accuracy(labels, found.labels_)}
    else:
        c = found
        ends = c.tocoo()
        mass = np.abs(ends.data)
        wrong = mass[labels[ends.row] != labels[ends.col]].sum() / mass.sum()
        facts = {"wrong": float(wrong), "support": c.nnz / rows}
        facts["residual"] = float(((x - c @ x).astype(np.float64) ** 2).sum(1).mean())
        if method != "omp":
            facts["objective"] = objective(x.astype(np.float64), c, RATIO if method == "ensc" else 1.0)
    print(json.dumps(facts | {"seconds": seconds, "peak": peak() - before}))


def measured(path: str, method: str, rows: int, folder: str | None = None) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", path, method, str(rows)]
    command += ["--official", folder] if folder else []
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def scaling(sparse_rows: list[int], flat_rows: list[int], path: Path) -> None:
    """Whole clusterings over the rows, kept in a record of their own, as they take most of an hour."""
    record = Record("subspace_rows", SETTING)
    for title, names, sizes in (
        ("Sparse self-expression and spectral clustering, over the rows", ("OMP", "EnSC"), sparse_rows),
        ("K-subspaces, 3 starts, over the rows", ("K-subspaces",), flat_rows),
    ):
        runs = [(name, rows, measured("fit", name, rows)) for name in names for rows in sizes]
        record.table(
            title,
            ["", "rows", "processor seconds", "microseconds a row", "MiB over the start", "accuracy"],
            [
                [name, rows, run["seconds"], 1e6 * run["seconds"] / rows, run["peak"], run["accuracy"]]
                for name, rows, run in runs
            ],
        )
        if runs:
            record.target(f"{names[-1]}: GiB at {sizes[-1]} rows", runs[-1][2]["peak"] / 1024, most=8)
    record.save(path)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--official", metavar="FOLDER")
    arguments.add_argument("--rows", type=int, default=10_000, help="for the comparison with other code")
    arguments.add_argument(
        "--scaling", type=Path, metavar="FILE", help="measure whole clusterings too, into this record"
    )
    arguments.add_argument("--sparse", type=int, nargs="*", default=[10_000, 25_000, 70_000])
    arguments.add_argument("--flat", type=int, nargs="*", default=[70_000, 250_000, 1_000_000])
    arguments.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.child:
        warnings.simplefilter("ignore")
        child(*options.child[:2], int(options.child[2]), options.official)
        return
    record = Record("subspace_clustering", SETTING)
    spams = importlib.util.find_spec("spams") is not None
    for method, title in (
        ("omp", f"OMP, {GREEDY} coefficients a row"),
        ("ensc", f"Elastic net, γ {GAMMA:g}, l1 ratio {RATIO}"),
    ):
        small = min(options.rows, 1000)
        paths = {"subspan": ("ours", options.rows)}
        if options.official and (method == "omp" or spams):
            paths["published code"] = "published", options.rows
        if method == "ensc":
            paths["subspan, without numba"] = "without numba", options.rows
        else:
            paths[f"scikit-learn, first {small} rows, times {options.rows / small:g}"] = "scikit-learn", small
        # By turns, as a machine that is shared changes from one minute to the next.
        runs = [
            {name: measured(path, method, rows, options.official) for name, (path, rows) in paths.items()}
            for _ in range(_TURNS)
        ]
        found = {name: min((turn[name] for turn in runs), key=lambda run: run["seconds"]) for name in paths}
        for name, (_, rows) in paths.items():
            found[name]["seconds"] *= options.rows / rows
        columns = [
            "processor seconds",
            "x ours",
            "MiB over the start",
            "mass outside the cluster",
            "support",
            "residual²",
        ]
        columns += ["objective"] if method == "ensc" else []
        base = found["subspan"]["seconds"]
        keys = ["peak", "wrong", "support", "residual"] + (["objective"] if method == "ensc" else [])
        record.table(
            f"{title}: {options.rows} rows",
            ["", *columns],
            [[name, run["seconds"], run["seconds"] / base, *(run[key] for key in keys)] for name, run in found.items()],
        )
        if "published code" in found:
            ratio = found["published code"]["seconds"] / base
            record.target(f"{method}: published code over ours, processor time", ratio, least=5)
    if options.scaling:
        scaling(options.sparse, options.flat, options.scaling)
    flops = 2 * options.rows**2 * WIDTH
    record.note(f"Floor of one pass of correlations: 2 n² d = {flops / 1e9:.2g} Gflop; pursuit makes {GREEDY}.")
    if not spams:
        record.note("spams was not installed: the published elastic net was not measured.")
    record.save(options.json)


if __name__ == "__main__":
    main()
