"""Latents whose mean is affine in the actions, whatever the actions: the constraint that identifies them (Rep4Ex)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base import check_finite
from subspan.geometry import Subspace, Whitener
from subspan.measures import RandomFeatures, gaussian_kernel, median_bandwidth

Kernel = Literal["features", "exact"]
# The median distance of so many rows is that of all, for the width of a kernel.
_MEDIAN_ROWS = 256


def kernel_width(rows: Float[Tensor, "n p"]) -> float:
    """Median distance of rows that are apart, of some of them, spread over all."""
    return median_bandwidth(rows[:: max(1, len(rows) // _MEDIAN_ROWS)])


def without_linear(rows: Float[Tensor, "n m"], actions: Float[Tensor, "n p"]) -> Float[Tensor, "n m"]:
    """What a least-squares fit on the actions and a constant leaves of rows; dependent columns of actions are fine."""
    span = Subspace.span(actions - actions.mean(0)).basis.to(rows)
    centred = rows - rows.mean(0)
    return centred - span @ (span.mT @ centred)


class LinearInvarianceLoss(nn.Module):
    """Q = E[psi' k(A, A') psi'] of what a linear fit on the actions A leaves of latents, psi: 0 where E[psi | A] = 0.

    Latents z of an invertible encoder for which it is 0 are affine in the hidden state Z, where Z = M A + V drives the
    data: the encoder is identified as far as predictions of unseen actions need. ``loss(z, a)`` is added, times a
    weight, to the loss of any encoder.

    Parameters
    ----------
    kernel
        "features": random features of the Gaussian kernel, drawn anew at every call, in O(n m d); the mean over calls
        is the exact kernel's value. "exact": all pairs, O(n²).
    n_features
        m.
    bandwidth
        Width of the kernel in the units of the actions, or "median" of the distances between (256) actions.
    whiten
        Latents are brought to unit covariance in the batch first, so that Q does not change with an invertible affine
        map of them, and shrinking them does not lower it.
    generator
        Of the draws.

    Raises
    ------
    ValueError
        For settings out of range; in use for constant latents or actions, and numbers of rows that do not fit.

    Notes
    -----
    By the theorem of Frisch and Waugh the linear part is taken out of the features and not out of latents: there is no
    inner regression to differentiate. It is the V-statistic (pairs i = j count), which is never negative. The unbiased
    one, with the fit from the same batch, is negative in the mean without any dependence, the more so the larger the
    residuals: an encoder lowers it by hiding the actions.

    References
    ----------
    Saengkyongam, Rosenfeld, Ravikumar, Pfister & Peters (2024), arXiv 2310.04295. Whitening and random features are
    ours.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import LinearInvarianceLoss
    >>> a = torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    >>> v = torch.randn(500, 1, generator=torch.Generator().manual_seed(1))
    >>> loss = LinearInvarianceLoss("exact")
    >>> bool(loss(2 * a + v, a) < 0.01), bool(loss((2 * a + v).exp(), a) > loss(2 * a + v, a))
    (True, True)
    """

    def __init__(
        self,
        kernel: Kernel = "features",
        *,
        n_features: int = 128,
        bandwidth: float | Literal["median"] = "median",
        whiten: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if kernel not in ("features", "exact"):
            raise ValueError(f"kernel: expected 'features' or 'exact', got {kernel!r}")
        if n_features < 1:
            raise ValueError(f"n_features: at least 1, got {n_features}")
        if bandwidth != "median" and (isinstance(bandwidth, str) or not bandwidth > 0):
            raise ValueError(f"bandwidth: expected a number > 0 or 'median', got {bandwidth!r}")
        self.kernel, self.n_features, self.bandwidth, self.whiten = kernel, n_features, bandwidth, whiten
        self.generator = generator

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"kernel={self.kernel!r}, bandwidth={self.bandwidth}, whiten={self.whiten}"

    def forward(self, z: Float[Tensor, "n d"], a: Float[Tensor, "n p"]) -> Float[Tensor, ""]:
        """The value for latents z under actions a, in float32 or wider; differentiable in z."""
        z, a = self._checked(z, a)
        with torch.autocast(z.device.type, enabled=False):
            if self.whiten:
                z = white_latents(z)
            width = kernel_width(a) if isinstance(self.bandwidth, str) else self.bandwidth
            if self.kernel == "exact":
                residual = without_linear(z, a)
                return (residual * (gaussian_kernel(a, bandwidth=width) @ residual)).sum() / len(z) ** 2
            options = {"generator": self.generator, "dtype": a.dtype, "device": a.device}
            drawn = RandomFeatures.gaussian(a.shape[1], self.n_features, width, **options)
            return (z.mT @ without_linear(drawn.features(a), a) / len(z)).square().sum()

    def _checked(self, z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        if len(z) != len(a):
            raise ValueError(f"a: expected {len(z)} rows, one for each of z, got {len(a)}")
        if len(z) < (needed := a.shape[1] + z.shape[1] + 2):
            raise ValueError(f"z: {z.shape[1]} latents and {a.shape[1]} actions need {needed} rows, got {len(z)}")
        wide = torch.promote_types(z.dtype, torch.float32)
        a = check_finite(a.detach(), "a").to(z.device, wide)
        if not bool((a != a[0]).any()):
            raise ValueError("a: all actions are the same; they say nothing of latents")
        return z.to(wide), a


def white_latents(z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Latents with mean 0 and unit covariance in the batch, differentiably."""
    centred = z - z.mean(0)
    return Whitener.of(centred.mT @ centred / len(z)).whiten(centred)


class InvarianceTest(NamedTuple):
    """Whether latents keep to the linear-invariance constraint.

    Attributes
    ----------
    value
        Q.
    reference
        Its mean when residuals are dealt to actions at random: what is left of it without any dependence.
    p_value
        Share of such deals, with the one that is there, whose Q is as large.
    """

    value: float
    reference: float
    p_value: float


def linear_invariance_test(
    z: Float[Tensor, "n d"],
    a: Float[Tensor, "n p"],
    *,
    n_features: int = 256,
    bandwidth: float | Literal["median"] = "median",
    permutations: int = 199,
    generator: torch.Generator | None = None,
) -> InvarianceTest:
    """Permutation test of E[psi | A] = 0, for residuals psi of a linear fit of latents z on actions a.

    Where Z = M A + V with V independent of A, and latents are affine in Z, residuals do not depend on the actions, and
    the test is exact up to the fit. A small p-value says that the latents are not affine in such a Z: the training was
    too short, the weight of the constraint too small, or the actions do not move Z linearly.

    Parameters
    ----------
    z, a
        Rows (n, d) and (n, p), best of data that the encoder was not trained on.
    n_features, bandwidth
        As in `LinearInvarianceLoss`.
    permutations
        Random deals, at least 1.
    generator
        Of the features and the deals.

    Returns
    -------
    InvarianceTest.

    Raises
    ------
    ValueError
        As `LinearInvarianceLoss`, and for `permutations` below 1.

    References
    ----------
    Freedman & Lane (1983) for residuals dealt at random.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import linear_invariance_test
    >>> a = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0))
    >>> z = 2 * a + torch.randn(2000, 1, generator=torch.Generator().manual_seed(1))
    >>> draws = torch.Generator().manual_seed(2)
    >>> linear_invariance_test(z, a, generator=draws).p_value > 0.05
    True
    >>> linear_invariance_test(z + z.square(), a, generator=draws).p_value
    0.005
    """
    if permutations < 1:
        raise ValueError(f"permutations: at least 1, got {permutations}")
    loss = LinearInvarianceLoss(n_features=n_features, bandwidth=bandwidth, generator=generator)
    z, a = loss._checked(z.detach(), a)
    residual = without_linear(white_latents(z), a)
    width = kernel_width(a) if isinstance(bandwidth, str) else bandwidth
    drawn = RandomFeatures.gaussian(a.shape[1], n_features, width, generator=generator, dtype=a.dtype)
    features = without_linear(drawn.features(a), a) / len(z)
    value = float((residual.mT @ features).square().sum())
    deals = [torch.randperm(len(z), generator=generator) for _ in range(permutations)]
    others = torch.stack([(residual[deal].mT @ features).square().sum() for deal in deals])
    return InvarianceTest(value, float(others.mean()), (1 + int((others >= value).sum())) / (1 + permutations))
