"""Penalties on what lies in a subspace: against the projector, and what may and may not move them."""

import pytest
import torch

from subspan.geometry import Subspace
from subspan.nn.lambda_orthogonality import orthogonality_defect
from subspan.nn.penalties import (
    ProjectionPenalty,
    cross_correlation,
    orthonormality_penalty,
    projection_penalty,
    weight_projection_penalty,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def space():
    return Subspace.random(7, 3, generator=generator(1))


@pytest.fixture
def states():
    return torch.randn(2, 5, 7, dtype=torch.float64, generator=generator(2))


@pytest.mark.parametrize("power", [1, 2])
def test_it_is_the_mean_length_of_the_projections_and_its_gradient_stays_inside(space, states, power):
    states.requires_grad_()
    projected = states @ space.projector
    expected = torch.linalg.vector_norm(projected, dim=-1).pow(power).mean()
    loss = projection_penalty(states, space, power=power)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, states)
    torch.testing.assert_close(gradient @ space.projector, gradient)
    assert torch.autograd.gradcheck(lambda x: projection_penalty(x, space, power=power), states)


def test_neither_the_basis_nor_the_centre_matters_and_the_complement_is_free(space, states):
    turned = Subspace(space.basis @ Subspace.random(3, 3, generator=generator(3)).basis, center=torch.ones(7).double())
    torch.testing.assert_close(projection_penalty(states, turned), projection_penalty(states, space))
    outside = space.residual(states.flatten(0, 1)).requires_grad_()
    loss = projection_penalty(outside, space, power=1)
    loss.backward()
    assert float(loss.detach()) < 1e-12
    assert bool(torch.isfinite(outside.grad).all())
    at_zero = torch.zeros(3, 7, requires_grad=True)
    projection_penalty(at_zero, space, power=1).backward()
    assert float(at_zero.grad.abs().sum()) == 0


def test_masked_states_do_not_count_even_where_they_are_nan(space, states):
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    spoilt = states.masked_fill((mask == 0).unsqueeze(-1), torch.nan).requires_grad_()
    loss = projection_penalty(spoilt, space, mask)
    torch.testing.assert_close(loss, projection_penalty(states[mask != 0], space))
    loss.backward()
    assert bool(torch.isfinite(spoilt.grad).all())
    assert float(projection_penalty(states, space, torch.zeros(2, 5))) == 0
    total = projection_penalty(states, space, mask, reduction="sum")
    torch.testing.assert_close(total, 7 * loss.detach())


@pytest.mark.parametrize("power", [1, 2])
def test_the_relative_one_does_not_see_the_scale_but_its_gradient_does_not_shrink_states(space, states, power):
    value = projection_penalty(states, space, power=power, relative=True)
    torch.testing.assert_close(projection_penalty(9 * states, space, power=power, relative=True), value)
    assert 0 < float(value) < 1
    free = projection_penalty(states, space, power=power)
    whole = torch.linalg.vector_norm(states, dim=-1).pow(power).mean()
    torch.testing.assert_close(value, free / whole)
    states.requires_grad_()
    relative, absolute = (
        torch.autograd.grad(projection_penalty(states, space, power=power, relative=kind), states)[0]
        for kind in (True, False)
    )
    torch.testing.assert_close(relative, absolute / whole)


def test_of_a_weight_it_is_the_product_and_of_an_orthonormal_one_the_overlap_of_subspaces(space):
    weight = torch.randn(7, 4, dtype=torch.float64, generator=generator(4), requires_grad=True)
    loss = weight_projection_penalty(weight, space)
    torch.testing.assert_close(loss, (weight.mT @ space.basis).square().sum())
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, 2 * space.projector @ weight)
    other = Subspace.random(7, 4, generator=generator(5))
    cosines = space.angles(other).cos().square().sum()
    torch.testing.assert_close(weight_projection_penalty(other.basis, space), cosines)


def test_orthonormality_of_a_batch_and_the_defect_are_one_formula(space):
    batch = torch.stack([space.basis, 2 * space.basis, torch.randn(7, 3, generator=generator(6)).double()])
    found = orthonormality_penalty(batch)
    torch.testing.assert_close(found[:2], torch.tensor([0.0, 27.0]).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found[2], orthogonality_defect(batch[2]).square())
    torch.testing.assert_close(orthonormality_penalty(batch.mT), found)


def test_bad_input_is_named(space, states):
    with pytest.raises((ValueError, TypeError), match="power"):
        projection_penalty(states, space, power=3)
    with pytest.raises(ValueError, match="states: expected 7"):
        projection_penalty(states[..., :6], space)
    with pytest.raises((ValueError, TypeError), match="mask"):
        projection_penalty(states, space, torch.ones(5, 2))
    with pytest.raises(ValueError, match="batch"):
        projection_penalty(states, Subspace(torch.eye(7).expand(2, 7, 7)))


def test_the_module_takes_another_subspace_and_keeps_it_in_a_file(space, states):
    penalty = ProjectionPenalty(power=1, relative=True)
    assert float(penalty(states)) == 0
    penalty.set_subspace(space)
    mask = torch.ones(2, 5)
    mask[0, 1:] = 0
    expected = projection_penalty(states, space, mask, power=1, relative=True)
    torch.testing.assert_close(penalty(states, mask), expected)
    again = ProjectionPenalty(Subspace.random(7, 2), power=1, relative=True)
    again.load_state_dict(penalty.state_dict())
    torch.testing.assert_close(again(states, mask), expected)
    assert not list(penalty.parameters())
    half = projection_penalty(states.bfloat16(), space)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), projection_penalty(states, space), rtol=1e-2, atol=0)


def test_correlations_between_two_parts():
    a, b = torch.randn(30, 3), torch.randn(30, 2)
    b[:, 0] = 100 - 5 * a[:, 1]
    expected = torch.corrcoef(torch.cat([a, b], 1).T)[:3, 3:]
    torch.testing.assert_close(cross_correlation(a, b), expected)
    a[:, 2] = 7
    a.requires_grad_()
    found = cross_correlation(a, b)
    assert found[2].abs().max() < 1e-6
    found.norm().backward()
    assert bool(a.grad.isfinite().all())
    with pytest.raises(ValueError, match="2 paired rows are needed, got 1 and 1"):
        cross_correlation(a[:1], b[:1])
