"""What may come in as an array: checks that need no more than numpy and torch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor


def refuse_masked(x: Any, name: str) -> None:
    """Raise ValueError for a masked array with masked entries, which a conversion would read as values."""
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise ValueError(f"{name}: {int(np.ma.getmaskarray(x).sum())} entries are masked; fill or drop them first")


def is_sparse(x: Any) -> bool:
    """Whether `x` is a sparse matrix or array of SciPy, or a sparse tensor."""
    return x.layout != torch.strided if isinstance(x, Tensor) else issparse(x)


def refuse_sparse(x: Any, name: str) -> None:
    """Raise TypeError for sparse matrices and tensors."""
    if is_sparse(x):
        dense = "to_dense" if isinstance(x, Tensor) else "toarray"
        raise TypeError(f"{name}: sparse data is not read here; use {name}.{dense}() where that fits into memory")


def from_numpy(array: np.ndarray) -> Tensor:
    """Tensor that shares the memory of an array, also where that may only be read: the library writes to no input."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def has_finite_square(x: Tensor) -> bool:
    """Whether the sum of the squares of `x` is finite, which proves finite entries too, in one pass."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return bool(torch.isfinite(torch.linalg.vector_norm(x.detach(), dtype=torch.float32 if half else None)))


def check_finite(x: Tensor, name: str = "x") -> Tensor:
    """Return `x`, in double precision where its squares would overflow its own.

    Raises ValueError for NaN or infinity, with a count of the rows and the first, and for squares beyond float64.
    """
    if not x.numel() or not (x.is_floating_point() or x.is_complex()) or has_finite_square(x):
        return x
    bad = ~torch.isfinite(x.detach())
    rows = bad.reshape(-1, x.shape[-1]).any(-1) if x.ndim > 1 else bad
    if bool(rows.any()):
        first = int(rows.nonzero()[0, 0])
        raise ValueError(
            f"{name}: {int(rows.sum())} of {rows.numel()} rows contain NaN or infinity (the first is row {first}); "
            "remove or impute them"
        )
    wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
    if not has_finite_square(wide):
        raise ValueError(f"{name}: values are so large that their squares overflow float64; rescale them")
    return wide
