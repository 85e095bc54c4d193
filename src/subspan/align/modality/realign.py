"""ReAlign: anchor, trace, centroid — one modality's embeddings into the distribution of another (Yu et al., 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base.parameters import Count
from subspan.statistics import Moments
from subspan.statistics.spread import Spread

from .modality_map import ModalityMap

Step = Literal["anchor", "trace", "centroid"]
STEPS: tuple[Step, ...] = ("anchor", "trace", "centroid")
_EPSILON = 1e-10


@dataclass(eq=False, repr=False)
class ReAlign(ModalityMap):
    """Map unit-norm source rows (texts) into the distribution of unit-norm target rows (images), without pairs.

    1. anchor: e - μ_source + μ_target.
    2. trace: about the anchor, scaled by s = sqrt(T_target / (T_source + 1e-10)), T = E|e - μ|²; then to unit length.
    3. centroid: minus the mean drift that the projection caused, to unit length again; `n_centroid` rounds.

    Time O(n d), memory O(d). The other attributes are those of `ModalityMap`.

    Parameters
    ----------
    steps
        The leading steps to take: ("anchor",), ("anchor", "trace") or all three.
    n_centroid
        Rounds of step 3; the published operator takes 1, each further round contracts what is left of the gap.
    normalize
        Rows are scaled to unit length first and after each step; False for data that does not live on a sphere.
    official
        Round the two means to float32 before anything else, as the authors' program does.

    Attributes
    ----------
    scale_, trace_source_, trace_target_
        s, and T of the two modalities.

    References
    ----------
    Yu et al. (2026), arXiv 2602.07026.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import ReAlign
    >>> from subspan.base import normalize_rows
    >>> random = torch.Generator().manual_seed(0)
    >>> texts = normalize_rows(torch.randn(200, 8, generator=random) + torch.eye(8)[0] * 3)
    >>> images = normalize_rows(torch.randn(300, 8, generator=random) + torch.eye(8)[1] * 3)
    >>> model = ReAlign().fit(texts, images)
    >>> model.gap_after_ < 0.1 * model.gap_before_
    True
    """

    steps: Sequence[Step] = STEPS
    n_centroid: Count = 1
    normalize: bool = True
    official: bool = False

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if not self.steps or tuple(self.steps) != STEPS[: len(self.steps)]:
            raise ValueError(f"steps: expected the first one, two or three of {STEPS}, got {self.steps!r}")

    def _accumulator(self, d: int) -> Spread:
        return Spread(d)

    def _centroid_rounds(self) -> int:
        return self.n_centroid if "centroid" in self.steps else 0

    def _mean(self, gathered: Spread | Moments) -> Float[Tensor, " d"]:
        return gathered.mean.float().double() if self.official else gathered.mean

    def _weight(self) -> Float[Tensor, ""]:
        # The mean squared distance from a rounded mean is larger by the square of the rounding.
        self.trace_source_, self.trace_target_ = (
            spread.trace + float((spread.mean - self._mean(spread)).square().sum())
            for spread in (self._source, self._target)
        )
        for name, spread in (("X", self._source), ("Y", self._target)):
            if spread.trace <= _EPSILON * float(spread.mean.square().sum()):
                raise ValueError(f"{name}: the rows are constant; there is no spread to match")
        trace = "trace" in self.steps
        self.scale_ = (self.trace_target_ / (self.trace_source_ + _EPSILON)) ** 0.5 if trace else 1.0
        return torch.tensor(self.scale_, dtype=torch.float64, device=self._source.mean.device)
