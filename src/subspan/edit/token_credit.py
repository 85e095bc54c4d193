"""Rival weights of the tokens of wrong answers: none at all, by what they pull right answers down, by entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Groups = Sequence[Any] | Tensor | np.ndarray


def answer_groups(
    mask: Bool[Tensor, "b t"], positive: Bool[Tensor, " b"], groups: Groups, **fitting: Tensor
) -> Iterator[tuple[Bool[Tensor, "b t"], Bool[Tensor, "b t"]]]:
    """Of each prompt, in order, the tokens of its right answers and those of its wrong ones.

    fitting: tensors (b, t, …) that must go with the mask. Raises ValueError where shapes do not fit.
    """
    names = groups.tolist() if isinstance(groups, Tensor | np.ndarray) else list(groups)
    shapes = {name: tuple(value.shape[:2]) for name, value in fitting.items()}
    if set(shapes.values()) - {tuple(mask.shape)} or {len(positive), len(names)} - {len(mask)}:
        raise ValueError(
            f"{', '.join([*shapes, 'mask, positive, groups'])}: {', '.join(map(str, shapes.values()))}, "
            f"{tuple(mask.shape)}, {len(positive)} and {len(names)} do not fit"
        )
    positive = positive.to(mask.device)
    for group in dict.fromkeys(names):
        inside = torch.tensor([each == group for each in names], device=mask.device)
        yield mask & (inside & positive).unsqueeze(1), mask & (inside & ~positive).unsqueeze(1)


def finite(rows: Float[Tensor, "m d"], name: str) -> Float[Tensor, "m d"]:
    """Rows in float32. Raises ValueError for NaN and infinity."""
    wide = rows.float()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"{name}: NaN or infinity at a token of the mask")
    return wide


def reinforce_advantages(
    positive: Bool[Tensor, " b"], *, positive_weight: float = 0.1, negative_weight: float = 1.0
) -> Float[Tensor, " b"]:
    """Advantages of answers without a baseline: what is wrong is punished, what is right rewarded less, or not at all.

    Parameters
    ----------
    positive
        (b,) answers that the verifier takes for right.
    positive_weight
        λ: 0.1 is W-REINFORCE, 0 is NSR (wrong answers alone), and 1 with `negative_weight` 0 is PSR.
    negative_weight
        Of wrong answers.

    Returns
    -------
    Tensor (b,): λ for right answers, minus the other weight for wrong ones.

    Raises
    ------
    ValueError
        For negative weights.

    References
    ----------
    Zhu et al. (2025), The surprising effectiveness of negative reinforcement, arXiv 2506.01347.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import reinforce_advantages
    >>> reinforce_advantages(torch.tensor([True, False]))
    tensor([ 0.1000, -1.0000])
    """
    for name, value in (("positive_weight", positive_weight), ("negative_weight", negative_weight)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: must be 0 or more and finite, got {value}")
    return torch.where(positive, float(positive_weight), -float(negative_weight))


def entropy_mask(entropies: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], top: float = 0.2) -> Bool[Tensor, "b t"]:
    """The tokens that are decided least: those whose entropy is in the top share of all that count. The rival in trl.

    Parameters
    ----------
    entropies
        (b, t) of the policy's next-token distributions.
    mask
        (b, t) tokens of the answers.
    top
        Share that is kept, in (0, 1].

    Returns
    -------
    Tensor (b, t), False outside of the mask.

    Raises
    ------
    ValueError
        For a share out of range.

    References
    ----------
    Wang et al. (2025), Beyond the 80/20 rule, arXiv 2506.01939.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import entropy_mask
    >>> entropy_mask(torch.tensor([[0.1, 2.0, 0.3, 9.0]]), torch.tensor([[True, True, True, False]]), top=0.4)
    tensor([[False,  True, False, False]])
    """
    if not 0 < top <= 1:
        raise ValueError(f"top: must lie in (0, 1], got {top}")
    if not bool(mask.any()):
        return mask.clone()
    return mask & (entropies >= torch.quantile(entropies[mask].float(), 1 - top))


def head_interference(
    states: Float[Tensor, "m d"],
    errors: Float[Tensor, "m v"],
    other_states: Float[Tensor, "n d"],
    other_errors: Float[Tensor, "n v"],
) -> Float[Tensor, "m n"]:
    """Inner products of the gradients of the output layer at two sets of tokens: <δ, δ'> <x, x'>.

    A small step down on the one token changes the log-likelihood of the other by minus the step times that.

    Parameters
    ----------
    states, other_states
        Inputs x (m, d) and (n, d) of the output layer.
    errors, other_errors
        δ = softmax - target (m, v) and (n, v).

    Returns
    -------
    Tensor (m, n); no gradient (v, d) is formed.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import head_interference
    >>> x, delta = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -0.5]])
    >>> head_interference(x, delta, x, delta)
    tensor([[2.5000]])
    """
    return (errors @ other_errors.mT) * (states @ other_states.mT)


@torch.no_grad()
def hidden_reward_weights(
    states: Float[Tensor, "b t d"],
    errors: Float[Tensor, "b t v"],
    mask: Bool[Tensor, "b t"],
    positive: Bool[Tensor, " b"],
    groups: Groups,
    *,
    threshold: float = 1.0,
    spared: float | None = None,
) -> Float[Tensor, "b t"]:
    """NTHR: tokens of wrong answers whose punishment would pull the right answers down are spared.

    A token's score is the sum of `head_interference` with all tokens of its prompt's right answers. It is spared where
    that is above `threshold` times what the tokens of a right answer score in the mean, of the answer with the least.

    Parameters
    ----------
    states
        Inputs (b, t, d) of the output layer at the positions that predict the tokens.
    errors
        (b, t, v) softmax - target there.
    mask
        (b, t) tokens that are answers; what lies outside is never read.
    positive
        (b,) answers that the verifier takes for right.
    groups
        (b,) the prompt of each.
    threshold
        β.
    spared
        Weight η of what is spared, in [0, 1]; None: 2 |0.5 - p| with p the share of right answers in the group.

    Returns
    -------
    Tensor (b, t), 1 for all other tokens, and in groups without a right or a wrong answer.

    Raises
    ------
    ValueError
        For shapes that do not fit, NaN at a token of the mask, and a weight out of range.

    References
    ----------
    Deng et al. (2025), On the effect of negative gradient in group relative deep reinforcement optimization,
    arXiv 2505.18830.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import hidden_reward_weights
    >>> states = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    >>> errors = torch.tensor([[[0.5, -0.5]] * 2, [[0.9, -0.9]] * 2])
    >>> mask, right = torch.ones(2, 2, dtype=torch.bool), torch.tensor([True, False])
    >>> hidden_reward_weights(states, errors, mask, right, ["q", "q"], spared=0.2)[1]
    tensor([0.2000, 1.0000])
    """
    if spared is not None and not 0 <= spared <= 1:
        raise ValueError(f"spared: must lie in [0, 1], got {spared}")
    found = torch.ones(mask.shape, dtype=torch.float32, device=states.device)
    for right, wrong in answer_groups(mask, positive, groups, states=states, errors=errors):
        if not bool(right.any()) or not bool(wrong.any()):
            continue
        anchors = finite(states[right], "states"), finite(errors[right], "errors")
        others = finite(states[wrong], "states"), finite(errors[wrong], "errors")
        own = head_interference(*anchors, *anchors).sum(0)
        answers = torch.nonzero(right)[:, 0]
        least = min(float(own[answers == answer].mean()) for answer in answers.unique())
        pulled = head_interference(*anchors, *others).sum(0) > threshold * least
        counts = [int(side.any(1).sum()) for side in (right, wrong)]
        weight = abs(counts[0] - counts[1]) / sum(counts) if spared is None else spared
        found[wrong] = torch.where(pulled, weight, 1.0)
    return found
