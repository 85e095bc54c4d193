"""One-to-one matching by linear assignment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from subspan.base import check_matrix


def assign(scores: Any, *, maximize: bool = True, random_state: int | None = 0) -> Int[Tensor, " m"]:
    """The column of each row in the one-to-one matching with the best total.

    Parameters
    ----------
    scores
        (m, n).
    maximize
        Whether the largest total is best, or the smallest.
    random_state
        Shuffles the columns first, so that equal scores do not favour the order in which they came; None leaves them.

    Returns
    -------
    Columns (m,); -1 where a row gets none (m > n).

    Raises
    ------
    ValueError
        For NaN or infinity.

    References
    ----------
    Kuhn (1955), The Hungarian method for the assignment problem. Crouse (2016), On implementing 2D assignment
    algorithms.

    Examples
    --------
    >>> from subspan.solvers import assign
    >>> assign([[0.9, 0.8], [0.85, 0.1]])  # the best of each row would be column 0 for both
    tensor([1, 0])
    """
    table = check_matrix(scores, "scores")
    columns = table.shape[1]
    order = np.arange(columns) if random_state is None else np.random.default_rng(random_state).permutation(columns)
    rows, chosen = linear_sum_assignment(table.detach().cpu().double().numpy()[:, order], maximize=maximize)
    found = torch.full((len(table),), -1, dtype=torch.int64)
    found[torch.from_numpy(rows)] = torch.from_numpy(order[chosen])
    return found.to(table.device)
