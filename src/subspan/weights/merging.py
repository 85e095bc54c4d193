"""Several fine-tuned models into one in closed form, tensor by tensor: one tensor of each is held at a time.

What is merged are the updates, `StateDelta.between(base, expert)`; what comes back is one update, computed as it is
asked for. Where entries do not depend on one another (`average`, `task_arithmetic`, `ties`, `dare`), large tensors are
worked through in blocks of rows, so that `write_weights(merged.added_to(base), folder)` holds no tensor whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base.draws import generator_for
from subspan.models import StateDelta
from subspan.models.weight_files import row_slices

Matrix = Float[Tensor, "p q"]
_BITS = 16


def average(deltas: Sequence[StateDelta]) -> StateDelta:
    """The mean of the updates: the average of the models.

    Parameters
    ----------
    deltas
        Updates of one base, at least one, with the same tensors.

    Returns
    -------
    StateDelta

    Raises
    ------
    ValueError
        Where there are none, or their tensors differ.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.weights import average
    >>> base = {"w": torch.zeros(2)}
    >>> deltas = [StateDelta.between(base, {"w": torch.tensor(value)}) for value in ([2.0, 0.0], [0.0, 4.0])]
    >>> average(deltas)["w"]
    tensor([1., 2.])
    """
    return _elementwise(deltas, lambda values, *_: sum_of(values).div_(len(values)))


def task_arithmetic(deltas: Sequence[StateDelta], scaling: float = 0.3) -> StateDelta:
    """The sum of the updates times `scaling`.

    Parameters
    ----------
    deltas
        As for `average`.
    scaling
        0.3 is usual for eight tasks; 1 / T gives the average.

    Returns
    -------
    StateDelta

    References
    ----------
    Ilharco et al. (2023), arXiv 2212.04089.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.weights import task_arithmetic
    >>> base = {"w": torch.zeros(2)}
    >>> deltas = [StateDelta.between(base, {"w": torch.tensor(value)}) for value in ([2.0, 0.0], [0.0, 4.0])]
    >>> task_arithmetic(deltas, 0.5)["w"]
    tensor([1., 2.])
    """
    return _elementwise(deltas, lambda values, *_: sum_of(values).mul_(scaling))


def ties(deltas: Sequence[StateDelta], density: float = 0.2, scaling: float = 1.0) -> StateDelta:
    """Trim each update to its largest entries, elect a sign an entry, and average those that have it.

    Entries whose trimmed values cancel exactly stay at the base; the published code gives them the sign of the most.

    Parameters
    ----------
    deltas
        As for `average`. Each is read three times: the threshold is that of the whole model, found in two passes.
    density
        Share of the entries of each update that is kept, by magnitude, in (0, 1].
    scaling
        Factor of the result.

    Returns
    -------
    StateDelta

    References
    ----------
    Yadav et al. (2023), arXiv 2306.01708.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.weights import ties
    >>> base = {"w": torch.zeros(3)}
    >>> deltas = [StateDelta.between(base, {"w": torch.tensor(v)}) for v in ([3.0, 0.1, 2.0], [1.0, 0.2, -3.0])]
    >>> ties(deltas, density=0.67)["w"]
    tensor([ 2.,  0., -3.])
    """
    if not 0 < density <= 1:
        raise ValueError(f"density: in (0, 1], got {density}")
    limits = [magnitude_of_share(delta, density) for delta in deltas]

    def elect(values: list[Tensor], *_: object) -> Tensor:
        kept = torch.stack([value * (value.abs() >= limit) for value, limit in zip(values, limits)])
        agreeing = kept * (kept.sign() == kept.sum(0).sign())
        return scaling * agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)

    return _elementwise(deltas, elect)


def dare(deltas: Sequence[StateDelta], drop: float = 0.9, scaling: float = 0.3, random_state: int = 0) -> StateDelta:
    """Drop entries of each update at random, enlarge the others to make up for it, and add up.

    Parameters
    ----------
    deltas
        As for `average`.
    drop
        Share of the entries that is set to zero, in [0, 1).
    scaling
        Factor of the sum.
    random_state
        Seed; each tensor, of a large one each block of rows, has draws of its own, so that the order of reading changes
        nothing.

    Returns
    -------
    StateDelta

    References
    ----------
    Yu et al. (2024), arXiv 2311.03099.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.weights import dare
    >>> delta = StateDelta.between({"w": torch.zeros(1000)}, {"w": torch.ones(1000)})
    >>> dare([delta], drop=0.5, scaling=1.0)["w"].unique()
    tensor([0., 2.])
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop: in [0, 1), got {drop}")

    def thinned(values: list[Tensor], name: str, rows: slice) -> Tensor:
        kept = []
        for number, value in enumerate(values):
            what = (number, name, rows.start) if rows.start else (number, name)
            stays = torch.rand(value.shape, generator=generator_for(random_state, *what)) >= drop
            kept.append(value * stays.to(value.device))
        return scaling / (1 - drop) * sum_of(kept)

    return _elementwise(deltas, thinned)


def tsv_merge(deltas: Sequence[StateDelta], scaling: float = 1.0) -> StateDelta:
    """Put the main singular vectors of every update beside one another, and make them orthogonal.

    Of each matrix the first min(p, q) / T singular triples of each of T updates stay; left and right vectors are moved
    to the nearest orthonormal ones. Vectors and filters are averaged.

    Parameters
    ----------
    deltas
        As for `average`.
    scaling
        Factor of the merged matrices.

    Returns
    -------
    StateDelta

    References
    ----------
    Gargiulo et al. (2025), TSV-M, arXiv 2412.00081.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.weights import tsv_merge
    >>> base, (e1, e2) = {"w": torch.zeros(2, 2)}, torch.eye(2)
    >>> experts = [{"w": 3 * e1.outer(e1)}, {"w": 2 * e2.outer(e2)}]
    >>> tsv_merge([StateDelta.between(base, expert) for expert in experts])["w"].diagonal()
    tensor([3., 2.])
    """

    def merge(values: list[Matrix]) -> Matrix:
        kept = min(values[0].shape) // len(values)
        return scaling * _orthogonal_product([_main(value, kept) for value in values])

    return _matrices(deltas, merge)


def iso_c(deltas: Sequence[StateDelta], scaling: float = 1.0) -> StateDelta:
    """The sum of the updates with all singular values at their mean. Vectors and filters are averaged.

    Parameters
    ----------
    deltas
        As for `average`.
    scaling
        Factor of the merged matrices.

    Returns
    -------
    StateDelta

    References
    ----------
    Marczak et al. (2025), No task left behind, arXiv 2502.04959.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.weights import iso_c
    >>> delta = StateDelta.between({"w": torch.zeros(2, 2)}, {"w": torch.diag(torch.tensor([3.0, 1.0]))})
    >>> iso_c([delta])["w"].diagonal()
    tensor([2., 2.])
    """

    def merge(values: list[Matrix]) -> Matrix:
        u, s, vh = torch.linalg.svd(sum_of(values), full_matrices=False)
        return scaling * s.mean() * (u @ vh)

    return _matrices(deltas, merge)


def iso_cts(deltas: Sequence[StateDelta], scaling: float = 1.0, common_share: float = 0.8) -> StateDelta:
    """`iso_c` with the last singular vectors of the sum replaced by those of each task outside of the first.

    Parameters
    ----------
    deltas
        As for `average`.
    scaling
        Factor of the merged matrices.
    common_share
        Share of the directions that are the sum's, in [0, 1]; the others are shared out among the tasks.

    Returns
    -------
    StateDelta

    References
    ----------
    Marczak et al. (2025), No task left behind, arXiv 2502.04959.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.weights import iso_cts
    >>> delta = StateDelta.between({"w": torch.zeros(2, 2)}, {"w": torch.diag(torch.tensor([3.0, 1.0]))})
    >>> iso_cts([delta], common_share=0.5)["w"].diagonal()
    tensor([2., 2.])
    """
    if not 0 <= common_share <= 1:
        raise ValueError(f"common_share: in [0, 1], got {common_share}")

    def merge(values: list[Matrix]) -> Matrix:
        full = min(values[0].shape)
        each = round((full - int(full * common_share)) / len(values))
        common = _main(sum_of(values), full - each * len(values))
        basis = common[0]
        own = [_main(value - basis @ (basis.mT @ value), each) for value in values]
        sizes = torch.cat([s for _, s, _ in [*own, common]])
        return scaling * _orthogonal_product(
            [(u, torch.full_like(s, float(sizes.mean())), vh) for u, s, vh in [*own, common]]
        )

    return _matrices(deltas, merge)


def magnitude_of_share(delta: StateDelta, share: float) -> float:
    """The magnitude that a share of all entries of an update reaches, exactly, in two passes over its tensors.

    Parameters
    ----------
    delta
        Read twice, one tensor at a time; magnitudes are compared in float32.
    share
        In (0, 1]; of at least one entry.

    Returns
    -------
    float

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.weights import magnitude_of_share
    >>> delta = StateDelta.between({"w": torch.zeros(4)}, {"w": torch.tensor([1.0, -4.0, 3.0, 2.0])})
    >>> magnitude_of_share(delta, 0.5)
    3.0
    """
    wanted = max(1, round(share * sum(math.prod(shape) for shape in delta.shapes.values())))
    # Bits of positive floats ascend as the floats do: first the upper half of them is found, then the lower.
    counts = _counts(delta, None)
    upper = _last_that_reaches(counts, wanted)
    lower = _last_that_reaches(_counts(delta, upper), wanted - int(counts[upper + 1 :].sum()))
    return float(torch.tensor((upper << _BITS) + lower, dtype=torch.int32).view(torch.float32))


def _counts(delta: StateDelta, upper: int | None) -> Tensor:
    """How many magnitudes have each upper half of bits, or each lower half beside the upper one given."""
    counts = torch.zeros(1 << _BITS, dtype=torch.int64)
    for value in (block for name in delta for block in delta.blocks(name)):
        bits = value.float().abs().flatten().view(torch.int32)
        bits = bits >> _BITS if upper is None else bits[bits >> _BITS == upper] & ((1 << _BITS) - 1)
        counts += torch.bincount(bits, minlength=1 << _BITS).cpu()
    return counts


def _last_that_reaches(counts: Tensor, wanted: int) -> int:
    """The highest bin from which on at least `wanted` are counted."""
    from_above = counts.flip(0).cumsum(0).flip(0)
    return int((from_above >= wanted).nonzero().max())


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """Sum of tensors, each moved to the device of the first; always a new tensor."""
    if len(values) == 1:
        return values[0].clone()
    total = values[0] + values[1].to(values[0].device)
    for value in values[2:]:
        total += value.to(total.device)
    return total


def _main(value: Matrix, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(value, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def _orthogonal_product(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Matrix:
    """U diag(s) V' of factors put beside one another, U and V moved to the nearest orthonormal ones."""
    u, s, vh = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    return (_nearest_orthonormal(u) * s) @ _nearest_orthonormal(vh)


def _nearest_orthonormal(value: Matrix) -> Matrix:
    u, _, vh = torch.linalg.svd(value, full_matrices=False)
    return u @ vh


def _matrices(deltas: Sequence[StateDelta], merge: Callable[[list[Matrix]], Matrix]) -> StateDelta:
    """`merge` for matrices in which something changed, the average for all else."""

    def combine(_: str, values: list[Tensor]) -> Tensor:
        if values[0].ndim != 2 or not any(bool(value.any()) for value in values):
            return sum_of(values) / len(values)
        return merge([value.to(values[0].device) for value in values])

    return _each(deltas, combine)


def _elementwise(deltas: Sequence[StateDelta], combine: Callable[[list[Tensor], str, slice], Tensor]) -> StateDelta:
    """`combine(blocks, name, rows)` of every block of rows, when it is asked for."""
    shapes = _shapes(deltas)

    def block(name: str, rows: slice) -> Tensor:
        return combine([delta.block(name, rows) for delta in deltas], name, rows)

    def whole(name: str) -> Tensor:
        parts = [block(name, rows) for rows in row_slices(shapes[name])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return StateDelta(shapes, whole, block=block)


def _each(deltas: Sequence[StateDelta], combine: Callable[[str, list[Tensor]], Tensor]) -> StateDelta:
    """`combine(name, tensors)` of every tensor, when it is asked for."""
    return StateDelta(_shapes(deltas), lambda name: combine(name, [delta[name] for delta in deltas]))


def _shapes(deltas: Sequence[StateDelta]) -> dict[str, torch.Size]:
    """Those of all; ValueError where they differ."""
    if not deltas:
        raise ValueError("deltas: at least one is needed")
    for number, delta in enumerate(deltas[1:], 1):
        if delta.shapes != deltas[0].shapes:
            differing = sorted(
                name
                for name in delta.shapes.keys() | deltas[0].shapes.keys()
                if delta.shapes.get(name) != deltas[0].shapes.get(name)
            )
            raise ValueError(f"deltas: number {number} has other tensors than the first: {', '.join(differing[:5])}")
    return deltas[0].shapes
