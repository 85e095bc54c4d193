"""Outliers among rows: how far they lie from a principal subspace, and out along it.

mean μ, eigenvectors C and eigenvalues λ of the covariance of normal rows; rank r by explained variance;
residual score S(x) = |x - μ|² - |Cᵣᵀ(x - μ)|² (SubspaceAD, Lendering et al., CVPR 2026), the score of the patches of
images. For rows whose normality nobody vouches for it is not enough: one that is far out bends the subspace towards
itself (see `combined`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import norm
from sklearn.base import OutlierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import like, save_arrays, saved_object
from subspan.base.estimators import Estimator, at_least_single
from subspan.base.parameters import Bounds, Count, NonNegative, Whole, check_value
from subspan.base.saved import Schema, optional
from subspan.geometry import FixedRank, Subspace, rank_rule
from subspan.geometry.rank import Rank
from subspan.geometry.subspace import SAVED_ARRAYS
from subspan.statistics import Moments, batches, fit_moments, is_dask, is_one_shot, is_stream

from .combined import (
    FENCE,
    chi_square_limit,
    column_scale,
    combined_limit,
    combined_score,
    counted_null,
    distance_roots,
    gaussian_null,
)

Distance = Literal["combined", "residual", "mahalanobis", "euclidean", "cosine"]
Contamination = Annotated[float, Bounds(above=0, most=0.5)]
_CHUNK_BYTES = 16 << 20


def subspace_score(
    subspace: Subspace,
    x: Float[Tensor, "n d"],
    distance: str = "residual",
    *,
    drop_k: int = 0,
    epsilon: int | float = 1e-6,
) -> Float[Tensor, " n"]:
    """Anomaly score (higher = more anomalous) of rows against a subspace.

    Parameters
    ----------
    subspace
        Of R^d; one that was fitted, with variances, for "mahalanobis".
    x
        Rows (n, d).
    distance
        "residual": squared distance to the subspace; "mahalanobis": sum z_i² / (λ_i + epsilon) inside it; "euclidean":
        sum z_i²; "cosine": 1 - cos(x, its projection).
    drop_k
        First directions that do not count as normal: "residual" and "cosine" leave them out of the subspace, the other
        two out of the sum.
    epsilon
        Relative to the mean variance of a column, where the subspace knows it.

    Returns
    -------
    Tensor, (n,).

    Raises
    ------
    ValueError
        For another distance, and for "mahalanobis" without variances or with one of 0 at epsilon=0.

    Examples
    --------
    >>> import torch
    >>> from subspan.detect import subspace_score
    >>> from subspan.geometry import Subspace
    >>> subspace_score(Subspace(torch.eye(3)[:, :2]), torch.tensor([[5.0, 5.0, 0.0], [1.0, 1.0, 2.0]])).tolist()
    [0.0, 4.0]
    """
    if subspace.spectrum is not None:
        epsilon = epsilon * float(subspace.spectrum.sum()) / subspace.ambient_dim
    if distance == "cosine":
        kept = subspace.coordinates(x)
        kept[:, :drop_k] = 0
        nearest = subspace.embed(kept)
        norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(nearest, dim=-1)
        # A row at the origin has no direction, and so none that could be normal.
        return 1 - ((x * nearest).sum(-1) / torch.where(norms > 0, norms, 1)).clamp(-1, 1)
    if distance == "residual":
        z, residual = subspace.energies(x)
        return residual + z[:, :drop_k].square().sum(-1) if drop_k else residual
    z = subspace.coordinates(x)[:, drop_k:]
    if distance == "euclidean":
        return z.square().sum(-1)
    if distance == "mahalanobis":
        variances = subspace.variances
        if variances is None:
            raise ValueError("distance: 'mahalanobis' needs a subspace that was fitted, with variances")
        weights = variances[drop_k:].to(z.dtype) + epsilon
        if bool((weights <= 0).any()):
            raise ValueError("epsilon: a direction has no variance to divide by; choose epsilon > 0 or a lower rank")
        return (z.square() / weights).sum(-1)
    raise ValueError(f"distance: 'residual', 'mahalanobis', 'cosine' or 'euclidean', got {distance!r}")


@dataclass(eq=False, repr=False)
class SubspaceDetector(OutlierMixin, Estimator):
    """Outlier detector for rows: how far they lie from the principal subspace of normal rows, and out along it.

    `fit` takes an array or tensor (n, d), or a stream that `subspan.statistics.batches` reads: in O(d²) memory and one
    pass, with one more for the threshold where the stream can be read again. After `partial_fit` or a one-shot
    iterator, what is usual is that of a Gaussian with the same spectrum (Box, 1954). `calibrate` sets the threshold
    from held-out normal rows instead. Fit costs O(n d² + d³), scoring O(d r) a row, what is saved d (r + 2) numbers.

    Parameters
    ----------
    rank
        Explained variance in (0, 1], int, rule name or rule.
    distance
        "combined": the larger of two distances of standardised columns (see `subspan.detect.combined`), as standard
        deviations beyond what is usual among the training rows; neither units nor a few strange rows among them decide.
        "residual" (SubspaceAD's), "mahalanobis", "euclidean", "cosine": as in `subspace_score`, on columns as they are:
        scale them before where their units differ, and fit to rows that are known to be normal.
    drop_k, epsilon
        As in `subspace_score`.
    contamination
        Share of the training rows (0, 0.5] that `predict` calls outliers, None for 0.01; "fence" calls so what lies
        three interquartile ranges above the upper quartile (of the cube roots, but for "combined"), which of Gaussian
        rows are a few in a million. It is counted in a second look at the rows.
    strict
        An int rank above min(n - 1, d) is an error, not a warning.
    batch_size
        Rows read at a time.

    Attributes
    ----------
    subspace_
        `Subspace` of rows divided by scale_.
    scale_, null_
        (d,) and (2, 2) for "combined", else None.
    offset_
        Threshold on `score_samples`.
    moments_
        Of the rows, for `partial_fit`.

    References
    ----------
    Lendering et al., SubspaceAD, CVPR 2026.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.detect import SubspaceDetector
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 6)) + 0.01 * rng.normal(size=(500, 6))
    >>> model = SubspaceDetector(2, contamination="fence").fit(x)
    >>> model.predict(np.vstack([x[:2], x[:2] + rng.normal(size=(2, 6))])).tolist()
    [1, 1, -1, -1]
    """

    rank: Rank = 0.99
    _: KW_ONLY
    distance: Distance = "combined"
    drop_k: Whole = 0
    epsilon: NonNegative = 1e-6
    contamination: Contamination | Literal["fence"] | None = None
    strict: bool = False
    batch_size: Count = 8192

    def fit(self, X: Any, y: Any = None) -> SubspaceDetector:
        """Fit to normal rows (n, d), an array or a stream of batches; y is ignored."""
        self._check_parameters()
        self.__dict__.pop("moments_", None)
        if is_stream(X):
            self.moments_, dtype = self._streamed(X)
            self._set_width(self.moments_.d)
            self._fit_moments(dtype)
            if not is_one_shot(X):
                self._look_again(batches(X, self.batch_size))
            return self
        rows = at_least_single(self._rows(X, reset=True))
        n, d = rows.shape
        if n < d:
            self._fit_few(rows)
        else:
            self.moments_ = Moments(d, device=rows.device).update(rows)
            self._fit_moments(rows.dtype)
        self._look_again([rows])
        return self

    def _fit_few(self, rows: Tensor) -> None:
        """Fit to fewer rows than columns, whose moments would be larger than they are."""
        self.scale_ = None
        if self.distance == "combined":
            wide = rows.double()
            self.scale_ = column_scale(wide.var(0), wide.mean(0), rows.dtype)
            rows = wide / self.scale_
        self._set_subspace(Subspace.fit(rows, rank=self.rank), len(rows))

    def _fit_moments(self, dtype: torch.dtype) -> None:
        moments, self.scale_ = self.moments_, None
        if self.distance == "combined":
            self.scale_ = column_scale(moments.squares / (moments.count - 1), moments.mean, dtype)
            subspace = moments.scaled(1 / self.scale_).subspace(self.rank)
        else:
            subspace = moments.subspace(self.rank, dtype=dtype)
        self._set_subspace(subspace, moments.count)

    def _look_again(self, parts: Iterable[Tensor]) -> None:
        """Count what is usual, and the threshold, in the training rows."""
        dtype, found = torch.float32, []
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
            found.append(self._distances(part))
        if self.distance == "combined":
            self.null_ = counted_null(torch.cat(found))
        scores = self._scored(torch.cat(found), dtype)
        if self.contamination != "fence":
            self._set_offset(scores, self.contamination or 0.01)
            return
        power = 1 if self.distance == "combined" else 3
        low, high = np.quantile(scores.double().cpu().numpy() ** (1 / power), (0.25, 0.75))
        self.offset_ = -float((high + 3 * (high - low)) ** power)

    def partial_fit(self, X: Any, y: Any = None) -> SubspaceDetector:
        """Add normal rows (n, d) to those of earlier calls of fit and partial_fit, which moments_ holds.

        The threshold is the Gaussian limit at `contamination`. Raises ValueError after a `fit` on fewer rows than
        columns, which keeps no moments (they would be larger than the rows).
        """
        self._check_parameters()
        first = not hasattr(self, "moments_")
        if first and hasattr(self, "subspace_"):
            raise ValueError("partial_fit: fit on fewer rows than columns keeps no moments; begin with a clone")
        rows = at_least_single(self._rows(X, reset=first))
        if first:
            self.moments_ = Moments(rows.shape[1], device=rows.device)
        self.moments_.update(rows)
        self._fit_moments(rows.dtype)
        return self

    def calibrate(self, X: Any, contamination: Any = 0.01) -> SubspaceDetector:
        """Set the threshold so that the share `contamination` in (0, 0.5] of held-out normal rows exceeds it."""
        check_is_fitted(self, "subspace_")
        check_value("contamination", contamination, Contamination)
        self._set_offset(self._scores(self._beside(X)), contamination)
        return self

    def _set_offset(self, scores: Tensor, contamination: Any) -> None:
        self.offset_ = float(np.percentile(-scores.cpu().numpy(), 100.0 * contamination))

    def anomaly_score(self, X: Any) -> Any:
        """Score of each row (n,), higher = more anomalous."""
        check_is_fitted(self, "subspace_")
        return like(self._scores(self._beside(X)), X)

    def score_samples(self, X: Any) -> Any:
        """Minus the anomaly score (n,): higher = more normal."""
        return -self.anomaly_score(X)

    def decision_function(self, X: Any) -> Any:
        """`score_samples` minus the threshold (n,): negative = outlier."""
        check_is_fitted(self, "subspace_")
        if not hasattr(self, "offset_"):
            raise ValueError("distance: 'cosine' has no limit known beforehand; call calibrate on held-out normal rows")
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> Any:
        """1 for inliers, -1 for outliers (n,)."""
        decision = self.decision_function(X)
        if isinstance(decision, Tensor):
            return torch.where(decision >= 0, 1, -1)
        return np.where(decision >= 0, 1, -1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the subspace and the parameters to one safetensors file."""
        check_is_fitted(self, "subspace_")
        save_detector(path, "SubspaceDetector", self, self._facts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SubspaceDetector:
        """Read what `save` wrote. Raises ValueError for a damaged file or another kind of one."""
        schema = {**DETECTOR_FACTS, "count": float}
        with saved_object(path, "SubspaceDetector", DETECTOR_ARRAYS, schema) as (arrays, facts):
            return cls._from_facts(arrays, facts, facts["count"])

    def _facts(self) -> dict[str, Any]:
        parameters = self.get_params()
        # A rule that is an object is kept as the rank that it gave.
        if not isinstance(self.rank, int | float | str):
            parameters["rank"] = self.subspace_.dim
        return {"parameters": parameters, "offset": getattr(self, "offset_", None)}

    @classmethod
    def _from_facts(
        cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any], count: float | None
    ) -> SubspaceDetector:
        detector = cls(**facts["parameters"])
        detector._check_parameters()
        own = {name: array for name, array in arrays.items() if name in SAVED_ARRAYS}
        detector.subspace_ = Subspace.from_arrays(own, count)
        detector.scale_, detector.null_ = arrays.get("scale"), arrays.get("null")
        if (detector.distance == "combined") != (detector.scale_ is not None and detector.null_ is not None):
            raise ValueError("scale, null: of the distance 'combined', and only of it")
        detector.n_features_in_ = detector.subspace_.ambient_dim
        if facts["offset"] is not None:
            detector.offset_ = facts["offset"]
        return detector

    def _beside(self, X: Any) -> Tensor:
        """Rows to score, on the device of the subspace."""
        return at_least_single(self._rows(X)).to(self.subspace_.basis.device)

    def _streamed(self, source: Any) -> tuple[Moments, torch.dtype]:
        """Moments of a stream and the dtype to score its rows in: theirs, at least float32."""
        if is_dask(source):
            return fit_moments(source), torch.float32 if source.dtype in (np.float16, np.float32) else torch.float64
        widest = torch.float32

        def watched() -> Iterator[Tensor]:
            nonlocal widest
            for batch in batches(source, self.batch_size):
                widest = torch.promote_types(widest, batch.dtype)
                yield batch

        return fit_moments(watched()), widest

    def _set_subspace(self, subspace: Subspace, n: int | float) -> None:
        rule, available = rank_rule(self.rank), min(int(n) - 1, subspace.ambient_dim)
        if self.strict and isinstance(rule, FixedRank) and rule.k > available:
            raise ValueError(f"rank: {rule.k} directions asked for, {int(n)} rows span at most {available}")
        self.subspace_ = subspace
        if self.drop_k >= subspace.dim:
            warnings.warn(f"drop_k={self.drop_k} leaves none of the {subspace.dim} directions", stacklevel=3)
        elif self.distance in ("residual", "cosine") and not self.drop_k and _spans_everything(subspace):
            warnings.warn(
                f"the {subspace.dim} directions span all that the training rows vary in, so their residual is zero; "
                "choose a lower rank",
                stacklevel=3,
            )
        level = float(norm.sf(FENCE)) if self.contamination == "fence" else self.contamination or 0.01
        self.null_ = None
        self.__dict__.pop("offset_", None)
        if self.distance == "combined":
            self.null_, correlation = gaussian_null(subspace, self.drop_k)
            self.offset_ = -combined_limit(correlation, level)
        elif self.distance != "cosine":
            weights = _gaussian_weights(subspace, self.distance, self.drop_k, self.epsilon)
            self.offset_ = -chi_square_limit(weights, level)

    def _scores(self, rows: Tensor) -> Tensor:
        return self._scored(self._distances(rows), rows.dtype)

    def _distances(self, rows: Tensor) -> Tensor:
        """Squared distances of rows (n,); for "combined" the roots of its two (n, 2)."""
        # "combined" holds a few copies in double precision.
        size = 32 if self.distance == "combined" else rows.element_size()
        step = max(256, _CHUNK_BYTES // (size * rows.shape[1]))
        options = {"drop_k": self.drop_k, "epsilon": self.epsilon}
        if self.distance != "combined":
            found = [subspace_score(self.subspace_, part, self.distance, **options) for part in rows.split(step)]
        else:
            assert self.scale_ is not None
            # In double precision: beside a row that is far out, the squares of all others underflow float32.
            parts = (part.double() / self.scale_ for part in rows.split(step))
            found = [distance_roots(self.subspace_, part, self.drop_k) for part in parts]
        return torch.cat(found)

    def _scored(self, distances: Tensor, dtype: torch.dtype) -> Tensor:
        return distances if self.null_ is None else combined_score(distances, self.null_).to(dtype)


def _spans_everything(subspace: Subspace) -> bool:
    residual = subspace.residual_variance
    assert residual is not None
    assert subspace.spectrum is not None
    return float(residual) * (subspace.ambient_dim - subspace.dim) <= 1e-12 * float(subspace.spectrum.sum())


def _gaussian_weights(subspace: Subspace, distance: str, drop_k: int, epsilon: int | float) -> np.ndarray:
    """Weights of the chi-squares that sum up to the score of a Gaussian row; none is known for "cosine"."""
    assert subspace.spectrum is not None
    assert subspace.variances is not None
    inside = subspace.variances.double().cpu().numpy()
    spectrum = subspace.spectrum.double().cpu().numpy()
    if distance == "residual":
        return np.concatenate([inside[:drop_k], spectrum[subspace.dim :]])
    if distance == "euclidean":
        return inside[drop_k:]
    return inside[drop_k:] / (inside[drop_k:] + epsilon * spectrum.sum() / subspace.ambient_dim)


def save_detector(path: str | os.PathLike[str], kind: str, detector: SubspaceDetector, facts: dict[str, Any]) -> None:
    """Write the subspace of a detector, its scale and null, and facts beside them."""
    arrays = detector.subspace_.arrays()
    if detector.scale_ is not None and detector.null_ is not None:
        arrays |= {"scale": detector.scale_, "null": detector.null_}
    save_arrays(path, kind, arrays, count=detector.subspace_.count, **facts)


DETECTOR_ARRAYS: Schema = {
    **SAVED_ARRAYS,
    "scale": optional(Float[Tensor, " d"]),
    "null": optional(Float[Tensor, "2 2"]),
}
DETECTOR_FACTS: Schema = {
    "parameters": {
        "rank": int | float | str,
        "distance": str,
        "drop_k": int,
        "epsilon": float,
        "contamination": float | str | None,
        "strict": bool,
        "batch_size": int,
    },
    "offset": float | None,
}
