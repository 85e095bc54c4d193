"""How much of some updates lies in the main directions of another: closed forms, tensor by tensor, without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base import Progress, silent
from subspan.geometry import EnergyRank, FractionOfDim, Subspace, expected_overlap
from subspan.measures import resampled_means
from subspan.models import StateDelta
from subspan.models.weights import as_matrix, main_subspace

from .update_geometry import ALL, kept_rank, numbered_layer

REFERENCE = "aligned"
_FEWEST, _LAYERS = 4, 8


class HeldUpdate(NamedTuple):
    """How much of one tensor's update lies in directions of the reference's.

    Attributes
    ----------
    tensor
        Its name.
    layer
        The numbered layer it belongs to; itself where there is none.
    tuned
        The model whose update it is.
    energy, product
        Sum of squares of the update, and its inner product with the reference's.
    rank
        Of the reference's update, 0 where that is zero.
    kept
        Share of the energy in the reference's main directions, by fraction.
    drawn
        Its mean over as many directions of the reference, drawn without regard to their size.
    chance
        Its mean over uniformly random subspaces of the same dimension.
    """

    tensor: str
    layer: str
    tuned: str
    energy: float
    product: float
    rank: int
    kept: tuple[float, ...]
    drawn: tuple[float, ...]
    chance: tuple[float, ...]


class PairedUpdates(NamedTuple):
    """How the main output directions of two updates of one matrix lie to each other.

    Attributes
    ----------
    tensor, layer
        As in `HeldUpdate`.
    first, second
        Names of the two; the reference is "aligned".
    ranks
        Directions that hold the share of the energy.
    overlap, chance
        As in `Overlap`.
    smallest, mean
        Of the principal angles, in degrees.
    """

    tensor: str
    layer: str
    first: str
    second: str
    ranks: tuple[int, int]
    overlap: float
    chance: float
    smallest: float
    mean: float


class Estimate(NamedTuple):
    """A number with its interval.

    Attributes
    ----------
    value, low, high
        The number, and the ends of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class UpdateComparison:
    """What `compare_updates` found.

    Attributes
    ----------
    verdict
        "unequal", "alike", "beyond chance", "at chance" or "no evidence".
    reason
        Why, in a sentence.
    fractions
        Shares of each tensor's directions, ascending.
    fraction
        The one that is judged.
    energy
        Sum of squares of the whole reference update.
    held, pairs
        A row a tensor and update, or pair of updates.
    beyond
        Model → share of its update in the main directions, from 0 (what random directions hold) to 1.
    differences
        (one, other) → difference of the two.
    """

    verdict: Literal["unequal", "alike", "beyond chance", "at chance", "no evidence"]
    reason: str
    fractions: tuple[float, ...]
    fraction: float
    energy: float
    held: tuple[HeldUpdate, ...]
    pairs: tuple[PairedUpdates, ...]
    beyond: dict[str, Estimate]
    differences: dict[tuple[str, str], Estimate]

    def curves(self) -> dict[str, dict[str, list[float]]]:
        """Model → "kept", "drawn" and "chance" → share of the whole update's energy, by fraction."""
        found: dict[str, dict[str, list[float]]] = {}
        for tuned in self.beyond:
            rows = [row for row in self.held if row.tuned == tuned]
            whole = sum(row.energy for row in rows)
            found[tuned] = {
                kind: [
                    sum(row.energy * getattr(row, kind)[place] for row in rows) / whole
                    for place in range(len(self.fractions))
                ]
                for kind in ("kept", "drawn", "chance")
            }
        return found

    def cosines(self) -> dict[str, float]:
        """Model → cosine of its whole update and the reference."""
        rows = {tuned: [row for row in self.held if row.tuned == tuned] for tuned in self.beyond}
        return {
            tuned: sum(row.product for row in own) / math.sqrt(self.energy * sum(row.energy for row in own))
            for tuned, own in rows.items()
        }

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


def compare_updates(
    reference: StateDelta,
    deltas: Mapping[str, StateDelta],
    *,
    fractions: Sequence[float] = (0.01, 0.25, 0.5, 0.75, 0.99),
    fraction: float = 0.25,
    energy: float = 0.9,
    margin: float = 0.2,
    level: float = 0.95,
    resamples: int = 4000,
    random_state: int = 0,
    progress: Progress = silent,
) -> UpdateComparison:
    """How much of each update lies in the main output directions of a reference update, and how updates lie to others.

    One pass, in the memory of one tensor of each checkpoint and its decomposition. What subspaces drawn at random hold
    is not drawn: its mean is known. Where behaviours can be read, `SubspaceAudit` says what weights alone cannot.

    The verdict compares, between models, the share beyond chance at `fraction`, over the tensors that the reference
    changes: "unequal" where one model's is `margin` more than another's with an interval above 0, "alike" where all
    differences are within the margin for sure. Of one model alone it is "beyond chance" where the interval is above 0,
    and "at chance" where it is below the margin. Else there is "no evidence".

    Parameters
    ----------
    reference
        Such as from the base to the aligned model.
    deltas
        Name → update, such as from the aligned model to one that was tuned on.
    fractions
        Shares of the directions of each tensor, in (0, 1]; never more than the reference's rank.
    fraction
        The one that is judged; is added to `fractions`.
    energy
        Share of an update's energy that its main directions hold, where updates are compared pair by pair.
    margin
        Difference of shares that counts.
    level
        Of all intervals together. They come from a bootstrap of the layers (of the tensors, for fewer than 8).
    resamples
        Bootstrap draws.
    random_state
        Seed.
    progress
        Is told the tensor, and the share that is done.

    Returns
    -------
    UpdateComparison

    Raises
    ------
    ValueError
        For parameters out of range, updates that are zero or have other tensors, and tensors that are not finite.

    References
    ----------
    Ponkshe et al. (2025), Safety Subspaces are Not Distinct, arXiv 2505.14185.

    Examples
    --------
    Of one update three quarters of the energy lie in the first two of eight directions, of the other nothing:

    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.probe import compare_updates
    >>> names = [f"layers.{i}.w" for i in range(8)]
    >>> zero = {name: torch.zeros(8, 8) for name in names}
    >>> def update(*sizes):
    ...     return StateDelta.between(zero, {name: torch.diag(torch.tensor(sizes)) for name in names})
    >>> reference = update(2.0, 2.0, 1, 1, 1, 1, 1, 1)
    >>> tuned = {"a": update(3.0, 0, 0, 0, 0, 0, 0, 3**0.5), "b": update(0.0, 0, 0, 1, 0, 0, 0, 0)}
    >>> found = compare_updates(reference, tuned)
    >>> found.verdict, round(found.curves()["a"]["kept"][1], 4), found.curves()["b"]["chance"][1]
    ('unequal', 0.75, 0.25)
    """
    if not deltas:
        raise ValueError("deltas: at least one update is needed")
    if not 0 < level < 1 or margin <= 0:
        raise ValueError(f"level, margin: in (0, 1) and above 0, got {level} and {margin}")
    for name, delta in deltas.items():
        if dict(delta.shapes) != dict(reference.shapes):
            raise ValueError(f"deltas: {name!r} has other tensors than the reference, or of other shapes")
    shares = tuple(sorted({*fractions, fraction}))
    rules = [FractionOfDim(share) for share in shares]
    named = {REFERENCE: reference, **deltas}
    if len(named) == len(deltas):
        raise ValueError(f"deltas: {REFERENCE!r} is the name of the reference; give the model another")
    held: list[HeldUpdate] = []
    pairs: list[PairedUpdates] = []
    whole = 0.0
    for number, name in enumerate(reference):
        progress(f"reading {name}", number / len(reference))
        values = {each: delta[name] for each, delta in named.items()}
        spaces = {each: main_subspace(value, ALL) for each, value in values.items()}
        whole += float(values[REFERENCE].double().square().sum())
        layer = numbered_layer(name) or name
        held += (
            HeldUpdate(name, layer, each, *_held(values[each], values[REFERENCE], spaces[REFERENCE], rules))
            for each in deltas
            if spaces[each] is not None
        )
        if min(as_matrix(values[REFERENCE]).shape) > 1:
            pairs += _paired(name, layer, spaces, EnergyRank(energy))
    if empty := [each for each in deltas if not any(row.tuned == each for row in held)]:
        raise ValueError(f"deltas: the update of {empty[0]!r} is zero (is it the aligned model itself?)")
    if not any(row.rank for row in held):
        raise ValueError("reference: changes no tensor that an update changes (is the aligned model the base itself?)")
    beyond, differences = shares_beyond_chance(
        held, list(deltas), shares.index(fraction), level, resamples, random_state
    )
    where = f"the main directions ({fraction:g} of each tensor's)"
    verdict, reason = judged_shares(beyond, differences, margin, where)
    return UpdateComparison(verdict, reason, shares, fraction, whole, tuple(held), tuple(pairs), beyond, differences)


def _held(value: Tensor, reference: Tensor, space: Subspace | None, rules: Sequence[FractionOfDim]) -> tuple[Any, ...]:
    """All of `HeldUpdate` after its names."""
    matrix = as_matrix(value).double()
    energy = float(matrix.square().sum())
    if space is None:
        nothing = (0.0,) * len(rules)
        return energy, 0.0, 0, nothing, nothing, nothing
    along = (space.basis.double().mT @ matrix).square().sum(1).cumsum(0) / energy
    counts = [kept_rank(space, rule) for rule in rules]
    return (
        energy,
        float((matrix * as_matrix(reference)).sum()),
        space.dim,
        tuple(float(along[k - 1]) for k in counts),
        tuple(float(along[-1]) * k / space.dim for k in counts),
        tuple(k / space.ambient_dim for k in counts),
    )


def _paired(name: str, layer: str, spaces: Mapping[str, Subspace | None], rule: EnergyRank) -> Iterator[PairedUpdates]:
    main = {
        each: space.truncate(kept_rank(space, rule)).to(torch.float64)
        for each, space in spaces.items()
        if space is not None
    }
    for (first, a), (second, b) in combinations(main.items(), 2):
        angles = a.angles(b).rad2deg()
        chance = expected_overlap(a.dim, b.dim, a.ambient_dim)
        numbers = (float(a.overlap(b)), chance, float(angles.min()), float(angles.mean()))
        yield PairedUpdates(name, layer, first, second, (a.dim, b.dim), *numbers)


def shares_beyond_chance(
    held: Sequence[HeldUpdate], names: list[str], place: int, level: float, resamples: int, random_state: int
) -> tuple[dict[str, Estimate], dict[tuple[str, str], Estimate]]:
    """Shares beyond chance and their differences, with a bootstrap over layers, or tensors."""
    rows = [row for row in held if row.rank]
    by_layer = len({row.layer for row in rows}) >= _LAYERS
    unit: Callable[[HeldUpdate], str] = (lambda row: row.layer) if by_layer else (lambda row: row.tensor)
    units = {each: number for number, each in enumerate(dict.fromkeys(map(unit, rows)))}
    sums = np.zeros((len(units), len(names), 3))
    for row in rows:
        parts = (row.energy, row.energy * row.kept[place], row.energy * row.chance[place])
        sums[units[unit(row)], names.index(row.tuned)] += parts
    flat = sums.reshape(len(units), -1)
    drawn = resampled_means(flat, resamples=resamples, random_state=random_state)
    means = np.concatenate([flat.mean(0, keepdims=True), drawn]).reshape(resamples + 1, len(names), 3)
    whole, kept, chance = np.moveaxis(means, 2, 0)
    room = whole - chance
    # Directions that are all there are hold everything by chance: nothing is beyond it.
    shares = np.divide(kept - chance, room, out=np.zeros_like(room), where=room > 1e-12 * whole)
    tail = (1 - level) / (len(names) * (len(names) + 1))
    # Too few to draw from: the interval is everything.
    few = len(units) < _FEWEST

    def estimate(values: Float[np.ndarray, " r"]) -> Estimate:
        low, high = (-1.0, 1.0) if few else np.quantile(values[1:], [tail, 1 - tail])
        return Estimate(float(values[0]), float(low), float(high))

    beyond = {name: estimate(shares[:, number]) for number, name in enumerate(names)}
    differences = {
        (names[a], names[b]): estimate(shares[:, a] - shares[:, b]) for a, b in combinations(range(len(names)), 2)
    }
    return beyond, differences


def judged_shares(
    beyond: Mapping[str, Estimate], differences: Mapping[tuple[str, str], Estimate], margin: float, where: str
) -> tuple[Any, str]:
    """The verdict of `compare_updates` on shares in some directions, and why; where: what holds them, plural."""

    def said(found: Estimate) -> str:
        return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"

    if not differences:
        name, found = next(iter(beyond.items()))
        words = f"{where} hold {said(found)} of the update of {name!r}, on a scale from chance (0) to all of it (1)"
        if found.low > 0:
            return "beyond chance", words
        return ("at chance" if found.high < margin else "no evidence"), words
    (one, other), widest = max(differences.items(), key=lambda item: abs(item[1].value))
    if widest.value < 0:
        one, other, widest = other, one, Estimate(-widest.value, -widest.high, -widest.low)
    words = f"{said(widest)} more of the update of {one!r} than of that of {other!r}, beyond what random ones hold"
    if widest.value >= margin and widest.low > 0:
        return "unequal", f"{where} hold {words}"
    if all(-margin < found.low and found.high < margin for found in differences.values()):
        return "alike", f"{where} hold at most {words}; {margin:g} is excluded"
    return "no evidence", f"{where} hold at most {words}; {margin:g} is not excluded"
