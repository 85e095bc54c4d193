"""The structural probe as a module: a projection, distances between neighbours in it, and labels read from it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.geometry import Subspace
from subspan.geometry.grassmann import polar, random_basis
from subspan.nn import orthonormality_penalty
from subspan.nn.orthogonal import householder_columns, householder_vectors

Constraint = Literal["soft", "stiefel"]


class ProbeReading(NamedTuple):
    """What a probe says of tokens; see `StructuralProbe`.

    Attributes
    ----------
    distances
        (l, m) between neighbours.
    labels
        (l, m, c) scores of the label between them.
    unary
        (l, n, u) scores of the label of a token.
    """

    distances: Float[Tensor, "l m"]
    labels: Float[Tensor, "l m c"]
    unary: Float[Tensor, "l n u"]


class StructuralProbe(nn.Module):
    """Tokens in l layers → z = P'h; between neighbours |z' - z|² and scores C'(z' - z); of each token scores U'z.

    The layers have parameters of their own and are computed together.

    Parameters
    ----------
    d, rank
        Width of the states and of the projection.
    labels, unary
        Numbers of labels between tokens and of tokens.
    layers
        Number of layers.
    constraint
        "soft": P is free, and `penalty` is |P'P - I|²; "stiefel": P has orthonormal columns, by Householder
        reflections, and the penalty is 0.
    subspace
        P is its basis (of one, or one a layer) and is not trained.
    generator
        Of the start: uniform in ±0.05, or a random basis.

    Raises
    ------
    ValueError
        For a rank above d, another constraint, and a subspace of other sizes.

    References
    ----------
    Hernández López et al. (ASE 2022), arXiv 2206.11719.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import StructuralProbe
    >>> probe = StructuralProbe(8, 3, labels=5, unary=2, layers=2, constraint="stiefel")
    >>> reading = probe(torch.randn(2, 6, 8))
    >>> [tuple(part.shape) for part in reading], float(probe.penalty().sum())
    ([(2, 5), (2, 5, 5), (2, 6, 2)], 0.0)
    """

    projection: Tensor
    sign: Tensor

    def __init__(
        self,
        d: int,
        rank: int,
        *,
        labels: int,
        unary: int,
        layers: int = 1,
        constraint: Constraint = "soft",
        subspace: Subspace | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if constraint not in ("soft", "stiefel"):
            raise ValueError(f"constraint: 'soft' or 'stiefel', got {constraint!r}")
        if not 1 <= rank <= d:
            raise ValueError(f"rank: from 1 to the width of the states, {d}, got {rank}")

        def start(*shape: int) -> Tensor:
            return torch.rand(layers, *shape, generator=generator) / 10 - 0.05

        self.constraint = constraint
        self.frozen = subspace is not None
        if subspace is not None:
            if subspace.batch_shape not in ((), (layers,)) or (subspace.ambient_dim, subspace.dim) != (d, rank):
                raise ValueError(f"subspace: {rank} dimensions of {d} are needed, one or {layers}, got {subspace!r}")
            self.register_buffer("projection", subspace.basis.float().expand(layers, d, rank).clone())
        elif constraint == "stiefel":
            basis = random_basis(d, rank, batch=(layers,), generator=generator, dtype=torch.float32)
            vectors, sign = householder_vectors(basis)
            self.projection = nn.Parameter(vectors)
            self.register_buffer("sign", sign)
        else:
            self.projection = nn.Parameter(start(d, rank))
        self.label_vectors = nn.Parameter(start(rank, labels))
        self.unary_vectors = nn.Parameter(start(rank, unary))

    def matrix(self) -> Float[Tensor, "l d k"]:
        """P of each layer."""
        if self.frozen or self.constraint == "soft":
            return self.projection
        return householder_columns(self.projection) * self.sign.unsqueeze(-2)

    def penalty(self) -> Float[Tensor, " l"]:
        """|P'P - I|² of each layer where P is free, else 0."""
        if self.frozen or self.constraint == "stiefel":
            return self.label_vectors.new_zeros(len(self.label_vectors))
        return orthonormality_penalty(self.projection)

    def subspaces(self) -> Subspace:
        """The spans of P, with the orthonormal bases that are nearest to it; a batch of them."""
        return Subspace(polar(self.matrix().detach().double()).float())

    def forward(self, states: Float[Tensor, "l n d"], neighbours: Int[Tensor, " m"] | None = None) -> ProbeReading:
        """Read rows of states (l, n, d).

        neighbours: rows whose next row is of the same text; None: all but the last.
        """
        z = states @ self.matrix()
        steps = z.diff(dim=1)
        if neighbours is not None:
            steps = steps[:, neighbours]
        return ProbeReading(steps.square().sum(-1), steps @ self.label_vectors, z @ self.unary_vectors)

    def extra_repr(self) -> str:
        """Shown by print."""
        layers, d, rank = self.projection.shape
        return f"layers={layers}, d={d}, rank={rank}, constraint={self.constraint}, frozen={self.frozen}"


def pairwise_rank_loss(
    predicted: Float[Tensor, "*l b t"], true: Shaped[Tensor, "b t"], mask: Bool[Tensor, "b t"], margin: float = 1.0
) -> Float[Tensor, "*l"]:
    """How far numbers are from having the order of others: the mean of relu(margin - (p_i - p_j)) where t_i > t_j.

    Parameters
    ----------
    predicted
        (…, b, t).
    true
        (b, t), of which only the order in each row counts; equal ones are not compared.
    mask
        (b, t): what counts.
    margin
        By which a larger one should be larger.

    Returns
    -------
    Tensor (…): the mean over the pairs of all rows together, so that long rows weigh more; 0 where there are none.

    References
    ----------
    Hernández López et al. (ASE 2022), as in their code; the paper writes a sum.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import pairwise_rank_loss
    >>> true, all_count = torch.tensor([[2, 1, 1]]), torch.ones(1, 3, dtype=torch.bool)
    >>> pairwise_rank_loss(torch.tensor([[3.0, 1.0, 2.5]]), true, all_count)
    tensor(0.2500)
    """
    larger = (true.unsqueeze(-1) > true.unsqueeze(-2)) & mask.unsqueeze(-1) & mask.unsqueeze(-2)
    short = F.relu(margin - (predicted.unsqueeze(-1) - predicted.unsqueeze(-2)))
    return (short * larger).sum((-3, -2, -1)) / larger.sum().clamp_min(1)


def mean_cross_entropy(scores: Float[Tensor, "l m c"], target: Int[Tensor, " m"]) -> Float[Tensor, " l"]:
    """Cross-entropy of each layer over the targets that are no -1; 0 where there are none."""
    known = target >= 0
    every = F.cross_entropy(scores[:, known].transpose(1, 2), target[known].expand(len(scores), -1), reduction="none")
    return every.sum(1) / known.sum().clamp_min(1)
