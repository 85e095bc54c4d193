"""Arrays at the door: one conversion and one set of checks for numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(x: Any, name: str = "x", *, ndim: int | None = None, floating: bool = True) -> Tensor:
    """Turn an array-like into a tensor (no copy where possible); integers become float64 when `floating`.

    Raises TypeError for things that are not numeric arrays and ValueError for a wrong number of dimensions.
    """
    if isinstance(x, Tensor):
        tensor = x
    else:
        array = np.asarray(x)
        if array.dtype == object or array.dtype.kind not in "fiubc":
            raise TypeError(f"{name}: expected a numeric array, got dtype {array.dtype}")
        if array.dtype == np.float16:
            array = array.astype(np.float32)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if any(stride < 0 for stride in array.strides):
            array = array.copy()
        if not array.flags.writeable:
            array = array.copy() if array.nbytes < 1 << 24 else array
        tensor = _from_numpy(array)
    if floating and not (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.to(torch.float64)
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(tensor.shape)}")
    return tensor


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.flags.writeable:
        return torch.from_numpy(array)
    # A read-only memory map is shared without a copy; nothing in the library writes to its input.
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def check_finite(x: Tensor, name: str = "x") -> Tensor:
    """Return `x`, or raise a ValueError that counts the rows with NaN or infinity and names the first."""
    # A finite sum proves finite entries in one pass; only a suspicious sum pays for the exact check.
    if x.numel() and not bool(torch.isfinite(x.sum())):
        bad = ~torch.isfinite(x)
        rows = bad.reshape(-1, x.shape[-1]).any(-1) if x.ndim > 1 else bad
        if bool(rows.any()):
            first = int(rows.nonzero()[0, 0])
            raise ValueError(
                f"{name}: {int(rows.sum())} of {rows.numel()} rows contain NaN or infinity (the first is row {first}); "
                "remove or impute them"
            )
    return x


def check_matrix(x: Any, name: str = "x", *, columns: int | None = None, min_rows: int = 1) -> Tensor:
    """Return `x` as a finite floating matrix (n, d), or raise a ValueError that says what would be right."""
    tensor = as_tensor(x, name, ndim=2)
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
