"""Funnel search and cascades against brute force."""

import numpy as np
import pytest
import torch

from subspan.geometry import prefix_similarities, prefix_squared_norms, smallest_sufficient
from subspan.measures import prefix_retrieval_scores, retrieval_scores
from subspan.nn import MatryoshkaLinear
from subspan.represent import MatryoshkaCascade, MatryoshkaIndex
from subspan.solvers import nearest


def rows(n, d=16, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@pytest.mark.parametrize("metric", ["cosine", "inner", "euclidean"])
def test_running_sums_are_the_similarities_of_each_prefix(metric):
    q, b = rows(5), rows(7, seed=1)
    q[0, :3] = 0
    for m, found in prefix_similarities(q, b, (12, 3, 5), metric=metric):
        x, y = (torch.from_numpy(part[:, :m]).double() for part in (q, b))
        if metric == "cosine":
            x, y = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)
        direct = -torch.cdist(x, y).square() if metric == "euclidean" else x @ y.mT
        torch.testing.assert_close(found.double(), direct, rtol=0, atol=2e-5)
    squares = prefix_squared_norms(torch.from_numpy(q).half(), (2, 16))
    assert squares.dtype == torch.float32
    torch.testing.assert_close(squares[:, 1], torch.from_numpy(q).square().sum(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_scores_of_all_sizes_are_those_of_each(exclude_self):
    x, labels = rows(40), np.arange(40) % 4
    found = prefix_retrieval_scores(x, x, labels, labels, (2, 5, 16), exclude_self=exclude_self, k=10)
    for m, scores in found.items():
        alone = retrieval_scores(x[:, :m], x[:, :m], labels, labels, exclude_self=exclude_self, k=10)
        assert torch.equal(scores.first_hit, alone.first_hit)
        torch.testing.assert_close(scores.average_precision, alone.average_precision)


def test_the_smallest_sufficient_size_stays_sufficient():
    assert smallest_sufficient([8, 16, 32], [0.5, 0.795, 0.8]) == 16
    assert smallest_sufficient([8, 16, 32], [0.8, 0.5, 0.8]) == 32
    assert smallest_sufficient([32, 8, 16], [0.8, 0.5, 0.795]) == 16


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_lists_as_long_as_the_database_are_exact_search(metric):
    base, queries = rows(60), rows(9, seed=1)
    index = MatryoshkaIndex(schedule=[(2, 60), (5, 60), (16, 60)], metric=metric).fit(base)
    distance, found = index.kneighbors(queries, 7)
    values, truth = nearest(queries, base, 7, metric=metric)
    assert np.array_equal(found, truth.numpy())
    expected = (1 - values) if metric == "cosine" else values.sqrt()
    np.testing.assert_allclose(distance, expected.numpy(), atol=2e-3 if metric == "euclidean" else 1e-5)


def test_one_stage_is_brute_force_and_rerank_permutes_the_shortlist():
    base, queries = rows(60), rows(9, seed=1)
    one = MatryoshkaIndex(schedule=[(4, 12)]).fit(base)
    shortlist = one.kneighbors(queries, 12)[1]
    assert np.array_equal(shortlist, nearest(queries[:, :4], base[:, :4], 12, metric="cosine")[1].numpy())
    two = MatryoshkaIndex(schedule=[(4, 12), (16, 12)]).fit(base).kneighbors(queries, 12)[1]
    for a, b in zip(shortlist, two):
        assert set(a) == set(b)
    assert not np.array_equal(shortlist, two)


def loop(base, query, stages):
    """The funnel, literally: normalise each prefix, rank the list, keep its head."""
    kept = np.arange(len(base))
    for size, length in stages:
        x, q = base[kept, :size], query[:size]
        cosine = x @ q / np.linalg.norm(x, axis=1) / np.linalg.norm(q)
        kept = kept[np.argsort(-cosine, kind="stable")[:length]]
    return kept


def test_the_funnel_is_the_literal_loop_and_its_cost_is_counted():
    base, queries = rows(300, 32), rows(6, 32, seed=1)
    index = MatryoshkaIndex(dims=(32, 4, 8, 16), shortlist=40).fit(base)
    assert index.schedule_ == [(4, 40), (8, 20), (16, 10), (32, 5)]
    found = index.kneighbors(queries, 5)[1]
    for query, row in zip(queries, found):
        assert row.tolist() == loop(base, query, [(4, 40), (8, 20), (16, 10), (32, 5)]).tolist()
    assert index.cost_per_query_ == 4 * 300 + 4 * 40 + 8 * 20 + 16 * 10
    assert index.exact_cost_ == 32 * 300
    two = MatryoshkaIndex(dims=(4, 8, 32), shortlist=40, schedule="two-step").fit(base)
    assert [size for size, _ in two.schedule_] == [4, 32]
    tensors = index.kneighbors(torch.from_numpy(queries), 5)
    assert torch.equal(tensors[1], torch.from_numpy(found))


def test_files_and_memory_maps(tmp_path):
    base, queries = rows(100), rows(4, seed=1)
    np.save(tmp_path / "base.npy", base)
    mapped = np.load(tmp_path / "base.npy", mmap_mode="r", allow_pickle=False)
    index = MatryoshkaIndex(dims=(4, 16), shortlist=20).fit(mapped)
    expected = MatryoshkaIndex(dims=(4, 16), shortlist=20).fit(base).kneighbors(queries, 5)[1]
    assert np.array_equal(index.kneighbors(queries, 5)[1], expected)
    index.save(tmp_path / "index.safetensors")
    assert np.array_equal(MatryoshkaIndex.load(tmp_path / "index.safetensors").kneighbors(queries, 5)[1], expected)


@pytest.mark.parametrize("factory", ["Flat", "HNSW32"])
def test_a_faiss_shortlist_finds_the_same(factory):
    pytest.importorskip("faiss")
    base, queries = rows(200), rows(5, seed=1)
    exact = MatryoshkaIndex(dims=(8, 16), shortlist=50).fit(base)
    other = MatryoshkaIndex(dims=(8, 16), shortlist=50, backend="faiss", factory=factory).fit(base)
    found = other.kneighbors(queries, 5)[1]
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found, exact.kneighbors(queries, 5)[1])]) > 0.95
    assert 0 < other.cost_per_query_ <= exact.cost_per_query_ * (1 if factory == "Flat" else 3)


def test_zero_prefixes_and_half_precision():
    base = rows(50)
    base[3, :4] = 0
    found = MatryoshkaIndex(dims=(4, 16), shortlist=50).fit(base.astype(np.float16)).kneighbors(base[:5], 1)[1]
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4]
    one = MatryoshkaIndex(dims=(1, 16), shortlist=50).fit(base).kneighbors(base[:5], 1)[1]
    assert one[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "k", "message"),
    [
        ({"dims": (4, 17)}, 1, "dims"),
        ({"schedule": [(8, 10), (4, 5)]}, 1, "schedule"),
        ({"schedule": [(4, 5), (8, 10)]}, 1, "schedule"),
        ({"schedule": "wide"}, 1, "schedule"),
        ({"schedule": [(4, 20), (8, 5)]}, 6, "shorter than k"),
        ({"shortlist": 5}, 6, "shorter than k"),
        ({"metric": "dot"}, 1, "metric"),
        ({"backend": "gpu"}, 1, "backend"),
        ({"shortlist": 20}, 0, "k: must"),
        ({"shortlist": 0}, 1, "shortlist: expected"),
        ({"shortlist": True}, 1, "shortlist: expected"),
    ],
)
def test_bad_search_input_is_named(options, k, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaIndex(**options).fit(rows(30)).kneighbors(rows(2), k)


def test_a_short_database_is_warned_of_and_nan_refused():
    with pytest.warns(UserWarning, match="cut to it"):
        index = MatryoshkaIndex(dims=(4, 16), shortlist=200).fit(rows(30))
    assert index.schedule_[0] == (4, 30)
    with pytest.raises(ValueError, match="NaN"):
        MatryoshkaIndex(shortlist=5).fit(np.full((9, 16), np.nan))


# ---------------------------------------------------------------------- cascades


DIMS = (2, 4, 8)


@pytest.fixture(scope="module")
def logits():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (300,), generator=generator)
    layers = torch.randn(3, 300, 5, generator=generator)
    for level, strength in enumerate((1.0, 2.0, 3.0)):
        layers[level, torch.arange(300), labels] += strength
    return layers, labels


def test_thresholds_are_those_of_a_grid_search(logits):
    layers, labels = logits
    grid = np.linspace(0.1, 1, 100)
    model = MatryoshkaCascade(DIMS).fit(layers, labels)
    for level in range(2):
        confidence = layers[level].softmax(-1).amax(-1).double().numpy()
        right = [(layers[level + i].argmax(-1) == labels).numpy() for i in (0, 1)]
        scores = [np.mean(np.where(confidence > t, right[0], right[1])) for t in grid]
        assert model.thresholds_[level] == grid[int(np.argmax(scores))]


def test_extreme_thresholds_are_single_heads(logits):
    layers, labels = logits
    model = MatryoshkaCascade(DIMS).fit(layers, labels)
    model.thresholds_ = np.zeros(2)
    assert torch.equal(model.predict(layers), layers[0].argmax(-1))
    assert (model.expected_dim_, model.expected_total_dim_) == (2, 2)
    model.thresholds_ = np.full(2, 1.1)
    assert torch.equal(model.predict(layers), layers[2].argmax(-1))
    assert (model.expected_dim_, model.expected_total_dim_) == (8, 14)
    assert torch.equal(model.predict(layers, cap=4), layers[1].argmax(-1))
    assert model.expected_total_dim_ == 6


def test_expected_sizes_are_the_means_over_rows(logits):
    layers, labels = logits
    model = MatryoshkaCascade(DIMS).fit(layers, labels)
    route = model.route(layers)
    counts = {m: int((route == m).sum()) for m in DIMS}
    assert min(counts.values()) > 0
    assert model.expected_dim_ == pytest.approx(sum(m * n for m, n in counts.items()) / 300)
    total = sum(n * sum(k for k in DIMS if k <= m) for m, n in counts.items()) / 300
    assert model.expected_total_dim_ == pytest.approx(total)
    accuracy = float((model.predict(layers) == labels).double().mean())
    assert model.accuracy_ == pytest.approx(accuracy)


def test_lazy_classification_is_the_prediction_from_all_logits(logits, tmp_path):
    head = MatryoshkaLinear(DIMS, 5)
    generator = torch.Generator().manual_seed(1)
    for layer in head.heads:
        torch.nn.init.normal_(layer.weight, generator=generator)
        torch.nn.init.zeros_(layer.bias)
    x = torch.randn(50, 8, generator=generator)
    model = MatryoshkaCascade(DIMS).fit(*logits)
    model.thresholds_ = np.array([0.6, 0.8])
    layers = head(x).detach()
    assert len(model.route(layers).unique()) == 3
    assert torch.equal(model.classify(x, head), model.predict(layers))
    model.save(tmp_path / "cascade.safetensors")
    loaded = MatryoshkaCascade.load(tmp_path / "cascade.safetensors")
    assert torch.equal(loaded.predict(layers), model.predict(layers))
    assert isinstance(model.predict(list(layers.numpy())), np.ndarray)


def test_ties_take_the_smallest_threshold_and_one_class_is_warned_of():
    same = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(0)).expand(3, 20, 3)
    with pytest.warns(UserWarning, match="one class"):
        model = MatryoshkaCascade(DIMS).fit(same, torch.zeros(20, dtype=torch.int64))
    assert model.thresholds_.tolist() == [0.1, 0.1]


@pytest.mark.parametrize(
    ("layers", "y", "message"),
    [
        (torch.zeros(2, 4, 3), torch.zeros(4).long(), "layers"),
        (torch.zeros(3, 4, 3), torch.zeros(5).long(), "y: expected 4"),
        (torch.zeros(3, 4, 3), torch.full((4,), 3), "y: class numbers"),
        (torch.full((3, 4, 3), torch.nan), torch.zeros(4).long(), "NaN"),
    ],
)
def test_bad_cascade_input_is_named(layers, y, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaCascade(DIMS).fit(layers, y)
