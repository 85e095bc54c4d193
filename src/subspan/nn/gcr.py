"""Grassmann class representation: a classifier whose classes are subspaces, not vectors."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.nn import functional as F

from subspan.geometry import Subspace
from subspan.geometry.grassmann import orthonormalize, random_basis
from subspan.statistics import GroupedMoments

from .riemannian import GrassmannModule, GrassmannParameter, check_planes

_MANY = 10**8


class GrassmannHead(GrassmannModule):
    """Features x (…, d) → logits γ |S_c' x/|x||, the cosine of the angle between x and the plane of each class.

    Logits are never negative and there is no bias; k = 1 is γ |cos|. The planes are one `GrassmannParameter`
    (classes, k, d), stepped by `RiemannianSGD` or `with_riemannian`. They start uniform, or by `init_from` as the
    principal planes of the classes. Where rows are not orthonormal, since they were averaged or another optimizer moved
    them (which warns), logits are those of their spans. Computed in float32 at least; zero features have logits 0, with
    a warning.

    Parameters
    ----------
    in_features
        Width d of the features.
    num_classes
        Number of planes.
    rank
        Dimension k of every plane.
    scale
        γ.
    generator
        Of the random planes.

    Raises
    ------
    ValueError
        For k outside [1, d]. Later for features or planes that are not finite, planes with dependent rows, and a state
        with rows too long to be an average.

    References
    ----------
    Wang, Li & Zhang (ICCV 2023).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import GrassmannHead
    >>> head = GrassmannHead(8, num_classes=3, rank=2, scale=25.0)
    >>> logits = head(head.planes[1, 0].detach())
    >>> logits.argmax().item(), round(logits.max().item(), 2)
    (1, 25.0)
    """

    _plane_names = frozenset({"planes"})

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        rank: int = 8,
        scale: float = 25.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= in_features:
            raise ValueError(f"rank: must lie in [1, in_features = {in_features}], got {rank}")
        if num_classes < 1:
            raise ValueError(f"num_classes: must be at least 1, got {num_classes}")
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale: must be positive and finite, got {scale}")
        if in_features * num_classes * rank > _MANY:
            warnings.warn(f"rank: the planes have {in_features * num_classes * rank:,} numbers", stacklevel=2)
        self.in_features = in_features
        self.num_classes = num_classes
        self.rank = rank
        self.scale = scale
        self.planes = GrassmannParameter(torch.empty(num_classes, rank, in_features))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniformly random planes."""
        start = random_basis(
            self.in_features, self.rank, batch=(self.num_classes,), generator=generator, dtype=torch.float32
        )
        self.planes.copy_(start.mT)

    @torch.no_grad()
    def init_from(self, moments: GroupedMoments) -> None:
        """Start from the leading eigenvectors of each class's second moment (CLAFIC; Watanabe & Pakvasa, 1973).

        moments: of *unit* features, the groups being class numbers. A class with fewer directions than `rank` is
        filled up with random ones; one that is missing keeps its plane. Raises ValueError for other widths or labels.
        """
        for label, own in moments.by_group.items():
            if not isinstance(label, int) or not 0 <= label < self.num_classes:
                raise ValueError(f"moments: groups are class numbers below {self.num_classes}, got {label!r}")
            if own.d != self.in_features:
                raise ValueError(f"moments: expected {self.in_features} features, got {own.d}")
            values, leading = _leading_eigenvectors(own.second_moment(), self.rank)
            known = values > 1e-10 * values[0]
            if not bool(known.all()):
                rest = random_basis(self.in_features, self.rank, dtype=leading.dtype)[:, int(known.sum()) :]
                leading = torch.cat([leading[:, known], rest.to(leading)], 1)
            self.planes[label].copy_(orthonormalize(leading).mT)

    def forward(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n c"]:
        """Logits (…, classes)."""
        if features.shape[-1] != self.in_features:
            raise ValueError(f"features: expected {self.in_features} columns, got {features.shape[-1]}")
        x = features.to(torch.promote_types(features.dtype, torch.float32))
        if not (torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or x.is_meta):
            _check_rows(x.detach())
        unit = F.normalize(x, dim=-1)
        planes = self.planes_of("planes").to(x.dtype)
        coordinates = F.linear(unit, planes.flatten(0, 1)).unflatten(-1, (self.num_classes, self.rank))
        return self.scale * torch.linalg.vector_norm(coordinates.to(x.dtype), dim=-1)

    def subspaces(self) -> Subspace:
        """The planes of all classes, one batch (classes, d, k)."""
        return Subspace(orthonormalize(self.planes.detach().mT))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        planes = state_dict.get(f"{prefix}planes")
        if planes is not None and planes.ndim == 3 and not planes.is_meta:
            check_planes(planes, f"{prefix}planes")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}, rank={self.rank}, scale={self.scale:g}"


def _leading_eigenvectors(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, descending, and their vectors; by Lanczos where they are few among many."""
    if 8 * k < matrix.shape[0]:
        start = np.ones(matrix.shape[0])  # ARPACK's own start is random
        values, vectors = (torch.from_numpy(part) for part in eigsh(matrix.cpu().double().numpy(), k, v0=start))
        order = values.argsort(descending=True)
        return values[order], vectors[:, order]
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1)[:k], vectors.flip(-1)[:, :k]


def _check_rows(x: Tensor) -> None:
    norm = torch.linalg.vector_norm(x, dim=-1)
    if not bool(norm.isfinite().all()):
        raise ValueError(f"features: {int((~norm.isfinite()).sum())} of {norm.numel()} rows contain NaN or infinity")
    if bool((norm == 0).any()):
        warnings.warn(f"features: {int((norm == 0).sum())} rows are zero; their logits are 0", stacklevel=3)
