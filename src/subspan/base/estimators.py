"""The door of the estimators: rows of any kind come in through it, checked once; answers leave in the kind of the rows.

scikit-learn's validation is the ground: it knows names of columns and frames. Tensors stay on their device. What it
lets pass without a word (masked entries, squares that overflow) is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.utils import validation
from torch import Tensor

from .arrays import check_finite, check_matrix, from_numpy, has_finite_square, refuse_masked
from .parameters import check_parameters
from .streams import batches, is_stream

_FLOATS = (np.float64, np.float32)
_BATCH = 8192


class Estimator(BaseEstimator):
    """Base of the estimators. Subclasses are dataclasses, `@dataclass(eq=False, repr=False)`: fields are parameters.

    Rows may be an array, a tensor, a frame (`_rows`), or, where an estimator says so, also a stream of batches, a file
    or a Dask array (`_batches`). Numpy in, numpy out; torch in, torch out on its device (`subspan.base.like`).
    """

    n_features_in_: int
    _shape: tuple[int, ...]
    # As scikit-learn asks, it is not the constructor that checks the parameters: run-time type checkers leave it alone.
    __no_type_check__ = True

    def _check_parameters(self) -> None:
        """Refuse parameters that make no sense; called before any data is read."""
        check_parameters(self)

    def _rows(
        self, X: Any, *, reset: bool = False, min_rows: int | None = None, **options: Any
    ) -> Float[Tensor, "n d"]:
        """X as a finite matrix of floating numbers; `reset`: those of a first fit, else of the columns of that one.

        min_rows: by default 2 in a fit. options: of scikit-learn's `validate_data`.
        """
        least = min_rows if min_rows is not None else 2 if reset else 1
        if isinstance(X, Tensor):
            rows = check_matrix(X, "X", columns=None if reset else self.n_features_in_, min_rows=least)
            if reset:
                self._set_width(rows.shape[1])
            return rows
        # Finite values are looked at once, in `check_matrix`, which names the row.
        options = {"dtype": _FLOATS, "ensure_min_samples": least, "ensure_all_finite": False, **options}
        return check_matrix(validate_data(self, X, reset=reset, **options), "X")

    def _items(self, X: Any, *, reset: bool = False) -> Float[Tensor, "n c *p"]:
        """X as `_rows`, or maps or images (n, c, h, w) in single precision; of the shape of the fit."""
        if getattr(X, "ndim", 2) != 4:
            if not reset and len(self._shape) == 3:
                raise ValueError(f"X: expected items of shape {self._shape}, as in fit, got {np.shape(X)}")
            items = self._rows(X, reset=reset)
        else:
            options: dict[str, Any] = {"dtype": np.float32, "allow_nd": True, "ensure_min_samples": 1 + reset}
            items = torch.from_numpy(np.array(validate_data(self, in_numpy(X), reset=reset, **options)))
        shape = tuple(items.shape[1:])
        if not reset and shape != self._shape:
            raise ValueError(f"X: expected items of shape {self._shape}, as in fit, got {shape}")
        if reset:
            self._shape = shape
        return items

    def _batches(self, X: Any, *, reset: bool = False, size: int = _BATCH) -> Iterator[Float[Tensor, "n d"]]:
        """The same in blocks of `size` rows, also of what is read batch by batch (see `streams.batches`)."""
        if not is_stream(X):
            yield from self._rows(X, reset=reset, min_rows=1).split(size)
            return
        for rows in batches(X, size):
            rows = check_matrix(rows, "X", columns=None if reset else self.n_features_in_, min_rows=0)
            if reset:
                self._set_width(rows.shape[1])
                reset = False
            yield rows

    def _set_width(self, columns: int) -> None:
        self.n_features_in_ = columns
        self.__dict__.pop("feature_names_in_", None)


class PairedEstimator(Estimator):
    """Base of the estimators that learn from rows X (n, d_x) and the rows Y (n, d_y) that they are paired with."""

    def _pairs(self, X: Any, Y: Any, *, reset: bool) -> Iterator[tuple[Float[Tensor, "n p"], Float[Tensor, "n q"]]]:
        """Batches of X with their partners of Y. Raises ValueError for NaN, infinity, or unequal numbers of rows."""
        if Y is None:
            raise ValueError("requires y to be passed, but the target y is None: Y holds the rows paired with X")
        if getattr(Y, "ndim", 2) == 1 or not any(isinstance(rows, Tensor) or is_stream(rows) for rows in (X, Y)):
            options: Any = {"multi_output": True, "y_numeric": True, "ensure_min_samples": 2}
            x, y = validate_data(self, X, Y, reset=reset, dtype=np.float64, **options)
            yield check_matrix(x, "X"), check_matrix(y.reshape(len(y), -1).astype(np.float64), "Y")
            return
        try:
            for x, y in zip(batches(X), batches(Y), strict=True):
                if len(x) != len(y):
                    raise ValueError(f"Y: expected {len(x)} rows to pair with X, got {len(y)}")
                if reset:
                    self._set_width(x.shape[1])
                    reset = False
                yield check_matrix(x, "X", columns=self.n_features_in_), check_matrix(y, "Y").to(x.device)
        except ValueError as error:
            if "zip()" in str(error):
                raise ValueError("Y: must have as many rows as X, in batches of the same sizes") from error
            raise

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = False
        return tags


def in_numpy(x: Any) -> Any:
    """A tensor as an array on the CPU (half precision as single), anything else as it is."""
    return at_least_single(x.detach().cpu()).numpy() if isinstance(x, Tensor) else x


def at_least_single(rows: Tensor) -> Tensor:
    """Half precision as single precision, anything else as it is."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


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
