"""S²CAG and M-S²CAG: the trivial vector, dense oracles, parity with the formulas, planted blocks, bad input."""

import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from subspan.cluster import S2CAG
from subspan.datasets import attributed_block_model
from subspan.solvers import geometric_weights, smooth, transition_matrix

STRONG = attributed_block_model(240, 4, mean_degree=12, inside=0.9, n_attributes=40, words=12, random_state=0)
WEAK = attributed_block_model(200, 3, mean_degree=8, inside=0.6, n_attributes=30, words=8, topical=0.3, random_state=1)


def normalized(x):
    """X^ of dense non-negative attributes by the formulas."""
    n = len(x)
    idf = np.log((1 + n) / (1 + (x > 0).sum(0))) + 1
    weighted = x * idf
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True)
    degree = weighted @ weighted.sum(0)
    return weighted / np.sqrt(degree)[:, None], degree


def smoothed(graph, order, decay):
    x, _ = normalized(graph.attributes.toarray())
    p = transition_matrix(graph.adjacency).toarray()
    return sum(w * np.linalg.matrix_power(p, t) @ x for t, w in enumerate(geometric_weights(order, decay)))


def angle(a, b):
    return np.linalg.norm(a - b @ (b.T @ a), 2)


def basis(model):
    return model.embedding_.basis.numpy()


def test_without_steps_the_first_direction_is_trivial():
    x, degree = normalized(WEAK.attributes.toarray())
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    assert s[0] == pytest.approx(1, abs=1e-12)
    root = np.sqrt(degree)
    assert abs(u[:, 0] @ root) / np.linalg.norm(root) == pytest.approx(1, abs=1e-12)
    model = S2CAG(3, order=0, n_iter=60, random_state=0).fit(WEAK.attributes, adjacency=WEAK.adjacency)
    assert model.singular_values_ == pytest.approx(s[1:4], rel=1e-6)
    assert np.abs(basis(model).T @ root).max() < 1e-8


@pytest.mark.parametrize("solver", ["explicit", "implicit"])
@pytest.mark.parametrize("decay", [0.9, 1.0, 1.7])
def test_conductance_is_the_dense_eigenproblem(solver, decay):
    z = smoothed(WEAK, 5, decay)
    model = S2CAG(3, order=5, decay=decay, n_iter=80, solver=solver, random_state=0)
    model.fit(WEAK.attributes, adjacency=WEAK.adjacency)
    values, vectors = np.linalg.eigh(z @ z.T)
    assert model.solver_ == solver
    assert angle(basis(model), vectors[:, ::-1][:, 1:4]) < 1e-6
    assert model.singular_values_ == pytest.approx(np.sqrt(values[::-1][1:4]), rel=1e-8)


@pytest.mark.parametrize("solver", ["explicit", "implicit"])
@pytest.mark.parametrize("rescale", ["rowsum", "degree", "l2"])
def test_modularity_is_the_dense_eigenproblem(solver, rescale):
    z = smoothed(WEAK, 4, 0.8)
    scale = {
        "rowsum": np.sqrt(z.sum(1)),
        "degree": 1 / np.sqrt(z @ z.sum(0)),
        "l2": 1 / np.linalg.norm(z, axis=1),
    }[rescale]
    z = z * scale[:, None]
    omega = z @ z.sum(0)
    values, vectors = np.linalg.eigh(z @ z.T - 0.9 * np.outer(omega, omega) / omega.sum())
    model = S2CAG(
        3, "modularity", order=4, decay=0.8, gamma=0.9, n_iter=400, rescale=rescale, solver=solver, random_state=0
    ).fit(WEAK.attributes, adjacency=WEAK.adjacency)
    assert angle(basis(model), vectors[:, ::-1][:, :3]) < 1e-6
    assert model.singular_values_ == pytest.approx(np.sqrt(values[::-1][:3]), rel=1e-8)


def test_the_published_recursion_differs_in_the_last_weight_alone():
    """F <- decay (PF + X) gives decay^T P^T + decay sum_{t<T} (decay P)^t, not the series that is meant."""
    p, x = transition_matrix(WEAK.adjacency), normalized(WEAK.attributes.toarray())[0]
    order, decay = 4, 0.8
    f = x.copy()
    for _ in range(order):
        f = decay * (p @ f + x)
    weights = geometric_weights(order, decay)
    series = smooth(x, WEAK.adjacency, order, decay)
    last = x
    for _ in range(order):
        last = p @ last
    rest = (series - weights[-1] * last) * decay / weights[0]
    assert f == pytest.approx(rest + decay**order * last, abs=1e-12)


@pytest.mark.parametrize("objective", ["conductance", "modularity"])
@pytest.mark.parametrize("rounding", ["kmeans+snem", "snem", "kmeans", "rotation"])
def test_planted_blocks_are_found(objective, rounding):
    model = S2CAG(4, objective, rounding=rounding, random_state=0).fit(STRONG.attributes, adjacency=STRONG.adjacency)
    assert adjusted_rand_score(STRONG.labels, model.labels_) == 1
    again = S2CAG(4, objective, rounding=rounding, random_state=0)
    assert (again.fit_predict(STRONG.attributes, adjacency=STRONG.adjacency) == model.labels_).all()


@pytest.mark.filterwarnings("ignore:X. the smoothed attributes have:UserWarning")
def test_components_without_attributes_of_their_own_are_told_apart_by_the_graph():
    random = np.random.default_rng(0)
    x = random.random((40, 6))
    block = np.ones((20, 20)) - np.eye(20)
    a = sparse.block_diag([block, block], format="csr")
    model = S2CAG(2, order=30, decay=1.5, random_state=0).fit(x, adjacency=a)
    assert adjusted_rand_score(np.repeat([0, 1], 20), model.labels_) == 1


@pytest.mark.parametrize("objective", ["conductance", "modularity"])
def test_the_order_of_nodes_does_not_matter(objective):
    order = np.random.default_rng(3).permutation(240)
    k, options = (4 if objective == "conductance" else 3), {"order": 6, "n_iter": 100, "random_state": 0}
    first = S2CAG(k, objective, **options).fit(STRONG.attributes, adjacency=STRONG.adjacency)
    a = STRONG.adjacency[order][:, order]
    second = S2CAG(k, objective, **options).fit(STRONG.attributes[order], adjacency=a)
    assert angle(basis(first)[order], basis(second)) < 1e-6
    assert adjusted_rand_score(first.labels_[order], second.labels_) == 1


def test_every_form_of_the_input_gives_the_same():
    x, a = STRONG.attributes, STRONG.adjacency
    expected = S2CAG(4, random_state=0).fit(x, adjacency=a).labels_
    coo = a.tocoo()
    edges = np.stack([coo.row, coo.col]).astype(np.int64)
    assert (S2CAG(4, random_state=0).fit(x.toarray(), adjacency=edges).labels_ == expected).all()
    tensor = torch.from_numpy(x.toarray())
    found = S2CAG(4, random_state=0).fit(tensor, adjacency=torch.from_numpy(a.toarray()).to_sparse()).labels_
    assert isinstance(found, torch.Tensor)
    assert (found.numpy() == expected).all()
    half = S2CAG(4, random_state=0).fit(tensor.to(torch.bfloat16), adjacency=a).labels_
    assert adjusted_rand_score(expected, half.numpy()) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_far_hops_in_float32_are_finite():
    x = STRONG.attributes.astype(np.float32)
    for solver in ("explicit", "implicit"):
        model = S2CAG(4, order=175, decay=1.8, solver=solver, random_state=0).fit(x, adjacency=STRONG.adjacency)
        assert np.isfinite(basis(model)).all()
        assert np.isfinite(model.singular_values_).all()


def test_the_cheaper_solver_is_chosen():
    wide = sparse.random(300, 900, density=0.02, random_state=0, format="csr")
    narrow = np.random.default_rng(0).random((300, 4))
    a = attributed_block_model(300, 3, random_state=0).adjacency
    assert S2CAG(3, order=20, random_state=0).fit(wide, adjacency=a).solver_ == "implicit"
    with pytest.warns(UserWarning, match="directions"):
        assert S2CAG(4, order=20, random_state=0).fit(narrow, adjacency=a).solver_ == "explicit"


@pytest.mark.parametrize("objective", ["conductance", "modularity"])
@pytest.mark.parametrize("rounding", ["kmeans+snem", "kmeans"])
def test_unseen_nodes_get_the_label_of_the_fitted_node_that_they_copy(objective, rounding):
    """A second copy of the whole graph, not linked to the first, has the first one's embedding."""
    model = S2CAG(3, objective, order=5, n_iter=150, rounding=rounding, random_state=0)
    model.fit(WEAK.attributes, adjacency=WEAK.adjacency)
    extended = model.predict(WEAK.attributes, adjacency=WEAK.adjacency)
    assert (extended == model.labels_).mean() > 0.99
    rows = model._embedded(WEAK.attributes, WEAK.adjacency, None)
    np.testing.assert_allclose(rows, model.embedding_.basis.numpy(), atol=2e-4)


def test_unseen_nodes_are_placed_by_their_links():
    train = np.arange(240) < 200
    a, x = STRONG.adjacency, STRONG.attributes
    model = S2CAG(4, random_state=0).fit(x[train], adjacency=a[train][:, train])
    links, among = a[~train][:, train], a[~train][:, ~train]
    found = model.predict(x[~train], links=links, adjacency=among)
    both = np.concatenate([model.labels_, found])
    assert adjusted_rand_score(STRONG.labels, both) == 1
    # One node alone, with the links of another block's node, goes where its links say when it has no word.
    blank = sparse.csr_matrix((1, x.shape[1]))
    with pytest.warns(UserWarning, match="no attributes"):
        assert model.predict(blank, links=links[:1])[0] == found[0]
    with pytest.raises(ValueError, match=r"links: expected shape \(40, 200\)"):
        model.predict(x[~train], links=links.T)


def test_cluster_subspaces_hold_their_clusters():
    model = S2CAG(4, order=6, random_state=0).fit(STRONG.attributes, adjacency=STRONG.adjacency)
    z = torch.from_numpy(smoothed(STRONG, 6, 0.9))
    residuals = torch.stack([space.residual(z).square().sum(1) for space in model.subspaces_], dim=1)
    own = residuals[torch.arange(240), torch.from_numpy(model.labels_)]
    assert (own <= residuals.min(1).values * 1.0001).double().mean() > 0.95
    assert (own / z.square().sum(1)).mean() < 0.2


def test_many_rows_in_float32_keep_their_directions():
    random = np.random.default_rng(0)
    labels = random.integers(3, size=400_000)
    # The classes' directions are a tenth of the first: far above rounding, far below float32's eps times the rows.
    x = 1 + 0.02 * random.random((len(labels), 4), dtype=np.float32) + 0.3 * np.eye(4, dtype=np.float32)[labels]
    model = S2CAG(3, order=0, features="l2", rounding="snem", n_init=1, random_state=0).fit(x)
    assert model.embedding_.basis.shape[1] == 3
    assert adjusted_rand_score(labels, model.labels_) > 0.99


def test_zero_rows_are_said_and_have_labels():
    x = STRONG.attributes.tolil()
    x[5] = 0
    with pytest.warns(UserWarning, match="1 nodes have no attributes"):
        labels = S2CAG(4, random_state=0).fit(x.tocsr(), adjacency=STRONG.adjacency).labels_
    assert adjusted_rand_score(STRONG.labels, labels) > 0.98


def test_loops_in_the_graph_count():
    a = WEAK.adjacency + 5 * sparse.identity(200)
    plain = S2CAG(3, random_state=0).fit(WEAK.attributes, adjacency=WEAK.adjacency)
    looped = S2CAG(3, random_state=0).fit(WEAK.attributes, adjacency=a)
    assert angle(basis(plain), basis(looped)) > 1e-3


def test_isolated_nodes_keep_their_attributes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = S2CAG(4, random_state=0).fit(STRONG.attributes).labels_
    assert adjusted_rand_score(STRONG.labels, labels) > 0.8


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({"n_clusters": 7}, np.ones((6, 9)), "7 clusters asked for of n_samples = 6"),
        ({"n_clusters": 2}, np.ones((6, 9)), "no two directions"),
        ({"n_clusters": 2, "objective": "modularity"}, np.ones((6, 9)), "no two directions"),
        ({"n_clusters": 2}, -np.eye(6), 'features="l2" takes any'),
        ({"n_clusters": 2}, np.full((6, 3), np.nan), "NaN"),
        ({"n_clusters": 2}, np.zeros((6, 3)), "all attributes are zero"),
        ({"objective": "cut"}, np.eye(9), "objective: expected"),
        ({"rounding": "no"}, np.eye(9), "rounding: expected"),
        ({"order": -1}, np.eye(9), "order: expected an integer >= 0"),
        ({"decay": -1.0}, np.eye(9), "decay"),
        ({"gamma": np.nan}, np.eye(9), "gamma"),
        ({"loops": 3}, np.eye(9), "loops"),
        ({"n_iter": 1.5}, np.eye(9), "n_iter"),
    ],
)
def test_bad_input(options, x, message):
    with pytest.raises(ValueError, match=message):
        S2CAG(**{"random_state": 0, **options}).fit(x)


def test_bad_graphs():
    with pytest.raises(ValueError, match="adjacency: expected shape"):
        S2CAG(2).fit(np.eye(5), adjacency=sparse.identity(4))
    with pytest.raises(ValueError, match="negative"):
        S2CAG(2).fit(np.eye(5), adjacency=-sparse.identity(5))
