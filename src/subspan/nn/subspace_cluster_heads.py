"""Two heads on shared features, one for representations and one for memberships, and the objective that trains them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.geometry import coding_rate, compressed_coding_rate
from subspan.solvers import doubly_stochastic


class SubspaceClusterHeads(nn.Module):
    """Features (b, in_dim) → unit vectors z (b, z_dim), the representation, and c (b, z_dim), which make memberships.

    A shared linear–normalisation–ReLU–linear–ReLU trunk and one linear layer a head.
    """

    def __init__(self, in_dim: int, hidden: int = 1024, z_dim: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.feature = nn.Linear(hidden, z_dim)
        self.cluster = nn.Linear(hidden, z_dim)

    def copy_feature_to_cluster(self) -> None:
        """Start the memberships from the representation: the second head becomes a copy of the first."""
        self.cluster.load_state_dict(self.feature.state_dict())

    def forward(self, x: Float[Tensor, "b p"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """z and c, rows of unit length."""
        shared = self.trunk(x)
        return F.normalize(self.feature(shared), dim=-1), F.normalize(self.cluster(shared), dim=-1)


class TotalCodingRate(nn.Module):
    """Minus the coding rate of rows: what spreads a representation over as many directions as it has."""

    def __init__(self, eps2: float = 0.1) -> None:
        super().__init__()
        self.eps2 = _positive(eps2)

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        """The loss, in float32 or wider."""
        return -coding_rate(_wide(z), epsilon=self.eps2**0.5)


class ManifoldLinearizingLoss(nn.Module):
    """-(R(Z) - R_c(Z, G)), G the doubly stochastic membership of |c c'|: unions of orthogonal subspaces minimise it.

    eps2: squared precision of the coding rate. eta, n_iter: entropy and steps of the projection. signed: c c' without
    the absolute value. Views of the same rows may be given as (views, b, d): z is their mean, brought back to the
    sphere, and G the mean of their memberships. Computed in float32 or wider.
    Source: Ding et al. (2023), arXiv 2301.01805.
    """

    def __init__(self, eps2: float = 0.1, eta: float = 0.175, n_iter: int = 20, *, signed: bool = False) -> None:
        super().__init__()
        self.eps2, self.eta, self.n_iter, self.signed = _positive(eps2), eta, n_iter, signed

    def membership(self, c: Float[Tensor, "*a b d"]) -> Float[Tensor, "*a b b"]:
        """The doubly stochastic membership of rows of c."""
        affinity = _wide(c) @ _wide(c).mT
        return doubly_stochastic(affinity if self.signed else affinity.abs(), eta=self.eta, n_iter=self.n_iter)

    def forward(
        self, z: Float[Tensor, "*a b d"], c: Float[Tensor, "*a b d"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss, and its parts "expansion" R and "compression" R_c."""
        rows, plan = _wide(z), self.membership(c)
        if z.ndim == 3:
            rows, plan = F.normalize(rows.mean(0), dim=-1), plan.mean(0)
        expansion = coding_rate(rows, epsilon=self.eps2**0.5)
        compression = compressed_coding_rate(rows, plan, epsilon=self.eps2**0.5)
        return compression - expansion, {"expansion": expansion, "compression": compression}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positive(eps2: float) -> float:
    if not eps2 > 0:
        raise ValueError(f"eps2: must be positive, got {eps2}")
    return eps2
