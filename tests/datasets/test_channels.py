"""Channels of a street in closed form, files of sites, and the way to the ray tracer."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from subspan.datasets import ChannelSite, SionnaSites, sionna_sites, street_canyon
from subspan.datasets.channels import unit_channels


def test_a_street_without_echoes_from_walls_is_a_plane_wave_to_the_user():
    site = street_canyon(users=30, grid=(4, 2), order=0)
    way = (site.positions - site.station).double()
    way = way / way.norm(dim=1, keepdim=True)
    column, row = torch.arange(4).double(), torch.arange(2).double()
    phases = way[:, 1, None, None] * column[:, None] - way[:, 2, None, None] * row
    wave = torch.exp(1j * math.pi * phases).flatten(1) / 8**0.5
    inside = torch.einsum("nm,npmf->npf", wave.conj(), site.channels.to(wave.dtype)).abs().square().sum((1, 2))
    # The end of the street and its ground give echoes all the same.
    assert float(inside.median()) > 0.75
    far = street_canyon(users=30, grid=(4, 2), order=3).channels
    assert float((far - site.channels).abs().max()) > 0.01


def test_neighbours_hear_alike_and_streets_differ():
    site = street_canyon(users=200, random_state=1)
    power = site.channels.abs().square().sum((1, 3))
    distance = torch.cdist(site.positions, site.positions).fill_diagonal_(torch.inf)
    near = distance.argmin(1)
    assert not torch.equal(street_canyon(users=200, random_state=2).positions, site.positions)
    assert torch.equal(street_canyon(users=200, random_state=1).channels, site.channels)
    assert float((site.gains - site.gains[near]).abs().median()) < float(
        (site.gains - site.gains.flip(0)).abs().median()
    )
    assert power.shape == (200, 32)


def test_unit_channels_are_a_sum_of_paths_and_mark_who_has_none():
    coefficients = torch.zeros(2, 1, 3, 2, dtype=torch.complex64)
    coefficients[0] = torch.randn(1, 3, 2, dtype=torch.complex64)
    delays = torch.tensor([[1e-6, 1.02e-6], [0.0, 0.0]])
    channels, gains, reached = unit_channels(coefficients, delays, bandwidth=2e7, subbands=2)
    assert reached.tolist() == [True, False]
    turns = torch.exp(-2j * math.pi * 2e-8 * torch.tensor([-5e6, 5e6], dtype=torch.float64))
    expected = coefficients[0, 0, :, :1] + coefficients[0, 0, :, 1:] * turns
    norm = expected.abs().square().sum().sqrt()
    torch.testing.assert_close(channels[0, 0], (expected / norm).to(torch.complex64), atol=1e-4, rtol=1e-4)
    assert float(gains[0]) == pytest.approx(float(20 * norm.log10() - 10 * math.log10(6)), abs=1e-3)
    assert not bool(channels[1].any())


def test_files_keep_channels_in_half_precision(tmp_path: Path):
    site = street_canyon(users=12, grid=(4, 2))
    site.save(tmp_path / "site.safetensors")
    back = ChannelSite.load(tmp_path / "site.safetensors")
    assert (back.name, back.city, back.grid, back.azimuth) == (site.name, site.city, site.grid, site.azimuth)
    torch.testing.assert_close(back.channels, site.channels, atol=5e-4, rtol=0)
    assert torch.equal(back.positions, site.positions)
    assert len(back[back.gains > back.gains.median()]) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": (3, 2)}, "expected 3 x 2 positions, got 8"),
        ({"channels": 0j * torch.ones(5, 2, 8, 8)}, "without paths"),
    ],
)
def test_sites_that_do_not_fit(changes, words):
    site = street_canyon(users=5, grid=(4, 2))
    given = {name: getattr(site, name) for name in site.__dataclass_fields__}
    with pytest.raises(ValueError, match=words):
        ChannelSite(**{**given, **changes})


def test_street_of_no_users():
    with pytest.raises(ValueError, match="users"):
        street_canyon(users=0)


# ---------------------------------------------------------------------- the ray tracer


@pytest.mark.parametrize(
    ("versions", "given", "expected"),
    [
        ({"/a/libLLVM-15.so": 15, "/b/libLLVM.so.20": 20, "/c/libLLVM.so.19": 19}, None, "/b/libLLVM.so.20"),
        ({"/a/libLLVM-15.so": 15}, None, "is of version 15: apt-get install libllvm19"),
        ({"/a/not-llvm.so": None}, None, "none was found"),
        ({"/b/libLLVM.so.20": 20, "/mine.so": 14}, "/mine.so", "/mine.so is of version 14"),
    ],
)
def test_a_library_of_llvm_that_would_abort_is_not_loaded(monkeypatch, versions, given, expected):
    monkeypatch.setattr(sionna_sites.glob, "glob", lambda pattern: list(versions))
    monkeypatch.delenv("DRJIT_LIBLLVM_PATH", raising=False)
    if given:
        monkeypatch.setenv("DRJIT_LIBLLVM_PATH", given)
    if expected.startswith("/b/"):
        assert sionna_sites.ready_llvm(versions.get) == expected
        assert sionna_sites.os.environ["DRJIT_LIBLLVM_PATH"] == expected
    else:
        with pytest.raises(ImportError, match=expected):
            sionna_sites.ready_llvm(versions.get)


def test_the_extra_is_named_where_the_ray_tracer_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))
    monkeypatch.setattr(sionna_sites, "ready_llvm", lambda: "")
    monkeypatch.setitem(sys.modules, "sionna.rt", None)
    monkeypatch.setitem(sys.modules, "sionna", None)
    with pytest.raises(ImportError, match=r"subspan\[wireless\]"):
        SionnaSites(cities=("munich",)).load()


class Town:
    """A tracer of a town that is a house of 20 m at the origin, in an open square."""

    bounds = np.array([-400.0, -400.0, 0.0]), np.array([400.0, 400.0, 20.0])
    traced = 0

    def __init__(self, city: str) -> None:
        self.city = city

    def down(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        house = (np.abs(places) < 60).all(1)
        return np.where(house, 20.0, 0.0), ~house

    def clear(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return b[:, 0] > a[:, 0]

    def paths(self, options: SionnaSites, station: np.ndarray, azimuth: float, places: np.ndarray) -> tuple:
        Town.traced += 1
        found = torch.ones(len(places), 2, options.grid[0] * options.grid[1], 1, dtype=torch.complex64)
        found[::3] = 0
        return found, torch.zeros(len(places), 1)


def test_stations_stand_on_roofs_at_the_street_and_users_where_they_are_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))
    monkeypatch.setattr(sionna_sites, "_Scene", Town)
    wanted = SionnaSites(cities=("etoile",), per_city=1, users=40, grid=(2, 2))
    assert not wanted.is_kept()
    (site,) = wanted.load()
    assert (site.city, len(site), site.grid) == ("etoile", 40, (2, 2))
    assert float(site.station[2]) == 23.0
    assert 52 < float(site.station[:2].abs().max()) < 60
    # This town is seen to the east alone.
    assert abs(site.azimuth) < math.pi / 2 or site.azimuth > 3 * math.pi / 2
    way = site.positions - site.station
    angle = torch.atan2(way[:, 1], way[:, 0]) - site.azimuth
    assert float(torch.cos(angle).min()) > 0.5
    assert 20 <= float(way[:, :2].norm(dim=1).min()) <= float(way[:, :2].norm(dim=1).max()) <= 250
    assert not bool((site.positions[:, :2].abs() < 60).all(1).any())
    assert bool((site.line_of_sight == (site.positions[:, 0] > site.station[0])).all())
    assert wanted.is_kept()
    before = Town.traced
    assert torch.equal(wanted.load()[0].positions, site.positions)
    assert Town.traced == before


def test_two_stations_are_apart(monkeypatch):
    chosen = SionnaSites(per_city=2)._stations(Town("munich"), np.random.default_rng(0))
    assert len(chosen) == 2 or all(np.linalg.norm(a[0] - b[0]) >= 150 for a in chosen for b in chosen if a is not b)


@pytest.mark.parametrize(
    ("options", "words"), [({"cities": ("rome",)}, "cities"), ({"users": 0}, "users"), ({"grid": (0, 4)}, "grid")]
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        SionnaSites(**options)


def test_paths_of_the_tracer_come_with_the_row_fastest(monkeypatch):
    class Solver:
        def __call__(self, scene: object, **options: object) -> object:
            users = len(scene.receivers)
            a = np.arange(users * 8 * 2, dtype=np.complex64).reshape(users, 1, 1, 8, 2, 1)
            delays = np.zeros((users, 1, 2), np.float32)
            return SimpleNamespace(cir=lambda **asked: (a, delays))

    class Fake:
        def __init__(self) -> None:
            self.receivers: dict[str, object] = {}

        def add(self, thing: tuple[str, str]) -> None:
            if thing[0] == "user":
                self.receivers[thing[1]] = thing

        def remove(self, name: str) -> None:
            self.receivers.pop(name, None)

    scene = sionna_sites._Scene.__new__(sionna_sites._Scene)
    scene.rt = SimpleNamespace(
        PlanarArray=lambda **options: options,
        Transmitter=lambda name, **options: ("station", name),
        Receiver=lambda name, **options: ("user", name),
        PathSolver=Solver,
    )
    scene.scene = Fake()
    monkeypatch.setattr(sionna_sites, "_BLOCK", 2)
    found, delays = scene.paths(SionnaSites(grid=(2, 2)), np.zeros(3), 0.0, np.ones((3, 3)))
    assert (tuple(found.shape), tuple(delays.shape)) == ((3, 2, 4, 2), (3, 2))
    assert found[1, 1, 2, 1].real.item() == 16 + 2 * (4 + 2) + 1
    assert scene.scene.tx_array["num_rows"] == 2
