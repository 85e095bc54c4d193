"""Decompositions by products alone, against dense ones."""

import numpy as np
import pytest
from scipy import sparse

from subspan.solvers.low_rank import MatrixOperator, orthogonal_iteration, randomized_svd


def angle(a, b):
    """Sine of the largest principal angle of two orthonormal bases."""
    return np.linalg.norm(a - b @ (b.T @ a), 2)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_leading_triplets_of_dense_and_sparse(form):
    random = np.random.default_rng(0)
    dense = np.where(random.random((80, 50)) < 0.3, random.normal(size=(80, 50)), 0)
    u, s, vt = randomized_svd(MatrixOperator(form(dense)), 4, n_iter=40, random_state=0)
    full_u, full_s, full_vt = np.linalg.svd(dense, full_matrices=False)
    assert s[:4] == pytest.approx(full_s[:4], rel=1e-9)
    assert angle(u[:, :4], full_u[:, :4]) < 1e-7
    assert angle(vt[:4].T, full_vt[:4].T) < 1e-7
    assert np.abs(u.T @ u - np.eye(u.shape[1])).max() < 1e-13
    largest = np.abs(u).argmax(0)
    assert (u[largest, np.arange(u.shape[1])] > 0).all()


def test_a_matrix_of_low_rank_needs_no_iterations():
    random = np.random.default_rng(1)
    matrix = random.normal(size=(60, 3)) @ random.normal(size=(3, 40))
    u, s, vt = randomized_svd(MatrixOperator(matrix), 3, n_iter=0, random_state=0)
    assert np.abs((u * s) @ vt - matrix).max() < 1e-12
    assert s[3:] == pytest.approx(0, abs=1e-12)


def test_float32_products_give_an_orthonormal_basis():
    matrix = np.random.default_rng(2).normal(size=(50, 20)).astype(np.float32)
    u, s, _ = randomized_svd(MatrixOperator(matrix), 3, random_state=0, dtype=np.float32)
    assert np.abs(u.T @ u - np.eye(u.shape[1])).max() < 1e-13
    assert s[0] == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-3)


def test_orthogonal_iteration_with_a_rank_one_term():
    random = np.random.default_rng(3)
    z = random.random((60, 12)) * np.geomspace(3, 0.1, 12)
    w = z @ z.sum(0)
    dense = z @ z.T - np.outer(w, w) / w.sum()
    q, values = orthogonal_iteration(
        lambda y: z @ (z.T @ y) - np.outer(w, w @ y) / w.sum(), 60, 3, n_iter=200, random_state=0
    )
    full_values, full_vectors = np.linalg.eigh(dense)
    assert values == pytest.approx(full_values[::-1][:3], rel=1e-9)
    assert angle(q, full_vectors[:, ::-1][:, :3]) < 1e-7


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_cannot_be(rank):
    with pytest.raises(ValueError, match=r"rank: must lie in \[1, 5\]"):
        randomized_svd(MatrixOperator(np.ones((5, 9))), rank)
    with pytest.raises(ValueError, match=r"k: must lie in \[1, 5\]"):
        orthogonal_iteration(lambda y: y, 5, rank)
