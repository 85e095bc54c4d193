"""Random-matrix laws for noisy spectra: Marchenko-Pastur, spiked covariance (BBP), Tracy-Widom, Gavish-Donoho.

Notation: n samples in d dimensions, aspect ratio `gamma` = d/n, noise variance `sigma2`; eigenvalues are those of the
sample covariance X'X/n. Everything is in numpy float64.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import integrate, optimize, special

Array = np.ndarray


def _check_aspect(gamma: float) -> float:
    gamma = float(gamma)
    if not (np.isfinite(gamma) and gamma > 0):
        raise ValueError(f"gamma: the aspect ratio d/n must be positive and finite, got {gamma}")
    return gamma


def mp_edges(gamma: float, sigma2: float = 1.0) -> tuple[float, float]:
    """Lower and upper edge of the Marchenko-Pastur bulk, sigma2 (1 -/+ sqrt(gamma))^2 (Marchenko & Pastur, 1967)."""
    root = np.sqrt(_check_aspect(gamma))
    return float(sigma2 * (1 - root) ** 2), float(sigma2 * (1 + root) ** 2)


def mp_pdf(x: Array | float, gamma: float, sigma2: float = 1.0) -> Array:
    """Marchenko-Pastur density of the nonzero eigenvalues; for gamma > 1 they carry the whole mass."""
    gamma = _check_aspect(gamma)
    x = np.asarray(x, dtype=float)
    low, high = mp_edges(gamma, sigma2)
    inside = (x > low) & (x < high)
    safe = np.where(inside, x, 1.0)
    density = np.sqrt(np.clip((high - safe) * (safe - low), 0, None)) / (2 * np.pi * sigma2 * gamma * safe)
    return np.where(inside, density * max(1.0, gamma), 0.0)


def mp_cdf(x: Array | float, gamma: float, sigma2: float = 1.0) -> Array:
    """Marchenko-Pastur distribution function of the nonzero eigenvalues."""
    gamma = _check_aspect(gamma)
    low, high = mp_edges(gamma, sigma2)

    def one(value: float) -> float:
        if value <= low:
            return 0.0
        if value >= high:
            return 1.0
        # The substitution x = low + (high - low) sin^2(t) removes the square roots at both edges.
        top = np.arcsin(np.sqrt((value - low) / (high - low)))

        def integrand(t: float) -> float:
            s2 = np.sin(t) ** 2
            at = low + (high - low) * s2
            return 0.0 if at == 0 else (high - low) ** 2 * 2 * s2 * np.cos(t) ** 2 / at

        area = integrate.quad(integrand, 0.0, top, epsabs=1e-13, epsrel=1e-12)[0]
        return float(area * max(1.0, gamma) / (2 * np.pi * sigma2 * gamma))

    return np.vectorize(one, otypes=[float])(x)


@lru_cache(maxsize=4096)
def mp_median(gamma: float) -> float:
    """Median of the Marchenko-Pastur law at unit noise (of the nonzero eigenvalues where gamma > 1)."""
    low, high = mp_edges(gamma)
    return float(optimize.brentq(lambda x: float(mp_cdf(x, gamma)) - 0.5, low, high, xtol=1e-13))  # pyright: ignore[reportArgumentType]


def noise_variance(eigenvalues: Array, n: int, d: int, *, method: str = "median", refine: int = 10) -> float:
    """Noise variance of a sample covariance whose spikes are taken out first.

    `eigenvalues`: those of X'X/n, any order, zeros beyond min(n, d) allowed. method "median": the median eigenvalue
    over the median of the law, repeated without the spikes found so far; robust where the bulk only resembles the law.
    "trace": from there the mean of the bulk, corrected for what the spikes draw from it; several times less variable,
    which an exact level of a spike test needs. Raises ValueError when no eigenvalue is nonzero.
    """
    if method not in ("median", "trace"):
        raise ValueError(f"method: expected 'median' or 'trace', got {method!r}")
    values = np.sort(np.asarray(eigenvalues, dtype=float))[::-1][: min(n, d)]
    values = values[values > values.max(initial=0.0) * 1e-14]
    if values.size == 0:
        raise ValueError("eigenvalues: all are zero, so the noise level is not defined")
    bulk, spikes = values, 0
    for _ in range(refine + 1):
        gamma = max(1, d - spikes) / n
        sigma2 = float(np.median(bulk)) / mp_median(round(gamma, 12))
        found = int((values > mp_edges(gamma, sigma2)[1]).sum())
        if found == spikes or found >= values.size:
            break
        spikes, bulk = found, values[found:]
    if method == "trace":
        # Only what clears the edge by its fluctuation counts as a spike, else noise would be cut off its own bulk.
        outside = int((values > spike_edge(n, d, sigma2, confidence=0.99)).sum())
        population = bbp_inverse(values[:outside], d / n, sigma2)
        drawn = (d / n * sigma2 * population / (population - sigma2)).sum()
        sigma2 = float((values[outside:].sum() + drawn) / (d - outside))
    return sigma2


def density_noise_variance(eigenvalues: Array, n: int, d: int, *, bins: int = 50) -> float:
    """Noise variance whose Marchenko-Pastur density fits the histogram of the bulk best, in least squares.

    Arguments and errors as `noise_variance`, whose answer is where the search starts. The histogram is that of the
    square roots, whose density is bounded for every aspect ratio.
    """
    start = noise_variance(eigenvalues, n, d)
    values = np.sort(np.asarray(eigenvalues, dtype=float))[::-1][: min(n, d)]
    roots = np.sqrt(values[values > values.max() * 1e-14])
    gamma = d / n
    edges = np.linspace(0.0, np.sqrt(1.5 * mp_edges(gamma, start)[1]), bins + 1)
    centers = (edges[1:] + edges[:-1]) / 2
    observed = np.histogram(roots, edges)[0] / (len(roots) * edges[1])

    def misfit(log_sigma2: float) -> float:
        sigma2 = float(np.exp(log_sigma2))
        noise = (roots**2 <= mp_edges(gamma, sigma2)[1]).mean()
        return float(((observed - noise * 2 * centers * mp_pdf(centers**2, gamma, sigma2)) ** 2).sum())

    grid = np.log(start) + np.linspace(-np.log(2), np.log(2), 81)
    best = int(np.argmin([misfit(point) for point in grid]))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    return float(np.exp(optimize.minimize_scalar(misfit, bounds=(low, high), method="bounded").x))


def tracy_widom_quantile(probability: float) -> float:
    """Quantile of the Tracy-Widom law of order 1 by its shifted-gamma approximation (Chiani, 2014; error < 1e-2)."""
    if not 0 < probability < 1:
        raise ValueError(f"probability: must lie in (0, 1), got {probability}")
    shape, scale, shift = 46.446, 0.186054, 9.84801
    return float(scale * special.gammaincinv(shape, probability) - shift)


def spike_edge(n: int, d: int, sigma2: float = 1.0, *, confidence: float | None = None) -> float:
    """Eigenvalue above which a direction is no noise: the bulk edge, plus a Tracy-Widom margin at `confidence`."""
    gamma = d / n
    edge = mp_edges(gamma, sigma2)[1]
    if confidence is not None:
        root = np.sqrt(gamma)
        edge += sigma2 * tracy_widom_quantile(confidence) * n ** (-2 / 3) * (1 + root) ** (4 / 3) * gamma ** (-1 / 6)
    return float(edge)


def bbp_threshold(gamma: float, sigma2: float = 1.0) -> float:
    """Population eigenvalue above which a spike leaves the bulk, sigma2 (1 + sqrt(gamma)) (Baik et al., 2005)."""
    return float(sigma2 * (1 + np.sqrt(_check_aspect(gamma))))


def bbp_forward(spike: Array | float, gamma: float, sigma2: float = 1.0) -> Array:
    """Sample eigenvalue of a population spike; those below the threshold sit at the bulk edge."""
    spike = np.asarray(spike, dtype=float)
    visible = spike > bbp_threshold(gamma, sigma2)
    excess = np.where(visible, spike - sigma2, 1.0)
    return np.where(visible, spike * (1 + gamma * sigma2 / excess), mp_edges(gamma, sigma2)[1])


def bbp_inverse(eigenvalue: Array | float, gamma: float, sigma2: float = 1.0) -> Array:
    """Population spike behind a sample eigenvalue above the edge (debiasing); NaN is never returned.

    Eigenvalues at or under the edge carry no spike and are given the threshold value itself.
    """
    value = np.asarray(eigenvalue, dtype=float)
    half = value + sigma2 * (1 - _check_aspect(gamma))
    discriminant = np.clip(half**2 - 4 * value * sigma2, 0, None)
    spike = 0.5 * (half + np.sqrt(discriminant))
    return np.where(value > mp_edges(gamma, sigma2)[1], spike, bbp_threshold(gamma, sigma2))


def bbp_cosine(spike: Array | float, gamma: float, sigma2: float = 1.0) -> Array:
    """Squared cosine between a population spike and its sample eigenvector; 0 below the threshold."""
    spike = np.asarray(spike, dtype=float)
    visible = spike > bbp_threshold(gamma, sigma2)
    excess = np.where(visible, spike - sigma2, 1.0)
    cosine = (1 - gamma * sigma2**2 / excess**2) / (1 + gamma * sigma2 / excess)
    return np.where(visible, np.clip(cosine, 0, 1), 0.0)


def shrink_spikes(eigenvalues: Array, n: int, d: int, sigma2: float) -> Array:
    """Eigenvalues debiased for estimation: spikes by the BBP inverse, everything under the edge to `sigma2`."""
    values = np.asarray(eigenvalues, dtype=float)
    edge = mp_edges(d / n, sigma2)[1]
    return np.where(values > edge, bbp_inverse(values, d / n, sigma2), sigma2)


def gavish_donoho_lambda(beta: float) -> float:
    """Optimal hard threshold for known noise, in units of sqrt(larger side) sigma (Gavish & Donoho, 2014)."""
    if not 0 < beta <= 1:
        raise ValueError(f"beta: the aspect ratio smaller/larger side must lie in (0, 1], got {beta}")
    return float(np.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + np.sqrt(beta**2 + 14 * beta + 1))))


def gavish_donoho_omega(beta: float) -> float:
    """Optimal hard threshold for unknown noise, in units of the median singular value (Gavish & Donoho, 2014)."""
    return gavish_donoho_lambda(beta) / float(np.sqrt(mp_median(round(float(beta), 12))))
