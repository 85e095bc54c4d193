"""Nested representations: heads and losses under which every prefix of an embedding is an embedding.

Source: Kusupati et al., Matryoshka Representation Learning (NeurIPS 2022, arXiv 2205.13147).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import as_tensor, check_matrix
from subspan.geometry import blocks_between, prefix, prefix_sizes, prefix_squared_norms
from subspan.geometry.grassmann import orthonormalize

from .blocks import MLP
from .orthogonal import OrthogonalLinear

_UNIT_TOLERANCE = 1e-3
_KINDS = ("rotation", "linear", "mlp")


def nesting_weights(dims: Sequence[int], weights: str | Sequence[float] | None) -> dict[int, float]:
    """Weight of each prefix size in a nested loss.

    Parameters
    ----------
    dims
        Sizes, in any order.
    weights
        None: 1 each; "inverse": 1 / size with mean 1; or one number a size, in the order of `dims`.

    Returns
    -------
    dict of sizes to weights.

    Raises
    ------
    ValueError
        For another length or word, negative numbers, or all zero.

    Examples
    --------
    >>> from subspan.nn import nesting_weights
    >>> nesting_weights((8, 16), (3, 1))
    {8: 3.0, 16: 1.0}
    """
    sizes = [int(m) for m in dims]
    if weights is None:
        return dict.fromkeys(sizes, 1.0)
    if isinstance(weights, str):
        if weights != "inverse":
            raise ValueError(f"weights: expected None, 'inverse' or a list of numbers, got {weights!r}")
        total = sum(1 / m for m in sizes)
        return {m: len(sizes) / (m * total) for m in sizes}
    values = [float(weight) for weight in weights]
    if len(values) != len(sizes):
        raise ValueError(f"weights: expected {len(sizes)} numbers, one for each of dims, got {len(values)}")
    if not all(0 <= value < float("inf") for value in values) or not any(values):
        raise ValueError(f"weights: expected finite numbers >= 0, not all zero, got {values}")
    return dict(zip(sizes, values))


class MatryoshkaLinear(nn.Module):
    """One linear classifier a prefix: embeddings (…, d) → logits (l, …, num_classes), smallest prefix first.

    Embeddings narrower than the largest size raise ValueError.

    Parameters
    ----------
    dims
        The l prefix sizes, in any order; d is the largest.
    num_classes
        Width of the logits.
    efficient
        All prefixes share one weight and one bias (MRL-E), and the logits are running sums over the blocks between
        cuts, O(num_classes · d) for all sizes. Otherwise each has its own (MRL).
    bias
        Whether the classifiers have one.
    normalize
        Scale every prefix to unit length on its own.

    Raises
    ------
    ValueError
        For sizes that are none, or fewer than one class.

    References
    ----------
    Kusupati et al. (2022), arXiv 2205.13147.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import MatryoshkaLinear
    >>> MatryoshkaLinear((4, 2, 8), num_classes=10)(torch.randn(5, 8)).shape
    torch.Size([3, 5, 10])
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        *,
        efficient: bool = False,
        bias: bool = True,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: must be at least 1, got {num_classes}")
        self.dims = prefix_sizes(dims)
        self.num_classes = num_classes
        self.efficient = efficient
        self.normalize = normalize
        sizes = self.dims[-1:] if efficient else self.dims
        self.heads = nn.ModuleList(nn.Linear(m, num_classes, bias=bias) for m in sizes)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "l *n c"]:
        """Logits of all prefixes."""
        if x.shape[-1] < self.dims[-1]:
            raise ValueError(f"x: expected at least {self.dims[-1]} columns, got {x.shape[-1]}")
        if self.efficient:
            return self._running_sums(x)
        return torch.stack([self.logits(x, m) for m in self.dims])

    def _running_sums(self, x: Tensor) -> Tensor:
        head: Any = self.heads[0]
        parts = [F.linear(x[..., block], head.weight[:, block]) for block in blocks_between(self.dims)]
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        sums = torch.stack(parts).cumsum(0, dtype=wide)
        if self.normalize:
            squares = prefix_squared_norms(x, self.dims).movedim(-1, 0).to(wide)
            sums = sums * torch.rsqrt(squares.clamp_min(1e-24)).unsqueeze(-1)
        sums = sums.to(parts[0].dtype)
        return sums if head.bias is None else sums + head.bias

    def logits(self, x: Float[Tensor, "*n d"], m: int) -> Float[Tensor, "*n c"]:
        """Logits of the prefix of size m alone, of rows with at least m columns; m must be one of `dims`."""
        if m not in self.dims:
            raise ValueError(f"m: expected one of {self.dims}, got {m}")
        head: Any = self.heads[0 if self.efficient else self.dims.index(m)]
        part = prefix(x, m, normalize=self.normalize)
        return F.linear(part, head.weight[:, :m], head.bias)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"dims={list(self.dims)}, num_classes={self.num_classes}, efficient={self.efficient}"


class MatryoshkaLogitLoss(nn.Module):
    """Weighted sum over prefixes of a loss of logits.

    The call takes logits (l, n, c), one layer a size in ascending order, then what the base loss takes. Another number
    of layers raises ValueError.

    Parameters
    ----------
    dims
        The l prefix sizes.
    base_loss
        Of the logits (n, c) of one prefix; None: cross entropy.
    weights
        As in `nesting_weights`.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import MatryoshkaLogitLoss
    >>> loss = MatryoshkaLogitLoss((2, 4, 8), weights=(0, 0, 1))
    >>> round(loss(torch.zeros(3, 5, 4), torch.arange(5) % 4).exp().item(), 3)
    4.0
    """

    def __init__(
        self, dims: Sequence[int], base_loss: nn.Module | None = None, *, weights: str | Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.dims = prefix_sizes(dims)
        self.base_loss = nn.CrossEntropyLoss() if base_loss is None else base_loss
        self.weights = nesting_weights(list(dims), weights)

    def forward(self, logits: Any, *targets: Any, **options: Any) -> Tensor:
        """The loss; `targets` and `options` go to the base loss unchanged."""
        if len(logits) != len(self.dims):
            raise ValueError(
                f"logits: expected {len(self.dims)} layers, one for each of {self.dims}, got {len(logits)}"
            )
        return torch.stack(
            [self.weights[m] * self.base_loss(layer, *targets, **options) for m, layer in zip(self.dims, logits)]
        ).sum()


class MatryoshkaLoss(nn.Module):
    """Any loss of one or more embeddings, summed with weights over their prefixes, which are cut on all sides.

    The call takes what the base loss takes. A first argument narrower than max(dims) raises ValueError.

    Parameters
    ----------
    base_loss
        A module or function of tensors.
    dims
        Prefix sizes.
    weights
        As in `nesting_weights`.
    normalize
        Scale every prefix to unit length on its own; "auto": for the arguments whose rows have unit length.
    dims_per_step
        In training only so many sizes, drawn anew each step, whose sum is scaled so that its expectation is the whole
        loss. None: all.
    embeddings
        Positions or names of the arguments that are cut. None: all floating matrices that are as wide as the first
        argument, teacher embeddings among them.

    Raises
    ------
    ValueError
        For values out of range.
    TypeError
        For a base loss that cannot be called.

    References
    ----------
    Kusupati et al. (2022), arXiv 2205.13147.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import MatryoshkaLoss, cosine_matching_loss
    >>> loss = MatryoshkaLoss(cosine_matching_loss, dims=(2, 4))
    >>> x = torch.ones(3, 4)
    >>> round(loss(x, x).item(), 3)
    -2.0
    """

    def __init__(
        self,
        base_loss: Any,
        dims: Sequence[int],
        *,
        weights: str | Sequence[float] | None = None,
        normalize: bool | str = "auto",
        dims_per_step: int | None = None,
        embeddings: Sequence[int | str] | None = None,
    ) -> None:
        super().__init__()
        if not callable(base_loss):
            raise TypeError(f"base_loss: expected a module or function, got {type(base_loss).__name__}")
        if normalize not in (True, False, "auto"):
            raise ValueError(f"normalize: expected True, False or 'auto', got {normalize!r}")
        self.dims = prefix_sizes(dims)
        if dims_per_step is not None and not 1 <= dims_per_step <= len(self.dims):
            raise ValueError(f"dims_per_step: must lie in [1, {len(self.dims)}], got {dims_per_step}")
        self.base_loss = base_loss
        self.weights = nesting_weights(list(dims), weights)
        self.normalize = normalize
        self.dims_per_step = dims_per_step
        self.embeddings = None if embeddings is None else tuple(embeddings)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """The loss of embeddings (n, d) and whatever else the base loss takes."""
        named: dict[int | str, Any] = {**dict(enumerate(arguments)), **options}
        wide = self._embeddings(named)
        sizes, factor = self._sizes()
        unit = {name: self._is_normalized(x) for name, x in wide.items()}
        terms = []
        for m in sizes:
            cut = named | {name: prefix(x, m, normalize=unit[name]) for name, x in wide.items()}
            positional = [cut[index] for index in range(len(arguments))]
            loss: Any = self.base_loss(*positional, **{name: cut[name] for name in options})
            terms.append(self.weights[m] * loss)
        return torch.stack(terms).sum() * factor

    def _embeddings(self, named: Mapping[int | str, Any]) -> dict[int | str, Tensor]:
        first = next(iter(named.values()), None)
        if self.embeddings is None:
            width = first.shape[-1] if isinstance(first, Tensor) and first.ndim == 2 else -1
            chosen = {
                name: x
                for name, x in named.items()
                if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 2 and x.shape[-1] == width
            }
        else:
            missing = [name for name in self.embeddings if name not in named]
            if missing:
                raise ValueError(f"embeddings: the loss was called without {missing}")
            chosen = {name: named[name] for name in self.embeddings}
        if not chosen:
            raise ValueError("arguments: the first must be a floating matrix of embeddings (n, d)")
        for name, x in chosen.items():
            if x.shape[-1] < self.dims[-1]:
                raise ValueError(f"argument {name}: expected at least {self.dims[-1]} columns, got {x.shape[-1]}")
        return chosen

    def _sizes(self) -> tuple[Sequence[int], float]:
        if self.dims_per_step is None or not self.training:
            return self.dims, 1.0
        drawn = torch.randperm(len(self.dims))[: self.dims_per_step].tolist()
        # From large to small, as some losses cache what the first call sees.
        return sorted((self.dims[index] for index in drawn), reverse=True), len(self.dims) / self.dims_per_step

    def _is_normalized(self, x: Tensor) -> bool:
        if self.normalize != "auto":
            return bool(self.normalize)
        lengths = torch.linalg.vector_norm(x.detach().float(), dim=-1)
        tolerance = max(_UNIT_TOLERANCE, float(torch.finfo(x.dtype).eps))
        return bool(((lengths - 1).abs() < tolerance).all())

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"dims={list(self.dims)}, normalize={self.normalize}, dims_per_step={self.dims_per_step}"


class MatryoshkaAdapter(nn.Module):
    """Rows of a frozen encoder (…, d) → nested coordinates (…, max(dims)): the first m are an embedding for every m.

    Parameters
    ----------
    d
        Width of the rows.
    dims
        Prefix sizes.
    kind
        "rotation": an orthogonal map of the coordinates in `basis`, which keeps all inner products in its span;
        "linear": any linear map, started at `basis`; "mlp": linear, GELU, linear.
    basis
        Orthonormal columns (d, k); None: the coordinates as they are. k = max(dims), except that a rotation may keep
        more.
    shift, scale
        Rows are (x - shift) / scale first: shift (d,), None for 0.
    hidden
        Width of the MLP.
    trainable
        False: the rotation stays at its start.

    Raises
    ------
    ValueError
        For another kind, a scale that is not positive, or a basis of another shape.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import MatryoshkaAdapter
    >>> adapter, x = MatryoshkaAdapter(8, dims=(2, 4)), torch.randn(5, 8)
    >>> torch.allclose(adapter(x), x[:, :4], atol=1e-5)
    True
    """

    shift: Tensor
    scale: Tensor
    basis: Tensor

    def __init__(
        self,
        d: int,
        dims: Sequence[int],
        *,
        kind: str = "rotation",
        basis: Float[Tensor, "d k"] | None = None,
        shift: Float[Tensor, " d"] | None = None,
        scale: float = 1.0,
        hidden: int = 512,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise ValueError(f"kind: expected one of {_KINDS}, got {kind!r}")
        if not scale > 0:
            raise ValueError(f"scale: must be positive, got {scale}")
        self.d = d
        self.dims = prefix_sizes(dims, None if kind == "mlp" else d)
        self.kind = kind
        width = self.dims[-1]
        start = torch.eye(d, width) if basis is None else check_matrix(basis, "basis").float()
        if start.shape[0] != d or start.shape[1] < width:
            raise ValueError(f"basis: expected shape ({d}, k >= {width}), got {tuple(start.shape)}")
        self.register_buffer("shift", torch.zeros(d) if shift is None else as_tensor(shift, "shift", ndim=1).float())
        self.register_buffer("scale", torch.tensor(float(scale)))
        if kind == "rotation":
            self.register_buffer("basis", orthonormalize(start.double()).float())
            # Near its start Cayley reaches what the exponential does, at a fraction of the cost.
            turn = OrthogonalLinear(start.shape[1], orthogonal_map="cayley") if trainable else nn.Identity()
            self.map: Any = turn
        elif kind == "linear":
            self.map = nn.Linear(d, width, bias=False)
            with torch.no_grad():
                self.map.weight.copy_(start[:, :width].mT)
        else:
            self.map = MLP((d, hidden, width))

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        """Nested coordinates; of each the first m are an embedding for every m in `dims`."""
        if x.shape[-1] != self.d:
            raise ValueError(f"x: expected {self.d} columns, got {x.shape[-1]}")
        rows = (x - self.shift.to(x)) / self.scale.to(x)
        if self.kind == "rotation":
            rows = rows @ self.basis.to(x)
        return self.map(rows)[..., : self.dims[-1]]

    @property
    def matrix(self) -> Float[Tensor, "m d"] | None:
        """The linear map of (x - shift) / scale, or None for an MLP."""
        if self.kind == "mlp":
            return None
        if self.kind == "linear":
            return self.map.weight.detach()
        turned = self.map(torch.eye(self.basis.shape[1], device=self.basis.device)).detach()
        return (self.basis @ turned)[:, : self.dims[-1]].mT

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"d={self.d}, dims={list(self.dims)}, kind={self.kind}"
