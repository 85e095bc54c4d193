"""Identities of the coding-rate objective, planted manifolds, and labels that nothing looks at."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from subspan.cluster import ManifoldLinearizingClustering, ManifoldLinearizingModule, linearization
from subspan.geometry import coding_rate, compressed_coding_rate
from subspan.geometry.grassmann import random_basis
from subspan.nn.subspace_cluster_heads import ManifoldLinearizingLoss, SubspaceClusterHeads

EPSILON = math.sqrt(0.1)


def unit(n: int, d: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def test_memberships_of_every_kind_have_one_compressed_rate():
    z, n = unit(30, 5), 30
    labels = torch.arange(30) % 3
    hard = torch.nn.functional.one_hot(labels).double().mT
    literal = sum(
        float((labels == j).sum()) / n * float(coding_rate(z[labels == j], epsilon=EPSILON)) for j in range(3)
    )
    assert float(compressed_coding_rate(z, hard, epsilon=EPSILON)) == pytest.approx(literal, abs=1e-12)
    blocks = hard.mT @ hard / hard.sum(1, keepdim=True)[labels]
    assert float(compressed_coding_rate(z, blocks, epsilon=EPSILON)) == pytest.approx(literal, abs=1e-12)
    whole = float(coding_rate(z, epsilon=EPSILON))
    even = torch.full((n, n), 1 / n, dtype=torch.float64)
    assert float(compressed_coding_rate(z, even, epsilon=EPSILON)) == pytest.approx(whole, abs=1e-12)
    alone = compressed_coding_rate(z, torch.eye(n, dtype=torch.float64), epsilon=EPSILON)
    assert float(alone) == pytest.approx(0.5 * math.log(1 + 5 / 0.1), abs=1e-12)
    soft = torch.rand(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direct = 0.0
    for row in soft:
        gram = torch.eye(5, dtype=torch.float64) + 5 / (row.sum() * 0.1) * z.mT @ torch.diag(row) @ z
        direct += float(row.sum() / n * 0.5 * torch.linalg.slogdet(gram)[1])
    assert float(compressed_coding_rate(z, soft, epsilon=EPSILON)) == pytest.approx(direct, abs=1e-12)
    assert float(coding_rate(z, epsilon=EPSILON, weights=torch.zeros(n, dtype=torch.float64))) == 0


def test_the_reduction_ignores_rotations_and_is_largest_for_orthogonal_subspaces():
    labels = torch.arange(60) % 3
    hard = torch.nn.functional.one_hot(labels).double().mT

    def reduction(z):
        return float(coding_rate(z, epsilon=EPSILON) - compressed_coding_rate(z, hard, epsilon=EPSILON))

    inside = unit(60, 2)
    axes = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2).movedim(1, 0)
    orthogonal = torch.einsum("bd,bnd->bn", inside, axes[labels])
    turned = orthogonal @ random_basis(6, 6, generator=torch.Generator().manual_seed(0))
    assert reduction(turned) == pytest.approx(reduction(orthogonal), abs=1e-9)
    for seed in range(5):
        bases = random_basis(6, 2, batch=(3,), generator=torch.Generator().manual_seed(seed))
        assert reduction(torch.einsum("bd,bnd->bn", inside, bases[labels])) < reduction(orthogonal)


def test_derivatives_of_the_loss_are_right():
    loss = ManifoldLinearizingLoss(n_iter=200)
    z, c = unit(7, 3).requires_grad_(True), unit(7, 3, 1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b)[0], (z, c), atol=1e-5)
    whole, parts = loss(z, c)
    assert float(whole.detach()) == pytest.approx(float((parts["compression"] - parts["expansion"]).detach()))
    assert float(loss(z.detach().half(), c.detach().half())[0]) == pytest.approx(float(whole.detach()), abs=0.02)


def test_views_are_averaged_and_a_copied_head_makes_memberships_of_the_representation():
    torch.manual_seed(0)
    heads = SubspaceClusterHeads(6, 16, 4).eval()
    x = torch.randn(10, 6)
    heads.copy_feature_to_cluster()
    z, c = heads(x)
    assert torch.equal(z, c)
    loss = ManifoldLinearizingLoss()
    two = loss(torch.stack([z, z]), torch.stack([c, c]))[0]
    torch.testing.assert_close(two, loss(z, c)[0])
    plan = loss.membership(torch.stack([c, heads(x + 1)[1]])).mean(0)
    torch.testing.assert_close(plan.sum(-1), torch.ones(10), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_the_step_after_the_warmup_starts_memberships_from_the_representation():
    torch.manual_seed(0)
    heads = SubspaceClusterHeads(6, 16, 4)
    module = ManifoldLinearizingModule(heads, warmup=1)
    x = torch.randn(12, 6)
    loss = ManifoldLinearizingLoss()

    def apart() -> bool:
        return any(not torch.equal(a, b) for a, b in zip(heads.feature.parameters(), heads.cluster.parameters()))

    first, _ = module.training_loss(x, 0)
    torch.testing.assert_close(first, -coding_rate(heads(x)[0], epsilon=EPSILON))
    assert apart()
    second, _ = module.training_loss(x, 1)
    assert not apart()
    # The memberships of this very step are those of the copy.
    z = heads(x)[0]
    torch.testing.assert_close(second, loss(z, z)[0])
    with torch.no_grad():
        heads.cluster.weight.add_(1)
    torch.testing.assert_close(module.training_loss(x, 2)[0], loss(*heads(x))[0])
    assert apart()


def test_two_views_are_averaged_in_both_stages():
    torch.manual_seed(0)
    heads = SubspaceClusterHeads(6, 16, 4).eval()
    x = torch.randn(12, 6)
    shifts = [0.0, 0.5] * 3
    module = ManifoldLinearizingModule(
        heads, augment=lambda items: items + shifts.pop(), warmup=1, alignment=0.7
    ).eval()
    z, c = (torch.stack(part) for part in zip(heads(x + 0.5), heads(x)))
    mean = torch.nn.functional.normalize(z.mean(0), dim=-1)
    cosine = (z[0] * z[1]).sum(-1).mean()
    torch.testing.assert_close(module.training_loss(x, 0)[0], -coding_rate(mean, epsilon=EPSILON) - 0.7 * cosine)
    plan = ManifoldLinearizingLoss().membership(c).mean(0)
    reduction = coding_rate(mean, epsilon=EPSILON) - compressed_coding_rate(mean, plan, epsilon=EPSILON)
    torch.testing.assert_close(module.training_loss(x, 2)[0], -reduction)


def arcs(n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points of two curves in R^8 that no line through the origin tells apart."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    t = random.uniform(-1.2, 1.2, n)
    planes = np.linalg.qr(random.normal(size=(8, 4)))[0].reshape(8, 2, 2)
    curve = np.stack([np.cos(t), np.sin(t)], 1)
    x = np.einsum("bd,nbd->bn", curve, planes[:, labels]) + 0.02 * random.normal(size=(n, 8))
    return x, labels


@pytest.mark.filterwarnings("ignore")
def test_two_curves_become_two_subspaces_without_a_label():
    pytest.importorskip("lightning")
    x, truth = arcs()
    options = {"z_dim": 8, "hidden": 64, "epochs": 40, "warmup": 20, "batch_size": 60, "random_state": 0}
    model = ManifoldLinearizingClustering(2, **options).fit(x)
    assert adjusted_rand_score(truth, model.labels_) > 0.9
    assert adjusted_rand_score(truth, model.predict(x)) > 0.9
    assert adjusted_rand_score(arcs(seed=0)[1], model.predict(arcs(seed=0)[0])) > 0.9
    found = model.linearization_
    assert found["cosine within"] > 2 * found["cosine between"]
    assert found["rank of a cluster"] < found["rank"]
    again = ManifoldLinearizingClustering(2, **options).fit(x, np.random.default_rng(0).permutation(truth))
    np.testing.assert_array_equal(model.labels_, again.labels_)
    plan = model.membership(x)
    np.testing.assert_allclose(plan.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(model.transform(x), axis=1), 1, atol=1e-5)


def test_numbers_of_a_union_of_subspaces():
    z = torch.eye(4, dtype=torch.float64)[torch.arange(40) % 4]
    found = linearization(z, np.arange(40) % 2)
    assert (found["rank"], found["rank of a cluster"]) == (4, 2)
    assert found["cosine between"] == 0
    assert found["rate reduction"] == pytest.approx(found["coding rate"] - found["coding rate of clusters"])
    assert found["rate reduction"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 999}, "n_clusters"),
        ({"z_dim": 0}, "z_dim"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"eps2": 0.0}, "eps2"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ManifoldLinearizingClustering(**{"n_clusters": 2, **options}).fit(arcs()[0])
