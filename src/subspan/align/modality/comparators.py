"""Simpler and heavier maps between modalities, to compare ReAlign with."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from jaxtyping import Float
from sklearn.utils import check_random_state
from torch import Tensor

from subspan.base.parameters import NonNegative, Seed, Whole
from subspan.geometry import Subspace, gaussian_transport
from subspan.geometry.rank import Rank
from subspan.statistics import Moments
from subspan.statistics.spread import Spread

from .modality_map import ModalityMap


@dataclass(eq=False, repr=False)
class MeanShift(ModalityMap):
    """Source rows moved by the difference of the means, then to unit length.

    The attributes are those of `ModalityMap`.

    Parameters
    ----------
    normalize
        As in `ModalityMap`.

    References
    ----------
    Yu et al. (2025), Unicorn.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import MeanShift
    >>> from subspan.base import normalize_rows
    >>> random = torch.Generator().manual_seed(0)
    >>> texts = normalize_rows(torch.randn(200, 8, generator=random) + torch.eye(8)[0] * 3)
    >>> images = normalize_rows(torch.randn(300, 8, generator=random) + torch.eye(8)[1] * 3)
    >>> model = MeanShift().fit(texts, images)
    >>> model.gap_after_ < 0.5 * model.gap_before_
    True
    """

    _: KW_ONLY
    normalize: bool = True

    def _accumulator(self, d: int) -> Spread:
        return Spread(d)

    def _weight(self) -> Float[Tensor, ""]:
        return torch.ones((), dtype=torch.float64, device=self._source.mean.device)


@dataclass(eq=False, repr=False)
class C3(MeanShift):
    """Mean shift, then isotropic Gaussian noise, then to unit length (connect, collapse, corrupt).

    The attributes are those of `ModalityMap`.

    Parameters
    ----------
    normalize
        As in `ModalityMap`.
    sigma
        Standard deviation of the noise in each dimension.
    random_state
        Of the noise; an int gives the same noise at each call.

    References
    ----------
    Zhang et al. (2024), C3.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import C3
    >>> from subspan.base import normalize_rows
    >>> random = torch.Generator().manual_seed(0)
    >>> texts = normalize_rows(torch.randn(200, 8, generator=random) + torch.eye(8)[0] * 3)
    >>> images = normalize_rows(torch.randn(300, 8, generator=random) + torch.eye(8)[1] * 3)
    >>> model = C3(random_state=0).fit(texts, images)
    >>> torch.equal(model.transform(texts), model.transform(texts))
    True
    """

    sigma: NonNegative = 0.02
    _: KW_ONLY
    random_state: Seed = None

    def _noise(self) -> float:
        return float(self.sigma)

    def _generator(self, device: torch.device) -> torch.Generator:
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        return torch.Generator(device=device).manual_seed(seed)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.non_deterministic = True
        return tags


@dataclass(eq=False, repr=False)
class BlockwiseCovariance(ModalityMap):
    """Whitening and colouring of two blocks, the leading subspace U of Σ_x + Σ_y and its complement, then centroid.

    Within each block the source's covariance becomes the target's, Σ_x^(1/2) Σ_y^(-1/2). It matches more moments than
    ReAlign and keeps less of the geometry: the tail of the source, where Σ_y is noise, is blown up. Time O(n d² + d³),
    memory O(d²). The other attributes are those of `ModalityMap`.

    Parameters
    ----------
    rank
        Of U; 0.9 is 90 % of the variance (see `rank_rule`).
    ridge
        Added to both covariances, as a share of their mean variance.
    n_centroid
        Rounds of the centroid step.
    normalize
        As in `ModalityMap`.

    Attributes
    ----------
    subspace_
        U.

    References
    ----------
    The comparison of Yu et al. (2026), arXiv 2602.07026.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import BlockwiseCovariance
    >>> random = torch.Generator().manual_seed(0)
    >>> texts = torch.randn(200, 4, generator=random)
    >>> images = torch.randn(300, 4, generator=random) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 5
    >>> model = BlockwiseCovariance(ridge=0.0, normalize=False).fit(texts, images)
    >>> torch.allclose(model.transform(texts).mean(0), images.mean(0), atol=1e-3)
    True
    """

    rank: Rank = 0.9
    ridge: NonNegative = 1e-6
    n_centroid: Whole = 1
    normalize: bool = True

    def _accumulator(self, d: int) -> Moments:
        return Moments(d)

    def _centroid_rounds(self) -> int:
        return self.n_centroid

    def _weight(self) -> Float[Tensor, "d d"]:
        source, target = (self._regular(moments, name) for moments, name in ((self._source, "X"), (self._target, "Y")))
        count = min(self._source.count, self._target.count)
        self.subspace_ = Subspace.from_covariance(source + target, count=count, rank=self.rank)
        blocks = [self.subspace_.basis]
        if self.subspace_.dim < self.subspace_.ambient_dim:
            blocks.append(self.subspace_.complement().basis)
        return sum(
            (
                u @ gaussian_transport(u.mT @ source @ u, u.mT @ target @ u, method="coral").matrix @ u.mT
                for u in blocks
            ),
            torch.zeros_like(source),
        )

    def _regular(self, moments: Moments, name: str) -> Float[Tensor, "d d"]:
        covariance = moments.covariance()
        mean_variance = covariance.diagonal().mean()
        if not float(mean_variance) > 1e-10 * float(moments.mean.square().mean()):
            raise ValueError(f"{name}: the rows are constant; there is no covariance to match")
        return covariance + self.ridge * mean_variance * torch.eye(len(covariance)).to(covariance)
