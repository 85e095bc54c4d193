"""Spikes: directions in which perturbed rows vary and clean ones do not, found with a test."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from subspan.base import as_tensor, check_finite, like
from subspan.base.arrays import centre
from subspan.base.estimators import Estimator
from subspan.base.parameters import Bounds, Count, Positive, Seed, Share
from subspan.geometry import MarchenkoPastur, Subspace, random_matrix, rank_rule
from subspan.geometry.rank import Rank
from subspan.statistics import Moments, batches, is_stream

from .spike_scores import (
    UNPAIRED,
    Nonconformity,
    PairedMoments,
    alignment_score,
    conformal_quantile,
    energy_score,
    spectral_score,
)

MIN_ROWS = 8
_ROWS_PER_COLUMN = 4
_RELATIVE_ZERO = 1e-12
UNNAMED = "perturbed"


class NoSpikesError(ValueError):
    """No direction is left to keep: none stands out of the noise, or none is robust enough."""


class SpikeFilter(nn.Module):
    """z ↦ z - strength · removed, for z of any shape (…, d): the map that is installed in a model and exported.

    Works in the dtype of z. Called with a `mask` (…), entries where it is 0 pass unchanged.

    Parameters
    ----------
    basis
        (d, r), orthonormal.
    center
        (d,); None for 0.
    removes
        False takes away all but the span of `basis` around `center`; True takes away that span alone.
    strength
        Share of it that is taken away.
    keep_norm
        Rescale each vector to its length before, for heads that use the cosine.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import SpikeFilter
    >>> z, first = torch.tensor([3.0, 4.0]), torch.eye(2)[:, :1]
    >>> SpikeFilter(first)(z).tolist(), SpikeFilter(first, removes=True)(z).tolist()
    ([3.0, 0.0], [0.0, 4.0])
    """

    center: Tensor
    basis: Tensor

    def __init__(
        self,
        basis: Float[Tensor, "d r"],
        center: Float[Tensor, " d"] | None = None,
        *,
        removes: bool = False,
        strength: float = 1.0,
        keep_norm: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("basis", basis.clone())
        self.register_buffer("center", basis.new_zeros(basis.shape[0]) if center is None else center.clone())
        self.removes = removes
        self.strength = strength
        self.keep_norm = keep_norm

    def extra_repr(self) -> str:
        """Sizes and options, as torch shows them."""
        d, r = self.basis.shape
        return f"d={d}, r={r}, removes={self.removes}, strength={self.strength}, keep_norm={self.keep_norm}"

    def forward(self, z: Float[Tensor, "*b d"], mask: Tensor | None = None) -> Float[Tensor, "*b d"]:
        """Filter the vectors along the last axis."""
        basis = self.basis.to(z.dtype)
        centred = centre(z, self.center)
        inside = (centred @ basis) @ basis.mT
        filtered = z - self.strength * (inside if self.removes else centred - inside)
        if self.keep_norm:
            before = torch.linalg.vector_norm(
                z, dim=-1, keepdim=True, dtype=torch.promote_types(z.dtype, torch.float32)
            )
            after = torch.linalg.vector_norm(filtered, dim=-1, keepdim=True, dtype=before.dtype)
            filtered = filtered * (before / after.clamp_min(torch.finfo(before.dtype).tiny)).to(z.dtype)
        return filtered if mask is None else torch.where(mask.bool().unsqueeze(-1), filtered, z)


@dataclass(eq=False, repr=False)
class RobustSpikes(OneToOneFeatureMixin, TransformerMixin, Estimator):
    """Filter rows to the span of their robust spikes (the causal subspace of Darabi et al., 2025).

    `fit(X, y)` takes clean rows X (n, d) and as `y` their perturbed versions: (n, d), row by row, or a mapping from the
    kind of perturbation to such an array. Both may be streams (see `subspan.statistics.batches`). Rows given alone by
    `partial_fit(X)` estimate the spectrum only; where there are none, the clean side of the pairs does that too.

    Parameters
    ----------
    nonconformity
        The score of a spike: "energy" (perturbation over signal along it, needs pairs), "alignment" and "spectral" (the
        perturbed rows may be others), "bootstrap" (instability under resampling, `y` is not used), or a function of
        (spikes, PairedMoments) → (m,), small = robust. All are this library's: the paper's is not known.
    alpha, threshold
        "quantile" keeps the spikes whose score is at most the conformal `alpha`-quantile (so about alpha of them always
        go); a number is an absolute bound on the score (1 under "energy": the signal dominates; inf keeps all).
    rank
        Which directions are spikes, by default those above the Marchenko-Pastur edge.
    center
        Affine filter around the mean; False for the linear one, on uncentred moments.
    reduce
        "mean" or "max" of the score over kinds.
    space
        "robust" keeps the robust spikes alone; "spikes" removes only the other spikes and keeps the bulk.
    strength, keep_norm
        As in `SpikeFilter`; the strength lies in [0, 1].
    resamples, random_state
        Of "bootstrap".
    on_empty
        "raise" NoSpikesError where nothing stands out of the noise, or "identity".
    batch_size
        Rows read at a time.

    Attributes
    ----------
    subspace_, correlational_, spikes_
        The robust spikes ("causal" in the paper's words), the removed ones or None, and all.
    rbns_, threshold_, kept_
        Scores (m,) of the spikes, the bound on them, and which stay (m,).
    sigma2_, edge_
        Noise variance and the edge of its spectrum.
    report_
        Columns by name.
    filter_
        The `SpikeFilter`.

    References
    ----------
    Darabi et al. (2025), arXiv 2502.14976.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import RobustSpikes
    >>> spread = torch.tensor([9.0, 5.0] + [1.0] * 8)  # two spikes
    >>> x = spread * torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    >>> attacked = x + torch.tensor([0.0, 9.0] + [0.0] * 8)  # the attack hits the second
    >>> model = RobustSpikes(threshold=1.0).fit(x, attacked)
    >>> model.spikes_.dim, model.subspace_.dim, model.subspace_.basis.abs().argmax().item()
    (2, 1, 0)
    """

    nonconformity: Nonconformity | Callable[..., Any] = "energy"
    _: KW_ONLY
    alpha: Annotated[float, Bounds(above=0, below=1)] = 0.2
    threshold: Literal["quantile"] | Positive = "quantile"
    rank: Rank = "marchenko-pastur"
    center: bool = True
    reduce: Literal["mean", "max"] = "mean"
    space: Literal["robust", "spikes"] = "robust"
    strength: Share = 1.0
    keep_norm: bool = False
    resamples: Annotated[int, Bounds(least=2)] = 10
    on_empty: Literal["raise", "identity"] = "raise"
    batch_size: Count = 8192
    random_state: Seed = None

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, y: Any = None) -> RobustSpikes:
        """Find the robust spikes of clean rows X (n, d) and their perturbed versions `y` (see the class).

        Raises ValueError for fewer than 8 rows, NaN, constant rows, sets that do not pair, or a missing `y`; its
        subclass NoSpikesError where no direction is left to keep.
        """
        self._reset()
        self._accumulate(X, y, reset=True)
        return self._solve()

    def partial_fit(self, X: Any, y: Any = None) -> RobustSpikes:
        """Add rows, then find the robust spikes of all rows so far, as soon as there is enough to find them from."""
        fresh = not hasattr(self, "_spectrum")
        if fresh:
            self._reset()
        self._accumulate(X, y, reset=fresh)
        enough = self.nonconformity == "bootstrap" or self._pairs
        return self._solve() if enough and self._spectrum_moments().count >= MIN_ROWS else self

    def _reset(self) -> None:
        self._check_parameters()
        self._spectrum: Moments | None = None
        self._paired: Moments | None = None
        self._pairs: dict[str, PairedMoments] = {}
        self._draw = check_random_state(self.random_state)

    def _accumulate(self, X: Any, y: Any, *, reset: bool) -> None:
        """Take rows into the moments; nothing here depends on how they are cut into batches, but for "bootstrap"."""
        clean = self._blocks(X, "X", reset=reset)
        if self.nonconformity == "bootstrap":
            for rows in clean:
                self._add_alone(rows)
                self._add_resampled(rows)
            return
        kinds = {} if y is None else dict(y) if isinstance(y, Mapping) else {UNNAMED: y}
        streams = {
            name: self._blocks(rows, f"y[{name!r}]" if isinstance(y, Mapping) else "y") for name, rows in kinds.items()
        }
        if not kinds or self.nonconformity in UNPAIRED:
            for rows in clean:
                self._add_alone(rows)
            for name, stream in streams.items():
                for rows in stream:
                    self._pair(name, rows).perturbed.update(rows)
            return
        for rows, *perturbed in zip_longest(clean, *streams.values()):
            if rows is None or any(block is None for block in perturbed):
                raise ValueError(f"y: must hold as many rows as X; {_NEEDS_PAIRS}")
            self._add_pairs(rows, dict(zip(streams, perturbed)))

    def _add_alone(self, rows: Tensor) -> None:
        if self._spectrum is None:
            self._spectrum = Moments(rows.shape[1], device=rows.device)
        self._spectrum.update(rows)

    def _add_pairs(self, clean: Tensor, perturbed: Mapping[str, Tensor]) -> None:
        for rows in perturbed.values():
            if rows.shape != clean.shape:
                raise ValueError(
                    f"y: expected shape {tuple(clean.shape)} like X, got {tuple(rows.shape)}; {_NEEDS_PAIRS}"
                )
        added = Moments(clean.shape[1], device=clean.device).update(clean)
        self._paired = added if self._paired is None else self._paired + added
        for name, rows in perturbed.items():
            pairs = self._pair(name, rows)
            self._pairs[name] = replace(pairs, clean=pairs.clean + added)
            # Subtracted in double precision, so that a mean that is large against the spread costs no digits.
            change = rows.double() - clean.double()
            pairs.difference.update(change.to(torch.promote_types(clean.dtype, torch.float32)))
            if self.nonconformity != "energy":
                pairs.perturbed.update(rows)

    def _add_resampled(self, rows: Tensor) -> None:
        # Poisson(1) weights are the bootstrap of a stream: no need to know n beforehand.
        for index in range(self.resamples):
            weights = torch.as_tensor(self._draw.poisson(1.0, len(rows)), device=rows.device)
            self._pair(f"resample {index}", rows).perturbed.update(rows, weights)

    def _pair(self, name: str, rows: Tensor) -> PairedMoments:
        return self._pairs.setdefault(name, PairedMoments.empty(rows.shape[1], rows.device))

    def _spectrum_moments(self) -> Moments:
        moments = self._paired if self._spectrum is None else self._spectrum
        if moments is None:
            raise ValueError("X: holds no rows (an iterator that was already read?)")
        return moments

    def _solve(self) -> RobustSpikes:
        moments = self._spectrum_moments()
        if moments.count < MIN_ROWS:
            raise ValueError(
                f"X: needs at least {MIN_ROWS} rows to estimate a spectrum, got n_samples = {moments.count:g}"
            )
        if not self._pairs:
            raise ValueError(
                f"y: nonconformity={self.nonconformity!r} needs perturbed rows; nonconformity='bootstrap' works without"
            )
        n, d = moments.count, moments.d
        if n < _ROWS_PER_COLUMN * d:
            warnings.warn(
                f"{n:g} rows for {d} columns: with fewer than {_ROWS_PER_COLUMN} rows a column the directions of weak "
                "spikes are poorly estimated",
                stacklevel=3,
            )
        full = moments.subspace(rank=int(min(d, n - self.center)), center=self.center)
        assert full.variances is not None
        eigenvalues = full.variances.cpu().numpy()
        width = _noise_dimension(moments, eigenvalues)
        rule = rank_rule(self.rank)
        law = rule if isinstance(rule, MarchenkoPastur) else MarchenkoPastur()
        self.sigma2_ = law.noise(eigenvalues, round(n), width)
        self.edge_ = random_matrix.spike_edge(round(n), width, self.sigma2_, confidence=law.confidence)
        self.aspect_ = width / n
        self.eigenvalues_ = eigenvalues
        if isinstance(rule, MarchenkoPastur):
            found = int((eigenvalues > self.edge_).sum())
        else:
            found = rule(eigenvalues, round(n), width)
        if found == 0:
            return self._solve_empty(full)
        # None where on_empty="identity" found nothing that stands out.
        self.spikes_: Any = full.truncate(found)
        self.rbns_ = self._scores(self.spikes_).cpu().numpy()
        scores = torch.from_numpy(self.rbns_)
        self.threshold_ = (
            conformal_quantile(scores, self.alpha) if isinstance(self.threshold, str) else float(self.threshold)
        )
        self.kept_ = self.rbns_ <= self.threshold_
        self.report_ = self._table()
        if not self.kept_.any():
            raise NoSpikesError(
                f"threshold: none of the {found} spikes has a score of at most {self.threshold_:g} (the smallest is "
                f"{self.rbns_.min():.4g}); the filter would be a constant. Raise the threshold or use 'quantile'"
            )
        kept = torch.from_numpy(self.kept_)
        self.subspace_: Any = self.spikes_.select(kept)
        self.correlational_: Any = None if self.kept_.all() else self.spikes_.select(~kept)
        options = {"strength": float(self.strength), "keep_norm": bool(self.keep_norm)}
        if self.space == "robust":
            self.filter_ = SpikeFilter(self.subspace_.basis, self.subspace_.center, **options)
        else:
            self.filter_ = SpikeFilter(self.spikes_.basis[:, ~kept], self.spikes_.center, removes=True, **options)
        return self

    def _solve_empty(self, full: Subspace) -> RobustSpikes:
        if self.on_empty == "raise":
            raise NoSpikesError(
                f"X: no eigenvalue stands out of the noise: the largest is {self.eigenvalues_[0]:.4g}, the edge "
                f"{self.edge_:.4g} "
                f"(noise variance {self.sigma2_:.4g}, aspect ratio {self.aspect_:.3g}); on_empty='identity' "
                "passes such rows unchanged"
            )
        self.spikes_ = self.subspace_ = self.correlational_ = None
        self.rbns_, self.kept_, self.threshold_ = np.empty(0), np.empty(0, dtype=bool), math.nan
        self.report_ = self._table()
        self.filter_ = SpikeFilter(full.basis[:, :0], full.center, removes=True)
        return self

    def _scores(self, spikes: Subspace) -> Float[Tensor, " m"]:
        named = {
            "energy": energy_score,
            "spectral": spectral_score,
            "alignment": partial(alignment_score, rank=self.rank),
            "bootstrap": partial(alignment_score, rank=spikes.dim),
        }
        score = self.nonconformity if callable(self.nonconformity) else named[self.nonconformity]
        by_kind = []
        for name, pairs in self._pairs.items():
            values = as_tensor(score(spikes, pairs), "nonconformity")
            if tuple(values.shape) != (spikes.dim,):
                raise ValueError(
                    f"nonconformity: expected {spikes.dim} values, one a spike, got shape {tuple(values.shape)}"
                )
            by_kind.append(check_finite(values.double().cpu(), f"nonconformity under {name!r}"))
        stacked = torch.stack(by_kind)
        self.rbns_by_kind_ = dict(zip(self._pairs, stacked.numpy()))
        return stacked.mean(0) if self.reduce == "mean" else stacked.amax(0)

    # ------------------------------------------------------------------ use

    def transform(self, X: Any) -> Any:
        """Filtered rows, of the kind, shape (…, d) and dtype of X."""
        check_is_fitted(self, "filter_")
        rows = self._stacked(X)
        return like(self.filter_(rows), X)

    def residual_score(self, X: Any) -> Any:
        """Share of each row's energy outside the robust spikes (…,), in [0, 1]: an alarm for attacks and drift."""
        check_is_fitted(self, "filter_")
        rows = self._stacked(X)
        if self.subspace_ is None:
            return like(rows.new_zeros(rows.shape[:-1]), X)
        flat = rows.reshape(-1, rows.shape[-1])
        coordinates, outside = self.subspace_.energies(flat)
        total = outside + coordinates.square().sum(-1)
        share = torch.where(total > 0, outside / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0).clamp(0, 1)
        return like(share.reshape(rows.shape[:-1]).to(rows.dtype), X)

    def spectrum_report(self, bins: int = 60) -> dict[str, Any]:
        """Facts for plots, JSON-able: eigenvalues, their density under the edge and Marchenko-Pastur's, the spikes."""
        check_is_fitted(self, "filter_")
        values = self.eigenvalues_[self.eigenvalues_ > _RELATIVE_ZERO * self.eigenvalues_[0]]
        noise = values[values <= self.edge_]
        edges = np.linspace(0.0, self.edge_, bins + 1)
        counts = np.histogram(noise, edges)[0]
        centers = (edges[1:] + edges[:-1]) / 2
        return {
            "aspect_ratio": float(self.aspect_),
            "sigma2": float(self.sigma2_),
            "edge": float(self.edge_),
            "eigenvalues": self.eigenvalues_.tolist(),
            "bin_edges": edges.tolist(),
            "noise_density": (counts / max(1, len(noise)) / (edges[1] - edges[0])).tolist(),
            "marchenko_pastur_density": random_matrix.mp_pdf(centers, self.aspect_, self.sigma2_).tolist(),
            "spikes": {name: column.tolist() for name, column in self.report_.items()},
        }

    def _table(self) -> dict[str, np.ndarray]:
        """One row a spike; the debiased variance and the expected squared cosine are those of the spiked model."""
        eigenvalues = self.eigenvalues_[: len(self.rbns_)]
        debiased = random_matrix.bbp_inverse(eigenvalues, self.aspect_, self.sigma2_)
        return {
            "eigenvalue": eigenvalues,
            "debiased": debiased,
            "expected_cosine2": random_matrix.bbp_cosine(debiased, self.aspect_, self.sigma2_),
            "rbns": self.rbns_,
            "kept": self.kept_,
        }

    # ------------------------------------------------------------------ rows

    def _blocks(self, X: Any, name: str, *, reset: bool = False) -> Iterator[Float[Tensor, "n d"]]:
        if name == "X" and getattr(X, "ndim", 2) == 2:
            yield from self._batches(X, reset=reset, size=self.batch_size)
            return
        for rows in batches(X if is_stream(X) else self._stacked(X, name, reset=reset).flatten(0, -2), self.batch_size):
            if rows.shape[1] != self.n_features_in_:
                raise ValueError(f"{name}: expected {self.n_features_in_} columns, got {rows.shape[1]}")
            yield rows

    def _stacked(self, X: Any, name: str = "X", *, reset: bool = False) -> Float[Tensor, "*b d"]:
        """A finite tensor (…, d): the door of all estimators for tables, and arrays of more dimensions beside it."""
        if name == "X" and not isinstance(X, Tensor) and getattr(X, "ndim", 2) <= 2:
            return self._rows(X, reset=reset, min_rows=1)
        rows = as_tensor(X, name)
        if rows.ndim < 2 or rows.is_complex():
            raise ValueError(
                f"{name}: real vectors of shape (..., d) are needed, got {tuple(rows.shape)}, {rows.dtype}"
            )
        if reset:
            self._set_width(rows.shape[-1])
        if rows.shape[-1] != self.n_features_in_:
            raise ValueError(f"{name}: expected {self.n_features_in_} columns, got {rows.shape[-1]}")
        return check_finite(rows, name)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.target_tags.required = self.nonconformity != "bootstrap"
        return tags


_NEEDS_PAIRS = "this score compares rows pair by pair (nonconformity='alignment' needs no pairs)"


def _noise_dimension(moments: Moments, eigenvalues: np.ndarray) -> int:
    """Dimensions that hold noise: constant and linearly dependent columns carry none and would distort the law."""
    variances = moments.scatter.diagonal()
    varying = int((variances > _RELATIVE_ZERO * variances.max()).sum())
    rank = int((eigenvalues > _RELATIVE_ZERO * eigenvalues[0]).sum())
    return varying if rank >= min(moments.count - 1, varying) else rank
