"""The gated pull towards the orthogonal matrices."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from subspan.geometry.grassmann import polar, random_basis
from subspan.nn import (
    LambdaOrthogonality,
    limit_orthogonality_defect,
    orthogonality_defect,
    register_lambda_orthogonality,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_nothing_at_an_orthogonal_weight_and_no_nan_in_its_gradient():
    weight = torch.eye(6).requires_grad_()
    loss = LambdaOrthogonality(1.0)(weight)
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool(torch.isfinite(weight.grad).all())


def test_the_value_is_the_formula_and_the_gradient_its_derivative():
    weight = torch.randn(5, 5, dtype=torch.float64, generator=generator())
    r = float(torch.linalg.matrix_norm(weight @ weight.mT - torch.eye(5)))
    for lam, alpha in ((0.5 * r, 1.0), (r, 10.0), (1.1 * r, 3.0)):
        expected = r / (1 + math.exp(-alpha * (r - lam)))
        assert float(LambdaOrthogonality(lam, alpha=alpha)(weight)) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(LambdaOrthogonality(0.9 * r, alpha=2.0), weight.clone().requires_grad_())


def test_it_grows_with_the_defect_and_tends_to_the_soft_penalty_and_to_nothing():
    q = random_basis(8, 8, generator=generator())
    defects, losses = [], []
    for stretch in torch.linspace(0.01, 3, 30):
        defects.append(float(orthogonality_defect(q * (1 + stretch).sqrt())))
        losses.append(float(LambdaOrthogonality(2.0)(q * (1 + stretch).sqrt())))
    assert all(a < b for a, b in pairwise(losses))
    weight = q * 1.3
    r = float(orthogonality_defect(weight))
    assert float(LambdaOrthogonality(0.0, alpha=1e3)(weight)) == pytest.approx(r, rel=1e-9)
    assert float(LambdaOrthogonality(r + 0.1, alpha=1e3)(weight)) < 1e-12
    assert float(LambdaOrthogonality(math.inf)(weight)) == 0
    assert defects[-1] == pytest.approx(3 * math.sqrt(8), rel=1e-6)


def test_the_relative_limit_means_the_same_at_every_size():
    for n in (16, 64):
        weight = random_basis(n, n, generator=generator()) * math.sqrt(1.375)
        assert float(orthogonality_defect(weight)) == pytest.approx(0.375 * math.sqrt(n), rel=1e-9)
        # At r = λ the gate is half open.
        assert float(LambdaOrthogonality()(weight)) == pytest.approx(0.375 * math.sqrt(n) / 2, rel=1e-6)


def test_the_smaller_gram_matrix_decides_and_convolutions_are_flattened():
    rows = random_basis(12, 5, generator=generator()).mT
    assert float(orthogonality_defect(rows)) < 1e-12
    assert float(orthogonality_defect(rows.mT)) < 1e-12
    assert float(orthogonality_defect(rows.reshape(5, 3, 2, 2))) < 1e-12
    half = orthogonality_defect(torch.randn(20, 20, generator=generator()).half())
    assert half.dtype == torch.float32


@pytest.mark.parametrize(("lam", "weight_of_penalty"), [(1.0, 1.0), (3.0, 1.0), (12.0, 1.0), (6.0, 1e-3)])
def test_a_planted_stretched_rotation_is_approached_until_the_limit(lam, weight_of_penalty):
    n = 64
    u, v = (random_basis(n, n, generator=generator(seed)).float() for seed in (1, 2))
    planted = u @ torch.diag(torch.linspace(0.1, 2.8, n)) @ v.mT
    assert float(orthogonality_defect(planted)) > 14
    weight = polar(planted).clone().requires_grad_()
    penalty = LambdaOrthogonality(lam)
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    for _ in range(1200):
        optimizer.zero_grad()
        # Inputs with identity covariance: the regression error is that of the matrices, averaged over coordinates.
        loss = (weight - planted).square().sum() / n + weight_of_penalty * penalty(weight)
        loss.backward()
        optimizer.step()
    r = float(orthogonality_defect(weight.detach()))
    # So small a weight of the penalty does not hold it.
    assert 0.88 * lam < r < 1.02 * lam if weight_of_penalty == 1 else r > 1.5 * lam


def test_without_a_limit_nothing_opens_the_gate_and_at_zero_it_is_open():
    weight = torch.randn(5, 5, dtype=torch.float64, generator=generator())
    r = float(orthogonality_defect(weight))
    assert float(LambdaOrthogonality(0.0)(weight)) == r
    assert float(LambdaOrthogonality(0.9 * r)(weight)) == pytest.approx(r / (1 + math.exp(-100 / 9)), rel=1e-9)


def test_registered_layers_share_one_penalty_that_training_can_use():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    penalty = register_lambda_orthogonality(model, lam=0.1)
    assert set(penalty.defects()) == {"0", "3"}
    expected = sum(LambdaOrthogonality(0.1)(model[i].weight) for i in (0, 3))
    torch.testing.assert_close(penalty(), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = penalty.defects()
    for _ in range(60):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert all(after < 0.3 < before[name] for name, after in penalty.defects().items())
    holder = nn.Module()
    holder.mixing = nn.Parameter(torch.eye(3) * 2)
    assert set(register_lambda_orthogonality(holder, "mixing").defects()) == {""}


def test_the_defect_is_cut_to_a_limit_along_the_same_directions():
    weight = torch.randn(6, 6, dtype=torch.float64, generator=generator()) * 0.7
    cut = limit_orthogonality_defect(weight, 1.0)
    assert float(orthogonality_defect(cut)) == pytest.approx(1.0, rel=1e-9)
    torch.testing.assert_close(polar(cut), polar(weight))
    torch.testing.assert_close(limit_orthogonality_defect(weight, 100.0), weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LambdaOrthogonality(-1.0), "lam: must be >= 0"),
        (lambda: LambdaOrthogonality(alpha=-1.0), "alpha"),
        (lambda: LambdaOrthogonality(float("nan")), "lam"),
        (lambda: LambdaOrthogonality(1.0, lam_rel=0.3), "not both"),
        (lambda: register_lambda_orthogonality(nn.ReLU()), "module: no linear"),
        (lambda: limit_orthogonality_defect(torch.eye(2), -1.0), "limit"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
