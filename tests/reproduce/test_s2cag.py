"""The parts of S²CAG's protocol, and the protocol in small."""

import numpy as np

from subspan.datasets import attributed_block_model
from subspan.reproduce import s2cag

GRAPH = attributed_block_model(
    150, 3, mean_degree=10, inside=0.7, n_attributes=120, words=8, topical=0.4, random_state=0
)


def test_every_method_clusters_all_nodes():
    methods = s2cag.methods(GRAPH, s2cag.Setting({"order": 3}, {"order": 3, "n_iter": 20}), ablations=True)
    assert set(s2cag._BASELINES) < set(methods)
    for name, cluster in methods.items():
        labels = cluster(0)
        assert labels.shape == (150,), name
        assert set(labels) <= {0, 1, 2}
    ours, attributes = (s2cag.scores(GRAPH, methods[name](0)) for name in ("S²CAG", "k-means on TF-IDF"))
    assert ours["accuracy"] > attributes["accuracy"]


def test_structure_alone_is_the_regularised_eigenproblem():
    a = GRAPH.adjacency
    degree = np.asarray(a.sum(1)).ravel()
    tau = degree.mean()
    dense = (a.toarray() + tau / 150) / np.sqrt(np.outer(degree + tau, degree + tau))
    expected = np.linalg.eigh(dense)[1][:, -3:]
    found = s2cag._regularized_structure(a, 3)
    assert np.linalg.norm(found - expected @ (expected.T @ found)) < 1e-8


def test_bars_can_fail():
    low = s2cag.bars("acm", {"S²CAG": 0.925, "k-means on TF-IDF": 0.9}, 0.05, 0.1)
    assert not any(check.holds for check in low)
    high = s2cag.bars("acm", {"S²CAG": 0.94, "k-means on TF-IDF": 0.9}, 0.0, 0.1)
    assert [check.holds for check in high] == [True] * 3


def test_held_out_nodes_are_scored_on_both_sides():
    apart, together = s2cag._unseen(GRAPH, {"order": 3}, 0)
    assert 0.5 < apart <= 1
    assert 0.5 < together <= 1
