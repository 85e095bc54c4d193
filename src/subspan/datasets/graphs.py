"""Graphs whose nodes have attributes: shared, generated, made of the standard library's docstrings, or from files."""

from __future__ import annotations

import csv
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from subspan.base import read_table
from subspan.base.columns import listed
from subspan.base.reading import quoted, reading, regular_file, text_lines
from subspan.base.rows import entry_texts
from subspan.base.tables import read_arrays

from .shared import load
from .texts import stdlib_docstrings

GRAPHS = ("acm", "wiki", "citeseer", "cora")
"""The shared attributed graphs (`SUBSPAN_DATA`)."""

_WORD = re.compile(r"[a-z]{3,}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class AttributedGraph:
    """A graph whose nodes have attributes, and a class and a name where known.

    Parameters
    ----------
    title
        What reports call it.
    adjacency
        (n, n), CSR.
    attributes
        (n, d), CSR.
    labels
        Class of each node (n,), integers, -1 for nodes without one.
    names
        Of the nodes.
    classes
        What the class 0, 1, … is called, where it has a name.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from subspan.datasets import AttributedGraph
    >>> edges = sparse.csr_matrix(np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]))
    >>> graph = AttributedGraph("path", edges, sparse.csr_matrix(np.eye(3))).with_classes(["end", "middle", "end"])
    >>> graph.n_edges, graph.labels.tolist(), graph.classes
    (2, [0, 1, 0], ('end', 'middle'))
    """

    title: str
    adjacency: sparse.csr_matrix
    attributes: sparse.csr_matrix
    labels: np.ndarray | None = None
    names: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return int(self.attributes.indptr.size - 1)

    @property
    def n_edges(self) -> int:
        """Number of edges, each of which joins two nodes or a node to itself."""
        return int((self.adjacency.nnz + (self.adjacency.diagonal() != 0).sum()) // 2)

    @property
    def n_attributes(self) -> int:
        """Number of attributes."""
        attributes: Any = self.attributes
        return int(attributes.shape[1])

    @property
    def labelled(self) -> np.ndarray:
        """Mask (n,) of the nodes with a class."""
        if self.labels is None:
            raise ValueError(f"graph: the nodes of {self.title} have no classes")
        return self.labels >= 0

    def with_classes(self, labels: Sequence[str]) -> AttributedGraph:
        """The same graph with a class for each node by name; "" is none."""
        if len(labels) != len(self):
            raise ValueError(f"labels: one a node is needed, got {len(labels)} for {len(self)} nodes of {self.title}")
        classes = sorted({label for label in labels if label})
        place = {name: index for index, name in enumerate(classes)}
        found = np.array([place.get(label, -1) for label in labels], dtype=np.int64)
        return replace(self, labels=found, classes=tuple(classes))

    @property
    def class_names(self) -> np.ndarray | None:
        """The class of each node as text, "" for none."""
        if self.labels is None:
            return None
        if self.classes is None:
            return np.where(self.labels >= 0, self.labels.astype(str), "")
        return np.array([*self.classes, ""])[self.labels]

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(np.unique(self.labels[self.labelled])) if self.labels is not None else 0


def load_graph(name: str, folder: str | os.PathLike[str] | None = None) -> AttributedGraph:
    """A shared attributed graph by name.

    Parameters
    ----------
    name
        "acm", "wiki", "citeseer" or "cora" (see `load`), or "docstrings" (see `docstring_graph`).
    folder
        Of the shared data sets; None: see `data_folder`.

    Returns
    -------
    AttributedGraph

    Raises
    ------
    ValueError
        For another name, and where the data set is not there.

    Examples
    --------
    >>> from subspan.datasets import load_graph
    >>> load_graph("karate")
    Traceback (most recent call last):
    ValueError: name: unknown graph 'karate'; known are acm, wiki, citeseer, cora, docstrings
    """
    if name == "docstrings":
        return docstring_graph()
    if name not in GRAPHS:
        raise ValueError(f"name: unknown graph {name!r}; known are {', '.join(GRAPHS)}, docstrings")
    return _from_arrays(load(f"graphs/{name}", folder), name)


def docstring_graph(n_classes: int = 8) -> AttributedGraph:
    """Docstrings of the best documented packages of the standard library, linked where one names another.

    Attributes are counts of the words that stand in 2 docstrings or more (names of the objects themselves left out). An
    edge joins two objects of which one's text or code has the other's name, where no more than 5 objects have it. The
    class is the package. About 1 500 nodes; takes some seconds.

    Parameters
    ----------
    n_classes
        Number of packages.

    Returns
    -------
    AttributedGraph

    Examples
    --------
    >>> from subspan.datasets import docstring_graph
    >>> docstring_graph(n_classes=4).n_classes  # doctest: +SKIP
    4
    """
    found = stdlib_docstrings()
    kept = {label for label, _ in Counter(entry.label for entry in found).most_common(n_classes)}
    entries = [entry for entry in found if entry.label in kept]
    by_name: dict[str, list[int]] = {}
    for index, entry in enumerate(entries):
        by_name.setdefault(entry.name.split(".")[-1], []).append(index)
    known = {name: nodes for name, nodes in by_name.items() if len(nodes) <= 5 and len(name) > 3}
    rows, columns = [], []
    for index, entry in enumerate(entries):
        for name in set(_NAME.findall(entry.text + " " + entry.code)) & known.keys():
            for other in known[name]:
                if other != index:
                    rows.append(index)
                    columns.append(other)
    n = len(entries)
    adjacency = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(n, n))
    adjacency = sparse.csr_matrix(adjacency.maximum(adjacency.T))
    texts = [Counter(_WORD.findall(entry.text.lower())) for entry in entries]
    documents = Counter(word for text in texts for word in text)
    place = {word: column for column, word in enumerate(sorted(w for w, count in documents.items() if count > 1))}
    triples = [(row, place[word], count) for row, text in enumerate(texts) for word, count in text.items()
               if word in place]  # fmt: skip
    i, j, counts = np.array(triples).T
    names = sorted(kept)
    return AttributedGraph(
        "docstrings",
        adjacency,
        sparse.csr_matrix((counts.astype(np.float64), (i, j)), shape=(n, len(place))),
        np.array([names.index(entry.label) for entry in entries]),
        tuple(entry.name for entry in entries),
    )


def attributed_block_model(
    n_nodes: int,
    n_clusters: int,
    *,
    mean_degree: float = 20.0,
    inside: float = 0.8,
    n_attributes: int = 200,
    words: int = 20,
    topical: float = 0.5,
    random_state: int | None = None,
) -> AttributedGraph:
    """A generated graph of blocks whose nodes have words; time and memory O(edges + n_nodes words).

    n_nodes * mean_degree / 2 edges are drawn; loops and repeated ones are left out.

    Parameters
    ----------
    n_nodes, n_clusters
        Nodes and blocks; each node's block is drawn.
    mean_degree
        Mean number of edges of a node.
    inside
        Share of the edges that are drawn inside a block.
    n_attributes
        Words of the vocabulary, cut into one part a block.
    words
        Words of a node.
    topical
        Share of them from the block's own part; the others are from all of it.
    random_state
        Seed.

    Returns
    -------
    AttributedGraph, with the blocks as `labels`.

    Raises
    ------
    ValueError
        For more clusters than nodes or attributes.

    Examples
    --------
    >>> from subspan.datasets import attributed_block_model
    >>> graph = attributed_block_model(60, 3, random_state=0)
    >>> graph.adjacency.shape, graph.attributes.shape, graph.n_classes
    ((60, 60), (60, 200), 3)
    """
    if not 1 <= n_clusters <= min(n_nodes, n_attributes):
        raise ValueError(f"n_clusters: must lie in [1, {min(n_nodes, n_attributes)}], got {n_clusters}")
    random = np.random.default_rng(random_state)
    labels = random.integers(n_clusters, size=n_nodes)
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=n_clusters)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])

    m = round(n_nodes * mean_degree / 2)
    first = random.integers(n_nodes, size=m)
    block = labels[first]
    own = order[starts[block] + (random.random(m) * counts[block]).astype(np.int64)]
    second = np.where(random.random(m) < inside, own, random.integers(n_nodes, size=m))
    different = first != second
    first, second = first[different], second[different]
    pairs = (np.concatenate([first, second]), np.concatenate([second, first]))
    adjacency = sparse.csr_matrix((np.ones(len(pairs[0])), pairs), shape=(n_nodes, n_nodes))
    adjacency.data[:] = 1

    part = n_attributes // n_clusters
    shape = (n_nodes, words)
    topic = labels[:, None] * part + random.integers(part, size=shape)
    word = np.where(random.random(shape) < topical, topic, random.integers(n_attributes, size=shape))
    rows = np.repeat(np.arange(n_nodes), words)
    attributes = sparse.csr_matrix((np.ones(rows.size), (rows, word.ravel())), shape=(n_nodes, n_attributes))
    return AttributedGraph(f"block model of {n_nodes} nodes", adjacency, attributes, labels)


def read_graph(
    edges: str | os.PathLike[str],
    attributes: str | os.PathLike[str] | None = None,
    *,
    id_column: str | None = None,
    label_column: str | None = None,
) -> AttributedGraph:
    r"""A graph from an edge list and a table of attributes, or from one .npz of two CSR matrices.

    Parameters
    ----------
    edges
        A text file (.txt, .tsv, .csv, .edges, also .gz): a pair of nodes a line, with a weight or none, separated by
        commas, tabs or spaces; lines that start with # and a header are passed over. Or an .npz with the arrays adj_
        and attr_ with data, indices, indptr, shape, and labels or none.
    attributes
        Any table that `open_table` reads, a row a node; None with an .npz.
    id_column
        Names of the nodes in the table (in an .npz: another array); None: edges have row numbers from 0.
    label_column
        Classes in the table, or in the .npz.

    Returns
    -------
    AttributedGraph

    Raises
    ------
    ValueError
        Naming the line, for what is no edge, names no node, or has a negative or infinite weight.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from subspan.datasets import read_graph
    >>> _ = Path("edges.txt").write_text("0 1\n1 2\n")
    >>> np.save("attributes.npy", np.eye(3))
    >>> graph = read_graph("edges.txt", "attributes.npy")
    >>> len(graph), graph.n_edges
    (3, 2)
    """
    source = Path(edges)
    if not source.exists():
        raise ValueError(f"edges: there is no file {str(source)!r}")
    regular_file(source, "edges")
    if source.suffix.lower() == ".npz":
        if attributes is not None:
            raise ValueError("attributes: an .npz graph has its own; leave them out")
        return _read_arrays(source, id_column, label_column)
    if attributes is None:
        raise ValueError(f"attributes: {str(source)!r} is an edge list; a table with a row a node is needed beside it")
    table = read_table(attributes, id_column=id_column, label_column=label_column)
    n = len(table)
    place = None
    if id_column is not None:
        assert table.ids is not None
        place = {name: row for row, name in enumerate(table.ids)}
        if len(place) < n:
            raise ValueError(f"id_column: {n - len(place)} of the {n} ids in {id_column!r} are repeated")
    pairs, weights = _read_edges(source, n, place)
    adjacency = sparse.coo_matrix((weights, (pairs[:, 0], pairs[:, 1])), shape=(n, n)).tocsr()
    graph = AttributedGraph(
        source.name, sparse.csr_matrix(adjacency.maximum(adjacency.T)), sparse.csr_matrix(table.array()),
        names=table.ids,
    )  # fmt: skip
    return graph if table.labels is None else graph.with_classes(table.labels)


def is_graph_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an .npz with the arrays of a graph, or an edge list by its name."""
    source = Path(path)
    suffixes = [suffix.lower() for suffix in source.suffixes if suffix.lower() != ".gz"]
    if suffixes[-1:] == [".npz"] and zipfile.is_zipfile(source):
        with reading(source), zipfile.ZipFile(source) as archive:
            return {"adj_indptr.npy", "attr_indptr.npy"} <= set(archive.namelist())
    return suffixes[-1:] in ([".edges"], [".edgelist"])


def _read_edges(source: Path, n: int, place: dict[str, int] | None) -> tuple[np.ndarray, np.ndarray]:
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    for line, row in _edge_rows(source):
        where = f"edges: line {line} of {str(source)!r}"
        if len(row) not in (2, 3):
            raise ValueError(f"{where} has {len(row)} fields; two nodes and a weight or none are needed")
        nodes = [_node(name, n, place) for name in row[:2]]
        if None in nodes:
            if not pairs and line == 1:
                continue
            known = f"0 to {n - 1}" if place is None else "the id column"
            raise ValueError(f"{where} names {quoted(row[nodes.index(None)])}, which is no node ({known})")
        weight = _number(row[2]) if len(row) == 3 else 1.0
        if weight is None or not np.isfinite(weight) or weight < 0:
            raise ValueError(f"{where} has the weight {quoted(row[2])}; a number >= 0 is needed")
        pairs.append((int(nodes[0] or 0), int(nodes[1] or 0)))
        weights.append(weight)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2), np.array(weights)


def _edge_rows(source: Path) -> Iterator[tuple[int, list[str]]]:
    with reading(source, "edges"):
        for line, text in text_lines(source):
            text = text.strip()
            if text and not text.startswith(("#", "%")):
                yield line, next(csv.reader([text])) if "," in text else text.split()


def _node(name: str, n: int, place: dict[str, int] | None) -> int | None:
    if place is not None:
        return place.get(name.strip())
    name = name.strip()
    return int(name) if len(name) < 20 and name.isdecimal() and int(name) < n else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read_arrays(source: Path, id_column: str | None, label_column: str | None) -> AttributedGraph:
    arrays = read_arrays(source, "edges")
    with reading(source, "edges"):
        graph = _from_arrays({**arrays, "labels": None} if label_column is not None else arrays, source.name)
        entries = {}
        for kind, name in (("ids", id_column), ("labels", label_column)):
            if name is None:
                continue
            if name not in arrays or arrays[name].shape != (len(graph),):
                fit = listed(key for key, values in arrays.items() if values.shape == (len(graph),))
                has = f"it has {fit}" if fit else "it has none"
                raise ValueError(f"{kind}: {str(source)!r} has no {quoted(name)} with an entry a node; {has}")
            entries[kind] = entry_texts(arrays[name], f"{kind}: row {{}} of {str(source)!r}")
        if "ids" in entries:
            graph = replace(graph, names=entries["ids"])
        return graph.with_classes(entries["labels"]) if "labels" in entries else graph


def _from_arrays(arrays: dict[str, Any], title: str) -> AttributedGraph:
    matrices = []
    for prefix in ("adj", "attr"):
        keys = [f"{prefix}_{part}" for part in ("data", "indices", "indptr", "shape")]
        missing = [key for key in keys if key not in arrays]
        if missing:
            raise ValueError(f"edges: {title!r} lacks {', '.join(missing)}")
        data, indices, indptr, shape = (arrays[key] for key in keys)
        try:
            data = data if data.dtype.kind == "f" else data.astype(np.float64)
            matrix = sparse.csr_matrix((data, indices, indptr), shape=tuple(map(int, shape)))
            matrix.check_format(full_check=True)
        except (ValueError, TypeError) as error:
            raise ValueError(f"edges: the arrays {prefix}_* of {title!r} are no CSR matrix ({error})") from error
        if not np.isfinite(matrix.data).all():
            raise ValueError(f"edges: {prefix}_data of {title!r} contains NaN or infinity")
        matrices.append(matrix)
    adjacency, attributes = matrices
    n = adjacency.shape[0]
    labels = arrays.get("labels")
    if adjacency.shape != (n, n) or attributes.shape[0] != n or (labels is not None and labels.shape != (n,)):
        raise ValueError(
            f"edges: {title!r} has adjacency {adjacency.shape}, attributes {attributes.shape} and labels "
            f"{None if labels is None else labels.shape}; one row a node is needed"
        )
    graph = AttributedGraph(title, adjacency, attributes, labels)
    if labels is not None and labels.dtype.kind not in "iu":
        return graph.with_classes(entry_texts(labels, f"labels: row {{}} of {title!r}"))
    return graph
