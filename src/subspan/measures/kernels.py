"""The Gaussian kernel and its random features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def squared_distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """|x_i - y_j|^2, not below zero; centre rows that are far from the origin first.

    Parameters
    ----------
    x, y
        Rows (n, d) and (m, d).

    Returns
    -------
    Tensor, (n, m).

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import squared_distances
    >>> squared_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([[25.,  1.]])
    """
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.mT).clamp_min(0)


def median_bandwidth(x: Float[Tensor, "n d"]) -> float:
    """Median distance between rows that are apart: the usual width of a Gaussian kernel.

    Parameters
    ----------
    x
        Rows (n, d).

    Returns
    -------
    Width > 0; 1 where no rows are apart.

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import median_bandwidth
    >>> round(median_bandwidth(torch.tensor([[0.0], [0.0], [2.0]])), 4)
    2.0
    """
    return _median_square(_own_distances(x)) ** 0.5


def gaussian_kernel(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None, *, bandwidth: float | str = "median"
) -> Float[Tensor, "n m"]:
    """exp(-|x_i - y_j|^2 / (2 bandwidth^2)); differentiable in the rows, the median taken as a constant.

    Parameters
    ----------
    x, y
        Rows (n, d) and (m, d); y None: x.
    bandwidth
        Number > 0, or "median", the median of the distances that are not zero.

    Returns
    -------
    Tensor, (n, m).

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import gaussian_kernel
    >>> gaussian_kernel(torch.tensor([[0.0], [2.0]]), bandwidth=2.0)
    tensor([[1.0000, 0.6065],
            [0.6065, 1.0000]])
    """
    if y is None:
        squared = _own_distances(x)
    else:
        # Distances do not change with the origin, and near it their differences keep their digits.
        squared = squared_distances(x - y.mean(0), y - y.mean(0))
    if isinstance(bandwidth, str):
        if bandwidth != "median":
            raise ValueError(f"bandwidth: expected a number > 0 or 'median', got {bandwidth!r}")
        return torch.exp(-squared / (2 * _median_square(squared)))
    if not bandwidth > 0:
        raise ValueError(f"bandwidth: must be > 0, got {bandwidth}")
    return torch.exp(-squared / (2 * bandwidth**2))


def _own_distances(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return squared_distances(centred, centred).fill_diagonal_(0)


def _median_square(squared: Tensor) -> float:
    apart = squared.detach()[squared.detach() > 0]
    return float(apart.median()) if len(apart) else 1.0


@dataclass(frozen=True, eq=False)
class RandomFeatures:
    """Random Fourier features: inner products of `features(x)` approach a Gaussian kernel as m grows, at O(n m) memory.

    The error falls as 1 / sqrt(m).

    Parameters
    ----------
    frequencies
        (d, m), drawn from the kernel's spectrum; see `gaussian`.
    phases
        (m,), uniform on [0, 2 pi).

    References
    ----------
    Rahimi & Recht (2007), Random features for large-scale kernel machines.

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import RandomFeatures, gaussian_kernel
    >>> x = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    >>> z = RandomFeatures.gaussian(2, 10000, bandwidth=1.0, generator=torch.Generator().manual_seed(0)).features(x)
    >>> bool(((z @ z.T) - gaussian_kernel(x, bandwidth=1.0)).abs().max() < 0.05)
    True
    """

    frequencies: Float[Tensor, "d m"]
    phases: Float[Tensor, " m"]

    @classmethod
    def gaussian(
        cls,
        d: int,
        n_features: int,
        bandwidth: float,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RandomFeatures:
        """Features of `gaussian_kernel` with this bandwidth: frequencies N(0, 1 / bandwidth^2)."""
        if d < 1 or n_features < 1 or not bandwidth > 0:
            raise ValueError(f"d, n_features, bandwidth: must be positive, got {d}, {n_features} and {bandwidth}")
        options = {"generator": generator, "dtype": dtype, "device": device or getattr(generator, "device", None)}
        frequencies = torch.randn(d, n_features, **options) / bandwidth
        return cls(frequencies, 2 * torch.pi * torch.rand(n_features, **options))

    def features(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        """sqrt(2 / m) cos(x frequencies + phases)."""
        angles = x @ self.frequencies.to(x) + self.phases.to(x)
        return angles.cos() * (2 / len(self.phases)) ** 0.5
