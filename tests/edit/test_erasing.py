"""A subspace taken out of states, or set to a place in it; and what takes out differences of means."""

import pytest
import torch

from subspan.edit import erase_differences, erase_subspace, leace, steer_subspace
from subspan.geometry import Subspace
from subspan.statistics import GroupedMoments


@pytest.fixture
def space():
    generator = torch.Generator().manual_seed(3)
    drawn = Subspace.random(7, 3, generator=generator)
    return Subspace(drawn.basis, center=torch.randn(7, generator=generator, dtype=torch.float64))


def test_erasing_sets_the_coordinates_to_the_centres_and_leaves_the_rest(space):
    x = torch.randn(9, 7, dtype=torch.float64)
    erased = erase_subspace(space).map(x)
    assert space.coordinates(erased).abs().max() < 1e-12
    assert torch.allclose(space.residual(erased), space.residual(x))
    assert torch.allclose(erase_subspace(space).map(erased), erased)


def test_steering_sets_coordinates_or_adds_to_them(space):
    x, wanted = torch.randn(9, 7, dtype=torch.float64), [1.0, -2.0, 0.5]
    placed = steer_subspace(space, wanted, strength=2).map(x)
    assert torch.allclose(space.coordinates(placed), 2 * torch.tensor(wanted, dtype=torch.float64).expand(9, 3))
    pushed = steer_subspace(space, wanted, add=True).map(x)
    assert torch.allclose(space.coordinates(pushed) - space.coordinates(x), torch.tensor(wanted).double().expand(9, 3))
    for moved in (placed, pushed):
        assert torch.allclose(space.residual(moved), space.residual(x))


def test_refused(space):
    with pytest.raises(ValueError, match="3 are needed"):
        steer_subspace(space, [1.0, 2.0])
    with pytest.raises(ValueError, match="a batch"):
        erase_subspace(Subspace.random(5, 2, batch=(2,)))
    with pytest.raises(ValueError, match="nothing to erase"):
        erase_differences(torch.zeros(2, 3), torch.eye(3), torch.zeros(3))


@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_differences_are_taken_out_whatever_the_covariance_says(shrinkage):
    """Shrinking changes how far rows move, not what is taken out; unshrunk it is `leace`, which moves them least."""
    x, labels = torch.randn(300, 6, dtype=torch.float64), torch.arange(300) % 3
    x = x @ torch.randn(6, 6, dtype=torch.float64) + 2 * torch.randn(3, 6, dtype=torch.float64)[labels]
    moments = GroupedMoments(6).update(x, labels)
    covariance, mean = moments.pooled().covariance(), x.mean(0)
    shrunk = (1 - shrinkage) * covariance + shrinkage * torch.diag(covariance.diagonal())
    erased = erase_differences(moments.means - mean, shrunk, mean).map(x)
    for label in range(3):
        assert torch.allclose(erased[labels == label].mean(0), mean, atol=1e-10)
    moved = float((erased - x).square().sum())
    least = float((leace(moments).map(x) - x).square().sum())
    assert moved == pytest.approx(least) if shrinkage == 0 else moved > least
    # No more directions than the means span.
    matrix = erase_differences(moments.means - mean, shrunk, mean).matrix
    assert torch.linalg.matrix_rank(torch.eye(6) - matrix, rtol=1e-8) == 2
