"""The margin loss of metric learning with the nearest negatives beyond a distance (Wu et al., 2017)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_SMALLEST = 1e-8


class NearestNegativeSampler(nn.Module):
    """For each anchor all of its class, and as many of other classes: the nearest ones that are not within `cutoff`.

    Very near negatives have gradients that are mostly noise.

    Parameters
    ----------
    cutoff
        Distance below which there are no negatives; >= 0.

    Raises
    ------
    ValueError
        For a negative cutoff.

    References
    ----------
    Wu et al. (2017), arXiv 1706.07567; the nearest ones in place of weighted draws are those of Sanakoyeu et al.
    (2019) and Adiga et al. (2022). Each anchor keeps its own pairs here; their code shifts them between anchors where
    numbers differ.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import NearestNegativeSampler
    >>> places = torch.tensor([0.0, 0.1, 0.3, 0.9, 2.0])
    >>> distances = (places[:, None] - places).abs()
    >>> positives, negatives = NearestNegativeSampler()(distances, torch.tensor([0, 0, 1, 1, 1]))
    >>> negatives[0].nonzero()[:, 0].tolist()  # of 2, 3 and 4 the first is too near
    [3]
    """

    def __init__(self, cutoff: float = 0.5) -> None:
        super().__init__()
        if not cutoff >= 0:
            raise ValueError(f"cutoff: must be 0 or more, got {cutoff}")
        self.cutoff = cutoff

    def forward(
        self, distances: Float[Tensor, "n n"], labels: Int[Tensor, " n"]
    ) -> tuple[Bool[Tensor, "n n"], Bool[Tensor, "n n"]]:
        """Masks of positives and of negatives, a row an anchor."""
        same = labels[:, None] == labels
        positives = same.clone().fill_diagonal_(False)
        eligible = ~same & (distances >= self.cutoff)
        counts = positives.sum(-1, keepdim=True)
        near = distances.detach().masked_fill(~eligible, torch.inf).topk(int(counts.max()), largest=False)
        kept = torch.arange(near.indices.shape[-1], device=distances.device) < counts
        negatives = torch.zeros_like(eligible).scatter_(-1, near.indices, kept & near.values.isfinite())
        return positives, negatives

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"cutoff={self.cutoff}"


class MarginLoss(nn.Module):
    """Positives nearer than beta - margin and negatives farther than beta + margin: the mean of what is missing.

    Over the pairs that miss something; 0 where none does.

    Parameters
    ----------
    beta
        The boundary, fixed.
    margin
        On both sides of it; >= 0.
    sampler
        ``sampler(distances, labels)`` → masks of positives and negatives (n, n); by default `NearestNegativeSampler()`.

    Raises
    ------
    ValueError
        For a beta that is not positive, or a negative margin.

    References
    ----------
    Wu et al. (2017), arXiv 1706.07567: beta 1.2, margin 0.2.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import MarginLoss
    >>> loss, labels = MarginLoss(), torch.tensor([0, 0, 1, 1])
    >>> corners = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    >>> float(loss(corners, labels)), round(float(loss(corners, torch.tensor([0, 1, 0, 1]))), 4)
    (0.0, 1.0)
    """

    def __init__(self, beta: float = 1.2, margin: float = 0.2, sampler: nn.Module | None = None) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta: must be positive, got {beta}")
        if not margin >= 0:
            raise ValueError(f"margin: must be 0 or more, got {margin}")
        self.beta, self.margin = beta, margin
        self.sampler = NearestNegativeSampler() if sampler is None else sampler

    def forward(self, z: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """The loss of rows, usually of unit length, by their Euclidean distances."""
        square = z.square().sum(-1)
        squares = square[:, None] + square - 2 * z @ z.mT
        positives, negatives = self.sampler(squares.detach().clamp_min(_SMALLEST).sqrt(), labels)
        pairs = (positives | negatives).nonzero(as_tuple=True)
        beyond = squares[pairs].clamp_min(_SMALLEST).sqrt() - self.beta
        missing = (torch.where(positives[pairs], beyond, -beyond) + self.margin).relu()
        return missing.sum() / (missing > 0).sum().clamp_min(1)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"beta={self.beta}, margin={self.margin}"
