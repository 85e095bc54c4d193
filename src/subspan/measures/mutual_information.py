"""Mutual information between the units of two layers, from histograms."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspan.base import check_matrix

_SILENT = 1e-6
_ROWS = 2048
_CELLS = 1 << 25


def mutual_information(x: Any, y: Any, *, bins: int = 10) -> Float[Tensor, "p q"]:
    """Mutual information of every column of x with every column of y, each cut into quantiles.

    Values below 1e-6 in magnitude, where a ReLU is silent, have a bin of their own; the others make `bins` bins of
    equal counts. Bias corrected (Miller, 1955), so that independent columns give 0 on average.

    Parameters
    ----------
    x, y
        Paired rows (n, p) and (n, q).
    bins
        Quantiles a column, in [2, n].

    Returns
    -------
    Tensor, (p, q), in nats.

    Raises
    ------
    ValueError
        For NaN, unequal rows, or fewer rows than bins.

    References
    ----------
    Li et al. (2016), arXiv 1511.07543.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import mutual_information
    >>> x = np.random.default_rng(0).normal(size=(2000, 2))
    >>> found = mutual_information(x, np.exp(x[:, :1]))  # a function of the first column
    >>> bool(found[0, 0] > 2), bool(found[1, 0].abs() < 0.05)
    (True, True)
    """
    a, b = check_matrix(x, "x"), check_matrix(y, "y")
    if len(a) != len(b):
        raise ValueError(f"y: expected {len(a)} rows to pair with x, got {len(b)}")
    if bins < 2 or len(a) < bins:
        raise ValueError(f"bins: at least 2 and at most the {len(a)} rows, got {bins}")
    cells = bins + 1
    first, second = _binned(a, bins), _binned(b.to(a.device), bins)
    found = [
        _from_codes(first, part, cells) for part in second.split(max(1, _CELLS // (first.shape[1] * cells**2)), dim=1)
    ]
    return torch.cat(found, dim=1)


def _binned(rows: Tensor, bins: int) -> Int[Tensor, "n p"]:
    """Bin of each value: 0 for silence, 1 … bins by quantile of the values that are not."""
    codes = torch.zeros(rows.shape, dtype=torch.int64, device=rows.device)
    levels = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    for column in range(rows.shape[1]):
        values = rows[:, column].double()
        active = values.abs() >= _SILENT
        if bool(active.any()):
            loud = values[active].contiguous()
            ordered = loud.sort().values
            edges = ordered[(levels * (len(ordered) - 1)).round().long().to(ordered.device)]
            codes[active, column] = 1 + torch.searchsorted(edges.contiguous(), loud, right=True)
    return codes


def _from_codes(a: Int[Tensor, "n p"], b: Int[Tensor, "n r"], cells: int) -> Float[Tensor, "p r"]:
    n, p, r = len(a), a.shape[1], b.shape[1]
    counts = torch.zeros(p * cells, r * cells, dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(_ROWS), b.split(_ROWS)):
        one = torch.nn.functional.one_hot(left, cells).flatten(1).float()
        two = torch.nn.functional.one_hot(right, cells).flatten(1).float()
        counts += (one.mT @ two).double()
    joint = counts.reshape(p, cells, r, cells).movedim(2, 1)
    tables = (joint.sum(3), joint.sum(2), joint.flatten(2))
    entropy = [torch.special.entr(table / n).sum(-1) for table in tables]
    occupied = [(table > 0).sum(-1).double() for table in tables]
    bias = (occupied[0] + occupied[1] - occupied[2] - 1) / (2 * n)
    return entropy[0] + entropy[1] - entropy[2] + bias
