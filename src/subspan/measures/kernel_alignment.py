"""Centred kernel alignment through n × n kernels, for kernels that have no closed form in moments.

For the linear kernel `JointMoments.cka` and `JointMoments.local_cka` give the same numbers without any kernel matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base import check_matrix

from .kernels import gaussian_kernel

_BLOCK_BYTES = 1 << 28
MOST_KERNEL_ROWS = 5000
"""Rows up to which local alignment is computed through kernels: beyond, one kernel takes over 200 MB for each query."""


def gram_matrix(rows: Any, kernel: str = "linear") -> Float[Tensor, "n n"]:
    """Kernel of rows, in float64.

    Parameters
    ----------
    rows
        (n, d).
    kernel
        "linear", or "rbf" (Gaussian with the median distance as its width).

    Returns
    -------
    Tensor, (n, n).

    Examples
    --------
    >>> from subspan.measures import gram_matrix
    >>> gram_matrix([[1.0, 0.0], [1.0, 2.0]]).tolist()
    [[1.0, 1.0], [1.0, 5.0]]
    """
    x = check_matrix(rows, "rows").double()
    if kernel == "linear":
        return x @ x.mT
    if kernel != "rbf":
        raise ValueError(f"kernel: expected 'linear' or 'rbf', got {kernel!r}")
    return gaussian_kernel(x)


def _unit_centred(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """HKH scaled to Frobenius norm 1, so that the alignment of two kernels is an inner product."""
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    return centred / torch.linalg.matrix_norm(centred)


def _unit_u_centred(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The kernel without its diagonal, centred such that products are unbiased, scaled to Frobenius norm 1."""
    n = len(gram)
    centred = _unit_centred(gram)  # leaves the rest as it is and keeps the digits of kernels far from the origin
    centred = centred - centred.diagonal().diag()
    mean = centred.sum(0) / (n - 2)
    centred = centred - mean - mean.unsqueeze(1) + centred.sum() / ((n - 1) * (n - 2))
    centred = centred - centred.diagonal().diag()
    return centred / torch.linalg.matrix_norm(centred)


def kernel_cka(x: Any, y: Any, kernel: str = "linear", *, debiased: bool = False) -> float:
    """Centred kernel alignment of paired rows, by its definition; O(n²) memory.

    For the linear kernel `JointMoments.cka` gives the same number without any kernel matrix.

    Parameters
    ----------
    x, y
        Rows (n, d_x) and (n, d_y).
    kernel
        As in `gram_matrix`.
    debiased
        Whether it is 0 on average for unrelated rows, which the plain one is not for few rows in many dimensions; it
        may then be negative.

    Returns
    -------
    Alignment in [0, 1], or below 0 when debiased.

    Raises
    ------
    ValueError
        For unequal n or constant rows, and for fewer than 4 rows when debiased.

    References
    ----------
    Kornblith et al. (2019), arXiv 1905.00414. Debiased: Song et al. (2012).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import kernel_cka
    >>> x, y = np.random.default_rng(0).normal(size=(2, 20, 50))  # unrelated, few rows in many dimensions
    >>> kernel_cka(x, y) > 0.5, abs(kernel_cka(x, y, debiased=True)) < 0.2, round(kernel_cka(x, -3 * x + 1), 6)
    (True, True, 1.0)
    """
    a, b = gram_matrix(x, kernel), gram_matrix(y, kernel)
    if len(a) != len(b):
        raise ValueError(f"y: expected {len(a)} rows to pair with x, got {len(b)}")
    if debiased and len(a) < 4:
        raise ValueError(f"x: at least 4 rows are needed, got {len(a)}")
    centred = _unit_u_centred if debiased else _unit_centred
    value = float((centred(a) * centred(b)).sum())
    if value != value:
        raise ValueError("x, y: one of them is constant, so the alignment is not defined")
    return value


def local_kernel_cka(anchors_x: Any, anchors_y: Any, x: Any, y: Any, *, kernel: str = "rbf") -> Float[Tensor, "m p"]:
    """Alignment of paired anchors with the pair (x_i, y_j) added, for every i and j.

    The width of "rbf" is the median distance, recomputed with each added row. O((n + 1)² m p) time. For the linear
    kernel `JointMoments.local_cka` gives the same numbers without any kernel matrix.

    Parameters
    ----------
    anchors_x, anchors_y
        Paired rows (n, d_x) and (n, d_y); at most 5000.
    x, y
        Rows (m, d_x) and (p, d_y).
    kernel
        As in `gram_matrix`.

    Returns
    -------
    Tensor, (m, p).

    Raises
    ------
    ValueError
        For rows that do not fit, and above 5000 anchors.

    References
    ----------
    Maniparambil et al. (2024), arXiv 2401.05224.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import local_kernel_cka
    >>> rows = np.random.default_rng(0).normal(size=(12, 4))
    >>> turned = rows[:, ::-1].copy()  # the same rows in another basis
    >>> local_kernel_cka(rows[:8], turned[:8], rows[8:], turned[8:]).argmax(1).tolist()
    [0, 1, 2, 3]
    """
    left, right = (
        check_matrix(rows, name).double() for rows, name in ((anchors_x, "anchors_x"), (anchors_y, "anchors_y"))
    )
    if len(left) != len(right):
        raise ValueError(f"anchors_y: expected {len(left)} rows to pair with anchors_x, got {len(right)}")
    if len(left) > MOST_KERNEL_ROWS:
        raise ValueError(
            f"anchors_x: {len(left)} anchors are too many for kernel matrices, which take (n + 1)² numbers a query; "
            f"use at most {MOST_KERNEL_ROWS}, or the linear kernel, which needs none"
        )
    a = check_matrix(x, "x", columns=left.shape[1]).to(left)
    b = check_matrix(y, "y", columns=right.shape[1]).to(right)
    step = max(1, _BLOCK_BYTES // (8 * (len(left) + 1) ** 2))
    scores = left.new_empty(len(a), len(b))
    for i in range(0, len(a), step):
        rows = _extended(left, a[i : i + step], kernel)
        for j in range(0, len(b), step):
            scores[i : i + step, j : j + step] = rows @ _extended(right, b[j : j + step], kernel).mT
    return scores


def _extended(anchors: Float[Tensor, "n d"], queries: Float[Tensor, "m d"], kernel: str) -> Float[Tensor, "m nn"]:
    """Centred kernels of norm 1 of the anchors with each query added, one a row."""
    rows = [_unit_centred(gram_matrix(torch.cat([anchors, query.unsqueeze(0)]), kernel)) for query in queries]
    return torch.stack(rows).flatten(1)
