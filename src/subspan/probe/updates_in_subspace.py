"""How much of what updates write into a model's residual stream lies in one subspace of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from subspan.base import Progress, silent
from subspan.geometry import Subspace
from subspan.models import StateDelta
from subspan.models.weights import as_matrix

from .update_comparison import Estimate, HeldUpdate, judged_shares, shares_beyond_chance
from .update_geometry import numbered_layer

WRITERS = r"\b(o_proj|down_proj|out_proj|fc2|dense_4h_to_h|output\.dense|attention\.dense)\.weight$"
"""Names of matrices whose outputs are added to the residual stream, in Llama, Gemma, Qwen, OPT, NeoX and BERT."""


@dataclass(frozen=True)
class UpdatesInSubspace:
    """What `updates_in_subspace` found.

    Attributes
    ----------
    verdict, reason
        As in `UpdateComparison`.
    shares
        Model → share of the energy of what its update writes that lies in the subspace.
    chance
        That of a uniformly random subspace of the same dimension.
    beyond
        Model → the same on a scale from chance (0) to all of it (1).
    differences
        (one, other) → difference of the two.
    held
        A row a tensor and model.
    unmoved
        Models whose updates change no matrix that writes; they are in nothing of the above.
    """

    verdict: Literal["unequal", "alike", "beyond chance", "at chance", "no evidence"]
    reason: str
    shares: dict[str, float]
    chance: float
    beyond: dict[str, Estimate]
    differences: dict[tuple[str, str], Estimate]
    held: tuple[HeldUpdate, ...]
    unmoved: tuple[str, ...]

    def layers(self) -> dict[str, dict[str, float]]:
        """Model → layer → share."""
        found: dict[str, dict[str, float]] = {}
        for name in self.beyond:
            rows = [row for row in self.held if row.tuned == name]
            found[name] = {
                layer: sum(row.energy * row.kept[0] for row in rows if row.layer == layer)
                / sum(row.energy for row in rows if row.layer == layer)
                for layer in dict.fromkeys(row.layer for row in rows)
            }
        return found

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


def updates_in_subspace(
    deltas: Mapping[str, StateDelta],
    subspace: Subspace,
    *,
    writes: str = WRITERS,
    margin: float = 0.2,
    level: float = 0.95,
    resamples: int = 4000,
    random_state: int = 0,
    progress: Progress = silent,
) -> UpdatesInSubspace:
    """How much of each update lies in a subspace of the states between blocks, such as `PropertyProbe` finds.

    A matrix W that writes into these states moves them by (ΔW) h: the share is ||B'ΔW||² / ||ΔW||². What a random
    subspace of the same dimension holds is known, k/d. Weights say where an update writes, not what it does.

    Parameters
    ----------
    deltas
        Name → update.
    subspace
        Of the states, as wide as they are.
    writes
        Regular expression of the names of matrices (d, n) whose outputs are added to the states.
    margin, level, resamples, random_state, progress
        As in `compare_updates`.

    Returns
    -------
    UpdatesInSubspace

    Raises
    ------
    ValueError
        Where no matrix of that name has outputs as wide as the subspace, and where all updates are zero in them.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Subspace
    >>> from subspan.models import StateDelta
    >>> from subspan.probe import updates_in_subspace
    >>> names = [f"layers.{i}.o_proj.weight" for i in range(8)]
    >>> zero = {name: torch.zeros(6, 6) for name in names}
    >>> tuned = {name: torch.diag(torch.tensor([3.0, 1, 0, 0, 0, 0])) for name in names}
    >>> found = updates_in_subspace({"tuned": StateDelta.between(zero, tuned)}, Subspace(torch.eye(6)[:, :1]))
    >>> found.verdict, round(found.shares["tuned"], 3), round(found.chance, 3)
    ('beyond chance', 0.9, 0.167)
    """
    if subspace.batch_shape:
        raise ValueError(f"subspace: expected one, got a batch of shape {subspace.batch_shape}")
    if not deltas:
        raise ValueError("deltas: at least one update is needed")
    if not 0 < level < 1 or margin <= 0:
        raise ValueError(f"level, margin: in (0, 1) and above 0, got {level} and {margin}")
    shapes = next(iter(deltas.values())).shapes
    named = [name for name, shape in shapes.items() if re.search(writes, name) and len(shape) == 2]
    names = [name for name in named if shapes[name][0] == subspace.ambient_dim]
    if not names:
        widths = sorted({shapes[name][0] for name in named})
        raise ValueError(
            f"subspace: has {subspace.ambient_dim} dimensions, matrices that write states have "
            + (f"{', '.join(map(str, widths))} outputs" if widths else "other names; give them as `writes`")
        )
    basis, chance = subspace.basis.double(), subspace.dim / subspace.ambient_dim
    held: list[HeldUpdate] = []
    for number, name in enumerate(names):
        progress(f"reading {name}", number / len(names))
        for tuned, delta in deltas.items():
            matrix = as_matrix(delta[name]).double()
            if energy := float(matrix.square().sum()):
                kept = float((basis.to(matrix).mT @ matrix).square().sum()) / energy
                layer = numbered_layer(name) or name
                held.append(HeldUpdate(name, layer, tuned, energy, math.nan, subspace.dim, (kept,), (kept,), (chance,)))
    moved = [each for each in deltas if any(row.tuned == each for row in held)]
    if not moved:
        raise ValueError("deltas: all updates are zero in the matrices that write states")
    beyond, differences = shares_beyond_chance(held, moved, 0, level, resamples, random_state)
    where = f"the subspace's {subspace.dim} of {subspace.ambient_dim} directions"
    verdict, reason = judged_shares(beyond, differences, margin, where)
    shares = {}
    for tuned in moved:
        rows = [row for row in held if row.tuned == tuned]
        shares[tuned] = sum(row.energy * row.kept[0] for row in rows) / sum(row.energy for row in rows)
    unmoved = tuple(each for each in deltas if each not in moved)
    return UpdatesInSubspace(verdict, reason, shares, chance, beyond, differences, tuple(held), unmoved)
