"""How sure the views of an image are: entropies of their class scores, and the choice of the most confident ones."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def marginal_entropy(logits: Float[Tensor, "*b n c"], mask: Bool[Tensor, "*b n"] | None = None) -> Float[Tensor, "*b"]:
    """Entropy (nats) of the mean over n views of the softmax over c classes.

    Parameters
    ----------
    logits
        (*b, n, c).
    mask
        The views (*b, n) that count; None for all.

    Returns
    -------
    Tensor, (*b).

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import marginal_entropy
    >>> sure = torch.tensor([[50.0, 0.0], [0.0, 50.0]])  # two sure views that disagree
    >>> round(marginal_entropy(sure).exp().item(), 4), round(marginal_entropy(sure[:1]).item(), 4)
    (2.0, 0.0)
    """
    return entropy_of(log_mean_probabilities(logits.log_softmax(-1), mask))


def view_entropies(logits: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b n"]:
    """Entropy (nats) of the softmax of each view."""
    return entropy_of(logits.log_softmax(-1))


def select_confident(
    logits: Float[Tensor, "*b n c"], keep: float = 0.1, mask: Bool[Tensor, "*b n"] | None = None
) -> tuple[Int[Tensor, "*b m"], Bool[Tensor, "*b m"]]:
    """Indices of the int(keep * n) views of lowest entropy, most confident first, and which of them count.

    With unequal numbers of views m is the largest count, and the second result marks the entries beyond an image's own
    count as False. A count of 0 becomes 1, with a warning where n > 1.

    Parameters
    ----------
    logits
        (*b, n, c).
    keep
        Fraction of the views, in (0, 1].
    mask
        The views (*b, n) that exist; None for all.

    Returns
    -------
    Tensors, (*b, m) each: indices, and whether they count.

    Raises
    ------
    ValueError
        For another fraction, or an image without a view.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import select_confident
    >>> chosen, counts = select_confident(torch.tensor([[1.0, 0.0], [9.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), keep=0.5)
    >>> chosen.tolist(), counts.tolist()
    ([1, 2], [True, True])
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: a fraction of the views in (0, 1], got {keep}")
    entropy = view_entropies(logits)
    if mask is None:
        mask = torch.ones_like(entropy, dtype=torch.bool)
    available = mask.sum(-1)
    if bool((available == 0).any()):
        raise ValueError("mask: every image needs at least one view")
    counts = (keep * available.double()).long()
    if bool(((counts == 0) & (available > 1)).any()):
        warnings.warn(f"keep={keep} of {int(available.min())} views is less than one view; keeping one", stacklevel=2)
    counts = counts.clamp_min(1)
    order = entropy.masked_fill(~mask, torch.inf).argsort(dim=-1, stable=True)
    largest = int(counts.max())
    return order[..., :largest], torch.arange(largest, device=logits.device) < counts.unsqueeze(-1)


def log_mean_probabilities(log_p: Tensor, mask: Tensor | None) -> Tensor:
    """Log of the mean over views (*b, n, c) of probabilities given by their logs: (*b, c)."""
    if mask is None:
        return log_p.logsumexp(-2) - float(np.log(log_p.shape[-2]))
    log_sum = log_p.masked_fill(~mask.unsqueeze(-1), -torch.inf).logsumexp(-2)
    return log_sum - mask.sum(-1, keepdim=True).to(log_p.dtype).log()


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy (nats) of probabilities given by their logs (*b, c): (*b)."""
    # exp(-inf) (-inf) is 0 times infinity; the clamp makes it the limit, 0.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
