"""Of tasks that are tried several times, how many are solved at k tries."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def pass_at_k(solved: Bool[np.ndarray, "n m"], k: int) -> Float[np.ndarray, " n"]:
    """Of each task the chance that at least one of k tries solves it, estimated without bias from m tries.

    Parameters
    ----------
    solved
        (n, m) whether each try solved its task.
    k
        At most m.

    Returns
    -------
    array (n,): 1 - C(m - c, k) / C(m, k) for c tries that solved it. With k = 1 the share of them.

    Raises
    ------
    ValueError
        For k out of range.

    References
    ----------
    Chen et al. (2021), Evaluating large language models trained on code, arXiv 2107.03374.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import pass_at_k
    >>> pass_at_k(np.array([[True, False, False, False], [True, True, True, False]]), 2).tolist()
    [0.5, 1.0]
    """
    tries = np.asarray(solved, bool)
    many = tries.shape[1]
    if not 1 <= k <= many:
        raise ValueError(f"k: an integer from 1 to the number of tries {many}, got {k}")
    failed = many - tries.sum(1)
    # The chance that k tries, drawn without putting any back, all failed.
    left = np.clip(failed[:, None] - np.arange(k), 0, None)
    return 1 - (left / (many - np.arange(k))).prod(1)
