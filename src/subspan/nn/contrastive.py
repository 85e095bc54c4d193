"""Contrastive loss with any positives and any exclusions per anchor.

InfoNCE (one positive), supervised contrast (a class of positives), CLIP's symmetric form (two modalities) and
backward-compatible training differ only in the two masks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

_LARGEST_SCALE = 100.0


def multi_positive_info_nce(
    logits: Float[Tensor, "n m"],
    positives: Bool[Tensor, "n m"] | None = None,
    excluded: Bool[Tensor, "n m"] | None = None,
    *,
    rivals: Literal["all", "negatives"] = "all",
    average: Literal["anchors", "pairs"] = "anchors",
    combine: Literal["mean-log", "log-sum"] = "mean-log",
) -> Float[Tensor, ""]:
    """Mean of -log softmax of the positives of each anchor (row), in nats.

    Anchors without a positive do not count.

    Parameters
    ----------
    logits
        Similarities over the temperature, (n anchors, m candidates).
    positives
        True for positive pairs, (n, m); None: the diagonal.
    excluded
        True for pairs that are neither positive nor negative (an anchor with itself, unknown pairs), (n, m).
    rivals
        What a positive competes with in the denominator: every pair that is not excluded ("all": SupCon's L_out) or the
        negatives alone ("negatives": Hydra).
    average
        Over "anchors", each with equal weight whatever its number of positives, or over all positive "pairs".
    combine
        Of an anchor's positives: the mean of their logarithms, which asks all of them to be near ("mean-log"), or the
        logarithm of their sum, which one near positive satisfies ("log-sum"; `rivals` decides nothing then).

    Returns
    -------
    Tensor, scalar.

    Raises
    ------
    ValueError
        When no anchor has a positive, a pair is both positive and excluded, or the default needs n = m.

    References
    ----------
    van den Oord et al. (2018); Khosla et al. (2020); Wu et al. (2024). The sum inside the logarithm as in XFactors,
    arXiv 2601.21688.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import multi_positive_info_nce
    >>> round(multi_positive_info_nce(torch.zeros(4, 4)).exp().item(), 3)
    4.0
    """
    if rivals not in ("all", "negatives"):
        raise ValueError(f"rivals: expected 'all' or 'negatives', got {rivals!r}")
    if average not in ("anchors", "pairs"):
        raise ValueError(f"average: expected 'anchors' or 'pairs', got {average!r}")
    if combine not in ("mean-log", "log-sum"):
        raise ValueError(f"combine: expected 'mean-log' or 'log-sum', got {combine!r}")
    n, m = logits.shape
    if positives is None:
        if n != m:
            raise ValueError(f"positives: needed where anchors and candidates differ in number, got {n} and {m}")
        positives = torch.eye(n, dtype=torch.bool, device=logits.device)
    if excluded is not None:
        if bool((positives & excluded).any()):
            raise ValueError("excluded: some pairs are both positive and excluded")
        logits = logits.masked_fill(excluded, -torch.inf)
    anchors = positives.any(-1)
    if not bool(anchors.any()):
        raise ValueError("positives: no anchor has one")
    logits, positives = logits[anchors], positives[anchors]
    count = positives.sum(-1)
    if combine == "log-sum":
        near = logits.masked_fill(~positives, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)
    else:
        if rivals == "all":
            log_likelihood = logits.log_softmax(-1)
        else:
            negatives = logits.masked_fill(positives, -torch.inf).logsumexp(-1, keepdim=True)
            log_likelihood = logits - torch.logaddexp(logits, negatives)
        near = log_likelihood.masked_fill(~positives, 0).sum(-1) / count
    return -(near * count).sum() / count.sum() if average == "pairs" else -near.mean()


def info_nce(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    positives: Bool[Tensor, "n m"] | None = None,
    excluded: Bool[Tensor, "n m"] | None = None,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    rivals: Literal["all", "negatives"] = "all",
    average: Literal["anchors", "pairs"] = "anchors",
    combine: Literal["mean-log", "log-sum"] = "mean-log",
) -> Float[Tensor, ""]:
    """Multi-positive InfoNCE on the cosines of queries and keys.

    Parameters
    ----------
    queries, keys
        Vectors (n, d) and (m, d), of any length.
    positives, excluded, rivals, average, combine
        As in `multi_positive_info_nce`.
    temperature
        Divides the cosines; > 0.
    symmetric
        The mean of queries → keys and keys → queries, as in CLIP.

    Returns
    -------
    Tensor, scalar, in nats.

    Raises
    ------
    ValueError
        For a temperature that is not positive, and as `multi_positive_info_nce`.

    References
    ----------
    Radford et al. (2021), CLIP; others at `multi_positive_info_nce`.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import info_nce
    >>> x = torch.eye(4)
    >>> round(info_nce(x, x).item(), 3), round(info_nce(x, x.flip(0), temperature=0.1).item(), 2)
    (0.0, 10.0)
    """
    if not bool(torch.as_tensor(temperature).detach() > 0):
        raise ValueError(f"temperature: must be positive, got {temperature}")
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).mT / temperature
    forward = multi_positive_info_nce(logits, positives, excluded, rivals=rivals, average=average, combine=combine)
    if not symmetric:
        return forward
    turned = (None if mask is None else mask.mT for mask in (positives, excluded))
    back = multi_positive_info_nce(logits.mT, *turned, rivals=rivals, average=average, combine=combine)
    return (forward + back) / 2


def nt_xent(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, temperature: float | Tensor = 0.1
) -> Float[Tensor, ""]:
    """Contrast of two views in which all other rows of both views are rivals: (2 n) anchors, 2 n - 2 rivals each.

    Parameters
    ----------
    x, y
        Vectors of the two views, row i of one with row i of the other, of any length; at least two rows.
    temperature
        Divides the cosines; > 0.

    Returns
    -------
    Tensor, scalar, in nats; log(2 n - 1) where all rows are the same.

    Raises
    ------
    ValueError
        For one row, which has no rivals, other numbers of rows, and a temperature that is not positive.

    References
    ----------
    Chen et al. (2020), SimCLR.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import nt_xent
    >>> round(nt_xent(torch.ones(4, 3), torch.ones(4, 3)).exp().item(), 3)
    7.0
    """
    n = len(x)
    if n < 2 or len(y) != n:
        raise ValueError(f"x, y: at least two rows are needed, as many of one as of the other, got {n} and {len(y)}")
    rows = torch.cat([x, y])
    itself = torch.eye(2 * n, dtype=torch.bool, device=rows.device)
    return info_nce(rows, rows, itself.roll(n, 0), itself, temperature=temperature)


class ContrastiveLoss(nn.Module):
    """Symmetric multi-positive InfoNCE with a learnt temperature.

    The call takes embeddings x (n, d) and y (m, d) and the masks of `multi_positive_info_nce`. The scale 1 /
    temperature is kept at or below 100, as in CLIP (Radford et al., 2021).

    Parameters
    ----------
    temperature
        The one at the start; at least 0.01.
    learnt
        False holds the temperature fixed.

    Raises
    ------
    ValueError
        For a temperature below 0.01.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import ContrastiveLoss
    >>> loss, x = ContrastiveLoss(temperature=0.1), torch.eye(3)
    >>> bool(loss(x, x) < loss(x, x.roll(1, 0)))
    True
    """

    def __init__(self, temperature: float = 0.07, *, learnt: bool = True) -> None:
        super().__init__()
        if not temperature >= 1 / _LARGEST_SCALE:
            raise ValueError(f"temperature: must be at least {1 / _LARGEST_SCALE}, got {temperature}")
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learnt)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The factor of the cosines, 1 / temperature."""
        return self.log_scale.exp().clamp_max(_LARGEST_SCALE)

    def forward(
        self,
        x: Float[Tensor, "n d"],
        y: Float[Tensor, "m d"],
        positives: Bool[Tensor, "n m"] | None = None,
        excluded: Bool[Tensor, "n m"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of embeddings of two modalities (or two views)."""
        return info_nce(x, y, positives, excluded, temperature=1 / self.scale, symmetric=True)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"scale={float(self.scale):.4g}, learnt={self.log_scale.requires_grad}"
