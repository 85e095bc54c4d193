"""Views of series against written-out transforms: Parseval, inverses, frame bounds, ridges, and what is refused."""

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from subspan.geometry import Frame
from subspan.nn import FourierView, FrameView, MorletView


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- Fourier


@pytest.mark.parametrize("length", [16, 17, 50])
@pytest.mark.parametrize("phase", ["angle", "parts"])
def test_the_spectrum_keeps_energy_and_can_be_turned_back(length, phase):
    x, view = noise(3, 2, length), FourierView(phase)
    seen = view(x)
    assert seen.shape == (3, 2 + (phase == "parts"), 2, length // 2 + 1)
    torch.testing.assert_close(view.inverse(seen, length), x, atol=1e-6, rtol=0)
    weights = torch.full((length // 2 + 1,), 2.0, dtype=torch.float64)
    weights[0] = 1
    if length % 2 == 0:
        weights[-1] = 1
    lower, upper = view.frame_bounds(length)
    assert lower == upper == 1
    energy = (seen[:, 0].square() * weights).sum(-1)
    torch.testing.assert_close(energy, x.square().sum(-1))


def test_a_constant_channel_has_no_phase_but_at_its_mean():
    x = torch.full((1, 2, 33), 3.7)
    x[0, 1] = 0
    amplitude, phase = FourierView()(x)[0]
    assert float(phase.abs().max()) == 0
    assert float(amplitude[0, 0]) == pytest.approx(3.7 * math.sqrt(33), rel=1e-5)
    assert float(amplitude[1].abs().max()) == 0
    negative = FourierView()(-x)[0, 1]
    assert float(negative[0, 0].abs()) == pytest.approx(math.pi)


@pytest.mark.parametrize("view", [FourierView(), MorletView(8, (1, 16))], ids=["fourier", "morlet"])
def test_half_precision_is_computed_in_single(view):
    x = noise(2, 3, 40).float() * 300
    for dtype in (torch.bfloat16, torch.float16):
        half = view(x.to(dtype))
        assert half.dtype == dtype
        assert torch.equal(half, view(x.to(dtype).float()).to(dtype))


# ---------------------------------------------------------------------- Morlet


def by_hand(x, scales, power, bandwidth, center):
    """Sums over samples, nothing outside."""
    length = x.shape[-1]
    lag = np.arange(length)[None, :] - np.arange(length)[:, None]
    found = []
    for s in scales:
        t = lag / s
        wavelet = np.exp(-(t**2) / bandwidth) * np.exp(2j * np.pi * center * t) / np.sqrt(np.pi * bandwidth)
        found.append(x @ wavelet.conj().T / s**power)
    return np.stack(found, -2)


@pytest.mark.parametrize("length", [64, 81, 270])
@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 0.5)])
@pytest.mark.parametrize(("bandwidth", "center"), [(1.0, 1.0), (1.5, 0.8)])
def test_coefficients_are_sums_over_samples(length, norm, power, bandwidth, center):
    # From scale 5 on a sampled wavelet has no copies inside the band.
    x = noise(2, 3, length)
    options = {"bandwidth": bandwidth, "center": center, "norm": norm}
    view = MorletView(7, (5, length / 2), magnitude=False, **options)
    expected = by_hand(x.numpy(), view.scales_of(length).numpy(), power, bandwidth, center)
    assert np.abs(view(x).numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    single = MorletView(7, (5, length / 2), **options)(x.float())
    assert single.dtype == torch.float32
    assert np.abs(single.numpy() - np.abs(expected)).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("length", [64, 67])
@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("boundary", ["zero", "periodic"])
def test_a_stride_keeps_every_so_many_th_place(length, stride, boundary):
    x = noise(1, 2, length)
    whole = MorletView(5, (1, 20), magnitude=False, boundary=boundary)(x)
    part = MorletView(5, (1, 20), magnitude=False, boundary=boundary, time_stride=stride)(x)
    torch.testing.assert_close(part, whole[..., ::stride])


def test_short_series_are_multiplied_by_a_matrix_with_the_same_answer():
    x = noise(2, 3, 256)
    view = MorletView(6, (1, 40), magnitude=False, time_stride=2)
    torch.testing.assert_close(view(x), view._transform(x))
    with torch.inference_mode():
        view(x[:, :, :100].float())
    short = x[:, :, :100].float().requires_grad_()
    view(short).abs().sum().backward()
    assert float(short.grad.abs().min()) > 0
    with torch.autocast("cpu", torch.bfloat16):
        mixed = view(short)
    assert mixed.dtype == torch.complex64
    torch.testing.assert_close(mixed, view(short))


def band_limited(length, low, high):
    """An orthonormal basis of real series with frequencies of a band, as rows."""
    n, rows = torch.arange(length).double(), []
    for k in range(length // 2 + 1):
        if low <= k / length <= high:
            angle = 2 * torch.pi * k * n / length
            waves = [angle.cos()] if k in (0, length / 2) else [angle.cos(), angle.sin()]
            rows += [wave / wave.norm() for wave in waves]
    return torch.stack(rows)


@pytest.mark.parametrize("length", [40, 41])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_bounds_are_those_of_the_frame_and_its_dual_gives_series_back(length, norm):
    low, high = 0.1, 0.5
    basis = band_limited(length, low, high)
    view = MorletView(6, (1, 12), norm=norm, magnitude=False, boundary="periodic")
    coefficients = view(basis.unsqueeze(1)).flatten(1)  # of each basis vector
    vectors = torch.cat([coefficients.real, coefficients.imag], 1).mT  # one a wavelet, in the basis
    frame = Frame(vectors)
    for ours, exact in zip(view.frame_bounds(length, (low, high)), frame.bounds, strict=True):
        assert ours == pytest.approx(float(exact), rel=1e-6)
    x = noise(3, len(basis))
    torch.testing.assert_close(frame.reconstruct(frame.analysis(x)), x)


@pytest.mark.parametrize("length", [256, 301])
def test_the_frame_is_tight_with_one_norm_and_not_with_the_other(length):
    lower, upper = MorletView(norm="l1").frame_bounds(length, (1 / 64, 0.5))
    assert upper / lower < 1.01
    lower, upper = MorletView(norm="l2").frame_bounds(length, (1 / 64, 0.5))
    lowest, highest = math.ceil(length / 64) / length, length // 2 / length
    assert upper / lower == pytest.approx(highest / lowest, rel=0.01)
    assert MorletView().frame_bounds(length) == pytest.approx(MorletView().frame_bounds(length, (1 / 64, 0.5)))


@pytest.mark.parametrize("frequency", [0.25, 0.1, 0.05])
def test_a_tone_has_its_ridge_at_the_inverse_of_its_frequency(frequency):
    view = MorletView(96, (1, 64))
    tone = torch.cos(2 * torch.pi * frequency * torch.arange(256.0)).expand(1, 1, -1)
    ridge = view.scales_of(256)[view(tone)[0, 0, :, 128].argmax()]
    step = 64 ** (1 / 95)
    assert float(ridge) * frequency == pytest.approx(1, rel=step - 1)
    constant = view(torch.ones(1, 1, 256))[0, 0, :20, 128]
    assert float(constant.max()) < 1e-3
    assert float(view(torch.zeros(1, 1, 256)).max()) == 0


def test_scales_end_at_half_the_length_and_a_warning_says_so_once():
    view = MorletView(8)
    with pytest.warns(UserWarning, match=r"1 to 128 were asked for; of series of 50 samples they end at 25"):
        view(noise(1, 1, 50))
    assert float(view.scales_of(50)[-1]) == pytest.approx(25)
    assert float(MorletView(8, (40, 50)).scales_of(300)[-1]) == pytest.approx(50)


@pytest.mark.parametrize("length", [100, 128])
def test_values_are_those_of_pywavelets(length):
    pywt = pytest.importorskip("pywt")
    x = noise(1, 2, length)
    view = MorletView(12, (1, length / 2), norm="l2", sampling="pywavelets")
    scales = view.scales_of(length).numpy()
    # Its own tables of the wavelet converge with their precision: 12 bits, the default, leave 6 % at large scales.
    theirs = np.abs([pywt.cwt(row.numpy(), scales, "cmor1-1", precision=18)[0] for row in x[0]])
    assert np.abs(view(x)[0].numpy() - theirs).max() < 1e-2 * theirs.max()


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "l3"}, "norm"),
        ({"boundary": "mirror"}, "boundary"),
        ({"sampling": "cells"}, "sampling"),
        ({"n_scales": 0}, "n_scales, time_stride: at least 1"),
        ({"time_stride": 0}, "n_scales, time_stride"),
        ({"scales": (4, 2)}, "scales"),
        ({"scales": (0, 2)}, "scales"),
        ({"scales": (1, math.inf)}, "scales"),
        ({"center": 0}, "bandwidth, center"),
        ({"bandwidth": math.nan}, "bandwidth, center"),
    ],
)
def test_what_makes_no_scalogram_is_refused(options, words):
    with pytest.raises((ValueError, TypeCheckError), match=words):
        MorletView(**options)


@pytest.mark.parametrize("view", [FourierView(), MorletView(4, (1, 8))], ids=["fourier", "morlet"])
def test_what_is_no_series_is_refused(view):
    for x in (torch.zeros(3, 20), torch.zeros(1, 1, 20, dtype=torch.complex64), torch.zeros(1, 1, 20).int()):
        with pytest.raises((ValueError, TypeCheckError), match=r"x: expected real series \(b, c, l\)|x="):
            view(x)
    with pytest.raises((ValueError, TypeCheckError), match="phase"):
        FourierView("turns")
    with pytest.raises(ValueError, match="band: holds no frequency"):
        MorletView(4, (1, 8)).frame_bounds(20, (0.31, 0.34))
    with pytest.raises(NotImplementedError, match="FrameView states no frame bounds"):
        FrameView().frame_bounds(20)
