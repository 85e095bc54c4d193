"""Leverage: identities, invariances, planted pools, streams, selection rules and the door."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from subspan.geometry import Subspace
from subspan.select import LeverageSelector, inclusion_probabilities, rank_rows, select_rows
from subspan.statistics import Moments


def dense_scores(x, ratio=0.9, *, center=True, standardize=False, row_norm=False):
    """The published formula on the whole matrix: SVD, energy rule, squared row norms of U_k."""
    x = np.asarray(x, dtype=np.float64)
    mean, deviation = x.mean(0), x.std(0)
    if center:
        x = x - mean
    if standardize:
        x = x / np.where(deviation == 0, 1, deviation)
    if row_norm:
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.where(norm == 0, 1, norm)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    k = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), ratio)) + 1
    return (u[:, :k] ** 2).sum(1), k


@pytest.fixture
def pool():
    random = np.random.default_rng(0)
    spread = np.geomspace(5, 0.1, 30)
    return random.normal(size=(400, 30)) * spread @ np.linalg.qr(random.normal(size=(30, 30)))[0] + 3.0


OPTIONS = [
    {},
    {"center": False},
    {"standardize": True},
    {"row_norm": True},
    {"standardize": True, "row_norm": True},
    {"center": False, "standardize": True, "row_norm": True},
    {"center": False, "row_norm": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch_size", [37, 400])
def test_equals_the_dense_decomposition(pool, options, batch_size):
    expected, k = dense_scores(pool, **options)
    selector = LeverageSelector(batch_size=batch_size, **options).fit(pool)
    assert selector.k_ == k
    assert np.abs(selector.scores_ - expected).max() < 1e-9
    assert (selector.ranking_ == np.argsort(-expected, kind="stable")).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_dense_decomposition_with_fewer_rows_than_columns(options):
    x = np.random.default_rng(1).normal(size=(12, 40)) + 2
    expected, k = dense_scores(x, **options)
    selector = LeverageSelector(**options).fit(x)
    assert selector.k_ == k
    assert np.abs(selector.scores_ - expected).max() < 1e-9


def test_scores_sum_to_k_and_lie_in_the_unit_interval(pool):
    selector = LeverageSelector().fit(pool)
    assert selector.scores_.sum() == pytest.approx(selector.k_, abs=1e-9)
    assert selector.scores_.min() >= 0
    assert selector.scores_.max() <= 1


def test_scores_are_the_diagonal_of_the_hat_matrix_and_mahalanobis_over_degrees(pool):
    selector = LeverageSelector().fit(pool)
    subspace = selector.subspace_
    centred = torch.as_tensor(pool) - subspace.center
    projected = centred @ subspace.basis @ subspace.basis.mT
    hat = (projected @ torch.linalg.pinv(projected, rtol=1e-8)).diagonal()
    assert np.abs(selector.scores_ - hat.numpy()).max() < 1e-12
    distance = subspace.mahalanobis(torch.as_tensor(pool)) / (len(pool) - 1)
    assert np.abs(selector.scores_ - distance.numpy()).max() < 1e-15


def test_invariances(pool):
    random = np.random.default_rng(2)
    rotation = np.linalg.qr(random.normal(size=(30, 30)))[0]
    reference = LeverageSelector().fit(pool).scores_
    for changed in (pool @ rotation, 1e4 * pool, pool + 50 * random.normal(size=30), np.hstack([pool, pool])):
        assert np.abs(LeverageSelector().fit(changed).scores_ - reference).max() < 1e-9
    full = LeverageSelector(rank=30).fit(pool).scores_
    general = random.normal(size=(30, 30)) + 2 * np.eye(30)
    assert np.abs(LeverageSelector(rank=30).fit(pool @ general).scores_ - full).max() < 1e-7


def test_copies_of_a_row_share_its_leverage():
    random = np.random.default_rng(3)
    x = random.normal(size=(60, 6))
    weights = np.r_[np.ones(59), 4.0]
    repeated = np.vstack([x, x[-1:], x[-1:], x[-1:]])
    scores = LeverageSelector(rank=6).fit(repeated).scores_
    assert np.ptp(scores[-4:]) < 1e-12
    # The same pool as weighted moments: leverage of the whole group is the weight times that of one copy.
    moments = Moments(6).update(x, weights)
    group = 4 * float(moments.subspace(6).leverage(torch.as_tensor(x[-1:]))[0])
    assert scores[-4:].sum() == pytest.approx(group, rel=1e-9)


def test_planted_directions_come_first_with_their_analytic_leverage():
    # n - r rows along one axis, r rows each along an axis of its own.
    random = np.random.default_rng(4)
    n, r, d = 500, 5, 12
    x = np.zeros((n, d))
    x[: n - r, 0] = random.normal(size=n - r) * 0.5
    x[np.arange(n - r, n), np.arange(1, r + 1)] = 40.0
    shuffled = random.permutation(n)
    selector = LeverageSelector(r, rank=0.9, center=False).fit(x[shuffled])
    assert selector.k_ == r
    assert set(shuffled[selector.indices_]) == set(range(n - r, n))
    assert np.abs(selector.scores_[selector.indices_] - 1).max() < 1e-12  # alone on its axis
    # Centred, the planted rows' block is a^2 (I - 11'/n): its eigenvectors are the axes' differences and their mean.
    centred = LeverageSelector(r, rank=r + 1).fit(x[shuffled])
    assert set(shuffled[centred.indices_]) == set(range(n - r, n))
    assert centred.scores_.sum() == pytest.approx(r + 1)


def test_energy_rule_at_an_exact_tie():
    # Energies 9 : 1, so that exactly nine tenths lie in the first direction, which is therefore enough.
    x = np.zeros((5, 3))
    x[:2, 0], x[2:4, 1] = [3.0, -3.0], [1.0, -1.0]
    assert LeverageSelector(1, rank=0.9).fit(x).k_ == dense_scores(x)[1] == 1
    assert LeverageSelector(1, rank=0.9000001).fit(x).k_ == 2


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(3, 40),
    d=st.integers(1, 12),
    ratio=st.floats(0.05, 0.95),
    batch_size=st.integers(1, 50),
)
def test_any_pool_and_batch_size(seed, n, d, ratio, batch_size):
    x = np.random.default_rng(seed).normal(size=(n, d))
    expected, k = dense_scores(x, ratio)
    selector = LeverageSelector(rank=ratio, batch_size=batch_size).fit(x)
    assert selector.k_ == k
    assert np.abs(selector.scores_ - expected).max() < 1e-9


def test_rank_beyond_the_data_counts_only_directions_with_variance():
    random = np.random.default_rng(5)
    x = random.normal(size=(50, 3)) @ random.normal(size=(3, 20))
    selector = LeverageSelector(rank=1.0).fit(x)
    assert selector.k_ == 3
    assert selector.scores_.sum() == pytest.approx(3, abs=1e-9)


def test_without_centring_a_large_mean_takes_the_rank_to_one(pool):
    assert LeverageSelector(center=False).fit(pool + 100).k_ == 1
    assert LeverageSelector().fit(pool + 100).k_ > 5


# ---------------------------------------------------------------------- streams


def test_streams_give_the_scores_of_the_array(pool, tmp_path):
    reference = LeverageSelector().fit(pool).scores_
    np.save(tmp_path / "pool.npy", pool)
    parts = [pool[:100], pool[100:101], pool[101:]]
    sources = {
        "memory map": np.load(tmp_path / "pool.npy", mmap_mode="r"),
        "path": tmp_path / "pool.npy",
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.as_tensor(pool)), batch_size=64),
        "iterable": _Again(parts),
    }
    for name, source in sources.items():
        selector = LeverageSelector(batch_size=77).fit(source)
        assert np.abs(selector.scores_ - reference).max() < 1e-9, name
        assert selector.n_features_in_ == 30


def test_a_dask_array_gives_the_scores_of_the_array(pool):
    arrays = pytest.importorskip("dask.array", reason="Dask is not installed")
    source = arrays.from_array(pool.astype(np.float32), chunks=(90, 20))
    reference = LeverageSelector().fit(pool.astype(np.float32))
    selector = LeverageSelector().fit(source)
    assert np.abs(selector.scores_ - reference.scores_).max() < 1e-9
    assert np.abs(selector.score_samples(source) - reference.scores_).max() < 1e-9
    with pytest.raises(ValueError, match="by position"):
        selector.fit_resample(source)


class _Again:
    """An iterable that can be read again."""

    def __init__(self, parts):
        self.parts = parts

    def __iter__(self):
        return iter(self.parts)


def test_partial_fit_in_any_order_then_score(pool):
    reference = LeverageSelector().fit(pool)
    selector = LeverageSelector()
    for part in np.array_split(np.random.default_rng(6).permutation(pool), 7):
        selector.partial_fit(part)
    assert np.abs(selector.score_samples(pool) - reference.scores_).max() < 1e-9
    assert selector.k_ == reference.k_
    with pytest.raises(ValueError, match="second pass"):
        LeverageSelector(row_norm=True).partial_fit(pool)


@pytest.mark.parametrize("n", [100, 6])
@pytest.mark.parametrize("options", [{}, {"standardize": True}, {"row_norm": True, "center": False}])
def test_partial_fit_goes_on_where_fit_ended(pool, options, n):
    selector = LeverageSelector(0.2, rank=4, **options).fit(pool[:n])
    selector.partial_fit(pool[n:])
    whole = LeverageSelector(0.2, rank=4, **options).fit(pool)
    assert selector.subspace_.count == len(pool)
    assert np.allclose(selector.score_samples(pool), whole.scores_, rtol=1e-6)
    # What was chosen among the first rows alone is no choice among all.
    assert not [name for name in ("scores_", "ranking_", "indices_", "weights_") if hasattr(selector, name)]


def test_work_grows_with_the_rows_and_each_is_read_twice():
    class Rows:
        def __init__(self, batches):
            self.batches, self.served = batches, 0

        def __iter__(self):
            for seed in range(self.batches):
                self.served += 500
                yield torch.randn(500, 32, generator=torch.Generator().manual_seed(seed))

    flops = []
    for batches in (4, 16):
        rows = Rows(batches)
        with FlopCounterMode(display=False) as counted:
            LeverageSelector().fit(rows)
        # Twice, and the first batch once more to see what it is.
        assert rows.served <= 2 * 500 * batches + 500
        flops.append(counted.get_total_flops())
    assert flops[1] / flops[0] == pytest.approx(4, rel=0.15)


def test_a_generator_is_refused_with_advice(pool):
    with pytest.raises(ValueError, match=r"one-shot.*partial_fit"):
        LeverageSelector().fit(part for part in (pool[:200], pool[200:]))


def test_tensors_in_and_out(pool):
    x = torch.as_tensor(pool, dtype=torch.float32)
    selector = LeverageSelector().fit(x)
    assert isinstance(selector.scores_, torch.Tensor)
    assert torch.is_tensor(selector.fit_resample(x))
    reference = LeverageSelector().fit(x.numpy())
    assert isinstance(reference.scores_, np.ndarray)
    assert np.allclose(selector.scores_.numpy(), reference.scores_, atol=1e-12)


def test_half_precision_rows(pool):
    half = pool.astype(np.float16)
    expected, k = dense_scores(half)
    selector = LeverageSelector().fit(half)
    assert selector.k_ == k
    assert np.abs(selector.scores_ - expected).max() < 1e-6


def test_a_mean_large_against_the_spread_keeps_the_ranking(pool):
    shifted = (pool + 1e4).astype(np.float32)
    expected, k = dense_scores(shifted)
    selector = LeverageSelector().fit(shifted)
    assert selector.k_ == k
    assert np.abs(selector.scores_ / expected - 1).max() < 1e-4


# ---------------------------------------------------------------------- selection


def test_fit_resample_keeps_pool_order_and_labels(pool):
    labels = np.arange(400)
    x, y = LeverageSelector(40).fit_resample(pool, labels)
    selector = LeverageSelector(40).fit(pool)
    assert (y == selector.indices_).all()
    assert (np.diff(y) > 0).all()
    assert (x == pool[y]).all()
    assert set(selector.ranking_[:40]) == set(y)
    assert (selector.weights_ == 1).all()
    assert len(LeverageSelector().fit_resample(pool)) == 64  # 16 % of 400


def test_fit_resample_keeps_data_frames():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(np.random.default_rng(7).normal(size=(30, 4)), columns=list("abcd"))
    chosen, y = LeverageSelector(5).fit_resample(frame, frame["a"])
    assert list(chosen.columns) == list("abcd")
    assert list(chosen.index) == list(y.index)


def test_ties_keep_pool_order():
    assert rank_rows([0.5, 1.0, 0.5, 1.0 + 1e-15, np.nan, 2.0]).tolist() == [5, 1, 3, 0, 2, 4]
    x = np.tile(np.random.default_rng(8).normal(size=(5, 3)), (20, 1))
    indices = [LeverageSelector(30, batch_size=size).fit(x).indices_ for size in (1, 7, 100)]
    assert all((found == indices[0]).all() for found in indices)


def test_sampling_is_unbiased_for_sums_over_the_pool(pool):
    centred = pool - pool.mean(0)
    scores = LeverageSelector().fit(pool).scores_
    target = centred.T @ centred
    total = np.zeros_like(target)
    hits = np.zeros(len(pool))
    draws = 1000
    for seed in range(draws):
        indices, weights = select_rows(scores, 60, strategy="sample", random_state=seed)
        assert len(set(indices.tolist())) == 60
        hits[indices] += 1
        total += (centred[indices] * weights[:, None]).T @ centred[indices]
    probability = inclusion_probabilities(scores, 60)
    assert probability.sum() == pytest.approx(60)
    deviation = (hits / draws - probability) / np.sqrt(probability * (1 - probability) / draws + 1e-12)
    assert np.abs(deviation).max() < 5
    assert np.linalg.norm(total / draws - target) < 0.04 * np.linalg.norm(target)


def test_inclusion_probabilities_cap_at_one_and_fill_up():
    p = inclusion_probabilities(np.array([10.0, 1.0, 1.0, 1.0, 1.0]), 3)
    assert p.tolist() == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert inclusion_probabilities(np.array([1.0, 0.0, 0.0]), 2).tolist() == [1.0, 0.5, 0.5]
    indices, weights = select_rows(np.array([1.0, 0.0, 0.0, 0.0, np.nan]), 3, strategy="sample", random_state=0)
    assert 0 in indices
    assert 4 not in indices
    assert sorted(weights.tolist()) == [1.0, 1.5, 1.5]


def test_the_same_seed_draws_the_same_rows(pool):
    a, b, c = (
        LeverageSelector(50, strategy="sample", random_state=seed).fit(pool).indices_.tolist() for seed in (0, 0, 1)
    )
    assert a == b != c


# ---------------------------------------------------------------------- the door


BAD = {
    "one row": (np.ones((1, 3)), {}, "1 sample"),
    "NaN": (np.array([[1.0, 2], [np.nan, 1], [0, 1]]), {}, "first is row 1"),
    "infinity in a tensor": (torch.tensor([[1.0, 2], [3, torch.inf]]), {}, "first is row 1"),
    "constant rows": (np.ones((5, 3)), {}, "variance is zero"),
    "more rows than the pool": (np.eye(5), {"n_select": 6}, r"\[1, 5\]"),
    "no rows": (np.eye(5), {"n_select": 0}, r"\[1, 5\]"),
    "fraction above one": (np.eye(5), {"n_select": 1.5}, r"\(0, 1\]"),
    "unknown strategy": (np.eye(5), {"strategy": "best"}, "'top' or 'sample'"),
    "batch size": (np.eye(5), {"batch_size": 0}, "batch_size"),
    "rank out of range": (np.eye(5), {"rank": 1.5}, "rank"),
    "vector": (np.arange(5.0), {}, "2D array"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case):
    x, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        LeverageSelector(**options).fit(x)


def test_scoring_rows_of_another_width_or_with_nan(pool):
    selector = LeverageSelector().fit(pool)
    with pytest.raises(ValueError, match="29 features"):
        selector.score_samples(_Again([pool[:, 1:]]))
    broken = pool.copy()
    broken[123, 4] = np.inf
    with pytest.raises(ValueError, match="row 123 contains NaN or infinity"):
        LeverageSelector().fit(_Again(np.array_split(broken, 9)))
    with pytest.raises(ValueError, match="n_select"):
        LeverageSelector(True).fit(pool)


def test_the_subspace_can_be_used_elsewhere(pool):
    subspace = LeverageSelector().fit(pool).subspace_
    direct = Subspace.fit(torch.as_tensor(pool), rank=0.9)
    assert float(subspace.distance(direct)) < 1e-6
    assert subspace.count == 400
