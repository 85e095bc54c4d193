"""Rank rules: how many directions a spectrum supports.

A rule is called with the descending variances of a sample (squared singular values over the degrees of freedom), the
number of rows and the ambient dimension, and returns an int. `rank=` arguments everywhere take an int, a float in
(0, 1], a name, or a rule.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import numpy as np

from . import random_matrix


@runtime_checkable
class RankRule(Protocol):
    """Anything that turns a spectrum into a number of directions: a function will do.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.geometry import RankRule, Subspace
    >>> def half(variances, n, d):
    ...     return max(1, d // 2)
    >>> isinstance(half, RankRule), Subspace.fit(np.random.default_rng(0).normal(size=(50, 6)), rank=half).dim
    (True, 3)
    """

    def __call__(self, variances: np.ndarray, n: int, d: int) -> int:
        """Return the rank for `variances` (descending, length min(n, d) or d) of `n` rows in `d` dimensions."""
        ...


@dataclass(frozen=True)
class FixedRank:
    """Always `k` directions, capped at what the data spans (with a warning).

    Parameters
    ----------
    k
        Number of directions.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.geometry import FixedRank
    >>> FixedRank(2)(np.array([5.0, 3.0, 1.0]), n=10, d=3)
    2
    """

    k: int

    def __call__(self, variances: np.ndarray, n: int, d: int) -> int:
        """Return k, or the number of available directions when that is smaller."""
        available = int(min(len(variances), d))
        if self.k > available:
            warnings.warn(
                f"rank={self.k} is more than the {available} directions available; using {available}", stacklevel=2
            )
        return min(self.k, available)


@dataclass(frozen=True)
class EnergyRank:
    """Smallest k whose variances make up at least `ratio` of the total.

    Parameters
    ----------
    ratio
        Share of the total variance, in (0, 1].

    Raises
    ------
    ValueError
        For a ratio outside (0, 1], and when called with a spectrum of zeros.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.geometry import EnergyRank
    >>> EnergyRank(0.9)(np.array([80.0, 15.0, 5.0]), n=10, d=3)
    2
    """

    ratio: float = 0.99

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"rank: an explained-variance ratio must lie in (0, 1], got {self.ratio}")

    def __call__(self, variances: np.ndarray, n: int, d: int) -> int:
        """Return the smallest k with cumulative share >= ratio."""
        values = np.clip(variances, 0, None)
        if values.sum() <= 0:
            raise ValueError("x: the total variance is zero (constant rows); there is no direction to keep")
        share = np.cumsum(values) / values.sum()
        return int(min(np.searchsorted(share, self.ratio, side="left") + 1, len(values)))


@dataclass(frozen=True)
class FractionOfDim:
    """A share of the directions that there can be, min(n, d), whatever their variances; at least one.

    Parameters
    ----------
    share
        In (0, 1].

    Raises
    ------
    ValueError
        For a share outside (0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.geometry import FractionOfDim
    >>> FractionOfDim(0.25)(np.ones(8), n=100, d=8)
    2
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"rank: a share of the directions must lie in (0, 1], got {self.share}")

    def __call__(self, variances: np.ndarray, n: int, d: int) -> int:
        """Return round(share * min(n, d)), at least 1 and no more than there are variances."""
        return max(1, min(round(self.share * min(n, d)), len(variances)))


@dataclass(frozen=True)
class MarchenkoPastur:
    """Number of eigenvalues above the Marchenko-Pastur edge of the noise.

    Parameters
    ----------
    sigma2
        How the noise is estimated from the bulk ("median", "trace" or "density", see `geometry.random_matrix`), or its
        known variance.
    confidence
        None for the bare edge, or e.g. 0.95 for a Tracy-Widom margin.
    minimum
        Smallest answer; 0 lets the caller see that nothing stands out.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.geometry import MarchenkoPastur, Subspace
    >>> x = np.random.default_rng(0).normal(size=(400, 40))
    >>> x[:, :3] *= 5  # three directions stand out of the noise
    >>> Subspace.fit(x, rank=MarchenkoPastur(confidence=0.99)).dim
    3
    """

    sigma2: float | str = "median"
    confidence: float | None = None
    minimum: int = 1

    def noise(self, variances: np.ndarray, n: int, d: int) -> float:
        """Return the noise variance used for the edge."""
        if isinstance(self.sigma2, str):
            if self.sigma2 not in ("median", "trace", "density"):
                raise ValueError(f"sigma2: expected 'median', 'trace', 'density' or a number, got {self.sigma2!r}")
            if self.sigma2 == "density":
                return random_matrix.density_noise_variance(variances, n, d)
            return random_matrix.noise_variance(variances, n, d, method=self.sigma2)
        return float(self.sigma2)

    def edge(self, variances: np.ndarray, n: int, d: int) -> float:
        """Return the eigenvalue above which a direction counts."""
        return random_matrix.spike_edge(n, d, self.noise(variances, n, d), confidence=self.confidence)

    def __call__(self, variances: np.ndarray, n: int, d: int) -> int:
        """Return the number of variances above the edge, at least `minimum`."""
        return max(self.minimum, int((np.asarray(variances) > self.edge(variances, n, d)).sum()))


@dataclass(frozen=True)
class GavishDonoho:
    """Optimal hard threshold on singular values.

    Where the median singular value is zero (duplicated or rank-deficient rows) the rule falls back to 90 % of the
    energy, with a warning.

    Parameters
    ----------
    noise
        Standard deviation of the noise; None: unknown (median rule).
    minimum
        Smallest answer.

    References
    ----------
    Gavish & Donoho (2014), The optimal hard threshold for singular values is 4/√3, arXiv 1305.5870.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.geometry import GavishDonoho, Subspace
    >>> x = np.random.default_rng(0).normal(size=(400, 40))
    >>> x[:, :3] *= 5
    >>> Subspace.fit(x, rank=GavishDonoho()).dim
    3
    """

    noise: float | None = None
    minimum: int = 1

    def __call__(self, variances: np.ndarray, n: int, d: int) -> int:
        """Return the number of singular values above the threshold, at least `minimum`."""
        small, large = min(n, d), max(n, d)
        singular = np.sqrt(np.clip(np.asarray(variances, dtype=float)[:small], 0, None))
        singular = np.pad(singular, (0, small - len(singular)))
        if singular.max(initial=0.0) <= 0:
            raise ValueError("x: the total variance is zero (constant rows); there is no direction to keep")
        if self.noise is not None:
            # `variances` are squared singular values over n, so the threshold is divided by sqrt(n) too.
            cut = random_matrix.gavish_donoho_lambda(small / large) * np.sqrt(large / n) * self.noise
        else:
            median = float(np.median(singular))
            if median <= singular[0] * 1e-7:
                warnings.warn(
                    "the median singular value is zero (repeated rows?); using 90 % of the energy instead", stacklevel=2
                )
                return max(self.minimum, EnergyRank(0.9)(np.asarray(variances), n, d))
            cut = random_matrix.gavish_donoho_omega(small / large) * median
        return max(self.minimum, int((singular > cut).sum()))


@dataclass(frozen=True)
class EffectiveRank:
    """Effective rank exp(entropy of the spectrum), rounded to the nearest integer; see `effective_rank`.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.geometry import EffectiveRank
    >>> EffectiveRank()(np.array([1.0, 1.0, 0.0]), n=10, d=3)
    2
    """

    def __call__(self, variances: np.ndarray, n: int, d: int) -> int:
        """Return round(exp(entropy)), at least 1."""
        values = np.clip(np.asarray(variances, dtype=float), 0, None)
        if values.sum() <= 0:
            raise ValueError("x: the total variance is zero (constant rows); there is no direction to keep")
        p = values[values > 0] / values.sum()
        return max(1, int(np.rint(np.exp(-(p * np.log(p)).sum()))))


@dataclass(frozen=True)
class Elbow:
    """Elbow by profile likelihood: two groups of eigenvalues with one variance.

    References
    ----------
    Zhu & Ghodsi (2006), Automatic dimensionality selection from the scree plot via the use of profile likelihood.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.geometry import Elbow
    >>> Elbow()(np.array([9.0, 8.0, 1.1, 1.0, 0.9]), n=10, d=5)
    2
    """

    def __call__(self, variances: np.ndarray, n: int, d: int) -> int:
        """Return the split with the largest profile likelihood."""
        values = np.asarray(variances, dtype=float)[: min(n, d)]
        count = len(values)
        if count < 3:
            return max(1, count - 1)
        ones = np.arange(1, count)
        head, head2 = np.cumsum(values)[:-1], np.cumsum(values**2)[:-1]
        tail, tail2 = values.sum() - head, (values**2).sum() - head2
        spread = (head2 - head**2 / ones) + (tail2 - tail**2 / (count - ones))
        return int(ones[np.argmin(spread)])


_NAMED = {
    "marchenko-pastur": MarchenkoPastur(),
    "gavish-donoho": GavishDonoho(),
    "effective": EffectiveRank(),
    "elbow": Elbow(),
}


def rank_rule(rank: int | float | str | RankRule) -> RankRule:
    """Turn a `rank=` argument into a rule.

    Parameters
    ----------
    rank
        An int (`FixedRank`), a float in (0, 1] (explained variance, `EnergyRank`), the name of a rule
        ("marchenko-pastur", "gavish-donoho", "effective", "elbow"), or a rule.

    Returns
    -------
    RankRule.

    Raises
    ------
    ValueError
        For an unknown name and a number out of range.
    TypeError
        For anything else, such as a bool.

    Examples
    --------
    >>> from subspan.geometry import rank_rule
    >>> rank_rule(0.9), rank_rule("elbow")
    (EnergyRank(ratio=0.9), Elbow())
    """
    if isinstance(rank, str):
        if rank not in _NAMED:
            raise ValueError(f"rank: unknown rule {rank!r}; known: {', '.join(_NAMED)}")
        return _NAMED[rank]
    if isinstance(rank, bool):
        raise TypeError("rank: expected an int, a float in (0, 1], a name or a rule, got a bool")
    if isinstance(rank, int | np.integer):
        if rank < 1:
            raise ValueError(f"rank: must be at least 1, got {rank}")
        return FixedRank(int(rank))
    if isinstance(rank, float | np.floating):
        return EnergyRank(float(rank))
    if isinstance(rank, RankRule):
        return rank
    raise TypeError(f"rank: expected an int, a float in (0, 1], a name or a rule, got {type(rank).__name__}")


Rank = Annotated[int | float | str | RankRule, rank_rule]
"""The type of a `rank=` parameter."""
