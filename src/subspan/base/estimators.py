"""The door of the estimators: scikit-learn's validation, and what it lets pass without a word."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import validation
from torch import Tensor

from .arrays import check_finite, from_numpy, has_finite_square, refuse_masked


def validate_data(estimator: Any, X: Any = "no_validation", y: Any = "no_validation", **options: Any) -> Any:
    """`sklearn.utils.validation.validate_data`, which also refuses masked entries and takes tensors with a gradient.

    Single-precision rows whose squares would overflow come back in double precision; ValueError where that would not
    help either.
    """
    found = validation.validate_data(estimator, _readable(X, "X"), _readable(y, "y"), **options)
    return tuple(_in_range(x, name) for x, name in zip(found, "Xy")) if isinstance(found, tuple) else _in_range(found)


def check_array(x: Any, *, input_name: str, **options: Any) -> Any:
    """`sklearn.utils.validation.check_array`, for what is no estimator's X, with the same additions."""
    return _in_range(validation.check_array(_readable(x, input_name), input_name=input_name, **options), input_name)


def _readable(x: Any, name: str) -> Any:
    refuse_masked(x, name)
    return x.detach() if isinstance(x, Tensor) else x


def _in_range(x: Any, name: str = "X") -> Any:
    if not isinstance(x, np.ndarray) or x.dtype not in (np.float16, np.float32, np.float64):
        return x
    rows = from_numpy(np.ascontiguousarray(x)) if any(step < 0 for step in x.strides) else from_numpy(x)
    # NaN is left to the checks that name the row, where scikit-learn was told to let it pass.
    if has_finite_square(rows) or not np.isfinite(x).all():
        return x
    return check_finite(rows, name).numpy()
