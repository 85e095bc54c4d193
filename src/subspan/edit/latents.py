"""Directions in a generator's latent space: found, made few and unmixed, and measured by what they change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base import check_finite
from subspan.geometry import Subspace
from subspan.geometry.grassmann import orthonormalize
from subspan.models import Surgery, replace
from subspan.nn import HouseholderProjector
from subspan.nn.householder_projector import jacobian_gram
from subspan.solvers import jacobian_subspace

Generator = Callable[[Tensor], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]


def orthogonalize_projections(
    model: nn.Module, targets: str | Iterable[str], rank: int = 10, *, gain: str = "mean", example: Any = None
) -> Surgery:
    """Put a warm-started `HouseholderProjector` in the place of linear layers, by name or pattern; `undo()` goes back.

    Fine-tune the model with its own loss afterwards; orthogonality needs no penalty.

    Parameters
    ----------
    model
        Changed in place.
    targets
        The layers that read the latent code, names or patterns ("blocks.*.style").
    rank
        Directions of each projector.
    gain, example
        See `HouseholderProjector.from_linear` and `nn.replace`.

    Returns
    -------
    Surgery

    Raises
    ------
    ValueError
        For a target that is no linear layer (with those there are) or has fewer than `rank` rows or columns; then
        nothing is replaced.

    References
    ----------
    Song et al. (ICCV 2023), arXiv 2307.08012.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import orthogonalize_projections
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> change = orthogonalize_projections(model, "0", rank=2)
    >>> type(model[0]).__name__
    'HouseholderProjector'
    >>> _ = change.undo()
    >>> type(model[0]).__name__
    'Linear'
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets: at least one name or pattern is needed, got none")
    parts = dict(model.named_modules())
    linear = [name for name, part in parts.items() if isinstance(part, nn.Linear)]
    for pattern in patterns:
        found = [name for name in parts if name and fnmatchcase(name, pattern)]
        other = [name for name in found if name not in linear]
        if other or not found:
            what = f"{other[0]!r} is a {type(parts[other[0]]).__name__}" if other else f"{pattern!r} names no module"
            raise ValueError(f"targets: {what}; linear layers are {', '.join(linear) or 'none'}")
    return replace(model, {each: lambda m: HouseholderProjector.from_linear(m, rank, gain=gain) for each in patterns},
                   example)  # fmt: skip


def latent_directions(
    layer: nn.Module | Float[Tensor, "o i *kernel"],
    rank: int = 10,
    *,
    method: str = "sefa",
    effect: Generator | None = None,
    latents: Float[Tensor, "n i"] | None = None,
) -> Subspace:
    """Directions that a layer, or its weight, lets a latent code be edited along, strongest first.

    Parameters
    ----------
    layer
        A layer with a weight (out, in), or that weight; of a convolution (out, in, kh, kw) its (out, in·kh·kw) matrix.
    rank
        Number of directions.
    method
        "sefa": right-singular vectors of the weight, variances = squared gains (Shen & Zhou, 2021). "householder": V of
        a `HouseholderProjector` as it is parametrised; single columns are a choice of gauge. "jacobian": the directions
        along which `effect` changes most on average over `latents`, inside the plane of V for a projector; independent
        of the gauge, each with its largest entry positive.
    effect
        Of "jacobian": latents (n, in) → images or features.
    latents
        Of "jacobian": (n, in).

    Returns
    -------
    Subspace

    Raises
    ------
    ValueError
        For another method, rank or missing arguments.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import latent_directions
    >>> found = latent_directions(torch.diag(torch.tensor([1.0, 3.0, 2.0])), rank=2)
    >>> found.variances.round().tolist(), found.basis.abs().argmax(0).tolist()
    ([9.0, 4.0], [1, 2])
    """
    matrix = check_finite(_weight(layer), "layer").double()
    largest = layer.rank if isinstance(layer, HouseholderProjector) else min(matrix.shape)
    if not 1 <= rank <= largest:
        raise ValueError(f"rank: must lie in [1, {largest}], got {rank}")
    if method == "sefa":
        _, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return Subspace(vh[:rank].mT.contiguous(), variances=s[:rank].square())
    if method == "householder":
        if not isinstance(layer, HouseholderProjector):
            raise ValueError(f"layer: 'householder' needs a HouseholderProjector, got {type(layer).__name__}")
        v = orthonormalize(layer.directions.double())[:, :rank]
        return Subspace(v, variances=layer.gain.detach().double().square().expand(rank).clone())
    if method != "jacobian":
        raise ValueError(f"method: expected 'sefa', 'householder' or 'jacobian', got {method!r}")
    if effect is None or latents is None:
        raise ValueError("effect, latents: 'jacobian' needs both")
    if isinstance(layer, HouseholderProjector):
        plane = orthonormalize(layer.directions.double())
        values, turn = torch.linalg.eigh(jacobian_gram(effect, latents, plane))
        values, v = values.flip(0)[:rank], (plane @ turn.flip(1))[:, :rank]
    else:
        # The Jacobians of all latents, stacked, are that of this one function of a common shift.
        found = jacobian_subspace(
            lambda shift: effect(latents + shift) / math.sqrt(len(latents)), latents.new_zeros(latents.shape[1]), rank
        )
        values, v = found.values.double().square(), orthonormalize(found.input.basis.double())
    sign = torch.where(v.gather(0, v.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    return Subspace(v * sign, variances=values.clamp_min(0))


@torch.no_grad()
def path_length(
    generator: Generator,
    latents: Float[Tensor, "n *l i"],
    directions: Float[Tensor, "*m e k"] | None = None,
    *,
    distance: Distance | None = None,
    eps: float = 1e-2,
    random: torch.Generator | None = None,
) -> float:
    """Mean squared distance of what a step of length eps changes, over eps²: PPL, or PIPL with `directions`.

    The largest and the smallest percent are left out.

    Parameters
    ----------
    generator
        Latents → images or features.
    latents
        (n, i), or (n, layers, i).
    directions
        Unit columns (i, k) of which one is drawn for each latent; None: the way to another latent, at the share eps of
        it (perceptual path length). (layers, i, k) for latents of layers: a layer is drawn too, and its latent alone is
        moved.
    distance
        (a, b) → squared distances (n,); None: mean squared difference of an entry.
    eps
        Length of the step, positive.
    random
        Source of the draws.

    Returns
    -------
    float

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import path_length
    >>> round(path_length(lambda w: 2 * w, torch.randn(50, 2).double(), torch.eye(2).double()), 3)
    2.0
    """
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps: must be positive, got {eps}")
    n = len(latents)
    if directions is None:
        step = latents[torch.randperm(n, generator=random)] - latents
    else:
        step = _drawn(latents, directions, random)
    squares = (distance or _mean_square)(generator(latents), generator(latents + eps * step.to(latents)))
    kept = squares.sort().values[n // 100 : n - n // 100]
    return float(kept.mean()) / eps**2


def _drawn(latents: Tensor, directions: Tensor, random: torch.Generator | None) -> Tensor:
    if directions.shape[:-1] != latents.shape[1:]:
        raise ValueError(f"directions: expected {(*latents.shape[1:], 'k')}, got {tuple(directions.shape)}")
    chosen = torch.randint(directions.shape[-1], (len(latents),), generator=random)
    if latents.ndim == 2:
        return directions.mT[chosen]
    layer = torch.randint(directions.shape[0], (len(latents),), generator=random)
    step = torch.zeros(latents.shape, dtype=directions.dtype, device=directions.device)
    step[torch.arange(len(latents)), layer] = directions[layer, :, chosen]
    return step


@torch.no_grad()
def displacements(
    generator: Generator, latents: Float[Tensor, "n i"], directions: Float[Tensor, "i k"], *, eps: float = 1e-2
) -> Float[Tensor, "n k p"]:
    """What each direction changes, (G(w + eps v_j) - G(w)) / eps, flattened.

    Parameters
    ----------
    generator
        G, latents → images or features with p numbers.
    latents
        (n, i).
    directions
        (i, k), a direction v_j a column.
    eps
        Length of the step, positive.

    Returns
    -------
    Tensor, (n, k, p).

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import displacements
    >>> displacements(lambda w: 3 * w, torch.zeros(1, 2), torch.eye(2)).round().tolist()
    [[[3.0, 0.0], [0.0, 3.0]]]
    """
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps: must be positive, got {eps}")
    start = generator(latents)
    moved = [generator(latents + eps * v.to(latents)) - start for v in directions.mT]
    return torch.stack(moved, 1).flatten(2) / eps


def displacement_mixing(moved: Float[Tensor, "n k p"]) -> float:
    """Mean |cos| between the `displacements` of different directions: 0 where each changes something of its own.

    Parameters
    ----------
    moved
        (n, k, p), of `displacements`.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        For fewer than two directions, or where one changes nothing.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import displacement_mixing
    >>> displacement_mixing(torch.eye(2)[None]), round(displacement_mixing(torch.ones(1, 2, 4)), 6)
    (0.0, 1.0)
    """
    if moved.shape[1] < 2:
        raise ValueError(f"moved: at least two directions are needed, got {moved.shape[1]}")
    length = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    if not bool((length > 0).all()):
        raise ValueError("moved: a direction changes nothing")
    unit = moved / length
    i, j = torch.triu_indices(moved.shape[1], moved.shape[1], 1)
    return float((unit @ unit.mT).abs()[:, i, j].mean())


def _weight(layer: Any) -> Tensor:
    weight = layer if isinstance(layer, Tensor) else getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise ValueError(f"layer: expected a layer with a weight (out, in) or that weight, got {type(layer).__name__}")
    return weight.detach().flatten(1)


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
