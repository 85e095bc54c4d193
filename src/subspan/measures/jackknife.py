"""Standard errors of anything computed from moments, by leaving out one block of the data at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any


def jackknife(blocks: Sequence[Any], statistic: Callable[[Any], float]) -> tuple[float, float]:
    """The statistic of all blocks together, and its standard error by the delete-one-block jackknife.

    blocks: `Moments`, `JointMoments` or anything that `+` merges, each of rows that are independent of the other
    blocks' (positions of one image belong together). Raises ValueError for fewer than 2. Source: Kunsch (1989).
    """
    g = len(blocks)
    if g < 2:
        raise ValueError(f"blocks: at least 2, got {g}")
    left_out = [statistic(reduce(add, [*blocks[:i], *blocks[i + 1 :]])) for i in range(g)]
    mean = sum(left_out) / g
    error = ((g - 1) / g * sum((value - mean) ** 2 for value in left_out)) ** 0.5
    return statistic(reduce(add, blocks)), error
