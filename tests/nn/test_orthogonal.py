"""Square layers that stay orthogonal."""

import copy

import pytest
import torch

from subspan.geometry.grassmann import random_basis
from subspan.nn import OrthogonalLinear

MAPS = ("matrix_exp", "cayley", "householder")


def orthogonal(d, determinant, seed=0):
    q = random_basis(d, d, generator=torch.Generator().manual_seed(seed))
    if float(torch.linalg.det(q)) * determinant < 0:
        q[:, 0] *= -1
    return q


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("determinant", [1, -1])
@pytest.mark.parametrize("d", [1, 7, 16])
def test_starts_at_the_given_matrix_and_keeps_its_determinant(orthogonal_map, determinant, d):
    start = orthogonal(d, determinant)
    layer = OrthogonalLinear(d, init=start, orthogonal_map=orthogonal_map, dtype=torch.float64)
    torch.testing.assert_close(layer.weight, start, rtol=0, atol=1e-12)
    assert layer.determinant == determinant
    x = torch.randn(5, d, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ start.mT)


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_stays_orthogonal_in_training_and_finds_a_planted_rotation(orthogonal_map):
    target = orthogonal(12, -1, seed=1)
    nearby = target @ torch.linalg.matrix_exp(0.3 * (lambda a: a - a.mT)(torch.randn(12, 12, dtype=torch.float64) / 4))
    layer = OrthogonalLinear(12, init=nearby, orthogonal_map=orthogonal_map)
    x = torch.randn(256, 12, generator=torch.Generator().manual_seed(2))
    y = x @ target.float().mT
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    weight = layer.weight.detach()
    assert float((weight @ weight.mT - torch.eye(12)).abs().max()) < 1e-5
    assert float((weight - target.float()).abs().max()) < 0.02
    assert layer.determinant == -1


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_state_copy_and_half_precision(orthogonal_map):
    layer = OrthogonalLinear(8, init="random", orthogonal_map=orthogonal_map)
    other = OrthogonalLinear(8, orthogonal_map=orthogonal_map)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.weight, layer.weight)
    torch.testing.assert_close(copy.deepcopy(layer).weight, layer.weight)
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert "d=8" in repr(layer)


def test_identity_and_seeded_random_starts():
    torch.testing.assert_close(OrthogonalLinear(5).weight, torch.eye(5))
    first, second = (OrthogonalLinear(5, init="random", generator=torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(first.weight, second.weight)


def test_refuses_what_is_not_orthogonal():
    with pytest.raises(ValueError, match="not orthogonal"):
        OrthogonalLinear(3, init=2 * torch.eye(3))
    with pytest.raises(ValueError, match="shape"):
        OrthogonalLinear(3, init=torch.eye(4))
    with pytest.raises(ValueError, match="NaN"):
        OrthogonalLinear(2, init=torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="orthogonal_map"):
        OrthogonalLinear(3, orthogonal_map="qr")
    with pytest.raises(ValueError, match="init"):
        OrthogonalLinear(3, init="ones")
