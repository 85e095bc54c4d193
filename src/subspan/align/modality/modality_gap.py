"""What a modality gap consists of, and what a map between modalities does to the geometry of the embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from subspan.base import as_tensor, check_matrix, normalize_rows
from subspan.base.estimators import Estimator
from subspan.base.parameters import NonNegative
from subspan.geometry import EnergyRank, Subspace, rank_rule, ridge
from subspan.geometry.rank import Rank
from subspan.solvers import nearest
from subspan.statistics import JointMoments

_RESIDUAL_ENERGY = 0.99


@dataclass(eq=False, repr=False)
class ModalityGap(Estimator):
    """Paired gaps e_x - e_y in a fixed frame: stable biases and anisotropic residuals, inside and outside a subspace.

    The frame U is the principal subspace of Cov(x) + Cov(y), V its complement. With gap Δ and mean m = E[Δ]:
    principal bias β = P_U m, orthogonal bias γ = P_V m, residuals δ = P_U(Δ - m) and ζ = P_V(Δ - m).

    Parameters
    ----------
    rank
        Of U; 0.9 is 90 % of the variance.
    frame
        A `Subspace` fitted at a reference time, used instead.
    coupling
        Ridge penalty of the regression of ζ on δ, relative to the mean variance of δ.

    Attributes
    ----------
    subspace_
        U.
    gap_
        |m|.
    principal_bias_, orthogonal_bias_
        β and γ, (d,) each.
    moments_
        Of the pairs.
    table_
        A dict of numbers: |β|, |γ|, the share of |m|² outside U, traces and effective condition numbers of Cov δ and
        Cov ζ (largest eigenvalue over the smallest within 99 % of the variance; the definition is ours), the angle in
        radians between γ and the top eigenvector of Cov ζ, and the spectral norm and R² of the coupling ζ ≈ Lδ (zeros
        where U is the whole space).

    References
    ----------
    Yu et al. (2026), arXiv 2602.07026.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import ModalityGap
    >>> y = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 5, 1, 1, 1, 1])
    >>> model = ModalityGap(rank=2).fit(y + torch.eye(6)[5], y)  # a shift outside the plane of most variance
    >>> round(model.gap_, 4), bool(model.orthogonal_bias_.norm() > 0.9)
    (1.0, True)
    """

    rank: Rank = 0.9
    frame: Subspace | None = None
    coupling: NonNegative = 1e-3

    def fit(self, X: Any, Y: Any) -> ModalityGap:
        """Decompose the gap of paired rows X (n, d) - Y (n, d). Raises ValueError for unequal shapes or NaN."""
        self._check_parameters()
        x = self._rows(X, reset=True)
        y = check_matrix(Y, "Y", columns=x.shape[1])
        d = x.shape[1]
        moments = self.moments_ = JointMoments(d, d, device=x.device).update(x, y)
        pooled = moments.cov_xx + moments.cov_yy
        if self.frame is not None and self.frame.ambient_dim != d:
            raise ValueError(f"frame: lives in {self.frame.ambient_dim} dimensions, the rows in {d}")
        self.subspace_ = self.frame or Subspace.from_covariance(pooled, count=moments.count, rank=self.rank)
        u = self.subspace_.basis.to(pooled)
        mean = moments.mean_x - moments.mean_y
        self.gap_ = float(torch.linalg.vector_norm(mean))
        self.principal_bias_ = u @ (u.mT @ mean)
        self.orthogonal_bias_ = mean - self.principal_bias_
        covariance = pooled - moments.cov_xy - moments.cov_xy.mT
        inside = u.mT @ covariance @ u
        self.table_ = {
            "frame dimension": float(self.subspace_.dim),
            "gap": self.gap_,
            "principal bias": float(torch.linalg.vector_norm(self.principal_bias_)),
            "orthogonal bias": float(torch.linalg.vector_norm(self.orthogonal_bias_)),
            "share of the bias outside": float(self.orthogonal_bias_.square().sum()) / max(self.gap_**2, 1e-300),
            "principal residual trace": float(inside.trace()),
            "principal residual condition": _effective_condition(inside),
            **self._outside(covariance, u, inside),
        }
        return self

    def _outside(
        self, covariance: Float[Tensor, "d d"], u: Float[Tensor, "d k"], inside: Float[Tensor, "k k"]
    ) -> dict[str, float]:
        names = ("trace", "condition", "angle of the bias", "coupling norm", "coupling R²")
        if u.shape[1] == u.shape[0]:
            return {f"orthogonal residual {name}": 0.0 for name in names}
        v = Subspace(u).complement().basis
        outside = v.mT @ covariance @ v
        top = torch.linalg.eigh(outside).eigenvectors[:, -1]
        bias = v.mT @ self.orthogonal_bias_
        across, along = bias - top * (top @ bias), (top @ bias).abs()
        angle = float(torch.atan2(torch.linalg.vector_norm(across), along))
        crossed = u.mT @ covariance @ v
        coupling = ridge(inside, crossed, alpha=self.coupling).matrix
        explained = 2 * (coupling @ crossed).trace() - (coupling @ inside @ coupling.mT).trace()
        trace = float(outside.trace())
        values = (
            trace,
            _effective_condition(outside),
            angle,
            float(torch.linalg.matrix_norm(coupling, 2)),
            float(explained) / trace if trace > 0 else 0.0,
        )
        return {f"orthogonal residual {name}": value for name, value in zip(names, values)}

    @staticmethod
    def gap(X: Any, Y: Any) -> float:
        """Distance between the means of two modalities, rows X (n, d) and Y (m, d), unpaired."""
        x = check_matrix(X, "X")
        y = check_matrix(Y, "Y", columns=x.shape[1])
        return float(torch.linalg.vector_norm(x.double().mean(0) - y.double().mean(0).to(x.device)))

    def frame_angle(self, other: Subspace) -> float:
        """Largest principal angle (radians) between the frame and another subspace, such as that of a later time."""
        check_is_fitted(self, "subspace_")
        return float(self.subspace_.angles(other)[-1])

    def gradient_leakage(self, gradients: Any, current: Subspace) -> tuple[float, float]:
        """Mean |P_V g| / |g| of gradients (n, d), and sin of the angle from the `current` subspace to the frame.

        Gradients that stay inside the current subspace leak at most that sine out of the frame.
        """
        check_is_fitted(self, "subspace_")
        g = as_tensor(gradients, "gradients", ndim=2)
        length = torch.linalg.vector_norm(g, dim=-1)
        if bool((length == 0).any()):
            raise ValueError(f"gradients: {int((length == 0).sum())} rows are zero and have no direction")
        outside = torch.linalg.vector_norm(Subspace(self.subspace_.basis).residual(g), dim=-1)
        return float((outside / length).mean()), math.sin(self.frame_angle(current))


def _effective_condition(covariance: Float[Tensor, "k k"]) -> float:
    """Largest eigenvalue over the smallest of those that make up 99 % of the trace."""
    values = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
    if not float(values[0]) > 0:
        return 1.0
    kept = rank_rule(EnergyRank(_RESIDUAL_ENERGY))(values.cpu().numpy(), len(values), len(values))
    return float(values[0] / values[kept - 1])


def mixing_rate(X: Any, Y: Any, k: int = 20) -> float:
    """Mean share, among the k nearest neighbours (cosine) of each row of X and Y together, of the other modality.

    About one half where the two are indistinguishable (equal numbers of rows), 0 where they are apart.

    Parameters
    ----------
    X, Y
        Rows (n, d) and (m, d).
    k
        Neighbours asked.

    Returns
    -------
    float

    Examples
    --------
    >>> import torch
    >>> from subspan.align import mixing_rate
    >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> mixing_rate(x + 20 * torch.eye(4)[0], x + 20 * torch.eye(4)[1], k=5)
    0.0
    """
    x = check_matrix(X, "X")
    y = check_matrix(Y, "Y", columns=x.shape[1]).to(x)
    rows = torch.cat([x, y])
    side = torch.arange(len(rows), device=rows.device) >= len(x)
    found = nearest(rows, rows, k, metric="cosine", exclude=torch.arange(len(rows)))[1]
    return float((side[found] != side[:, None]).double().mean())


def cosine_divergence(X: Any, Y: Any, *, bins: int = 100, pairs: int = 50_000, random_state: int = 0) -> float:
    """Jensen-Shannon divergence (nats, at most log 2) between the pairwise cosines within X and within Y.

    Parameters
    ----------
    X, Y
        Rows (n, d) and (m, d).
    bins
        Cells of the histograms over [-1, 1].
    pairs
        Random pairs of different rows of each.
    random_state
        Seed of the pairs.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        For zero rows.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import cosine_divergence
    >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> rotated = x @ torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    >>> cosine_divergence(x, rotated) < 0.01 < cosine_divergence(x, x + 2)
    True
    """
    histograms = []
    for rows, name in ((check_matrix(X, "X", min_rows=2), "X"), (check_matrix(Y, "Y", min_rows=2), "Y")):
        generator = torch.Generator().manual_seed(random_state)
        first = torch.randint(len(rows), (pairs,), generator=generator)
        # A shift by 1 … n - 1 never meets the row itself.
        second = (first + torch.randint(1, len(rows), (pairs,), generator=generator)) % len(rows)
        if bool((torch.linalg.vector_norm(rows, dim=-1) == 0).any()):
            raise ValueError(f"{name}: zero rows have no cosine")
        unit = normalize_rows(rows)
        cosines = (unit[first] * unit[second]).sum(1).double()
        histograms.append(torch.histc(cosines.cpu(), bins, -1, 1) / pairs)
    p, q = histograms
    return js_divergence(p, q)


def js_divergence(p: Float[Tensor, " m"], q: Float[Tensor, " m"]) -> float:
    """Jensen-Shannon divergence (nats) of two discrete distributions."""
    middle = (p + q) / 2
    entropy = torch.special.entr(middle).sum()
    return float((entropy - (torch.special.entr(p).sum() + torch.special.entr(q).sum()) / 2).clamp_min(0))
