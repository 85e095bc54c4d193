"""`subspan cluster`: labels, files, the page, counting, and one line for every input that cannot be used."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from subspan import cli
from subspan.cluster import LeastSquaresRepresentation
from subspan.commands import clustering as clusters
from subspan.datasets import Rows, attributed_block_model, load

GRAPH = attributed_block_model(160, 4, mean_degree=10, inside=0.9, n_attributes=40, words=10, random_state=0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Any:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def planted(tmp_path: Path) -> np.ndarray:
    """Rows of three independent subspaces in table.npy and their labels in truth.txt."""
    random = np.random.default_rng(0)
    rows = [random.normal(size=(40, 3)) @ np.linalg.qr(random.normal(size=(20, 3)))[0].T for _ in range(3)]
    labels = np.repeat(np.arange(3), 40)
    order = random.permutation(120)
    x = np.vstack(rows) + 0.005 * random.normal(size=(120, 20))
    np.save(tmp_path / "table.npy", x[order])
    (tmp_path / "truth.txt").write_text("".join(f"kind{label}\n" for label in labels[order]))
    return labels[order]


def test_cells_of_the_affinity_are_means_in_the_order_of_clusters() -> None:
    labels = np.array([1, 0, 1, 0, 0])
    distances = np.array([[9, 1], [2, 9], [9, 2], [1, 9], [3, 9]], dtype=float)
    affinity = np.arange(25.0).reshape(5, 5)
    found = clusters._affinity(affinity, labels, distances)["affinity"]
    order = [3, 1, 4, 0, 2]
    assert found["ends"] == [3, 5]
    np.testing.assert_allclose(found["cells"], affinity[np.ix_(order, order)] / 24, atol=1e-4)
    same = labels[:, None] == labels
    assert found["within"] == pytest.approx(affinity[same].sum() / affinity.sum())
    many = np.repeat(np.arange(3), 100)
    wide = clusters._affinity(np.kron(np.eye(3), np.ones((100, 100))), many, np.ones((300, 3)))["affinity"]
    assert len(wide["cells"]) == 99
    assert wide["within"] == 1
    np.testing.assert_allclose(wide["cells"], np.kron(np.eye(3), np.ones((33, 33))))


def digits(n: int = 400) -> Rows:
    found = load("digits")
    return Rows(found["x"][:n].reshape(n, -1).astype(np.float32), "digits", labels=found["y"][:n].astype(str))


def test_clusters_that_touch_are_not_counted_with_trust() -> None:
    found = clusters.cluster_rows(digits())
    count = found.facts["count"]
    assert not count["trusted"]
    assert count["n_clusters"] == count["candidates"][0]
    assert set(count["by"].values()) <= set(count["candidates"])
    words = clusters.count_in_words(count)
    assert words.startswith("Do not trust this number of clusters: the data do not tell it (by all coefficients ")
    assert f"candidates {count['candidates'][0]}, {count['candidates'][1]}" in words


def test_the_method_is_chosen_by_modularity_and_k_means_is_always_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits()
    found = clusters.cluster_rows(data, 10)
    choice, beside = found.facts["choice"], found.facts["kmeans"]
    assert found.facts["method"] == "lsr"
    assert choice["lsr"] > choice["kmeans"]
    assert found.facts["scores"]["accuracy"] > beside["scores"]["accuracy"]
    assert beside["agreement"] < 1
    named = clusters.cluster_rows(data, 10, method="tsc")
    assert "choice" not in named.facts
    assert named.facts["kmeans"]["scores"] == beside["scores"]
    assert "more accurate" not in clusters.kmeans_in_words(named.facts)
    monkeypatch.setattr(clusters, "modularity", lambda graph, labels: 1.0 - np.array_equal(labels, found.labels))
    other = clusters.cluster_rows(data, 10)
    assert other.facts["method"] == "kmeans"
    assert other.facts["scores"] == other.facts["kmeans"]["scores"] == beside["scores"]
    assert other.facts["kmeans"]["agreement"] == 1
    assert other.facts["silhouette"] == other.facts["kmeans"]["silhouette"] == beside["silhouette"]
    words = clusters.kmeans_in_words({**other.facts, "scores": {"accuracy": 0.1}})
    assert words.startswith("Chosen by modularity among nearest rows: lsr 0.000, kmeans 1.000. ")
    assert words.endswith("more accurate than these clusters.")


def test_the_graph_of_nearest_rows_asks_for_no_more_than_a_cluster_holds() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 5))
    for n_clusters, neighbours in ((1, 10), (4, 5), (20, 3)):
        graph = clusters._nearest_in_angle(rows, n_clusters, False)
        assert graph.sum() == 2 * 60 * neighbours
        assert abs(graph - graph.T).max() == 0


def test_the_ridge_of_the_command_line_is_that_for_any_data() -> None:
    data = digits(200)
    found = clusters.cluster_rows(data, 10, method="lsr")
    model = LeastSquaresRepresentation(10, alpha=3.0, random_state=0).fit(data.take(np.arange(200)))
    np.testing.assert_array_equal(found.labels, model.labels_)


def test_a_count_of_a_graph_is_trusted_where_links_and_attributes_agree() -> None:
    values = np.array([9.0, 8.0, 2.0, 1.0])
    blocks = np.kron(np.eye(3), np.ones((6, 6)))
    agreed = clusters._largest_gap(values, sparse.csr_matrix(blocks), 0)
    assert (agreed["n_clusters"], agreed["trusted"]) == (3, True)
    other = clusters._largest_gap(values[[0, 2, 3]], sparse.csr_matrix(blocks), 0)
    assert (other["n_clusters"], other["trusted"]) == (2, False)
    assert other["candidates"] == [2, 3]
    assert not clusters._largest_gap(values, sparse.csr_matrix((18, 18)), 0)["trusted"]


def write_graph() -> None:
    a = GRAPH.adjacency.tocoo()
    lines = [f"n{i} n{j}" for i, j in zip(a.row, a.col) if i < j]
    Path("links.edges").write_text("\n".join(lines) + "\n")
    with Path("words.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "kind", *(f"w{j}" for j in range(40))])
        for i, row in enumerate(GRAPH.attributes.toarray()):
            writer.writerow([f"n{i}", f"k{GRAPH.labels[i]}", *row])


def test_a_graph_takes_labels_from_a_file_of_them(run: Callable[..., Any]) -> None:
    write_graph()
    Path("kinds.txt").write_text("".join(f"kind {label}\n" for label in GRAPH.labels))
    command = ("cluster", "links.edges", "--attributes", "words.csv", "--id-column", "id", "-c", 4, "-o", "c.csv")
    rows = [line.split(",") for line in Path("words.csv").read_text().splitlines()]
    Path("words.csv").write_text("\n".join(",".join([row[0], *row[2:]]) for row in rows))
    code, out, err = run(*command, "--labels", "kinds.txt")
    assert (code, err) == (0, "")
    assert "against the labels: " in out
    with Path("c.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == [f"kind {label}" for label in GRAPH.labels]


def test_rows_are_counted_clustered_and_written(run: Callable[..., Any], planted: np.ndarray) -> None:
    code, out, err = run(
        "cluster",
        "table.npy",
        "--dim",
        "3",
        "--labels",
        "truth.txt",
        "--json",
        "-o",
        "found.csv",
        "--report",
        "page.html",
    )
    assert code == 0, err
    facts = json.loads(out)
    assert facts["clusters"] == 3
    assert facts["count"]["n_clusters"] == 3
    assert facts["count"]["trusted"]
    assert facts["kmeans"]["scores"]["accuracy"] < 1
    assert facts["scores"] == {"accuracy": 1.0, "nmi": pytest.approx(1), "ari": 1.0}
    assert adjusted_rand_score(planted, facts["labels"]) == 1
    assert facts["dimensions"] == [3, 3, 3]
    assert facts["silhouette"] > 0.9
    assert min(facts["angles"][i][j] for i in range(3) for j in range(i)) > 30
    for cluster, rows in enumerate(facts["representatives"]):
        assert {facts["labels"][row] for row in rows} == {cluster}
    with Path("found.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [int(row["cluster"]) for row in written] == facts["labels"]
    assert [row["label"] for row in written[:2]] == [f"kind{planted[0]}", f"kind{planted[1]}"]
    page = Path("page.html").read_text(encoding="utf-8")
    assert "3 clusters by lsr" in page
    assert "http://" not in page.split("<script>")[0]


@pytest.mark.parametrize("method", ["omp", "tsc", "ensc", "ksubspaces"])
def test_methods_by_name(run: Callable[..., Any], planted: np.ndarray, method: str) -> None:
    code, out, err = run(
        "cluster", "table.npy", "-c", "3", "--dim", "3", "--method", method, "-o", "found.npz", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["method"] == method
    with np.load("found.npz", allow_pickle=False) as found:
        assert adjusted_rand_score(planted, found["cluster"]) == 1
        assert found["residual"].shape == (120,)


def test_a_graph_as_edges_and_as_an_archive(run: Callable[..., Any]) -> None:
    write_graph()
    code, out, err = run(
        "cluster", "links.edges", "--attributes", "words.csv", "--id-column", "id", "--labels", "kind", "-c", "4",
        "--json", "-o", "found.csv", "--report", "page.html",
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads(out)
    assert adjusted_rand_score(GRAPH.labels, facts["labels"]) == 1
    assert facts["scores"]["accuracy"] == 1
    assert facts["modularity"] > 0.5
    assert Path("found.csv").read_text().splitlines()[1].startswith("0,n0,")
    assert "160 nodes" in Path("page.html").read_text(encoding="utf-8")
    arrays = {}
    for prefix, matrix in (("adj", GRAPH.adjacency), ("attr", GRAPH.attributes)):
        arrays |= {f"{prefix}_{key}": getattr(matrix, key) for key in ("data", "indices", "indptr")}
        arrays[f"{prefix}_shape"] = np.array(matrix.shape)
    np.savez("graph.npz", **arrays)
    code, out, err = run("cluster", "graph.npz", "--objective", "modularity", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["clusters"] == facts["count"]["n_clusters"]
    assert set(facts["count"]["by"]) == {"smoothed attributes", "graph"}
    assert facts["kmeans"]["agreement"] < 1
    assert adjusted_rand_score(GRAPH.labels, facts["labels"]) > 0.6


def test_what_is_printed(run: Callable[..., Any], planted: np.ndarray) -> None:
    code, out, err = run("cluster", "table.npy", "--dim", "3")
    assert code == 0, err
    assert out.startswith("rows 120, method lsr, clusters 3")
    assert "The number of clusters, 3, stands out in the data (by all coefficients 3, " in out
    assert "Chosen by modularity among nearest rows: lsr 0." in out
    assert "k-means, for comparison: adjusted Rand index with these clusters" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.npy"], "no such file"),
        (["table.npy", "-c", "121"], "121 asked for of 120 rows"),
        (["table.npy", "-o", "found.txt"], "must end in .csv, .json, .npz"),
        (["table.npy", "--report", "page.pdf"], "must end in .html"),
        (["links.edges"], "a table with a row a node is needed"),
        (["links.edges", "--attributes", "words.csv", "--id-column", "id", "--method", "omp"], "not for a graph"),
        (["links.edges", "--attributes", "table.npy"], "which is no node"),
        (["bad.npy"], "NaN"),
        (["zero.npy", "-c", "2"], "rows are zero"),
    ],
)
def test_bad_input_is_one_line(
    run: Callable[..., Any], planted: np.ndarray, arguments: list[str], message: str
) -> None:
    write_graph()
    np.save("bad.npy", np.full((9, 3), np.nan))
    np.save("zero.npy", np.vstack([np.zeros((1, 4)), np.eye(4)]))
    code, out, err = run("cluster", *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.splitlines()[-1].startswith("subspan: error: ")
    assert not Path("found.txt").exists()
