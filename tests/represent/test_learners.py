"""Margin loss, an embedding that is split, the growth's policy and clusters that keep their numbers."""

import copy
import math

import numpy as np
import pytest
import torch

from subspan.geometry import Subspace
from subspan.nn import AttentionPool2d
from subspan.represent import (
    ClusterAssigner,
    GrowthController,
    MarginLoss,
    NearestNegativeSampler,
    SubspaceEmbedding,
    TaylorImportance,
    learner_separation,
)
from subspan.represent.learner_growth import matched


def unit(n, d):
    return torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1)


# ---------------------------------------------------------------------- margin loss


def test_the_margin_loss_is_a_double_loop():
    z, labels = unit(20, 3).requires_grad_(), torch.arange(20) % 4
    d = torch.cdist(z, z)
    terms = []
    for a in range(20):
        positives = [p for p in range(20) if labels[p] == labels[a] and p != a]
        far = sorted((d[a, n].item(), n) for n in range(20) if labels[n] != labels[a] and d[a, n] >= 0.5)
        terms += [(d[a, p] - 1.2 + 0.2).relu() for p in positives]
        terms += [(1.2 - d[a, n] + 0.2).relu() for _, n in far[: len(positives)]]
    terms = torch.stack(terms)
    wanted = terms.sum() / (terms > 0).sum()
    found = MarginLoss()(z, labels)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, z), torch.autograd.grad(wanted, z)):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_same_pairs_give_the_loss_of_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    z, labels = unit(60, 6), torch.arange(60) % 12
    positives, negatives = NearestNegativeSampler()(torch.cdist(z, z), labels)
    (anchors, near), (others, far) = positives.nonzero().T, negatives.nonzero().T
    assert anchors.equal(others)
    theirs = losses.MarginLoss(0.2, beta=1.2)(z, labels, (anchors, near, far))
    torch.testing.assert_close(MarginLoss(1.2, 0.2)(z, labels), theirs, atol=1e-6, rtol=1e-6, check_dtype=False)


def test_negatives_are_beyond_the_cutoff_and_no_more_than_positives():
    z, labels = unit(30, 2), torch.tensor([0] * 3 + [1] * 27)
    distances = torch.cdist(z, z)
    positives, negatives = NearestNegativeSampler(0.7)(distances, labels)
    assert positives[:3].sum(1).tolist() == [2, 2, 2]
    assert negatives[:3].sum(1).tolist() == [2, 2, 2]
    assert not (negatives & (labels[:, None] == labels)).any()
    assert bool((distances[negatives] >= 0.7).all())
    alone = torch.zeros(4, dtype=torch.int64)
    assert not NearestNegativeSampler()(torch.ones(4, 4), alone)[1].any()


def test_equal_rows_have_a_finite_gradient():
    z = torch.ones(4, 2, requires_grad=True)
    loss = MarginLoss(cutoff := 1.2, 0.2, NearestNegativeSampler(0.0))(z, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(cutoff + 0.2, abs=1e-3)
    assert z.grad.isfinite().all()


# ---------------------------------------------------------------------- the embedding


def test_distances_are_sums_of_the_learners_cosines():
    embedding = SubspaceEmbedding(6, 10, n_learners=3).double()
    assert embedding.blocks.sizes == {"0": 4, "1": 3, "2": 3}
    f = embedding(torch.randn(5, 6, dtype=torch.float64))
    parts = [embedding.slice(f, c) for c in range(3)]
    cosines = sum(2 - 2 * part @ part.mT for part in parts)
    torch.testing.assert_close(torch.cdist(f, f).square(), cosines, atol=1e-9, rtol=0)
    torch.testing.assert_close(embedding.slice(f, 2, 0), torch.cat([parts[2], parts[0]], 1))


def trained(embedding, steps=3):
    optimizer = torch.optim.Adam(embedding.parameters(), lr=0.01)
    x, labels = torch.randn(16, embedding.map.in_features), torch.arange(16) % 4
    for _ in range(steps):
        step(embedding, optimizer, x, labels)
    return optimizer, x, labels


def step(embedding, optimizer, x, labels):
    optimizer.zero_grad()
    MarginLoss()(torch.nn.functional.normalize(embedding(x)), labels).backward()
    optimizer.step()


def test_a_split_moves_neurons_with_their_moments():
    embedding = SubspaceEmbedding(7, 12, n_learners=2)
    optimizer, x, _ = trained(embedding)
    before = {name: value.clone() for name, value in embedding.state_dict().items()}
    moments = {name: value.clone() for name, value in optimizer.state[embedding.map.weight].items()}
    slices = embedding(x)
    keep = torch.tensor([4, 0, 3])
    embedding.split(1, keep, optimizer)
    assert embedding.blocks.sizes == {"0": 6, "1": 3, "2": 3}
    rows = 6 + keep
    torch.testing.assert_close(embedding.map.weight[6:9], before["map.weight"][rows])
    torch.testing.assert_close(embedding.map.weight[:6], before["map.weight"][:6])
    new, old = embedding.slice(embedding(x), 1), slices[:, rows]
    torch.testing.assert_close(new, torch.nn.functional.normalize(old))
    torch.testing.assert_close(embedding.slice(embedding(x), 0), slices[:, :6])
    others = before["map.weight"][[7, 8, 11]]
    assert bool((embedding.map.weight[9:, None] - others).abs().sum(-1).gt(1e-3).all())
    assert embedding.map.bias[9:].eq(0).all()
    for name in ("exp_avg", "exp_avg_sq"):
        found = optimizer.state[embedding.map.weight][name]
        assert moments[name][rows].abs().sum() > 0
        torch.testing.assert_close(found[6:9], moments[name][rows])
        assert found[9:].eq(0).all()
    assert float(optimizer.state[embedding.map.weight]["step"]) == float(moments["step"])


def test_a_step_after_a_split_is_that_of_a_module_made_in_the_new_order():
    embedding = SubspaceEmbedding(7, 12)
    optimizer, x, labels = trained(embedding)
    embedding.split(0, [9, 2, 5, 1], optimizer)
    again = SubspaceEmbedding(7, 12)  # of one learner: which coordinate is whose comes with the state
    again.load_state_dict(embedding.state_dict())
    assert again.n_learners == 2
    fresh = torch.optim.Adam(again.parameters(), lr=0.01)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(embedding, optimizer, x, labels)
    step(again, fresh, x, labels)
    torch.testing.assert_close(embedding.map.weight, again.map.weight)


def test_a_split_inside_puts_the_new_learner_behind():
    embedding = SubspaceEmbedding(5, 9, n_learners=2)
    embedding.split(0, [3, 1])
    assert embedding.learner.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("kept", [[0], [0, 1, 2, 3, 4], [0, 0, 1], [0, 6]])
def test_splits_that_make_no_sense_are_refused(kept):
    embedding = SubspaceEmbedding(5, 6)
    with pytest.raises(ValueError, match="kept: "):
        embedding.split(0, kept)
    with pytest.raises(ValueError, match="no block '3'"):
        embedding.split(3, [0, 1])


def test_what_learners_read_is_the_row_space():
    embedding = SubspaceEmbedding(8, 4, n_learners=2)
    with torch.no_grad():
        embedding.map.weight.zero_()
        embedding.map.weight[:2, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        embedding.map.weight[2:, 2:4] = torch.eye(2)
    first, second = embedding.learner_subspaces()
    assert isinstance(first, Subspace)
    axes = torch.eye(8, dtype=torch.float64)
    assert float(first.angles(Subspace(axes[:, :2])).max()) < 1e-6
    assert learner_separation([first, second]) == pytest.approx(90)
    assert learner_separation([first, first]) == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------- growth


def test_it_grows_once_for_a_new_best():
    policy = GrowthController(patience=3)
    times = []
    for epoch, value in enumerate([0.1, 0.5, 0.4, 0.4, 0.4, 0.4, 0.3, 0.6, 0.5, 0.5, 0.6, 0.6]):
        if policy.update(value):
            times.append(epoch)
            policy.grown()
    assert times == [4, 10]
    again = GrowthController(**policy.state_dict())
    assert [again.update(value) for value in (0.7, 0.6, 0.6, 0.6)] == [False, False, False, True]
    with pytest.raises(ValueError, match="value: must be finite"):
        policy.update(math.nan)


@pytest.mark.parametrize(
    ("importance", "options", "kept"),
    [
        ([9, -8, 7, 6, 5.5, 1, 1, 1, 1, 1, 0], {}, [0, 1, 2, 3, 4]),
        ([9, 8, 7, 6, 1, 1, 1, 1, 1, 1, 0], {}, None),  # four are too few
        ([9, 8, 7, 6, 5, 1, 1, 1, 1, 0], {}, None),  # ten neurons are not split
        ([1] * 12, {}, None),
        ([0] * 12, {}, None),
        ([8] * 11 + [0], {}, None),  # nothing would be left
        ([9, 1, 1, 1, 1, 2, 1, 1, 1, 1, 3, 0], {"top_share": 0.5}, [0, 10, 5, 1, 2, 3]),
        ([9, 8, 7, 6, 6, 1, 1, 1, 1, 1, 0], {"max_learners": 1}, None),
    ],
)
def test_important_neurons_stay(importance, options, kept):
    found = GrowthController(**options).kept_neurons(torch.tensor(importance, dtype=torch.float64))
    assert (None if found is None else found.tolist()) == kept


def test_importance_is_the_mean_of_activation_times_gradient():
    importance, weight = TaylorImportance(3), torch.tensor([1.0, 0.0, -2.0])
    seen = []
    for rows in (4, 2):
        x = torch.randn(rows, 3, requires_grad=True)
        importance.watch(x)
        (x * weight).sum().backward()
        seen.append(x.detach())
    torch.testing.assert_close(importance.mean, (torch.cat(seen) * weight).mean(0).double())


def test_clusters_keep_their_numbers():
    labels = np.random.default_rng(0).integers(4, size=200)
    other = np.array([2, 0, 3, 1])[labels]
    assert (matched(labels, other, 4) == labels).all()
    moved = other.copy()
    moved[:10] = 0
    assert (matched(labels, moved, 4) == labels)[10:].all()
    # One more cluster: the old ones keep their numbers, and the new one gets the new number.
    rows = np.repeat(np.eye(3), [30, 20, 10], axis=0) + 0.01 * np.random.default_rng(1).normal(size=(60, 3))
    assigner = ClusterAssigner(1, random_state=0)
    assert set(assigner.update(rows)) == {0}
    for k in (2, 3):
        before, assigner.k = assigner.labels, k
        after = assigner.update(rows)
        assert set(after) == set(range(k))
        assert (before == after).mean() >= 0.5
        assert (assigner.update(rows * 3) == after).all()
    with (
        pytest.warns(match="distinct"),
        pytest.raises(ValueError, match="3 clusters cannot be filled by 1"),
    ):
        ClusterAssigner(3, random_state=0).update(np.ones((9, 2)))
    with pytest.raises(ValueError, match="the same 60 rows"):
        assigner.update(rows[:50])


def test_attention_weighs_positions():
    pool, maps = AttentionPool2d(16, (2, 8)), torch.randn(3, 16, 5, 4)
    pooled, attention = pool(maps)
    torch.testing.assert_close(pooled, torch.einsum("bchw,bhw->bc", maps, attention) / 20)
    assert bool(((attention > 0) & (attention < 1)).all())
    assert [layer.out_channels for layer in pool.network if hasattr(layer, "out_channels")] == [8, 2, 1]
