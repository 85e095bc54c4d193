from __future__ import annotations

import math

import pytest
import torch

from subspan.measures import two_nn


@pytest.mark.parametrize("d", [1, 2, 5])
def test_dimension_of_a_cube_in_any_space(d: int) -> None:
    x = torch.rand(1500, d) @ torch.linalg.qr(torch.randn(9, d)).Q.mT
    assert two_nn(x) == pytest.approx(d, rel=0.15)


def test_the_estimate_is_the_slope_through_the_origin() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0], [31.0]])
    ratios = sorted(math.log(second / first) for first, second in ((1, 3), (1, 2), (2, 3), (4, 6), (8, 12), (16, 24)))
    heights = [-math.log(1 - i / 6) for i in range(1, 6)]
    slope = sum(a * b for a, b in zip(ratios, heights)) / sum(a * a for a in ratios[:5])
    assert two_nn(x) == pytest.approx(slope)
    assert two_nn(torch.cat([x, x])) == pytest.approx(slope)


def test_few_points_and_bad_input() -> None:
    assert two_nn(torch.zeros(50, 3)) == 0
    with pytest.raises(ValueError, match="discard"):
        two_nn(torch.zeros(5, 2), discard=1.0)
    with pytest.raises(ValueError, match="NaN"):
        two_nn(torch.full((5, 2), torch.nan))
