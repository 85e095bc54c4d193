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
    """The column of each row (m, n) in the one-to-one matching with the best total; -1 where a row gets none (m > n).

    Columns are shuffled by `random_state` first, so that equal scores do not favour the order in which they came; None
    leaves them. Raises ValueError for NaN or infinity. Source: Kuhn (1955); Crouse (2016).
    """
    table = check_matrix(scores, "scores")
    columns = table.shape[1]
    order = np.arange(columns) if random_state is None else np.random.default_rng(random_state).permutation(columns)
    rows, chosen = linear_sum_assignment(table.detach().cpu().double().numpy()[:, order], maximize=maximize)
    found = torch.full((len(table),), -1, dtype=torch.int64)
    found[torch.from_numpy(rows)] = torch.from_numpy(order[chosen])
    return found.to(table.device)
