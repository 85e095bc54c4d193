"""How the update of one checkpoint lies to that of another: projections, and overlaps beside chance.

Updates are `StateDelta`s, read tensor by tensor; a matrix is compared in the space of its outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from subspan.base.draws import generator_for
from subspan.geometry import EnergyRank, FractionOfDim, RankRule, Subspace, expected_overlap, rank_rule
from subspan.models import StateDelta, SubspaceMap, collect_moments, find_blocks, layer_names
from subspan.models.layers import Layers
from subspan.models.weights import as_matrix, main_subspace

Kind = Literal["topk", "randomk", "random"]
Mode = Literal["same", "orth", "opp"]
ALL = FractionOfDim(1.0)


def weight_subspaces(
    delta: StateDelta | SubspaceMap,
    rank: int | float | str | RankRule = 0.9,
    *,
    kind: Kind = "topk",
    random_state: int = 0,
) -> SubspaceMap:
    """Subspaces of an update's outputs, tensor by tensor: its main ones, or a control of the same rank.

    Parameters
    ----------
    delta
        The update, or all that it spans (`delta.subspaces(FractionOfDim(1.0))`), which is then not decomposed again.
    rank
        As elsewhere, of the squared singular values: an int, a share of the energy, or a rule such as
        ``FractionOfDim(0.25)``, a quarter of the directions. Never more than the numerical rank: of an update of rank 8
        there are 8 directions.
    kind
        "topk": the first left singular vectors; "randomk": as many of them, drawn without regard to their size;
        "random": a uniformly random subspace of the same dimension, which knows nothing of the update.
    random_state
        Seed; each tensor has draws of its own.

    Returns
    -------
    SubspaceMap; tensors of which the update is zero are not in it. A vector (a bias, a norm) has one direction, itself.

    Raises
    ------
    ValueError
        For another kind, and where the update is zero everywhere.

    References
    ----------
    Ponkshe et al. (2025), Safety Subspaces are Not Distinct, arXiv 2505.14185.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import FractionOfDim
    >>> from subspan.models import StateDelta
    >>> from subspan.probe import weight_subspaces
    >>> delta = StateDelta.between({"w": torch.zeros(8, 8)}, {"w": torch.diag(torch.arange(8.0))})
    >>> weight_subspaces(delta, FractionOfDim(0.25))["w"].basis.abs().argmax(0)
    tensor([7, 6])
    >>> weight_subspaces(delta, FractionOfDim(0.25), kind="random")["w"].dim
    2
    """
    if kind not in ("topk", "randomk", "random"):
        raise ValueError(f"kind: 'topk', 'randomk' or 'random', got {kind!r}")
    found: dict[str, Subspace] = {}
    for name in delta:
        value = delta[name]
        whole = value if isinstance(value, Subspace) else main_subspace(value, ALL)
        if whole is None:
            continue
        k, generator = kept_rank(whole, rank), generator_for(random_state, kind, name)
        if kind == "topk":
            found[name] = whole.truncate(k)
        elif kind == "randomk":
            found[name] = whole.select(torch.randperm(whole.dim, generator=generator)[:k])
        else:
            drawn = Subspace.random(whole.ambient_dim, k, generator=generator, dtype=whole.basis.dtype)
            found[name] = drawn.to(whole.basis.device)
    if not found:
        raise ValueError("delta: is zero everywhere, so that it spans nothing (is the aligned model the base itself?)")
    return SubspaceMap(found)


def kept_rank(whole: Subspace, rank: Any) -> int:
    """How many of all directions of an update a `rank=` stands for."""
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return min(rank, whole.dim)
    assert whole.spectrum is not None
    assert whole.count is not None
    k = rank_rule(rank)(whole.spectrum.double().cpu().numpy(), max(1, round(whole.count)), whole.ambient_dim)
    return min(k, whole.dim)


@dataclass(frozen=True)
class ProjectedUpdate:
    """An update of which one part is left, and how much that is; see `projected_update`.

    Attributes
    ----------
    update
        P: to be added to the aligned model (`applied`, `added_to`).
    energy_kept
        |P|² / |U|² of the whole update U.
    cosine
        Of U and P: the root of the energy kept, below zero for "opp"; 0 where nothing is left.
    cosine_to_reference
        Of U and the reference update V.
    energies
        Name → |P|² / |U|² of a tensor, of those that U changes.
    """

    update: StateDelta
    energy_kept: float
    cosine: float
    cosine_to_reference: float
    energies: dict[str, float]


def projected_update(
    reference: StateDelta, delta: StateDelta, subspaces: Mapping[str, Subspace], mode: Mode = "same"
) -> ProjectedUpdate:
    """The part of an update U inside, or outside of, subspaces of a reference update V.

    A tensor without a subspace, of which V is zero, has nothing inside. The published code divides the inner product
    of U and V by its own root, and not by |U| |V|; here it is the cosine.

    Parameters
    ----------
    reference
        V, such as from the base to the aligned model.
    delta
        U, such as from the aligned model to one that was tuned on.
    subspaces
        By the name of the tensor, such as `weight_subspaces(reference)`.
    mode
        "same": the part inside; "orth": the part outside; "opp": the part inside with its sign turned.

    Returns
    -------
    ProjectedUpdate

    Raises
    ------
    ValueError
        For another mode, a zero update or reference, and subspaces of tensors that `delta` does not have.

    References
    ----------
    Ponkshe et al. (2025), arXiv 2505.14185.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.probe import projected_update, weight_subspaces
    >>> zero = {"w": torch.zeros(2, 2)}
    >>> reference = StateDelta.between(zero, {"w": torch.diag(torch.tensor([1.0, 0.0]))})
    >>> delta = StateDelta.between(zero, {"w": torch.diag(torch.tensor([3.0, 4.0]))})
    >>> found = projected_update(reference, delta, weight_subspaces(reference))
    >>> found.update["w"].tolist(), round(found.energy_kept, 2), round(found.cosine, 2)
    ([[3.0, 0.0], [0.0, 0.0]], 0.36, 0.6)
    """
    if mode not in ("same", "orth", "opp"):
        raise ValueError(f"mode: 'same', 'orth' or 'opp', got {mode!r}")
    inside = delta.projected(subspaces).map(lambda name, value: value if name in subspaces else torch.zeros_like(value))
    update = {"same": inside, "orth": delta.projected(subspaces, outside=True), "opp": -inside}[mode]
    energies: dict[str, float] = {}
    whole = kept = product = across = 0.0
    for name in delta:
        u, p = delta[name].double(), update[name].double()
        energy = float(u.square().sum())
        if energy:
            energies[name] = float(p.square().sum()) / energy
        whole, kept = whole + energy, kept + energies.get(name, 0.0) * energy
        product += float((u * p).sum())
        if name in reference.shapes:
            across += float((u * reference[name].double().to(u.device)).sum())
    norm = reference.norm()
    if whole == 0 or norm == 0:
        raise ValueError(f"{'delta' if whole == 0 else 'reference'}: is zero everywhere, so that it has no direction")
    return ProjectedUpdate(
        update,
        kept / whole,
        product / math.sqrt(whole * kept) if kept else 0.0,
        across / (math.sqrt(whole) * norm),
        energies,
    )


class Overlap(NamedTuple):
    """How much two subspaces share, beside what random ones of the same dimensions do.

    Attributes
    ----------
    name
        Of the tensor, or the layer.
    energy
        Share of the energy that each of the two holds.
    ranks
        Their dimensions.
    overlap
        Mean squared cosine of the principal angles, in [0, 1].
    chance
        Its mean over random subspaces, max(ranks) / d.
    centred
        Of activations: whether their mean was taken off.
    """

    name: str
    energy: float
    ranks: tuple[int, int]
    overlap: float
    chance: float
    centred: bool = False


def subspace_overlaps(
    first: StateDelta,
    second: StateDelta,
    energies: Sequence[float] = (0.9,),
    *,
    granularity: Literal["tensor", "layer"] = "tensor",
) -> list[Overlap]:
    """Mode subspace overlap of two updates: what the main output directions of the one share with those of the other.

    Parameters
    ----------
    first, second
        Updates; tensors that only one has, or that one leaves as they are, are left out. Matrices of any size are
        decomposed exactly.
    energies
        Shares η of the squared singular values, in (0, 1]: of each update the fewest directions that hold so much.
    granularity
        "tensor"; or "layer": the tensors of a numbered layer that have equally many columns are put below one another.

    Returns
    -------
    list of Overlap, for every tensor (or layer) one a share.

    Raises
    ------
    ValueError
        For shares outside (0, 1], another granularity, and where nothing can be compared.

    References
    ----------
    Ponkshe et al. (2025), arXiv 2505.14185.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import StateDelta
    >>> from subspan.probe import subspace_overlaps
    >>> zero, (one, two, three) = {"w": torch.zeros(4, 4)}, torch.eye(4)[:3]
    >>> first = StateDelta.between(zero, {"w": torch.outer(one, one) + torch.outer(two, two)})
    >>> second = StateDelta.between(zero, {"w": torch.outer(two, one) + torch.outer(three, three)})
    >>> subspace_overlaps(first, second)
    [Overlap(name='w', energy=0.9, ranks=(2, 2), overlap=0.5, chance=0.5, centred=False)]
    """
    if granularity not in ("tensor", "layer"):
        raise ValueError(f"granularity: 'tensor' or 'layer', got {granularity!r}")
    rules = [EnergyRank(energy) for energy in energies]
    groups: dict[str, list[str]] = {}
    for name in first:
        if name in second:
            groups.setdefault(name if granularity == "tensor" else _layer(name, first.shapes[name]), []).append(name)
    rows: list[Overlap] = []
    for group, names in groups.items():
        parts = [main_subspace(torch.cat([as_matrix(side[n]) for n in names]), ALL) for side in (first, second)]
        a, b = (None if part is None else part.to(torch.float64) for part in parts)
        if a is not None and b is not None:
            rows += _overlaps(group, a, b, rules)
    if not rows:
        raise ValueError("second: no tensor is changed by both updates")
    return rows


def numbered_layer(name: str) -> str | None:
    """The numbered layer that a tensor belongs to by its name, such as "model.layers.3"; None where there is none."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return None if found is None else found[0]


def _layer(name: str, shape: Sequence[int]) -> str:
    """The numbered layer of a tensor and its columns; tensors of no layer stand by themselves."""
    found = numbered_layer(name)
    columns = math.prod(shape[1:]) if len(shape) > 1 else 1
    return name if found is None else f"{found}, {columns} column{'s' * (columns != 1)}"


def _overlaps(
    name: str, a: Subspace, b: Subspace, rules: Sequence[EnergyRank], centred: bool = False
) -> Iterator[Overlap]:
    for rule in rules:
        first, second = a.truncate(kept_rank(a, rule)), b.truncate(kept_rank(b, rule))
        chance = expected_overlap(first.dim, second.dim, a.ambient_dim)
        yield Overlap(name, rule.ratio, (first.dim, second.dim), float(first.overlap(second)), chance, centred)


def activation_overlap(
    model: nn.Module,
    first: Iterable[Any],
    second: Iterable[Any],
    layers: Layers | tuple[float, float] = (0.65, 0.9),
    energies: Sequence[float] = (0.5,),
) -> list[Overlap]:
    """What the states of two kinds of prompts share, at the last token of each prompt.

    The last token is the last one that is attended to, on whichever side the padding is, and left padding is moved to
    the right first: a causal model's states are then the same to the bit. The published code takes the last position,
    which may be padding. States that are not centred share their mean, so both are given.

    Parameters
    ----------
    model
        A causal model, or any other.
    first, second
        Batches of the two kinds, as the model takes them; each is read once.
    layers
        As in `layer_names`; or a range of depth, two shares of the blocks: the outputs of the blocks in it.
    energies
        As in `subspace_overlaps`.

    Returns
    -------
    list of Overlap: a layer at a time, without and with the mean taken off, one a share.

    Raises
    ------
    ValueError
        For a range that holds no block, shares outside (0, 1], and where either has fewer than two prompts.

    References
    ----------
    Ponkshe et al. (2025), arXiv 2505.14185.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import activation_overlap
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 6), torch.nn.Linear(6, 6))
    >>> first, second = torch.arange(5).reshape(1, 5, 1), torch.arange(5, 10).reshape(1, 5, 1)
    >>> [(found.name, found.centred) for found in activation_overlap(model, first, second, "1")]
    [('1', False), ('1', True)]
    """
    rules = [EnergyRank(energy) for energy in energies]
    names = layer_names(model, _blocks(model, layers))
    moments = [
        collect_moments(model, map(_right_padded, batches), names, site="output", pool="last", share=False)
        for batches in (first, second)
    ]
    rows: list[Overlap] = []
    for name in names:
        for centred in (False, True):
            a, b = (found[name].subspace(ALL, center=centred) for found in moments)
            rows += _overlaps(name, a, b, rules, centred)
    return rows


def _blocks(model: nn.Module, layers: Any) -> Layers:
    if not (isinstance(layers, tuple) and all(isinstance(end, float) for end in layers)):
        return layers
    blocks = find_blocks(model)
    total = len(list(model.get_submodule(blocks).children()))
    low, high = layers
    found = [f"{blocks}.{i}".strip(".") for i in range(total) if low * total <= i < high * total]
    if not found:
        raise ValueError(f"layers: of {total} blocks none lies in [{low:g}, {high:g}) of the depth")
    return found


def _right_padded(batch: Any) -> Any:
    """The batch with padding at the right, where some of it is at the left."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or bool((mask[:, 0] != 0).all()):
        return batch
    order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)

    def moved(value: Any) -> Any:
        by_token = isinstance(value, Tensor) and value.shape == mask.shape
        return value.gather(1, order.to(value.device)) if by_token else value

    return {key: moved(value) for key, value in batch.items()}
