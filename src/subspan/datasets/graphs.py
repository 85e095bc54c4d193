"""Graphs whose nodes have attributes: shared, generated, made of the standard library's docstrings, or from files."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from subspan.datasets.shared import load
from subspan.datasets.tables import read_table
from subspan.datasets.texts import stdlib_docstrings

GRAPHS = ("acm", "wiki", "citeseer", "cora")
"""The shared attributed graphs (`SUBSPAN_DATA`)."""

_WORD = re.compile(r"[a-z]{3,}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class AttributedGraph:
    """Adjacency (n, n) and attributes (n, d), both CSR, with a class (n,) and a name for each node where known.

    labels: integers, -1 for nodes without a class.
    """

    title: str
    adjacency: sparse.csr_matrix
    attributes: sparse.csr_matrix
    labels: np.ndarray | None = None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return int(self.attributes.indptr.size - 1)

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

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(np.unique(self.labels[self.labelled])) if self.labels is not None else 0


def load_graph(name: str, folder: str | os.PathLike[str] | None = None) -> AttributedGraph:
    """A shared attributed graph: "acm", "wiki", "citeseer" or "cora" (see `datasets.load`), or "docstrings"."""
    if name == "docstrings":
        return docstring_graph()
    if name not in GRAPHS:
        raise ValueError(f"name: unknown graph {name!r}; known are {', '.join(GRAPHS)}, docstrings")
    return _from_arrays(load(f"graphs/{name}", folder), name)


def docstring_graph(n_classes: int = 8) -> AttributedGraph:
    """Docstrings of the `n_classes` best documented packages of the standard library, linked where one names another.

    Attributes are counts of the words that stand in 2 docstrings or more (names of the objects themselves left out);
    an edge joins two objects of which one's text or code has the other's name, where no more than 5 objects have it.
    The class is the package. About 1 500 nodes.
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
        tuple(f"{entry.module}.{entry.name}" for entry in entries),
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
    """A generated graph of blocks: n_nodes * mean_degree / 2 edges drawn, a share `inside` of them inside a block.

    Each node has `words` words, a share `topical` of them from its block's own part of the vocabulary and the others
    from all of it. Time and memory O(edges + n_nodes words).
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
    """A graph from an edge list and a table of attributes, or from one .npz of two CSR matrices.

    edges: a text file (.txt, .tsv, .csv, .edges, also .gz), a pair of nodes a line, with a weight or none, separated
    by commas, tabs or spaces; lines that start with # and a header are passed over. Nodes are named by `id_column` of
    the attributes, else they are row numbers from 0. attributes: any table that `read_table` reads; label_column:
    classes in it. An .npz has the arrays adj_ and attr_ with data, indices, indptr, shape, and labels or none.
    Raises ValueError, naming the line, for what is no edge, names no node, or has a negative or infinite weight.
    """
    source = Path(edges)
    if not source.is_file():
        raise ValueError(f"edges: there is no file {str(source)!r}")
    if source.suffix.lower() == ".npz":
        if attributes is not None:
            raise ValueError("attributes: an .npz graph has its own; leave them out")
        return _read_arrays(source)
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
    labels = None
    if table.labels is not None:
        labels = np.unique(np.array(table.labels), return_inverse=True)[1].reshape(-1)
    return AttributedGraph(
        source.name, sparse.csr_matrix(adjacency.maximum(adjacency.T)), sparse.csr_matrix(table.array()), labels,
        None if table.ids is None else tuple(map(str, table.ids)),
    )  # fmt: skip


def is_graph_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an .npz with the arrays of a graph, or an edge list by its name."""
    source = Path(path)
    suffixes = [suffix.lower() for suffix in source.suffixes if suffix.lower() != ".gz"]
    if suffixes[-1:] == [".npz"] and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
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
            raise ValueError(f"{where} names {row[nodes.index(None)]!r}, which is no node ({known})")
        weight = _number(row[2]) if len(row) == 3 else 1.0
        if weight is None or not np.isfinite(weight) or weight < 0:
            raise ValueError(f"{where} has the weight {row[2]!r}; a number >= 0 is needed")
        pairs.append((int(nodes[0] or 0), int(nodes[1] or 0)))
        weights.append(weight)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2), np.array(weights)


def _edge_rows(source: Path) -> Iterator[tuple[int, list[str]]]:
    opener: Any = gzip.open if source.suffix.lower() == ".gz" else open
    with opener(source, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
        try:
            for line, text in enumerate(stream, start=1):
                text = text.strip()
                if not text or text.startswith(("#", "%")):
                    continue
                yield line, next(csv.reader([text])) if "," in text else text.split()
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise ValueError(f"edges: {str(source)!r} cannot be read as text ({error})") from error


def _node(name: str, n: int, place: dict[str, int] | None) -> int | None:
    if place is not None:
        return place.get(name.strip())
    name = name.strip()
    return int(name) if name.isdecimal() and int(name) < n else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read_arrays(source: Path) -> AttributedGraph:
    try:
        with np.load(source, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"edges: {str(source)!r} cannot be read ({error})") from error
    return _from_arrays(arrays, source.name)


def _from_arrays(arrays: dict[str, np.ndarray], title: str) -> AttributedGraph:
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
        matrices.append(matrix)
    adjacency, attributes = matrices
    n = adjacency.shape[0]
    labels = arrays.get("labels")
    if adjacency.shape != (n, n) or attributes.shape[0] != n or (labels is not None and labels.shape != (n,)):
        raise ValueError(
            f"edges: {title!r} has adjacency {adjacency.shape}, attributes {attributes.shape} and labels "
            f"{None if labels is None else labels.shape}; one row a node is needed"
        )
    return AttributedGraph(title, adjacency, attributes, labels)
