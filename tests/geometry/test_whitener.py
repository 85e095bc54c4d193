"""The whitener against its definition, signed spectra against the dense matrix."""

import pytest
import torch

from subspan.geometry import Whitener, signed_spectrum


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_become_white_and_come_back(dtype):
    x = draw(200, 5, dtype=dtype) @ draw(5, 5, seed=1, dtype=dtype) + 7
    white = Whitener.of(x.mT.cov(), x.mean(0))
    z = white.whiten(x)
    exact = 1e-3 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(z.mT.cov(), torch.eye(5, dtype=dtype), atol=exact, rtol=0)
    assert float(z.mean(0).abs().max()) < exact
    torch.testing.assert_close(white.unwhiten(z), x, atol=exact, rtol=0)
    assert white.shift == 0


def test_the_plain_norm_of_weighed_weights_is_the_error_on_the_data():
    x, weight, other = draw(50, 6), draw(4, 6, seed=1), draw(4, 6, seed=2)
    white = Whitener.of(x.mT @ x / 50)
    on_data = (x @ (weight - other).mT).square().sum()
    torch.testing.assert_close(on_data, 50 * (white.weigh(weight) - white.weigh(other)).square().sum())
    torch.testing.assert_close(white.whiten(x) @ white.weigh(weight).mT, x @ weight.mT)
    torch.testing.assert_close(white.unweigh(white.weigh(weight)), weight)
    # The best weights of rank 2 on the data are the truncated SVD of the weighed ones.
    u, s, vh = torch.linalg.svd(white.weigh(weight), full_matrices=False)
    best = white.unweigh((u[:, :2] * s[:2]) @ vh[:2])
    error, values = (x @ (weight - best).mT).square().sum(), torch.linalg.svdvals(x @ weight.mT)
    torch.testing.assert_close(error, values[2:].square().sum())


def test_a_singular_or_indefinite_matrix_is_shifted_and_says_by_how_much():
    few = draw(3, 6)
    white = Whitener.of(few.mT @ few)
    assert 0 < white.shift < 1e-12
    assert float(white.whiten(few).norm()) < 1e1
    assert bool(torch.isfinite(white.whiten(draw(4, 6, seed=1))).all())
    torch.testing.assert_close(white.factor @ white.factor.mT, few.mT @ few, atol=1e-11, rtol=0)
    assert Whitener.of(torch.diag(torch.tensor([1.0, 1e-20]).double())).shift > 1e-16  # its factor is no rounding
    indefinite = torch.diag(torch.tensor([1.0, -0.5]).double())
    assert Whitener.of(indefinite).shift == pytest.approx(0.5)
    assert Whitener.of(torch.eye(2).double(), shift=0.25).shift == 0.25
    with pytest.raises(ValueError, match=r"0\.1 on the diagonal"):
        Whitener.of(indefinite, shift=0.1)
    with pytest.raises(ValueError, match="no positive eigenvalue"):
        Whitener.of(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="NaN"):
        Whitener.of(torch.full((2, 2), float("nan")))


def test_the_norm_of_white_rows_has_the_gradient_of_its_formula():
    x = draw(30, 3).requires_grad_()
    direction = draw(30, 3, seed=1)
    (Whitener.of(x.mT.cov()).whiten(x) * direction).sum().backward()
    step = 1e-6 * draw(30, 3, seed=2)
    with torch.no_grad():
        ends = [(Whitener.of((x + s * step).mT.cov()).whiten(x + s * step) * direction).sum() for s in (1, -1)]
    torch.testing.assert_close((x.grad * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("n", "m", "d"), [(4, 3, 20), (9, 8, 6), (5, 2, 7)])
def test_a_signed_spectrum_is_that_of_the_dense_matrix(n, m, d):
    plus, minus = draw(n, d), draw(m, d, seed=1)
    values, vectors = signed_spectrum(plus, minus)
    dense = plus.mT @ plus - minus.mT @ minus
    r = min(n + m, d)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(r, dtype=torch.float64))
    torch.testing.assert_close(dense @ vectors, vectors * values)
    every = torch.linalg.eigvalsh(dense).flip(0)
    kept = every.abs().argsort(descending=True)[:r].sort().values
    torch.testing.assert_close(values, every[kept], atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="columns"):
        signed_spectrum(plus, minus[:, 1:])
