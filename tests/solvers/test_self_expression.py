"""Solvers of self-expression against the problems that they solve."""

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import ElasticNet, OrthogonalMatchingPursuit

from subspan.solvers.self_expression import (
    elastic_net_self_expression,
    low_rank_self_expression,
    omp_self_expression,
    ridge_self_expression,
    robust_low_rank_self_expression,
    thresholded_similarities,
)
from subspan.solvers.spectral import (
    affinity_from_representation,
    count_clusters,
    spectral_embedding,
    spectral_labels,
    top_per_row,
)


def unit(n, d, seed=0):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("n", "d"), [(12, 20), (30, 8)])
def test_ridge_is_the_normal_equations_of_each_row(n, d):
    x = unit(n, d)
    c = ridge_self_expression(x, 0.3)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        atoms = x[others]
        solved = torch.linalg.solve(atoms @ atoms.mT + 0.3 * torch.eye(n - 1), atoms @ x[i])
        assert torch.allclose(c[i, others], solved, atol=1e-10)
    assert (c.diagonal() == 0).all()
    gram = x @ x.mT
    free = ridge_self_expression(x, 0.3, zero_diagonal=False)
    assert torch.allclose(free, gram @ torch.linalg.inv(gram + 0.3 * torch.eye(n)), atol=1e-10)


def test_low_rank_minimises_its_objective():
    x = unit(14, 9)
    c = low_rank_self_expression(x, 8.0)

    def objective(c):
        return torch.linalg.matrix_norm(c, "nuc") + 4 * (x - c @ x).square().sum()

    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            step = size * torch.randn(14, 14, dtype=torch.float64, generator=generator)
            assert objective(c + step) > objective(c)
            inside = size * x @ torch.randn(9, 14, dtype=torch.float64, generator=generator)
            assert objective(c + inside) > objective(c)
    shape = low_rank_self_expression(x, float("inf"))
    u = torch.linalg.svd(x, full_matrices=False)[0]
    assert torch.allclose(shape, u @ u.mT, atol=1e-10)


def test_robust_low_rank_keeps_its_constraint_and_clean_rows_exact():
    base = unit(30, 12)
    x = base[:, :3] @ unit(3, 12, seed=2)
    c, e = robust_low_rank_self_expression(x, 1.0)
    assert torch.allclose(x, c @ x + e, atol=1e-5)
    assert float(e.abs().max()) < 1e-5
    u = torch.linalg.svd(x, full_matrices=False)[0][:, :3]
    assert torch.allclose(c, u @ u.mT, atol=1e-3)


@pytest.mark.parametrize("n_nonzero", [1, 3, 6])
def test_omp_is_the_textbook_pursuit(n_nonzero):
    x = unit(40, 15)
    c = omp_self_expression(x, n_nonzero, tolerance=0.0).toarray()
    for i in range(0, 40, 5):
        others = [j for j in range(40) if j != i]
        expected = OrthogonalMatchingPursuit(n_nonzero_coefs=n_nonzero, fit_intercept=False)
        expected.fit(x[others].numpy().T, x[i].numpy())
        assert c[i, others] == pytest.approx(expected.coef_, abs=1e-9)
    assert ((c != 0).sum(1) == n_nonzero).all()


def test_omp_stops_at_the_tolerance_and_at_copies():
    basis = unit(2, 10)
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) @ basis
    x = x / x.norm(dim=1, keepdim=True)
    c = omp_self_expression(x, 6)
    assert ((c != 0).sum(1) <= 2).all()
    assert np.abs(c @ x.numpy() - x.numpy()).max() < 1e-2
    twins = torch.cat([x[:3], x[:3]])
    assert np.isfinite(omp_self_expression(twins, 4).data).all()


@pytest.mark.parametrize("l1_ratio", [1.0, 0.8])
@pytest.mark.parametrize("working_set", [100, 12])
def test_the_elastic_net_is_that_of_all_others(l1_ratio, working_set):
    x = unit(60, 25)
    c = elastic_net_self_expression(
        x, gamma=6.0, l1_ratio=l1_ratio, max_support=60, working_set=working_set, n_rounds=40, tolerance=1e-10
    ).toarray()
    for i in range(0, 60, 6):
        others = [j for j in range(60) if j != i]
        atoms = x[others].numpy()
        alpha = np.abs(atoms @ x[i].numpy()).max() / l1_ratio / 6
        model = ElasticNet(alpha=alpha / 25, l1_ratio=l1_ratio, fit_intercept=False, tol=1e-12, max_iter=100_000)
        assert c[i, others] == pytest.approx(model.fit(atoms.T, x[i].numpy()).coef_, abs=1e-3)
    assert (np.diag(c) == 0).all()


def test_at_gamma_one_nothing_is_expressed():
    assert elastic_net_self_expression(unit(30, 10), gamma=1.0).nnz == 0
    assert elastic_net_self_expression(unit(30, 10), gamma=1.05).nnz > 0


@pytest.mark.parametrize("n", [2, 3, 5])
def test_every_other_row_may_be_needed(n):
    x = unit(n, 12)
    c = elastic_net_self_expression(x, gamma=1e4)
    assert (c.getnnz(1) == n - 1).all()
    assert (c.diagonal() == 0).all()


def test_an_empty_working_set_is_refused():
    for options in ({"working_set": 0}, {"max_support": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            elastic_net_self_expression(unit(10, 5), **options)


def test_the_largest_coefficients_are_kept():
    full = elastic_net_self_expression(unit(40, 10), max_support=40)
    few = elastic_net_self_expression(unit(40, 10), max_support=3)
    assert few.toarray() == pytest.approx(top_per_row(full, 3).toarray(), abs=1e-12)
    assert (few.getnnz(1) == 3).all()


def test_thresholding_keeps_the_nearest_in_angle():
    x = unit(25, 6)
    c = thresholded_similarities(x, 4).toarray()
    gram = (x @ x.mT).abs().numpy()
    np.fill_diagonal(gram, -1)
    for row, similar in zip(c, gram):
        nearest = np.argsort(-similar)[:4]
        assert set(np.flatnonzero(row)) == set(nearest)
        assert row[nearest] == pytest.approx(np.exp(-2 * np.arccos(similar[nearest])))


def test_top_per_row_of_dense_and_sparse():
    random = np.random.default_rng(0)
    dense = random.normal(size=(9, 7)) * (random.random((9, 7)) < 0.6)
    kept = top_per_row(dense, 2).toarray()
    assert (kept == top_per_row(sparse.csr_matrix(dense), 2).toarray()).all()
    for row, chosen in zip(dense, kept):
        largest = np.sort(np.abs(row))[-2:]
        assert np.sort(np.abs(chosen))[-2:] == pytest.approx(largest)


def test_affinity_by_the_formula():
    c = np.random.default_rng(1).normal(size=(6, 6))
    rows = np.abs(c) / np.linalg.norm(c, axis=1, keepdims=True)
    assert affinity_from_representation(c).toarray() == pytest.approx((rows + rows.T) / 2)
    knn = affinity_from_representation(c, kind="knn", n_neighbors=2).toarray()
    assert set(np.unique(knn)) <= {0.0, 0.5, 1.0}
    assert (np.diag(knn) == 0).all()
    with pytest.raises(ValueError, match="kind"):
        affinity_from_representation(c, kind="no")


def blocks(sizes, between=0.01, seed=0):
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    w = np.where(labels[:, None] == labels, 1.0, between) * random.uniform(0.5, 1, (len(labels), len(labels)))
    w = (w + w.T) / 2
    np.fill_diagonal(w, 0)
    return w, labels


def test_lanczos_and_dense_embeddings_agree(monkeypatch):
    w, labels = blocks([30, 40, 50])
    dense = spectral_embedding(w, 3)
    monkeypatch.setattr("subspan.solvers.spectral._DENSE_NODES", 10)
    lanczos = spectral_embedding(w, 3, random_state=0)
    assert lanczos.values == pytest.approx(dense.values, abs=1e-6)
    assert np.linalg.norm(lanczos.vectors - dense.vectors @ (dense.vectors.T @ lanczos.vectors)) < 1e-4
    assert len(set(zip(labels, spectral_labels(w, 3, random_state=0)))) == 3


def test_clusters_are_counted_and_a_close_call_is_said():
    clear = count_clusters(blocks([20, 20, 20, 20], 0.01)[0])
    assert clear.n_clusters == 4
    assert clear.certainty > 0.5
    vague = count_clusters(blocks([20, 20, 20, 20], 0.9)[0])
    assert vague.certainty < clear.certainty
    # Three items can be two clusters, and nothing else; two cannot be counted.
    assert count_clusters(blocks([2, 1], 0.01)[0]).n_clusters == 2
    with pytest.raises(ValueError, match="2 items are too few"):
        count_clusters(np.ones((2, 2)))


def test_components_and_isolated_items_are_said():
    w, _ = blocks([10, 10, 10], between=0.0)
    with pytest.warns(UserWarning, match="3 connected components"):
        labels = spectral_labels(w, 2, random_state=0)
    assert set(labels) == {0, 1}
    w[4] = w[:, 4] = 0
    with pytest.warns(UserWarning, match="1 of 30 items have none"):
        assert np.isfinite(spectral_embedding(w, 3).vectors).all()
    with pytest.raises(ValueError, match="all entries are zero"):
        spectral_embedding(np.zeros((4, 4)), 2)
