"""How far a perturbation moves the rows along each spike: scores from paired moments, and a quantile to cut them at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.geometry import RankRule, Subspace
from subspan.statistics import Moments


@dataclass(frozen=True)
class PairedMoments:
    """What a score is computed from: moments of clean rows, of their perturbed versions, and of the differences.

    Attributes
    ----------
    clean, difference
        Empty (count 0) where the two sets are not paired.
    perturbed
        Empty where the score is "energy", which does not need it.
    """

    clean: Moments
    perturbed: Moments
    difference: Moments

    @classmethod
    def empty(cls, d: int, device: torch.device | None = None) -> PairedMoments:
        """Moments of no rows in d dimensions."""
        return cls(Moments(d, device=device), Moments(d, device=device), Moments(d, device=device))


def energy_score(spikes: Subspace, pairs: PairedMoments) -> Float[Tensor, " m"]:
    """Energy of the perturbation over energy of the signal along each spike: E (u'(z' - z))^2 / E (u'(z - mean))^2.

    Parameters
    ----------
    spikes
        Its m directions u are scored.
    pairs
        With clean rows z and differences z' - z.

    Returns
    -------
    Tensor, (m,).

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import PairedMoments, energy_score
    >>> from subspan.geometry import Subspace
    >>> pairs = PairedMoments.empty(2)
    >>> _ = pairs.clean.update(torch.tensor([[4.0, 1.0], [-4.0, -1.0]]))
    >>> _ = pairs.difference.update(torch.tensor([[2.0, 3.0], [-2.0, 3.0]]))
    >>> energy_score(Subspace(torch.eye(2).double()), pairs).tolist()
    [0.25, 9.0]
    """
    signal = _energy_along(spikes, pairs.clean, spikes.center)
    noise = _energy_along(spikes, pairs.difference, None)
    return noise / signal.clamp_min(torch.finfo(signal.dtype).tiny)


def spectral_score(spikes: Subspace, pairs: PairedMoments) -> Float[Tensor, " m"]:
    """Relative change of the variance along each spike, |u'S'u - variance| / variance; needs no pairs.

    Parameters
    ----------
    spikes
        Its m directions u are scored; with variances.
    pairs
        With perturbed rows; S' is their covariance.

    Returns
    -------
    Tensor, (m,).

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import PairedMoments, spectral_score
    >>> from subspan.geometry import Subspace
    >>> pairs = PairedMoments.empty(2)
    >>> _ = pairs.perturbed.update(torch.tensor([[2.0, 1.0], [-2.0, -1.0]]))
    >>> spectral_score(Subspace(torch.eye(2).double(), variances=torch.ones(2).double()), pairs).tolist()
    [3.0, 0.0]
    """
    assert spikes.variances is not None
    changed = _energy_along(spikes, pairs.perturbed, None if spikes.center is None else pairs.perturbed.mean)
    return (changed - spikes.variances).abs() / spikes.variances


def alignment_score(
    spikes: Subspace, pairs: PairedMoments, *, rank: int | float | str | RankRule = "marchenko-pastur"
) -> Float[Tensor, " m"]:
    """Share of each spike outside those of the perturbed rows, 1 - |P'u|^2; needs no pairs.

    Parameters
    ----------
    spikes
        Its m directions u are scored.
    pairs
        With perturbed rows; P' projects to their spikes.
    rank
        Which directions of the perturbed rows are spikes.

    Returns
    -------
    Tensor, (m,), in [0, 1].

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import PairedMoments, alignment_score
    >>> from subspan.geometry import Subspace
    >>> pairs = PairedMoments.empty(2)
    >>> _ = pairs.perturbed.update(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]))
    >>> alignment_score(Subspace(torch.eye(2).double()), pairs, rank=1).tolist()
    [0.0, 1.0]
    """
    perturbed = pairs.perturbed.subspace(rank=rank, center=spikes.center is not None)
    return (1 - (perturbed.basis.mT @ spikes.basis).square().sum(0)).clamp(0, 1)


Nonconformity = Literal["energy", "alignment", "spectral", "bootstrap"]


UNPAIRED = ("alignment", "spectral")


def conformal_quantile(scores: Float[Tensor, " m"], alpha: float) -> float:
    """The ceil((m + 1)(1 - alpha))-th smallest of m scores, the largest where that exceeds m (split conformal).

    Parameters
    ----------
    scores
        (m,).
    alpha
        In (0, 1).

    Returns
    -------
    float

    Raises
    ------
    ValueError
        For another alpha.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import conformal_quantile
    >>> conformal_quantile(torch.arange(1.0, 10.0), 0.2)
    8.0
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: must lie in (0, 1), got {alpha}")
    position = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return float(scores.sort().values[min(position, len(scores)) - 1])


def _energy_along(spikes: Subspace, moments: Moments, center: Tensor | None) -> Float[Tensor, " m"]:
    """Mean square of rows along each direction, around `center` (the origin where None)."""
    basis = spikes.basis
    along = (basis * ((moments.scatter / moments.count).to(basis) @ basis)).sum(0)
    shift = moments.mean if center is None else moments.mean - center.to(moments.mean)
    return along + (shift.to(basis) @ basis).square()
