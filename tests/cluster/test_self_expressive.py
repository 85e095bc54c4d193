"""The classic subspace clusterers: planted subspaces, prediction, affine data, bad input, scikit-learn's checks."""

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from subspace_clusters import union_of_subspaces
from subspan.cluster import (
    ElasticNetSubspaceClustering,
    KSubspaces,
    LeastSquaresRepresentation,
    LowRankMixtureDiffusion,
    LowRankRepresentation,
    OMPSubspaceClustering,
    SparseSubspaceClustering,
    ThresholdingSubspaceClustering,
)
from subspan.geometry import Subspace
from subspan.measures import feature_detection_error
from subspan.solvers.self_expression import RIDGE, low_rank_self_expression, ridge_self_expression

ALL = [
    LeastSquaresRepresentation,
    LowRankRepresentation,
    OMPSubspaceClustering,
    ThresholdingSubspaceClustering,
    ElasticNetSubspaceClustering,
    SparseSubspaceClustering,
]


@pytest.mark.parametrize("method", ALL)
def test_independent_subspaces_are_found(method):
    x, labels, bases = union_of_subspaces()
    model = method(3, rank=4, random_state=0).fit(x)
    assert adjusted_rand_score(labels, model.labels_) == 1
    assert (model.predict(x) == model.labels_).all()
    assert isinstance(model.subspaces_, Subspace)
    assert model.subspaces_.basis.shape == (3, 30, 4)
    for cluster in range(3):
        truth = Subspace(torch.from_numpy(bases[labels[model.labels_ == cluster][0]]))
        found = Subspace(model.subspaces_.basis[cluster])
        assert float(found.angles(truth).max()) < 1e-6
    assert abs(model.affinity_ - model.affinity_.T).max() < 1e-12
    assert model.affinity_.min() >= 0
    again = method(3, rank=4, random_state=0).fit_predict(torch.from_numpy(x))
    assert (again.numpy() == model.labels_).all()


@pytest.mark.parametrize("method", [OMPSubspaceClustering, SparseSubspaceClustering])
def test_sparse_coefficients_stay_inside_the_subspaces(method):
    x, labels, _ = union_of_subspaces()
    model = method(3, random_state=0).fit(x)
    assert sparse.issparse(model.representation_)
    assert feature_detection_error(model.representation_, labels) < 1e-6
    assert model.representation_.diagonal().tolist() == [0] * len(x)


@pytest.mark.parametrize("method", [*ALL, KSubspaces])
def test_affine_subspaces(method):
    x, labels, _ = union_of_subspaces(affine=True)
    options = {"rank": 4}
    model = method(3, affine=True, random_state=0, **options).fit(x)
    assert adjusted_rand_score(labels, model.labels_) == 1
    assert model.subspaces_.center.shape == (3, 30)
    assert (model.predict(x[::3]) == model.labels_[::3]).all()
    shifted = method(3, affine=True, random_state=0, **options).fit(x + 100)
    assert adjusted_rand_score(labels, shifted.labels_) == 1


@pytest.mark.parametrize("method", ALL)
def test_scale_and_order_of_rows_do_not_matter(method):
    x, labels, _ = union_of_subspaces(noise=0.02)
    random = np.random.default_rng(1)
    order = random.permutation(len(x))
    scaled = x[order] * random.uniform(0.1, 10, size=(len(x), 1)) * random.choice([-1, 1], size=(len(x), 1))
    found = method(3, random_state=0).fit_predict(scaled)
    assert adjusted_rand_score(labels[order], found) == 1


def test_float32_stays_and_halves_are_widened():
    x, labels, _ = union_of_subspaces(noise=0.02)
    model = OMPSubspaceClustering(3, n_nonzero=4, random_state=0).fit(x.astype(np.float32))
    assert model.subspaces_[0].basis.dtype == torch.float32 if isinstance(model.subspaces_, list) else True
    assert adjusted_rand_score(labels, model.labels_) == 1
    half = OMPSubspaceClustering(3, n_nonzero=4, random_state=0).fit(torch.from_numpy(x).to(torch.bfloat16))
    assert adjusted_rand_score(labels, half.labels_.numpy()) > 0.9


def test_retaining_the_largest_and_the_neighbour_graph():
    x, _, _ = union_of_subspaces(noise=0.1)
    everything = LeastSquaresRepresentation(3, retain=None, random_state=0).fit(x)
    assert isinstance(everything.representation_, np.ndarray)
    few = LeastSquaresRepresentation(3, retain=5, affinity="knn", random_state=0).fit(x)
    assert few.affinity_.nnz <= 2 * 3 * len(x)
    assert (np.asarray(few.affinity_.sum(1)).ravel() >= 1.5).all()


@pytest.mark.parametrize("affine", [False, True])
def test_penalties_mean_the_same_for_any_number_of_rows(affine):
    x, _, _ = union_of_subspaces(noise=0.1, affine=affine)
    for rows in (x[:20], x):
        one = LeastSquaresRepresentation(3, alpha=0.5, affine=affine, random_state=0).fit(rows)
        points = one._points(torch.from_numpy(rows))
        scale = len(rows) / min(points.shape)
        assert (scale > 1) == (len(rows) > 31)
        torch.testing.assert_close(torch.from_numpy(one.representation_), ridge_self_expression(points, 0.5 * scale))
        low = LowRankRepresentation(3, alpha=4, affine=affine, random_state=0).fit(rows)
        torch.testing.assert_close(torch.from_numpy(low.representation_), low_rank_self_expression(points, 4 / scale))


@pytest.mark.parametrize("model", [KSubspaces(3, 4, init="lsr", n_init=1), LowRankMixtureDiffusion(3, 4, init="lsr")])
def test_starts_by_least_squares_know_the_number_of_rows(model, monkeypatch):
    asked = []

    def watched(points, alpha):
        asked.append(alpha)
        return ridge_self_expression(points, alpha)

    monkeypatch.setattr(f"{type(model).__module__}.ridge_self_expression", watched)
    model.set_params(random_state=0).fit(union_of_subspaces(noise=0.1)[0])
    assert asked == [pytest.approx(RIDGE * 120 / 30)]


def test_corrupted_rows_go_into_the_noise():
    x, _, _ = union_of_subspaces()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[7] = np.random.default_rng(2).normal(size=30)
    model = LowRankRepresentation(3, alpha=0.5, noise="rows", random_state=0).fit(x)
    size = np.linalg.norm(model.noise_, axis=1)
    assert size.argmax() == 7
    assert size[7] > 5 * np.delete(size, 7).max()


def test_ksubspaces_descends_and_recovers():
    x, labels, _ = union_of_subspaces(noise=0.01, k=4, dim=3)
    model = KSubspaces(4, 3, random_state=0).fit(x)
    assert adjusted_rand_score(labels, model.labels_) == 1
    for init in ("random", "lsr", "neighbours"):
        noisy = KSubspaces(4, 3, init=init, n_init=2, random_state=1).fit(
            np.random.default_rng(3).normal(size=(200, 10))
        )
        history = np.array(noisy.history_)
        assert len(history) > 2
        assert (np.diff(history) <= 1e-9 * history[:-1]).all()
        rows = torch.from_numpy(np.random.default_rng(3).normal(size=(200, 10)))
        rows = rows / rows.norm(dim=1, keepdim=True)
        spaces = noisy.subspaces_
        own = spaces.basis[torch.from_numpy(noisy.labels_)]
        residual = rows - (own @ (own.mT @ rows.unsqueeze(2))).squeeze(2)
        assert noisy.inertia_ == pytest.approx(float(residual.square().sum()), rel=1e-9)
    starts = [KSubspaces(4, 3, n_init=n, max_iter=10, random_state=0).fit(rows.numpy()).inertia_ for n in (1, 4)]
    assert starts[1] <= starts[0]


def test_wide_rows_are_refitted_by_iteration_without_rising():
    x = np.random.default_rng(4).normal(size=(1300, 600)).astype(np.float32)
    history = np.array(KSubspaces(2, 3, init="random", n_init=1, max_iter=6, random_state=0).fit(x).history_)
    assert (np.diff(history) <= 1e-5 * history[:-1]).all()


def test_empty_clusters_are_started_again():
    x = np.vstack([np.outer(np.arange(1, 21), [1.0, 0, 0]), [[0, 1, 0], [0, 0, 1]]])
    labels = KSubspaces(3, 1, init="random", random_state=0).fit(x).labels_
    assert len(set(labels)) == 3


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (OMPSubspaceClustering(2), np.vstack([np.zeros((2, 4)), np.eye(4)]), r"2 rows are zero .*rows 0, 1"),
        (OMPSubspaceClustering(9), np.eye(4), "9 clusters asked for of n_samples = 4"),
        (OMPSubspaceClustering(0), np.eye(4), "n_clusters: expected an integer >= 1"),
        (OMPSubspaceClustering(2, rounding="no"), np.eye(4), "rounding"),
        (OMPSubspaceClustering(2, affinity="no"), np.eye(4), "affinity"),
        (OMPSubspaceClustering(2, retain=0), np.eye(4), "retain"),
        (OMPSubspaceClustering(2), np.full((4, 4), np.nan), "NaN"),
        (LeastSquaresRepresentation(2, alpha=0), np.eye(4), "alpha: must be > 0"),
        (LowRankRepresentation(2, noise="no"), np.eye(4), "noise"),
        (ElasticNetSubspaceClustering(2, gamma=0), np.eye(4), "gamma"),
        (OMPSubspaceClustering(2, affine=True), np.ones((4, 4)), "all rows are the same"),
        (KSubspaces(2, 4), np.eye(4), "fill a space of n_features = 4"),
        (KSubspaces(2, 1, init="no"), np.eye(4), "init"),
        (KSubspaces(2, 0), np.eye(4), "rank"),
    ],
)
def test_bad_input(model, x, message):
    with pytest.raises(ValueError, match=message):
        model.fit(x)


def test_too_many_rows_for_dense_methods():
    with pytest.raises(ValueError, match="use OMP, elastic net, thresholding or K-subspaces"):
        LeastSquaresRepresentation(2).fit(np.ones((20_001, 2), np.float32) + np.arange(20_001)[:, None])


def test_copies_are_said():
    x, _, _ = union_of_subspaces()
    with pytest.warns(UserWarning, match="3 rows repeat others"):
        ThresholdingSubspaceClustering(3, random_state=0).fit(np.vstack([x, x[:3]]))
