"""Paired rows in any form, batch by batch: what every map that learns from pairs reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from subspan.base import check_matrix
from subspan.base.estimators import validate_data

from .streams import batches, is_stream


def is_streamed(rows: Any) -> bool:
    """Whether rows go past scikit-learn's validation: tensors, and what is read batch by batch."""
    return isinstance(rows, Tensor) or is_stream(rows)


def paired_rows(estimator: Any, X: Any, Y: Any, *, reset: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of X (n, d_x) with their partners of Y (n, d_y), checked; `reset`: the estimator's first rows.

    Raises ValueError for NaN, infinity, or unequal numbers of rows.
    """
    if Y is None:
        raise ValueError("requires y to be passed, but the target y is None: Y holds the rows paired with X")
    if getattr(Y, "ndim", 2) == 1 or not any(is_streamed(rows) for rows in (X, Y)):
        pair: Any = validate_data(
            estimator, X, Y, reset=reset, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2
        )
        x, y = pair
        yield check_matrix(x, "X"), check_matrix(y.reshape(len(y), -1).astype(np.float64), "Y")
        return
    try:
        for x, y in zip(batches(X), batches(Y), strict=True):
            if len(x) != len(y):
                raise ValueError(f"Y: expected {len(x)} rows to pair with X, got {len(y)}")
            yield check_matrix(x, "X"), check_matrix(y, "Y").to(x.device)
    except ValueError as error:
        if "zip()" in str(error):
            raise ValueError("Y: must have as many rows as X, in batches of the same sizes") from error
        raise
