import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from subspan.geometry import GavishDonoho, MarchenkoPastur
from subspan.geometry import random_matrix as rm


@pytest.mark.parametrize(("gamma", "median"), [(1.0, 0.653), (0.5, 0.830), (0.1, 0.967)])
def test_median_of_the_bulk(gamma, median):
    assert abs(rm.mp_median(gamma) - median) < 5e-4


@pytest.mark.parametrize(("beta", "omega"), [(1.0, 2.858), (0.5, 2.171), (0.1, 1.609), (0.02, 1.459)])
def test_gavish_donoho_coefficients(beta, omega):
    assert abs(rm.gavish_donoho_omega(beta) - omega) < 1e-3
    assert abs(rm.gavish_donoho_lambda(1.0) - 4 / np.sqrt(3)) < 1e-12


@pytest.mark.parametrize("gamma", [0.05, 0.5, 1.0, 2.0, 7.5])
def test_density_integrates_to_one_and_to_the_distribution(gamma):
    low, high = rm.mp_edges(gamma, 1.7)
    middle = low + 0.3 * (high - low)
    points = [low + 1e-9 * (high - low), middle]
    assert abs(float(rm.mp_cdf(high, gamma, 1.7)) - 1) < 1e-12
    assert abs(float(rm.mp_cdf(high - 1e-9, gamma, 1.7)) - 1) < 1e-4
    area = integrate.quad(lambda x: float(rm.mp_pdf(x, gamma, 1.7)), *points, limit=400)[0]
    assert abs(area - float(rm.mp_cdf(middle, gamma, 1.7))) < 2e-3


@given(spike=st.floats(1.01, 100), gamma=st.floats(0.01, 5), sigma2=st.floats(0.1, 10))
def test_debiasing_inverts_the_spike_formula(spike, gamma, sigma2):
    population = sigma2 * (1 + np.sqrt(gamma)) * spike
    there = rm.bbp_forward(population, gamma, sigma2)
    assert there > rm.mp_edges(gamma, sigma2)[1]
    np.testing.assert_allclose(rm.bbp_inverse(there, gamma, sigma2), population, rtol=1e-6)


def test_spike_formula_by_hand():
    spikes = np.array([5.0, 3.0, 2.0])
    np.testing.assert_allclose(rm.bbp_forward(spikes, 0.25), [5.3125, 3.375, 2.5])
    np.testing.assert_allclose(rm.bbp_cosine(spikes, 0.25), [0.92647, 0.83333, 0.6], atol=1e-5)
    assert rm.bbp_threshold(0.25) == 1.5
    assert rm.bbp_forward(1.3, 0.25) == rm.mp_edges(0.25)[1] == 2.25
    assert rm.bbp_cosine(1.3, 0.25) == 0


def test_planted_spikes_in_a_sample():
    rng = np.random.default_rng(0)
    n, d = 4000, 1000
    population = np.ones(d)
    population[:4] = [5, 3, 2, 1.3]  # the last is below the threshold of 1.5
    x = rng.standard_normal((n, d)) * np.sqrt(population)
    values, vectors = np.linalg.eigh(x.T @ x / n)
    values, vectors = values[::-1], vectors[:, ::-1]
    for method in ("median", "trace"):
        assert abs(rm.noise_variance(values, n, d, method=method) - 1) < 0.02
        assert MarchenkoPastur(sigma2=method, confidence=0.95)(values, n, d) == 3
    np.testing.assert_allclose(values[:3], [5.3125, 3.375, 2.5], rtol=0.05)
    cosines = np.array([vectors[i, i] ** 2 for i in range(3)])
    np.testing.assert_allclose(cosines, [0.926, 0.833, 0.6], atol=0.05)
    shrunk = rm.shrink_spikes(values, n, d, 1.0)
    np.testing.assert_allclose(shrunk[:3], population[:3], rtol=0.08)
    assert np.all(shrunk[3:] == 1.0)


@pytest.mark.parametrize(("n", "d"), [(400, 100), (100, 400)])
def test_pure_noise_has_no_spikes_at_the_stated_level(n, d):
    rng = np.random.default_rng(1)
    found, noise = [], []
    for _ in range(100):
        values = np.linalg.svd(rng.standard_normal((n, d)) * 3.0, compute_uv=False) ** 2 / n
        noise.append(rm.noise_variance(values, n, d) / 9)
        found.append(MarchenkoPastur(sigma2="trace", confidence=0.95, minimum=0)(values, n, d))
    assert abs(np.mean(noise) - 1) < 0.02
    assert np.mean(np.array(found) == 0) >= 0.92
    assert np.mean(np.array(found) == 0) < 1


def test_tracy_widom_quantiles():
    # Tabulated order-1 quantiles (Bejan, 2005): 0.95 -> 0.9793, 0.99 -> 2.0234.
    assert abs(rm.tracy_widom_quantile(0.95) - 0.9793) < 0.01
    assert abs(rm.tracy_widom_quantile(0.99) - 2.0234) < 0.02


def test_gavish_donoho_with_known_noise_agrees_with_the_unknown_form():
    rng = np.random.default_rng(2)
    n, d, k, sigma = 400, 200, 6, 0.5
    low = rng.standard_normal((n, k)) @ rng.standard_normal((k, d))
    x = low + sigma * rng.standard_normal((n, d))
    values = np.linalg.svd(x, compute_uv=False) ** 2 / n
    assert GavishDonoho()(values, n, d) == k
    assert GavishDonoho(noise=sigma)(values, n, d) == k
    wide = np.linalg.svd(x.T, compute_uv=False) ** 2 / d
    assert GavishDonoho(noise=sigma)(wide, d, n) == k


def test_errors():
    with pytest.raises(ValueError, match="gamma"):
        rm.mp_edges(0.0)
    with pytest.raises(ValueError, match="all are zero"):
        rm.noise_variance(np.zeros(5), 10, 5)
    with pytest.raises(ValueError, match="probability"):
        rm.tracy_widom_quantile(1.0)
