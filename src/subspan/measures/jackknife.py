"""Standard errors of anything computed from moments, by leaving out one block of the data at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any


def jackknife(blocks: Sequence[Any], statistic: Callable[[Any], float]) -> tuple[float, float]:
    """The statistic of all blocks together, and its standard error by the delete-one-block jackknife.

    Parameters
    ----------
    blocks
        At least 2 `Moments`, `JointMoments` or anything that `+` merges, each of rows that are independent of the other
        blocks' (positions of one image belong together).
    statistic
        Function of merged blocks.

    Returns
    -------
    The statistic and its standard error.

    Raises
    ------
    ValueError
        For fewer than 2 blocks.

    References
    ----------
    Künsch (1989), The jackknife and the bootstrap for general stationary observations.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import jackknife
    >>> from subspan.statistics import Moments
    >>> rows = np.random.default_rng(0).normal(3.0, 1.0, size=(400, 1))
    >>> mean, error = jackknife([Moments(1).update(part) for part in np.split(rows, 20)], lambda m: float(m.mean[0]))
    >>> abs(mean - 3.0) < 3 * error, 0.02 < error < 0.1  # 1/sqrt(400) = 0.05
    (True, True)
    """
    g = len(blocks)
    if g < 2:
        raise ValueError(f"blocks: at least 2, got {g}")
    left_out = [statistic(reduce(add, [*blocks[:i], *blocks[i + 1 :]])) for i in range(g)]
    mean = sum(left_out) / g
    error = ((g - 1) / g * sum((value - mean) ** 2 for value in left_out)) ** 0.5
    return statistic(reduce(add, blocks)), error
