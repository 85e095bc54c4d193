"""S²CAG beside the authors' code, PyAGC and spectral clustering: real graphs, one of Pubmed's size, time over edges.

Run: python benchmarks/s2cag.py [--official FOLDER] [--json FILE]. FOLDER is a checkout of HKBU-LAGAS/S2CAG, of which
src/func.py and src/utils.py are used; PyAGC is measured where it is installed. The real graphs are those of the data
folder (SUBSPAN_DATA) and are left out without it. Each measurement runs in a process of its own, for its peak memory.
"""

import argparse
import importlib.util
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

from record import Record, parser, peak
from subspan.cluster import S2CAG
from subspan.datasets import AttributedGraph, attributed_block_model, data_folder, load_graph
from subspan.measures import clustering_accuracy

# (order, decay): the published ones for the real graphs. The generated one takes Pubmed's published order, which sets
# the cost; its decay of 1.8 would smooth a block model to a constant.
SETTINGS = {"acm": (15, 0.8), "citeseer": (60, 0.8), "wiki": (6, 1.7), "pubmed-sized": (175, 0.8)}


def graph_of(name: str) -> AttributedGraph:
    if name == "pubmed-sized":
        return attributed_block_model(19_717, 3, mean_degree=9, n_attributes=500, words=50, inside=0.8, random_state=0)
    return load_graph(name)


def official(graph: AttributedGraph, order: int, decay: float, folder: str) -> tuple[np.ndarray, float]:
    """The published path as its script runs it, but for TensorFlow, which it only reads flags with."""
    sys.modules["tensorflow"] = types.ModuleType("tensorflow")
    sys.path.insert(0, str(Path(folder) / "src"))
    import func  # pyright: ignore[reportMissingImports]
    import utils  # pyright: ignore[reportMissingImports]

    # Its rounding divides a sparse indicator by a dense row and counts on a dense result, which SciPy no longer gives.
    func.csc_matrix = lambda *args, **options: sparse.csc_matrix(*args, **options).toarray()
    started = time.process_time()
    transition, attributes = utils.preprocess_dataset(graph.adjacency, graph.attributes, tf_idf=True, sparse=True)
    labels, _ = utils.run_SSCAG(
        attributes.toarray(), graph.n_classes, transition.tocsr(), order, decay, method="sub", tau=7
    )
    return np.asarray(labels), time.process_time() - started


def ours(graph: AttributedGraph, order: int, decay: float, rounding: str) -> tuple[np.ndarray, float]:
    started = time.process_time()
    n_init = 1 if rounding == "snem" else 50
    model = S2CAG(graph.n_classes, order=order, decay=decay, rounding=rounding, n_init=n_init, random_state=0)
    labels = model.fit(graph.attributes.astype(np.float32), adjacency=graph.adjacency).labels_
    return labels, time.process_time() - started


def pyagc(graph: AttributedGraph, order: int, decay: float, rounding: str) -> tuple[np.ndarray, float]:
    """PyAGC's module with one of its two roundings; in float64, as in float32 its power iterations, which are not
    orthonormalised on the way, keep little but the first direction (accuracy 0.36 on ACM).
    """
    import torch
    from pyagc.clusters import KMeansClusterHead  # pyright: ignore[reportMissingImports]
    from pyagc.models.s2cag import S2CAG as Module  # pyright: ignore[reportMissingImports]
    from pyagc.models.s2cag import snem_rounding

    torch.manual_seed(0)
    ends = graph.adjacency.tocoo()
    started = time.process_time()
    edges = torch.from_numpy(np.stack([ends.row, ends.col]).astype(np.int64))
    features = torch.from_numpy(graph.attributes.toarray().astype(np.float64))
    vectors = Module(graph.n_classes, T=order, alpha=decay, tau=7).embed(features, edges)
    if rounding == "snem":
        labels = snem_rounding(vectors, graph.n_classes)
    else:
        labels = KMeansClusterHead(graph.n_classes).fit_predict(vectors)
    return labels.numpy(), time.process_time() - started


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
        # A path that runs out of memory is to fail alone.
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        graph = graph_of(argument)
        order, decay = SETTINGS[argument]
        before = peak()
        if method == "official":
            labels, seconds = official(graph, order, decay, str(folder))
        elif method.startswith("pyagc"):
            labels, seconds = pyagc(graph, order, decay, method.removeprefix("pyagc "))
        elif method == "spectral":
            labels, seconds = spectral(graph)
        else:
            labels, seconds = ours(graph, order, decay, method)
    known = graph.labels >= 0
    facts = {
        "seconds": seconds,
        "peak": peak() - before,
        "nodes": len(graph),
        "edges": graph.adjacency.nnz // 2,
        "accuracy": clustering_accuracy(graph.labels[known], labels[known]),
        "nmi": float(normalized_mutual_info_score(graph.labels[known], labels[known])),
    }
    print(json.dumps(facts))


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
    record = Record("s2cag", "float32 for S2CAG, float64 for the others; published settings, 7 power iterations")
    names = [name for name in SETTINGS if name == "pubmed-sized" or data_folder() is not None]
    methods = {"kmeans+snem": "S2CAG", "snem": "S2CAG, published rounding"}
    if options.official:
        methods["official"] = "published code"
    if importlib.util.find_spec("pyagc") is not None:
        methods |= {"pyagc snem": "PyAGC, SNEM", "pyagc kmeans": "PyAGC, k-means"}
    methods["spectral"] = "scikit-learn SpectralClustering, edges alone"
    for name in names:
        found = {method: measured(method, name, options.official, repeats=1 if method == "spectral" else 2)
                 for method in methods if method != "spectral" or name != "pubmed-sized"}  # fmt: skip
        first = found["kmeans+snem"]
        record.table(
            f"{name}: {first['nodes']} nodes, {first['edges']} edges, order {SETTINGS[name][0]}",
            ["", "processor seconds", "MiB over the start", "accuracy", "NMI"],
            [[methods[key], run["seconds"], run["peak"], run["accuracy"], run["nmi"]] for key, run in found.items()],
        )
        if options.official:
            theirs, same = found["official"], found["snem"]
            record.target(f"{name}: published code over S2CAG with its rounding, processor time",
                          theirs["seconds"] / same["seconds"], least=3)  # fmt: skip
            record.target(f"{name}: accuracy minus that of the published code", first["accuracy"] - theirs["accuracy"],
                          least=-0.005)  # fmt: skip
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
    record.note("Spectral clustering of the graph of Pubmed's size took 410 s and 2.9 GiB in an earlier run: left out.")
    record.save(options.json)


if __name__ == "__main__":
    main()
