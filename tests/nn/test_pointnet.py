from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning", reason="the point network trains with Lightning (extra: train)")


from subspan.nn.pointnet import PointNet, augmented


def clouds(n: int, points: int = 64) -> torch.Tensor:
    """Ellipsoids of different proportions."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(n, points, 3, generator=g)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows * torch.rand(n, 1, 3, generator=g).mul(0.9).add(0.1)


def test_the_order_of_the_points_does_not_matter():
    torch.manual_seed(0)
    network = PointNet(32)
    x = clouds(3)
    torch.testing.assert_close(network(x[:, torch.randperm(64)]), network(x), atol=1e-5, rtol=0)
    assert network(x).shape == (3, 64)
    assert float((network(x)[0] - network(x)[1]).detach().abs().max()) > 1e-3


def test_a_view_is_part_of_the_cloud_turned_scaled_and_moved():
    x = clouds(4, 200)
    view = augmented(x, 50, torch.Generator().manual_seed(0))
    assert view.shape == (4, 50, 3)
    # Turns are about z, so heights keep their order up to scale, shift and jitter.
    low, high = x[..., 2].amin(1), x[..., 2].amax(1)
    assert bool((view[..., 2].amax(1) <= 1.25 * high + 0.1).all())
    assert bool((view[..., 2].amin(1) >= 1.25 * low - 0.1).all())
    same = augmented(x, 50, torch.Generator().manual_seed(0))
    assert torch.equal(view, same)
