from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from subspan.solvers import doubly_stochastic


def affinity(n: int = 12, seed: int = 0, batch: tuple[int, ...] = ()) -> torch.Tensor:
    rows = torch.randn(*batch, n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit = torch.nn.functional.normalize(rows, dim=-1)
    return (unit @ unit.mT).abs()


def test_marginals_symmetry_and_optimality():
    k, eta = affinity(batch=(3,)), 0.175
    plan = doubly_stochastic(k, eta=eta, n_iter=40)
    torch.testing.assert_close(plan.sum(-1), torch.ones(3, 12, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(plan, plan.mT)

    def value(g):
        return (g * k - eta * g * g.clamp_min(1e-300).log()).sum()

    # Any doubly stochastic direction lowers the concave objective.
    for seed in range(3):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        other = torch.eye(12, dtype=torch.float64)[order].expand(3, 12, 12)
        assert value(plan) > value(0.99 * plan + 0.01 * other) - 1e-9


def test_limits_of_the_entropy():
    k = affinity()
    torch.testing.assert_close(doubly_stochastic(k, eta=1e4), torch.full_like(k, 1 / 12), atol=1e-4, rtol=0)
    off = k - 2 * torch.eye(12)
    off = off + 2 * torch.eye(12).roll(6, 0)  # the best permutation is then an involution, and unique
    sharp = doubly_stochastic(off, eta=3e-3, n_iter=3000)
    assert bool(torch.isfinite(doubly_stochastic(off, eta=1e-3)).all())
    rows, columns = linear_sum_assignment(-off.numpy())
    assert bool(torch.isfinite(sharp).all())
    best = np.zeros((12, 12))
    best[rows, columns] = 1
    np.testing.assert_allclose(sharp.numpy(), best, atol=0.02)


def test_the_implicit_derivative_is_that_of_many_iterations():
    k = affinity(6).requires_grad_(True)
    weight = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for gradient in ("implicit", "unrolled"):
        plan = doubly_stochastic((k + k.mT) / 2, eta=0.2, n_iter=200, gradient=gradient)
        found += torch.autograd.grad((plan * weight).sum(), k)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_half_precision_comes_back_as_half():
    k = affinity().half()
    plan = doubly_stochastic(k)
    assert plan.dtype == torch.float16
    torch.testing.assert_close(plan.float(), doubly_stochastic(k.float()), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: doubly_stochastic(k, eta=0.0), "eta"),
        (lambda k: doubly_stochastic(k, n_iter=0), "n_iter"),
        (lambda k: doubly_stochastic(k, gradient="none"), "gradient"),
        (lambda k: doubly_stochastic(k * float("nan")), "NaN"),
        (lambda k: doubly_stochastic(k + torch.eye(12).roll(1, 0)), "symmetric"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(affinity())
