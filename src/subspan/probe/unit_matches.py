"""Which units of two networks say the same: matchings, groups, sparse predictions."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import lars_path_gram
from torch import Tensor, nn

from subspan.geometry import AffineMap, CanonicalCorrelation, Subspace
from subspan.models import iterate_representations
from subspan.statistics import JointMoments


@dataclass(frozen=True)
class Matching:
    """Partner in x of each unit of y.

    Attributes
    ----------
    partner
        (q,), -1 where a unit has none.
    correlation
        (q,) of the two, 0 where there is none.
    """

    partner: Int[Tensor, " q"]
    correlation: Float[Tensor, " q"]

    def mean(self) -> float:
        """Mean |correlation| of the units that have a partner; 0 where none has."""
        kept = self.partner >= 0
        return float(self.correlation[kept].abs().mean()) if bool(kept.any()) else 0.0


@dataclass(frozen=True)
class SparsePrediction:
    """Each unit of y from few units of x.

    Attributes
    ----------
    map
        The affine map.
    partners
        Of each unit of y, in the order they entered.
    """

    map: AffineMap
    partners: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UnitGroup:
    """Units of both networks that belong together, and how far the two spans agree.

    Attributes
    ----------
    x, y
        Their numbers in the two networks.
    inside
        Mean |correlation| between its members of x and of y.
    canonical
        Canonical correlations of its two sets of units; None where one of them is empty.
    widths
        Numbers of units of the two networks.
    """

    x: Int[Tensor, " a"]
    y: Int[Tensor, " b"]
    inside: float
    canonical: CanonicalCorrelation | None
    widths: tuple[int, int]

    @property
    def parity(self) -> float:
        """Smaller over larger number of members."""
        return min(len(self.x), len(self.y)) / max(len(self.x), len(self.y))

    @property
    def agreement(self) -> float:
        """Mean canonical correlation; 0 where one side is empty."""
        return 0.0 if self.canonical is None else float(self.canonical.correlations.mean())

    def subspaces(self) -> tuple[Subspace, Subspace]:
        """The canonical directions as subspaces of the two spaces of units. Raises ValueError for an empty side."""
        if self.canonical is None:
            raise ValueError("group: it has members of one network only, so there is nothing to compare")
        found = []
        for members, directions, width in (
            (self.x, self.canonical.x_directions, self.widths[0]),
            (self.y, self.canonical.y_directions, self.widths[1]),
        ):
            whole = directions.new_zeros(width, directions.shape[1])
            whole[members] = directions
            found.append(Subspace.span(whole))
        return found[0], found[1]


def mean_agreement(groups: Sequence[UnitGroup]) -> float:
    """Mean canonical correlation inside groups with members of both networks, weighted by their units of Y.

    Parameters
    ----------
    groups
        Of `ConvergentLearning.groups`.

    Returns
    -------
    float, 0 where no group has both.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import ConvergentLearning, mean_agreement
    >>> x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    >>> groups = ConvergentLearning().fit(x, x.flip(1)).groups(3)
    >>> round(mean_agreement(groups), 3)
    1.0
    """
    both = [group for group in groups if group.canonical is not None]
    return float(np.average([g.agreement for g in both], weights=[len(g.y) for g in both])) if both else 0.0


def lasso_path(gram: np.ndarray, cross: np.ndarray, steps: int) -> tuple[list[int], np.ndarray]:
    """Units in the order in which they entered, and the coefficients (p, steps + 1) at each step of the path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Regressors in active set degenerate")
        warnings.filterwarnings("ignore", message="Early stopping the lars path")
        _, order, path = lars_path_gram(cross, gram, n_samples=1, max_iter=steps, method="lasso")
    return [int(index) for index in order], path


def at_penalty(alphas: np.ndarray, path: np.ndarray, penalty: float) -> np.ndarray:
    """Coefficients of a piecewise linear path at one penalty."""
    if penalty >= alphas[0]:
        return path[:, 0]
    after = int(np.searchsorted(-alphas, -penalty, side="left"))
    if after >= len(alphas):
        return path[:, -1]
    high, low = alphas[after - 1], alphas[after]
    share = 0.0 if high == low else (high - penalty) / (high - low)
    return (1 - share) * path[:, after - 1] + share * path[:, after]


def layer_moments(
    models: Sequence[nn.Module],
    layers: Sequence[str | Sequence[str]],
    batches: Iterable[Any],
    *,
    layout: Any = "auto",
    mask: Any = "attention_mask",
    shift: int = 0,
    forward: Any = None,
) -> dict[tuple[int, int], list[JointMoments]]:
    """Joint moments of layers of every two models (i < j) over batches of inputs.

    Every position of a feature map, every selected token, is a row; each model runs once a batch.

    Parameters
    ----------
    models
        At least two.
    layers
        Names, each one for all models or a tuple of a name a model.
    batches
        What the models take.
    layout, mask, forward
        As in `iterate_representations`.
    shift
        Inputs of a batch by which the second model's activations are moved on, so that they meet another input's: the
        null of no correspondence.

    Returns
    -------
    dict of (i, j) → list of JointMoments, in the order of `layers`.

    Raises
    ------
    ValueError
        For fewer than two models, no batch, or layers with different grids.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import layer_moments
    >>> models = [torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU()) for width in (3, 5)]
    >>> found = layer_moments(models, ["1"], [torch.randn(16, 4), torch.randn(16, 4)])
    >>> found[0, 1][0].count, found[0, 1][0].d_x, found[0, 1][0].d_y
    (32.0, 3, 5)
    """
    named = [[layer] * len(models) if isinstance(layer, str) else list(layer) for layer in layers]
    if len(models) < 2 or not named or any(len(names) != len(models) for names in named):
        raise ValueError(
            "models, layers: at least two models, and of each layer one name or a name a model, are needed"
        )
    pairs = list(combinations(range(len(models)), 2))
    found: dict[tuple[int, int], list[JointMoments]] = {pair: [] for pair in pairs}
    for batch in batches:
        states = []
        for model, names in zip(models, zip(*named)):
            wanted = list(dict.fromkeys(names))
            (rows,) = iterate_representations(
                model, [batch], wanted, pool="rows", mask=mask, layout=layout, forward=forward
            )
            states.append([rows[name] for name in names])
        for i, j in pairs:
            for place, (x, y) in enumerate(zip(states[i], states[j])):
                y = y.to(x.device)
                if len(x) != len(y):
                    raise ValueError(
                        f"layers: {named[place][i]!r} has {len(x)} positions in a batch, {named[place][j]!r} {len(y)}; "
                        "choose layers whose feature maps have one size"
                    )
                if shift:
                    y = y.unflatten(0, (_inputs(batch), -1)).roll(shift, 0).flatten(0, 1)
                if place == len(found[i, j]):
                    found[i, j].append(JointMoments(x.shape[1], y.shape[1], device=x.device))
                found[i, j][place].update(x, y)
    if not found[pairs[0]]:
        raise ValueError("batches: at least one is needed")
    return found


def _inputs(batch: Any) -> int:
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch
    first = first[0] if isinstance(first, tuple | list) else first
    return len(first)
