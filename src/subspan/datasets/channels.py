"""Radio channels from a base station's panel to users at known places, and a street whose echoes are mirror images."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from subspan.base import save_arrays, saved_object

_LIGHT = 299_792_458.0
_SAVED: dict[str, Any] = {
    "channels": Float[Tensor, "n p m f 2"],
    "gains": Float[Tensor, " n"],
    "positions": Float[Tensor, "n 3"],
    "line_of_sight": Bool[Tensor, " n"],
    "station": Float[Tensor, " 3"],
}


@dataclass(frozen=True, eq=False)
class ChannelSite:
    """The users of one base station, each with its channel.

    Parameters
    ----------
    name, city
        Of the site, and of what it shares buildings with.
    grid
        Columns and rows of the panel, N = columns x rows positions, the row counted fastest.
    channels
        (n, p, N, f) complex, of p polarisations and f subbands, of unit norm each.
    gains
        (n,) dB, what was divided by; transmitted power is 0 dB.
    positions
        (n, 3) metres.
    line_of_sight
        (n,) whether nothing stands between.
    station, azimuth
        (3,) metres, and the direction that the panel looks in, radians from the first axis.

    Raises
    ------
    ValueError
        For channels that do not fit the panel, of no norm, or NaN, and other numbers of users.

    Examples
    --------
    >>> from subspan.datasets import street_canyon
    >>> site = street_canyon(users=20, grid=(4, 2))
    >>> site, tuple(site.channels.shape)
    (ChannelSite('canyon 0', 20 users, 4 x 2 panel), (20, 2, 8, 8))
    """

    name: str
    city: str
    grid: tuple[int, int]
    channels: Complex[Tensor, "n p m f"]
    gains: Float[Tensor, " n"]
    positions: Float[Tensor, "n 3"]
    line_of_sight: Bool[Tensor, " n"]
    station: Float[Tensor, " 3"]
    azimuth: float

    def __post_init__(self) -> None:
        n, places = len(self.channels), self.channels.shape[2]
        if self.grid[0] * self.grid[1] != places:
            raise ValueError(f"channels: expected {self.grid[0]} x {self.grid[1]} positions, got {places}")
        for name in ("gains", "positions", "line_of_sight"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name}: expected {n} users, got {len(getattr(self, name))}")
        norms = torch.linalg.vector_norm(self.channels.flatten(1), dim=1)
        if not bool(((norms - 1).abs() < 1e-2).all()):
            raise ValueError("channels: must have norm 1 each; a user without paths has no channel, leave it out")

    def __len__(self) -> int:
        return len(self.channels)

    def __repr__(self) -> str:
        return f"ChannelSite({self.name!r}, {len(self)} users, {self.grid[0]} x {self.grid[1]} panel)"

    def __getitem__(self, index: Any) -> ChannelSite:
        """The site with some of its users: a slice, a mask or indices."""
        users = ("channels", "gains", "positions", "line_of_sight")
        chosen: dict[str, Any] = {name: getattr(self, name)[index] for name in users}
        return replace(self, **chosen)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, the channels in half precision."""
        arrays = {name: getattr(self, name) for name in _SAVED}
        arrays["channels"] = torch.view_as_real(self.channels).half()
        facts = {"name": self.name, "city": self.city, "grid": list(self.grid), "azimuth": self.azimuth}
        save_arrays(path, "channels", arrays, **facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChannelSite:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        facts = {"name": str, "city": str, "grid": tuple[int, int], "azimuth": float}
        with saved_object(path, "channels", _SAVED, facts) as (arrays, found):
            channels = torch.view_as_complex(arrays.pop("channels").float())
            given: dict[str, Any] = {**found, **arrays, "grid": tuple(found["grid"]), "channels": channels}
            return cls(**given)


def unit_channels(
    coefficients: Complex[Tensor, "n p m l"], delays: Float[Tensor, "n l"], bandwidth: float, subbands: int
) -> tuple[Complex[Tensor, "n p m f"], Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Channels of unit norm over subbands from paths, their gains in dB, and which users have any.

    coefficients: of l paths, 0 where a user has fewer. delays: seconds. bandwidth: Hz, around the carrier.
    """
    offsets = ((torch.arange(subbands, dtype=torch.float64) + 0.5) / subbands - 0.5) * bandwidth
    # From the first path on: what all have in common is only a phase of the whole subband.
    there = coefficients.abs().sum((1, 2)) > 0
    later = delays.double().masked_fill(~there, math.inf)
    later = (later - later.amin(1, keepdim=True)).masked_fill(~there, 0)
    turns = torch.exp(-2j * math.pi * later.unsqueeze(-1) * offsets)
    channels = torch.einsum("npml,nlf->npmf", coefficients.to(turns.dtype), turns)
    norms = torch.linalg.vector_norm(channels.flatten(1), dim=1)
    reached = norms > 0
    unit = channels / torch.where(reached, norms, 1)[:, None, None, None]
    # A mean over the positions of the panel and the subbands.
    gains = 20 * norms.clamp_min(1e-30).log10() - 10 * math.log10(channels.shape[2] * subbands)
    return unit.to(torch.complex64), gains.float(), reached


def street_canyon(
    *,
    users: int = 400,
    grid: tuple[int, int] = (8, 4),
    width: float = 24.0,
    length: float = 200.0,
    order: int = 3,
    frequency: float = 3.5e9,
    bandwidth: float = 1e8,
    subbands: int = 8,
    random_state: int = 0,
) -> ChannelSite:
    """A street between two walls and an end wall: every echo is the user's mirror image, in closed form.

    A stand-in where no ray tracer is at hand: neighbours share echoes as in a city, but there is one street and no
    corner. Seeds draw the walls' places, height and reflectivity, and where users stand.

    Parameters
    ----------
    users
        Their number.
    grid
        Columns and rows of the panel, half a wavelength apart.
    width, length
        Of the street, metres; each seed varies the width by a quarter.
    order
        Most reflections of a path at the two walls.
    frequency, bandwidth, subbands
        Hz, Hz, and a number.
    random_state
        Seed.

    Returns
    -------
    ChannelSite

    Raises
    ------
    ValueError
        For numbers below 1 (reflections: below 0).

    Examples
    --------
    >>> from subspan.datasets import street_canyon
    >>> bool(street_canyon(users=10).line_of_sight.all())
    True
    """
    for name, value in {"users": users, "order + 1": order + 1, "subbands": subbands, "grid": min(grid)}.items():
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    random = torch.Generator().manual_seed(random_state)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)

    width = width * float(draw(0.75, 1.25))
    station = torch.stack([torch.zeros((), dtype=torch.float64), draw(0.1, 0.9) * width, draw(8, 25)])
    places = torch.stack([draw(15, length, users), draw(0, width, users), torch.full((users,), 1.5).double()], 1)
    # Image m of y between walls at 0 and width: even m is shifted, odd m mirrored, each after |m| reflections.
    images, losses = [], []
    wall, end, ground = float(draw(0.5, 0.8)), float(draw(0.3, 0.6)), float(draw(0.2, 0.5))
    for m in range(-order, order + 1):
        across = places[:, 1] if m % 2 == 0 else width - places[:, 1]
        for along, far in ((places[:, 0], 1.0), (2 * (length + 10) - places[:, 0], end)):
            for height, floor in ((1.5, 1.0), (-1.5, ground)):
                images.append(torch.stack([along, across + m * width, torch.full_like(along, height)], 1))
                losses.append((-1) ** m * wall ** abs(m) * far * floor)
    ways = torch.stack(images, 1) - station
    distance = torch.linalg.vector_norm(ways, dim=2)
    direction = ways / distance.unsqueeze(-1)
    column, row = torch.arange(grid[0]).double(), torch.arange(grid[1]).double()
    across = torch.exp(1j * math.pi * direction[..., 1, None] * column)
    down = torch.exp(-1j * math.pi * direction[..., 2, None] * row)
    steering = (across.unsqueeze(-1) * down.unsqueeze(-2)).flatten(-2)
    phase = torch.exp(-2j * math.pi * distance * frequency / _LIGHT)
    amplitude = torch.tensor(losses).double() * _LIGHT / (4 * math.pi * frequency * distance)
    # Reflection turns the two slanted polarisations differently.
    turned = torch.tensor([[1.0, 1.0 if loss > 0 else -1.0] for loss in losses], dtype=torch.float64).mT / math.sqrt(2)
    paths = torch.einsum("nl,pl,nlm->npml", (amplitude * phase), turned.to(phase.dtype), steering)
    channels, gains, _ = unit_channels(paths, distance / _LIGHT, bandwidth, subbands)
    seen = torch.ones(users, dtype=torch.bool)
    name = f"canyon {random_state}"
    return ChannelSite(name, name, grid, channels, gains, places.float(), seen, station.float(), 0.0)
