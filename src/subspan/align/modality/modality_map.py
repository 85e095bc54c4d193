"""Closed-form maps of one modality's embeddings into the distribution of another, fitted without pairs.

Every such map here has one form: an affine map, projection to the unit sphere, and rounds that subtract the drift of
the mean which the projection caused. `ModalityMap` does the statistics, the passes over data and the checks; a system
says only which affine map it wants.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import OneToOneFeatureMixin, TransformerMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from subspan.base import as_tensor, check_matrix, like, normalize_rows, save_arrays, saved_object
from subspan.base.estimators import Estimator
from subspan.statistics import Moments, batches, is_one_shot, is_stream
from subspan.statistics.spread import Spread

_NO_DIRECTION = 1e-10
_UNIT_TOLERANCE = 5e-3
_BATCH = 8192
# Rows worked on at a time: few enough to stay in the processor's cache.
_BLOCK = 256


class ProjectedAffine(nn.Module):
    """Rows e → π(weight e + bias), then for each drift δ: e → π(e - δ), where π scales to unit length.

    Zero rows stay zero, and a step that would leave a row without direction (length < 1e-10) is skipped for that row.

    Parameters
    ----------
    weight
        A scalar () or a matrix (d, d).
    bias
        (d,).
    drift
        (rounds, d), one δ a row.
    normalize
        False leaves π out.
    noise
        Standard deviation of Gaussian noise added before the projection.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import ProjectedAffine
    >>> move = ProjectedAffine(torch.tensor(1.0), torch.tensor([0.0, 3.0]), torch.zeros(0, 2), normalize=False)
    >>> move(torch.tensor([[1.0, 1.0]])).tolist()
    [[1.0, 4.0]]
    """

    weight: Tensor
    bias: Tensor
    drift: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Float[Tensor, " d"],
        drift: Float[Tensor, "rounds d"],
        *,
        normalize: bool = True,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("drift", drift)
        self.normalize = normalize
        self.noise = noise

    def forward(self, rows: Float[Tensor, "*n d"], generator: torch.Generator | None = None) -> Float[Tensor, "*n d"]:
        """Map rows (…, d); they are normalised first when `normalize` is set."""
        empty = (rows == 0).all(-1, keepdim=True)
        rows = normalize_rows(rows) if self.normalize else rows
        weight, bias = self.weight.to(rows), self.bias.to(rows)
        moved = (rows * weight if weight.ndim == 0 else rows @ weight.mT) + bias
        if self.noise:
            moved = moved + self.noise * torch.randn(
                moved.shape, generator=generator, dtype=moved.dtype, device=moved.device
            )
        rows = self._project(moved, rows)
        for drift in self.drift.to(rows):
            rows = self._project(rows - drift, rows)
        return rows.masked_fill(empty, 0)

    def _project(self, moved: Tensor, previous: Tensor) -> Tensor:
        if not self.normalize:
            return moved
        length = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        lost = length < _NO_DIRECTION
        return torch.where(lost, previous, moved / length.masked_fill(lost, 1))

    def extra_repr(self) -> str:
        """Shown by print."""
        kind = f"scale={float(self.weight):.4g}" if self.weight.ndim == 0 else "full matrix"
        return f"d={len(self.bias)}, {kind}, centroid rounds={len(self.drift)}, noise={self.noise:g}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, whole or not at all."""
        save_arrays(path, "projected-affine", self.state_dict(), normalize=self.normalize, noise=self.noise)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProjectedAffine:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        schema = {
            "weight": Float[Tensor, ""] | Float[Tensor, "d d"],
            "bias": Float[Tensor, " d"],
            "drift": Float[Tensor, "rounds d"],
        }
        with saved_object(path, "projected-affine", schema, {"normalize": bool, "noise": float}) as (arrays, facts):
            return cls(**arrays, **facts)


class ModalityMap(OneToOneFeatureMixin, TransformerMixin, Estimator):
    """Base of the maps from a source modality (rows X) into the distribution of a target modality (rows Y), unpaired.

    A subclass is a dataclass with the field `normalize`: rows are scaled to unit length first and after each step. It
    gives `_accumulator(d)`, `_weight()` → what multiplies the centred source, from `self._source` and `self._target`,
    and the number of centroid rounds. Rows may come as arrays of unequal numbers of rows, or as anything that
    `subspan.statistics.batches` reads. Zero rows are left out of the statistics and stay zero. Y is required and has
    the columns of X, but rows of its own: scikit-learn's tags have no word for that, and its checks, which know no
    second matrix of rows, hold for a subclass that makes one up.

    Attributes
    ----------
    mean_source_, mean_target_
        (d,) each.
    drift_
        (rounds, d), what each centroid round subtracts.
    gap_before_, gap_after_
        Distance between the means of the modalities before and after.
    n_source_, n_target_
        Rows in the statistics.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import ModalityMap, ReAlign
    >>> texts, images = torch.randn(40, 4) + torch.tensor([3.0, 0, 0, 0]), torch.randn(50, 4)
    >>> model = ReAlign(normalize=False).fit(texts, images)
    >>> isinstance(model, ModalityMap), model.n_source_, model.n_target_
    (True, 40, 50)
    """

    normalize: bool
    _source: Any
    _target: Any

    def _accumulator(self, d: int) -> Spread | Moments:
        raise NotImplementedError

    def _weight(self) -> Tensor:
        raise NotImplementedError

    def _mean(self, gathered: Spread | Moments) -> Float[Tensor, " d"]:
        return gathered.mean

    def _centroid_rounds(self) -> int:
        return 0

    def _noise(self) -> float:
        return 0.0

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, Y: Any) -> ModalityMap:
        """Fit to source rows X (n, d) and target rows Y (m, d), which need not be paired nor equal in number.

        Streams are read once for Y, and for X once more for each centroid round and once for `gap_after_`.
        Raises ValueError for NaN or infinity, unequal d, fewer than 2 rows, a constant modality, or X readable once.
        """
        if is_one_shot(X):
            raise ValueError(
                "X: a generator can be read only once, and fitting reads the source again for its mapped mean; pass "
                "something that can be read again, or use partial_fit and then finalize(source)"
            )
        for name in ("_source", "_target", "n_features_in_"):
            self.__dict__.pop(name, None)
        self.partial_fit(X, Y)
        return self.finalize(X)

    def partial_fit(self, X: Any = None, Y: Any = None) -> ModalityMap:
        """Add source rows X, target rows Y or both to the statistics; `finalize` makes the map from them."""
        self._check_parameters()
        self.__dict__.pop("drift_", None)
        for role, source, name in (("_source", X, "X"), ("_target", Y, "Y")):
            if source is None:
                continue
            lengths = []
            for rows in self._read(source, name, reset=not hasattr(self, role)):
                if not hasattr(self, "n_features_in_"):
                    self.n_features_in_ = rows.shape[1]
                if not hasattr(self, role):
                    setattr(self, role, self._accumulator(self.n_features_in_))
                lengths.append(torch.linalg.vector_norm(rows, dim=-1))
                rows = _nonzero(rows, lengths[-1])
                getattr(self, role).update(normalize_rows(rows) if self.normalize else rows)
            if lengths:
                self._check_lengths(torch.cat(lengths), name)
        return self

    def finalize(self, X: Any = None) -> ModalityMap:
        """Make the map from the statistics so far; source rows X, read again, give the drift of the mapped mean.

        X may be left out where the map has no centroid round (then gap_after_ is NaN).
        Raises ValueError for too few or constant rows, and when X is missing or can be read less often than needed.
        """
        for role, name in (("_source", "X"), ("_target", "Y")):
            have = getattr(self, role).count if hasattr(self, role) else 0
            if have < 2:
                raise ValueError(
                    f"{name}: needs at least 2 rows that are not zero, got {have:g} (n_samples = {have:g})"
                )
            if have < 10 * self.n_features_in_:
                warnings.warn(
                    f"{name}: {have:g} rows are few for {self.n_features_in_} dimensions; the mean is known to about "
                    f"1/sqrt(rows), and statistics settle near 10 times the dimension",
                    stacklevel=2,
                )
        rounds = self._centroid_rounds()
        if X is None and rounds:
            raise ValueError("X: the centroid step needs the source rows once more; call finalize(source)")
        if is_one_shot(X) and rounds > 1:
            raise ValueError(f"X: n_centroid = {rounds} reads the source {rounds} times, a generator only once")
        source, target = self._mean(self._source), self._mean(self._target)
        self.mean_source_, self.mean_target_ = source.cpu().numpy(), target.cpu().numpy()
        self.n_source_, self.n_target_ = int(self._source.count), int(self._target.count)
        if self.normalize and self.n_features_in_ < 2:
            raise ValueError("X: 1 feature(s) leave only two unit vectors; normalize=True needs at least 2")
        weight = self._weight()
        moved = weight * source if weight.ndim == 0 else weight @ source
        bias = target - moved
        drift = target.new_zeros(0, len(target))
        for _ in range(rounds):
            mapped = self._mapped_mean(X, ProjectedAffine(weight, bias, drift, normalize=self.normalize))
            drift = torch.cat([drift, (mapped - target).unsqueeze(0)])
        self._operator = ProjectedAffine(weight, bias, drift, normalize=self.normalize, noise=self._noise())
        self.gap_before_ = float(np.linalg.norm(self.mean_source_ - self.mean_target_))
        readable = X is not None and not is_one_shot(X)
        self.gap_after_ = (
            float(torch.linalg.vector_norm(self._mapped_mean(X, self._operator) - target)) if readable else float("nan")
        )
        self.drift_ = drift.cpu().numpy()
        return self

    def _mapped_mean(self, source: Any, operator: ProjectedAffine) -> Tensor:
        """Mean over the source of its rows after the map so far."""
        total, count = torch.zeros_like(operator.bias), 0
        generator = self._generator(total.device)
        for rows in self._read(source, "X", reset=False):
            # Zero rows stay zero and do not change the sum.
            total += operator(rows.to(total), generator).sum(0)
            count += int((torch.linalg.vector_norm(rows, dim=-1) > 0).sum())
        if count == 0:
            raise ValueError("X: holds no rows that are not zero (an iterator that was already read?)")
        return total / count

    def _generator(self, device: torch.device) -> torch.Generator | None:
        return None

    def _read(self, source: Any, name: str, *, reset: bool) -> Iterator[Tensor]:
        """Blocks of `source` in float64, checked against what was read before; `reset`: its first rows."""
        columns = getattr(self, "n_features_in_", None)
        if name == "X":
            rows = self._batches(source, reset=reset and columns is None, size=_BATCH)
        else:
            given = source if is_stream(source) else as_tensor(source, name)
            rows = (check_matrix(batch, name, columns=columns) for batch in batches(given, _BATCH))
        for batch in rows:
            for block in batch.split(_BLOCK):
                yield block.double()

    # ------------------------------------------------------------------ use

    def _fitted(self) -> ProjectedAffine:
        if not hasattr(self, "drift_"):
            started = hasattr(self, "_source") or hasattr(self, "_target")
            raise NotFittedError(
                "the map is not made yet: call finalize(source) after the last partial_fit"
                if started
                else f"This {type(self).__name__} instance is not fitted yet; call fit first"
            )
        return self._operator

    def transform(self, X: Any) -> Any:
        """Rows X (n, d) of the source modality, mapped; numpy or torch as given, in its dtype and on its device.

        Raises ValueError for rows that lie at the target's centroid already (mapped before, or of the target
        modality). Warns for rows not of unit length and for rows of another domain than the map was fitted in.
        """
        self._fitted()
        rows = self._rows(X)
        operator = self.to_module(dtype=torch.float64).to(rows.device)
        generator = self._generator(rows.device)
        mapped = torch.empty_like(rows)
        lengths, positions = (torch.zeros(len(rows), dtype=torch.float64, device=rows.device) for _ in range(2))
        after = Spread(self.n_features_in_, device=rows.device)
        way = torch.as_tensor(self.mean_target_ - self.mean_source_, device=rows.device)
        for start in range(0, len(rows), _BLOCK):
            place = slice(start, start + _BLOCK)
            block = rows[place].double()
            lengths[place] = torch.linalg.vector_norm(block, dim=-1)
            positions[place] = block @ way
            result = operator(block, generator)
            after.update(_nonzero(result, lengths[place]))
            mapped[place] = result.to(rows.dtype)
        self._check_lengths(lengths, "X")
        self._refuse_target_rows(lengths, positions)
        self._warn_other_domain(after)
        return like(mapped, X)

    def _check_lengths(self, lengths: Float[Tensor, " n"], name: str) -> None:
        odd = int(((lengths - 1).abs() > _UNIT_TOLERANCE)[lengths > 0].sum())
        if odd and self.normalize:
            warnings.warn(f"{name}: {odd} rows are not of unit length; they are normalised first", stacklevel=3)

    def _refuse_target_rows(self, lengths: Float[Tensor, " n"], positions: Float[Tensor, " n"]) -> None:
        """Raise where the rows lie nearer to the target's mean than to the source's, beyond chance."""
        way = self.mean_target_ - self.mean_source_
        square = float(way @ way)
        present = lengths > 0
        if int(present.sum()) < 8 or square <= 0:
            return
        along = positions[present] / lengths[present] if self.normalize else positions[present]
        # On the way from the source's mean (0) to the target's (1), with its standard error.
        position = (along - float(self.mean_source_ @ way)) / square
        error = float(position.std()) / len(position) ** 0.5
        if float(position.mean()) - 5 * error > 0.5:
            raise ValueError(
                f"X: the rows lie at the target's centroid already ({float(position.mean()):.2f} of the way from the "
                "source's): they were mapped before, or are rows of the target modality, which are never mapped"
            )

    def _warn_other_domain(self, after: Spread) -> None:
        if after.count < 8 or np.isnan(self.gap_after_):
            return
        gap = float(np.linalg.norm(after.mean.cpu().numpy() - self.mean_target_))
        if gap**2 > (10 * self.gap_after_) ** 2 + 9 * after.trace / after.count:
            warnings.warn(
                f"X: its mean lies {gap:.3g} from the target's after the map, {self.gap_after_:.3g} where it was "
                "fitted: the statistics are those of another domain; fit in the domain of use",
                stacklevel=3,
            )

    def to_module(self, *, dtype: torch.dtype = torch.float32) -> ProjectedAffine:
        """The fitted map as a torch module with buffers."""
        operator = self._fitted()
        copy = ProjectedAffine(
            operator.weight.clone(),
            operator.bias.clone(),
            operator.drift.clone(),
            normalize=operator.normalize,
            noise=operator.noise,
        )
        return copy.to(dtype)


def _nonzero(rows: Float[Tensor, "n d"], lengths: Float[Tensor, " n"]) -> Float[Tensor, "m d"]:
    """The rows whose length is not zero, without a copy where none is."""
    present = lengths > 0
    return rows if bool(present.all()) else rows[present]
