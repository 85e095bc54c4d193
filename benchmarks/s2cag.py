"""S²CAG beside the authors' code and spectral clustering on a graph of Pubmed's size, and its time against the edges.

Run: python benchmarks/s2cag.py [--official FOLDER] [--json FILE]. FOLDER is a checkout of HKBU-LAGAS/S2CAG, of which
src/func.py, src/utils.py and, where it is there, data/pubmed.mat are used; without data/pubmed.mat a generated graph
of Pubmed's size stands for it. Each measurement runs in a process of its own, for its peak memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
from scipy import sparse
from sklearn.metrics import normalized_mutual_info_score

from record import Record, parser
from subspan.cluster import S2CAG
from subspan.datasets import AttributedGraph, attributed_block_model
from subspan.solvers import clustering_accuracy

SETTING = {"order": 175, "decay": 1.8}


def pubmed(folder: str | None) -> AttributedGraph:
    if folder is None or not (Path(folder) / "data" / "pubmed.mat").is_file():
        return attributed_block_model(19_717, 3, mean_degree=9, n_attributes=500, words=50, inside=0.8, random_state=0)
    from scipy.io import loadmat

    stored = loadmat(Path(folder) / "data" / "pubmed.mat")
    labels = stored["gnd"].ravel().astype(np.int64)
    adjacency, attributes = (sparse.csr_matrix(stored[key]).astype(np.float64) for key in ("W", "fea"))
    return AttributedGraph("Pubmed", adjacency, attributes, labels - labels.min())


def official(graph: AttributedGraph, folder: str) -> tuple[np.ndarray, float]:
    """The published path as its script runs it, TensorFlow, which it only reads flags with, left out."""
    sys.modules["tensorflow"] = types.ModuleType("tensorflow")
    sys.path.insert(0, str(Path(folder) / "src"))
    import utils  # pyright: ignore[reportMissingImports]

    started = time.process_time()
    transition, attributes = utils.preprocess_dataset(graph.adjacency, graph.attributes, tf_idf=True, sparse=True)
    labels, _ = utils.run_SSCAG(
        attributes.toarray(),
        graph.n_classes,
        transition.tocsr(),
        SETTING["order"],
        SETTING["decay"],
        method="sub",
        tau=7,
    )
    return np.asarray(labels), time.process_time() - started


def ours(graph: AttributedGraph, dtype: str, rounding: str) -> tuple[np.ndarray, float]:
    started = time.process_time()
    options = {"rounding": rounding, "n_init": 1 if rounding == "snem" else 50}
    model = S2CAG(graph.n_classes, random_state=0, **SETTING, **options)
    labels = model.fit(graph.attributes.astype(dtype), adjacency=graph.adjacency).labels_
    return labels, time.process_time() - started


def spectral(graph: AttributedGraph) -> tuple[np.ndarray, float]:
    from sklearn.cluster import SpectralClustering

    started = time.process_time()
    model = SpectralClustering(graph.n_classes, affinity="precomputed", assign_labels="kmeans", random_state=0)
    return model.fit_predict(graph.adjacency + sparse.identity(len(graph))), time.process_time() - started


def scaling(edges: int) -> tuple[AttributedGraph, np.ndarray, float]:
    graph = attributed_block_model(edges // 10, 10, mean_degree=20, n_attributes=100, words=10, random_state=0)
    started = time.process_time()
    model = S2CAG(10, order=5, n_iter=3, rounding="snem", n_init=1, random_state=0)
    labels = model.fit(graph.attributes.astype(np.float32), adjacency=graph.adjacency).labels_
    return graph, labels, time.process_time() - started


def child(method: str, argument: str, folder: str | None) -> None:
    before = peak()
    if method == "scaling":
        graph, labels, seconds = scaling(int(argument))
    else:
        graph = pubmed(folder)
        before = peak()
        if method == "official":
            labels, seconds = official(graph, str(folder))
        elif method == "spectral":
            labels, seconds = spectral(graph)
        else:
            labels, seconds = ours(graph, *argument.split(","))
    facts = {
        "seconds": seconds,
        "peak": peak() - before,
        "nodes": len(graph),
        "edges": graph.adjacency.nnz // 2,
        "accuracy": clustering_accuracy(graph.labels, labels),
        "nmi": float(normalized_mutual_info_score(graph.labels, labels)),
    }
    print(json.dumps(facts))


def peak() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def measured(method: str, argument: str, folder: str | None, repeats: int = 1) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", method, argument, *(["--official", folder] if folder else [])]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for _ in range(repeats)
    ]
    return min(runs, key=lambda run: run["seconds"])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--official", metavar="FOLDER")
    arguments.add_argument(
        "--edges", type=int, nargs="+", default=[625_000, 1_250_000, 2_500_000, 5_000_000, 10_000_000]
    )
    arguments.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.child:
        warnings.simplefilter("ignore")
        child(*options.child, options.official)
        return
    record = Record(
        "s2cag", f"Pubmed's published setting: order {SETTING['order']}, decay {SETTING['decay']}, 3 clusters"
    )
    found = {
        "S2CAG, float32": measured("ours", "float32,kmeans+snem", options.official),
        "S2CAG, float64": measured("ours", "float64,kmeans+snem", options.official),
        "S2CAG, float32, published rounding": measured("ours", "float32,snem", options.official),
        "scikit-learn SpectralClustering, edges alone": measured("spectral", "-", options.official),
    }
    if options.official:
        found["published code"] = measured("official", "-", options.official)
    names = ["", "processor seconds", "MiB over the start", "accuracy", "NMI"]
    rows = [[name, run["seconds"], run["peak"], run["accuracy"], run["nmi"]] for name, run in found.items()]
    first = next(iter(found.values()))
    record.table(
        f"{first['nodes']} nodes, {first['edges']} edges",
        names,
        rows,
    )
    if options.official:
        theirs, quick = found["published code"], found["S2CAG, float32"]
        record.target(
            "published code over S2CAG in float32, processor time", theirs["seconds"] / quick["seconds"], least=3
        )
        record.target("accuracy minus that of the published code", quick["accuracy"] - theirs["accuracy"], least=-0.005)
    grown = [measured("scaling", str(edges), None) for edges in options.edges]
    record.table(
        "Generated block models, 10 clusters, mean degree 20, 100 words; order 5, 3 power iterations, float32",
        ["nodes", "edges", "processor seconds", "microseconds an edge", "MiB over the start", "accuracy"],
        [
            [
                run["nodes"],
                run["edges"],
                run["seconds"],
                1e6 * run["seconds"] / run["edges"],
                run["peak"],
                run["accuracy"],
            ]
            for run in grown
        ],
    )
    if len(grown) > 1:
        doublings = np.log2(grown[-1]["edges"] / grown[0]["edges"])
        factor = (grown[-1]["seconds"] / grown[0]["seconds"]) ** (1 / doublings)
        record.target("processor time for twice the edges", factor, most=2.6)
    record.save(options.json)


if __name__ == "__main__":
    main()
