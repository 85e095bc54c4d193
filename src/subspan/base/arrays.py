"""What may come in as an array: checks that need no more than numpy and torch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Inexact
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

    Parameters
    ----------
    x
        Any tensor.
    name
        What the errors call it.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        For NaN or infinity, with a count of the rows and the first, and for squares beyond float64.

    Examples
    --------
    >>> import torch
    >>> from subspan.base import check_finite
    >>> check_finite(torch.tensor([1.0, 1e30])).dtype
    torch.float64
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


def as_tensor(x: Any, name: str = "x", *, ndim: int | None = None, floating: bool = True) -> Tensor:
    """Turn an array-like into a tensor (no copy where possible).

    Parameters
    ----------
    x
        Tensor, numpy array or what numpy makes one of.
    name
        What the errors call it.
    ndim
        Dimensions it must have; None for any.
    floating
        Integers become float64.

    Returns
    -------
    Tensor

    Raises
    ------
    TypeError
        For what is no numeric array, or sparse.
    ValueError
        For masked entries or another number of dimensions.

    Examples
    --------
    >>> from subspan.base import as_tensor
    >>> as_tensor([[1, 2], [3, 4]], ndim=2).dtype
    torch.float64
    """
    refuse_masked(x, name)
    refuse_sparse(x, name)
    if isinstance(x, Tensor):
        tensor = x
    else:
        array = np.asarray(x)
        if array.dtype == object or array.dtype.kind not in "fiubc":
            raise TypeError(f"{name}: expected a numeric array, got dtype {array.dtype}")
        if array.dtype == np.float16:
            array = array.astype(np.float32)
        if array.dtype.type in (np.longdouble, np.clongdouble):
            array = array.astype(np.float64 if array.dtype.kind == "f" else np.complex128)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if any(stride < 0 for stride in array.strides):
            array = array.copy()
        if not array.flags.writeable:
            array = array.copy() if array.nbytes < 1 << 24 else array
        tensor = from_numpy(array)
    if floating and not (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.to(torch.float64)
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(tensor.shape)}")
    return tensor


def check_matrix(x: Any, name: str = "x", *, columns: int | None = None, min_rows: int = 1) -> Tensor:
    """Return `x` as a finite matrix of real numbers, detached, or raise a ValueError that says what is right.

    Single precision becomes double where the squares of the values would overflow.

    Parameters
    ----------
    x
        Array-like (n, d).
    name
        What the errors call it.
    columns
        The d it must have; None for any.
    min_rows
        The least n.

    Returns
    -------
    Tensor, (n, d).

    Raises
    ------
    ValueError
        For NaN, infinity, complex numbers, and other shapes.

    Examples
    --------
    >>> from subspan.base import check_matrix
    >>> check_matrix([[1.0, float("nan")]], "X")
    Traceback (most recent call last):
    ValueError: X: 1 of 1 rows contain NaN or infinity (the first is row 0); remove or impute them
    """
    tensor = as_tensor(x, name, ndim=2).detach()
    if tensor.is_complex():
        raise ValueError(f"{name}: expected real numbers, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.shape[0] < min_rows:
        raise ValueError(f"{name}: needs at least {min_rows} rows, got {tensor.shape[0]}")
    if tensor.shape[1] < 1:
        raise ValueError(f"{name}: has no columns")
    if columns is not None and tensor.shape[1] != columns:
        raise ValueError(f"{name}: expected {columns} columns, got {tensor.shape[1]}")
    return check_finite(tensor, name)


def like(result: Tensor, reference: Any) -> Any:
    """Return `result` in the kind of `reference`: a tensor on its device, or a numpy array.

    Parameters
    ----------
    result
        Any tensor.
    reference
        What came in: a tensor, or anything else.

    Returns
    -------
    Tensor or numpy array, in the shape of `result`.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from subspan.base import like
    >>> like(torch.ones(2), np.zeros(5))
    array([1., 1.], dtype=float32)
    """
    if isinstance(reference, Tensor):
        return result.to(reference.device)
    return result.detach().cpu().numpy()


def holding(dtype: torch.dtype, values: Tensor) -> torch.dtype:
    """`dtype`, or double precision where the largest of `values` would be infinite in it."""
    largest = float(values.max()) if values.numel() else 0.0
    return dtype if largest <= torch.finfo(dtype).max else torch.promote_types(dtype, torch.float64)


def centre(rows: Inexact[Tensor, "*n d"], center: Inexact[Tensor, "*b d"]) -> Inexact[Tensor, "*m d"]:
    """rows - center in the dtype of the rows, without rounding a centre of more digits to theirs first."""
    rounded = center.to(rows.dtype)
    centred = rows - rounded
    if torch.promote_types(center.dtype, rows.dtype) != rows.dtype:
        # What rounding takes is not small where the centre is large against the spread.
        centred -= (center - rounded).to(rows.dtype)
    return centred


def normalize_rows(x: Tensor, *, keep_zero: bool = True) -> Tensor:
    """Scale rows to unit length without overflow or underflow; zero rows stay zero.

    Parameters
    ----------
    x
        (*b, d).
    keep_zero
        False: zero rows are an error.

    Returns
    -------
    Tensor, (*b, d).

    Raises
    ------
    ValueError
        For zero rows where `keep_zero` is False.

    Examples
    --------
    >>> import torch
    >>> from subspan.base import normalize_rows
    >>> normalize_rows(torch.tensor([[0.0, 1e30], [0.0, 0.0]])).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    # The scale cancels, so that no gradient has to pass through it.
    rows = x.detach()
    if rows.is_complex():
        largest = rows.abs().amax(-1, keepdim=True)
    else:
        largest = torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True))
    scaled = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    if not keep_zero and bool((norm == 0).any()):
        raise ValueError(f"x: {int((norm == 0).sum())} rows are zero and have no direction")
    length = torch.where(norm > 0, norm, torch.ones_like(norm))
    return scaled / length if scaled.requires_grad else scaled.div_(length)
