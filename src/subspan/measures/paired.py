"""Comparing two methods on the same items."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from subspan.base import as_tensor, check_finite


def resampled_means(
    scores: Float[Any, "n m"], *, resamples: int = 4000, random_state: int = 0
) -> Float[np.ndarray, "resamples m"]:
    """Means of m scores of the same items when items are drawn with replacement: row by row one draw for all m.

    What is computed from each row has the quantiles of its bootstrap distribution: a ratio of means, the largest gap.

    Parameters
    ----------
    scores
        (n, m) finite numbers, an item a row.
    resamples
        Draws of n items.
    random_state
        Seed of the draws.

    Returns
    -------
    Array (resamples, m).

    Raises
    ------
    ValueError
        For NaN.

    References
    ----------
    Efron & Tibshirani (1993), An introduction to the bootstrap.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import resampled_means
    >>> scores = np.random.default_rng(0).normal([1.0, 2.0], 0.1, size=(50, 2))
    >>> means = resampled_means(scores)
    >>> low, high = np.quantile(means[:, 1] / means[:, 0], [0.025, 0.975])
    >>> bool(1.8 < low < high < 2.2)
    True
    """
    values = check_finite(as_tensor(scores, "scores", ndim=2), "scores").double().cpu().numpy()
    draws, n = np.random.default_rng(random_state), len(values)
    means = np.empty((resamples, values.shape[1]))
    block = max(1, 1_000_000 // n)
    for start in range(0, resamples, block):
        part = means[start : start + block]
        chosen = draws.integers(n, size=(len(part), n)) + n * np.arange(len(part))[:, None]
        # How often each item is drawn, times the scores: nothing of the size of draws times scores is made.
        part[:] = np.bincount(chosen.ravel(), minlength=part.shape[0] * n).reshape(-1, n) @ values / n
    return means


def paired_bootstrap(
    ours: Any, theirs: Any, *, level: float = 0.95, resamples: int = 4000, random_state: int = 0
) -> tuple[float, float, float]:
    """Mean of ours - theirs over items, and its percentile interval when items are drawn with replacement.

    Parameters
    ----------
    ours, theirs
        (n,) one number an item, at least 2.
    level
        Coverage of the interval, in (0, 1).
    resamples
        Draws of n items.
    random_state
        Seed of the draws.

    Returns
    -------
    Mean, lower end and upper end.

    Raises
    ------
    ValueError
        For unequal lengths, fewer than 2 items, or NaN.

    References
    ----------
    Efron & Tibshirani (1993), An introduction to the bootstrap.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import paired_bootstrap
    >>> theirs = np.random.default_rng(0).normal(size=50)
    >>> mean, low, high = paired_bootstrap(theirs + np.linspace(0.5, 1.5, 50), theirs)
    >>> round(mean, 6), 0.5 < low < 1 < high < 1.5
    (1.0, True)
    """
    first, second = (check_finite(as_tensor(x, name, ndim=1), name) for x, name in ((ours, "ours"), (theirs, "theirs")))
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"theirs: as many items as ours and at least 2 are needed, got {len(first)} and {len(second)}")
    if not 0 < level < 1:
        raise ValueError(f"level: must lie in (0, 1), got {level}")
    difference = (first.double() - second.double()).cpu().numpy()
    means = resampled_means(difference[:, None], resamples=resamples, random_state=random_state)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)


def expected_calibration_error(probabilities: Any, labels: Any, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins of the top probability.

    Parameters
    ----------
    probabilities
        (n, c), rows of sum 1.
    labels
        (n,) class numbers.
    bins
        Bins of [0, 1], at least 1.

    Returns
    -------
    Gap in [0, 1]; 0 is calibrated.

    Raises
    ------
    ValueError
        For rows that do not sum to 1, and another number of labels.

    References
    ----------
    Guo, Pleiss, Sun & Weinberger (2017), arXiv 1706.04599.

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import expected_calibration_error
    >>> sure, calibrated = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.75, 0.25]] * 4)
    >>> expected_calibration_error(sure, [0, 0, 1, 1]), expected_calibration_error(calibrated, [0, 0, 0, 1])
    (0.5, 0.0)
    """
    p = check_finite(as_tensor(probabilities, "probabilities", ndim=2), "probabilities").double()
    y = as_tensor(labels, "labels", ndim=1, floating=False)
    if len(p) != len(y) or len(p) == 0:
        raise ValueError(f"labels: as many as rows of probabilities are needed, got {len(y)} and {len(p)}")
    if bins < 1:
        raise ValueError(f"bins: at least 1, got {bins}")
    if bool((p < 0).any()) or float((p.sum(1) - 1).abs().max()) > 1e-3:
        raise ValueError("probabilities: rows must be >= 0 and sum to 1")
    confidence, answer = p.max(1)
    gap = (answer == y.to(answer.device)).double() - confidence
    place = (confidence * bins).long().clamp_max(bins - 1)
    return float(gap.new_zeros(bins).index_add(0, place, gap).abs().sum() / len(p))
