"""Anomalies by what a principal subspace of normal data leaves over (SubspaceAD, Lendering et al., CVPR 2026).

mean μ, eigenvectors C and eigenvalues λ of the covariance of normal rows; rank r by explained variance;
score S(x) = |x - μ|² - |Cᵣᵀ(x - μ)|². That is the score of the patches of images. For rows whose normality nobody
vouches for it is not enough: one that is far out bends the subspace towards itself (see `combined`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from scipy.stats import norm
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from subspan.base import as_tensor, check_matrix, like, normalize_rows, save_arrays, saved_object
from subspan.base.estimators import validate_data
from subspan.base.saved import Schema, optional
from subspan.geometry import FixedRank, Subspace, rank_rule
from subspan.geometry.subspace import SAVED_ARRAYS
from subspan.models import FeatureGrid, ImagePreprocessing, image_tensor
from subspan.models.layers import Layers
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
from .foreground import foreground_mask, specular_confidence, suppress_specular
from .maps import aggregate, smooth, stitch, upsample, window_boxes
from .rotations import RandomRotations

DISTANCES = ("combined", "residual", "mahalanobis", "euclidean", "cosine")
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

    "residual": squared distance to the subspace; "mahalanobis": sum z_i² / (λ_i + epsilon) inside it; "euclidean":
    sum z_i²; "cosine": 1 - cos(x, its projection). epsilon is relative to the mean variance of a column, where the
    subspace knows it. The first `drop_k` directions do not count as normal: "residual" and "cosine" leave them out of
    the subspace, the other two out of the sum.
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


class SubspaceDetector(OutlierMixin, BaseEstimator):
    """Outlier detector for rows: how far they lie from the principal subspace of normal rows, and out along it.

    rank: explained variance in (0, 1], int, rule name or rule. distance: "combined" = the larger of two distances of
    standardised columns (see `subspan.detect.combined`), as standard deviations beyond what is usual among the training
    rows; neither units nor a few strange rows among them decide. "residual" (SubspaceAD's), "mahalanobis", "euclidean",
    "cosine": as in `subspace_score` with drop_k and epsilon, on columns as they are: scale them before where their
    units differ, and fit to rows that are known to be normal.
    contamination: share of the training rows (0, 0.5] that `predict` calls outliers, None for 0.01; "fence" calls so
    what lies three interquartile ranges above the upper quartile (of the cube roots, but for "combined"), which of
    Gaussian rows are a few in a million. It is counted in a second look at the rows; after `partial_fit` or a one-shot
    iterator, what is usual is that of a Gaussian with the same spectrum (Box, 1954). `calibrate` sets the threshold
    from held-out normal rows instead.
    strict: an int rank above min(n - 1, d) is an error, not a warning.

    `fit` takes an array or tensor (n, d), or a stream that `subspan.statistics.batches` reads: in O(d²) memory and one
    pass, with one more for the threshold where the stream can be read again.
    Fit costs O(n d² + d³), scoring O(d r) a row, what is saved d (r + 2) numbers.
    Attributes: subspace_ (Subspace; of rows divided by scale_), scale_ (d,) or None, null_ (2, 2) or None (see
    `combined`), offset_ (threshold on `score_samples`), n_features_in_, moments_ (for `partial_fit`).
    """

    def __init__(
        self,
        rank: Any = 0.99,
        *,
        distance: Any = "combined",
        drop_k: Any = 0,
        epsilon: Any = 1e-6,
        contamination: Any = None,
        strict: Any = False,
        batch_size: Any = 8192,
    ):
        self.rank = rank
        self.distance = distance
        self.drop_k = drop_k
        self.epsilon = epsilon
        self.contamination = contamination
        self.strict = strict
        self.batch_size = batch_size

    def fit(self, X: Any, y: Any = None) -> SubspaceDetector:
        """Fit to normal rows (n, d), an array or a stream of batches; y is ignored."""
        self._check_parameters()
        self.__dict__.pop("moments_", None)
        if is_stream(X) and not hasattr(X, "toarray"):
            self.moments_, dtype = self._streamed(X)
            self.n_features_in_ = self.moments_.d
            self._fit_moments(dtype)
            if not is_one_shot(X):
                self._look_again(batches(X, self.batch_size))
            return self
        rows = self._rows(X, reset=True, minimum=2)
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
        rows = self._rows(X, reset=first, minimum=2 if first else 1)
        if first:
            self.moments_ = Moments(rows.shape[1], device=rows.device)
        self.moments_.update(rows)
        self._fit_moments(rows.dtype)
        return self

    def calibrate(self, X: Any, contamination: Any = 0.01) -> SubspaceDetector:
        """Set the threshold so that the share `contamination` in (0, 0.5] of held-out normal rows exceeds it."""
        check_is_fitted(self, "subspace_")
        _check_contamination(contamination)
        self._set_offset(self._scores(self._rows(X, reset=False)), contamination)
        return self

    def _set_offset(self, scores: Tensor, contamination: Any) -> None:
        self.offset_ = float(np.percentile(-scores.cpu().numpy(), 100.0 * contamination))

    def anomaly_score(self, X: Any) -> Any:
        """Score of each row (n,), higher = more anomalous."""
        check_is_fitted(self, "subspace_")
        return like(self._scores(self._rows(X, reset=False)), X)

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
        _save(path, "SubspaceDetector", self, self._facts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SubspaceDetector:
        """Read what `save` wrote. Raises ValueError for a damaged file or another kind of one."""
        with saved_object(path, "SubspaceDetector", _ARRAYS, {**_DETECTOR, "count": float}) as (arrays, facts):
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

    def _check_parameters(self) -> None:
        rank_rule(self.rank)
        if self.distance not in DISTANCES:
            raise ValueError(f"distance: {', '.join(map(repr, DISTANCES))} are known, got {self.distance!r}")
        if not isinstance(self.drop_k, int | np.integer) or self.drop_k < 0:
            raise ValueError(f"drop_k: a number of directions, 0 or more, got {self.drop_k!r}")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon: 0 or more, got {self.epsilon}")
        if self.contamination is not None and self.contamination != "fence":
            _check_contamination(self.contamination)

    def _rows(self, X: Any, *, reset: bool, minimum: int = 1) -> Tensor:
        """X as a finite floating matrix, in the subspace's width and on its device."""
        if isinstance(X, Tensor):
            rows = check_matrix(X, "X", columns=None if reset else self.n_features_in_, min_rows=minimum)
            if reset:
                self.n_features_in_ = rows.shape[1]
        else:
            array = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=minimum)
            rows = as_tensor(array, "X")
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
        return rows if reset else rows.to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.subspace_.basis.device

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


def _check_contamination(value: Any) -> None:
    if not isinstance(value, int | float | np.number) or not 0 < value <= 0.5:
        raise ValueError(f"contamination: a share in (0, 0.5], got {value!r}")


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


def _save(path: str | os.PathLike[str], kind: str, detector: SubspaceDetector, facts: dict[str, Any]) -> None:
    arrays = detector.subspace_.arrays()
    if detector.scale_ is not None and detector.null_ is not None:
        arrays |= {"scale": detector.scale_, "null": detector.null_}
    save_arrays(path, kind, arrays, count=detector.subspace_.count, **facts)


_ARRAYS: Schema = {**SAVED_ARRAYS, "scale": optional(Float[Tensor, " d"]), "null": optional(Float[Tensor, "2 2"])}
_DETECTOR: Schema = {
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
_IMAGE_DETECTOR: Schema = {
    "count": float,
    "detector": _DETECTOR,
    "views": int,
    "threshold": float | None,
    "own_mask": bool,
    "parameters": {
        "layers": str | int | list[str | int] | None,
        "aggregate": str,
        "normalize": bool,
        "image_size": int | list[int],
        "preprocessing": ImagePreprocessing | None,
        "augment": RandomRotations | None,
        "mask": str | None,
        "mask_normals": bool,
        "blur": float | str,
        "image_score": str,
        "tail": float,
        "over": str,
        "window": int | list[int] | None,
        "overlap": float,
        "specular": bool,
        "batch_size": int,
        "random_state": int | None,
        "progress": bool,
    },
}


@dataclass(frozen=True)
class AnomalyResult:
    """What `SubspaceAD.predict` returns.

    scores (n,): one an image, higher = more anomalous. maps: (n, h, w) float32 pixel scores, or a list of (h, w) where
    images are scored at their own sizes. labels (n,): 1 normal, -1 anomalous; None before `calibrate`.
    """

    scores: Float[np.ndarray, " n"]
    maps: Float[np.ndarray, "n h w"] | list[np.ndarray]
    labels: np.ndarray | None = None


class SubspaceAD(BaseEstimator):
    """Few-shot anomaly detection and localisation in images by the residual of patch features, without training.

    backbone: a vision network (with `layers`, `aggregate`, `image_size` or `preprocessing` as in `FeatureGrid`), a
    `FeatureGrid`, or any function of a batch (b, 3, s, s) in [0, 1] that returns features (b, h, w, d). Take middle
    layers: for convolutional networks the stages of stride 8 and 16.
    normalize: scale each patch's features to unit length; not in the paper, whose features end in a LayerNorm's scale,
    but convolutional ones vary with contrast.
    augment: views of each normal image added to the fit; None where the orientation of the part is what can be wrong.
    rank, distance, drop_k: as in `SubspaceDetector`. mask: None, "normality", "attention", or a function
    (images, features) → foreground (b, h, w); background scores 0 and, with mask_normals, is left out of the fit.
    blur: standard deviation of the smoothing in pixels of the map, or "official" (the authors' 3 × 3 kernel).
    image_score: "tail" = mean of the largest `tail` share of the scores, or "max", "mean", "p99", "top5"; over: "map"
    (authors' code) or "patches" (paper). window: side of sliding windows in pixels of the image, for images much
    larger than the network's input; overlap: share of a window that its neighbour covers too; maps then have the
    image's size, else the input's. specular: damp scores on highlights. random_state: of the augmentation.

    Images: an iterable (list, generator, Dataset, DataLoader, array (n, h, w, 3), tensor (n, 3, h, w)) of whatever
    `subspan.models.image_tensor` takes; of tuples the first entry.
    Attributes: detector_ (SubspaceDetector), subspace_, threshold_ (after `calibrate`), n_views_ (images fitted on).
    """

    def __init__(
        self,
        backbone: nn.Module | FeatureGrid | Callable[[Tensor], Tensor],
        layers: Layers | None = None,
        *,
        aggregate: Any = "mean",
        normalize: Any = False,
        image_size: Any = 224,
        preprocessing: ImagePreprocessing | None = None,
        augment: RandomRotations | None = RandomRotations(30),  # noqa: B008 - frozen
        rank: Any = 0.99,
        distance: Any = "residual",
        drop_k: Any = 0,
        mask: Any = None,
        mask_normals: Any = True,
        blur: Any = 4.0,
        image_score: Any = "tail",
        tail: Any = 0.01,
        over: Any = "map",
        window: Any = None,
        overlap: Any = 0.0,
        specular: Any = False,
        batch_size: Any = 16,
        random_state: Any = 0,
        progress: Any = False,
    ):
        self.backbone = backbone
        self.layers = layers
        self.aggregate = aggregate
        self.normalize = normalize
        self.image_size = image_size
        self.preprocessing = preprocessing
        self.augment = augment
        self.rank = rank
        self.distance = distance
        self.drop_k = drop_k
        self.mask = mask
        self.mask_normals = mask_normals
        self.blur = blur
        self.image_score = image_score
        self.tail = tail
        self.over = over
        self.window = window
        self.overlap = overlap
        self.specular = specular
        self.batch_size = batch_size
        self.random_state = random_state
        self.progress = progress

    def fit(self, images: Any, y: Any = None) -> SubspaceAD:
        """Fit to normal images and their augmented views, one pass over their patches; y is ignored."""
        return self._fit(images, self.augment)

    def fit_batch_zero_shot(self, images: Any) -> SubspaceAD:
        """Fit to the unlabelled test images themselves, without augmentation: most of their patches are normal."""
        return self._fit(images, None)

    def _fit(self, images: Any, augment: RandomRotations | None) -> SubspaceAD:
        features, mask = self._prepare()
        if self._preprocessing.resize == "crop":
            warnings.warn(
                "preprocessing: resize='crop' cuts the border of an image away, where a defect would not be seen; "
                "'squash' looks at the whole",
                stacklevel=3,
            )
        self.n_views_ = 0
        return self._fit_rows(
            self._normal_patches(self._views(images, augment), features, mask if self.mask_normals else None)
        )

    def fit_features(self, features: Iterable[Float[Tensor, "b h w d"]]) -> SubspaceAD:
        """Fit to batches of patch features that were taken from normal images (and views of them) before."""
        self.n_views_ = 0

        def rows() -> Iterator[Tensor]:
            for grid in features:
                self.n_views_ += len(grid)
                yield self._scaled(grid).flatten(0, 2)

        return self._fit_rows(rows())

    def _fit_rows(self, rows: Iterator[Tensor]) -> SubspaceAD:
        first = next(rows, None)
        if first is None:
            raise ValueError("images: at least one normal image is needed, got none")
        self.__dict__.pop("threshold_", None)
        detector = SubspaceDetector(self.rank, distance=self.distance, drop_k=self.drop_k)
        self.detector_ = detector.fit(chain([first], rows))
        return self

    @property
    def subspace_(self) -> Subspace:
        """The subspace of normal patches."""
        check_is_fitted(self, "detector_")
        return self.detector_.subspace_

    def calibrate(self, images: Any, contamination: Any = 0.01) -> SubspaceAD:
        """Set threshold_ so that the share `contamination` in (0, 0.5] of held-out normal images exceeds it."""
        _check_contamination(contamination)
        self.threshold_ = float(np.quantile(self.predict(images).scores, 1 - contamination))
        return self

    def predict(self, images: Any) -> AnomalyResult:
        """Scores and pixel maps of images. Raises ValueError for none."""
        check_is_fitted(self, "detector_")
        features, mask = self._prepare()
        batches_of_images = _chunks(self._shown(_each(images)), self.batch_size)
        return self._result(chain.from_iterable(self._scored(batch, features, mask) for batch in batches_of_images))

    def predict_features(self, features: Iterable[Float[Tensor, "b h w d"]], size: tuple[int, int]) -> AnomalyResult:
        """The same for batches of patch features that were taken before; maps of `size` (height, width)."""
        check_is_fitted(self, "detector_")
        grids = (self.score_patches(grid).float() for grid in features)
        return self._result(self._read_out([patches], upsample(patches[None], size)[0]) for g in grids for patches in g)

    def _result(self, scored: Iterable[tuple[float, Tensor]]) -> AnomalyResult:
        scores, maps = [], []
        for score, anomaly_map in scored:
            scores.append(score)
            maps.append(anomaly_map.cpu().numpy())
        if not scores:
            raise ValueError("images: at least one image is needed, got none")
        values = np.asarray(scores, dtype=np.float64)
        alike = len({one.shape for one in maps}) == 1
        labels = np.where(values > self.threshold_, -1, 1) if hasattr(self, "threshold_") else None
        return AnomalyResult(values, np.stack(maps) if alike else maps, labels)

    def score_patches(self, features: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w"]:
        """Anomaly scores of patch features that were taken from images before."""
        check_is_fitted(self, "detector_")
        return self.detector_.anomaly_score(self._scaled(features).flatten(0, 2)).reshape(features.shape[:3])

    def _scaled(self, features: Tensor) -> Tensor:
        return normalize_rows(features) if self.normalize else features

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the subspace and the settings to one safetensors file; the network is not stored."""
        check_is_fitted(self, "detector_")
        parameters = self.get_params(deep=False)
        for name in ("backbone", "rank", "distance", "drop_k"):
            del parameters[name]
        for name in ("augment", "preprocessing"):
            parameters[name] = None if parameters[name] is None else asdict(parameters[name])
        if callable(self.mask):
            parameters["mask"] = None
        facts = {"parameters": parameters, "detector": self.detector_._facts(), "views": self.n_views_}
        facts |= {"threshold": getattr(self, "threshold_", None), "own_mask": callable(self.mask)}
        _save(path, "SubspaceAD", self.detector_, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], backbone: Any, *, mask: Any = None) -> SubspaceAD:
        """Read what `save` wrote, for the same backbone (and the same `mask` where that was a function)."""
        with saved_object(path, "SubspaceAD", _ARRAYS, _IMAGE_DETECTOR) as (arrays, facts):
            parameters = facts["parameters"]
            if parameters["augment"] is not None:
                parameters["augment"] = RandomRotations(**_tuples(parameters["augment"]))
            if parameters["preprocessing"] is not None:
                parameters["preprocessing"] = ImagePreprocessing(**_tuples(parameters["preprocessing"]))
            detector = SubspaceDetector._from_facts(arrays, facts["detector"], facts["count"])
            shared = {name: getattr(detector, name) for name in ("rank", "distance", "drop_k")}
            model = cls(backbone, **parameters, **shared)
            model._check_parameters()
            model.detector_, model.n_views_ = detector, facts["views"]
            if facts["threshold"] is not None:
                model.threshold_ = facts["threshold"]
        if facts["own_mask"]:
            if mask is None:
                raise ValueError("mask: the saved model used a function as mask; give it here")
            model.mask = mask
        return model

    def _check_parameters(self) -> None:
        """Refuse settings that make no sense."""
        if self.over not in ("map", "patches"):
            raise ValueError(f"over: 'map' or 'patches', got {self.over!r}")
        if self.blur != "official" and (isinstance(self.blur, str) or not self.blur >= 0):
            raise ValueError(f"blur: pixels, 0 or more, or 'official', got {self.blur!r}")
        if not 0 < self.tail <= 1:
            raise ValueError(f"tail: a fraction in (0, 1], got {self.tail}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: at least 1, got {self.batch_size}")

    def _prepare(self) -> tuple[Callable[[list[Tensor]], Tensor], Any]:
        """How features are taken, and the mask; settings are checked here."""
        self._check_parameters()
        grid, preprocessing = self.backbone, self._preprocessing
        if isinstance(grid, nn.Module):
            if self.layers is None:
                raise ValueError("layers: needed beside a network; name its middle layers")
            grid = FeatureGrid(grid, self.layers, aggregate=self.aggregate, preprocessing=preprocessing)
        if isinstance(grid, FeatureGrid):
            return grid, foreground_mask(self.mask, grid)
        if not callable(grid):
            raise TypeError(f"backbone: a network, a FeatureGrid or a function is needed, got {type(grid).__name__}")
        return (lambda images: grid(preprocessing.batch(images))), foreground_mask(self.mask, grid)

    @property
    def _preprocessing(self) -> ImagePreprocessing:
        """How images are prepared: whole, unless cropping was asked for by name."""
        if isinstance(self.backbone, FeatureGrid):
            return self.backbone.preprocessing
        if self.preprocessing is not None:
            return self.preprocessing.whole()
        plain = ImagePreprocessing(self.image_size, resize="squash")
        return plain if isinstance(self.backbone, nn.Module) else replace(plain, mean=0.0, std=1.0)

    def _views(self, images: Any, augment: RandomRotations | None) -> Iterator[Tensor]:
        generator = torch.Generator()
        if self.random_state is None:
            generator.seed()
        else:
            generator.manual_seed(self.random_state)
        for image in self._shown(_each(images)):
            tensor = image_tensor(image)
            self.n_views_ += 1
            yield tensor
            for view in augment.views(tensor, generator) if augment is not None else ():
                self.n_views_ += 1
                yield view

    def _shown(self, images: Any) -> Iterable[Any]:
        console = Console(stderr=True)
        if not self.progress or not console.is_terminal:
            return images
        return track(images, "images", console=console, transient=True)

    def _windows(self, images: list[Tensor]) -> tuple[list[Tensor], list[list[tuple[int, int, int, int]]]]:
        """The pieces that the network sees, and the boxes of each image; the whole image where there is no window."""
        if self.window is None:
            return images, [[(0, 0, image.shape[-2], image.shape[-1])] for image in images]
        boxes = [window_boxes(image.shape[-2], image.shape[-1], self.window, self.overlap) for image in images]
        pieces = [image[:, t:b, l:r] for image, each in zip(images, boxes) for t, l, b, r in each]
        return pieces, boxes

    def _features(self, pieces: list[Tensor], features: Callable[[list[Tensor]], Tensor]) -> Tensor:
        grid = features(pieces)
        if not isinstance(grid, Tensor) or grid.ndim != 4 or len(grid) != len(pieces):
            shape = tuple(grid.shape) if isinstance(grid, Tensor) else type(grid).__name__
            raise ValueError(f"backbone: features ({len(pieces)}, h, w, d) are needed, got {shape}")
        if grid.numel() == 0:
            raise ValueError("images: smaller than one patch of the network")
        return grid

    def _normal_patches(
        self, views: Iterator[Tensor], features: Callable[[list[Tensor]], Tensor], mask: Any
    ) -> Iterator[Tensor]:
        for batch in _chunks(views, self.batch_size):
            pieces, _ = self._windows(batch)
            for part in _chunks(pieces, self.batch_size):
                grid = self._features(part, features)
                if mask is None:
                    yield self._scaled(grid).flatten(0, 2)
                    continue
                foreground = mask(part, grid)
                empty = ~foreground.flatten(1).any(1)
                if bool(empty.any()):
                    warnings.warn(
                        f"mask: {int(empty.sum())} images have no foreground; all their patches are used",
                        stacklevel=2,
                    )
                yield self._scaled(grid[foreground | empty[:, None, None]])

    def _scored(
        self, batch: list[Any], features: Callable[[list[Tensor]], Tensor], mask: Any
    ) -> Iterator[tuple[float, Tensor]]:
        """Score and map of each image of a batch."""
        images = [image_tensor(image) for image in batch]
        pieces, boxes = self._windows(images)
        patches: list[Tensor] = []
        for part in _chunks(pieces, self.batch_size):
            grid = self._features(part, features)
            scores = self.score_patches(grid).float()
            patches.extend(scores if mask is None else scores * mask(part, grid))
        for image, own in zip(images, boxes):
            mine, patches = patches[: len(own)], patches[len(own) :]
            if self.window is None:
                whole = upsample(mine[0][None], self._input_size(image))[0]
            else:
                parts = [upsample(one[None], (b - t, r - l))[0] for one, (t, l, b, r) in zip(mine, own)]
                whole = stitch(parts, own, (image.shape[-2], image.shape[-1]))
            yield self._read_out(mine, whole, image)

    def _read_out(self, patches: list[Tensor], whole: Tensor, image: Tensor | None = None) -> tuple[float, Tensor]:
        """An image's score and its finished map, from its patch scores and their raw map."""
        anomaly_map = smooth(whole[None], self.blur)[0]
        if self.specular and image is not None:
            size = (anomaly_map.shape[-2], anomaly_map.shape[-1])
            confidence = upsample(specular_confidence(image)[None], size)[0]
            anomaly_map = suppress_specular(anomaly_map, confidence.to(anomaly_map.device))
        values = anomaly_map if self.over == "map" else torch.cat([one.flatten() for one in patches])
        return float(aggregate(values.flatten(), self.image_score, tail=self.tail)), anomaly_map

    def _input_size(self, image: Tensor) -> tuple[int, int]:
        preprocessing = self._preprocessing
        return (image.shape[-2], image.shape[-1]) if preprocessing.resize == "none" else preprocessing.height_width


def _each(images: Any) -> Iterator[Any]:
    """Single images of an iterable of images, of (image, label) pairs or of batches of either."""
    if not isinstance(images, Iterable) and hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        images = map(images.__getitem__, range(len(images)))
    if isinstance(images, str | bytes | os.PathLike | Mapping) or not isinstance(images, Iterable):
        raise TypeError(f"images: an iterable of images is needed, got {type(images).__name__}")
    if isinstance(images, Tensor | np.ndarray) and images.ndim != 4:
        raise ValueError(f"images: an array of images has 4 dimensions, got shape {tuple(images.shape)}; give a list")
    for entry in images:
        image = entry[0] if isinstance(entry, tuple | list) and len(entry) else entry
        if isinstance(image, Tensor | np.ndarray) and image.ndim == 4:
            yield from image
        else:
            yield image


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(items)
    while chunk := list(islice(stream, size)):
        yield chunk


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
