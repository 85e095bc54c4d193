"""Graphs as sparse matrices, and polynomials of them applied to attributes without ever forming a power."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

_DENSE_NODES = 5000


def as_adjacency(adjacency: Any, n: int, name: str = "adjacency") -> sparse.csr_matrix:
    """An undirected graph of n nodes as a symmetric CSR matrix of non-negative float64 weights; loops are kept.

    Parameters
    ----------
    adjacency
        A SciPy sparse matrix, a torch sparse tensor, an edge index (2, m) of integers, each edge in one direction or
        both, or, up to 5000 nodes, a dense square array. An asymmetric matrix is symmetrised by the larger of the two
        weights, with a warning.
    n
        Number of nodes.
    name
        What an error calls `adjacency`.

    Returns
    -------
    CSR matrix (n, n).

    Raises
    ------
    ValueError
        For a wrong shape, NaN, negative weights, or nodes out of range.
    TypeError
        For anything else.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import as_adjacency
    >>> as_adjacency(np.array([[0, 1], [1, 2]]), 3).toarray().tolist()  # the edges 0-1 and 1-2
    [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    if isinstance(adjacency, Tensor) and adjacency.layout != torch.strided:
        coo = adjacency.detach().cpu().to_sparse_coo().coalesce()
        rows, columns = coo.indices().numpy()
        matrix: Any = sparse.csr_matrix((coo.values().double().numpy(), (rows, columns)), shape=tuple(coo.shape))
    elif sparse.issparse(adjacency):
        matrix = sparse.csr_matrix(adjacency, dtype=np.float64, copy=True)
    else:
        array = adjacency.detach().cpu().numpy() if isinstance(adjacency, Tensor) else np.asarray(adjacency)
        if array.ndim == 2 and array.shape[0] == 2 and array.dtype.kind in "iu" and n != 2:
            return _from_edges(array, n, name)
        if array.ndim != 2 or array.dtype.kind not in "fiub":
            raise TypeError(
                f"{name}: expected a sparse matrix, an edge index (2, m) of integers or a square array, "
                f"got shape {array.shape} of {array.dtype}"
            )
        if len(array) > _DENSE_NODES:
            raise ValueError(f"{name}: a dense array of {len(array)} nodes; give a sparse matrix or an edge index")
        matrix = sparse.csr_matrix(array.astype(np.float64))
    if matrix.shape != (n, n):
        raise ValueError(f"{name}: expected shape ({n}, {n}), one row a row of X, got {tuple(matrix.shape)}")
    matrix.sum_duplicates()
    if not np.isfinite(matrix.data).all():
        raise ValueError(f"{name}: holds NaN or infinite weights")
    if (matrix.data < 0).any():
        raise ValueError(f"{name}: {int((matrix.data < 0).sum())} weights are negative; they must be >= 0")
    matrix.eliminate_zeros()
    transposed = matrix.T.tocsr()
    if abs(matrix - transposed).max() > 1e-10 * max(1.0, float(matrix.data.max(initial=0.0))):
        warnings.warn(f"{name}: is not symmetric; the larger of the two weights is taken", stacklevel=3)
        matrix = matrix.maximum(transposed)
    return sparse.csr_matrix(matrix)


def _from_edges(edges: np.ndarray, n: int, name: str) -> sparse.csr_matrix:
    if edges.size and not (edges.min() >= 0 and edges.max() < n):
        raise ValueError(f"{name}: the edge index names nodes {edges.min()} to {edges.max()}; there are {n}, from 0")
    index = edges.astype(np.int64)
    ones = np.ones(index.shape[1])
    matrix = sparse.csr_matrix((ones, (index[0], index[1])), shape=(n, n))
    matrix.data[:] = 1
    return sparse.csr_matrix(matrix.maximum(matrix.T))


def symmetric_normalized(adjacency: sparse.csr_matrix) -> sparse.csr_matrix:
    """D^(-1/2) A D^(-1/2) with the degrees D; nodes without edges stay zero.

    Parameters
    ----------
    adjacency
        CSR matrix A (n, n) as from `as_adjacency`.

    Returns
    -------
    CSR matrix (n, n) with eigenvalues in [-1, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import as_adjacency, symmetric_normalized
    >>> symmetric_normalized(as_adjacency(np.array([[0.0, 4.0], [4.0, 0.0]]), 2)).toarray().tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    degree = np.asarray(adjacency.sum(1)).ravel()
    scale = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0.0)
    return sparse.csr_matrix(sparse.diags(scale) @ adjacency @ sparse.diags(scale))


def transition_matrix(adjacency: sparse.csr_matrix, loops: int = 2) -> sparse.csr_matrix:
    """Row-stochastic matrix of a walk on a graph.

    Parameters
    ----------
    adjacency
        CSR matrix A (n, n) as from `as_adjacency`.
    loops
        1: rownorm(A + I); 2: rownorm(D^(-1/2)(A + I)D^(-1/2) + I) with the degrees D of A + I.

    Returns
    -------
    CSR matrix (n, n), rows of sum 1.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import as_adjacency, transition_matrix
    >>> transition_matrix(as_adjacency(np.array([[0], [1]]), 3), loops=1).toarray().tolist()  # node 2 stays where it is
    [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    """
    if loops not in (1, 2):
        raise ValueError(f"loops: expected 1 or 2, got {loops!r}")
    identity = sparse.identity(adjacency.indptr.size - 1, format="csr")
    matrix = sparse.csr_matrix(adjacency + identity)
    if loops == 2:
        matrix = sparse.csr_matrix(symmetric_normalized(matrix) + identity)
    return sparse.csr_matrix(sparse.diags(1 / np.asarray(matrix.sum(1)).ravel()) @ matrix)


def geometric_weights(order: int, decay: float) -> Float[np.ndarray, " t"]:
    """w_t proportional to decay^t for t = 0 … order, with sum 1.

    Computed from logarithms, so that no power overflows.

    Parameters
    ----------
    order
        Largest t, at least 0.
    decay
        Any finite number >= 0; above 1 far hops weigh more.

    Returns
    -------
    Weights (order + 1,).

    Examples
    --------
    >>> from subspan.solvers import geometric_weights
    >>> geometric_weights(3, 1.0).tolist(), geometric_weights(1, 0.0).tolist()
    ([0.25, 0.25, 0.25, 0.25], [1.0, 0.0])
    """
    if order < 0:
        raise ValueError(f"order: must be at least 0, got {order}")
    if not decay >= 0 or math.isinf(decay):
        raise ValueError(f"decay: must be a finite number >= 0, got {decay}")
    steps = np.arange(order + 1)
    if decay == 0:
        return (steps == 0).astype(np.float64)
    exponents = steps * math.log(decay)
    weights = np.exp(exponents - exponents.max())
    return weights / weights.sum()


class PolynomialFilter:
    """sum_t weights[t] P^t of a square matrix P, applied without forming a power.

    With weights of sum 1 and a stochastic P every number on the way stays as large as the input. Without `spectrum` it
    is summed by Horner's rule, `order` products with P.

    Parameters
    ----------
    matrix
        P (n, n), dense or sparse, numpy or torch.
    weights
        Finite numbers, from t = 0 on; at least one.
    spectrum
        An interval that holds the eigenvalues of P (a SciPy sparse matrix), where they are known to be real: the same
        polynomial is then summed in Chebyshev polynomials on it, whose coefficients vanish after some √order of them.
        None: not known.
    tolerance
        Coefficients are left out up to those whose sum is below this share of the weights.

    Attributes
    ----------
    steps
        Products with P that applying the filter takes.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import PolynomialFilter
    >>> swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> PolynomialFilter(swap, [0.5, 0.25, 0.25]).matmul(np.array([[4.0], [0.0]])).tolist()
    [[3.0], [1.0]]
    """

    def __init__(
        self, matrix: Any, weights: Any, *, spectrum: tuple[float, float] | None = None, tolerance: float = 1e-12
    ) -> None:
        if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix: must be square, got shape {tuple(matrix.shape)}")
        self.matrix = matrix
        self.weights = [float(weight) for weight in weights]
        if not self.weights or not all(map(math.isfinite, self.weights)):
            raise ValueError("weights: expected at least one finite number")
        self.shape: tuple[int, int] = tuple(matrix.shape)
        self._transposed: Any = None
        self._chebyshev = None if spectrum is None else _chebyshev_coefficients(self.weights, spectrum, tolerance)
        if spectrum is not None and self.steps < len(self.weights) - 1:
            low, high = spectrum
            identity = sparse.identity(self.shape[0], dtype=matrix.dtype, format="csr")
            # Twice P moved to [-1, 1], the factor of the recurrence T_(k+1) = 2 x T_k - T_(k-1).
            moved = (4 * matrix - 2 * (high + low) * identity) / (high - low)
            self._recurrence = sparse.csr_matrix(moved, dtype=matrix.dtype)
        else:
            self._chebyshev = None

    @property
    def steps(self) -> int:
        """Products with P that applying the filter takes."""
        return len(self.weights if self._chebyshev is None else self._chebyshev) - 1

    def matmul(self, x: Any) -> Any:
        """The filter applied to x (n, b)."""
        if self._chebyshev is not None:
            return self._clenshaw(self._recurrence, x)
        return self._horner(self.matrix, x)

    def rmatmul(self, y: Any) -> Any:
        """The transposed filter applied to y (n, b)."""
        if self._transposed is None:
            matrix = self.matrix if self._chebyshev is None else self._recurrence
            turned: Any = matrix.T if not isinstance(matrix, Tensor) else matrix.t()
            self._transposed = turned.tocsr() if sparse.issparse(turned) else turned
        return (self._horner if self._chebyshev is None else self._clenshaw)(self._transposed, y)

    def _horner(self, matrix: Any, x: Any) -> Any:
        result = x * self.weights[-1]
        for weight in reversed(self.weights[:-1]):
            result = matrix @ result
            if weight == 0:
                continue
            if isinstance(result, np.ndarray):
                result += weight * x
            else:
                result = result + weight * x
        return result

    def _clenshaw(self, recurrence: Any, x: np.ndarray) -> np.ndarray:
        """Clenshaw's summation of the Chebyshev series."""
        assert self._chebyshev is not None
        coefficients = [x.dtype.type(each) for each in self._chebyshev]
        after, last, scaled = np.zeros_like(x), coefficients[-1] * x, np.empty_like(x)
        for coefficient in coefficients[-2:0:-1]:
            fresh = recurrence @ last
            fresh -= after
            fresh += np.multiply(x, coefficient, out=scaled)
            after, last = last, fresh
        result = recurrence @ last
        result *= 0.5
        result -= after
        result += np.multiply(x, coefficients[0], out=scaled)
        return result


def _chebyshev_coefficients(
    weights: list[float], spectrum: tuple[float, float], tolerance: float
) -> Float[np.ndarray, " m"]:
    """Coefficients on `spectrum`, cut where the rest sums to less than `tolerance` times the sum of the weights."""
    low, high = spectrum
    if not low < high:
        raise ValueError(f"spectrum: expected an interval (low, high), got {spectrum}")

    def polynomial(y: Any) -> Any:
        return np.polynomial.polynomial.polyval((high - low) / 2 * y + (high + low) / 2, weights)

    coefficients = np.polynomial.chebyshev.chebinterpolate(polynomial, len(weights) - 1)
    left_out = np.abs(coefficients[::-1]).cumsum()[::-1]
    kept = int((left_out > tolerance * np.abs(weights).sum()).sum())
    return coefficients[: max(2, kept)]


class FilteredOperator:
    """F X for a filter F (n, n) and attributes X (n, d), never formed: an `Operator`.

    Parameters
    ----------
    polynomial
        F, a `PolynomialFilter`.
    attributes
        X, dense or sparse.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import FilteredOperator, PolynomialFilter
    >>> swap = PolynomialFilter(np.array([[0.0, 1.0], [1.0, 0.0]]), [0.0, 1.0])
    >>> FilteredOperator(swap, np.array([[1.0, 0.0], [0.0, 5.0]])).matmul(np.array([[1.0], [1.0]])).tolist()
    [[5.0], [1.0]]
    """

    def __init__(self, polynomial: PolynomialFilter, attributes: Any) -> None:
        self.polynomial, self.attributes = polynomial, attributes
        self._transposed = attributes.T.tocsr() if sparse.issparse(attributes) else attributes.T
        self.shape: tuple[int, int] = tuple(attributes.shape)

    def matmul(self, y: Any) -> Any:
        """F X y."""
        return self.polynomial.matmul(self.attributes @ y)

    def rmatmul(self, y: Any) -> Any:
        """X'F'y."""
        return self._transposed @ self.polynomial.rmatmul(y)


def smooth(x: Any, adjacency: Any, order: int = 10, decay: float = 0.9, *, loops: int = 2) -> Any:
    """sum_t w_t P^t x: attributes averaged over walks on a graph.

    P is `transition_matrix`, w_t are `geometric_weights`.

    Parameters
    ----------
    x
        Attributes (n, d), dense or sparse.
    adjacency
        Graph of the n rows, as `as_adjacency` takes it.
    order
        Longest walk, in steps.
    decay
        Weight of a walk against one of a step less.
    loops
        As in `transition_matrix`.

    Returns
    -------
    (n, d): a tensor, differentiable in x, for a tensor; else a numpy array.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.solvers import smooth
    >>> smooth(np.array([[0.0], [2.0]]), np.array([[0, 1], [1, 0]]), order=1, decay=1.0, loops=1).tolist()
    [[0.5], [1.5]]
    """
    n = len(x) if isinstance(x, Tensor) else x.shape[0]
    given: Any = x
    matrix: Any = transition_matrix(as_adjacency(adjacency, n), loops)
    if isinstance(x, Tensor):
        coo = matrix.tocoo()
        index = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
        matrix = torch.sparse_coo_tensor(index, torch.from_numpy(coo.data), coo.shape, dtype=x.dtype, device=x.device)
    rows = given.toarray() if sparse.issparse(x) else x if isinstance(x, Tensor) else np.asarray(x, dtype=np.float64)
    return PolynomialFilter(matrix, geometric_weights(order, decay)).matmul(rows)
