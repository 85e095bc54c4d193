"""Linear layers whose weight is a product: of two thin matrices, or of a dictionary and sparse codes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import linear_weight


class LowRankLinear(nn.Module):
    """y = up (down x) + bias: a linear layer of rank r, in r (d_in + d_out) numbers.

    Parameters
    ----------
    up, down
        (d_out, r) and (r, d_in), both trained.
    bias
        (d_out,) or None.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import LowRankLinear
    >>> layer = LowRankLinear.from_linear(torch.nn.Linear(6, 4), rank=2)
    >>> layer(torch.randn(3, 6)).shape, layer.to_dense().shape
    (torch.Size([3, 4]), torch.Size([4, 6]))
    """

    def __init__(
        self, up: Float[Tensor, "d_out r"], down: Float[Tensor, "r d_in"], bias: Float[Tensor, " d_out"] | None = None
    ) -> None:
        super().__init__()
        if up.shape[1] != down.shape[0]:
            raise ValueError(f"up, down: must have one rank, got {up.shape[1]} and {down.shape[0]}")
        self.up, self.down = nn.Parameter(up.detach().clone()), nn.Parameter(down.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int) -> LowRankLinear:
        """The layer of this rank whose weight is nearest to that of a linear one (truncated singular values)."""
        weight, bias = linear_weight(linear)
        if not 1 <= rank <= min(weight.shape):
            raise ValueError(f"rank: between 1 and {min(weight.shape)}, got {rank}")
        u, s, vh = torch.linalg.svd(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
        root = s[:rank].sqrt()
        return cls((u[:, :rank] * root).to(weight.dtype), (root[:, None] * vh[:rank]).to(weight.dtype), bias)

    def forward(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        """Outputs (…, d_out) of rows (…, d_in)."""
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.up.shape[0], self.down.shape[1]

    def to_dense(self) -> Float[Tensor, "d_out d_in"]:
        """The weight (d_out, d_in)."""
        return self.up @ self.down

    def bits(self, value_bits: int = 16) -> int:
        """Bits to store it with so many a number."""
        return value_bits * sum(p.numel() for p in self.parameters())

    def multiply_adds(self, x: Tensor) -> int:
        """Of one run on x."""
        return (self.up.numel() + self.down.numel()) * (x.numel() // x.shape[-1])

    def arrays(self) -> Mapping[str, Tensor]:
        """What makes it: the arguments, by name."""
        own: dict[str, Tensor] = {"up": self.up, "down": self.down}
        return own | ({} if self.bias is None else {"bias": self.bias})

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"d_in={self.shape[1]}, d_out={self.shape[0]}, rank={self.up.shape[1]}"


class SparseDictLinear(nn.Module):
    """y = S' (D' x) + bias: each output reads s of the k atoms of a dictionary D, and its weights lie in their span.

    The weight (d_out, d_in) is (D S)', of which the codes S (k, d_out) have s entries a column that are not zero. Both
    products cost d_in k + s d_out multiplications a row, and no dense S is made.

    Parameters
    ----------
    dictionary
        D (d_in, k), trained.
    indices
        (d_out, s): which atoms each output reads, in [0, k).
    values
        (d_out, s): with which weights, trained.
    bias
        (d_out,) or None.

    References
    ----------
    CoSpaDi (arXiv 2509.22075).

    Examples
    --------
    >>> import torch
    >>> from subspan.models import SparseDictLinear
    >>> layer = SparseDictLinear(torch.eye(3), torch.tensor([[0, 2], [1, 2]]), torch.tensor([[1.0, 5.0], [2.0, 0.0]]))
    >>> layer(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[16.,  4.]], grad_fn=<TransposeBackward0>)
    """

    indices: Tensor

    def __init__(
        self,
        dictionary: Float[Tensor, "d_in k"],
        indices: Int[Tensor, "d_out s"],
        values: Float[Tensor, "d_out s"],
        bias: Float[Tensor, " d_out"] | None = None,
    ) -> None:
        super().__init__()
        k = dictionary.shape[1]
        if indices.shape != values.shape or indices.ndim != 2 or not indices.numel():
            raise ValueError(f"indices, values: one shape (d_out, s), got {(*indices.shape,)} and {(*values.shape,)}")
        if int(indices.min()) < 0 or int(indices.max()) >= k:
            raise ValueError(f"indices: must lie in [0, {k - 1}]")
        self.dictionary, self.values = nn.Parameter(dictionary.detach().clone()), nn.Parameter(values.detach().clone())
        self.register_buffer("indices", indices.to(torch.int32, copy=True))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        """Outputs (…, d_out) of rows (…, d_in)."""
        rows = x.reshape(-1, x.shape[-1])
        # A sum of s weighted rows of the coordinates (k, n) for each output.
        y = F.embedding_bag(self.indices, self.dictionary.mT @ rows.mT, mode="sum", per_sample_weights=self.values).mT
        y = y if self.bias is None else y + self.bias
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.values.shape[0], self.dictionary.shape[0]

    def codes(self) -> Float[Tensor, "k d_out"]:
        """S with its zeros."""
        empty = self.values.new_zeros(len(self.values), self.dictionary.shape[1])
        return empty.scatter_add(1, self.indices.long(), self.values).mT

    def to_dense(self) -> Float[Tensor, "d_out d_in"]:
        """The weight (d_out, d_in)."""
        return (self.dictionary @ self.codes()).mT

    def bits(self, value_bits: int = 16, *, code_bits: int | None = None) -> int:
        """Bits to store it: numbers, and which atoms are read, as a mask or as indices, whichever is less.

        code_bits: of a number of S, where it is less than `value_bits` (14 in the literature).
        """
        k, (outputs, s) = self.dictionary.shape[1], self.values.shape
        numbers = self.dictionary.numel() + (0 if self.bias is None else outputs)
        support = outputs * min(k, s * index_width(k))
        return value_bits * numbers + outputs * s * (code_bits or value_bits) + support

    def multiply_adds(self, x: Tensor) -> int:
        """Of one run on x."""
        return (self.dictionary.numel() + self.values.numel()) * (x.numel() // x.shape[-1])

    def arrays(self) -> Mapping[str, Tensor]:
        """What makes it: the arguments, by name."""
        own: dict[str, Tensor] = {"dictionary": self.dictionary, "indices": self.indices, "values": self.values}
        return own | ({} if self.bias is None else {"bias": self.bias})

    def extra_repr(self) -> str:
        """Shown by print."""
        atoms, nonzero = self.dictionary.shape[1], self.values.shape[1]
        return f"d_in={self.shape[1]}, d_out={self.shape[0]}, atoms={atoms}, nonzero={nonzero}"


def index_width(k: int) -> int:
    """Bits of an index of one of k."""
    return math.ceil(math.log2(max(k, 2)))
