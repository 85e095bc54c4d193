"""Square layers that stay orthogonal."""

import pytest
import torch

from subspan.geometry.grassmann import polar, random_basis
from subspan.nn import OrthogonalLinear, register_orthonormal
from subspan.nn.orthogonal import (
    CayleyMap,
    MatrixExpMap,
    givens_pairs,
    givens_rotate,
    householder_apply,
    householder_columns,
    householder_vectors,
)

MAPS = ("matrix_exp", "cayley", "householder", "polar")
ALL_MAPS = (*MAPS, "givens")


def orthogonal(d, determinant, seed=0):
    q = random_basis(d, d, generator=torch.Generator().manual_seed(seed))
    if float(torch.linalg.det(q)) * determinant < 0:
        q[:, 0] *= -1
    return q


@pytest.mark.parametrize("orthogonal_map", ALL_MAPS)
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
    with pytest.raises(ValueError, match="square"):
        register_orthonormal(torch.nn.Linear(3, 4), orthogonal_map="givens")
    with pytest.raises(ValueError, match="name: 'bias' is no parameter with two"):
        register_orthonormal(torch.nn.Linear(3, 4), "bias")
    layer = register_orthonormal(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="full rank"):
        layer.weight = torch.ones(4, 3)
    with pytest.raises(ValueError, match="NaN"):
        layer.weight = torch.full((4, 3), torch.nan)


@pytest.mark.parametrize("orthogonal_map", ALL_MAPS)
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (9, 9)])
def test_any_matrix_is_a_start_and_float32_stays_orthonormal(orthogonal_map, shape):
    if orthogonal_map == "givens" and shape[0] != shape[1]:
        return
    generator = torch.Generator().manual_seed(4)
    linear = torch.nn.Linear(shape[1], shape[0])
    matrix = torch.randn(shape, generator=generator)
    register_orthonormal(linear, "weight", orthogonal_map)
    linear.weight = matrix
    nearest = polar(matrix) if shape[0] >= shape[1] else polar(matrix.mT).mT
    torch.testing.assert_close(linear.weight, nearest, atol=1e-6, rtol=0)
    target = torch.randn(shape, generator=generator)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.05)
    before = float((linear.weight.detach() * target).sum())
    for _ in range(150):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            (-(linear.weight * target).sum()).backward()
        optimizer.step()
    weight = linear.weight.detach().double()
    gram = weight.mT @ weight if shape[0] >= shape[1] else weight @ weight.mT
    assert float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max()) < 1e-6
    reached = float((weight * target).sum())
    best = float(torch.linalg.svdvals(target).sum())
    assert reached > before
    if orthogonal_map in ("householder", "matrix_exp", "polar") and shape[0] != shape[1]:
        assert reached > 0.99 * best


def explicit(v):
    product = torch.eye(len(v), dtype=v.dtype)
    for column in v.mT:
        product = product @ (torch.eye(len(v), dtype=v.dtype) - 2 * column.outer(column) / column.square().sum())
    return product


@pytest.mark.parametrize(("d", "m"), [(1, 1), (6, 1), (7, 3), (12, 12)])
def test_compact_reflections_are_the_product_of_reflections(d, m):
    v = torch.randn(d, m, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    product = explicit(v)
    torch.testing.assert_close(householder_columns(v), product[:, :m], atol=1e-13, rtol=0)
    x = torch.randn(d, 5, dtype=torch.float64)
    torch.testing.assert_close(householder_apply(v, x), product @ x, atol=1e-13, rtol=0)
    with_zero = torch.cat([v, torch.zeros(d, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(householder_apply(with_zero, x), product @ x, atol=1e-13, rtol=0)


def test_frames_become_reflections_and_return_whatever_their_signs():
    frames = [torch.eye(6, 3), -torch.eye(6, 3), torch.eye(5), torch.diag(torch.tensor([1.0, -1, 1, -1]))]
    frames += [random_basis(8, k, generator=torch.Generator().manual_seed(k)) for k in (1, 4, 8)]
    for frame in frames:
        v, sign = householder_vectors(frame.double())
        torch.testing.assert_close(householder_columns(v) * sign, frame.double(), atol=1e-13, rtol=0)
        assert bool((torch.linalg.vector_norm(v, dim=0) > 0.99).all())
    stacked = random_basis(8, 3, batch=(4,), generator=torch.Generator().manual_seed(1))
    v, sign = householder_vectors(stacked)
    torch.testing.assert_close(householder_columns(v) * sign.unsqueeze(-2), stacked, atol=1e-13, rtol=0)


@pytest.mark.parametrize("d", [2, 5, 8, 11])
def test_givens_butterflies_are_rotations_of_every_coordinate(d):
    first, second = givens_pairs(d)
    for i, j in zip(first, second):
        assert len(set(i.tolist()) | set(j.tolist())) == 2 * (d // 2)
    angles = torch.randn(first.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    q = givens_rotate(torch.eye(d, dtype=torch.float64), angles, first, second)
    torch.testing.assert_close(q @ q.mT, torch.eye(d, dtype=torch.float64), atol=1e-14, rtol=0)
    assert float(torch.linalg.det(q)) > 0
    if d & (d - 1) == 0:
        assert bool((q.abs() > 0).all())


@pytest.mark.parametrize("orthogonal_map", ALL_MAPS)
def test_gradients_of_the_maps(orthogonal_map):
    layer = OrthogonalLinear(4, init="random", orthogonal_map=orthogonal_map, dtype=torch.float64)
    (parameter,) = layer.parameters()
    chart = layer.parametrizations.weight[0]
    start = parameter.detach() + 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(chart, start.requires_grad_())


def test_cayley_s_map_is_the_exponential_to_third_order():
    x = 0.02 * torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, exact = (make(5, 5, torch.float64)(x) for make in (CayleyMap, MatrixExpMap))
    assert float((found - exact).abs().max()) < 1e-4
    assert float((exact - torch.eye(5)).abs().max()) > 1e-2
