"""What is usually done instead: selection at random, by length, by perplexity, and by distances between rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.cluster import KMeans
from sklearn.utils import check_random_state
from torch import Tensor

from subspan.base.modules import evaluation
from subspan.geometry import check_matrix

from .leverage import budget, rank_rows


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
    """The row nearest to each of m k-means centres (each row once), ascending."""
    rows = check_matrix(X, "X").cpu()
    m = budget(n_select, len(rows))
    means: Any = KMeans(m, max_iter=50, random_state=random_state)
    centres = means.fit(rows.numpy()).cluster_centers_
    distance = torch.cdist(torch.as_tensor(centres, dtype=rows.dtype), rows)
    chosen = []
    for centre in distance:
        chosen.append(int(centre.argmin()))
        distance[:, chosen[-1]] = torch.inf
    return np.sort(np.asarray(chosen))


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
