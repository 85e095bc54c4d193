"""Spectrum-aware test-time steering: a zero-shot classifier adapted to each image in its prototypes' SVD coordinates.

Every adaptation here is algebra on C prototypes: the encoders are black boxes, gradients are closed forms, and a batch
of images is adapted in one call, each image on its own. Source: Dafnis & Metaxas (2025), arXiv 2511.09809, on the
protocol of Sui et al. (2024), arXiv 2403.12952.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.geometry import GavishDonoho, RankRule, Subspace, rank_rule
from subspan.models import ImageEncoder, ImagePreprocessing, SentenceEncoder, image_tensor
from subspan.models.views import random_views

from .prototypes import ENSEMBLE_TEMPLATES, PrototypeShift, check_texts, zero_shot_prototypes


class SpectralSteering(PrototypeShift):
    """Spectrum-aware test-time steering: one entropy step on k coefficients shared by all classes.

    The prototypes move by basis @ coefficients, the basis being their leading right singular vectors, and are
    normalised again. AdamW's first step is learning_rate in each coordinate, up to sign: it depends on the basis, and
    not on reg or weight_decay.

    Parameters
    ----------
    prototypes, logit_scale, steps, learning_rate, optimizer, weight_decay, reg, penalty, keep, per_class, online
        As in `PrototypeShift`.
    rank
        Directions of the basis; Gavish–Donoho by default.
    center
        Subtract the prototypes' mean before the SVD.
    subspace
        Use this one instead.
    side
        "text" moves the prototypes; "image" shifts the views instead, inside a `subspace` of image embeddings.
    predict
        As in `ConfidentAverage`.

    Raises
    ------
    ValueError
        For another side, side="image" without a subspace or per class, and a subspace of another space.

    References
    ----------
    Dafnis & Metaxas (2025), arXiv 2511.09809.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import SpectralSteering
    >>> random = torch.Generator().manual_seed(0)
    >>> model = SpectralSteering(torch.randn(6, 16, generator=random), 10.0, rank=3, keep=0.5)
    >>> report = model.explain(torch.randn(8, 16, generator=random))
    >>> tuple(report.coefficients.shape), bool(report.entropy_after < report.entropy_before)
    ((1, 3), True)
    """

    basis: Tensor

    def __init__(
        self,
        prototypes: Any,
        logit_scale: float = 100.0,
        *,
        rank: int | float | str | RankRule = GavishDonoho(),  # noqa: B008
        center: bool = False,
        subspace: Subspace | None = None,
        side: str = "text",
        steps: int = 1,
        learning_rate: float = 5e-3,
        optimizer: str = "adamw",
        weight_decay: float = 0.01,
        reg: float = 0.0,
        penalty: str = "norm",
        keep: float = 0.1,
        predict: str = "confident_mean",
        per_class: bool = False,
        online: bool = False,
    ) -> None:
        if side not in ("text", "image"):
            raise ValueError(f"side: 'text' or 'image', got {side!r}")
        if side == "image" and (subspace is None or per_class):
            raise ValueError("side: 'image' needs subspace= of image embeddings, and has no coefficients per class")
        super().__init__(
            prototypes,
            logit_scale,
            steps=steps,
            learning_rate=learning_rate,
            optimizer=optimizer,
            weight_decay=weight_decay,
            reg=reg,
            penalty=penalty,
            keep=keep,
            predict=predict,
            per_class=per_class,
            online=online,
        )
        d = self.prototypes.shape[1]
        self.subspace = self._prototype_subspace(rank, center) if subspace is None else subspace
        if self.subspace.batch_shape or self.subspace.ambient_dim != d:
            raise ValueError(f"subspace: one subspace of R^{d} is needed, got {self.subspace}")
        self.side = side
        self.register_buffer("basis", self.subspace.basis.to(self.prototypes))

    def _prototype_subspace(self, rank: int | float | str | RankRule, center: bool) -> Subspace:
        rule = rank_rule(rank)
        if isinstance(rule, GavishDonoho):
            rule = dataclasses.replace(rule, minimum=0)

        def at_least_one(variances: np.ndarray, n: int, d: int) -> int:
            k = rule(variances, n, d)
            if k < 1:
                warnings.warn(
                    f"rank: no singular value of the {n} prototypes passes the threshold; using one direction",
                    stacklevel=2,
                )
            return max(1, k)

        return Subspace.fit(self.prototypes, rank=at_least_one, center=center)

    def _dim(self) -> int:
        return self.subspace.dim

    def _coordinates(self, rows: Tensor) -> Tensor:
        return rows @ self.basis.to(rows.dtype)

    def _embed(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self.basis.to(coefficients.dtype).mT

    def _steered(self, views: Tensor, cosines: Tensor, coefficients: Tensor) -> Tensor:
        if self.side == "text":
            return super()._steered(views, cosines, coefficients)
        along = coefficients @ self._coordinates(self.prototypes.to(views.dtype)).mT
        return (cosines + along.unsqueeze(1)) / self._view_norms(views, coefficients).unsqueeze(-1)

    def _view_norms(self, views: Tensor, coefficients: Tensor) -> Tensor:
        along = (self._coordinates(views) @ coefficients.unsqueeze(-1)).squeeze(-1)
        square = 1 + 2 * along + coefficients.square().sum(-1, keepdim=True)
        return square.clamp_min(torch.finfo(square.dtype).eps).sqrt()

    def _pull_back(self, views: Tensor, steered: Tensor, slope: Tensor, coefficients: Tensor) -> Tensor:
        if self.side == "text":
            return super()._pull_back(views, steered, slope, coefficients)
        x, y = self._coordinates(views), self._coordinates(self.prototypes.to(views.dtype))
        norms = self._view_norms(views, coefficients)
        inner = (slope * steered).sum(-1) / norms.square()
        radial = (inner.unsqueeze(1) @ x).squeeze(1) + inner.sum(-1, keepdim=True) * coefficients
        return (slope / norms.unsqueeze(-1)).sum(1) @ y - radial

    def extra_repr(self) -> str:
        """Sizes and settings, for `repr`."""
        return f"{super().extra_repr()}, rank={self.subspace.dim}, side={self.side!r}"


class STSClassifier:
    """Zero-shot image classifier over a CLIP-like transformers model, steered to each image.

    Parameters
    ----------
    model, processor
        A model with `get_image_features` and `get_text_features`, and its processor (tokenizer and image processor).
    classnames, templates
        One name a class, and the texts that they are put in, each with a {}.
    views
        Of each image, the original included.
    logit_scale
        None reads the model's own.
    crop_scale
        Share of the image's area that a view may cover.
    seed
        Of the views.
    **steering
        Of `SpectralSteering`.

    Raises
    ------
    ValueError
        For views < 1, and where the model stores no logit scale and none is given.

    References
    ----------
    Dafnis & Metaxas (2025), arXiv 2511.09809; protocol of Sui et al. (2024), arXiv 2403.12952.

    Examples
    --------
    >>> from subspan.edit import STSClassifier
    >>> classifier = STSClassifier(clip, processor, ["cat", "dog"])  # doctest: +SKIP
    >>> names = classifier.predict(images)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        classnames: Sequence[str],
        *,
        templates: Sequence[str] = ENSEMBLE_TEMPLATES,
        views: int = 64,
        logit_scale: float | None = None,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        seed: int = 0,
        **steering: Any,
    ) -> None:
        if views < 1:
            raise ValueError(f"views: at least 1 is needed, got {views}")
        if logit_scale is None:
            stored = getattr(model, "logit_scale", None)
            if not isinstance(stored, Tensor):
                raise ValueError("logit_scale: the model stores none; give the factor on its cosines")
            logit_scale = float(stored.detach().exp())
        self.logit_scale = logit_scale
        self.preprocessing = _preprocessing(processor.image_processor)
        self.text_encoder = SentenceEncoder(model, processor.tokenizer, pool="projection", max_length=77)
        self.image_encoder = ImageEncoder(model, lambda view: view)
        self.templates = tuple(templates)
        self.views = views
        self.crop_scale = crop_scale
        self.seed = seed
        self._steering_options = steering
        self._by_classes: dict[tuple[str, ...], SpectralSteering] = {}
        self.set_classes(classnames)

    def set_classes(self, classnames: Sequence[str]) -> None:
        """Change the class set: prototypes, their SVD and its rank are built anew, once for each list of names."""
        key = tuple(check_texts(classnames, "classnames", 2))
        if key not in self._by_classes:
            prototypes = zero_shot_prototypes(self.text_encoder, key, self.templates)
            self._by_classes[key] = SpectralSteering(prototypes, self.logit_scale, **self._steering_options)
        self.classnames = key
        self.steering = self._by_classes[key]

    def encode_views(self, images: Iterable[Any], batch_size: int = 64) -> Float[Tensor, "b n d"]:
        """Embeddings of the views of each image, the original first; the costly part, worth keeping."""
        generator = torch.Generator().manual_seed(self.seed)
        encoded = []
        for image in images:
            views = random_views(
                image_tensor(image), self.views, self.preprocessing, scale=self.crop_scale, generator=generator
            )
            encoded.append(torch.from_numpy(self.image_encoder.encode(views, batch_size)))
        if not encoded:
            raise ValueError("images: at least one image is needed, got none")
        return torch.stack(encoded)

    def predict_proba(self, images: Iterable[Any]) -> Float[Tensor, "b c"]:
        """Class probabilities, one row an image."""
        return self.steering(self.encode_views(images))

    def predict(self, images: Iterable[Any]) -> list[str]:
        """Class names, one an image."""
        return [self.classnames[i] for i in self.predict_proba(images).argmax(-1).tolist()]


def _preprocessing(processor: Any) -> ImagePreprocessing:
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.get("height", size.get("shortest_edge")) if hasattr(size, "get") else int(size)
    return ImagePreprocessing(
        size=side,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        crop_fraction=1.0,
        interpolation="bicubic",
    )
