"""The work of `subspan select`: a few rows that stand for all."""

from __future__ import annotations

import numpy as np

from subspan.base import Progress, silent
from subspan.datasets import Rows
from subspan.select import LeverageSelector, retention
from subspan.select.baselines import distinct_rows, k_center, k_medoids, random_rows
from subspan.select.leverage import budget

from .columns import Found, calling, check_rank, naming
from .survey import first_copies


def select_rows(
    data: Rows,
    size: int | float = 0.1,
    *,
    method: str = "medoids",
    unique: bool = False,
    rank: int | float | str = 0.9,
    seed: int = 0,
    progress: Progress = silent,
) -> Found:
    """Choose a number or share of the rows, in the order of the data, and say how much of the energy they keep.

    method: "leverage" (the highest), "sample" (drawn by it), "medoids", "farthest" or "random". unique: copies and near
    copies of earlier rows are left out first.
    """
    check_rank(rank, data)
    pool = np.flatnonzero(first_copies(data) == np.arange(len(data))) if unique else np.arange(len(data))
    rows = data.take(pool)
    if unique:
        progress("looking for near copies", 0.3)
        distinct = distinct_rows(rows)
        pool, rows = pool[distinct], rows[distinct]
    try:
        count = budget(size, len(pool))
    except ValueError as error:
        raise ValueError(str(error).replace("n_select:", "--size:")) from error
    progress("choosing", 0.5)
    leverage = None
    with calling(data):
        if method in ("leverage", "sample"):
            strategy = "top" if method == "leverage" else "sample"
            selector = LeverageSelector(count, rank=rank, strategy=strategy, random_state=seed).fit(rows)
            chosen, leverage = selector.indices_, selector.scores_
        elif method == "medoids":
            chosen = k_medoids(rows, count, random_state=seed)
        elif method == "farthest":
            chosen = np.sort(k_center(rows, count, random_state=seed))
        else:
            chosen = random_rows(len(rows), count, random_state=seed)
        kept = retention(rows, chosen, rank)
    columns = naming(data, pool[chosen])
    if leverage is not None:
        columns["leverage"] = leverage[chosen].tolist()
    if data.texts is not None:
        columns["text"] = [data.texts[row] for row in pool[chosen]]
    facts = {"rows": len(data), "candidates": len(pool), "chosen": len(chosen), "method": method}
    return Found(columns, {**facts, "retention": kept})
