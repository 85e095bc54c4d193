"""How many atoms and codes fit into so many bits, and how bits are shared out among layers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

VALUE_BITS, CODE_BITS = 16, 14


def dictionary_sizes(
    d_in: int, d_out: int, bits: float, *, density: float = 2.0, most: int | None = None
) -> tuple[int, int]:
    """Atoms k of a dictionary and entries s a column of its codes that fit into so many bits.

    A dictionary takes 16 bits a number, codes take 14, and a mask says with one bit each which of the k d_out are not
    zero: 16 d_in k + 14 s d_out + k d_out. With k = 2 s this is as many as numbers of 16 bits without a mask.

    Parameters
    ----------
    d_in, d_out
        Of the layer.
    bits
        All together.
    density
        k / s, at least 1.
    most
        Most atoms, where they must be orthonormal; what they leave goes to s.

    Returns
    -------
    (k, s)

    Raises
    ------
    ValueError
        Where not one atom fits.

    References
    ----------
    CoSpaDi (arXiv 2509.22075).

    Examples
    --------
    >>> from subspan.weights import dictionary_sizes
    >>> dictionary_sizes(4096, 12288, 0.8 * 16 * 4096 * 12288)
    (3932, 1966)
    """
    if not density >= 1:
        raise ValueError(f"density: at least 1 atom for each that is read, got {density}")
    k = int(bits / (VALUE_BITS * d_in + d_out * (CODE_BITS / density + 1)) + 1e-9)
    k = k if most is None else min(k, most)
    s = int((bits - k * (VALUE_BITS * d_in + d_out)) / (CODE_BITS * d_out) + 1e-9)
    if k < 1 or s < 1:
        raise ValueError(f"ratio: {bits / (VALUE_BITS * d_in * d_out):.2g} of {d_out} x {d_in} numbers is no atom")
    return k, min(s, k)


def allocate(bits: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The option of each item so that losses add up to little and bits to no more than a budget.

    The steps that lower the loss most for their bits come first, on the lower convex hull of each item's options; the
    result is optimal among those but for what the last steps leave of the budget.

    Parameters
    ----------
    bits
        Of each option of each item, rising.
    losses
        Of each option; infinity where it cannot be.
    budget
        Of all bits.

    Returns
    -------
    Index of an option an item.

    Raises
    ------
    ValueError
        Where the least bits are more than the budget.

    Examples
    --------
    >>> from subspan.weights import allocate
    >>> allocate([[1, 2, 3], [1, 2, 3]], [[9, 4, 0], [1, 0.5, 0]], 4)
    [2, 0]
    """
    hulls = []
    for costs, values in zip(bits, losses):
        hull: list[int] = []
        for place in (p for p, value in enumerate(values) if value < float("inf")):
            while len(hull) > 1 and _slope(costs, values, hull[-2], hull[-1]) <= _slope(costs, values, hull[-1], place):
                hull.pop()
            if not hull or values[place] < values[hull[-1]]:
                hull.append(place)
        hulls.append(hull)
    used = sum(costs[hull[0]] for costs, hull in zip(bits, hulls))
    if used > budget:
        raise ValueError(f"budget: {used:.0f} bits are the least, got {budget:.0f}")
    at = [0] * len(hulls)

    def gain(item: int) -> tuple[float, int]:
        return -_slope(bits[item], losses[item], *hulls[item][at[item] : at[item] + 2]), item

    queue = [gain(item) for item, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, item = heapq.heappop(queue)
        before, after = hulls[item][at[item] : at[item] + 2]
        step = bits[item][after] - bits[item][before]
        if used + step > budget * (1 + 1e-12):
            continue
        used += step
        at[item] += 1
        if at[item] + 1 < len(hulls[item]):
            heapq.heappush(queue, gain(item))
    return [hull[place] for hull, place in zip(hulls, at)]


def _slope(costs: Sequence[float], values: Sequence[float], first: int, second: int) -> float:
    """Loss that a bit saves."""
    return (values[first] - values[second]) / (costs[second] - costs[first])
