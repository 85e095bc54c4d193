"""Scores of clusterings against brute force."""

from itertools import combinations, permutations

import numpy as np
import pytest
from scipy import sparse

from subspan.measures.partitions import (
    attribute_modularity,
    clustering_accuracy,
    conductance,
    connectivity,
    feature_detection_error,
    modularity,
    pairwise_f1,
    partition_scores,
)

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("clusters", [2, 3, 4])
def test_accuracy_is_the_best_over_all_matchings(clusters):
    truth, labels = RANDOM.integers(3, size=40), RANDOM.integers(clusters, size=40)
    truth[:3], labels[:clusters] = range(3), range(clusters)
    size = max(3, clusters)
    best = max(np.mean([order[label] == t for label, t in zip(labels, truth)]) for order in permutations(range(size)))
    assert clustering_accuracy(truth, labels) == pytest.approx(best)
    names = np.array(list("abcd"))
    assert clustering_accuracy(names[truth], labels) == pytest.approx(best)


def test_pairwise_f1_counts_pairs():
    truth, labels = RANDOM.integers(3, size=25), RANDOM.integers(4, size=25)
    pairs = [(truth[i] == truth[j], labels[i] == labels[j]) for i, j in combinations(range(25), 2)]
    right = sum(a and b for a, b in pairs)
    precision, recall = right / sum(b for _, b in pairs), right / sum(a for a, _ in pairs)
    assert pairwise_f1(truth, labels) == pytest.approx(2 * precision * recall / (precision + recall))
    assert pairwise_f1(truth, truth) == 1
    assert pairwise_f1([0, 1, 2], [0, 1, 2]) == 0


def test_the_usual_scores_know_no_names_and_tell_chance():
    truth = np.repeat(np.arange(3), 8)
    assert list(partition_scores(truth, (truth + 1) % 3).values()) == pytest.approx([1, 1, 1, 1])
    one = partition_scores(truth, np.zeros(24, int))
    assert (one["accuracy"], one["NMI"], one["ARI"]) == pytest.approx((1 / 3, 0, 0))
    assert one["pairwise F1"] == pairwise_f1(truth, np.zeros(24, int))


def test_feature_detection_error_by_a_loop():
    c = RANDOM.normal(size=(20, 20)) * (RANDOM.random((20, 20)) < 0.3)
    c[4] = 0
    truth = RANDOM.integers(3, size=20)
    shares = [
        np.abs(row[truth != own]).sum() / np.abs(row).sum() if np.abs(row).sum() else 1.0 for row, own in zip(c, truth)
    ]
    assert feature_detection_error(sparse.csr_matrix(c), truth) == pytest.approx(np.mean(shares))
    assert feature_detection_error(c * (truth[:, None] == truth), truth) == pytest.approx(1 / 20)


def test_connectivity_sees_a_class_that_falls_apart():
    complete = np.ones((4, 4)) - np.eye(4)
    path = np.eye(4, k=1) + np.eye(4, k=-1)
    affinity = np.zeros((8, 8))
    affinity[:4, :4], affinity[4:, 4:] = complete, path
    truth = np.repeat([0, 1], 4)
    least, mean = connectivity(affinity, truth)
    root = 1 / np.sqrt(path.sum(1))
    second = np.linalg.eigvalsh(np.eye(4) - root[:, None] * path * root)[1]
    assert least == pytest.approx(second)
    assert mean == pytest.approx((second + 4 / 3) / 2)
    affinity[5, 6] = affinity[6, 5] = 0
    assert connectivity(affinity, truth)[0] == 0


def test_modularity_and_conductance_by_the_formula():
    upper = np.triu(RANDOM.random((15, 15)) < 0.4, 0) * RANDOM.random((15, 15))
    a = upper + upper.T
    labels = np.arange(15) % 3
    degree, total = a.sum(1), a.sum()
    same = labels[:, None] == labels
    for gamma in (0.5, 1.0):
        expected = ((a - gamma * np.outer(degree, degree) / total) * same).sum() / total
        assert modularity(sparse.csr_matrix(a), labels, gamma=gamma) == pytest.approx(expected)
    cuts = [a[labels == c][:, labels != c].sum() / a[labels == c].sum() for c in range(3)]
    assert conductance(a, labels) == pytest.approx(np.mean(cuts))
    with pytest.raises(ValueError, match="no edges"):
        modularity(np.zeros((3, 3)), [0, 1, 2])


def test_modularity_of_attributes_is_that_of_their_graph():
    x = RANDOM.random((15, 6)) * (RANDOM.random((15, 6)) < 0.5)
    labels = np.repeat([4, 7, 9], 5)
    for given in (x, sparse.csr_matrix(x)):
        assert attribute_modularity(given, labels) == pytest.approx(modularity(x @ x.T, labels))
    with pytest.raises(ValueError, match="attributes: must be >= 0"):
        attribute_modularity(-x, labels)
    with pytest.raises(ValueError, match="labels: expected 15, got 3"):
        attribute_modularity(x, [0, 1, 2])
    with pytest.raises(ValueError, match="all zero"):
        attribute_modularity(0 * x, labels)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="labels"):
        clustering_accuracy([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="truth"):
        feature_detection_error(np.eye(3), [0, 1])
    with pytest.raises(ValueError, match="labels"):
        modularity(np.eye(3), [0, 1])
