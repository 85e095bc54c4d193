"""A mergeable sketch of the covariance for dimensions where d x d no longer fits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base import check_matrix
from subspan.base.arrays import holding
from subspan.geometry import RankRule, Subspace, rank_rule


class CovarianceSketch:
    """Frequent directions on centred rows: a mergeable sketch of the covariance in memory O(size d) instead of O(d^2).

    The sketch B (size, d) satisfies 0 <= x'(S - B'B)x <= |S - S_k|_F^2-type bound `error_bound` for the scatter S.
    Batches are centred on their own mean and the shift between means enters as one more row, so the merged sketch is
    one of the centred scatter.

    Parameters
    ----------
    d
        Dimension of the rows.
    size
        Directions that are kept, in [2, d].
    dtype
        Of the sketch.
    device
        Of the sketch; None: torch's default.

    Attributes
    ----------
    count, mean
        Number of rows and their mean (d,), exact.
    rows
        The sketch, up to twice `size` rows of d numbers between shrinkages.
    error_bound
        What the sketch may lack of the scatter along any direction of unit length.

    References
    ----------
    Liberty (2013), arXiv 1206.0594. Ghashami, Liberty, Phillips & Woodruff (2016), arXiv 1501.01711.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Subspace
    >>> from subspan.statistics import CovarianceSketch
    >>> basis = torch.eye(50)[:, :2]
    >>> rows = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) @ basis.T
    >>> sketch = CovarianceSketch(50, size=8).update(rows)
    >>> round(float(sketch.subspace(rank=2).overlap(Subspace(basis))), 4)
    1.0
    """

    def __init__(self, d: int, size: int = 256, *, dtype: torch.dtype = torch.float32, device: Any = None):
        if not 2 <= size <= d:
            raise ValueError(f"size: must lie in [2, {d}], got {size}")
        self.size = size
        self.count = 0.0
        self.mean: Tensor = torch.zeros(d, dtype=torch.float64, device=device)
        self.rows: Tensor = torch.zeros(0, d, dtype=dtype, device=device)
        self.total = 0.0
        self.error_bound = 0.0

    @property
    def d(self) -> int:
        """Dimension of the rows."""
        return self.mean.shape[0]

    def update(self, batch: Any) -> CovarianceSketch:
        """Add rows (n, d); returns self."""
        rows = check_matrix(batch, "batch", columns=self.d, min_rows=0)
        for start in range(0, rows.shape[0], self.size):
            part = rows[start : start + self.size].to(self.rows)
            mean = part.mean(0)
            centred = part - mean
            offset = centred.mean(0)
            self._merge(float(len(part)), (mean.double() + offset.double()), centred - offset, None, 0.0)
        return self

    def _merge(self, count: float, mean: Tensor, rows: Tensor, total: float | None, error: float) -> None:
        delta = mean - self.mean
        weight = self.count * count / (self.count + count)
        bridge = (delta * weight**0.5).to(self.rows).unsqueeze(0)
        self.total += float(rows.double().square().sum()) if total is None else total
        self.total += weight * float(delta.square().sum())
        self.mean = self.mean + delta * (count / (self.count + count))
        self.count += count
        self.error_bound += error
        parts = [self.rows, rows] if weight == 0 else [self.rows, rows, bridge]
        self.rows = torch.cat(parts)
        if len(self.rows) > 2 * self.size:
            self._shrink()

    def _shrink(self) -> None:
        _, s, vh = torch.linalg.svd(self.rows.double(), full_matrices=False)
        energy = s.square()
        cut = energy[self.size] if len(energy) > self.size else energy.new_zeros(())
        kept = (energy[: self.size] - cut).clamp_min(0).sqrt()
        self.rows = (kept.unsqueeze(-1) * vh[: self.size]).to(self.rows.dtype)
        self.error_bound += float(cut)

    def __add__(self, other: CovarianceSketch) -> CovarianceSketch:
        """Sketch of the rows of both."""
        if not isinstance(other, CovarianceSketch):
            return NotImplemented
        if (other.d, other.size) != (self.d, self.size):
            raise ValueError(f"other: has d, size = {(other.d, other.size)}, expected {(self.d, self.size)}")
        new = CovarianceSketch(self.d, self.size, dtype=self.rows.dtype, device=self.rows.device)
        for part in (self, other):
            if part.count:
                new._merge(part.count, part.mean, part.rows, part.total, part.error_bound)
        return new

    @property
    def total_variance(self) -> float:
        """Trace of the covariance (exact, not sketched)."""
        if self.count < 2:
            raise ValueError(f"sketch: needs at least 2 rows, has {self.count:g}")
        return self.total / (self.count - 1)

    def variances(self) -> Float[Tensor, " s"]:
        """Descending variances of the sketch, with half of the shrinkage given back."""
        s = torch.linalg.svdvals(self.rows.double())
        return (s.square() + self.error_bound / 2) / (self.count - 1)

    def subspace(self, rank: int | float | str | RankRule = 0.99, *, dtype: torch.dtype | None = None) -> Subspace:
        """Principal subspace; an explained-variance rank is measured against the exact total variance.

        Raises ValueError when the rank asked for is more than the sketch holds.
        """
        total = self.total_variance
        _, s, vh = torch.linalg.svd(self.rows.double(), full_matrices=False)
        values = ((s.square() + self.error_bound / 2) / (self.count - 1)).clamp_min(0)
        kept = min(self.size, len(values))
        values, vh = values[:kept], vh[:kept]
        # What the sketch does not hold is spread evenly over the dimensions that it lacks.
        rest = max(0.0, total - float(values.sum()))
        spectrum = torch.cat([values, values.new_full((self.d - kept,), rest / max(1, self.d - kept))])
        k = rank_rule(rank)(spectrum.numpy(force=True), max(1, round(self.count)), self.d)
        if k > kept:
            raise ValueError(f"rank: {k} directions are asked for, the sketch holds {kept}; use a larger size")
        dtype = holding(self.rows.dtype if dtype is None else dtype, spectrum)
        basis = torch.linalg.qr(vh[:k].mT)[0].to(dtype)
        return Subspace(
            basis=basis,
            center=self.mean,
            variances=values[:k].to(dtype),
            residual_variance=(spectrum[k:].sum() / max(1, self.d - k)).to(dtype),
            spectrum=spectrum.to(dtype),
            count=self.count,
        )
