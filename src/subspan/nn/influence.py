"""The influence loss of backward-compatible training: new features classified by the old model's class means."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def influence_loss(
    features: Float[Tensor, "n d"],
    class_means: Float[Tensor, "c e"],
    labels: Int[Tensor, " n"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Cross entropy of features under a fixed linear classifier, the class means of the old model.

    A row of zeros among the means marks a class that the old model has not embedded: it is no rival, and the items of
    that class do not count.

    Parameters
    ----------
    features
        Of the new model, (n, d).
    class_means
        Of the old model, (c, d).
    labels
        Row numbers of `class_means`, (n,).
    temperature
        Divides the logits; > 0.

    Returns
    -------
    Tensor, scalar; zero where no item counts.

    Raises
    ------
    ValueError
        For labels outside the rows, another width, or a temperature <= 0.

    References
    ----------
    Shen et al., Towards Backward-Compatible Representation Learning (CVPR 2020).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import influence_loss
    >>> means = torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
    >>> influence_loss(means[:2], means, torch.tensor([0, 1])).item() < 1e-6
    True
    """
    if not temperature > 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
    if features.shape[1] != class_means.shape[1]:
        raise ValueError(f"class_means: expected {features.shape[1]} columns, got {class_means.shape[1]}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_means):
        raise ValueError(f"labels: must be row numbers of class_means, 0 … {len(class_means) - 1}")
    wide = torch.promote_types(features.dtype, class_means.dtype)
    known = (class_means != 0).any(1)
    logits = features.to(wide) @ class_means.to(wide).mT / temperature
    if bool(known.all()):
        return F.cross_entropy(logits, labels)
    kept = known[labels]
    if not bool(kept.any()):
        return logits.sum() * 0
    return F.cross_entropy(logits[kept].masked_fill(~known, -torch.inf), labels[kept])
