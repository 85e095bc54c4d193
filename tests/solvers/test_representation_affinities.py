"""Affinities from coefficients: retention after adding up, DSC-Net's post-processing, and k-means from given labels."""

import numpy as np
import pytest
from scipy import sparse

from subspan.solvers.rounding import round_embedding
from subspan.solvers.spectral import low_rank_affinity, retained_affinity, spectral_labels


def test_retention_follows_the_published_steps():
    c = np.random.default_rng(0).normal(size=(12, 12))
    w = (abs(c) + abs(c).T) / 2
    kept = np.zeros_like(w)
    for row in range(12):
        largest = np.argsort(-w[row])[:3]
        kept[row, largest] = w[row, largest]
    expected = (kept + kept.T) / 2
    np.testing.assert_allclose(retained_affinity(c, 3).toarray(), expected)
    np.testing.assert_allclose(retained_affinity(sparse.csr_matrix(c), 3).toarray(), expected)
    np.testing.assert_allclose(retained_affinity(c, None).toarray(), w)
    thin = sparse.csr_matrix(
        np.where(np.abs(np.random.default_rng(2).normal(size=(30, 30))) > 2, 1.5, 0) * np.arange(1, 31)
    )
    np.testing.assert_allclose(retained_affinity(thin, 2).toarray(), retained_affinity(thin.toarray(), 2).toarray())


def published(c, k, fraction, d, power):
    """The steps of thrC and post_proC as the papers' code takes them, one column and one entry at a time."""
    kept = np.zeros_like(c)
    for column in range(c.shape[1]):
        order = np.argsort(-abs(c[:, column]), kind="stable")
        total, running = abs(c[:, column]).sum(), 0.0
        for entry in order:
            running += abs(c[entry, column])
            kept[entry, column] = c[entry, column]
            if running > fraction * total:
                break
    u, s, _ = np.linalg.svd((kept + kept.T) / 2)
    rank = min(d * k + 1, len(c))
    rows = u[:, :rank] * np.sqrt(s[:rank])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    z = rows @ rows.T
    affinity = (z * (z > 0)) ** power
    return affinity / affinity.max()


@pytest.mark.parametrize(("fraction", "dim", "power"), [(0.2, 3, 1.0), (0.3, 1, 8.0), (1.0, 2, 3.5)])
def test_dsc_net_post_processing_follows_the_published_steps(fraction, dim, power):
    c = np.random.default_rng(1).normal(size=(20, 20))
    found = low_rank_affinity(c, 3, fraction=fraction, dim=dim, power=power)
    np.testing.assert_allclose(found, published(c, 3, fraction, dim, power), atol=1e-9)
    np.testing.assert_allclose(
        low_rank_affinity(sparse.csr_matrix(c), 3, fraction=fraction, dim=dim, power=power), found
    )


FROZEN = np.array(
    [[0.9, 0.6, 0.1, 0.0, 0.2], [0.5, 0.8, 0.0, 0.1, 0.0], [0.1, 0.0, 0.7, 0.6, 0.1], [0.0, 0.2, 0.9, 1.1, 0.0],
     [0.1, 0.3, 0.2, 0.0, 0.4]]
)  # fmt: skip

ANSWER = np.array(
    [
        [1.0, 0.7740797, 0.0, 0.0, 0.1103979],
        [0.7740797, 1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 1.0, 1.0, 0.0],
        [0.1103979, 0.0, 0.0, 0.0, 1.0],
    ]
)


def test_dsc_net_post_processing_of_a_frozen_array():
    c = FROZEN
    found = low_rank_affinity(c, 2, fraction=0.7, dim=1, power=2.0)
    np.testing.assert_allclose(found, ANSWER, atol=1e-6)
    for options in ({"fraction": 0}, {"dim": 0}, {"power": 0}):
        with pytest.raises(ValueError, match="fraction, dim, power"):
            low_rank_affinity(c, 2, **{"fraction": 0.5, "dim": 1, "power": 1.0, **options})
    with pytest.raises(ValueError, match="all coefficients are zero"):
        low_rank_affinity(np.zeros((4, 4)), 2, fraction=0.5, dim=1, power=1.0)


def test_clusters_keep_their_numbers_from_a_start():
    random = np.random.default_rng(0)
    truth = np.arange(60) % 3
    rows = np.eye(3)[truth] + 0.1 * random.normal(size=(60, 3))
    start = (truth + 1) % 3
    start[:4] = 0
    found = round_embedding(rows, "kmeans", start=start, random_state=0)
    np.testing.assert_array_equal(found, (truth + 1) % 3)
    affinity = np.exp(-((rows[:, None] - rows) ** 2).sum(2) / 0.1)
    np.testing.assert_array_equal(spectral_labels(affinity, 3, start=start, random_state=0), (truth + 1) % 3)
