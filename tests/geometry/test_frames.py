"""Frames: the inequality that defines them, their dual, and dictionaries of beams."""

import pytest
import torch

from subspan.geometry import Frame, dft_dictionary, response_bounds


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_a_frame_reconstructs_by_its_dual(dtype):
    frame, x = Frame(draw(9, 4, dtype=dtype)), draw(5, 4, seed=1, dtype=dtype)
    coefficients = frame.analysis(x)
    torch.testing.assert_close(coefficients[0, 2], (x[0] * frame.vectors[2].conj()).sum())
    torch.testing.assert_close(frame.reconstruct(coefficients), x, atol=1e-4 if dtype.itemsize < 8 else 1e-10, rtol=0)
    torch.testing.assert_close(frame.dual().dual().vectors, frame.vectors, atol=1e-4, rtol=0)
    energy, norm = coefficients.abs().square().sum(1), x.abs().square().sum(1)
    lower, upper = frame.bounds
    assert ((lower * norm <= energy * (1 + 1e-5)) & (energy <= upper * norm * (1 + 1e-5))).all()
    assert frame.tightness == pytest.approx(float(lower / upper))
    # Both are reached, by the singular vectors.
    reached = frame.analysis(torch.linalg.svd(frame.vectors, full_matrices=False)[2]).abs().square().sum(1)
    torch.testing.assert_close(reached[[-1, 0]], torch.stack([lower, upper]))


def test_reconstruction_of_any_coefficients_is_least_squares():
    frame, c = Frame(draw(9, 4)), draw(3, 9, seed=1)
    torch.testing.assert_close(frame.reconstruct(c), torch.linalg.lstsq(frame.vectors, c.mT).solution.mT)
    assert frame.redundancy == 9 / 4


def test_what_is_no_frame_is_refused():
    with pytest.raises(ValueError, match="cannot span"):
        Frame(draw(3, 4))
    for seed in range(8):  # also where rounding makes the least eigenvalue positive
        with pytest.raises(ValueError, match="do not span"):
            Frame(draw(6, 2, seed=seed) @ draw(2, 4, seed=seed + 1))
    with pytest.raises(ValueError, match="do not span"):
        Frame(torch.full((4, 2), float("nan")))


@pytest.mark.parametrize(("sizes", "oversampling"), [((5,), 1), ((4,), 3), ((4, 2), (4, 1)), ((3, 2), 2)])
def test_groups_of_beams_are_bases_and_together_a_tight_frame(sizes, oversampling):
    beams = dft_dictionary(*sizes, oversampling=oversampling)
    n = beams.shape[1]
    torch.testing.assert_close(beams @ beams.mH, torch.eye(n, dtype=beams.dtype).expand_as(beams))
    frame = Frame(beams.flatten(0, 1))
    assert [float(bound) for bound in frame.bounds] == pytest.approx([len(beams)] * 2)
    assert frame.coherence == pytest.approx(0, abs=1e-12) if len(beams) == 1 else frame.coherence > 0.3


def test_beams_are_those_of_the_formula():
    beams = dft_dictionary(4, 3, oversampling=(2, 3)).unflatten(0, (2, 3)).unflatten(2, (4, 3)).unflatten(-1, (4, 3))
    q1, q2, l1, l2, i, j = 1, 2, 3, 1, 2, 2
    phase = (q1 + 2 * l1) * i / 8 + (q2 + 3 * l2) * j / 9
    expected = torch.exp(torch.tensor(2j * torch.pi * phase, dtype=beams.dtype)) / 12**0.5
    torch.testing.assert_close(beams[q1, q2, l1, l2, i, j], expected)
    torch.testing.assert_close(dft_dictionary(8)[0].conj() * 8**0.5, torch.fft.fft(torch.eye(8).to(torch.complex128)))
    with pytest.raises(ValueError, match="oversampling"):
        dft_dictionary(4, 4, oversampling=(2,))


def test_bounds_of_shifted_filters_are_those_of_the_matrix():
    filters = draw(3, 8)
    shifts = torch.cat([torch.stack([kernel.roll(step) for step in range(8)]) for kernel in filters])
    found = response_bounds(torch.fft.fft(filters))
    torch.testing.assert_close(torch.stack(found), torch.stack(Frame(shifts).bounds))
