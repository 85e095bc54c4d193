"""Arrays at the door: one conversion and one set of checks for numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor

from ..base.arrays import check_finite, from_numpy, refuse_masked, refuse_sparse


def as_tensor(x: Any, name: str = "x", *, ndim: int | None = None, floating: bool = True) -> Tensor:
    """Turn an array-like into a tensor (no copy where possible); integers become float64 when `floating`.

    Raises TypeError for what is no numeric array or sparse, ValueError for masked entries or another number of
    dimensions.
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
    """Return `x` as a finite matrix (n, d) of real numbers, detached, or raise a ValueError that says what is right.

    Single precision becomes double where the squares of the values would overflow.
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
    """Return `result` in the kind of `reference`: a tensor on its device, or a numpy array."""
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
    """Scale rows (*b, d) to unit length without overflow or underflow; zero rows stay zero.

    Raises ValueError on zero rows when `keep_zero` is False.
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
