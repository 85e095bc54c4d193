"""Subspaces in which an attention head looks for what it retrieves, and those in which states differ by class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subspan.geometry import RankRule, Subspace
from subspan.models import head_weights


def retrieval_subspace(
    model: nn.Module,
    layer: int | str,
    head: int,
    *,
    side: Literal["key", "query"] = "key",
    rank: int | float | str | RankRule | None = None,
) -> Subspace:
    """Directions that a head compares: of what it looks at (key), or of what looks (query).

    The head's score is q' M k with M = W_Q' W_K, of rank d_head at most; the key side is spanned by the right singular
    vectors of M, the query side by the left ones, strongest first. Its states are what goes into attention, after the
    norm before it. Rotary positions turn queries and keys inside the head: they do not change what the subspaces of
    full rank are, but the order of directions is that of a head without them.

    Parameters
    ----------
    model, layer, head
        As in `head_weights`.
    side
        "key" or "query".
    rank
        Directions kept, as in `Subspace.fit`; None: all of M, d_head as a rule.

    Returns
    -------
    Subspace whose variances times d_head are the squared singular values of M.

    Raises
    ------
    ValueError
        For another side, and as `head_weights`.

    References
    ----------
    Cho et al. (ICLR 2025), arXiv 2410.04468.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2Model
    >>> from subspan.probe import retrieval_subspace
    >>> model = GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2))
    >>> retrieval_subspace(model, 1, 0).basis.shape
    torch.Size([8, 4])
    """
    if side not in ("key", "query"):
        raise ValueError(f"side: 'key' or 'query', got {side!r}")
    query, key = (weight.double() for weight in head_weights(model, layer, head))
    other, own = (query, key) if side == "key" else (key, query)
    # M'M = W_K' (W_Q W_Q') W_K = (R W_K)' (R W_K) with W_Q' = QR: nothing of d × d is made.
    factor = torch.linalg.qr(other.mT, mode="r").R @ own
    size = int(torch.linalg.matrix_rank(factor))
    found = Subspace.from_factor(factor, count=len(own), rank=size if rank is None else rank)
    return found.to(torch.promote_types(next(model.parameters()).dtype, torch.float32))


def task_subspace(centroids: Float[Tensor, "c d"]) -> Subspace:
    """The subspace through class means: their differences span it, their mean is its centre.

    Parameters
    ----------
    centroids
        One a class, at least two.

    Returns
    -------
    Subspace of c - 1 dimensions (d, where that is less).

    Raises
    ------
    ValueError
        For fewer than two, or equal ones.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import task_subspace
    >>> task_subspace(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).dim
    2
    """
    if len(centroids) < 2:
        raise ValueError(f"centroids: at least two are needed, got {len(centroids)}")
    return Subspace.fit(centroids, rank=min(len(centroids) - 1, centroids.shape[1]))


@dataclass(frozen=True)
class ClassCentroids:
    """Mean states of classes in every layer, and the nearest one as a classifier; see `fit`.

    Attributes
    ----------
    means
        (layers, classes, d), double precision.
    classes
        (classes,) their numbers, ascending.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import ClassCentroids
    >>> states = torch.tensor([[[0.0], [0.2], [1.0], [1.2]]])
    >>> found = ClassCentroids.fit(states, torch.tensor([0, 0, 1, 1]))
    >>> found.predict(torch.tensor([[[0.3], [0.9]]])).tolist()
    [[0, 1]]
    """

    means: Float[Tensor, "l c d"]
    classes: Int[Tensor, " c"]

    @classmethod
    def fit(cls, states: Float[Tensor, "l n d"], labels: Tensor, expected: Sequence[int] = ()) -> ClassCentroids:
        """Means of the states of each class; of `expected` classes, those without a state are left out with a warning.

        Raises ValueError for states that are not finite, other numbers of labels, and fewer than two classes.
        """
        if len(labels) != states.shape[1]:
            raise ValueError(f"labels: {states.shape[1]} are needed, one a state, got {len(labels)}")
        if not bool(states.isfinite().all()):
            raise ValueError("states: contain NaN or infinity")
        classes, place = torch.unique(labels, return_inverse=True)
        missing = sorted(set(expected) - set(classes.tolist()))
        if missing:
            warnings.warn(f"labels: no state of class {', '.join(map(str, missing))}; it is left out", stacklevel=2)
        if len(classes) < 2:
            raise ValueError(f"labels: at least two classes are needed, got {len(classes)}")
        counts = torch.bincount(place).unsqueeze(1)
        total = torch.zeros(len(states), len(classes), states.shape[2], dtype=torch.float64)
        return cls(total.index_add_(1, place, states.double()) / counts, classes)

    def predict(self, states: Float[Tensor, "l n d"]) -> Int[Tensor, "l n"]:
        """The class whose mean is nearest (Euclidean), by layer."""
        return self.classes[torch.cdist(states.double(), self.means).argmin(-1)]

    def accuracy(self, states: Float[Tensor, "l n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, " l"]:
        """Share of states whose class is that of the nearest mean, by layer."""
        return (self.predict(states) == labels).double().mean(1)

    def subspace(self, layer: int) -> Subspace:
        """Of the means of a layer; see `task_subspace`."""
        return task_subspace(self.means[layer])
