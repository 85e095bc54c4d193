"""What two frozen representation spaces share: full spaces against subspaces, by retrieval, matching and CKA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base import as_tensor, check_matrix, normalize_rows
from subspan.statistics import JointMoments

from .plato_3d_text import Direction, SubspaceAligner, pair_score

METHODS = ("none", "affine", "ridge", "local_cka", "relative")
"""Ways to compare: cosine as it is, least squares, ridge, local CKA, relative coordinates."""
METRICS = ("top1", "top5", "top10", "matching")
_RIDGE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class CrossModalReport:
    """Scores of held-out pairs for every subspace, method, k, number of anchors and direction.

    Attributes
    ----------
    rows
        Dicts with the keys subspace ("full", "pca", "cca"), method (of METHODS), k (0 for full), n_anchors, direction,
        and METRICS.
    cka
        Linear CKA of the held-out pairs, full and in the subspaces.
    permutation, permutation_cka
        The same as rows for the canonical subspace fitted to anchors whose partners were shuffled, and its CKA.
    chance
        Expected scores of a random order.
    canonical
        Canonical correlations, on the anchors and held out.
    n_queries
        Pairs held out.
    """

    rows: list[dict[str, Any]]
    cka: dict[str, float]
    permutation: list[dict[str, Any]]
    permutation_cka: float
    chance: dict[str, float]
    canonical: dict[str, list[float]]
    n_queries: int

    def value(self, metric: str = "top5", *, permuted: bool = False, **where: Any) -> float:
        """Mean of a metric over the rows that have these values; both directions unless one is given."""
        rows = self.permutation if permuted else self.rows
        found = [row[metric] for row in rows if all(row[name] == value for name, value in where.items())]
        if not found:
            raise ValueError(f"where: no row has {where}")
        return float(np.mean(found))

    def best(self, metric: str = "top5", **where: Any) -> dict[str, Any]:
        """Subspace, method, k and n_anchors with the largest mean over directions, among the rows with `where`."""
        names = ("subspace", "method", "k", "n_anchors")
        settings = {tuple(r[n] for n in names) for r in self.rows if all(r[k] == v for k, v in where.items())}
        if not settings:
            raise ValueError(f"where: no row has {where}")
        scored = [(self.value(metric, **dict(zip(names, setting))), setting) for setting in sorted(settings, key=str)]
        value, setting = max(scored, key=lambda pair: pair[0])
        return {**dict(zip(names, setting)), metric: value}


def cross_modal_report(
    X: Any,
    Y: Any,
    *,
    n_components: Sequence[int] = (10, 25, 50, 100, 200),
    n_anchors: Sequence[int] | None = None,
    n_queries: int = 500,
    methods: Sequence[str] = METHODS,
    subspaces: Sequence[str] = ("full", "pca", "cca"),
    shrinkage: float | str = 0.1,
    groups: Any = None,
    random_state: int = 0,
) -> CrossModalReport:
    """Compare paired rows in their full spaces and in subspaces of both, on pairs held out.

    Of queries with equal rows of Y one is kept.

    Parameters
    ----------
    X, Y
        Paired rows (n, p) and (n, q).
    n_components
        Sizes k of the subspaces; k above what the anchors span are left out.
    n_anchors
        Sizes to sweep; the largest takes the whole k sweep, smaller ones the k nearest 50. None: all but the queries.
    n_queries
        Pairs held out.
    methods
        Some of "none", "affine", "ridge" (penalty from a fifth of the anchors), "local_cka", and "relative" (cosines to
        the anchors; Moschella et al., 2023).
    subspaces
        Some of "full", "pca", "cca".
    shrinkage
        Of the canonical directions, as in `SubspaceAligner`.
    groups
        (n,): queries come from groups that no anchor is of.
    random_state
        Seed of the draws.

    Returns
    -------
    CrossModalReport

    Raises
    ------
    ValueError
        For unequal n, NaN, or too few rows for the queries and 10 anchors.

    References
    ----------
    Hadgi et al. (2025), arXiv 2503.05283.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import cross_modal_report
    >>> random = torch.Generator().manual_seed(0)
    >>> z = torch.randn(150, 3, generator=random)  # what the two spaces share; the rest is their own
    >>> x, y = (torch.cat([z, torch.randn(150, 5, generator=random)], 1) for _ in range(2))
    >>> report = cross_modal_report(x, y, n_components=[3], n_queries=50, methods=["affine"])
    >>> report.value("top5", subspace="cca") > 0.9, report.value("top5", subspace="cca", permuted=True) < 0.5
    (True, True)
    """
    x, y = check_matrix(X, "X").double(), check_matrix(Y, "Y").double()
    if len(x) != len(y):
        raise ValueError(f"Y: expected {len(x)} rows to pair with X, got {len(y)}")
    for name, given, known in (("methods", methods, METHODS), ("subspaces", subspaces, ("full", "pca", "cca"))):
        if not given or set(given) - set(known):
            raise ValueError(f"{name}: some of {known}, got {tuple(given)}")
    generator = np.random.default_rng(random_state)
    queries, anchors = split_queries(y, n_queries, groups, generator)
    sizes = sorted(set(n_anchors or [len(anchors)]))
    if sizes[0] < 10 or sizes[-1] > len(anchors):
        raise ValueError(f"n_anchors: must lie in [10, {len(anchors)}], got {tuple(sizes)}")
    ks = sorted(set(n_components))
    held = x[queries], y[queries]
    rows, cka, canonical = [], {}, {}
    for size in sizes:
        pairs = x[anchors[:size]], y[anchors[:size]]
        wanted = ks if size == sizes[-1] else [min(ks, key=lambda k: abs(k - 50))]
        for subspace in subspaces:
            for model in _models(pairs, subspace, wanted, shrinkage):
                k = 0 if subspace == "full" else model.n_components_
                name = "full" if k == 0 else f"{subspace}-{k}"
                if size == sizes[-1]:
                    cka[name] = _held_cka(model, held)
                    if subspace == "cca":
                        seen, left_out = model.canonical_correlations_, model.held_out_correlations_
                        canonical = {"anchors": seen.tolist(), "held out": left_out.tolist()}
                facts = {"subspace": subspace, "k": k, "n_anchors": size}
                rows += [facts | row for method in methods for row in _scored(model, method, pairs, held)]
    shuffled = x[anchors], y[anchors[generator.permutation(len(anchors))]]
    permuted = _models(shuffled, "cca", [min(ks, key=lambda k: abs(k - 50))], shrinkage)
    null, null_cka = [], float("nan")
    for model in permuted:
        facts = {"subspace": "cca", "k": model.n_components_, "n_anchors": len(anchors)}
        null_cka = _held_cka(model, held)
        null += [facts | row for m in ("affine", "local_cka") for row in _scored(model, m, shuffled, held)]
    m = len(queries)
    chance = {metric: 1 / m if metric == "matching" else min(1.0, int(metric[3:]) / m) for metric in METRICS}
    return CrossModalReport(rows, cka, null, null_cka, chance, canonical, m)


def split_queries(
    y: Float[Tensor, "n q"], n_queries: int, groups: Any, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of queries and of anchors, both in random order; with groups no group has rows in both.

    Of rows of y that are equal (one caption for several things) at most one is a query: partners must be distinct.
    """
    n = len(y)
    order = generator.permutation(n)
    same = torch.unique(y, dim=0, return_inverse=True)[1].cpu().numpy()
    distinct = order[np.sort(np.unique(same[order], return_index=True)[1])]
    if groups is None:
        queries = distinct[:n_queries]
        anchors = order[~np.isin(order, queries)]
    else:
        names = np.asarray(groups)
        if names.shape != (n,):
            raise ValueError(f"groups: expected one for each of {n} rows, got shape {names.shape}")
        number = np.unique(names, return_inverse=True)[1]
        counts = np.bincount(number)
        drawn = generator.permutation(len(counts))
        # A group with more rows than the queries would leave the anchors poor for nothing.
        drawn = drawn[counts[drawn] <= max(n_queries, 1)]
        usable = np.bincount(number[distinct], minlength=len(counts))[drawn]
        chosen = np.isin(number, drawn[: int(np.searchsorted(np.cumsum(usable), n_queries)) + 1])
        queries, anchors = distinct[chosen[distinct]][:n_queries], order[~chosen[order]]
    if len(queries) < max(2, n_queries) or len(anchors) < 10:
        raise ValueError(
            f"n_queries: {n} rows leave {len(queries)} queries and {len(anchors)} anchors; "
            f"{max(2, n_queries)} and at least 10 are needed"
        )
    return queries, anchors


def _models(pairs: tuple[Tensor, Tensor], subspace: Any, ks: list[int], shrinkage: Any) -> Iterator[SubspaceAligner]:
    """One aligner a k, all cut from one fit."""
    with warnings.catch_warnings():
        # The report shows the correlations on the anchors and held out side by side.
        warnings.filterwarnings("ignore", message=".*(over-fitted|anchors are few)")
        if subspace == "full":
            yield SubspaceAligner(subspace=None).fit(*pairs)
            return
        moments = JointMoments(pairs[0].shape[1], pairs[1].shape[1]).update(*pairs)
        most = min(int(torch.linalg.matrix_rank(part.covariance(), hermitian=True)) for part in (moments.x, moments.y))
        kept = [k for k in ks if k <= most]
        if not kept:
            return
        whole = SubspaceAligner(kept[-1], subspace=subspace, shrinkage=shrinkage).fit(*pairs)
    for k in kept:
        yield whole.truncate(k)


def _scored(
    model: SubspaceAligner, method: str, anchors: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]
) -> Iterator[dict[str, Any]]:
    """Scores of one method in the coordinates of `model`, one dict a direction; none where it is not defined."""
    plain = model.truncate(method="cosine")
    if method == "none" and len(plain.map_x_.matrix) != len(plain.map_y_.matrix):
        return
    for direction in ("x->y", "y->x"):
        if method == "relative":
            a, b = (
                normalize_rows(relative_coordinates(side.map(rows), side.map(own)))
                for side, rows, own in zip((plain.map_x_, plain.map_y_), held, anchors)
            )
            scores = a @ b.mT
        elif method == "ridge":
            scores = _ridge(model, direction, anchors).similarity(*held)
        else:
            scores = model.truncate(method="cosine" if method == "none" else method, direction=direction).similarity(
                *held
            )
        scores = scores if direction == "x->y" else scores.mT
        yield {
            "method": method,
            "direction": direction,
            **{metric: pair_score(scores, metric) for metric in METRICS},
        }


def _ridge(model: SubspaceAligner, direction: Direction, anchors: tuple[Tensor, Tensor]) -> SubspaceAligner:
    """The penalty with the best top-5 retrieval on a fifth of the anchors (500 at most), then all anchors."""
    cut = max(5, min(500, len(anchors[0]) // 5))
    sides = [side.map(rows) for side, rows in zip(model.coordinates_, anchors)]
    x, y = sides
    start = SubspaceAligner(subspace=None, direction=direction).fit(x[cut:], y[cut:])
    scores = [start.truncate(alpha=alpha).score(x[:cut], y[:cut]) for alpha in _RIDGE_PENALTIES]
    return model.truncate(method="affine", direction=direction, alpha=_RIDGE_PENALTIES[int(np.argmax(scores))])


def _held_cka(model: SubspaceAligner, held: tuple[Tensor, Tensor]) -> float:
    a, b = (side.map(rows) for side, rows in zip(model.coordinates_, held))
    return JointMoments(a.shape[1], b.shape[1]).update(a, b).cka()


def relative_coordinates(rows: Any, anchors: Any) -> Float[Tensor, "m n"]:
    """Cosines of rows with anchors: coordinates that paired anchors make comparable across spaces.

    Parameters
    ----------
    rows
        (m, d).
    anchors
        (n, d).

    Returns
    -------
    Tensor, (m, n).

    References
    ----------
    Moschella et al. (2023), arXiv 2209.15430.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import relative_coordinates
    >>> relative_coordinates(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])).tolist()
    [[1.0, 0.0]]
    """
    a = check_matrix(rows, "rows")
    b = check_matrix(anchors, "anchors", columns=a.shape[1]).to(a)
    return normalize_rows(a) @ normalize_rows(b).mT


def distance_correlation(a: Any, b: Any) -> float:
    """Pearson correlation of two sets of distances between the same things, over pairs i < j.

    Parameters
    ----------
    a, b
        Distances (n, n).

    Returns
    -------
    float

    Raises
    ------
    ValueError
        For unequal n, fewer than 3, or constant distances.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import distance_correlation
    >>> x = torch.randn(6, 3)
    >>> round(distance_correlation(torch.cdist(x, x), 5 * torch.cdist(x, x)), 4)
    1.0
    """
    first, second = (as_tensor(d, name, ndim=2).double() for d, name in ((a, "a"), (b, "b")))
    if first.shape != second.shape or first.shape[0] != first.shape[1] or len(first) < 3:
        raise ValueError(
            f"a, b: expected two square tables of one size >= 3, got {tuple(first.shape)}, {tuple(second.shape)}"
        )
    i, j = torch.triu_indices(len(first), len(first), 1)
    value = float(torch.corrcoef(torch.stack([first[i, j], second[i, j]]))[0, 1])
    if value != value:
        raise ValueError("a, b: hold NaN, or one of them is constant, so the correlation is not defined")
    return value
