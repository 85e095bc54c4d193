"""Differences of checkpoints as vectors, and subspaces by the name of a weight."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Inexact, Shaped
from torch import Tensor, nn

from subspan.base import save_arrays, saved_object
from subspan.base.saved import checked_arrays, optional
from subspan.geometry import Subspace
from subspan.geometry.rank import RankRule
from subspan.geometry.subspace import SAVED_ARRAYS

from .weight_files import RowBlocks, StoredWeights, row_slices, weights_of

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


def as_matrix(weight: Shaped[Tensor, "*n"]) -> Shaped[Tensor, "d_out d_in"]:
    """A weight as a matrix with an output a row: vectors are one column, filters are flattened."""
    return weight.reshape(len(weight), -1) if weight.ndim else weight.reshape(1, 1)


class StateDelta(Mapping[str, Tensor]):
    """What is between two checkpoints of one architecture: a vector of all their floating-point tensors.

    A mapping from name to difference, in float32 or wider. Nothing is computed before it is asked for, and tensors are
    read one at a time, so that whole checkpoints on disk are worked through in the memory of one tensor, or of some of
    its rows where entries do not depend on one another (`blocks`): sums, multiples, masks and projections of deltas are
    deltas. Use `in_memory` to compute one once and keep it.

    Parameters
    ----------
    shapes
        Of each tensor.
    compute
        Name → tensor.
    left_out
        Names that `between(strict=False)` did not find in both.
    block
        Name and one of `row_slices(shape)` → these rows of the tensor; None: they cannot be had apart.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> base, tuned = {"w": torch.zeros(2, 2)}, {"w": torch.eye(2)}
    >>> delta = StateDelta.between(base, tuned)
    >>> dict((0.5 * delta).added_to(base))["w"].diagonal()
    tensor([0.5000, 0.5000])
    >>> round(delta.norm() ** 2, 6), round(delta.cosine(-delta), 6)
    (2.0, -1.0)
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        compute: Callable[[str], Tensor],
        left_out: tuple[str, ...] = (),
        block: Callable[[str, slice], Tensor] | None = None,
    ) -> None:
        self.shapes = dict(shapes)
        self.left_out = left_out
        self._compute, self._block = compute, block

    @classmethod
    def between(cls, base: Source, tuned: Source, *, strict: bool = True) -> StateDelta:
        """tuned - base, of modules, mappings or paths (see `weights_of`); integer tensors are left out.

        Raises ValueError where names or shapes differ (strict=False: only those in both are taken, see `left_out`),
        where one has no floating-point numbers, and, once it is computed, where a tensor is not finite.
        """
        first, second = weights_of(base), weights_of(tuned)
        kinds = {name: _described(first, name) for name in first}
        shapes = {name: shape for name, (shape, _) in kinds.items()}
        others = {name: _described(second, name)[0] for name in second}
        problems = {
            "only in base": [name for name in shapes if name not in others],
            "only in tuned": [name for name in others if name not in shapes],
            "of other shapes": [name for name in shapes if name in others and shapes[name] != others[name]],
        }
        wrong = tuple(name for names in problems.values() for name in names)
        if wrong and strict:
            listed = "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names)
            raise ValueError(f"base, tuned: tensors {listed}; strict=False takes those that are in both")
        floating = {name: shapes[name] for name in shapes if name not in wrong and kinds[name][1].is_floating_point}
        if not floating:
            raise ValueError("base, tuned: no floating-point tensor is in both")

        def difference(name: str, rows: slice | None = None) -> Tensor:
            before, after = (_stored(weights, name, rows).detach() for weights in (first, second))
            if not after.is_floating_point():
                found = str(after.dtype).removeprefix("torch.")
                raise ValueError(f"tuned: {name!r} is {found}, expected floating point")
            wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
            before = before.to(after.device, wide)
            # What was converted is nobody else's.
            return after - before if after.dtype == wide else after.to(wide).sub_(before)

        return cls(floating, difference, wrong, difference)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._finite(name, self._compute(name))

    def block(self, name: str, rows: slice) -> Tensor:
        """Rows of a tensor, one of `row_slices(shape)`; where they cannot be had apart, the whole is computed first."""
        if self._block is None or rows == slice(None):
            return self[name] if rows == slice(None) else self[name][rows]
        return self._finite(name, self._block(name, rows))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The rows of a tensor in their order, a quarter of a million numbers at a time where they can be had apart."""
        if self._block is None:
            yield self[name]
        else:
            yield from (self.block(name, rows) for rows in row_slices(self.shapes[name]))

    @staticmethod
    def _finite(name: str, value: Tensor) -> Tensor:
        # A sum that is finite has finite terms; one that is not may only have grown too large.
        if not math.isfinite(float(value.sum())) and not bool(torch.isfinite(value).all()):
            raise ValueError(f"delta: {name!r} contains NaN or infinity")
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"StateDelta({len(self)} tensors, {sum(map(math.prod, self.shapes.values())):,} numbers)"

    def only(self, names: Iterable[str]) -> StateDelta:
        """The delta of some tensors; the others stay as they are. Raises ValueError for a name it does not have."""
        chosen = dict.fromkeys(names)
        self._known(chosen, "names")
        return StateDelta({name: self.shapes[name] for name in chosen}, self._compute, self.left_out, self._block)

    def map(self, function: Callable[[str, Tensor], Tensor], *, elementwise: bool = False) -> StateDelta:
        """`function(name, tensor)` of every tensor, when it is asked for; shapes stay.

        elementwise: the function may be given some rows of a tensor instead, as no entry depends on another.
        """

        def block(name: str, rows: slice) -> Tensor:
            return function(name, self.block(name, rows))

        apart = block if elementwise and self._block is not None else None
        return StateDelta(self.shapes, lambda name: function(name, self[name]), self.left_out, apart)

    def in_memory(self) -> StateDelta:
        """The same, computed now and kept."""
        kept = dict(self)
        return StateDelta(self.shapes, kept.__getitem__, self.left_out)

    def __mul__(self, factor: float) -> StateDelta:
        return self.map(lambda _, value: value * factor, elementwise=True)

    __rmul__ = __mul__

    def __neg__(self) -> StateDelta:
        return self * -1.0

    def __add__(self, other: StateDelta) -> StateDelta:
        """Sum; a tensor that only one has counts as zero in the other."""
        if not isinstance(other, StateDelta):
            return NotImplemented
        wrong = [name for name in self if name in other and self.shapes[name] != other.shapes[name]]
        if wrong:
            raise ValueError(f"other: has other shapes of {_listed(wrong)}")

        def total(name: str, rows: slice = slice(None)) -> Tensor:
            parts = [side.block(name, rows) for side in (self, other) if name in side.shapes]
            return parts[0] if len(parts) == 1 else parts[0] + parts[1].to(parts[0].device)

        apart = None if self._block is None or other._block is None else total
        return StateDelta(self.shapes | other.shapes, total, block=apart)

    def __sub__(self, other: StateDelta) -> StateDelta:
        return self + -other

    def masked(self, masks: Mapping[str, Tensor]) -> StateDelta:
        """Entries times a mask (boolean, or weights) of their tensor's shape; tensors without a mask stay whole."""
        self._known(masks, "masks")
        for name in masks:
            if masks[name].shape != self.shapes[name]:
                raise ValueError(f"masks: {name!r} is {tuple(masks[name].shape)}, expected {tuple(self.shapes[name])}")
        return self.map(lambda name, value: value * masks[name].to(value) if name in masks else value)

    def sparsified(self, density: float) -> StateDelta:
        """The largest entries of each tensor by magnitude, a share `density` in (0, 1] of them; the rest is zero."""
        if not 0 < density <= 1:
            raise ValueError(f"density: in (0, 1], got {density}")

        def largest(_: str, value: Tensor) -> Tensor:
            flat = value.flatten()
            kept = flat.abs().topk(max(1, round(density * flat.numel()))).indices if flat.numel() else flat.long()
            return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(value.shape)

        return self.map(largest)

    def subspaces(
        self, rank: int | float | str | RankRule = 0.99, *, side: Literal["left", "right"] = "left"
    ) -> SubspaceMap:
        """Span of the main singular vectors of each tensor as a matrix (see `as_matrix`), outputs or inputs.

        rank: as elsewhere, of the squared singular values; never more than the numerical rank. Zero tensors have none.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side: 'left' or 'right', got {side!r}")
        return SubspaceMap(
            {name: found for name in self if (found := main_subspace(self[name], rank, side)) is not None}
        )

    def projected(self, subspaces: Mapping[str, Subspace], *, outside: bool = False) -> StateDelta:
        """The part of each tensor's outputs inside (or outside of) its subspace; tensors without one stay whole."""
        self._known(subspaces, "subspaces")

        def project(name: str, value: Tensor) -> Tensor:
            if name not in subspaces:
                return value
            basis = subspaces[name].basis.to(value)
            matrix = as_matrix(value)
            inside = (basis @ (basis.mT @ matrix)).reshape(value.shape)
            return value - inside if outside else inside

        return self.map(project)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each tensor."""
        return {name: float(torch.linalg.vector_norm(self[name], dtype=torch.float64)) for name in self}

    def norm(self) -> float:
        """Frobenius norm of the whole."""
        return math.hypot(*self.norms().values())

    def dot(self, other: StateDelta) -> float:
        """Inner product over the tensors that both have."""
        return math.fsum(
            float((self[name].double() * other[name].double().to(self[name].device)).sum())
            for name in self
            if name in other.shapes
        )

    def cosine(self, other: StateDelta) -> float:
        """Cosine of the angle between two deltas. Raises ValueError where one is zero."""
        length = self.norm() * other.norm()
        if length == 0:
            raise ValueError("other: one of the two deltas is zero and has no direction")
        return self.dot(other) / length

    def added_to(self, base: Source) -> RowBlocks:
        """Name → base + delta of every tensor of base, in base's type, computed when it is asked for.

        `write_weights` takes it, and holds no more than some rows where these can be had apart.
        """
        weights = weights_of(base)
        self._known_in(weights)
        return _Sum(weights, self)

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> nn.Module:
        """Add to the parameters and buffers of a module, in place; in half precision this rounds."""
        weights = weights_of(model)
        sums = self.added_to(model)
        for name in self:
            weights[name].copy_(sums[name])
        return model

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the block the model has its weights plus the delta; after it the very same tensors as before.

        The tensors are exchanged, not written to: nothing is rounded on the way back, after an error either, and what
        is written to the weights within the block is dropped. Tensors of which the delta is zero are left alone.
        """
        weights = weights_of(model)
        sums = self.added_to(model)
        kept: dict[str, Tensor] = {}
        try:
            for name in self:
                value = sums[name]
                if not torch.equal(value, weights[name].detach()):
                    kept[name] = weights[name].data
                    weights[name].data = value
            yield model
        finally:
            for name, value in kept.items():
                weights[name].data = value

    def _known(self, named: Mapping[str, Any], what: str) -> None:
        unknown = [name for name in named if name not in self.shapes]
        if unknown:
            raise ValueError(f"{what}: the delta has no {_listed(unknown)}")

    def _known_in(self, weights: Mapping[str, Tensor]) -> None:
        wrong = [name for name in self if name not in weights or _described(weights, name)[0] != self.shapes[name]]
        if wrong:
            raise ValueError(f"base: lacks, or has in another shape, {_listed(wrong)}")


class _Sum(RowBlocks):
    def __init__(self, weights: Mapping[str, Tensor], delta: StateDelta) -> None:
        self._weights, self._delta = weights, delta

    def __getitem__(self, name: str) -> Tensor:
        value = self._weights[name].detach()
        return _added(value, self._delta[name]) if name in self._delta.shapes else value

    def described(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return _described(self._weights, name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        if name not in self._delta.shapes:
            for rows in row_slices(self.described(name)[0]):
                yield _stored(self._weights, name, rows).detach()
            return
        start = 0
        for block in self._delta.blocks(name):
            rows = slice(start, start + len(block)) if block.ndim else None
            yield _added(_stored(self._weights, name, rows).detach(), block)
            start += len(block) if block.ndim else 0

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class SubspaceMap(Mapping[str, Subspace]):
    """Subspaces by the name of a weight, a layer, or anything else: what methods on weights hand to one another.

    Parameters
    ----------
    subspaces
        Name → `Subspace`; of any dimensions.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Subspace
    >>> from subspan.models import SubspaceMap
    >>> spaces = SubspaceMap({"layer": Subspace.span(torch.eye(4)[:, :2])})
    >>> spaces.overlap(spaces)
    {'layer': 1.0}
    """

    def __init__(self, subspaces: Mapping[str, Subspace]) -> None:
        self._subspaces = dict(subspaces)

    def __getitem__(self, name: str) -> Subspace:
        return self._subspaces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._subspaces)

    def __len__(self) -> int:
        return len(self._subspaces)

    def __repr__(self) -> str:
        dims = [space.dim for space in self.values()]
        return f"SubspaceMap({len(dims)} subspaces" + (f" of rank {min(dims)} to {max(dims)})" if dims else ")")

    def overlap(self, other: Mapping[str, Subspace]) -> dict[str, float]:
        """Mean squared cosine of the principal angles, by the names that both have."""
        return {name: float(self[name].overlap(other[name])) for name in self if name in other}

    def to(self, *args: Any, **kwargs: Any) -> SubspaceMap:
        """Move to a device or floating dtype, like `Tensor.to`."""
        return SubspaceMap({name: space.to(*args, **kwargs) for name, space in self.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all."""
        arrays = {f"{name}:{part}": value for name, space in self.items() for part, value in space.arrays().items()}
        counts = {name: space.count for name, space in self.items()}
        save_arrays(path, "subspaces by name", arrays, counts=counts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SubspaceMap:
        """Read a file written by `save`. Raises ValueError where it is not one."""
        schema = {f"*:{part}": optional(Inexact[Tensor, "..."]) for part in SAVED_ARRAYS}
        with saved_object(path, "subspaces by name", schema, {"counts": dict[str, float | None]}) as (arrays, facts):
            parts: dict[str, dict[str, Tensor]] = {name: {} for name in facts["counts"]}
            for key, value in arrays.items():
                name, _, part = key.rpartition(":")
                if name not in parts:
                    raise ValueError(f"{key} belongs to no subspace")
                parts[name][part] = value
            return cls(
                {
                    name: Subspace.from_arrays(checked_arrays(found, SAVED_ARRAYS), facts["counts"][name])
                    for name, found in parts.items()
                }
            )


def main_subspace(value: Shaped[Tensor, "*n"], rank: Any, side: Literal["left", "right"] = "left") -> Subspace | None:
    """Span of the main singular vectors of one tensor as in `StateDelta.subspaces`; None where it is zero."""
    matrix = as_matrix(value)
    rows = matrix.mT if side == "left" else matrix
    if not bool(rows.any()):
        return None
    if isinstance(rank, int):
        rank = min(rank, *rows.shape)
    found = Subspace.from_factor(rows, count=float(len(rows)), rank=rank)
    assert found.spectrum is not None
    sizes = found.spectrum.sqrt()
    numerical = int((sizes > torch.finfo(sizes.dtype).eps * max(rows.shape) * sizes[0]).sum())
    return found.truncate(min(found.dim, numerical))


def _described(weights: Mapping[str, Tensor], name: str) -> tuple[torch.Size, torch.dtype]:
    """(shape, type)."""
    if isinstance(weights, StoredWeights):
        return weights.described(name)
    return weights[name].shape, weights[name].dtype


def _stored(weights: Mapping[str, Tensor], name: str, rows: slice | None) -> Tensor:
    """A tensor, or some of its rows, of which alone a checkpoint on disk reads."""
    if rows is None or rows == slice(None):
        return weights[name]
    return weights.rows(name, rows) if isinstance(weights, StoredWeights) else weights[name][rows]


def _added(value: Tensor, delta: Tensor) -> Tensor:
    """Their sum in the type of the first."""
    if value.dtype == delta.dtype:
        return value + delta.to(value.device)
    return value.to(delta.dtype).add_(delta.to(value.device)).to(value.dtype)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
