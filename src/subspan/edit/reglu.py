"""ReGLU: where a low-rank update may write so that a language model forgets some answers and keeps the others.

Of each linear layer's outputs, summed over a text's tokens, the directions with most energy on what is to be forgotten
less that on what is to be retained are where the update starts, and the main directions of what is to be retained are
what its columns are kept out of.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.geometry import Subspace
from subspan.geometry.rank import RankRule
from subspan.models import LowRankChange, SiteMoments, collect_moments, linear_names
from subspan.models.layers import Layers, layer_names, linear_weight
from subspan.nn import weight_projection_penalty
from subspan.statistics import Moments, contrast_spectrum

Pool = Literal["sum", "mean", "rows"]


@dataclass(frozen=True)
class LayerPlan:
    """What ReGLU does at one layer.

    Attributes
    ----------
    forget
        Q (d_out, r): where the update starts.
    retain
        P (d_out, k): what the update's columns are to be orthogonal to.
    spectrum
        Eigenvalues of the contrast, descending, of either sign; those of directions that no text reaches are left out.
    filled
        How many directions of Q have no more energy on what is to be forgotten than on the rest.
    """

    forget: Subspace
    retain: Subspace
    spectrum: Float[Tensor, " m"]
    filled: int = 0

    @property
    def overlap(self) -> float:
        """Mean squared cosine of the principal angles of Q and P: how far the start reaches into what is to stay."""
        return float(self.forget.overlap(self.retain))

    @property
    def chance(self) -> float:
        """The part of a random change's norm that lies in P."""
        return math.sqrt(self.retain.dim / self.retain.ambient_dim)


def collect_output_moments(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Layers | None = None,
    *,
    pool: Pool = "sum",
    include_padding: bool = False,
    **options: Any,
) -> SiteMoments:
    """Moments of the outputs of a model's linear layers over texts, one row a text: what `reglu_plan` takes two of.

    Parameters
    ----------
    model
        Any torch module.
    batches
        What it takes, with an attention_mask where there is padding.
    layers
        As in `layer_names`; None: all linear layers inside the model's blocks.
    pool
        "sum" or "mean" over a text's tokens, or "rows": every token is a row.
    include_padding
        Count padded positions too, as the released code does, whose texts are padded to one length.
    **options
        Of `collect_moments`, such as not_finite or dtype.

    Returns
    -------
    SiteMoments, in float64.

    Raises
    ------
    ValueError
        Where there is no linear layer, no batch, or a weight that is quantised.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import collect_output_moments
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> collect_output_moments(model, torch.randn(2, 5, 7, 4))["1"].count
    10.0
    """
    names = linear_names(model) if layers is None else layer_names(model, layers)
    for name in names:
        linear_weight(model.get_submodule(name))
    if include_padding:
        options["mask"] = None
    return collect_moments(model, batches, names, site="output", pool=pool, share=False, **options)


def contrast_subspace(
    forget: Moments, retain: Moments, rank: int, *, beta: float = 0.7, center: bool = False
) -> tuple[Subspace, Float[Tensor, " m"], int]:
    """Directions Q that maximise tr Q'((1 - beta) C_forget - beta C_retain) Q, of any sign of what they reach.

    Parameters
    ----------
    forget, retain
        Moments in the same dimension d.
    rank
        r <= d.
    beta
        In [0, 1]; 0: the main directions of what is to be forgotten; 1: the least ones of what is to be retained.
    center
        Whether C are covariances; by default second moments about the origin.

    Returns
    -------
    (Q, eigenvalues, filled)
        Q (d, r) ordered by eigenvalue; the eigenvalues (m,) that are not zero for want of data, descending; how many
        directions of Q have none above zero. Directions that no row reaches have eigenvalue zero, and come before
        those of negative ones.

    Raises
    ------
    ValueError
        For ranks above d, unequal dimensions, fewer than two rows, beta outside [0, 1], and moments that are zero.

    References
    ----------
    ReGLU (arXiv 2604.17396); the trace is largest by Ky Fan's theorem.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import contrast_subspace
    >>> from subspan.statistics import Moments
    >>> forget = Moments(3).update([[2.0, 1.0, 0.0], [-2.0, 1.0, 0.0]])
    >>> retain = Moments(3).update([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    >>> space, values, filled = contrast_subspace(forget, retain, 1)
    >>> space.basis.abs().flatten().round(decimals=3).tolist(), filled
    ([0.0, 1.0, 0.0], 0)
    """
    if not 1 <= rank <= forget.d:
        raise ValueError(f"rank: between 1 and {forget.d}, the layer's width, got {rank}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: must lie in [0, 1], got {beta}")
    for name, moments in (("forget", forget), ("retain", retain)):
        if moments.count < 2:
            raise ValueError(f"{name}: at least 2 texts are needed, got {moments.count:g}")
    values, vectors = contrast_spectrum(forget, retain, weight=beta, center=center)
    size = float(values.abs().max())
    if not size > 0:
        raise ValueError("forget, retain: all outputs are zero")
    floor = size * forget.d * torch.finfo(values.dtype).eps
    up, down = values > floor, values < -floor
    found = int(up.sum())
    basis = vectors[:, :rank]
    if found < rank:
        reached = torch.cat([vectors[:, up], vectors[:, down]], 1)
        # All directions, those that are reached first: the others follow.
        free = torch.linalg.qr(reached, mode="complete")[0][:, reached.shape[1] :]
        basis = torch.cat([vectors[:, up], free, vectors[:, down]], 1)[:, :rank]
    return Subspace(basis), values[up | down], max(0, rank - found)


def reglu_plan(
    forget: Mapping[str, Moments],
    retain: Mapping[str, Moments],
    *,
    rank: int = 32,
    beta: float = 0.7,
    retain_rank: int | float | str | RankRule = 0.99,
    retain_cap: float | None = 0.1,
    center: bool = False,
) -> dict[str, LayerPlan]:
    """Of each layer the subspace to start in and the subspace to stay out of.

    Parameters
    ----------
    forget, retain
        Moments of the layers' outputs by name, from `collect_output_moments`; rows that both keep are worked on in
        their own space, so that a wide layer costs no more than there are texts.
    rank
        r of the update, at most each layer's width.
    beta
        Weight of what is to be retained in the contrast (1 - beta) C_forget - beta C_retain.
    retain_rank
        Of P: a number, a share of the energy, or a rule.
    retain_cap
        P has at most this share of the layer's directions, so that narrow layers keep room to move; None: no limit.
        An int for `retain_rank` is taken as it is.
    center
        Whether moments are about the mean; the published ones are about the origin.

    Returns
    -------
    dict
        Name → `LayerPlan`, for the layers in `forget`.

    Raises
    ------
    ValueError
        Naming the layer: for what `contrast_subspace` refuses, and layers that only one of the two has.

    Warns
    -----
    UserWarning
        Where both sets have the same moments, and where a layer has fewer directions of contrast than `rank`.

    References
    ----------
    ReGLU (arXiv 2604.17396). There P has 128 directions everywhere: two thirds of a width of 192.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import collect_output_moments, reglu_plan
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> kinds = (torch.randn(1, 9, 5, 8) + shift for shift in (0.0, 3.0))
    >>> plan = reglu_plan(*(collect_output_moments(model, kind) for kind in kinds), rank=2, retain_rank=1)
    >>> plan["0"].forget.basis.shape, plan["0"].retain.dim
    (torch.Size([6, 2]), 1)
    """
    if set(forget) != set(retain):
        odd = sorted(set(forget) ^ set(retain))
        raise ValueError(f"forget, retain: only one of them has {', '.join(odd[:3])}")
    if retain_cap is not None and not 0 < retain_cap <= 1:
        raise ValueError(f"retain_cap: must lie in (0, 1], got {retain_cap}")
    found: dict[str, LayerPlan] = {}
    same = []
    for name, wanted in forget.items():
        kept = retain[name]
        try:
            space, values, filled = contrast_subspace(wanted, kept, rank, beta=beta, center=center)
            main = kept.subspace(retain_rank, center=center)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if retain_cap is not None and not isinstance(retain_rank, int):
            main = main.truncate(min(main.dim, max(1, round(retain_cap * kept.d))))
        found[name] = LayerPlan(space, main, values, filled)
        same.append(torch.allclose(wanted.mean, kept.mean) and torch.allclose(wanted.squares, kept.squares))
    if all(same):
        warnings.warn("forget and retain have the same moments: there is no contrast between them", stacklevel=2)
    elif short := [name for name, layer in found.items() if layer.filled]:
        warnings.warn(
            f"{len(short)} of {len(found)} layers have fewer than {rank} directions with more energy on forget than on "
            f"retain, such as {short[0]}: the rest are directions that no text reaches, then those of least retain "
            "energy; lower rank or beta, or give more texts",
            stacklevel=2,
        )
    return found


class SubspaceOrthogonalityLoss(nn.Module):
    """Sum over layers of |B'P|² (Frobenius): how far the columns of low-rank updates reach into what is to stay.

    Parameters
    ----------
    subspaces
        Name of a layer → P; every layer has its own.
    of
        "up": of B itself, as published. "net": of the whole change scale (B A - B₀ A₀) of the weight, which also has
        what the start takes out.

    Raises
    ------
    ValueError
        In the call, for a layer that has no subspace: none is ever drawn for it.

    References
    ----------
    ReGLU (arXiv 2604.17396).

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import SubspaceOrthogonalityLoss
    >>> from subspan.geometry import Subspace
    >>> from subspan.models import add_low_rank
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> space = Subspace.span(torch.eye(4)[:, :2])
    >>> edit = add_low_rank(model, {"0": space})
    >>> round(SubspaceOrthogonalityLoss({"0": space})(edit.layers).item(), 4)
    2.0
    """

    def __init__(self, subspaces: Mapping[str, Subspace], *, of: Literal["up", "net"] = "up") -> None:
        super().__init__()
        if of not in ("up", "net"):
            raise ValueError(f"of: 'up' or 'net', got {of!r}")
        self.subspaces, self.of = dict(subspaces), of

    def forward(self, layers: Mapping[str, LowRankChange]) -> Float[Tensor, ""]:
        """Of the layers of a `LowRankEdit`."""
        if missing := [name for name in layers if name not in self.subspaces]:
            raise ValueError(f"subspaces: none is given for {missing[0]}")
        return torch.stack([self._of(layer, self._placed(name, layer)) for name, layer in layers.items()]).sum()

    def _of(self, layer: LowRankChange, space: Subspace) -> Tensor:
        if self.of == "up":
            return weight_projection_penalty(layer.up, space)
        change = (space.basis.mT @ layer.up) @ layer.down - (space.basis.mT @ layer.start_up) @ layer.start_down
        return (layer.scale * change).square().sum()

    def _placed(self, name: str, layer: LowRankChange) -> Subspace:
        """The subspace where the layer is, moved once."""
        space = self.subspaces[name]
        if space.basis.device != layer.up.device or space.basis.dtype != layer.up.dtype:
            space = self.subspaces[name] = space.to(device=layer.up.device, dtype=layer.up.dtype)
        return space


def random_subspaces(subspaces: Mapping[str, Subspace], *, random_state: int = 0) -> dict[str, Subspace]:
    """Uniformly random subspaces of the same sizes under the same names: the control of what the right ones do.

    Parameters
    ----------
    subspaces
        By name.
    random_state
        Seed.

    Returns
    -------
    dict

    Examples
    --------
    >>> from subspan.edit import random_subspaces
    >>> from subspan.geometry import Subspace
    >>> random_subspaces({"layer": Subspace.random(8, 3)})["layer"].basis.shape
    torch.Size([8, 3])
    """
    generator = torch.Generator().manual_seed(random_state)
    return {name: Subspace.random(s.ambient_dim, s.dim, generator=generator) for name, s in subspaces.items()}


@dataclass(frozen=True)
class Leakage:
    """How much of the changes of a model's weights lies in subspaces of the outputs.

    Attributes
    ----------
    by_layer
        Name → |P'D| / |D| (Frobenius) of the net change D of the weight, in [0, 1]; 0 where nothing changed.
    total
        The same of all layers together.
    chance
        What random directions would give: the root of the mean of k / d, weighed by the layers' |D|².
    """

    by_layer: dict[str, float]
    total: float
    chance: float


def net_leakage(layers: Mapping[str, LowRankChange], subspaces: Mapping[str, Subspace]) -> Leakage:
    """Leakage of the net changes scale (B A - B₀ A₀), with what the start has taken out of the weight.

    Parameters
    ----------
    layers
        Of a `LowRankEdit`, by name.
    subspaces
        P of each, by name.

    Returns
    -------
    Leakage

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import net_leakage
    >>> from subspan.geometry import Subspace
    >>> from subspan.models import add_low_rank
    >>> edit = add_low_rank(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"0": 2})
    >>> edit.layers["0"].up.data += 1
    >>> 0 < net_leakage(edit.layers, {"0": Subspace.random(4, 2)}).total < 1
    True
    """
    by_layer: dict[str, float] = {}
    inside = whole = expected = 0.0
    for name, layer in layers.items():
        # Both factors in float64: what was learnt may be a millionth of the start.
        down, up = (part.double() for part in layer.update())
        change = up @ down
        space = subspaces[name]
        size = float(change.square().sum())
        part = float((space.basis.to(change).mT @ change).square().sum())
        by_layer[name] = math.sqrt(part / size) if size else 0.0
        inside, whole = inside + part, whole + size
        expected += size * space.dim / space.ambient_dim
    return Leakage(by_layer, *((math.sqrt(inside / whole), math.sqrt(expected / whole)) if whole else (0.0, 0.0)))
