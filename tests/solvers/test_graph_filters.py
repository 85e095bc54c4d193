"""Graphs in every form, polynomial filters against their series, and what cannot overflow."""

import numpy as np
import pytest
import torch
from scipy import sparse

from subspan.solvers.graph_filters import (
    FilteredOperator,
    PolynomialFilter,
    as_adjacency,
    geometric_weights,
    smooth,
    symmetric_normalized,
    transition_matrix,
)


def graph(n=30, seed=0):
    random = np.random.default_rng(seed)
    upper = np.triu(random.random((n, n)) < 0.15, 1) * random.random((n, n))
    return sparse.csr_matrix(upper + upper.T)


def test_every_form_of_a_graph_is_the_same():
    dense = (graph().toarray() > 0).astype(float)
    first, second = np.nonzero(np.triu(dense))
    edges = np.stack([first, second])
    forms = [
        sparse.csr_matrix(dense), sparse.coo_matrix(dense), dense, torch.from_numpy(dense),
        torch.from_numpy(dense).to_sparse(), torch.from_numpy(dense).to_sparse_csr(), edges, torch.from_numpy(edges),
        np.hstack([edges, edges[::-1], edges[:, :3]]),
    ]  # fmt: skip
    for form in forms:
        assert (as_adjacency(form, 30).toarray() == dense).all()


def test_loops_are_kept_and_asymmetry_is_mended():
    matrix = np.array([[2.0, 1, 0], [0, 0, 0], [0, 3, 0]])
    with pytest.warns(UserWarning, match="not symmetric"):
        found = as_adjacency(matrix, 3)
    assert found.toarray().tolist() == [[2, 1, 0], [1, 0, 3], [0, 3, 0]]


@pytest.mark.parametrize(
    ("adjacency", "error", "message"),
    [
        (np.ones((3, 4)), ValueError, r"expected shape \(3, 3\)"),
        (-np.eye(3), ValueError, "3 weights are negative"),
        (np.full((3, 3), np.nan), ValueError, "NaN"),
        (np.array([[0, 1], [1, 3]]), ValueError, "names nodes 0 to 3; there are 3"),
        (np.zeros((5001, 5001), dtype=bool), ValueError, "give a sparse matrix"),
        (np.array(["a"]), TypeError, "expected a sparse matrix"),
    ],
)
def test_bad_graphs(adjacency, error, message):
    with pytest.raises(error, match=message):
        as_adjacency(adjacency, 3)


def test_transitions_by_the_formula():
    a = graph().toarray()
    once = a + np.eye(30)
    assert transition_matrix(graph(), 1).toarray() == pytest.approx(once / once.sum(1, keepdims=True))
    root = np.sqrt(once.sum(1))
    twice = once / np.outer(root, root) + np.eye(30)
    assert transition_matrix(graph(), 2).toarray() == pytest.approx(twice / twice.sum(1, keepdims=True))
    with pytest.raises(ValueError, match="loops"):
        transition_matrix(graph(), 3)


def test_isolated_nodes_keep_their_own_and_are_no_nan():
    a = sparse.csr_matrix((3, 3))
    assert transition_matrix(a, 2).toarray().tolist() == np.eye(3).tolist()
    assert symmetric_normalized(a).toarray().tolist() == np.zeros((3, 3)).tolist()


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0, 1.8])
def test_horner_is_the_series(decay):
    p = transition_matrix(graph()).toarray()
    x = np.random.default_rng(1).normal(size=(30, 4))
    weights = geometric_weights(6, decay)
    assert weights.sum() == pytest.approx(1)
    raw = np.array([decay**t for t in range(7)])
    assert weights == pytest.approx(raw / raw.sum())
    series = sum(w * np.linalg.matrix_power(p, t) for t, w in enumerate(weights))
    polynomial = PolynomialFilter(sparse.csr_matrix(p), weights)
    assert polynomial.matmul(x) == pytest.approx(series @ x, abs=1e-13)
    assert polynomial.rmatmul(x) == pytest.approx(series.T @ x, abs=1e-13)
    assert PolynomialFilter(p, weights).rmatmul(x) == pytest.approx(series.T @ x, abs=1e-13)


@pytest.mark.parametrize(("order", "decay", "loops"), [(60, 0.8, 2), (175, 1.8, 2), (175, 1.0, 1), (2, 0.9, 2)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_known_spectrum_saves_products_and_changes_nothing(order, decay, loops, dtype):
    p = transition_matrix(graph(), loops).astype(dtype)
    weights = geometric_weights(order, decay)
    tolerance = 1e-12 if dtype is np.float64 else 1e-7
    spectrum = (0.0, 1.0) if loops == 2 else (-1.0, 1.0)
    values = np.linalg.eigvals(transition_matrix(graph(), loops).toarray()).real
    assert spectrum[0] - 1e-12 <= values.min()
    assert values.max() <= spectrum[1] + 1e-12
    ours = PolynomialFilter(p, weights, spectrum=spectrum, tolerance=tolerance)
    plain = PolynomialFilter(p.astype(np.float64), weights)
    assert plain.steps == order
    assert ours.steps < order / 1.9 if order > 2 else ours.steps == 2
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(dtype)
    assert ours.matmul(x).dtype == dtype
    assert ours.matmul(x) == pytest.approx(plain.matmul(x.astype(np.float64)), abs=30 * tolerance)
    assert ours.rmatmul(x) == pytest.approx(plain.rmatmul(x.astype(np.float64)), abs=30 * tolerance)
    with pytest.raises(ValueError, match="spectrum"):
        PolynomialFilter(p, weights, spectrum=(1.0, 1.0))


@pytest.mark.parametrize(("tolerance", "steps"), [(float(np.finfo(np.float32).eps), 49), (1e-12, 67)])
def test_the_published_filter_of_pubmed_takes_the_steps_that_the_page_says(tolerance, steps):
    weights = geometric_weights(175, 1.8)
    assert PolynomialFilter(np.eye(3), weights, spectrum=(0.0, 1.0), tolerance=tolerance).steps == steps


def test_the_filtered_operator_is_the_product():
    x = sparse.random(30, 8, density=0.4, random_state=0, format="csr")
    polynomial = PolynomialFilter(transition_matrix(graph()), geometric_weights(5, 0.9))
    operator = FilteredOperator(polynomial, x)
    z = polynomial.matmul(x.toarray())
    random = np.random.default_rng(2)
    a, b = random.normal(size=(8, 3)), random.normal(size=(30, 3))
    assert operator.matmul(a) == pytest.approx(z @ a, abs=1e-13)
    assert operator.rmatmul(b) == pytest.approx(z.T @ b, abs=1e-13)


def test_far_hops_do_not_overflow_float32():
    weights = geometric_weights(175, 1.8)
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1)
    p = transition_matrix(graph()).astype(np.float32)
    result = PolynomialFilter(p, weights).matmul(np.ones((30, 2), np.float32))
    assert result.dtype == np.float32
    assert result == pytest.approx(np.ones((30, 2)), rel=1e-4)


@pytest.mark.parametrize(("order", "decay"), [(-1, 0.9), (3, -0.1), (3, np.inf), (3, np.nan)])
def test_bad_weights(order, decay):
    with pytest.raises(ValueError, match=r"order|decay"):
        geometric_weights(order, decay)


def test_smoothing_tensors_is_differentiable():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    a = sparse.csr_matrix(np.eye(6, k=1) + np.eye(6, k=-1))
    result = smooth(x, a, 4, 1.1)
    assert smooth(x.detach().numpy(), a, 4, 1.1) == pytest.approx(result.detach().numpy())
    result.square().sum().backward()
    polynomial = PolynomialFilter(transition_matrix(a), geometric_weights(4, 1.1))
    assert x.grad is not None
    assert x.grad.numpy() == pytest.approx(polynomial.rmatmul(2 * result.detach().numpy()))
