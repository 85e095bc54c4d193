"""Baselines against brute force, and retention against its definition."""

import numpy as np
import pytest
import torch

from subspan.select import LeverageSelector, baselines, reconstruction_error, retention, retention_curve
from subspan.select.baselines import distinct_rows, herding, k_center, k_medoids, largest_rows, perplexity, random_rows


@pytest.fixture
def pool():
    return np.random.default_rng(0).normal(size=(120, 8)) * np.geomspace(4, 0.2, 8)


def test_random_and_largest_rows():
    assert (random_rows(50, 0.2, random_state=1) == random_rows(50, 0.2, random_state=1)).all()
    assert len(set(random_rows(50, 20, random_state=2).tolist())) == 20
    assert largest_rows([3, 9, 9, 1], 2).tolist() == [1, 2]


def test_k_center_is_the_greedy_farthest_point_order(pool):
    chosen = k_center(pool, 15, random_state=3)
    for i in range(1, 15):
        distance = ((pool[:, None] - pool[chosen[:i]]) ** 2).sum(-1).min(1)
        assert distance[chosen[i]] == pytest.approx(distance.max())
    covered = k_center(np.repeat(np.eye(3), 4, axis=0), 6, random_state=0)
    assert len(set(covered.tolist())) == 6
    assert set((covered[:3] // 4).tolist()) == {0, 1, 2}


def test_k_medoids_finds_one_row_in_each_cluster():
    random = np.random.default_rng(4)
    x = np.repeat(20 * np.eye(6), 30, axis=0) + random.normal(size=(180, 6))
    assert (k_medoids(x, 6, random_state=0) // 30).tolist() == list(range(6))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_k_medoids_of_equal_rows_takes_each_once():
    assert len(set(k_medoids(np.ones((9, 2)), 3, random_state=0).tolist())) == 3


def test_herding_takes_the_row_that_brings_the_mean_nearest(pool):
    chosen = herding(pool, 12)
    assert len(set(chosen.tolist())) == 12
    centred = pool - pool.mean(0)
    for i in range(12):
        left = [row for row in range(len(pool)) if row not in chosen[:i]]
        mean = (centred[chosen[:i]].sum(0) + centred[left]) / (i + 1)
        assert chosen[i] == left[int(np.linalg.norm(mean, axis=1).argmin())]


def test_perplexity_ignores_padding_on_either_side():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 50, (1, 9))
    alone = next(perplexity(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]))
    loss = model(input_ids=ids, labels=ids).loss
    assert float(alone) == pytest.approx(float(loss.detach().exp()), rel=1e-5)
    pads = torch.full((1, 4), 1)
    right = {"input_ids": torch.cat([ids, pads], 1), "attention_mask": torch.tensor([[1] * 9 + [0] * 4])}
    assert float(next(perplexity(model, [right]))) == pytest.approx(float(alone), rel=1e-5)
    with pytest.raises(ValueError, match="two tokens"):
        list(perplexity(model, [{"input_ids": ids[:, :1], "attention_mask": torch.ones(1, 1)}]))


# ---------------------------------------------------------------------- retention


def test_perplexity_leaves_every_mode_as_it_was():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.dropout = torch.nn.Embedding(9, 9), torch.nn.Dropout(0.5)
            self.frozen = torch.nn.Dropout(0.5).eval()

        def forward(self, input_ids, attention_mask, use_cache):
            assert not self.dropout.training
            return type("Output", (), {"logits": self.dropout(self.table(input_ids))})

    model = Model()
    batch = {"input_ids": torch.randint(9, (2, 5)), "attention_mask": torch.ones(2, 5)}
    for _ in perplexity(model, [batch]):
        assert model.training
    assert model.dropout.training
    assert not model.frozen.training


def test_retention_of_the_whole_pool_and_of_too_few_rows(pool):
    everything = np.arange(len(pool))
    assert retention(pool, everything, 4) == pytest.approx(1)
    explained = LeverageSelector(rank=4).fit(pool).subspace_.explained_ratio
    assert reconstruction_error(pool, everything, 4) == pytest.approx(1 - float(explained))
    assert reconstruction_error(pool, everything, None) < 1e-12
    few = [retention(pool, everything[:m], 4) for m in (1, 2, 8, 60)]
    assert few == sorted(few)
    assert few[0] < 0.9


def test_retention_follows_its_definition(pool):
    indices = np.array([3, 14, 15, 92, 65])
    centred = pool - pool.mean(0)
    v = np.linalg.svd(centred, full_matrices=False)[2][:3].T
    w = np.linalg.svd(centred[indices], full_matrices=False)[2][:3].T
    kept = np.linalg.norm(centred @ v @ v.T @ w) ** 2 / np.linalg.norm(centred @ v) ** 2
    assert retention(pool, indices, 3) == pytest.approx(kept)
    error = np.linalg.norm(centred - centred @ w @ w.T) ** 2 / np.linalg.norm(centred) ** 2
    assert reconstruction_error(pool, indices, 3) == pytest.approx(error)
    assert retention(torch.as_tensor(pool), torch.as_tensor(indices), 3) == pytest.approx(kept)
    assert reconstruction_error(pool, indices, None) < error


def test_rows_along_a_planted_axis_keep_only_it():
    x = np.zeros((40, 3))
    x[:20, 0] = np.tile([2.0, -2.0], 10)
    x[20:, 1] = np.tile([1.0, -1.0], 10)
    assert retention(x, np.arange(20), 2) == pytest.approx(0.8)
    assert retention(x, [0, 39], 2) == pytest.approx(1)


def test_the_curve_is_retention_at_each_size(pool):
    order = LeverageSelector().fit(pool).ranking_
    curve = retention_curve(pool, order, 3, sizes=[5, 40])
    assert curve.retention.tolist() == [retention(pool, order[:m], 3) for m in (5, 40)]
    assert curve.reconstruction_error.tolist() == [reconstruction_error(pool, order[:m], 3) for m in (5, 40)]
    assert retention_curve(pool, order).sizes[-1] == 120
    for bad, message in (([0.5, 1.0], "positions"), ([120], r"\[0, 119\]"), ([], "positions")):
        with pytest.raises(ValueError, match=message):
            retention(pool, bad, 3)
    with pytest.raises(ValueError, match="sizes"):
        retention_curve(pool, order, sizes=[0])


def test_rows_that_are_no_near_copies_stay():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(1200, 16)).astype(np.float32)
    copied = generator.permutation(1200)[:300]
    near = 3 * rows[copied] + 0.02 * generator.normal(size=(300, 16)).astype(np.float32)
    pool = np.concatenate([rows, near, np.zeros((2, 16), np.float32)])
    assert distinct_rows(pool).tolist() == [*range(1200), 1500, 1501]
    # In the other order the near copies come first, and stay.
    assert distinct_rows(np.concatenate([near, rows])).tolist() == sorted(
        [*range(300), *(300 + np.setdiff1d(np.arange(1200), copied))]
    )
    assert distinct_rows(np.repeat(rows[:3], 4, axis=0), 1.0).tolist() == [0, 4, 8]
    unit = torch.nn.functional.normalize(torch.from_numpy(pool[:1500]).double(), dim=1)
    kept = distinct_rows(torch.from_numpy(pool[:1500]), 0.5)
    cosines = unit[kept] @ unit[kept].mT
    assert float((cosines - torch.eye(len(kept))).max()) < 0.5
    left = np.setdiff1d(np.arange(1500), kept)
    assert float((unit[left] @ unit[kept].mT).amax(1).min()) >= 0.5 - 1e-6
    with pytest.raises(ValueError, match="cosine"):
        distinct_rows(rows, 1.5)


def test_medoids_of_many_rows_are_as_central_and_each_row_is_taken_once(monkeypatch):
    generator = np.random.default_rng(0)
    centres = 4 * generator.normal(size=(30, 8))
    rows = (centres[np.arange(900) % 30] + generator.normal(size=(900, 8))).astype(np.float32)

    def spread(chosen):
        return float(torch.cdist(torch.from_numpy(rows), torch.from_numpy(rows[chosen])).amin(1).mean())

    exact = k_medoids(rows, 30, random_state=0)
    monkeypatch.setattr(baselines, "_MOST_DISTANCES", 1)
    monkeypatch.setattr(baselines, "_BLOCK_DISTANCES", 2000)
    batched = k_medoids(rows, 30, random_state=0)
    assert len(np.unique(batched)) == len(np.unique(exact)) == 30
    assert (np.diff(batched) > 0).all()
    assert spread(batched) < 1.1 * spread(exact) < 0.7 * spread(random_rows(900, 30, random_state=0))
