"""Base stations in the cities that come with the ray tracer sionna-rt: traced once, kept in the cache folder."""

from __future__ import annotations

import ctypes
import glob
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from subspan.base import require
from subspan.base.progress import Progress

from .cache import entry_folder, whole_folder
from .channels import ChannelSite, unit_channels
from .features import fingerprint

CITIES = ("munich", "etoile", "florence", "san_francisco")
# Of the distribution sionna-rt.
_TRACER = "sionna.rt"
_LLVM = 19
_COMMAND = f"apt-get install libllvm{_LLVM}"
_PLACES = (
    "/usr/lib/*/libLLVM*.so*", "/usr/lib*/libLLVM*.so*", "/usr/lib/llvm*/lib/libLLVM*.so*",
    "/opt/homebrew/opt/llvm*/lib/libLLVM*.dylib",
)  # fmt: skip
# Metres: users around a station, stations of a city apart, roofs above the street, panels above roofs, users above it.
_NEAREST, _APART, _ROOFS, _MAST, _USER = 20.0, 150.0, (12.0, 40.0), 3.0, 1.5
_SECTOR = np.pi / 3
_BLOCK = 250


@dataclass(frozen=True)
class SionnaSites:
    """Ray-traced users of base stations on roofs of four cities (extra `wireless`, and a shared library of LLVM).

    Of each city the roofs at a street that see most of it in a sector of 120° carry a panel; users stand outdoors at
    random places of that sector, and those that no path reaches are left out. What was traced is kept in
    the cache folder, and later calls with the same parameters need no ray tracer.

    Parameters
    ----------
    cities
        Of `CITIES`.
    per_city
        Stations of each.
    users
        Most users of a station.
    grid
        Columns and rows of its panel, dual-polarised elements half a wavelength apart with the pattern of TR 38.901.
    frequency, bandwidth, subbands
        Hz, Hz, and a number.
    reach
        Metres from the station, most.
    max_depth
        Reflections of a path, most.
    samples
        Rays of a station.
    random_state
        Seed of the places.

    Raises
    ------
    ValueError
        For a city that is not known and numbers below 1.
    ImportError
        In `load`, where nothing is kept, sionna-rt or LLVM is missing; it names the commands that install them.

    References
    ----------
    The scenes are from OpenStreetMap (ODbL), as packaged with sionna-rt (Apache-2.0).

    Examples
    --------
    >>> from subspan.datasets import SionnaSites
    >>> SionnaSites(cities=("munich", "atlantis"))
    Traceback (most recent call last):
    ValueError: cities: expected some of munich, etoile, florence, san_francisco, got ('munich', 'atlantis')
    """

    cities: tuple[str, ...] = CITIES
    per_city: int = 2
    users: int = 500
    grid: tuple[int, int] = (8, 4)
    frequency: float = 3.5e9
    bandwidth: float = 1e8
    subbands: int = 8
    reach: float = 250.0
    max_depth: int = 3
    samples: int = 100_000
    random_state: int = 0

    def __post_init__(self) -> None:
        if not self.cities or not set(self.cities) <= set(CITIES):
            raise ValueError(f"cities: expected some of {', '.join(CITIES)}, got {self.cities}")
        numbers = {name: getattr(self, name) for name in ("per_city", "users", "subbands", "max_depth", "samples")}
        for name, value in {**numbers, "grid": min(self.grid)}.items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")

    def load(self, progress: Progress | None = None) -> tuple[ChannelSite, ...]:
        """The sites, city by city; traced where the cache folder does not have them."""
        sites: list[ChannelSite] = []
        for place, city in enumerate(self.cities):
            if progress is not None:
                progress(f"channels of {city}", place / len(self.cities))
            key = {**asdict(self), "cities": city}
            folder = entry_folder("channels", fingerprint(key))
            with whole_folder(folder) as unfinished:
                if unfinished is not None:
                    for number, site in enumerate(self._traced(city)):
                        site.save(unfinished / f"{number}.safetensors")
            sites += [ChannelSite.load(path) for path in sorted(folder.glob("*.safetensors"))]
        return tuple(sites)

    def is_kept(self) -> bool:
        """Whether `load` needs no ray tracer."""
        keys = [fingerprint({**asdict(self), "cities": city}) for city in self.cities]
        return all(entry_folder("channels", key).is_dir() for key in keys)

    # ------------------------------------------------------------------ tracing

    def _traced(self, city: str) -> list[ChannelSite]:
        scene = _Scene(city)
        random = np.random.default_rng([self.random_state, CITIES.index(city)])
        sites = []
        for number, (station, azimuth) in enumerate(self._stations(scene, random)):
            places = self._users(scene, station, azimuth, random)
            coefficients, delays = scene.paths(self, station, azimuth, places)
            channels, gains, reached = unit_channels(coefficients, delays, self.bandwidth, self.subbands)
            kept = torch.nonzero(reached)[: self.users, 0]
            placed = torch.from_numpy(places).float()
            seen = torch.from_numpy(scene.clear(np.broadcast_to(station, places.shape), places))
            given = (channels[kept], gains[kept], placed[kept], seen[kept], torch.from_numpy(station).float())
            sites.append(ChannelSite(f"{city} {number}", city, self.grid, *given, float(azimuth)))
        return sites

    def _stations(self, scene: Any, random: np.random.Generator) -> list[tuple[np.ndarray, float]]:
        """Places on roofs beside a street, and where to look: those that see most of the street, not too near."""
        low, high = scene.bounds
        middle, half = (low + high)[:2] / 2, np.minimum((high - low)[:2] / 2 - 100, 300)
        roofs = middle + random.uniform(-1, 1, (4000, 2)) * half
        height, outdoors = scene.down(roofs)
        ways = np.arange(8) * np.pi / 4
        around = roofs[:, None] + 6 * np.stack([np.cos(ways), np.sin(ways)], 1)
        level, street = (each.reshape(-1, 8) for each in scene.down(around.reshape(-1, 2)))
        beside = street.sum(1)
        above = height - np.where(street, level, 0).sum(1) / np.maximum(beside, 1)
        fit = ~outdoors & (beside >= 2) & (beside <= 6) & (above >= _ROOFS[0]) & (above <= _ROOFS[1])
        grounds = middle + random.uniform(-1, 1, (20000, 2)) * (high - low)[:2] / 2
        level, street = scene.down(grounds)
        grounds = np.column_stack([grounds, level + _USER])[street]
        found = []
        for place in np.flatnonzero(fit)[:60]:
            station = np.array([*roofs[place], height[place] + _MAST])
            way = grounds - station
            distance = np.linalg.norm(way[:, :2], axis=1)
            near = (distance > _NEAREST) & (distance < self.reach)
            seen = scene.clear(np.broadcast_to(station, (int(near.sum()), 3)), grounds[near])
            angle = np.arctan2(way[near, 1], way[near, 0])[seen]
            counts = [int(_inside(angle, azimuth).sum()) for azimuth in np.arange(24) * np.pi / 12]
            found.append((max(counts), station, int(np.argmax(counts)) * np.pi / 12))
        found.sort(key=lambda each: -each[0])
        chosen: list[tuple[np.ndarray, float]] = []
        for _, station, azimuth in found:
            if all(np.linalg.norm(station - other) >= _APART for other, _ in chosen):
                chosen.append((station, azimuth))
        return chosen[: self.per_city]

    def _users(
        self, scene: Any, station: np.ndarray, azimuth: float, random: np.random.Generator
    ) -> Float[np.ndarray, "n 3"]:
        """Places outdoors in the sector: half as many again as are kept, since some have no path."""
        distance = self.reach * np.sqrt(random.uniform((_NEAREST / self.reach) ** 2, 1, 40 * self.users))
        angle = azimuth + random.uniform(-_SECTOR, _SECTOR, len(distance))
        spots = station[:2] + distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        level, street = scene.down(spots)
        return np.column_stack([spots, level + _USER])[street][: self.users * 3 // 2]


class _Scene:
    """A city in the ray tracer: looks down, looks across, and paths."""

    def __init__(self, city: str) -> None:
        ready_llvm()
        self.rt = require(_TRACER, extra="wireless")
        self.mi, self.dr = require("mitsuba", extra="wireless"), require("drjit", extra="wireless")
        self.scene = self.rt.load_scene(getattr(self.rt.scene, city))
        box = self.scene.mi_scene.bbox()
        self.bounds = np.array(box.min), np.array(box.max)
        named = self.scene.objects.items()
        self.grounds = [found.object_id for name, found in named if name.lower() in ("ground", "plane", "terrain")]

    def down(self, places: Float[np.ndarray, "n 2"]) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Height of what is seen from above, and whether it is the ground."""
        top = float(self.bounds[1][2]) + 10
        start = np.column_stack([places, np.full(len(places), top)]).T.astype(np.float32)
        ray = self.mi.Ray3f(self.mi.Point3f(start), self.mi.Vector3f(0, 0, -1))
        hit = self.scene.mi_scene.ray_intersect(ray)
        number = np.array(self.dr.reinterpret_array(self.mi.UInt32, hit.shape))
        ground = np.array(hit.is_valid()) & np.isin(number, self.grounds)
        return np.where(np.array(hit.is_valid()), top - np.array(hit.t), -np.inf), ground

    def clear(self, a: Float[np.ndarray, "n 3"], b: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
        """Whether nothing stands between two places."""
        way = b - a
        distance = np.linalg.norm(way, axis=1)
        start, along = a.T.astype(np.float32), (way / distance[:, None]).T.astype(np.float32)
        ray = self.mi.Ray3f(self.mi.Point3f(start), self.mi.Vector3f(along))
        ray.maxt = self.mi.Float((distance - 0.05).astype(np.float32))
        return ~np.array(self.scene.mi_scene.ray_test(ray))

    def paths(
        self, options: SionnaSites, station: np.ndarray, azimuth: float, places: Float[np.ndarray, "n 3"]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients (n, p, N, l) and delays (n, l) of all paths, 0 where a user has fewer than l."""
        rt, scene = self.rt, self.scene
        columns, rows = options.grid
        scene.frequency = options.frequency
        panel: dict[str, Any] = {"num_rows": rows, "num_cols": columns, "pattern": "tr38901", "polarization": "cross"}
        scene.tx_array = rt.PlanarArray(**panel)
        scene.rx_array = rt.PlanarArray(num_rows=1, num_cols=1, pattern="iso", polarization="V")
        scene.add(rt.Transmitter("station", position=[float(x) for x in station], orientation=[float(azimuth), 0, 0]))
        blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
        solver = rt.PathSolver()
        for start in range(0, len(places), _BLOCK):
            for number, place in enumerate(places[start : start + _BLOCK]):
                scene.add(rt.Receiver(f"user{number}", position=[float(x) for x in place]))
            found = solver(
                scene, max_depth=options.max_depth, samples_per_src=options.samples, refraction=False, seed=1
            )
            a, delays = found.cir(normalize_delays=False, out_type="numpy")
            for name in list(scene.receivers):
                scene.remove(name)
            # (user, 1, 1, ports, l, 1): polarisation, column, row, the row the fastest.
            ports = torch.from_numpy(np.ascontiguousarray(a[:, 0, 0, :, :, 0]))
            blocks.append((ports.unflatten(1, (2, columns * rows)), torch.from_numpy(np.array(delays)[:, 0])))
        scene.remove("station")
        most = max(delays.shape[-1] for _, delays in blocks)
        padded = [[torch.nn.functional.pad(x, (0, most - x.shape[-1])) for x in block] for block in blocks]
        return torch.cat([block[0] for block in padded]), torch.cat([block[1] for block in padded])


def _inside(angle: np.ndarray, azimuth: float) -> np.ndarray:
    return np.abs(np.angle(np.exp(1j * (angle - azimuth)))) < _SECTOR


def ready_llvm(version_of: Callable[[str], int | None] | None = None) -> str:
    """Point the ray tracer's compiler at a shared library of LLVM that is new enough, before it is imported.

    LLVM 14 and 15 abort the whole process, which nothing can catch. Raises ImportError with the command for a new one.
    """
    version_of = version_of or _llvm_version
    given = os.environ.get("DRJIT_LIBLLVM_PATH")
    places = [given] if given else sorted({path for pattern in _PLACES for path in glob.glob(pattern)})
    found = [(version, path) for path in places if (version := version_of(path)) is not None]
    version, path = max(found, default=(0, ""))
    if version < _LLVM:
        had = f"{given or 'what is installed'} is of version {version}" if found else "none was found"
        raise ImportError(
            f"ray tracing needs LLVM {_LLVM} or later as a shared library, and {had}: {_COMMAND} (or set "
            "DRJIT_LIBLLVM_PATH to a libLLVM.so)"
        )
    os.environ["DRJIT_LIBLLVM_PATH"] = path
    return path


def _llvm_version(path: str) -> int | None:
    """Main version of a library of LLVM; 15 where it is too old to say, None where it is none."""
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    if not hasattr(library, "LLVMGetVersion"):
        return 15 if hasattr(library, "LLVMContextCreate") else None
    numbers = [ctypes.c_uint() for _ in range(3)]
    library.LLVMGetVersion(*(ctypes.byref(number) for number in numbers))
    return numbers[0].value
