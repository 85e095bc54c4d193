"""Powers as phones report them, and keys that compare them."""

from __future__ import annotations

import pytest
import torch

from subspan.datasets import street_canyon
from subspan.geometry import Subspace
from subspan.wireless import channel_subspaces, fingerprint_keys, mirrored, probing_beams, reported, rsrp

INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize(("grid", "n_beams"), [((8, 4), 8), ((8, 4), 4), ((4, 2), 3)])
def test_probing_beams_are_orthonormal_and_wide_in_elevation(grid, n_beams):
    beams = probing_beams(grid, n_beams)
    torch.testing.assert_close(beams @ beams.mH, torch.eye(n_beams) + 0j)
    assert bool((beams.unflatten(1, grid)[:, :, 1:] == 0).all())


def test_powers_are_those_of_the_channel():
    given = torch.randn(3, 2, 8, 4, dtype=torch.complex128)
    beams = probing_beams((4, 2)).to(torch.complex128)
    found = rsrp(given, beams, gains=torch.tensor([-90.0, -80.0, 0.0]), step_db=None, floor_db=200.0)
    for user, beam in ((0, 1), (2, 3)):
        power = sum(float((beams[beam].conj() @ given[user, p, :, f]).abs() ** 2) for p in range(2) for f in range(4))
        expected = 10 * torch.tensor(power).log10() + (-90.0, -80.0, 0.0)[user]
        assert float(found[user, beam]) == pytest.approx(float(expected), abs=1e-4)


def test_reports_are_coarse_and_bounded():
    found = reported(torch.tensor([[-70.4, -73.6, -99.0, -INF], [-80.0, -81.2, -80.9, -82.0]]))
    assert found.tolist() == [[-70.0, -74.0, -98.0, -100.0], [-80.0, -82.0, -80.0, -82.0]]
    torch.testing.assert_close(reported(found), found)
    free = reported(torch.tensor([[-70.4, -200.0]]), step_db=None, floor_db=40.0)
    torch.testing.assert_close(free, torch.tensor([[-70.4, -110.4]]))


def test_noise_is_drawn_and_of_the_size_asked_for():
    given, beams = street_canyon(users=400, grid=(4, 2)).channels, probing_beams((4, 2))

    def powers(noise: float, seed: int = 0) -> torch.Tensor:
        options = {"noise_db": noise, "step_db": None, "floor_db": 300.0}
        return rsrp(given, beams, generator=torch.Generator().manual_seed(seed), **options)

    torch.testing.assert_close(powers(2.0), powers(2.0))
    assert float((powers(2.0) - powers(0.0)).std()) == pytest.approx(2.0, rel=0.1)


def test_keys_do_not_know_the_scale_of_their_rows_but_by_the_level():
    powers = torch.tensor([[-80.0, -85.0, -INF]])
    keys = fingerprint_keys(torch.cat([powers, powers + 8]), level_weight=0.5)
    assert keys.tolist() == [[0.0, -5.0, -30.0, -40.0], [0.0, -5.0, -30.0, -36.0]]


def test_the_mirror_measures_what_is_mirrored():
    site, beams = street_canyon(users=20, grid=(4, 2)), probing_beams((4, 2))
    turned = site.channels.unflatten(2, (4, 2)).flip(2).flatten(2, 3)
    options = {"step_db": None, "floor_db": 300.0}
    powers, labels = mirrored(rsrp(site.channels, beams, **options), channel_subspaces(site.channels, 3), (4, 2))
    torch.testing.assert_close(powers, rsrp(turned, beams, **options), atol=1e-2, rtol=0)
    assert float(labels.angles(Subspace(channel_subspaces(turned, 3).basis)).max()) < 1e-2
    assert float(labels.angles(channel_subspaces(site.channels, 3)).max()) > 0.1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda: fingerprint_keys(torch.tensor([[NAN, 0.0]])), "NaN"),
        (lambda: fingerprint_keys(torch.tensor([[-INF, -INF]])), "no power in any beam"),
        (lambda: fingerprint_keys(torch.tensor([[INF, 0.0]])), "inf"),
        (lambda: rsrp(torch.zeros(1, 2, 8, 1) + 0j, probing_beams((4, 2))), "no power in any beam"),
        (lambda: rsrp(torch.ones(1, 2, 8, 1) + 0j, probing_beams((4, 2)), noise_db=-1.0), "noise_db"),
        (lambda: probing_beams((4, 2), 5), "n_beams"),
        (lambda: mirrored(torch.zeros(1, 3), channel_subspaces(torch.ones(1, 1, 8, 1)), (4, 2)), "4 columns"),
    ],
)
def test_bad_input(fault, words):
    with pytest.raises(ValueError, match=words):
        fault()


def test_complex_powers_are_refused():
    with pytest.raises(TypeError, match="see `rsrp`"):
        fingerprint_keys(torch.ones(1, 2) + 0j)
