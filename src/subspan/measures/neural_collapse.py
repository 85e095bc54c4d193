"""How far class means have collapsed onto a simplex, from per-class moments (Papyan, Han & Donoho, 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base import as_tensor, normalize_rows
from subspan.statistics import GroupedMoments


@dataclass(frozen=True)
class NeuralCollapse:
    """How far class means have collapsed onto a simplex; see `neural_collapse`.

    Attributes
    ----------
    within_between
        Trace of the scatter inside classes over that of their means, 0 when collapsed.
    equinorm
        Coefficient of variation of the lengths of the centred means, 0 when equal.
    equiangle
        Root mean square of cosine + 1/(C - 1) over pairs of centred means, 0 on a simplex.
    prototype_angles
        (C,) degrees between each mean and its prototype, in the order of the moments' groups; None without prototypes.
    """

    within_between: float
    equinorm: float
    equiangle: float
    prototype_angles: Float[Tensor, " c"] | None


def neural_collapse(moments: GroupedMoments, prototypes: Float[Tensor, "c d"] | None = None) -> NeuralCollapse:
    """How far class means have collapsed onto a simplex, from per-class moments.

    Parameters
    ----------
    moments
        Moments of at least 2 classes C.
    prototypes
        (C, d) one row a class, in the order of `moments.groups`; None: none.

    Returns
    -------
    NeuralCollapse.

    Raises
    ------
    ValueError
        For a single class or another number of prototypes.

    References
    ----------
    Papyan, Han & Donoho (2020), arXiv 2008.08186.

    Examples
    --------
    >>> import torch
    >>> from subspan.measures import neural_collapse
    >>> from subspan.statistics import GroupedMoments
    >>> rows = torch.eye(3).repeat(5, 1)  # every class at one corner of a simplex
    >>> found = neural_collapse(GroupedMoments(3).update(rows, torch.arange(3).repeat(5)), torch.eye(3))
    >>> [round(value, 6) for value in (found.within_between, found.equinorm, found.equiangle)]
    [0.0, 0.0, 0.0]
    """
    count = len(moments.groups)
    if count < 2:
        raise ValueError(f"moments: at least 2 classes are needed, got {count}")
    means = moments.means
    centred = means - means.mean(0)
    lengths = torch.linalg.vector_norm(centred, dim=-1)
    unit = normalize_rows(centred)
    pairs = (unit @ unit.mT)[~torch.eye(count, dtype=torch.bool, device=means.device)]
    between = float(moments.between().trace())
    inside = sum(float(part.scatter.trace()) for part in moments.by_group.values()) / float(moments.counts.sum())
    angles = None
    if prototypes is not None:
        given = as_tensor(prototypes, "prototypes", ndim=2).to(means)
        if given.shape != means.shape:
            raise ValueError(f"prototypes: expected shape {tuple(means.shape)}, got {tuple(given.shape)}")
        cosines = (normalize_rows(means) * normalize_rows(given)).sum(-1).clamp(-1, 1)
        angles = cosines.arccos() * (180 / math.pi)
    return NeuralCollapse(
        inside / between if between > 0 else math.inf,
        float(lengths.std(correction=0) / lengths.mean()),
        float((pairs + 1 / (count - 1)).square().mean().sqrt()),
        angles,
    )
