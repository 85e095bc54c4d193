"""Coordinates as subspaces: sets of them, named blocks of a space, and soft masks that harden into sets.

What a `Subspace` holds as a basis, a set of coordinates holds as its indices: projecting is copying, intersecting is
set algebra, and nothing of size d x k is made, so that a mask over millions of parameters is a subspace too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Inexact, Int
from torch import Tensor

from subspan.base import as_tensor, like

from .subspace import Subspace


def _rows(x: Any, width: int, name: str = "x") -> Tensor:
    rows = as_tensor(x, name)
    if rows.shape[-1:] != (width,):
        raise ValueError(f"{name}: expected {width} columns, got shape {tuple(rows.shape)}")
    return rows


@dataclass(frozen=True, eq=False)
class CoordinateSubspace:
    """The vectors of R^d that are zero outside a set of coordinates.

    Parameters
    ----------
    indices
        (k,) ascending, without repetition, at least one; see `of` for any order and for masks.
    ambient_dim
        Dimension d of the space.

    Raises
    ------
    ValueError
        For indices that are none, repeated, out of order or outside [0, d).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.geometry import CoordinateSubspace
    >>> a, b = CoordinateSubspace.of([4, 0, 2], 6), CoordinateSubspace.of([2, 3], 6)
    >>> a.intersection(b).indices.tolist(), a.union(b).indices.tolist(), float(a.overlap(b))
    ([2], [0, 2, 3, 4], 0.5)
    >>> a.project(np.arange(6.0))
    array([0., 0., 2., 0., 4., 0.])
    """

    indices: Int[Tensor, " k"]
    ambient_dim: int

    def __post_init__(self) -> None:
        if not len(self.indices):
            raise ValueError("indices: a subspace needs at least one coordinate")
        if bool((self.indices.diff() <= 0).any()):
            raise ValueError("indices: must ascend without repetition; CoordinateSubspace.of sorts them")
        low, high = int(self.indices[0]), int(self.indices[-1])
        if low < 0 or high >= self.ambient_dim:
            raise ValueError(f"indices: must lie in [0, {self.ambient_dim - 1}], got {low} … {high}")

    @classmethod
    def of(cls, chosen: Any, ambient_dim: int | None = None) -> CoordinateSubspace:
        """Subspace of the coordinates with these indices, in any order, or where a mask (d,) of booleans is true.

        Raises ValueError for an empty or repeated choice, and for indices without `ambient_dim`.
        """
        given = as_tensor(chosen, "chosen", ndim=1, floating=False)
        if given.dtype == torch.bool:
            if ambient_dim not in (None, len(given)):
                raise ValueError(f"chosen: a mask must have {ambient_dim} entries, got {len(given)}")
            return cls(given.nonzero()[:, 0], len(given))
        if given.is_floating_point() or given.is_complex():
            raise TypeError(f"chosen: expected integers or a mask of booleans, got {given.dtype}")
        if ambient_dim is None:
            raise ValueError("ambient_dim: indices do not tell the dimension of the space; give it")
        return cls(given.long().sort().values, ambient_dim)

    @property
    def dim(self) -> int:
        """Number of coordinates k."""
        return len(self.indices)

    @property
    def mask(self) -> Bool[Tensor, " d"]:
        """True at the coordinates of the set."""
        mask = torch.zeros(self.ambient_dim, dtype=torch.bool, device=self.indices.device)
        return mask.index_fill_(0, self.indices, True)

    def __repr__(self) -> str:
        return f"CoordinateSubspace(dim={self.dim}, ambient_dim={self.ambient_dim})"

    def to_subspace(self, dtype: torch.dtype = torch.float64) -> Subspace:
        """The same as a `Subspace` with a basis of unit vectors (d x k numbers)."""
        basis = torch.zeros(self.ambient_dim, self.dim, dtype=dtype, device=self.indices.device)
        return Subspace(basis.scatter_(0, self.indices.unsqueeze(0), 1))

    def coordinates(self, x: Any) -> Any:
        """The coordinates (…, k) of rows x (…, d) that are in the set; in the kind of x."""
        rows = _rows(x, self.ambient_dim)
        return like(rows.index_select(-1, self.indices.to(rows.device)), x)

    def embed(self, z: Any) -> Any:
        """Rows (…, d) with coordinates z (…, k) and zeros elsewhere; in the kind of z."""
        inner = _rows(z, self.dim, "z")
        return like(
            inner.new_zeros(*inner.shape[:-1], self.ambient_dim).index_copy(-1, self.indices.to(inner.device), inner), z
        )

    def project(self, x: Any) -> Any:
        """Rows x (…, d) with zeros outside the set; in the kind of x."""
        rows = _rows(x, self.ambient_dim)
        return like(torch.where(self.mask.to(rows.device), rows, torch.zeros_like(rows)), x)

    def residual(self, x: Any) -> Any:
        """Rows x (…, d) with zeros in the set: x - project(x); in the kind of x."""
        rows = _rows(x, self.ambient_dim)
        return like(torch.where(self.mask.to(rows.device), torch.zeros_like(rows), rows), x)

    def captured_energy(self, covariance: Inexact[Tensor, "*c d d"]) -> Float[Tensor, "*c"]:
        """Share of the trace of a covariance or second moment that the coordinates of the set have, in [0, 1]."""
        variances = covariance.diagonal(dim1=-2, dim2=-1).real
        return variances[..., self.indices.to(variances.device)].sum(-1) / variances.sum(-1)

    def complement(self) -> CoordinateSubspace:
        """All other coordinates. Raises ValueError when there is none."""
        if self.dim == self.ambient_dim:
            raise ValueError("subspace: it is the whole space, so its complement is empty")
        return CoordinateSubspace.of(~self.mask)

    def union(self, other: CoordinateSubspace) -> CoordinateSubspace:
        """Coordinates of either."""
        return CoordinateSubspace.of(self.mask | self._beside(other))

    def intersection(self, other: CoordinateSubspace) -> CoordinateSubspace | None:
        """Coordinates of both; None where there is none."""
        common = self.mask & self._beside(other)
        return CoordinateSubspace.of(common) if bool(common.any()) else None

    def overlap(self, other: CoordinateSubspace | Subspace) -> Float[Tensor, "*b"]:
        """Share of directions in common, |A'B|_F^2 / min(p, q), as of two `Subspace`s; `other` may be one of them."""
        if isinstance(other, Subspace):
            if other.ambient_dim != self.ambient_dim:
                raise ValueError(f"other: lives in {other.ambient_dim} dimensions, expected {self.ambient_dim}")
            inside = other.basis[..., self.indices.to(other.basis.device), :].abs().square()
            return inside.sum((-2, -1)) / min(self.dim, other.dim)
        common = (self.mask & self._beside(other)).sum()
        return common.to(torch.float64) / min(self.dim, other.dim)

    def _beside(self, other: CoordinateSubspace) -> Tensor:
        if other.ambient_dim != self.ambient_dim:
            raise ValueError(f"other: lives in {other.ambient_dim} dimensions, expected {self.ambient_dim}")
        return other.mask.to(self.indices.device)


@dataclass(frozen=True, eq=False)
class SoftSubspace:
    """Coordinates that belong to a subspace by degrees: a weight for each, optionally after a rotation.

    Multiplying by the weights is a metric, not a projection (w^2 is not w), until they `harden`.

    Parameters
    ----------
    weights
        (*b, d), not negative; gates in [0, 1], a batch of them where there are leading dimensions.
    rotation
        (d, d) orthogonal: weight i belongs to its column i. None: to coordinate i itself.

    Raises
    ------
    ValueError
        For negative weights or NaN, and for a rotation that is not orthogonal.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import SoftSubspace
    >>> gate = SoftSubspace.from_logits(torch.tensor([4.0, -3.0, 0.5, -9.0]))
    >>> gate.harden().indices.tolist(), gate.harden(top_k=1).indices.tolist()
    ([0, 2], [0])
    >>> round(float(gate.effective_dim), 2)
    2.02
    """

    weights: Float[Tensor, "*b d"]
    rotation: Float[Tensor, "d d"] | None = None

    def __post_init__(self) -> None:
        if not bool((self.weights >= 0).all()):
            raise ValueError("weights: must be numbers >= 0")
        if self.rotation is not None:
            Subspace(self.rotation)  # refuses what is not orthogonal

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "*b d"], rotation: Tensor | None = None) -> SoftSubspace:
        """Weights 1 / (1 + exp(-logits))."""
        return cls(torch.sigmoid(logits), rotation)

    def __len__(self) -> int:
        if self.weights.ndim < 2:
            raise TypeError("subspace: it is one soft subspace, not a batch; it has no members")
        return len(self.weights)

    def __bool__(self) -> bool:
        return True  # also without leading dimensions, where there is no length to ask

    def __getitem__(self, index: Any) -> SoftSubspace:
        """Member or members along the first leading dimension."""
        len(self)
        return replace(self, weights=self.weights[index])

    def __iter__(self) -> Iterator[SoftSubspace]:
        return (self[place] for place in range(len(self)))

    @property
    def effective_dim(self) -> Float[Tensor, "*b"]:
        """(sum w)^2 / sum w^2: k for k equal weights. NaN where all are zero."""
        return self.weights.sum(-1).square() / self.weights.square().sum(-1)

    def scale(self, x: Any) -> Any:
        """Rows x (…, d) with each coordinate times its weight, in the space that they came in; in the kind of x."""
        rows = _rows(x, self.weights.shape[-1])
        weights = self.weights.to(rows)
        if self.rotation is None:
            return like(rows * weights, x)
        turn = self.rotation.to(rows)
        return like(((rows @ turn) * weights) @ turn.mT, x)

    def hard_mask(self, *, threshold: float = 0.5, top_k: int | None = None) -> Bool[Tensor, "*b d"]:
        """True where a weight exceeds `threshold`, or, with `top_k`, at the top_k largest (of equals the first)."""
        if top_k is None:
            return self.weights > threshold
        if not 1 <= top_k <= self.weights.shape[-1]:
            raise ValueError(f"top_k: must lie in [1, {self.weights.shape[-1]}], got {top_k}")
        order = self.weights.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
        return torch.zeros_like(self.weights, dtype=torch.bool).scatter_(-1, order, True)

    def harden(self, *, threshold: float = 0.5, top_k: int | None = None) -> CoordinateSubspace | Subspace:
        """The subspace of the coordinates in `hard_mask`, or of those columns of the rotation.

        Raises ValueError where no weight exceeds the threshold, and for a batch (harden its members, whose dimensions
        may differ).
        """
        if self.weights.ndim > 1:
            raise ValueError("subspace: it is a batch; harden its members one by one")
        mask = self.hard_mask(threshold=threshold, top_k=top_k)
        if not bool(mask.any()):
            raise ValueError(f"threshold: no weight exceeds {threshold}; the largest is {float(self.weights.max()):g}")
        return CoordinateSubspace.of(mask) if self.rotation is None else Subspace(self.rotation[:, mask])


@dataclass(frozen=True, eq=False)
class Blocks:
    """A space as a direct sum of named blocks of coordinates, optionally after a rotation.

    Parameters
    ----------
    sizes
        Dimension of each block by name, in order; a block may be empty, all of them together may not.
    order
        (d,) the coordinate at each place, block after block; None: as they come.
    rotation
        (d, d) orthogonal, whose columns are the axes that the blocks hold coordinates of; None: the axes of the space.

    Raises
    ------
    ValueError
        For sizes that are no whole numbers, an order that is no permutation and a rotation that is not orthogonal.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Blocks
    >>> blocks = Blocks({"rest": 2, "colour": 1, "shape": 2})
    >>> x, donor = torch.arange(5.0), -torch.arange(5.0)
    >>> blocks.swap(x, donor, "shape")
    tensor([ 0.,  1.,  2., -3., -4.])
    >>> finer = blocks.divide("shape", {"round": [1], "long": [0]})
    >>> finer.sizes, finer.coordinates(x, "round")
    ({'rest': 2, 'colour': 1, 'round': 1, 'long': 1}, tensor([4.]))
    """

    sizes: Mapping[str, int]
    order: Int[Tensor, " d"] | None = None
    rotation: Float[Tensor, "d d"] | None = None

    def __post_init__(self) -> None:
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in self.sizes.values()):
            raise ValueError(f"sizes: expected whole numbers >= 0, got {dict(self.sizes)}")
        if self.dim < 1:
            raise ValueError("sizes: all blocks together are empty")
        object.__setattr__(self, "sizes", dict(self.sizes))
        if self.order is not None and not torch.equal(self.order.sort().values.cpu(), torch.arange(self.dim)):
            raise ValueError(f"order: expected every number from 0 to {self.dim - 1} once")
        if self.rotation is not None:
            if len(self.rotation) != self.dim:
                raise ValueError(f"rotation: expected {self.dim} rows, as the blocks have together")
            Subspace(self.rotation)  # refuses what is not orthogonal

    @property
    def dim(self) -> int:
        """Dimension d of the whole space."""
        return sum(self.sizes.values())

    def places(self, name: str) -> slice:
        """Where a block stands in block order. Raises ValueError for a name that there is not."""
        start = 0
        for known, size in self.sizes.items():
            if known == name:
                return slice(start, start + size)
            start += size
        raise ValueError(f"name: no block {name!r}; there are {', '.join(map(repr, self.sizes))}")

    def indices(self, *names: str) -> Int[Tensor, " k"]:
        """Indices of the coordinates of blocks (all without a name), before the rotation if there is none."""
        order = torch.arange(self.dim) if self.order is None else self.order
        return torch.cat([order[self.places(name)] for name in names or self.sizes])

    def subspace(self, *names: str) -> CoordinateSubspace | Subspace:
        """Sum of blocks as a subspace: of coordinates, or of columns of the rotation. ValueError where it is empty."""
        chosen = self.indices(*names)
        if not len(chosen):
            raise ValueError(f"names: {', '.join(map(repr, names))} is empty and spans no subspace")
        if self.rotation is None:
            return CoordinateSubspace.of(chosen, self.dim)
        return Subspace(self.rotation[:, chosen.to(self.rotation.device)])

    def coordinates(self, x: Any, *names: str) -> Any:
        """Coordinates (…, k) of rows x (…, d) in blocks, in the order of the names (all in block order without)."""
        rows = _rows(x, self.dim)
        if self.rotation is not None:
            chosen = self.indices(*names).to(self.rotation.device)
            return like(rows @ self.rotation[:, chosen].to(rows), x)
        if self.order is None:  # views
            parts = [rows[..., self.places(name)] for name in names or self.sizes]
            return like(parts[0] if len(parts) == 1 else torch.cat(parts, -1), x)
        return like(rows.index_select(-1, self.indices(*names).to(rows.device)), x)

    def split(self, x: Any) -> dict[str, Any]:
        """Coordinates of rows x (…, d) in each block, by name."""
        return {name: self.coordinates(x, name) for name in self.sizes}

    def join(self, parts: Mapping[str, Any]) -> Any:
        """Rows (…, d) with these coordinates in each block: the inverse of `split`. Raises ValueError for others."""
        if set(parts) != set(self.sizes):
            raise ValueError(f"parts: expected {', '.join(map(repr, self.sizes))}, got {', '.join(map(repr, parts))}")
        columns = {name: _rows(parts[name], size, f"parts[{name!r}]") for name, size in self.sizes.items()}
        together = torch.cat(list(columns.values()), -1)
        if self.order is not None:
            together = together.index_select(-1, self.order.argsort().to(together.device))
        if self.rotation is not None:
            together = together @ self.rotation.to(together).mT
        return like(together, next(iter(parts.values())))

    def project(self, x: Any, *names: str) -> Any:
        """What blocks hold of rows x (…, d), as rows (…, d)."""
        rows = _rows(x, self.dim)
        if self.rotation is None:
            return like(torch.where(self._mask(names, rows), rows, torch.zeros_like(rows)), x)
        axes = self.rotation[:, self.indices(*names).to(self.rotation.device)].to(rows)
        return like((rows @ axes) @ axes.mT, x)

    def swap(self, x: Any, donor: Any, *names: str) -> Any:
        """Rows x (…, d) with the named blocks of rows `donor` (…, d), and their own elsewhere."""
        rows, other = _rows(x, self.dim), _rows(donor, self.dim, "donor")
        if not names:
            raise ValueError("names: say which blocks are swapped")
        if self.rotation is None:
            return like(torch.where(self._mask(names, rows), other, rows), x)
        return like(rows + self.project(other - rows, *names), x)

    def _mask(self, names: Sequence[str], rows: Tensor) -> Tensor:
        mask = torch.zeros(self.dim, dtype=torch.bool)
        mask[self.indices(*names).cpu()] = True
        return mask.to(rows.device)

    def divide(self, name: str, parts: Mapping[str, int | Sequence[int] | Tensor | np.ndarray]) -> Blocks:
        """Blocks with one of them in parts: sizes of consecutive ones, or the places inside the block that each takes.

        Raises ValueError unless the parts use every coordinate of the block once and their names are new.
        """
        block = self.indices(name)
        chosen: dict[str, Tensor] = {}
        start = 0
        for new, part in parts.items():
            places = range(start, start + part) if isinstance(part, int) else part
            chosen[new] = torch.as_tensor(places, dtype=torch.int64)
            start += len(chosen[new])
        used = torch.cat([torch.arange(0), *chosen.values()])
        if not torch.equal(used.sort().values, torch.arange(len(block))):
            raise ValueError(f"parts: must use each of the {len(block)} places of {name!r} once")
        pieces: dict[str, Tensor] = {}
        for known in self.sizes:
            inside = {new: block[places] for new, places in chosen.items()}
            pieces |= inside if known == name else {known: self.indices(known)}
        if len(pieces) != len(self.sizes) - 1 + len(chosen):
            raise ValueError(f"parts: a name in {list(parts)} is that of another block")
        return self._of(pieces)

    def merge(self, names: Sequence[str], into: str) -> Blocks:
        """Blocks with several of them as one, which stands where the first of them stood."""
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names: expected different blocks, got {list(names)}")
        if into in self.sizes and into not in names:
            raise ValueError(f"into: {into!r} is the name of another block")
        first = min(names, key=lambda name: self.places(name).start)
        pieces: dict[str, Tensor] = {}
        for known in self.sizes:
            if known == first:
                pieces[into] = self.indices(*names)
            elif known not in names:
                pieces[known] = self.indices(known)
        return self._of(pieces)

    def _of(self, pieces: Mapping[str, Tensor]) -> Blocks:
        order = torch.cat(list(pieces.values()))
        plain = torch.equal(order.cpu(), torch.arange(self.dim))
        return Blocks({name: len(piece) for name, piece in pieces.items()}, None if plain else order, self.rotation)

    def contiguous(self) -> Blocks:
        """Blocks without `order`: of rows x[..., blocks.indices()], or with the rotation's columns in block order."""
        turn = None if self.rotation is None else self.rotation[:, self.indices().to(self.rotation.device)]
        return Blocks(self.sizes, None, turn)
