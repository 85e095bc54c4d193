"""What is usually done instead: selection at random, by length, by perplexity, and by distances between rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.utils import check_random_state
from torch import Tensor

from subspan.base import check_matrix, normalize_rows
from subspan.base.modules import evaluation

from .leverage import budget, rank_rows

NEAR_DUPLICATE = 0.99
"""Cosine from which two rows count as near copies."""
_MOST_DISTANCES = 5_000_000
_BLOCK_DISTANCES = 1 << 24
_BLOCK_ROWS, _BLOCK_KEPT = 512, 16384


def random_rows(n: int, n_select: int | float, *, random_state: Any = None) -> np.ndarray:
    """Uniformly random positions without replacement, ascending."""
    drawn = check_random_state(random_state).choice(n, budget(n_select, n), replace=False)
    return np.sort(drawn)


def largest_rows(scores: Any, n_select: int | float) -> np.ndarray:
    """Positions of the largest scores (lengths, perplexities), ascending; ties keep pool order."""
    order = rank_rows(scores)
    return np.sort(order[: budget(n_select, len(order))])


def perplexity(model: torch.nn.Module, batches: Iterable[dict[str, Tensor]]) -> Iterator[Float[Tensor, " b"]]:
    """Perplexity of each sequence under a causal language model, batch by batch.

    A batch holds `input_ids` and `attention_mask` (b, t), padded on either side. The first token of a sequence is not
    predicted. Raises ValueError for a sequence of fewer than two tokens.
    """
    device = next(model.parameters()).device
    for batch in batches:
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        with torch.no_grad(), evaluation(model):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        yield token_losses(logits, ids, mask).exp()


def token_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> Float[Tensor, " b"]:
    """Mean negative log-likelihood per predicted token, for each sequence (b, t) with its logits (b, t, v)."""
    predicted = (mask[:, 1:] * mask[:, :-1]).bool()
    counts = predicted.sum(1)
    if not bool((counts > 0).all()):
        raise ValueError("batches: a sequence of fewer than two tokens has no perplexity")
    loss = torch.zeros(predicted.shape, device=logits.device)
    loss[predicted] = torch.nn.functional.cross_entropy(
        logits[:, :-1][predicted].float(), ids[:, 1:][predicted], reduction="none"
    )
    return loss.sum(1) / counts


def k_center(X: Any, n_select: int | float, *, random_state: Any = None) -> np.ndarray:
    """Greedy k-centre: each row chosen is the one farthest from those chosen (Gonzalez, 1985). In order of choice.

    Starts from a random row; O(n m d) time, O(n d) memory.
    """
    rows = check_matrix(X, "X")
    m = budget(n_select, len(rows))
    chosen = [int(check_random_state(random_state).randint(len(rows)))]
    nearest = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < m:
        nearest[chosen[-1]] = -1  # duplicates of chosen rows are at distance 0 and remain available
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(1))
    return np.asarray(chosen)


def k_medoids(X: Any, n_select: int | float, *, random_state: Any = None) -> np.ndarray:
    """The row nearest to each of m k-means centres (each row once), ascending.

    Lloyd's algorithm; where n m is above 5 million, on batches (Sculley, 2010), as it would take hours.
    """
    rows = check_matrix(X, "X").cpu()
    m = budget(n_select, len(rows))
    means: Any
    if len(rows) * m <= _MOST_DISTANCES:
        means = KMeans(m, max_iter=50, random_state=random_state)
    else:
        means = MiniBatchKMeans(m, max_iter=5, n_init=1, batch_size=max(4096, m), random_state=random_state)  # pyright: ignore[reportArgumentType]
    centres = torch.as_tensor(means.fit(rows.numpy()).cluster_centers_, dtype=rows.dtype)
    taken = torch.zeros(len(rows), dtype=torch.bool)
    for block in centres.split(max(1, _BLOCK_DISTANCES // len(rows))):
        for distance in torch.cdist(block, rows):
            taken[distance.masked_fill_(taken, torch.inf).argmin()] = True
    return taken.nonzero()[:, 0].numpy()


def distinct_rows(X: Any, cosine: float = NEAR_DUPLICATE) -> np.ndarray:
    """Positions, ascending, of rows that are no copy or near copy (a cosine of at least `cosine`) of an earlier one.

    Of two rows that are near copies of the same third but not of each other only the third stays. Zero rows, which have
    no direction, all stay. O(n m d) time for m rows that stay.
    """
    if not 0 < cosine <= 1:
        raise ValueError(f"cosine: must lie in (0, 1], got {cosine}")
    unit = normalize_rows(check_matrix(X, "X").to(torch.float32, copy=True))
    limit = cosine - 1e-6  # what rounding takes from the cosine of equal rows
    kept, count = torch.empty_like(unit), 0
    positions = []
    for start, block in zip(range(0, len(unit), _BLOCK_ROWS), unit.split(_BLOCK_ROWS)):
        fresh = torch.ones(len(block), dtype=torch.bool, device=unit.device)
        for first in range(0, count, _BLOCK_KEPT):
            earlier = kept[first : min(first + _BLOCK_KEPT, count)]
            fresh &= (block @ earlier.mT).amax(1) < limit
        own = block @ block.mT >= limit
        for row in fresh.nonzero()[:, 0].tolist():
            if bool(fresh[row]):
                fresh[row + 1 :] &= ~own[row, row + 1 :]
        found = block[fresh]
        kept[count : count + len(found)] = found
        count += len(found)
        positions.append(start + fresh.nonzero()[:, 0])
    return torch.cat(positions).cpu().numpy()


def herding(X: Any, n_select: int | float) -> np.ndarray:
    """Rows whose running mean stays nearest to the pool's mean (Welling, 2009; nearest mean). In order of choice."""
    rows = check_matrix(X, "X")
    rows = rows - rows.mean(0)
    squares = rows.square().sum(1)
    total = torch.zeros_like(rows[0])
    chosen: list[int] = []
    for _ in range(budget(n_select, len(rows))):
        # |total + x|^2 over the candidates; the mean's divisor is the same for all.
        distance = squares + 2 * (rows @ total)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + rows[chosen[-1]]
    return np.asarray(chosen)
