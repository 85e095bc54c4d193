from __future__ import annotations

import pytest
import torch
from torch import nn

from subspan.geometry import Subspace, principal_angles
from subspan.solvers import jacobian_rank, jacobian_subspace


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 15)).double()
    with torch.no_grad():
        net[0].weight[:, :3] *= 6  # a gap in the spectrum, so that the leading subspace is well defined
    x = torch.randn(3, 4, dtype=torch.float64)
    return net, x, torch.func.jacrev(net)(x.flatten())


def test_leading_directions_are_those_of_the_singular_value_decomposition():
    net, x, jacobian = network()
    u, s, vh = torch.linalg.svd(jacobian)
    found = jacobian_subspace(
        lambda z: net(z.flatten()),
        x,
        3,
        tolerance=1e-10,
        max_iter=500,
        generator=torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(found.values, s[:3], atol=1e-6, rtol=0)
    assert float(principal_angles(found.input.basis, vh[:3].mT).max()) < 1e-5
    assert float(principal_angles(found.output, u[:, :3]).max()) < 1e-5
    assert found.input.variances is not None
    torch.testing.assert_close(jacobian @ found.input.basis, found.output * found.values, atol=1e-5, rtol=0)


def test_a_mask_and_a_null_space_leave_the_rest_unchanged_to_first_order():
    net, x, jacobian = network()
    mask = torch.zeros(15, dtype=torch.bool)
    mask[:6] = True

    def f(z):
        return net(z.flatten())

    other = torch.linalg.svd(jacobian[6:]).Vh[:9].mT
    found = jacobian_subspace(f, x, 2, mask=mask, null=Subspace(other), tolerance=1e-9, max_iter=300)
    direction = found.input.basis[:, 0]
    moved = jacobian @ direction
    assert float(torch.linalg.vector_norm(moved[6:])) < 1e-8
    torch.testing.assert_close(torch.linalg.vector_norm(moved[:6]), found.values[0])
    free = torch.eye(12, dtype=torch.float64) - other @ other.mT
    torch.testing.assert_close(found.values, torch.linalg.svdvals(jacobian[:6] @ free)[:2], atol=1e-6, rtol=0)


def test_rank_is_counted_by_the_share_of_the_norm():
    values = torch.tensor([3.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    x = torch.zeros(4, dtype=torch.float64)

    def f(z):
        return turn @ (values * z)

    norms = values.square().cumsum(0).sqrt() / torch.linalg.vector_norm(values)
    for share in (0.9, 0.95, 0.99, 0.9999, 1.0):
        assert jacobian_rank(f, x, share=share) == int((norms < share - 1e-12).sum()) + 1
    assert jacobian_rank(f, x) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: jacobian_subspace(f, x, 0), "rank"),
        (lambda f, x: jacobian_subspace(f, x, 4), "rank"),
        (lambda f, x: jacobian_subspace(f, x, 1, mask=torch.zeros(3, dtype=torch.bool)), "nothing"),
        (lambda f, x: jacobian_subspace(f, x, 1, mask=torch.ones(5, dtype=torch.bool)), "entries"),
        (lambda f, x: jacobian_subspace(f, x, 1, null=Subspace(torch.eye(3)[:, :3].double())), "null"),
        (lambda f, x: jacobian_subspace(lambda z: z / 0, x, 1), "NaN or infinity"),
        (lambda f, x: jacobian_rank(lambda z: 0 * z, x), "zero"),
        (lambda f, x: jacobian_rank(f, x, share=1.5), "share"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda z: z.square(), torch.ones(3, dtype=torch.float64))
