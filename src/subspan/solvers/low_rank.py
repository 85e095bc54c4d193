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
    """A matrix (n, d) by its products: `matmul(y)` is A y, `rmatmul(y)` is A'y, both with blocks of columns.

    Attributes
    ----------
    shape
        (n, d).
    """

    shape: tuple[int, int]

    def matmul(self, y: Any) -> Any:
        """A y for y (d, b)."""
        ...

    def rmatmul(self, y: Any) -> Any:
        """A'y for y (n, b)."""
        ...


class MatrixOperator:
    """A dense or sparse matrix as an `Operator`.

    Parameters
    ----------
    matrix
        (n, d), numpy, SciPy sparse or torch.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import MatrixOperator, Operator
    >>> operator = MatrixOperator(np.array([[1.0, 2.0], [0.0, 3.0]]))
    >>> isinstance(operator, Operator), operator.rmatmul(np.array([[1.0], [1.0]])).tolist()
    (True, [[1.0], [5.0]])
    """

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
    """Leading singular triplets of a matrix that is only multiplied with.

    Signs are fixed so that the largest entry of each left vector is positive.

    Parameters
    ----------
    operator
        `Operator` of shape (n, d).
    rank
        Triplets asked for, in [1, min(n, d)].
    n_iter
        Power iterations, each orthonormalised.
    oversample
        Directions beyond `rank` that are iterated too.
    random_state
        Seed of the first directions; None: another each time.
    dtype
        Of the products.

    Returns
    -------
    U (n, r), singular values (r,) descending and V' (r, d)
        r = min(rank + oversample, n, d): all r triplets are returned, the first `rank` are accurate.

    References
    ----------
    Halko, Martinsson & Tropp (2011), arXiv 0909.4061.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import MatrixOperator, randomized_svd
    >>> u, s, vt = randomized_svd(MatrixOperator(np.diag([1.0, 4.0, 2.0, 3.0])), 2, random_state=0)
    >>> s[:2].round(6).tolist()
    [4.0, 3.0]
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
    """Eigenvectors of largest absolute value of a symmetric operator, and their Ritz values.

    Parameters
    ----------
    matmul
        Product of the operator with a block of columns (n, k); a rank-one term or a shift is part of it.
    n
        Dimension.
    k
        Eigenvectors asked for, in [1, n].
    n_iter
        QR steps from a random orthonormal start.
    random_state
        Seed of the start; None: another each time.
    dtype
        Of the products.

    Returns
    -------
    Orthonormal basis (n, k), turned to the Ritz values, and these (k,), descending.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import orthogonal_iteration
    >>> matrix = np.diag([1.0, -2.0, 3.0])
    >>> orthogonal_iteration(lambda y: matrix @ y, 3, 2, random_state=0)[1].round(6).tolist()
    [3.0, -2.0]
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
    """Orthonormal columns that span those of y.

    Parameters
    ----------
    y
        (n, b).

    Returns
    -------
    (n, min(n, b)).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import orthonormal_columns
    >>> q = orthonormal_columns(np.array([[3.0, 1.0], [4.0, 1.0], [0.0, 1.0]]))
    >>> bool(np.allclose(q.T @ q, np.eye(2)))
    True
    """
    factors: Any = scipy_qr(y, mode="economic", overwrite_a=False, check_finite=False)
    return factors[0]
