"""A uniform sample of the rows of a stream, from one pass."""

from __future__ import annotations

import torch
from torch import Tensor


class UniformSample:
    """At most `keep` of the rows seen, every one with the same chance, in the order in which they came.

    Parameters
    ----------
    keep
        Rows that are kept at most.
    generator
        Draws the lots.

    Examples
    --------
    >>> import torch
    >>> from subspan.statistics import UniformSample
    >>> sample = UniformSample(3, torch.Generator().manual_seed(0))
    >>> (drawn,) = sample.update(torch.arange(5)).update(torch.arange(5, 10)).rows()
    >>> len(drawn), bool((drawn.diff() > 0).all())
    (3, True)
    """

    def __init__(self, keep: int, generator: torch.Generator) -> None:
        self._keep = keep
        self._generator = generator
        self._parts: list[tuple[Tensor, ...]] = []

    def update(self, *columns: Tensor) -> UniformSample:
        """Draw among rows that several tensors (n, …) describe; returns self."""
        lots = torch.rand(len(columns[0]), generator=self._generator, dtype=torch.float64)
        self._parts.append((lots, *columns))
        if sum(len(part[0]) for part in self._parts) > 2 * self._keep:
            self._parts = [self._drawn()]
        return self

    def rows(self) -> tuple[Tensor, ...]:
        """The sample so far, one tensor (m, …) a column."""
        return self._drawn()[1:]

    def _drawn(self) -> tuple[Tensor, ...]:
        lots, *columns = (torch.cat(column) for column in zip(*self._parts))
        chosen = lots.argsort(stable=True)[: self._keep].sort().values
        return lots[chosen], *(column[chosen.to(column.device)] for column in columns)
