"""The loss of linear invariance: what it is zero for, what it does not change with, and its kernel by hand."""

import numpy as np
import pytest
import torch

from subspan.dynamics import LinearInvarianceLoss, linear_invariance_test
from subspan.dynamics.linear_invariance import kernel_width, white_latents, without_linear
from subspan.measures import gaussian_kernel


def drawn(n=400, d=2, p=2, seed=0):
    """Actions, and a state that they move linearly."""
    draws = torch.Generator().manual_seed(seed)
    a = 2 * torch.rand(n, p, generator=draws, dtype=torch.float64) - 1
    v = torch.randn(n, d, generator=draws, dtype=torch.float64)
    return a, 2 * a @ torch.randn(p, d, generator=draws, dtype=torch.float64) + v


def value(z, a, seed=0, **options):
    return float(LinearInvarianceLoss(generator=torch.Generator().manual_seed(seed), **options)(z, a))


@pytest.mark.parametrize("kernel", ["features", "exact"])
def test_it_is_zero_for_what_is_affine_in_the_actions_and_grows_with_a_bend(kernel):
    a, z = drawn(1500)
    turned = 3 + a @ torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    assert 0 <= value(turned, a, kernel=kernel) < 1e-25
    straight, bent = (np.mean([value(each, a, seed, kernel=kernel) for seed in range(5)]) for each in (z, z + z**2))
    assert 0 < straight < 3 * 2 / len(a)  # of two white latents without any dependence: at most 2 / n in the mean
    assert bent > 10 * straight


def test_linear_fit_is_taken_from_features_as_from_latents():
    a, z = drawn()
    features = torch.randn(len(a), 7, dtype=torch.float64).sin() + a[:, :1] ** 2
    ours = z.T @ without_linear(features, a)
    assert ours.allclose(without_linear(z, a).T @ features, rtol=1e-10, atol=1e-10)
    design = torch.cat([torch.ones(len(a), 1, dtype=torch.float64), a], 1)
    left = z - design @ torch.linalg.lstsq(design, z).solution
    assert without_linear(z, a).allclose(left, atol=1e-10)
    repeated = torch.cat([a, a[:, :1] + 2 * a[:, 1:], torch.ones(len(a), 1, dtype=torch.float64)], 1)
    assert without_linear(z, repeated).allclose(left, atol=1e-10)


def test_exact_value_is_the_sum_over_all_pairs():
    a, z = drawn(40)
    left = without_linear(white_latents(z), a)
    kernel = gaussian_kernel(a, bandwidth=0.7)
    pairs = [float(left[i] @ left[j]) * float(kernel[i, j]) for i in range(40) for j in range(40)]
    assert value(z, a, kernel="exact", bandwidth=0.7) == pytest.approx(sum(pairs) / 1600, rel=1e-10)
    median = kernel_width(a)
    assert value(z, a, kernel="exact") == pytest.approx(value(z, a, kernel="exact", bandwidth=median))


def test_features_approach_the_exact_kernel():
    a, z = drawn()
    exact = value(z**3, a, kernel="exact")
    assert value(z**3, a, n_features=20_000) == pytest.approx(exact, rel=0.05)
    means = np.mean([value(z**3, a, seed, n_features=50) for seed in range(200)])
    assert means == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("kernel", ["features", "exact"])
def test_it_does_not_change_with_an_affine_map_of_white_latents(kernel):
    a, z = drawn()
    turned = z**3 @ torch.tensor([[1e-3, 2.0], [0.5, 30.0]], dtype=torch.float64) - 7
    assert value(turned, a, kernel=kernel) == pytest.approx(value(z**3, a, kernel=kernel), rel=1e-8)
    plain = {"kernel": kernel, "whiten": False}
    assert value(0.1 * z, a, **plain) == pytest.approx(0.01 * value(z, a, **plain), rel=1e-8)


def test_the_unbiased_statistic_falls_below_zero_where_there_is_nothing():
    """Why pairs i = j stay: without them, and with a fit from the same rows, larger residuals are rewarded."""
    unbiased, ours = [], []
    for seed in range(100):
        a, z = drawn(60, seed=seed)
        left = without_linear(white_latents(z), a)
        pairs = (left @ left.T) * gaussian_kernel(a)
        unbiased.append(float(pairs.sum() - pairs.trace()) / (60 * 59))
        ours.append(value(z, a, kernel="exact"))
    assert np.mean(unbiased) < -3 * np.std(unbiased) / 10
    assert min(ours) > 0


def test_gradients_lower_it():
    a, z = drawn()
    bend = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([bend], lr=0.05)
    loss = LinearInvarianceLoss(generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        optimizer.zero_grad()
        loss(z + bend * z**2, a).backward()
        optimizer.step()
    assert abs(bend.item()) < 0.05


def test_permutations_tell_bent_latents_from_straight_ones():
    p_values = []
    for seed in range(40):
        a, z = drawn(200, seed=seed)
        p_values.append(linear_invariance_test(z, a, permutations=19, generator=torch.Generator().manual_seed(0)))
    assert 0.3 < np.mean([each.p_value for each in p_values]) < 0.7
    assert np.mean([each.value for each in p_values]) == pytest.approx(
        np.mean([each.reference for each in p_values]), rel=0.1
    )
    a, z = drawn()
    assert linear_invariance_test(z + z**2, a, permutations=99).p_value == 0.01


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda a, z: LinearInvarianceLoss(n_features=0), "n_features: at least 1"),
        (lambda a, z: LinearInvarianceLoss(bandwidth=0.0), "bandwidth: expected a number > 0 or 'median'"),
        (lambda a, z: LinearInvarianceLoss()(z[:5], a[:5]), "z: 2 latents and 2 actions need 6 rows, got 5"),
        (lambda a, z: LinearInvarianceLoss()(z, 0 * a + 2), "a: all actions are the same"),
        (lambda a, z: LinearInvarianceLoss()(z, a.log()), "a: .*NaN"),
        (lambda a, z: LinearInvarianceLoss()(0 * z, a), "the rows are constant"),
        (lambda a, z: linear_invariance_test(z, a, permutations=0), "permutations: at least 1"),
    ],
)
def test_what_it_refuses(made, message):
    with pytest.raises(ValueError, match=message):
        made(*drawn())
