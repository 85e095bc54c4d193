"""The Gaussian kernel by its formula, and random features that approach it."""

import pytest
import torch

from subspan.measures import RandomFeatures, gaussian_kernel, gram_matrix, median_bandwidth


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_kernel_is_its_formula_also_far_from_the_origin():
    x, y = draw(7, 3), draw(4, 3, seed=1)
    expected = torch.exp(-torch.cdist(x, y).square() / (2 * 0.7**2))
    torch.testing.assert_close(gaussian_kernel(x, y, bandwidth=0.7), expected)
    torch.testing.assert_close(gaussian_kernel(x + 1e6, y + 1e6, bandwidth=0.7), expected, rtol=1e-6, atol=1e-6)
    distances = torch.pdist(x)
    width = distances.square().repeat(2).median().sqrt()  # every pair counts twice
    assert median_bandwidth(x) == pytest.approx(float(width))
    torch.testing.assert_close(gaussian_kernel(x), gaussian_kernel(x, x, bandwidth=float(width)))
    assert torch.equal(gram_matrix(x, "rbf"), gaussian_kernel(x))
    assert torch.equal(gaussian_kernel(torch.ones(3, 2)), torch.ones(3, 3))
    assert (gaussian_kernel(draw(9, 300).float(), bandwidth=1e-3).diagonal() == 1).all()
    for wrong in (0.0, "mean"):
        with pytest.raises(ValueError, match="bandwidth"):
            gaussian_kernel(x, bandwidth=wrong)


def test_the_kernel_has_the_gradient_of_its_formula():
    x = draw(5, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: gaussian_kernel(rows, bandwidth=1.3), x)
    assert torch.autograd.gradcheck(lambda rows: gaussian_kernel(rows, draw(3, 2, seed=1), bandwidth=1.3), x)


@pytest.mark.parametrize("bandwidth", [0.5, 2.0])
def test_random_features_approach_the_kernel(bandwidth):
    x, exact = draw(20, 3), gaussian_kernel(draw(20, 3), bandwidth=bandwidth)
    errors = []
    for m in (100, 10_000):
        generator = torch.Generator().manual_seed(3)
        z = RandomFeatures.gaussian(3, m, bandwidth, generator=generator, dtype=torch.float64).features(x)
        assert z.shape == (20, m)
        errors.append(float((z @ z.mT - exact).square().mean().sqrt()))
    assert errors[1] < 0.02
    assert 5 < errors[0] / errors[1] < 20
    with pytest.raises(ValueError, match="n_features"):
        RandomFeatures.gaussian(3, 0, 1.0)
