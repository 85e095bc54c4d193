"""Attributed graphs: generated, from text, from files, and files that are none."""

import email
import gzip
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from subspan.datasets import attributed_block_model, docstring_graph, graphs, load_graph, read_graph, stdlib_docstrings
from subspan.datasets.graphs import is_graph_file


def test_block_model_has_what_was_asked_for():
    graph = attributed_block_model(2000, 5, mean_degree=20, inside=0.7, topical=0.5, words=10, random_state=0)
    a = graph.adjacency.tocoo()
    assert (abs(graph.adjacency - graph.adjacency.T)).nnz == 0
    assert a.nnz / 2000 == pytest.approx(20, rel=0.03)
    same = (graph.labels[a.row] == graph.labels[a.col]).mean()
    assert same == pytest.approx(0.7 + 0.3 / 5, abs=0.02)
    assert set(a.data) == {1.0}
    assert (graph.attributes.sum(1) == 10).all()
    x = graph.attributes.tocoo()
    own = (x.col // 40 == graph.labels[x.row]) @ x.data / x.data.sum()
    assert own == pytest.approx(0.5 + 0.5 / 5, abs=0.02)
    again = attributed_block_model(2000, 5, mean_degree=20, inside=0.7, topical=0.5, words=10, random_state=0)
    assert (again.adjacency != graph.adjacency).nnz == 0
    assert graph.n_classes == 5
    with pytest.raises(ValueError, match="n_clusters"):
        attributed_block_model(10, 11)


def test_docstrings_are_linked_by_names(monkeypatch):
    part = stdlib_docstrings(folder=Path(email.__file__).parent)
    monkeypatch.setattr(graphs, "stdlib_docstrings", lambda: part)
    graph = docstring_graph(3)
    assert len(graph) == graph.attributes.shape[0] == len(graph.labels)
    assert graph.n_classes == 3
    assert (abs(graph.adjacency - graph.adjacency.T)).nnz == 0
    assert graph.adjacency.diagonal().sum() == 0
    assert graph.adjacency.nnz > len(graph)
    a = graph.adjacency.tocoo()
    texts = {entry.name: entry.text + entry.code for entry in part}
    for i, j in list(zip(a.row, a.col))[:50]:
        one, other = graph.names[i], graph.names[j]
        assert one.split(".")[-1] in texts[other] or other.split(".")[-1] in texts[one]


def test_shared_graphs(shared_data):
    sizes = {"acm": (3025, 3), "wiki": (2405, 17), "citeseer": (3327, 6), "cora": (2708, 7)}
    for name, (n, classes) in sizes.items():
        graph = load_graph(name)
        assert (len(graph), graph.n_classes) == (n, classes)
        assert graph.attributes.shape[0] == n
    citeseer = load_graph("citeseer")
    assert (~citeseer.labelled).sum() == 15
    assert is_graph_file(shared_data / "graphs" / "cora.npz")
    assert len(read_graph(shared_data / "graphs" / "cora.npz")) == 2708


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "# edges\n0 1\n1 2 2.5\n\n3 2\n"),
        ("a.csv", "source,target,weight\n0,1,1\n1,2,2.5\n3,2,1\n"),
        ("a.edges", "0\t1\n1\t2\t2.5\n3\t2\n"),
        ("a.edges.gz", "0 1\n1 2 2.5\n3 2\n"),
    ],
)
def test_edge_lists(tmp_path, name, text):
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt") as file:
        file.write(text)
    np.save(tmp_path / "x.npy", np.eye(4))
    graph = read_graph(tmp_path / name, tmp_path / "x.npy")
    expected = np.zeros((4, 4))
    expected[[0, 1, 1, 2, 3, 2], [1, 0, 2, 1, 2, 3]] = 1, 1, 2.5, 2.5, 1, 1
    assert graph.adjacency.toarray().tolist() == expected.tolist()
    assert is_graph_file(tmp_path / name) == ("edges" in name)


def test_nodes_named_by_a_column(tmp_path):
    (tmp_path / "e.tsv").write_text("ann\tbob\ncid\tann\n")
    (tmp_path / "x.csv").write_text("id,kind,a,b\nann,x,1,2\nbob,y,3,4\ncid,x,5,6\n")
    graph = read_graph(tmp_path / "e.tsv", tmp_path / "x.csv", id_column="id", label_column="kind")
    assert graph.names == ("ann", "bob", "cid")
    assert graph.labels.tolist() == [0, 1, 0]
    assert graph.adjacency.toarray().tolist() == [[0, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert graph.attributes.toarray().tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1\n1 9\n", "line 2 .* names '9', which is no node"),
        ("0 1\n1 -2\n", "no node"),
        ("0 1\n1\n", "line 2 .* has 1 fields"),
        ("0 1\n1 2 nan\n", "weight 'nan'"),
        ("0 1\n1 2 -1\n", "weight '-1'"),
        ("0 1\n1 2 x\n", "weight 'x'"),
        ("0 1\n\x00\xff", "no node|fields|text"),
    ],
)
def test_edges_that_are_none(tmp_path, text, message):
    (tmp_path / "e.txt").write_text(text, encoding="latin-1")
    np.save(tmp_path / "x.npy", np.eye(4))
    with pytest.raises(ValueError, match=message):
        read_graph(tmp_path / "e.txt", tmp_path / "x.npy")


def test_graph_archives_that_are_none(tmp_path):
    a, x = sparse.csr_matrix(np.eye(3)), sparse.csr_matrix(np.ones((3, 2)))

    def arrays(**changed):
        found = {}
        for prefix, matrix in (("adj", a), ("attr", x)):
            found |= {f"{prefix}_{key}": getattr(matrix, key) for key in ("data", "indices", "indptr")}
            found[f"{prefix}_shape"] = np.array(matrix.shape)
        return {**found, **changed}

    np.savez(tmp_path / "good.npz", **arrays(labels=np.arange(3)))
    assert read_graph(tmp_path / "good.npz").labels.tolist() == [0, 1, 2]
    broken = {
        "wild": ({"adj_indices": np.array([0, 1, 7], np.int32)}, "no CSR matrix"),
        "short": ({"labels": np.arange(2)}, "one row a node"),
    }
    for name, (changed, message) in broken.items():
        np.savez(tmp_path / f"{name}.npz", **arrays(**changed))
        with pytest.raises(ValueError, match=message):
            read_graph(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "lacking.npz", adj_data=np.ones(1))
    with pytest.raises(ValueError, match="lacks"):
        read_graph(tmp_path / "lacking.npz")
    with pytest.raises(ValueError, match="has its own"):
        read_graph(tmp_path / "good.npz", tmp_path / "good.npz")
    with pytest.raises(ValueError, match="there is no file"):
        read_graph(tmp_path / "none.txt")
    (tmp_path / "e.txt").write_text("0 1\n")
    with pytest.raises(ValueError, match="a table with a row a node"):
        read_graph(tmp_path / "e.txt")
    with pytest.raises(ValueError, match="unknown graph"):
        load_graph("pubmed")


def test_classes_have_names_and_come_from_a_column_an_array_or_a_list(tmp_path):
    (tmp_path / "e.edges").write_text("a b\nb c\n")
    (tmp_path / "x.csv").write_text("id,kind,x\na,red,0.5\nb,,1.5\nc,blue,2.5\n")
    graph = read_graph(tmp_path / "e.edges", tmp_path / "x.csv", id_column="id", label_column="kind")
    assert graph.class_names.tolist() == ["red", "", "blue"]
    assert (graph.labels.tolist(), graph.classes, graph.n_classes) == ([1, -1, 0], ("blue", "red"), 2)
    assert graph.with_classes(["x", "x", "y"]).class_names.tolist() == ["x", "x", "y"]
    with pytest.raises(ValueError, match="one a node is needed, got 2 for 3"):
        graph.with_classes(["x", "y"])
    arrays = {}
    for prefix, matrix in (("adj", graph.adjacency), ("attr", graph.attributes)):
        arrays |= {f"{prefix}_{key}": getattr(matrix, key) for key in ("data", "indices", "indptr")}
        arrays[f"{prefix}_shape"] = np.array(matrix.shape)
    np.savez(tmp_path / "g.npz", **arrays, kind=np.array(["red", "red", "blue"]), labels=np.arange(3))
    assert read_graph(tmp_path / "g.npz").class_names.tolist() == ["0", "1", "2"]
    assert read_graph(tmp_path / "g.npz", label_column="kind").class_names.tolist() == ["red", "red", "blue"]
    assert read_graph(tmp_path / "g.npz", id_column="kind").names == ("red", "red", "blue")
    with pytest.raises(ValueError, match=r"no 'other' with an entry a node; it has .*kind, labels"):
        read_graph(tmp_path / "g.npz", label_column="other")
    arrays["adj_data"] = np.full(len(arrays["adj_data"]), np.nan)
    np.savez(tmp_path / "g.npz", **arrays)
    with pytest.raises(ValueError, match=r"adj_data .* contains NaN"):
        read_graph(tmp_path / "g.npz")
