"""Beams of the codebooks: what a search by hand finds, and what can never be."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from subspan.geometry import Subspace, dft_dictionary
from subspan.geometry.grassmann import random_basis
from subspan.wireless import (
    beam_energies,
    channel_covariance,
    channel_subspaces,
    feedback_cost,
    port_selection,
    probing_beams,
    spectral_efficiency,
    type1_beam,
    type2_subspace,
)

GRID = (4, 2)


def channels(n: int = 6, places: int = 8, subbands: int = 3) -> Tensor:
    return torch.randn(n, 2, places, subbands, dtype=torch.complex128)


def test_captured_energy_of_the_own_directions_is_the_sum_of_eigenvalues_and_no_others_hold_more():
    given = channels()
    covariance, labels = channel_covariance(given), channel_subspaces(given, 4)
    own = labels.captured_energy(covariance)
    torch.testing.assert_close(own, labels.variances.sum(-1))
    torch.testing.assert_close(own, labels.explained_ratio)
    turned = Subspace(labels.basis @ random_basis(4, 4, dtype=torch.complex128))
    torch.testing.assert_close(turned.captured_energy(covariance), own)
    others = Subspace.random(8, 4, batch=(50, 1), dtype=torch.complex128)
    assert bool((others.captured_energy(covariance) < own).all())


def test_covariance_is_the_sum_over_polarisations_and_subbands_at_any_scale():
    given = channels(1)
    expected = sum(h[:, None] * h[None].conj() for h in given[0].movedim(1, 2).flatten(0, 1))
    torch.testing.assert_close(channel_covariance(given)[0], expected / expected.diagonal().sum())
    tiny = (1e-30 * given).to(torch.complex64)
    torch.testing.assert_close(
        channel_covariance(tiny)[0].to(torch.complex128), channel_covariance(given)[0], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("n_beams", [1, 2, 3])
def test_type_two_is_what_a_search_by_hand_finds(n_beams):
    covariance = channel_covariance(channels())
    found = type2_subspace(covariance, GRID, oversampling=(4, 2), n_beams=n_beams)
    dictionary = dft_dictionary(*GRID, oversampling=(4, 2))
    for place, r in enumerate(covariance):
        best, which = -1.0, None
        for number, group in enumerate(dictionary):
            for beams in itertools.combinations(range(8), n_beams):
                energy = sum(float((group[b].conj() @ r @ group[b]).real) for b in beams)
                if energy > best:
                    best, which = energy, (number, set(beams))
        assert (int(found.group[place]), set(found.beams[place].tolist())) == which
        assert float(found.subspace[place].captured_energy(r)) == pytest.approx(best)
    torch.testing.assert_close(found.subspace.captured_energy(covariance), found.subspace.variances.sum(-1))


def test_more_beams_and_more_groups_never_hold_less():
    covariance = channel_covariance(channels(40))

    def share(found: Subspace) -> Tensor:
        return found.captured_energy(covariance)

    one, two = share(type1_beam(covariance, GRID)), share(type2_subspace(covariance, GRID, n_beams=2).subspace)
    plain = share(type2_subspace(covariance, GRID, oversampling=1, n_beams=2).subspace)
    assert bool((two >= one).all())
    assert bool((two >= plain).all())
    own = torch.linalg.eigvalsh(covariance)[:, -2:].sum(1)
    assert bool((two <= own + 1e-12).all())
    random = share(Subspace.random(8, 1, batch=(40,), dtype=torch.complex128))
    assert float(one.mean()) > 1.5 * float(random.mean())
    torch.testing.assert_close(plain, share(port_selection(covariance, dft_dictionary(*GRID)[0], 2)))


def test_a_plane_wave_is_one_beam():
    dictionary = dft_dictionary(*GRID, oversampling=(4, 4))
    wave = dictionary[7, 3]
    covariance = torch.outer(wave, wave.conj()).unsqueeze(0)
    assert float(beam_energies(covariance, dictionary).max()) == pytest.approx(1)
    found = type2_subspace(covariance, GRID)
    assert (int(found.group), int(found.beams[0, 0])) == (7, 3)


def test_channels_of_rank_one_are_filled_up():
    labels = channel_subspaces(channels(3)[:, :1, :, :1], rank=4)
    torch.testing.assert_close(labels.variances, torch.tensor([[1.0, 0, 0, 0]] * 3).double(), atol=1e-12, rtol=0)


def test_half_precision_is_computed_in_single():
    real = torch.randn(2, 1, 8, 3)
    torch.testing.assert_close(channel_covariance(real.half()), channel_covariance(real), atol=2e-3, rtol=0)


def test_costs():
    two, ours = feedback_cost("type-II"), feedback_cost("predicted")
    # The station knows group and beams: 4 + 16 bits fewer, 8 ports in place of 64, no search.
    assert two.bits - ours.bits == 20
    assert (two.ports, ours.ports, ours.operations) == (64, 8, 0)
    assert feedback_cost("port selection").bits == two.bits - 4
    assert feedback_cost("type-I").bits == 9 + 16
    share = torch.tensor([0.0, 0.5, 1.0])
    rates = spectral_efficiency(share, ours, snr_db=0.0, positions=3, symbols=80)
    torch.testing.assert_close(rates, 0.9 * torch.log2(1 + 3 * share))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda r: channel_covariance(torch.zeros(2, 1, 4, 1)), "2 of 2 are zero"),
        (lambda r: channel_covariance(torch.full((1, 1, 4, 1), torch.nan)), "NaN"),
        (lambda r: type2_subspace(r, (4, 4)), "16 positions, the channels have 8"),
        (lambda r: type2_subspace(r, GRID, n_beams=9), "n_beams"),
        (lambda r: port_selection(r, probing_beams(GRID, 2), 3), "n_ports"),
        (lambda r: port_selection(r, torch.ones(2, 8) + 0j, 2), "not orthonormal"),
        (lambda r: channel_subspaces(channels(), 9), "rank"),
        (lambda r: feedback_cost("type-II", n_beams=33), "n_beams"),
        (lambda r: spectral_efficiency(torch.ones(1), feedback_cost("type-II"), symbols=64), "taken"),
    ],
)
def test_bad_input(fault, words):
    with pytest.raises(ValueError, match=words):
        fault(channel_covariance(channels()))
