"""Planted manifolds in superposition: rows that are sums of a few points of curves and surfaces, each in a subspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspan.base.draws import generator_for
from subspan.geometry import Subspace

_CALIBRATION = 50_000
_NOISE = 1e-5
_TURN = 2 * math.pi


class ManifoldKind(NamedTuple):
    """A family of manifolds, whose members differ by one number.

    Attributes
    ----------
    dim
        Dimensions of the subspace that holds it.
    parameters
        Numbers in [0, 1) that a point is made of.
    points
        Of rows of them and the number of the member: points (n, dim).
    variants
        These numbers.
    """

    dim: int
    parameters: int
    points: Callable[[Float[Tensor, "n p"], float], Float[Tensor, "n k"]]
    variants: tuple[float, ...]


def _circle(u: Tensor, radius: float) -> Tensor:
    angle = _TURN * u[:, 0]
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def _sphere(u: Tensor, radius: float) -> Tensor:
    height, angle = 2 * u[:, 0] - 1, _TURN * u[:, 1]
    around = (1 - height.square()).clamp_min(0).sqrt()
    return radius * torch.stack([around * angle.cos(), around * angle.sin(), height], 1)


def _torus(u: Tensor, ratio: float) -> Tensor:
    """The flat torus, a product of two circles."""
    first, second = _TURN * u[:, 0], _TURN * u[:, 1]
    return torch.stack([first.cos(), first.sin(), ratio * second.cos(), ratio * second.sin()], 1)


def _moebius(u: Tensor, width: float) -> Tensor:
    angle, across = _TURN * u[:, 0], width * (2 * u[:, 1] - 1)
    around = 1 + across * (angle / 2).cos()
    return torch.stack([around * angle.cos(), around * angle.sin(), across * (angle / 2).sin()], 1)


def _swiss_roll(u: Tensor, end: float) -> Tensor:
    angle = 1.5 * math.pi + (end - 1.5) * math.pi * u[:, 0]
    return torch.stack([angle * angle.cos(), 0.75 * end * u[:, 1], angle * angle.sin()], 1)


def _helix(u: Tensor, pitch: float) -> Tensor:
    angle = 3 * _TURN * u[:, 0]
    return torch.stack([angle.cos(), angle.sin(), pitch * angle], 1)


def _disk(u: Tensor, radius: float) -> Tensor:
    return u[:, :1].sqrt() * _circle(u[:, 1:], radius)


def _segment(u: Tensor, length: float) -> Tensor:
    return length * u


_SIZES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
MANIFOLDS: dict[str, ManifoldKind] = {
    "circle": ManifoldKind(2, 1, _circle, _SIZES),
    "sphere": ManifoldKind(3, 2, _sphere, _SIZES),
    "torus": ManifoldKind(4, 2, _torus, (0.25, 0.33, 0.5, 0.6, 0.8, 1.0)),
    "moebius": ManifoldKind(3, 2, _moebius, (0.2, 0.3, 0.5, 0.7, 1.0, 1.5)),
    "swiss-roll": ManifoldKind(3, 2, _swiss_roll, (2.0, 2.5, 3.0, 3.5, 4.0, 4.5)),
    "helix": ManifoldKind(3, 1, _helix, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
    "disk": ManifoldKind(2, 2, _disk, _SIZES),
    "segment": ManifoldKind(1, 1, _segment, _SIZES),
}
"""Kinds by name. Variants: radius, radius, ratio of radii, half width, end in half turns, pitch, radius, length."""


class PlantedRows(NamedTuple):
    """What `ManifoldZoo.sample` draws.

    Attributes
    ----------
    x
        (n, d) rows.
    active
        (n, m) which manifolds each row is made of.
    contributions
        (n, m, d) what each manifold adds to each row; None where it was not asked for.
    """

    x: Float[Tensor, "n d"]
    active: Bool[Tensor, "n m"]
    contributions: Float[Tensor, "n m d"] | None

    def manifold(self, number: int) -> tuple[Int[Tensor, " r"], Float[Tensor, "r d"]]:
        """Rows in which a manifold takes part, and its points there. Raises ValueError without contributions."""
        if self.contributions is None:
            raise ValueError("contributions: they were not drawn; sample with contributions=True")
        rows = self.active[:, number].nonzero().flatten()
        return rows, self.contributions[rows, number]


@dataclass(eq=False)
class ManifoldZoo:
    """Circles, spheres, tori, Möbius strips, Swiss rolls, helices, disks and segments, each in a random subspace.

    Points of each are centred and scaled to root mean square length 1, so that all weigh alike. The subspaces are
    drawn independently, and are not orthogonal to each other. A row is the sum of a point of each of `l0` different
    manifolds, and noise of standard deviation 1e-5.

    Parameters
    ----------
    kinds
        Names in `MANIFOLDS`; None: all eight.
    variants
        Sizes or shapes of each kind, the first so many, at most 6.
    ambient_dim
        d.
    random_state
        Seed of the subspaces.

    Attributes
    ----------
    names
        Of the m manifolds, "circle 0.5", …
    subspaces
        (m) the linear subspace of each, with d x k bases.

    Raises
    ------
    ValueError
        For unknown kinds, other numbers of variants, and fewer ambient dimensions than a manifold needs.

    References
    ----------
    Bhalla et al. (2026), Do sparse autoencoders capture concept manifolds?, arXiv 2604.28119: the synthetic setting.

    Examples
    --------
    >>> from subspan.datasets import ManifoldZoo
    >>> zoo = ManifoldZoo(("circle", "sphere"), variants=1, ambient_dim=16, random_state=0)
    >>> drawn = zoo.sample(100, l0=1, random_state=0, contributions=True)
    >>> rows, points = drawn.manifold(0)
    >>> drawn.x.shape, float(zoo.subspaces[0].residual(points).abs().max()) < 1e-6
    (torch.Size([100, 16]), True)
    """

    # The names are looked up in `__post_init__`, which says what is wrong with them.
    __no_type_check__ = True

    kinds: Sequence[str] | None = None
    variants: int = 6
    ambient_dim: int = 128
    random_state: int = 0

    def __post_init__(self) -> None:
        kinds = list(MANIFOLDS) if self.kinds is None else list(self.kinds)
        if unknown := sorted(set(kinds) - set(MANIFOLDS)) or (not kinds and ["none"]):
            raise ValueError(f"kinds: expected some of {', '.join(MANIFOLDS)}, got {', '.join(unknown)}")
        if not 1 <= self.variants <= 6:
            raise ValueError(f"variants: must lie in [1, 6], got {self.variants}")
        if self.ambient_dim < (most := max(MANIFOLDS[kind].dim for kind in kinds)):
            raise ValueError(f"ambient_dim: a manifold needs {most} dimensions, got {self.ambient_dim}")
        self._shapes = [(MANIFOLDS[kind], size) for kind in kinds for size in MANIFOLDS[kind].variants[: self.variants]]
        self.names = tuple(f"{kind} {size:g}" for kind in kinds for size in MANIFOLDS[kind].variants[: self.variants])
        draw = generator_for(self.random_state, "calibration")
        self._centers, self._scales, subspaces = [], [], []
        for number, (kind, size) in enumerate(self._shapes):
            points = kind.points(torch.rand(_CALIBRATION, kind.parameters, generator=draw, dtype=torch.float64), size)
            center = points.mean(0)
            self._centers.append(center)
            self._scales.append((points - center).square().sum(1).mean().sqrt())
            own = generator_for(self.random_state, "subspace", number)
            subspaces.append(Subspace.random(self.ambient_dim, kind.dim, generator=own, dtype=torch.float32))
        self.subspaces = tuple(subspaces)

    def __len__(self) -> int:
        """Number of manifolds."""
        return len(self._shapes)

    def points(self, number: int, n: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        """n random points of one manifold, uniform in its parameters (on spheres and disks: in area)."""
        kind, size = self._shapes[number]
        drawn = kind.points(torch.rand(n, kind.parameters, generator=generator, dtype=torch.float64), size)
        scaled = (drawn - self._centers[number]) / self._scales[number]
        return scaled.float() @ self.subspaces[number].basis.mT

    def sample(self, n: int, l0: int, *, random_state: int = 0, contributions: bool = False) -> PlantedRows:
        """Draw n rows of `l0` manifolds each.

        contributions: also what each adds, n · m · d numbers, for rows that are evaluated. Raises ValueError for l0
        outside [1, m].
        """
        m = len(self)
        if not 1 <= l0 <= m:
            raise ValueError(f"l0: must lie in [1, {m}], the number of manifolds, got {l0}")
        draw = generator_for(self.random_state, "rows", random_state)
        chosen = torch.rand(n, m, generator=draw).topk(l0, dim=1).indices
        active = torch.zeros(n, m, dtype=torch.bool).scatter_(1, chosen, True)
        x = _NOISE * torch.randn(n, self.ambient_dim, generator=draw)
        parts = torch.zeros(n, m, self.ambient_dim) if contributions else None
        for number in range(m):
            rows = active[:, number].nonzero().flatten()
            points = self.points(number, len(rows), generator=draw)
            x[rows] += points
            if parts is not None:
                parts[rows, number] = points
        return PlantedRows(x, active, parts)
