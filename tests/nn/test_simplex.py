"""The fixed simplex: its geometry, its logits without a matrix, and the losses that hold models to it."""

import math

import numpy as np
import pytest
import torch

from subspan.measures import neural_collapse
from subspan.nn import CompatibleCE, HOCLoss, SimplexClassifier, active_subspace, simplex_logits, simplex_vertices
from subspan.statistics import GroupedMoments


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("count", [2, 3, 10, 1024])
def test_the_vertices_are_a_regular_simplex_about_the_origin(count):
    w = simplex_vertices(count)
    gram = (1 + 1 / (count - 1)) * torch.eye(count, dtype=torch.float64) - 1 / (count - 1)
    torch.testing.assert_close(w @ w.mT, gram, rtol=0, atol=1e-12)
    assert float(w.sum(0).abs().max()) < 1e-11
    if count <= 10:
        assert int(torch.linalg.matrix_rank(w)) == count - 1


def test_the_orientation_is_the_published_one():
    n = 4
    points = np.vstack([np.eye(n), np.full(n, (1 - math.sqrt(1 + n)) / n)])
    points = points - points.mean(0)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    np.testing.assert_allclose(simplex_vertices(n + 1).numpy(), points, atol=1e-14)


@pytest.mark.parametrize("count", [2, 3, 10, 1024])
def test_implicit_logits_are_the_product_with_the_vertices(count):
    z = draw(2, 5, count - 1, dtype=torch.float64)
    torch.testing.assert_close(simplex_logits(z), z @ simplex_vertices(count).mT, rtol=0, atol=1e-10)
    single = simplex_logits(z.float())
    torch.testing.assert_close(single, (z @ simplex_vertices(count).mT).float(), rtol=0, atol=2e-5)
    half = simplex_logits(z.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, (z.half().double() @ simplex_vertices(count).mT).float(), rtol=0, atol=2e-4)


def test_the_gradient_of_implicit_logits_is_that_of_the_dense_ones():
    z = draw(6, 15, dtype=torch.float64).requires_grad_()
    target = torch.arange(6)
    ours = torch.autograd.grad(torch.nn.functional.cross_entropy(simplex_logits(z), target), z)[0]
    dense = torch.autograd.grad(torch.nn.functional.cross_entropy(z @ simplex_vertices(16).mT, target), z)[0]
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-13)


def test_ten_thousand_classes_need_no_matrix():
    head = SimplexClassifier(10_000, preallocated=10_000)
    assert not list(head.parameters())
    assert not head.state_dict()
    z = draw(2, 9999)
    logits = head(z)
    vertices = simplex_vertices(10_000, dtype=torch.float32)[[0, 777, 9999]]
    torch.testing.assert_close(logits[:, [0, 777, 9999]], z @ vertices.mT, rtol=0, atol=1e-4)


def test_the_classifier_has_nothing_to_train_or_store_but_the_projection():
    head = SimplexClassifier(10, 8, preallocated=16)
    assert set(head.state_dict()) == {"projection.weight"}
    assert not head.weight.requires_grad
    g = draw(4, 8)
    torch.testing.assert_close(head(g), head.embed(g) @ head.weight.mT)
    wide = SimplexClassifier(4, 64, preallocated=16)
    assert wide.embed(draw(3, 64)).shape == (3, 15)
    unit = SimplexClassifier(10, preallocated=16, normalize=True, scale=5.0)
    z = draw(3, 15)
    torch.testing.assert_close(unit(7 * z), unit(z))
    torch.testing.assert_close(unit(z), 5 * (torch.nn.functional.normalize(z, dim=1) @ unit.weight.mT))
    assert torch.isfinite(unit(torch.zeros(1, 15))).all()


def test_front_and_back_share_the_table_until_it_is_full():
    front, back = (SimplexClassifier(12, preallocated=20, index=index) for index in ("front", "back"))
    labels = torch.arange(8)
    a, b = front.class_index(labels), back.class_index(labels)
    assert sorted(b.tolist()) == list(range(12, 20))
    assert not set(a.tolist()) & set(b.tolist())
    full = {*front.class_index(torch.arange(12)).tolist(), *back.class_index(torch.arange(12)).tolist()}
    assert full == set(range(20))
    assert len(back.class_index(torch.arange(12)).unique()) == 12
    front.extend(20)
    assert front.class_index(torch.tensor([19])).item() == 19


def loop(new, old, labels, mu, same_class):
    new, old = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (new, old))
    total = 0.0
    for i in range(len(new)):
        inside = 0.0
        for j in range(len(new)):
            if labels[j] != labels[i]:
                inside += math.exp(mu * float(old[i] @ new[j]))
            elif same_class == "constant":
                inside += math.exp(0)
        total += -mu * float(old[i] @ new[i]) + math.log(inside)
    return total / len(new)


@pytest.mark.parametrize("same_class", ["constant", "exclude"])
def test_hoc_is_the_double_loop(same_class):
    new, old = draw(7, 5, seed=1, dtype=torch.float64), draw(7, 5, seed=2, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 1, 3])
    loss = HOCLoss(4.0, same_class=same_class)(new, old, labels)
    assert float(loss) == pytest.approx(loop(new.numpy(), old.numpy(), labels.tolist(), 4.0, same_class), abs=1e-12)


def test_hoc_of_one_class_is_the_logarithm_of_the_count():
    new, old = draw(6, 5, seed=1, dtype=torch.float64), draw(6, 5, seed=2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="one class"):
        loss = HOCLoss()(new, old, torch.zeros(6, dtype=torch.int64))
    cosines = torch.nn.functional.cosine_similarity(new, old)
    assert float(loss) == pytest.approx(float((-10 * cosines).mean()) + math.log(6), abs=1e-12)


def test_hoc_sends_no_gradient_to_the_old_features():
    new, old = draw(6, 5, seed=1).requires_grad_(), draw(6, 5, seed=2).requires_grad_()
    HOCLoss()(new, old, torch.arange(6) % 2).backward()
    assert old.grad is None
    assert float(new.grad.abs().sum()) > 0


def test_hoc_survives_zero_vectors_and_half_precision():
    new, old = draw(6, 5, seed=1), draw(6, 5, seed=2)
    new[0] = 0
    labels = torch.arange(6) % 3
    exact = HOCLoss(50.0)(new, old, labels)
    assert torch.isfinite(exact)
    half = HOCLoss(50.0)(new.half(), old.half(), labels)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(exact), rel=1e-2)


def test_compatible_ce_is_the_convex_combination():
    head = SimplexClassifier(4, preallocated=6)
    z, old, vertices = draw(5, 5, seed=1), draw(5, 5, seed=2), torch.tensor([0, 1, 2, 3, 0])
    logits = head(z)
    ce, hoc = torch.nn.functional.cross_entropy(logits, vertices), HOCLoss()(z, old, vertices)
    torch.testing.assert_close(CompatibleCE(0.3)(logits, vertices, z, old), 0.3 * ce + 0.7 * hoc)
    torch.testing.assert_close(CompatibleCE(1.0)(logits, vertices, z, old), ce)
    torch.testing.assert_close(CompatibleCE(0.3)(logits, vertices), ce)


def test_free_features_find_their_vertices():
    count = 10
    labels = torch.arange(count)
    z = draw(count, count - 1).requires_grad_()
    optimizer = torch.optim.SGD([z], lr=5.0)
    for _ in range(500):
        optimizer.zero_grad()
        unit = torch.nn.functional.normalize(z, dim=1)
        torch.nn.functional.cross_entropy(simplex_logits(unit), labels).backward()
        optimizer.step()
    cosines = torch.nn.functional.cosine_similarity(z.detach(), simplex_vertices(count, dtype=torch.float32))
    assert float(cosines.min()) > math.cos(math.radians(1))


def toy(seed, fixed):
    torch.manual_seed(seed)
    centers = 2 * draw(6, 12, seed=99)
    labels = torch.arange(240) % 6
    x = centers[labels] + 0.4 * draw(240, 12, seed=seed + 50)
    net = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 7))
    head = SimplexClassifier(6, preallocated=8) if fixed else torch.nn.Linear(7, 8)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(net(x)), labels).backward()
        optimizer.step()
    z = torch.nn.functional.normalize(net(x).detach(), dim=1)
    return torch.stack([z[labels == c].mean(0) for c in range(6)])


def test_independent_networks_meet_at_the_vertices_and_not_elsewhere():
    fixed = torch.nn.functional.cosine_similarity(toy(0, True), toy(1, True))
    free = torch.nn.functional.cosine_similarity(toy(0, False), toy(1, False))
    assert float(fixed.min()) > 0.85
    assert float(free.mean().abs()) < 0.6


def test_a_warm_start_turns_class_means_onto_their_vertices():
    head = SimplexClassifier(5, 12, preallocated=16, index="back")
    labels = torch.arange(50) % 5
    means = active_subspace(16, head.class_index(torch.arange(5))).basis
    turn = torch.linalg.qr(draw(12, 5, seed=3, dtype=torch.float64)).Q
    features = (simplex_vertices(16)[head.class_index(labels)] @ means @ turn.mT).float()
    head.warm_start(features, labels)
    cosines = torch.nn.functional.cosine_similarity(head.embed(features), head.weight[head.class_index(labels)])
    assert float(cosines.min()) > 1 - 1e-5
    with pytest.raises(ValueError, match="in_features"):
        SimplexClassifier(5, preallocated=16).warm_start(draw(50, 15), labels)


def test_the_active_subspace_holds_its_vertices_and_nothing_of_the_residual():
    w = simplex_vertices(12)
    space = active_subspace(12, [1, 5, 5, 9])
    assert space.dim == 3
    assert float(space.residual_energy(w[[1, 5, 9]]).max()) < 1e-24
    assert float(space.residual_energy(w[[0]])) > 0.9
    assert active_subspace(12, range(12)).dim == 11


def test_neural_collapse_is_zero_on_the_simplex_and_grows_with_noise():
    w = simplex_vertices(5)
    labels = torch.arange(500) % 5
    perfect = neural_collapse(GroupedMoments(4).update(3 * w[labels], labels), w)
    assert perfect.within_between < 1e-20
    assert perfect.equinorm < 1e-12
    assert perfect.equiangle < 1e-12
    assert float(perfect.prototype_angles.max()) < 1e-5
    noise = draw(500, 4, dtype=torch.float64)
    noisy = neural_collapse(GroupedMoments(4).update(3 * w[labels] + noise, labels), w)
    # Between: 9 in all (equal shares of vectors of length 3); inside: 4 dimensions of variance 1.
    assert noisy.within_between == pytest.approx(4 / 9, rel=0.15)
    turned = neural_collapse(GroupedMoments(4).update(3 * w[labels], labels), -w)
    assert float(turned.prototype_angles.min()) == pytest.approx(180, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simplex_vertices(1), "count"),
        (lambda: SimplexClassifier(17, preallocated=16), "classes 16 to 16"),
        (lambda: SimplexClassifier(0, preallocated=16), "num_classes"),
        (lambda: SimplexClassifier(2, preallocated=1), "preallocated"),
        (lambda: SimplexClassifier(2, index="middle"), "index"),
        (lambda: SimplexClassifier(4, preallocated=8)(torch.zeros(1, 9)), "in_features=9"),
        (lambda: SimplexClassifier(4, preallocated=8).class_index(torch.tensor([4])), "labels"),
        (lambda: SimplexClassifier(4, preallocated=8).class_index(torch.tensor([-1])), "labels"),
        (lambda: SimplexClassifier(4, preallocated=8).extend(3), "num_classes"),
        (lambda: HOCLoss(0.0), "mu"),
        (lambda: HOCLoss(same_class="none"), "same_class"),
        (lambda: HOCLoss()(torch.full((2, 3), torch.nan), torch.ones(2, 3), torch.arange(2)), "NaN"),
        (lambda: CompatibleCE(1.5), "lam"),
        (lambda: active_subspace(5, [5]), "vertices"),
        (lambda: neural_collapse(GroupedMoments(2).update(torch.eye(2), [0, 0])), "2 classes"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
