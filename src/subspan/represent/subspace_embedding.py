"""One linear embedding in parts, each with a unit length of its own, that can be split while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from subspan.geometry import Blocks, Subspace

_NARROWEST = 2


class SubspaceEmbedding(nn.Module):
    """Wx + b whose coordinates belong to learners, K consecutive slices, each scaled to unit length.

    The squared distance of two rows is the sum over slices of 2 - 2 cos: nearest neighbours are those of the mean
    cosine, of all slices and of any choice of them. Which coordinate is whose is part of the state dict, so that a
    module of one learner loads a state of several.

    Parameters
    ----------
    in_dim, out_dim
        Widths of x and of all slices together.
    n_learners
        Slices at the start, of equal width but for a remainder.

    Raises
    ------
    ValueError
        For slices of fewer than 2 coordinates, which only carry a sign.

    References
    ----------
    Adiga et al. (2022), arXiv 2206.09068; fixed slices: Sanakoyeu et al. (2019), arXiv 1906.05990.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import SubspaceEmbedding
    >>> embedding = SubspaceEmbedding(10, 8)
    >>> embedding.split(0, torch.tensor([1, 4, 6]))
    >>> embedding.blocks.sizes, embedding(torch.randn(3, 10)).detach().square().sum(-1).round(decimals=4)
    ({'0': 3, '1': 5}, tensor([2., 2., 2.]))
    """

    learner: Tensor

    def __init__(self, in_dim: int, out_dim: int = 128, *, n_learners: int = 1) -> None:
        super().__init__()
        if n_learners < 1 or out_dim // n_learners < _NARROWEST:
            raise ValueError(
                f"n_learners: slices need at least {_NARROWEST} of {out_dim} coordinates, got {n_learners}"
            )
        self.map = nn.Linear(in_dim, out_dim)
        width, rest = divmod(out_dim, n_learners)
        widths = torch.tensor([width + (place < rest) for place in range(n_learners)])
        self.register_buffer("learner", torch.arange(n_learners).repeat_interleave(widths))
        for part in self.map.weight.data.split(widths.tolist()):
            nn.init.xavier_normal_(part)
        nn.init.zeros_(self.map.bias)

    @property
    def n_learners(self) -> int:
        """K."""
        return int(self.learner.max()) + 1

    @property
    def blocks(self) -> Blocks:
        """The coordinates of each learner, named "0", "1", …"""
        return Blocks({str(place): size for place, size in enumerate(self.learner.bincount().tolist())})

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """Slices of unit length side by side."""
        parts = self.map(x).split(self.learner.bincount().tolist(), dim=-1)
        return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1)

    def slice(self, f: Float[Tensor, "n e"], *learners: int) -> Float[Tensor, "n k"]:
        """The coordinates of some learners. Raises ValueError for one that there is not."""
        return self.blocks.coordinates(f, *map(str, learners))

    @torch.no_grad()
    def split(self, learner: int, kept: Tensor | Sequence[int], optimizer: Optimizer | None = None) -> None:
        """Make two learners of one: the first keeps the places `kept` of its slice, the second starts new.

        Rows of weight and bias are put in the order of the new slices, and so is whatever the optimizer holds for each
        of them (moments, momentum); what it holds for the rows that start new becomes 0. Raises ValueError for places
        that are not in the slice, or repeated, and where one of the two would have fewer than 2.
        """
        block = self.blocks.places(str(learner))
        width = block.stop - block.start
        keep = torch.as_tensor(kept, dtype=torch.int64).cpu()
        if len(keep.unique()) != len(keep) or (len(keep) and not 0 <= int(keep.min()) <= int(keep.max()) < width):
            raise ValueError(f"kept: expected different places in [0, {width - 1}], got {keep.tolist()}")
        if not _NARROWEST <= len(keep) <= width - _NARROWEST:
            raise ValueError(f"kept: both parts need at least {_NARROWEST} of {width} coordinates, got {len(keep)}")
        rest = torch.ones(width, dtype=torch.bool).index_fill_(0, keep, False).nonzero()[:, 0]
        order = torch.arange(len(self.learner))
        order[block] = block.start + torch.cat([keep, rest])
        fresh = slice(block.start + len(keep), block.stop)
        for parameter in (self.map.weight, self.map.bias):
            at = order.to(parameter.device)
            parameter.copy_(parameter[at])
            for value in ({} if optimizer is None else optimizer.state.get(parameter, {})).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.copy_(value[at])
                    value[fresh] = 0
        nn.init.xavier_normal_(self.map.weight[fresh])
        self.map.bias[fresh] = 0
        self.learner[self.learner > learner] += 1
        self.learner[fresh] = learner + 1

    @torch.no_grad()
    def learner_subspaces(self) -> list[Subspace]:
        """What each learner reads of x: the row space of its part of W, in R^d."""
        sizes = self.learner.bincount().tolist()
        return [Subspace.span(part.double().mT) for part in self.map.weight.split(sizes)]

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"slices={list(self.blocks.sizes.values())}"


def learner_separation(subspaces: Sequence[Subspace]) -> float:
    """Mean principal angle in degrees over pairs of learners: 0 for the same subspace, 90 for orthogonal ones.

    Parameters
    ----------
    subspaces
        At least two.

    Returns
    -------
    Degrees.

    Raises
    ------
    ValueError
        For fewer than two.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Subspace
    >>> from subspan.represent import learner_separation
    >>> axes = torch.eye(4, dtype=torch.float64)
    >>> learner_separation([Subspace(axes[:, :2]), Subspace(axes[:, 2:])])
    90.0
    """
    if len(subspaces) < 2:
        raise ValueError(f"subspaces: at least two are needed, got {len(subspaces)}")
    angles = [a.angles(b).mean() for a, b in combinations(subspaces, 2)]
    return float(torch.rad2deg(torch.stack(angles).mean()))
