"""Affine maps between spaces. Rows are observations: a map sends a row x to `x @ matrix.T + bias`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base.arrays import as_tensor
from subspan.base.extras import require
from subspan.base.reading import memory_bytes
from subspan.base.saved import optional, save_arrays, saved_object


@dataclass(frozen=True)
class AffineMap:
    """An affine map from a source space (d_in) to a target space (d_out): x -> matrix x + bias.

    Parameters
    ----------
    matrix
        (d_out, d_in), finite.
    bias
        (d_out,), finite; None: a linear map.

    Raises
    ------
    ValueError
        For shapes that do not fit, NaN or infinity.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import AffineMap
    >>> turn = AffineMap(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.tensor([1.0, 0.0]))
    >>> turn.map(torch.tensor([[2.0, 0.0]]))
    tensor([[1., 2.]])
    >>> (turn.inverse() @ turn).map(torch.tensor([[2.0, 0.0]])).round(decimals=4)
    tensor([[2., 0.]])
    """

    matrix: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"] | None = None

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise ValueError(f"matrix: expected shape (d_out, d_in), got {tuple(self.matrix.shape)}")
        if self.bias is not None and self.bias.shape != self.matrix.shape[:1]:
            raise ValueError(f"bias: expected shape ({self.matrix.shape[0]},), got {tuple(self.bias.shape)}")
        for name, value in (("matrix", self.matrix), ("bias", self.bias)):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}: contains NaN or infinity")

    @classmethod
    def identity(cls, d: int, *, dtype: torch.dtype = torch.float64) -> AffineMap:
        """The identity on R^d."""
        return cls(torch.eye(d, dtype=dtype))

    @classmethod
    def through(
        cls,
        matrix: Float[Tensor, "d_out d_in"],
        mean_x: Float[Tensor, " d_in"] | None = None,
        mean_y: Float[Tensor, " d_out"] | None = None,
    ) -> AffineMap:
        """The map with this matrix that sends one mean to the other, or linear where one of them is missing."""
        return cls(matrix) if mean_x is None or mean_y is None else cls(matrix, mean_y - matrix @ mean_x)

    def map(self, x: Any) -> Float[Tensor, "*n d_out"]:
        """Map rows x (…, d_in) to (…, d_out), in the dtype of x; half precision is summed in float32."""
        rows = as_tensor(x, "x")
        if rows.shape[-1:] != self.matrix.shape[1:]:
            raise ValueError(f"x: expected {self.matrix.shape[1]} columns, got shape {tuple(rows.shape)}")
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        if self.bias is None:
            return (wide @ self.matrix.to(wide).mT).to(rows.dtype)
        flat = torch.addmm(self.bias.to(wide), wide.reshape(-1, wide.shape[-1]), self.matrix.to(wide).mT)
        return flat.reshape(*rows.shape[:-1], self.matrix.shape[0]).to(rows.dtype)

    def inverse(self) -> AffineMap:
        """Inverse map; for unequal dimensions the least-squares (pseudo) inverse."""
        inverse = torch.linalg.pinv(self.matrix)
        return AffineMap(inverse, None if self.bias is None else -(inverse @ self.bias))

    def __matmul__(self, other: AffineMap) -> AffineMap:
        """Composition: (self @ other).map(x) = self.map(other.map(x))."""
        if self.matrix.shape[1] != other.matrix.shape[0]:
            raise ValueError(f"other: maps into {other.matrix.shape[0]} dimensions, {self.matrix.shape[1]} are needed")
        bias = self.bias
        if other.bias is not None:
            moved = self.matrix @ other.bias
            bias = moved if bias is None else moved + bias
        return AffineMap(self.matrix @ other.matrix, bias)

    @property
    def orthogonality_defect(self) -> float:
        """Frobenius norm of W'W - I (or WW' - I for fewer rows than columns)."""
        w = self.matrix
        gram = w.mT @ w if w.shape[0] >= w.shape[1] else w @ w.mT
        return float(torch.linalg.matrix_norm(gram - torch.eye(gram.shape[0], dtype=w.dtype, device=w.device)))

    def to(self, *args: Any, **kwargs: Any) -> AffineMap:
        """Move to a device or dtype, like `Tensor.to`."""
        bias = None if self.bias is None else self.bias.to(*args, **kwargs)
        return AffineMap(self.matrix.to(*args, **kwargs), bias)

    def to_module(self) -> nn.Linear:
        """The same map as a torch Linear layer."""
        d_out, d_in = self.matrix.shape
        layer = nn.Linear(d_in, d_out, bias=self.bias is not None, device=self.matrix.device, dtype=self.matrix.dtype)
        with torch.no_grad():
            layer.weight.copy_(self.matrix)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def to_faiss(self) -> Any:
        """The same map as a faiss LinearTransform, for an IndexPreTransform (extra: index)."""
        faiss: Any = require("faiss", extra="index")
        d_out, d_in = self.matrix.shape
        transform = faiss.LinearTransform(d_in, d_out, self.bias is not None)
        faiss.copy_array_to_vector(self.matrix.float().cpu().contiguous().numpy().ravel(), transform.A)
        if self.bias is not None:
            faiss.copy_array_to_vector(self.bias.float().cpu().numpy(), transform.b)
        transform.is_trained = True
        transform.set_is_orthonormal()
        return transform

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, whole or not at all."""
        save_arrays(path, "affine-map", {"matrix": self.matrix} | ({} if self.bias is None else {"bias": self.bias}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AffineMap:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        schema = {"matrix": Float[Tensor, "d_out d_in"], "bias": optional(Float[Tensor, " d_out"])}
        with saved_object(path, "affine-map", schema) as (arrays, _):
            return cls(**arrays)


@dataclass(frozen=True)
class LowRankMap:
    """An affine map kept as two thin factors: x -> left (right x) + bias, in O(r (d_in + d_out)) memory.

    Parameters
    ----------
    left
        (d_out, r).
    right
        (r, d_in).
    bias
        (d_out,).

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import LowRankMap
    >>> thin = LowRankMap(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 1.0, 0.0]]), torch.zeros(2))
    >>> thin.map(torch.tensor([[1.0, 2.0, 5.0]]))
    tensor([[3., 6.]])
    >>> thin.dense().matrix.shape
    torch.Size([2, 3])
    """

    left: Float[Tensor, "d_out r"]
    right: Float[Tensor, "r d_in"]
    bias: Float[Tensor, " d_out"]

    def map(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """Map rows x, in their dtype."""
        return torch.addmm(self.bias.to(x), x @ self.right.to(x).mT, self.left.to(x).mT)

    def dense(self) -> AffineMap:
        """The same with its whole matrix."""
        return AffineMap(self.left @ self.right, self.bias)


def check_map_memory(d_in: int, d_out: int) -> None:
    """ValueError where a matrix between the spaces takes over an eighth of the memory: fitting holds several."""
    size, most = 8 * d_in * d_out, memory_bytes() / 8
    if size > most:
        raise ValueError(
            f"X, Y: a map from {d_in} to {d_out} dimensions takes {size / 2**30:.3g} GiB, over an eighth of this "
            f"machine's memory ({most / 2**30:.3g} GiB); shorten the rows first (subspan shorten)"
        )
