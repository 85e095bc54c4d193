"""Roundings of an embedding: planted clusters, invariances, the published iteration, empty clusters."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from subspan.solvers.rounding import ROUNDINGS, fill_empty, round_embedding, snem, snem_objective


def planted(k=4, n=120, noise=0.02, seed=0):
    """An orthonormal basis (n, k) near the span of the clusters' indicators, turned at random."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(n) % k)
    indicator = np.eye(k)[labels] + noise * random.normal(size=(n, k))
    turn = np.linalg.qr(random.normal(size=(k, k)))[0]
    return np.linalg.qr(indicator @ turn)[0], labels


@pytest.mark.parametrize("method", ROUNDINGS)
def test_planted_clusters_are_found(method):
    embedding, labels = planted()
    found = round_embedding(embedding, method, random_state=0)
    assert adjusted_rand_score(labels, found) == 1
    assert found.dtype == np.int64


@pytest.mark.parametrize("method", ["kmeans", "kmeans+snem", "rotation"])
def test_neither_the_basis_nor_the_order_of_items_matters(method):
    embedding, _ = planted(noise=0.1, seed=1)
    random = np.random.default_rng(2)
    turn = np.linalg.qr(random.normal(size=(4, 4)))[0]
    order = random.permutation(len(embedding))
    first = round_embedding(embedding, method, random_state=0)
    assert adjusted_rand_score(first, round_embedding(embedding @ turn, method, random_state=0)) == 1
    assert adjusted_rand_score(first[order], round_embedding(embedding[order], method, random_state=0)) == 1


def test_one_start_of_snem_is_the_published_iteration():
    embedding, _ = planted(noise=0.3, seed=3)
    labels = embedding.argmax(1)
    for _ in range(100):
        indicator = np.eye(4)[labels]
        norms = np.sqrt(indicator.sum(0))
        norms[norms == 0] = 1
        labels = (embedding @ (embedding.T @ (indicator / norms))).argmax(1)
    assert (round_embedding(embedding, "snem", n_init=1) == labels).all()


def test_restarts_of_snem_never_lower_its_objective():
    embedding = np.linalg.qr(np.random.default_rng(4).normal(size=(60, 5)))[0]
    values = [
        snem_objective(embedding, round_embedding(embedding, "snem", n_init=n, random_state=0), 5) for n in (1, 4, 16)
    ]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_the_objective_is_the_trace_of_the_formula():
    embedding, _ = planted(k=3, n=9, noise=0.5)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 0, 1])
    indicator = np.eye(3)[labels] / np.sqrt(np.bincount(labels))
    trace = np.trace(indicator.T @ embedding @ embedding.T @ indicator)
    assert snem_objective(embedding, labels, 3) == pytest.approx(trace)
    assert snem_objective(embedding, labels, 3) <= 3
    refined = snem(embedding, labels, 3)
    assert snem_objective(embedding, refined, 3) >= trace


def test_rotation_reaches_the_best_matching_of_small_cases():
    """For a rotated indicator the nearest indicator is itself, whatever the starts."""
    for labels in set(permutations([0, 0, 1, 1, 2])):
        indicator = np.eye(3)[list(labels)] / np.sqrt(np.bincount(labels))
        turn = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
        assert adjusted_rand_score(labels, round_embedding(indicator @ turn, "rotation", n_init=3, random_state=0)) == 1


def test_empty_clusters_get_the_row_that_fits_worst():
    rows = np.array([[1.0, 0], [0.9, 0], [0, 1], [0, 0.9], [-5, -5]])
    with pytest.warns(UserWarning, match="1 of 3 clusters came out empty"):
        labels = fill_empty(rows, np.array([0, 0, 1, 1, 1]), 3)
    assert labels.tolist() == [0, 0, 1, 1, 2]
    with pytest.warns(UserWarning, match="came out empty"):
        labels = round_embedding(np.ones((5, 1)), "kmeans", n_clusters=3, random_state=0)
    assert set(labels) == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method: expected one of"),
        ({"n_clusters": 7}, r"n_clusters: must lie in \[1, 6\]"),
        ({"n_clusters": 0}, "n_clusters"),
        ({"n_init": 0}, "n_init"),
        ({"method": "snem", "n_clusters": 2}, "takes n_clusters = 2 columns"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        round_embedding(np.eye(6)[:, :3], **options)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        round_embedding(np.full((4, 2), np.nan))
