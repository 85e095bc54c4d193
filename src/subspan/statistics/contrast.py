"""Directions in which one set of rows has more energy than another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.geometry.covariance import signed_spectrum

from .moments import Moments


def contrast_spectrum(
    plus: Moments, minus: Moments, *, weight: float = 0.5, center: bool = False
) -> tuple[Float[Tensor, " r"], Float[Tensor, "d r"]]:
    """Eigenvalues and eigenvectors of (1 - weight) C_plus - weight C_minus.

    The leading k columns are the directions of most energy of one set minus that of the other: a basis of a `Subspace`.
    While both moments keep their rows (at most d/2 each) everything happens in the space of those, r of them, and no
    d x d matrix is made; else r = d.

    Parameters
    ----------
    plus, minus
        Moments of the two sets in the same dimension d.
    weight
        In [0, 1]; 0 is the spectrum of `plus`, 1 that of `minus` negated.
    center
        Whether C are covariances (divisor count - 1); by default second moments about the origin (divisor count).

    Returns
    -------
    Eigenvalues (r,), descending and of either sign, and eigenvectors (d, r).

    Raises
    ------
    ValueError
        For unequal dimensions and a weight outside [0, 1].

    Examples
    --------
    >>> from subspan.statistics import Moments, contrast_spectrum
    >>> plus, minus = Moments(3).update([[2.0, 0, 0], [-2.0, 0, 0]]), Moments(3).update([[0, 1.0, 0], [0, -1.0, 0]])
    >>> contrast_spectrum(plus, minus)[0][[0, -1]].round(decimals=4).tolist()
    [2.0, -0.5]
    """
    if plus.d != minus.d:
        raise ValueError(f"minus: has dimension {minus.d}, expected {plus.d}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: must lie in [0, 1], got {weight}")
    shares = ((plus, 1 - weight), (minus, weight))
    if plus.factor is not None and minus.factor is not None:
        a, b = (_rows(moments, center) * share**0.5 for moments, share in shares)
        return signed_spectrum(a, b)
    first, second = (share * (m.covariance() if center else m.second_moment()) for m, share in shares)
    values, vectors = torch.linalg.eigh(first - second)
    return values.flip(-1), vectors.flip(-1)


def _rows(moments: Moments, center: bool) -> Tensor:
    """Rows R with R'R the covariance or second moment."""
    factor = moments.factor
    assert factor is not None
    if center:
        return factor / (moments.count - 1) ** 0.5
    return torch.cat([factor / moments.count**0.5, moments.mean.unsqueeze(0)])
