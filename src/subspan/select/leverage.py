"""Selection of rows by statistical leverage on the dominant subspace of a pool, streamed in two passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.utils import _safe_indexing, check_consistent_length, check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import as_tensor, like, normalize_rows
from subspan.base.estimators import Estimator
from subspan.base.parameters import Count, Seed
from subspan.geometry import Subspace
from subspan.geometry.rank import Rank
from subspan.statistics import Moments, batches, fit_moments, is_dask, is_one_shot, is_stream


@dataclass(eq=False, repr=False)
class LeverageSelector(Estimator):
    """Choose the rows that span the dominant subspace of a pool, by their leverage scores.

    The leverage of row i is |U_k[i, :]|^2 for the singular value decomposition U S V' of the (centred) pool cut at
    rank k, computed as sum_j ((x_i - mean) . v_j)^2 / s_j^2 from streamed second moments: time O(n d^2), memory
    O(d^2). Scores lie in [0, 1] and sum to k; m copies of a row get a m-th each. Rows far from the mean have large
    leverage, so "top" prefers outliers; "sample" has the approximation guarantee of CUR sampling.

    Parameters
    ----------
    n_select
        Rows to keep, or the fraction of the pool.
    rank
        Dimension of the dominant subspace: a number, a float for explained variance, a rule or its name.
    center
        Subtract the column means. Without it the mean direction takes most of the energy.
    standardize
        Divide the columns by their standard deviation (constant columns are left).
    row_norm
        Scale the rows, after the above, to unit length; costs one more pass.
    strategy
        "top" keeps the largest scores, equal ones in pool order; "sample" draws rows without replacement with inclusion
        probabilities proportional to the scores (capped at 1).
    batch_size
        Rows a pass reads at a time.
    random_state
        Seed of "sample".

    Attributes
    ----------
    scores_
        Leverage (n,) of the pool's rows, after `fit`.
    ranking_
        Positions (n,) by descending score.
    indices_
        Positions (m,) of the selected rows, ascending.
    weights_
        (m,). "sample": one over each selected row's inclusion probability, so that weighted sums over the selection are
        unbiased for sums over the pool; "top": ones.
    subspace_, k_
        The dominant subspace and its dimension.
    mean_, scale_
        What centring and standardising used.

    References
    ----------
    Wu et al., ScalSelect, 2026 (arXiv 2602.11636); Mahoney & Drineas, CUR decompositions, 2009.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.select import LeverageSelector
    >>> x = np.random.default_rng(0).normal(size=(100, 5))
    >>> x[[7, 42]] *= 10
    >>> LeverageSelector(2, rank=5).fit(x).indices_.tolist()
    [7, 42]
    """

    n_select: int | float = 0.16
    _: KW_ONLY
    rank: Rank = 0.9
    center: bool = True
    standardize: bool = False
    row_norm: bool = False
    strategy: Literal["top", "sample"] = "top"
    batch_size: Count = 8192
    random_state: Seed = None

    def fit(self, X: Any, y: Any = None) -> LeverageSelector:
        """Find the dominant subspace of the pool, score its rows and select.

        X: array or tensor (n, d), memory map, .npy or .parquet path, Dask array, or an iterable of batches that can be
        read again. Raises ValueError for fewer than 2 rows, NaN, constant rows, one-shot iterators and n_select > n.
        """
        self._check_parameters()
        pool = self._pool(X, reset=True)
        self._fit_pool(pool)
        scores = self._score(pool)
        self.ranking_ = rank_rows(scores)
        self.indices_, self.weights_ = select_rows(
            scores, self.n_select, strategy=self.strategy, random_state=self.random_state
        )
        self.scores_ = scores if isinstance(X, Tensor) else scores.cpu().numpy()
        return self

    def partial_fit(self, X: Any, y: Any = None) -> LeverageSelector:
        """Add a batch (n, d) to the moments of the pool, that of an earlier `fit` too; rows are not kept here.

        `score_samples` then scores rows; scores and selection of an earlier `fit`, which were of its pool alone, go.
        """
        self._check_parameters()
        if self.row_norm and (self.center or self.standardize):
            raise ValueError("row_norm: after centring or standardising it needs a second pass over the pool; use fit")
        for name in ("scores_", "ranking_", "indices_", "weights_"):
            self.__dict__.pop(name, None)
        started = getattr(self, "_moments", None) is not None
        rows = self._rows(X, reset=not started)
        if not started:
            self._moments = Moments(rows.shape[1], device=rows.device)
        assert self._moments is not None
        rows = rows.to(torch.float64)
        self._moments.update(normalize_rows(rows) if self.row_norm else rows)
        self._subspace = None
        return self

    def score_samples(self, X: Any) -> Any:
        """Leverage (n,) of rows against the fitted pool; rows that were not in the pool may exceed 1."""
        check_is_fitted(self)
        return like(self._score(self._pool(X, reset=False)), X)

    def fit_resample(self, X: Any, y: Any = None) -> Any:
        """Fit, and return the selected rows in pool order: (X, y), or X alone where no y is given."""
        if is_stream(X) and not isinstance(X, np.memmap):
            raise ValueError("X: rows of a stream cannot be taken by position; use fit and indices_")
        if y is not None:
            check_consistent_length(X, y)
        self.fit(X)
        chosen = _take(X, self.indices_)
        return chosen if y is None else (chosen, _take(y, self.indices_))

    @property
    def subspace_(self) -> Subspace:
        """The pool's dominant subspace, in the space of the standardised rows."""
        check_is_fitted(self)
        if self._subspace is None:
            assert self._moments is not None
            return self._use_moments(self._moments)
        return self._subspace

    @property
    def k_(self) -> int:
        """Dimension of the dominant subspace."""
        return self.subspace_.dim

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_subspace")

    # ------------------------------------------------------------------ the two passes

    def _fit_pool(self, pool: Any) -> None:
        # In float64 throughout, so that a ranking does not depend on how the pool was cut into batches.
        moments = fit_moments(pool if is_dask(pool) else (rows.to(torch.float64) for rows in self._parts(pool)))
        self._moments = moments
        if not self.row_norm:
            self._use_moments(moments)
            return
        self._mean_and_scale(moments)
        normalized = self._moments = fit_moments(self._prepare(rows) for rows in self._parts(pool))
        self._set(normalized.subspace(self.rank, center=False), self.mean_, self.scale_)

    def _mean_and_scale(self, moments: Moments) -> None:
        self.mean_ = moments.mean if self.center else None
        deviation = (moments.squares / moments.count).sqrt()
        self.scale_ = torch.where(deviation > 0, deviation, 1.0) if self.standardize else None

    def _use_moments(self, moments: Moments) -> Subspace:
        if moments.count < 2:
            raise ValueError(f"X: leverage needs at least 2 rows, got n_samples = {moments.count:g}")
        self._mean_and_scale(moments)
        used = moments if self.scale_ is None else moments.scaled(1 / self.scale_)
        found = used.subspace(self.rank, center=self.center)
        return self._set(found, self.mean_, self.scale_)

    def _set(self, found: Subspace, mean: Tensor | None, scale: Tensor | None) -> Subspace:
        # Directions without variance, which a rank rule such as 1.0 may take in, have no singular value to divide by.
        assert found.variances is not None
        floor = found.ambient_dim * torch.finfo(torch.float64).eps * found.variances[0]
        self.mean_, self.scale_ = mean, scale
        self._subspace = found.truncate(int((found.variances > floor).sum()))
        return self._subspace

    def _prepare(self, rows: Tensor) -> Tensor:
        """Rows in the space of `subspace_`, whose centre does the centring unless rows are normalised after it."""
        if self.scale_ is None and not self.row_norm:
            return rows
        rows = rows.to(torch.float64)
        if self.row_norm and self.mean_ is not None:
            rows = rows - self.mean_
        if self.scale_ is not None:
            rows = rows / self.scale_
        return normalize_rows(rows) if self.row_norm else rows

    def _score(self, pool: Any) -> Tensor:
        subspace = self.subspace_
        parts = [subspace.leverage(self._prepare(rows)) for rows in self._parts(pool)]
        return torch.cat(parts).to(torch.float64)

    def _parts(self, pool: Any) -> Iterator[Tensor]:
        start = 0
        for rows in batches(pool, self.batch_size):
            bad = (~torch.isfinite(rows)).any(1) if not torch.isfinite(rows.sum()) else None
            if bad is not None and bool(bad.any()):
                raise ValueError(
                    f"X: row {start + int(bad.nonzero()[0, 0])} contains NaN or infinity; remove or impute it"
                )
            start += len(rows)
            yield rows

    # ------------------------------------------------------------------ the door

    def _pool(self, X: Any, *, reset: bool) -> Any:
        """The rows as a tensor, or the stream itself."""
        if is_one_shot(X):
            raise ValueError(
                "X: a one-shot iterator is used up by the first of two passes; pass a re-iterable (a list-like of "
                "batches, a DataLoader, a file), or feed partial_fit and then score_samples"
            )
        if not is_stream(X):
            return self._rows(X, reset=reset)
        width = X.shape[1] if is_dask(X) else next(iter(batches(X, 1))).shape[1]
        if reset:
            self._set_width(width)
        elif width != self.n_features_in_:
            raise ValueError(f"X: has {width} features, but LeverageSelector is expecting {self.n_features_in_}")
        return X.astype(np.float64) if is_dask(X) else X


def _take(values: Any, indices: np.ndarray) -> Any:
    if isinstance(values, Tensor):
        return values[torch.as_tensor(indices, device=values.device)]
    return _safe_indexing(values, indices)


# ---------------------------------------------------------------------- from scores to rows


def budget(n_select: int | float, n: int) -> int:
    """Number of rows that `n_select` (a count, or a fraction of `n`) asks for, at least 1."""
    if isinstance(n_select, bool) or not isinstance(n_select, int | float | np.integer | np.floating):
        raise TypeError(f"n_select: expected an int or a fraction, got {type(n_select).__name__}")
    if isinstance(n_select, float | np.floating):
        if not 0 < n_select <= 1:
            raise ValueError(f"n_select: a fraction must lie in (0, 1], got {n_select}")
        return max(1, round(float(n_select) * n))
    if not 1 <= n_select <= n:
        raise ValueError(f"n_select: must lie in [1, {n}], the rows that have a score, got {n_select}")
    return int(n_select)


def rank_rows(scores: Any) -> np.ndarray:
    """Positions by descending score; scores that agree to 12 digits of the largest keep their order, NaN comes last.

    Parameters
    ----------
    scores
        Array or tensor (n,).

    Returns
    -------
    numpy array, (n,).

    Examples
    --------
    >>> from subspan.select import rank_rows
    >>> rank_rows([0.1, 0.7, float("nan"), 0.7]).tolist()
    [1, 3, 0, 2]
    """
    values = np.asarray(as_tensor(scores, "scores", ndim=1).cpu(), dtype=np.float64)
    known = np.isfinite(values)
    largest = np.abs(values[known]).max(initial=0.0) or 1.0
    # Equal rows may score differently in the last bits, depending on where in a batch they stood.
    key = np.where(known, -np.round(values / largest, 12), np.inf)
    return np.argsort(key, kind="stable")


def select_rows(
    scores: Any, n_select: int | float, *, strategy: str = "top", random_state: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the selected rows, ascending, and their weights.

    Parameters
    ----------
    scores
        Array or tensor (n,); rows with NaN are never taken.
    n_select
        Rows to take, or the fraction of the rows with a score.
    strategy
        "top", the largest scores; "sample", drawn with probability proportional to the scores.
    random_state
        Seed of "sample".

    Returns
    -------
    Positions (m,), and weights (m,): ones for "top", one over the inclusion probability for "sample".

    Examples
    --------
    >>> from subspan.select import select_rows
    >>> positions, weights = select_rows([0.1, 0.7, float("nan"), 0.9], 2)
    >>> positions.tolist(), weights.tolist()
    ([1, 3], [1.0, 1.0])
    """
    values = np.asarray(as_tensor(scores, "scores", ndim=1).cpu(), dtype=np.float64)
    known = np.flatnonzero(np.isfinite(values))
    m = budget(n_select, len(known))
    if strategy == "top":
        return np.sort(rank_rows(values)[:m]), np.ones(m)
    probability = inclusion_probabilities(values[known], m)
    drawn = _systematic(probability, m, check_random_state(random_state))
    return known[drawn], 1 / probability[drawn]


def inclusion_probabilities(scores: np.ndarray, m: int) -> np.ndarray:
    """Probabilities proportional to non-negative `scores`, capped at 1, that sum to `m`.

    Where fewer than m scores are positive those rows are certain, and the rest share what is left equally.

    Parameters
    ----------
    scores
        (n,), at least 0.
    m
        Rows to draw.

    Returns
    -------
    numpy array, (n,).

    Raises
    ------
    ValueError
        For negative scores.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.select import inclusion_probabilities
    >>> inclusion_probabilities(np.array([1.0, 1.0, 2.0, 0.0]), 2).tolist()
    [0.5, 0.5, 1.0, 0.0]
    """
    if (scores < 0).any():
        raise ValueError("scores: must not be negative")
    positive = scores > 0
    if positive.sum() <= m:
        rest = len(scores) - positive.sum()
        return np.where(positive, 1.0, (m - positive.sum()) / rest if rest else 0.0)
    probability = np.zeros(len(scores))
    certain = np.zeros(len(scores), dtype=bool)
    while True:
        share = np.where(certain, 0.0, scores)
        probability = np.where(certain, 1.0, share * ((m - certain.sum()) / share.sum()))
        over = ~certain & (probability > 1 - 1e-9)
        if not over.any():
            return probability
        certain |= over


def _systematic(probability: np.ndarray, m: int, random: np.random.RandomState) -> np.ndarray:
    """Draw m positions with these inclusion probabilities: systematic sampling in random order (Madow, 1949)."""
    certain = np.flatnonzero(probability >= 1)
    others = random.permutation(np.flatnonzero(probability < 1))
    left = m - len(certain)
    if left == 0:
        return certain
    edges = np.cumsum(probability[others])
    points = (random.uniform() + np.arange(left)) * (edges[-1] / left)
    drawn = others[np.searchsorted(edges, points, side="right").clip(max=len(others) - 1)]
    return np.sort(np.concatenate([certain, drawn]))
