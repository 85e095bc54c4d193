"""Leading singular vectors and eigenvectors of matrices that are only ever multiplied with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from scipy.linalg import qr as scipy_qr
from sklearn.utils import check_random_state


@runtime_checkable
class Operator(Protocol):
    """A matrix (n, d) by its products: `matmul(y)` is A y, `rmatmul(y)` is A'y, both with blocks of columns."""

    shape: tuple[int, int]

    def matmul(self, y: Any) -> Any:
        """A y for y (d, b)."""
        ...

    def rmatmul(self, y: Any) -> Any:
        """A'y for y (n, b)."""
        ...


class MatrixOperator:
    """A dense or sparse matrix as an `Operator`."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix
        self.shape: tuple[int, int] = tuple(matrix.shape)
        self._transposed = matrix.T.tocsr() if hasattr(matrix, "tocsr") else matrix.T

    def matmul(self, y: Any) -> Any:
        """A y."""
        return self.matrix @ y

    def rmatmul(self, y: Any) -> Any:
        """A'y."""
        return self._transposed @ y


def randomized_svd(
    operator: Operator,
    rank: int,
    *,
    n_iter: int = 7,
    oversample: int = 10,
    random_state: Any = None,
    dtype: Any = np.float64,
) -> tuple[Float[np.ndarray, "n r"], Float[np.ndarray, " r"], Float[np.ndarray, "r d"]]:
    """U (n, r), singular values (r,) descending and V' (r, d) of an `Operator`, r = min(rank + oversample, n, d).

    All r triplets are returned; the first `rank` are accurate. n_iter power iterations, each orthonormalised. Signs are
    fixed so that the largest entry of each left vector is positive. Source: Halko, Martinsson & Tropp, 2011.
    """
    n, d = operator.shape
    if not 1 <= rank <= min(n, d):
        raise ValueError(f"rank: must lie in [1, {min(n, d)}], got {rank}")
    random = check_random_state(random_state)
    width = min(rank + oversample, n, d)
    y = operator.matmul(random.standard_normal((d, width)).astype(dtype))
    for _ in range(n_iter):
        y = operator.matmul(orthonormal_columns(operator.rmatmul(y)))
    q = orthonormal_columns(np.asarray(y, dtype=np.float64))
    u, s, vt = np.linalg.svd(operator.rmatmul(q.astype(dtype)).T.astype(np.float64), full_matrices=False)
    left = q @ u
    sign = np.sign(left[np.abs(left).argmax(0), np.arange(left.shape[1])])
    sign[sign == 0] = 1
    return left * sign, s, vt * sign[:, None]


def orthogonal_iteration(
    matmul: Callable[[Any], Any],
    n: int,
    k: int,
    *,
    n_iter: int = 50,
    random_state: Any = None,
    dtype: Any = np.float64,
) -> tuple[Float[np.ndarray, "n k"], Float[np.ndarray, " k"]]:
    """Orthonormal basis (n, k) of the eigenvectors of largest absolute value of a symmetric operator, and Ritz values.

    n_iter QR steps from a random orthonormal start; the Ritz values, and the basis turned to them, come by descending
    value. A rank-one term or a shift is part of `matmul`.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k: must lie in [1, {n}], got {k}")
    random = check_random_state(random_state)
    q = orthonormal_columns(random.standard_normal((n, k)).astype(dtype))
    for _ in range(n_iter):
        q = orthonormal_columns(matmul(q))
    q = orthonormal_columns(q.astype(np.float64))
    small = q.T @ np.asarray(matmul(q.astype(dtype)), dtype=np.float64)
    values, turn = np.linalg.eigh((small + small.T) / 2)
    return q @ turn[:, ::-1], values[::-1].copy()


def orthonormal_columns(y: np.ndarray) -> np.ndarray:
    """Orthonormal columns (n, b) that span those of y."""
    factors: Any = scipy_qr(y, mode="economic", overwrite_a=False, check_finite=False)
    return factors[0]
