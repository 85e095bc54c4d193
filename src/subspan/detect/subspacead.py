"""Anomalies in images by what a principal subspace of normal patches leaves over (SubspaceAD, Lendering et al.,
CVPR 2026)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, replace
from itertools import chain, islice
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from subspan.base import normalize_rows, saved_object
from subspan.base.estimators import Estimator
from subspan.base.parameters import Bounds, Count, NonNegative, Whole, check_value
from subspan.base.saved import Schema
from subspan.geometry import Subspace
from subspan.geometry.rank import Rank
from subspan.models import FeatureGrid, ImagePreprocessing, image_tensor
from subspan.models.features import Aggregate
from subspan.models.layers import Layers

from .detector import (
    DETECTOR_ARRAYS,
    DETECTOR_FACTS,
    Contamination,
    Distance,
    SubspaceDetector,
    save_detector,
)
from .foreground import foreground_mask, specular_confidence, suppress_specular
from .maps import aggregate, smooth, stitch, upsample, window_boxes
from .rotations import RandomRotations

_IMAGE_DETECTOR: Schema = {
    "count": float,
    "detector": DETECTOR_FACTS,
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

    Attributes
    ----------
    scores
        One an image (n,), higher = more anomalous.
    maps
        Pixel scores (n, h, w), float32, or a list of (h, w) where images are scored at their own sizes.
    labels
        1 normal, -1 anomalous (n,); None before `calibrate`.
    """

    scores: Float[np.ndarray, " n"]
    maps: Float[np.ndarray, "n h w"] | list[np.ndarray]
    labels: np.ndarray | None = None


@dataclass(eq=False, repr=False)
class SubspaceAD(Estimator):
    """Few-shot anomaly detection and localisation in images by the residual of patch features, without training.

    Images are an iterable (list, generator, Dataset, DataLoader, array (n, h, w, 3), tensor (n, 3, h, w)) of whatever
    `subspan.models.image_tensor` takes; of tuples the first entry.

    Parameters
    ----------
    backbone
        A vision network, a `FeatureGrid`, or any function of a batch (b, 3, s, s) in [0, 1] that returns features
        (b, h, w, d).
    layers
        Of a network: take middle ones; for convolutional networks the stages of stride 8 and 16.
    aggregate, image_size, preprocessing
        As in `FeatureGrid`.
    normalize
        Scale each patch's features to unit length; not in the paper, whose features end in a LayerNorm's scale, but
        convolutional ones vary with contrast.
    augment
        Views of each normal image added to the fit; None where the orientation of the part is what can be wrong.
    rank, distance, drop_k
        As in `SubspaceDetector`.
    mask
        None, "normality", "attention", or a function (images, features) → foreground (b, h, w); background scores 0.
    mask_normals
        Whether the background is left out of the fit too.
    blur
        Standard deviation of the smoothing in pixels of the map, or "official" (the authors' 3 × 3 kernel).
    image_score
        "tail" = mean of the largest `tail` share of the scores, or "max", "mean", "p99", "top5".
    tail
        See `image_score`.
    over
        What the image's score is taken over: "map" (authors' code) or "patches" (paper).
    window
        Side of sliding windows in pixels of the image, for images much larger than the network's input; maps then have
        the image's size, else the input's.
    overlap
        Share of a window that its neighbour covers too, in [0, 1).
    specular
        Damp scores on highlights.
    batch_size
        Images a forward pass.
    random_state
        Seed of the augmentation.
    progress
        Whether a bar is shown.

    Attributes
    ----------
    detector_, subspace_
        The `SubspaceDetector` of the patches and its subspace.
    threshold_
        On the images' scores, after `calibrate`.
    n_views_
        Images fitted on, views included.

    References
    ----------
    Lendering et al., SubspaceAD, CVPR 2026.

    Examples
    --------
    >>> import torch
    >>> from subspan.detect import SubspaceAD
    >>> def patches(batch):  # of 4 × 4 pixels, each a row of 48 numbers
    ...     return torch.nn.functional.pixel_unshuffle(batch, 4).movedim(1, -1)
    >>> images = torch.sin(torch.arange(32.0)).add(1).div(2).expand(4, 3, 32, 32).clone()
    >>> images[3, :, 8:12, 16:20] = 1.0  # a defect in the last one
    >>> model = SubspaceAD(patches, image_size=32, augment=None, blur=0).fit(images[:3])
    >>> int(model.predict(images).scores.argmax())
    3
    """

    backbone: nn.Module | FeatureGrid | Callable[[Tensor], Tensor]
    layers: Layers | None = None
    _: KW_ONLY
    aggregate: Aggregate = "mean"
    normalize: bool = False
    image_size: Count | tuple[int, int] = 224
    preprocessing: ImagePreprocessing | None = None
    augment: RandomRotations | None = RandomRotations(30)  # noqa: RUF009 - frozen
    rank: Rank = 0.99
    distance: Distance = "residual"
    drop_k: Whole = 0
    mask: str | Callable[..., Any] | None = None
    mask_normals: bool = True
    blur: NonNegative | Literal["official"] = 4.0
    image_score: str = "tail"
    tail: Annotated[float, Bounds(above=0, most=1)] = 0.01
    over: Literal["map", "patches"] = "map"
    window: Count | None = None
    overlap: Annotated[float, Bounds(least=0, below=1)] = 0.0
    specular: bool = False
    batch_size: Count = 16
    random_state: int | None = 0
    progress: bool = False

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
        check_value("contamination", contamination, Contamination)
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
        save_detector(path, "SubspaceAD", self.detector_, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], backbone: Any, *, mask: Any = None) -> SubspaceAD:
        """Read what `save` wrote, for the same backbone (and the same `mask` where that was a function)."""
        with saved_object(path, "SubspaceAD", DETECTOR_ARRAYS, _IMAGE_DETECTOR) as (arrays, facts):
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
