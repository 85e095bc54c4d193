from __future__ import annotations

import pytest
import torch

from subspan.measures import neighbour_purity
from subspan.solvers import chamfer_distances


def test_chamfer_is_the_formula():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 20, 3, generator=g), torch.randn(4, 15, 3, generator=g)
    found = chamfer_distances(a, b)
    for i in range(3):
        for j in range(4):
            squared = (a[i][:, None] - b[j][None]).square().sum(-1)
            expected = squared.min(1).values.mean() + squared.min(0).values.mean()
            assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-5)
    own = chamfer_distances(a, a)
    assert float(own.diagonal().abs().max()) == 0
    torch.testing.assert_close(own, own.mT)


def test_chamfer_refuses_other_shapes():
    with pytest.raises(ValueError, match="points in 3 dimensions, got 2"):
        chamfer_distances(torch.zeros(1, 4, 3), torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="no points"):
        chamfer_distances(torch.zeros(1, 0, 3), torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="b: 1 of"):
        chamfer_distances(torch.zeros(1, 4, 3), torch.full((1, 1, 3), float("nan")))


def test_purity_counts_neighbours_of_the_same_label():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.05]])
    assert neighbour_purity(rows, ["a", "a", "b", "b", "a"], k=1) == 1
    # Each of the three a has both others of its kind near; the b have one of two.
    assert neighbour_purity(rows, ["a", "a", "b", "b", "a"], k=2) == pytest.approx((3 * 1 + 2 * 0.5) / 5)
    with pytest.raises(ValueError, match="labels: expected 5"):
        neighbour_purity(rows, ["a"])
