"""Labels that their neighbours contradict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped

from subspan.solvers import nearest


@dataclass(frozen=True)
class LabelVotes:
    """What the nearest neighbours of each row say of its label.

    Attributes
    ----------
    own
        Share (m,) of the neighbours that carry the row's label.
    suggested
        The other label (m,) that most carry; the row's own where none carries another.
    share
        How many of them (m,) carry it.
    """

    own: Float[np.ndarray, " m"]
    suggested: Shaped[np.ndarray, " m"]
    share: Float[np.ndarray, " m"]

    @property
    def scores(self) -> Float[np.ndarray, " m"]:
        """Votes for the suggested label over those for the row's own, from -1 (all agree) to 1 (all contradict)."""
        return self.share - self.own

    @property
    def suspect(self) -> Bool[np.ndarray, " m"]:
        """Rows of which four in five neighbours agree on another label."""
        return self.share >= 0.8


def label_votes(x: Any, labels: Any, k: int = 10, *, metric: str = "cosine") -> LabelVotes:
    """Ask the k nearest other rows of each row for its label.

    Parameters
    ----------
    x
        Rows (n, d), numpy or torch.
    labels
        A label for each row, of any kind that sorts.
    k
        Neighbours asked, below n.
    metric
        What is near: "cosine", "euclidean" or "inner".

    Returns
    -------
    LabelVotes

    Raises
    ------
    ValueError
        Where there are not as many labels as rows, or k is not in [1, n - 1].

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.detect import label_votes
    >>> rows = np.repeat(np.eye(2), 6, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(12, 2))
    >>> votes = label_votes(rows, ["b"] + ["a"] * 5 + ["b"] * 6, k=5)
    >>> np.flatnonzero(votes.suspect).tolist(), str(votes.suggested[0])
    ([0], 'a')
    """
    labels = np.asarray(labels)
    if labels.shape != (len(x),):
        raise ValueError(f"labels: expected {len(x)} of them, one a row, got shape {labels.shape}")
    found = nearest(x, x, k, metric=metric, exclude=torch.arange(len(x)))[1].cpu().numpy()
    return counted_votes(labels[found], labels)


def counted_votes(neighbours: Shaped[np.ndarray, "m k"], own: Shaped[np.ndarray, " m"]) -> LabelVotes:
    """The votes of neighbours whose labels are known.

    Parameters
    ----------
    neighbours
        Labels (m, k) of the neighbours of each row.
    own
        The row's own label (m,).

    Returns
    -------
    LabelVotes

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.detect import counted_votes
    >>> votes = counted_votes(np.array([["a", "a", "b"], ["b", "b", "b"]]), np.array(["a", "a"]))
    >>> votes.suspect.tolist()
    [False, True]
    """
    names, codes = np.unique(np.concatenate([neighbours.ravel(), own]), return_inverse=True)
    asked, rows = codes[: neighbours.size].reshape(neighbours.shape), codes[neighbours.size :]
    agrees = asked == rows[:, None]
    votes = np.where(agrees, 0, _votes(asked))
    best = votes.argmax(1)
    share = votes.max(1) / neighbours.shape[1]
    suggested = np.where(share > 0, asked[np.arange(len(rows)), best], rows)
    return LabelVotes(agrees.mean(1), names[suggested], share)


def _votes(asked: Int[np.ndarray, "m k"]) -> Int[np.ndarray, "m k"]:
    """How many of its row each entry equals."""
    return (asked[:, :, None] == asked[:, None, :]).sum(2)
