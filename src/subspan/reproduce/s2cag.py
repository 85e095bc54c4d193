"""S²CAG and M-S²CAG on attributed graphs, beside attributes, structure and smoothing alone; linear time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from subspan.cluster import S2CAG
from subspan.datasets import AttributedGraph, attributed_block_model, data_folder, load_graph
from subspan.measures import attribute_modularity, clustering_accuracy, modularity, pairwise_f1
from subspan.solvers import MatrixOperator, randomized_svd, round_embedding, smooth
from subspan.solvers.rounding import unit_rows

from .protocol import Check, Outcome, Progress, Table


class Setting(NamedTuple):
    """The published run's options for one graph, of both objectives."""

    conductance: dict[str, Any]
    modularity: dict[str, Any]


SETTINGS = {
    "acm": Setting({"order": 15, "decay": 0.8}, {"order": 15, "decay": 0.8, "n_iter": 50}),
    "wiki": Setting({"order": 6, "decay": 1.7}, {"order": 12, "decay": 1.7, "gamma": 0.9, "n_iter": 50}),
    "citeseer": Setting({"order": 60, "decay": 0.8}, {"order": 40, "decay": 0.8, "gamma": 0.9, "n_iter": 100}),
    # The run script has none for Cora; these were chosen beforehand.
    "cora": Setting({"order": 16, "decay": 1.2}, {"order": 16, "decay": 1.2, "n_iter": 100}),
    "docstrings": Setting({}, {}),
}

_OURS, _MODULAR = "S²CAG", "M-S²CAG"
_UNIT_LOOP = "M-S²CAG, one loop, unit rows"
_BASELINES = (
    "k-means on TF-IDF",
    "spectral, structure only",
    "smoothing + k-means",
    "smoothing + k-means on unit rows",
)
_KMEANS_DIRECTIONS = 100


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Cluster ACM, Wiki, Citeseer and Cora with 10 seeds; see docs/systems/s2cag.md for the setting.

    Without a data folder: the docstrings of the standard library, linked where one names another.
    quick: ACM and Cora, 3 seeds, no ablations, no label-free choice, a short scaling run.
    """
    shared = data_folder() is not None
    names = (("acm", "cora") if quick else ("acm", "wiki", "citeseer", "cora")) if shared else ("docstrings",)
    seeds = [seed + draw for draw in range(3 if quick else 10)]
    graphs = {name: load_graph(name) for name in names}
    scores: dict[str, dict[str, np.ndarray]] = {}
    rows: list[list[Any]] = []
    with warnings.catch_warnings():
        # Nodes without attributes, and clusters that came out empty: said in the notes.
        warnings.simplefilter("ignore", UserWarning)
        for step, (name, graph) in enumerate(graphs.items()):
            progress(f"{graph.title}", 0.85 * step / len(graphs))
            found = {}
            for method, cluster in _methods(graph, SETTINGS[name], ablations=not quick).items():
                few = method.startswith("ablation") or (method == _UNIT_LOOP and name != "cora")
                found[method] = [cluster(draw) for draw in (seeds[:3] if few else seeds)]
            scores[name] = {method: _accuracies(graph, labels) for method, labels in found.items()}
            rows += [[graph.title, method, *_summary(graph, labels)] for method, labels in found.items()]
        progress("choice without labels", 0.86)
        chosen = [] if quick else [_label_free(graph, seeds[:3]) for graph in graphs.values()]
        progress("unseen nodes", 0.9)
        first = next(iter(graphs.values()))
        unseen, together = _unseen(first, SETTINGS[names[0]].conductance, seed)
        progress("scaling", 0.93)
        scaling, ratio = _scaling((200_000, 400_000) if quick else (200_000, 400_000, 800_000), seed)

    median = {name: {method: float(np.median(x)) for method, x in found.items()} for name, found in scores.items()}
    mean = {
        method: float(np.mean([found[method] for found in median.values()])) for method in next(iter(median.values()))
    }
    best = max(mean[method] for method in _BASELINES)
    checks = [check for name in names for check in _bars(name, scores[name], median[name])]
    checks += [
        Check(
            "unseen nodes are clustered like seen ones",
            f"accuracy on a fifth of {first.title} held out; fitted with them {together:.3f}",
            unseen,
            ">= that - 0.05",
            unseen >= together - 0.05,
        ),
        Check(
            "time is linear in the number of edges",
            "processor time for twice the edges, geometric mean",
            ratio,
            "2 within 30 %",
            1.4 <= ratio <= 2.6,
        ),
    ]
    tables = [
        Table(
            f"Median of {len(seeds)} seeds (range of the accuracy in brackets)",
            ["graph", "method", "accuracy", "NMI", "ARI", "pairwise F1"],
            rows,
        )
    ]
    if chosen:
        tables.append(
            Table(
                "Order and decay chosen without labels: modularity in the graph times that in the attributes (3 seeds)",
                ["graph", "order", "decay", "product", "accuracy", "accuracy at the defaults"],
                chosen,
            )
        )
    tables.append(scaling)
    return Outcome(
        claim="Best of 19 methods on 8 attributed graphs, in time linear in the graph (abstract; the table was not "
        "to be had).",
        data=", ".join(f"{graph.title} ({len(graph)} nodes)" for graph in graphs.values()),
        model="none (closed form); order and decay of the published run script, one setting a graph",
        metric="accuracy, median over seeds, mean over graphs",
        ours=mean[_OURS],
        baselines={_MODULAR: mean[_MODULAR], **{method: mean[method] for method in _BASELINES}},
        bar=f"> the best baseline ({best:.4f})",
        holds=bool(mean[_OURS] > best),
        checks=checks,
        tables=tables,
        notes=[
            "The order and decay of the run script differ from graph to graph, which suggests that they were chosen "
            "with labels; the table of label-free choices shows what is left without.",
            "Nodes without a class (15 of Citeseer) are clustered and not scored.",
            "Smoothing + k-means is the mean of P^t X over 16 steps (SSGC) of TF-IDF rows, clustered in its 100 "
            "leading directions; k-means has 3 starts a seed. Structure only is regularised spectral clustering. "
            "SAGSC was not run.",
        ],
    )


# ---------------------------------------------------------------------- methods


def _methods(graph: AttributedGraph, setting: Setting, *, ablations: bool) -> dict[str, Callable[[int], np.ndarray]]:
    """Each method as a function of the seed; what does not depend on the seed is computed once."""
    k, x, a = graph.n_classes, graph.attributes, graph.adjacency
    tfidf = TfidfTransformer().fit_transform(x)
    degree = np.sqrt(np.asarray(tfidf @ np.asarray(tfidf.sum(0)).ravel()).ravel())
    scaled = tfidf.multiply(1 / np.where(degree > 0, degree, 1)[:, None]).tocsr()
    order = setting.conductance.get("order", 10)
    u, s, _ = randomized_svd(MatrixOperator(smooth(tfidf, a, 16, 1.0)), _KMEANS_DIRECTIONS, random_state=0)
    plain = u * s
    structure = _regularized_structure(a)(k)
    bases: dict[tuple[str, int], np.ndarray] = {}

    def fitted(objective: str, seed: int, **changed: Any) -> S2CAG:
        options = getattr(setting, objective) | changed
        return S2CAG(k, objective, random_state=seed, **options).fit(x, adjacency=a)

    def ours(objective: str) -> Callable[[int], np.ndarray]:
        def cluster(seed: int) -> np.ndarray:
            model = fitted(objective, seed)
            bases[objective, seed] = model.embedding_.basis.numpy()
            return model.labels_

        return cluster

    def rounded(objective: str, rounding: str, n_init: int) -> Callable[[int], np.ndarray]:
        return lambda seed: round_embedding(
            bases[objective, seed], rounding, n_clusters=k, n_init=n_init, random_state=seed
        )

    def means(rows: Any) -> Callable[[int], np.ndarray]:
        def cluster(seed: int) -> np.ndarray:
            options: dict[str, Any] = {"n_init": 3, "random_state": seed}
            return KMeans(k, **options).fit_predict(rows)

        return cluster

    methods = {
        _OURS: ours("conductance"),
        f"{_OURS}, SNEM from argmax": rounded("conductance", "snem", 1),
        f"{_OURS}, rotation": rounded("conductance", "rotation", 10),
        _MODULAR: ours("modularity"),
        f"{_MODULAR}, SNEM from argmax": rounded("modularity", "snem", 1),
        _UNIT_LOOP: lambda seed: fitted("modularity", seed, loops=1, rescale="l2").labels_,
        "k-means on TF-IDF": means(tfidf),
        "spectral, structure only": lambda seed: round_embedding(structure, "kmeans", random_state=seed),
        "smoothing + k-means": means(plain),
        "smoothing + k-means on unit rows": means(unit_rows(plain)),
    }
    if ablations:
        weights = {"order": order, "decay": setting.conductance.get("decay", 0.9)}
        undegreed = smooth(tfidf, a, **weights)
        degreed = smooth(scaled, a, **weights)
        methods |= {
            "ablation: attributes not scaled by degree": lambda seed: _leading(undegreed, k, 1, seed),
            "ablation: first vector kept": lambda seed: _leading(degreed, k, 0, seed),
            "ablation: no graph": lambda seed: S2CAG(k, random_state=seed).fit(x).labels_,
            "ablation: one loop": lambda seed: fitted("conductance", seed, loops=1).labels_,
        }
    return methods


def _regularized_structure(adjacency: Any) -> Callable[[int], np.ndarray]:
    """Leading eigenvectors of the normalised graph with a weak edge between any two nodes (Amini et al., 2013)."""
    degree = np.asarray(adjacency.sum(1), dtype=np.float64).ravel()
    tau, n = degree.mean(), len(degree)
    root = 1 / np.sqrt(degree + tau)

    def product(v: np.ndarray) -> np.ndarray:
        w = root * v.ravel()
        return root * (adjacency @ w + tau / n * w.sum())

    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    return lambda k: eigsh(operator, k, v0=np.ones(n))[1]


def _leading(z: np.ndarray, k: int, first: int, seed: int) -> np.ndarray:
    """Clusters from left singular vectors first … first + k - 1 of Z."""
    u = randomized_svd(MatrixOperator(z), k + 1, random_state=seed)[0]
    return round_embedding(u[:, first : first + k], random_state=seed)


def _accuracies(graph: AttributedGraph, found: list[np.ndarray]) -> np.ndarray:
    assert graph.labels is not None
    known = graph.labelled
    return np.array([clustering_accuracy(graph.labels[known], labels[known]) for labels in found])


def _summary(graph: AttributedGraph, found: list[np.ndarray]) -> list[str]:
    assert graph.labels is not None
    known, accuracy = graph.labelled, _accuracies(graph, found)
    others = [
        float(np.median([score(graph.labels[known], labels[known]) for labels in found]))
        for score in (normalized_mutual_info_score, adjusted_rand_score, pairwise_f1)
    ]
    return [
        f"{np.median(accuracy):.3f} [{accuracy.min():.3f}, {accuracy.max():.3f}]",
        *(f"{value:.3f}" for value in others),
    ]


# ---------------------------------------------------------------------- bars


def _bars(name: str, scores: dict[str, np.ndarray], median: dict[str, float]) -> list[Check]:
    """What the published settings must reach on one graph."""
    ours, spread = median[_OURS], float(np.ptp(scores[_OURS]))
    raw = float(np.ptp(scores[f"{_OURS}, SNEM from argmax"]))
    checks = [
        Check(
            f"{name}: hardly depends on the seed",
            f"range of the accuracy; SNEM from argmax {raw:.3f}",
            spread,
            "<= 0.02",
            spread <= 0.02,
        )
    ]

    def at_least(what: str, method: str, bar: float, *, required: bool = True) -> None:
        checks.append(
            Check(f"{name}: {what}", f"accuracy of {method}", median[method], f">= {bar:.4f}",
                  median[method] >= bar, required)
        )  # fmt: skip

    attributes = median["k-means on TF-IDF"]
    if name == "acm":
        at_least("accuracy", _OURS, 0.93)
        at_least("3 points above attributes alone", _OURS, attributes + 0.03)
    elif name == "wiki":
        at_least("accuracy", _OURS, 0.56)
        at_least("15 points above attributes alone", _OURS, attributes + 0.15)
        at_least("parity of the published rounding", f"{_OURS}, SNEM from argmax", 0.60)
    elif name == "citeseer":
        at_least("accuracy", _OURS, 0.665)
    elif name == "cora":
        smoothing = max(median[method] for method in _BASELINES if "smoothing" in method)
        at_least("accuracy at the defaults", _MODULAR, 0.62)
        at_least("accuracy with one loop and unit rows", _UNIT_LOOP, 0.68)
        at_least("above smoothing + k-means", _UNIT_LOOP, smoothing)
    else:
        best = max(median[method] for method in _BASELINES)
        checks.append(
            Check(f"{name}: above every baseline", f"accuracy of {_OURS}", ours, f"> {best:.4f}", ours > best)
        )
    return checks


def _label_free(graph: AttributedGraph, seeds: list[int]) -> list[Any]:
    """Order and decay with the largest product of the clustering's modularities in the graph and in the attributes.

    Its accuracy, and that of the defaults; the product was chosen on generated graphs.
    """
    best: tuple[float, int, float, list[np.ndarray]] = (-np.inf, 0, 0.0, [])
    for order in (5, 10, 20, 40):
        for decay in (0.8, 1.0, 1.5):
            found = S2CAG(graph.n_classes, order=order, decay=decay, random_state=seeds[0]).fit(
                graph.attributes, adjacency=graph.adjacency
            )
            value = modularity(graph.adjacency, found.labels_) * attribute_modularity(
                TfidfTransformer().fit_transform(graph.attributes), found.labels_
            )
            if value > best[0]:
                best = (value, order, decay, [found.labels_])
    value, order, decay, labels = best
    labels += [
        S2CAG(graph.n_classes, order=order, decay=decay, random_state=seed)
        .fit(graph.attributes, adjacency=graph.adjacency)
        .labels_
        for seed in seeds[1:]
    ]
    defaults = [
        S2CAG(graph.n_classes, random_state=seed).fit(graph.attributes, adjacency=graph.adjacency).labels_
        for seed in seeds
    ]
    scores = (float(np.median(_accuracies(graph, found))) for found in (labels, defaults))
    return [graph.title, order, decay, round(value, 4), *(round(score, 4) for score in scores)]


def _unseen(graph: AttributedGraph, options: dict[str, Any], seed: int) -> tuple[float, float]:
    """Accuracy on a fifth of the nodes: predicted by a model of the others, and of a model fitted with them."""
    assert graph.labels is not None
    held_out: Any = np.zeros(len(graph), dtype=bool)
    held_out[np.random.default_rng(seed).permutation(len(graph))[: len(graph) // 5]] = True
    x: Any = graph.attributes
    a: Any = graph.adjacency
    rest = a[~held_out][:, ~held_out]
    model = S2CAG(graph.n_classes, random_state=seed, **options).fit(x[~held_out], adjacency=rest)
    links, among = a[held_out][:, ~held_out], a[held_out][:, held_out]
    found = model.predict(x[held_out], links=links, adjacency=among)
    whole = S2CAG(graph.n_classes, random_state=seed, **options).fit(x, adjacency=a).labels_
    known = held_out & graph.labelled
    return (
        clustering_accuracy(graph.labels[known], found[graph.labelled[held_out]]),
        clustering_accuracy(graph.labels[known], whole[known]),
    )


def _scaling(sizes: tuple[int, ...], seed: int) -> tuple[Table, float]:
    """(table, factor of processor time for twice the edges) on block models of degree 20, nodes growing with edges."""
    graphs = [attributed_block_model(edges // 10, 8, mean_degree=20, random_state=seed) for edges in sizes]
    seconds, accuracy = [np.inf] * len(sizes), [0.0] * len(sizes)
    for _ in range(2):
        for place, graph in enumerate(graphs):
            started = time.process_time()
            labels = (
                S2CAG(8, order=5, n_iter=2, rounding="snem", n_init=1, random_state=seed)
                .fit(graph.attributes, adjacency=graph.adjacency)
                .labels_
            )
            seconds[place] = min(seconds[place], time.process_time() - started)
            accuracy[place] = clustering_accuracy(graph.labels, labels)
    table = Table(
        "Generated graphs (8 blocks, mean degree 20, 200 words; order 5, 2 power iterations)",
        ["nodes", "edges", "processor seconds", "accuracy"],
        [
            [len(graph), graph.adjacency.nnz // 2, round(spent, 3), round(score, 3)]
            for graph, spent, score in zip(graphs, seconds, accuracy)
        ],
    )
    doublings = np.log2(sizes[-1] / sizes[0])
    return table, float((seconds[-1] / seconds[0]) ** (1 / doublings))
