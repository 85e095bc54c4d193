"""Cross moments against the whole matrix, in any order; contrasts; captured energy."""

import pytest
import torch

from subspan.geometry import CoordinateSubspace, Subspace
from subspan.statistics import CrossMoments, JointMoments, Moments, contrast_spectrum


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_batches_in_any_order_are_the_whole():
    x, y = draw(60, 4) + 1e6, draw(60, 3, seed=1) - 1e6
    y[:, 0] += x[:, 1]
    whole = JointMoments(4, 3).update(x, y)
    parts = [CrossMoments(4, 3).update(x[rows], y[rows]) for rows in (slice(0, 7), slice(7, 50), slice(50, None))]
    for found in (parts[0] + parts[1] + parts[2], parts[2] + (parts[1] + parts[0]), CrossMoments(4, 3).update(x, y)):
        torch.testing.assert_close(found.covariance(), whole.cov_xy, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.mean_x, x.mean(0))
        torch.testing.assert_close(found.mean_y, y.mean(0))
        assert found.count == 60
    shifted = CrossMoments(4, 3).update(x - 1e6 + 2, y + 1e6)
    torch.testing.assert_close(shifted.second_moment(), (x - 1e6 + 2).mT @ (y + 1e6) / 60, rtol=1e-6, atol=1e-6)


def test_complex_rows_and_those_that_are_refused():
    z = draw(20, 2, dtype=torch.complex128)
    found = CrossMoments(2, 2, dtype=torch.complex128).update(z, z)
    torch.testing.assert_close(found.covariance(), Moments(2, dtype=torch.complex128).update(z).covariance())
    moments = CrossMoments(2, 2).update(z.real, z.imag)
    before = moments.scatter.clone()
    for x, y, message in (
        (z, z.imag, "complex"), (z.real[:3], z.imag, "20 rows|3 rows"), (z.real, z.imag[:, :1], "2 columns"),
        (z.real * float("inf"), z.imag, "x"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            moments.update(x, y)
    assert torch.equal(moments.scatter, before)
    with pytest.raises(ValueError, match="need at least"):
        CrossMoments(2, 2).covariance()
    with pytest.raises(ValueError, match="dimensions"):
        _ = moments + CrossMoments(2, 3)


@pytest.mark.parametrize("n", [6, 80])  # rows kept, and squares
@pytest.mark.parametrize("center", [False, True])
def test_a_contrast_is_the_spectrum_of_the_difference(n, center):
    plus, minus = draw(n, 30) + 1, 2 * draw(n + 1, 30, seed=1)
    a, b = Moments(30).update(plus), Moments(30).update(minus)
    values, vectors = contrast_spectrum(a, b, weight=0.3, center=center)
    first, second = (plus.mT.cov(), minus.mT.cov()) if center else (plus.mT @ plus / n, minus.mT @ minus / (n + 1))
    dense = 0.7 * first - 0.3 * second
    torch.testing.assert_close(dense @ vectors, vectors * values)
    torch.testing.assert_close(values[:5], torch.linalg.eigvalsh(dense).flip(0)[:5])
    assert (len(values) < 30) == (n == 6)
    # By Ky Fan no other plane has more of one and less of the other.
    best = vectors[:, :2]
    for seed in range(20):
        other = Subspace.random(30, 2, generator=torch.Generator().manual_seed(seed)).basis
        assert (other.mT @ dense @ other).trace() <= (best.mT @ dense @ best).trace()
    with pytest.raises(ValueError, match="weight"):
        contrast_spectrum(a, b, weight=1.5)
    with pytest.raises(ValueError, match="dimension"):
        contrast_spectrum(a, Moments(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_captured_energy_is_the_share_of_the_rows_inside(dtype):
    rows = draw(50, 6, dtype=dtype) * torch.arange(1, 7)
    moment = Moments(6, dtype=dtype).update(rows).second_moment()
    subspace = Subspace.span(draw(6, 2, seed=1, dtype=dtype))
    share = subspace.coordinates(rows).abs().square().sum() / rows.abs().square().sum()
    torch.testing.assert_close(subspace.captured_energy(moment), share)
    moments, centred = Moments(6, dtype=dtype).update(rows), rows - rows.mean(0)
    share = subspace.coordinates(centred).abs().square().sum() / centred.abs().square().sum()
    assert moments.captured_energy(subspace) == pytest.approx(float(share))
    torch.testing.assert_close(subspace.captured_energy(moments.scatter), share)
    share = subspace.captured_energy(moment)
    turned = Subspace.span(subspace.basis @ draw(2, 2, seed=2, dtype=dtype))
    torch.testing.assert_close(turned.captured_energy(moment), share)
    both = torch.stack([moment, torch.eye(6, dtype=dtype)])
    torch.testing.assert_close(subspace.captured_energy(both)[1], torch.tensor(1 / 3).double())
    part = CoordinateSubspace.of([1, 4], 6)
    torch.testing.assert_close(part.captured_energy(both), part.to_subspace(dtype).captured_energy(both))
