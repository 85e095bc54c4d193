"""What can be read from a representation by something simple: probes, their code length, and leakage between parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV, RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state

from subspan.base import check_matrix

PROBES = ("logistic", "ridge", "knn", "centroid", "regression")
"""Kinds of `make_probe`."""
FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Shares of the rows at whose ends an online code learns anew (Voita & Titov, 2020)."""


class ProbeScore(NamedTuple):
    """What a probe read; see `probe_score`.

    Attributes
    ----------
    score
        Share of test labels right, or R^2.
    chance
        Score of the commonest label of the training part, or 0 for numbers.
    """

    score: float
    chance: float


class CodeLength(NamedTuple):
    """Length of the labels told by an online code; see `online_code_length`.

    Attributes
    ----------
    bits
        To tell all labels given the rows.
    uniform
        n log2(classes).
    compression
        uniform / bits.
    """

    bits: float
    uniform: float
    compression: float


def make_probe(kind: str = "logistic", **options: Any) -> Any:
    """A scikit-learn estimator of a kind of probe.

    Parameters
    ----------
    kind
        "logistic" and "ridge" (alpha by leave-one-out) are linear on standardised columns; "knn" takes 10 neighbours by
        cosine; "centroid" the nearest class mean; "regression" is ridge for numbers.
    options
        Of the last estimator.

    Returns
    -------
    An estimator that is not fitted.

    Raises
    ------
    ValueError
        For an unknown kind.

    Examples
    --------
    >>> from subspan.measures import make_probe
    >>> make_probe("knn", n_neighbors=3)
    KNeighborsClassifier(metric='cosine', n_neighbors=3)
    """
    if kind == "logistic":
        return make_pipeline(StandardScaler(), LogisticRegression(**{"max_iter": 1000, **options}))
    if kind == "ridge":
        return make_pipeline(StandardScaler(), RidgeClassifierCV(**{"alphas": np.logspace(-3, 4, 8), **options}))
    if kind == "knn":
        return KNeighborsClassifier(**{"n_neighbors": 10, "metric": "cosine", **options})
    if kind == "centroid":
        return NearestCentroid(**options)
    if kind == "regression":
        return make_pipeline(StandardScaler(), RidgeCV(**{"alphas": np.logspace(-3, 4, 8), **options}))
    raise ValueError(f"kind: expected one of {PROBES}, got {kind!r}")


def _labelled(x: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    rows = check_matrix(x, "x").cpu().numpy()
    names = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if names.shape != (len(rows),):
        raise ValueError(f"labels: expected {len(rows)}, one a row, got shape {names.shape}")
    if names.dtype.kind == "f" and not np.isfinite(names).all():
        raise ValueError("labels: contain NaN or infinity")
    return rows, names


def probe_score(
    x: Any,
    labels: Any,
    *,
    kind: str = "logistic",
    test: tuple[Any, Any] | None = None,
    test_size: float = 0.5,
    random_state: Any = 0,
    **options: Any,
) -> ProbeScore:
    """How well a probe that is fitted on some rows reads the labels of others.

    Parameters
    ----------
    x
        Rows (n, d).
    labels
        (n,) classes, or numbers for kind="regression".
    kind, options
        See `make_probe`.
    test
        Rows and labels held out; None: a random part of x, with classes in proportion.
    test_size
        Share of the rows that is held out where `test` is None.
    random_state
        Seed of that part; None: another each time.

    Returns
    -------
    ProbeScore.

    Raises
    ------
    ValueError
        For NaN, another number of labels, or labels that are all the same.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import probe_score
    >>> rows = np.random.default_rng(0).standard_normal((200, 5))
    >>> probe_score(rows, rows[:, 2] > 0).score > 0.9
    True
    """
    rows, names = _labelled(x, labels)
    regression = kind == "regression"
    if not regression and len(np.unique(names)) < 2:
        raise ValueError("labels: all rows have the same, so there is nothing to read")
    if test is None:
        counts = np.unique(names, return_counts=True)[1]
        stratify = None if regression or counts.min() < 2 else names
        split = train_test_split(rows, names, test_size=test_size, random_state=random_state, stratify=stratify)
        rows, held_rows, names, held_names = split
    else:
        held_rows, held_names = _labelled(*test)
    score = float(make_probe(kind, **options).fit(rows, names).score(held_rows, held_names))
    if regression:
        return ProbeScore(score, 0.0)
    values, counts = np.unique(names, return_counts=True)
    return ProbeScore(score, float((held_names == values[counts.argmax()]).mean()))


def leakage(
    parts: Mapping[str, Any], factors: Mapping[str, Any], *, kind: str = "logistic", **options: Any
) -> dict[str, dict[str, ProbeScore]]:
    """What each part of a representation tells of each factor: `probe_score` by part, then by factor.

    A factor that leaks into a part that is not its own has a score above its chance there.

    Parameters
    ----------
    parts
        Rows (n, d_i) by name, as `Blocks.split` gives.
    factors
        Labels (n,) by name.
    kind, options
        See `probe_score`.

    Returns
    -------
    `ProbeScore` by the name of the part and that of the factor.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import leakage
    >>> rows = np.random.default_rng(0).standard_normal((200, 4))
    >>> found = leakage({"first": rows[:, :2], "rest": rows[:, 2:]}, {"sign": rows[:, 0] > 0})
    >>> found["first"]["sign"].score > 0.9, found["rest"]["sign"].score < 0.7
    (True, True)
    """
    return {
        part: {name: probe_score(rows, labels, kind=kind, **options) for name, labels in factors.items()}
        for part, rows in parts.items()
    }


def online_code_length(
    x: Any,
    labels: Any,
    *,
    kind: str = "logistic",
    fractions: Sequence[float] = FRACTIONS,
    random_state: Any = 0,
    **options: Any,
) -> CodeLength:
    """Minimum description length of labels given rows by an online code: a probe that learns as it goes.

    The rows come in random order; the first part is told at log2(classes) bits a label, and each later one by the
    probabilities of a probe fitted on all before, (n p + 1) / (n + classes), so that a class not seen yet costs finite
    bits. Labels that are easy to read cost few bits, those that cannot be read about `uniform`.

    Parameters
    ----------
    x
        Rows (n, d).
    labels
        (n,) classes.
    kind
        "logistic" or "knn", which give probabilities.
    fractions
        Ascending shares of the rows, the last one 1.
    random_state
        Seed of the order; None: another each time.
    options
        Of the probe, see `make_probe`.

    Returns
    -------
    CodeLength.

    Raises
    ------
    ValueError
        For fractions that do not ascend to 1, and labels that are all the same.

    References
    ----------
    Voita & Titov (2020), arXiv 2003.12298.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import online_code_length
    >>> rows = np.random.default_rng(0).standard_normal((200, 3))
    >>> parts = (0.1, 0.3, 1.0)
    >>> online_code_length(rows, rows[:, 0] > 0, fractions=parts).compression > 1.5
    True
    """
    if kind not in ("logistic", "knn"):
        raise ValueError(f"kind: expected 'logistic' or 'knn', which give probabilities, got {kind!r}")
    if not fractions or fractions[-1] != 1 or min(np.diff([0.0, *fractions])) <= 0:
        raise ValueError(f"fractions: must ascend to 1, got {tuple(fractions)}")
    rows, names = _labelled(x, labels)
    classes, codes = np.unique(names, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("labels: all rows have the same, so there is nothing to tell")
    order = check_random_state(random_state).permutation(len(rows))
    rows, codes = rows[order], codes[order]
    ends = sorted({max(1, round(share * len(rows))) for share in fractions})
    bits = ends[0] * np.log2(len(classes))
    for start, stop in pairwise(ends):
        chance = np.zeros((stop - start, len(classes)))
        seen = np.unique(codes[:start])
        if len(seen) == 1:
            chance[:, seen] = 1
        else:
            given = {"n_neighbors": min(10, start), **options} if kind == "knn" else options
            chance[:, seen] = make_probe(kind, **given).fit(rows[:start], codes[:start]).predict_proba(rows[start:stop])
        chance = (start * chance + 1) / (start + len(classes))
        bits -= np.log2(chance[np.arange(stop - start), codes[start:stop]]).sum()
    uniform = len(rows) * np.log2(len(classes))
    return CodeLength(float(bits), float(uniform), float(uniform / bits))
