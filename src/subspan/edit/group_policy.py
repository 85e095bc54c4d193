"""Reinforcement learning on groups of answers to one prompt: advantages of answers and tokens, and the clipped loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .resrl import ResidualCredit
from .token_credit import Groups, reinforce_advantages


@dataclass(frozen=True)
class Rollouts:
    """Answers that a policy gave, and what is known of them.

    Attributes
    ----------
    advantages
        (b,) of answers, relative to their group; see `group_advantages`.
    mask
        (b, t) tokens that are answers.
    right
        (b,) answers that the verifier takes for right.
    groups
        (b,) the prompt of each.
    states
        Called without arguments it gives the hidden states (b, t, d) before the last block, where each token is
        predicted. What does not call it does not pay for them.
    """

    advantages: Float[Tensor, " b"]
    mask: Bool[Tensor, "b t"]
    right: Bool[Tensor, " b"]
    groups: Groups
    states: Callable[[], Float[Tensor, "b t d"]]


Credit = Callable[[Rollouts], Tensor]


def credit_by(strategy: str | Credit, credit: ResidualCredit | None = None) -> Credit:
    """How a strategy gives credit: a function from `Rollouts` to advantages (b,) of answers or (b, t) of tokens.

    Parameters
    ----------
    strategy
        "grpo": relative to the group, as given; "nsr": -1 for wrong answers, right ones do not count; "w_reinforce":
        right ones count 0.1; "resrl": relative to the group, by `ResidualCredit`. Or a function of one's own.
    credit
        Of "resrl"; by default `ResidualCredit()`.

    Returns
    -------
    callable

    Raises
    ------
    ValueError
        For an unknown name, and for a credit that the strategy does not use.

    References
    ----------
    Zhu et al. (2025), arXiv 2506.01347 (NSR, W-REINFORCE); ResRL (2026), arXiv 2605.00380.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import Rollouts, credit_by
    >>> right, mask = torch.tensor([True, False]), torch.ones(2, 3, dtype=torch.bool)
    >>> credit_by("w_reinforce")(Rollouts(torch.tensor([0.7, -0.7]), mask, right, [0, 0], lambda: None))
    tensor([ 0.1000, -1.0000])
    """
    if credit is not None and strategy != "resrl":
        raise ValueError(f"credit: only strategy='resrl' has one, got strategy={strategy!r}")
    if callable(strategy):
        return strategy
    residual = credit or ResidualCredit()
    named: dict[str, Credit] = {
        "grpo": lambda found: found.advantages,
        "nsr": lambda found: reinforce_advantages(found.right, positive_weight=0.0),
        "w_reinforce": lambda found: reinforce_advantages(found.right),
        "resrl": lambda found: residual.advantages(
            found.advantages, found.states(), found.mask, found.right, found.groups
        ),
    }
    if strategy not in named:
        raise ValueError(f"strategy: {', '.join(map(repr, named))} or a function, got {strategy!r}")
    return named[strategy]


def group_advantages(rewards: Float[Tensor, " b"], groups: Groups) -> Float[Tensor, " b"]:
    """GRPO's advantages: rewards less the mean of their group, over its standard deviation (of the sample).

    Parameters
    ----------
    rewards
        (b,).
    groups
        (b,) the prompt of each, as any values that can be compared. A reward that is alone in its group stays as it is.

    Returns
    -------
    Tensor (b,); 0 in groups whose rewards are all the same.

    Raises
    ------
    ValueError
        For another number of groups than of rewards, and rewards that are not finite.

    References
    ----------
    Shao et al. (2024), DeepSeekMath, arXiv 2402.03300.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import group_advantages
    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), ["p", "p", "q", "q"])
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    names = groups.tolist() if hasattr(groups, "tolist") else list(groups)  # pyright: ignore
    if len(names) != len(rewards) or not bool(rewards.isfinite().all()):
        raise ValueError(f"rewards: {len(names)} finite ones are needed, one a group's name, got {rewards}")
    found = rewards.clone()
    for name in dict.fromkeys(names):
        inside = torch.tensor([each == name for each in names], device=rewards.device)
        own = rewards[inside]
        if len(own) > 1:
            found[inside] = (own - own.mean()) / (own.std() + 1e-6)
    return found


def clipped_policy_loss(
    log_probs: Float[Tensor, "b t"],
    old_log_probs: Float[Tensor, "b t"],
    advantages: Float[Tensor, "*n"],
    mask: Bool[Tensor, "*m"],
    *,
    clip: float = 0.2,
    dual_clip: float | None = 3.0,
) -> Float[Tensor, ""]:
    """PPO's loss, a mean over tokens: minus the advantage times the ratio of chances, which may not gain beyond a clip.

    Parameters
    ----------
    log_probs, old_log_probs
        (b, t) of the tokens by the policy and by the one that gave the answers; the latter are constants.
    advantages
        (b,) or (b, t), constants.
    mask
        (b, t) tokens that count; what lies outside is never read.
    clip
        ε: the ratio counts between 1 - ε and 1 + ε.
    dual_clip
        Of tokens with negative advantages the ratio counts up to that, however likely they became; None: no end.

    Returns
    -------
    Scalar; 0 where no token counts.

    Raises
    ------
    ValueError
        For shapes that do not fit and clips out of range.

    References
    ----------
    Schulman et al. (2017), arXiv 1707.06347; the second clip Ye et al. (2020), arXiv 1912.09729.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import clipped_policy_loss
    >>> new, old, mask = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.5]]).log(), torch.ones(1, 2).bool()
    >>> round(clipped_policy_loss(new, old, torch.tensor([1.0]), mask).item(), 4)  # -(1.2 + 1.0) / 2
    -1.1
    """
    if log_probs.shape != mask.shape or old_log_probs.shape != mask.shape or len(advantages) != len(mask):
        shapes = ", ".join(str(tuple(each.shape)) for each in (log_probs, old_log_probs, advantages, mask))
        raise ValueError(f"log_probs, old_log_probs, advantages, mask: shapes {shapes} do not fit")
    if not 0 < clip < 1 or not (dual_clip is None or dual_clip > 1):
        raise ValueError(f"clip, dual_clip: must lie in (0, 1) and above 1, got {clip} and {dual_clip}")
    by_token = (advantages.unsqueeze(1) if advantages.ndim == 1 else advantages).expand(mask.shape)[mask].detach()
    ratio = (log_probs[mask] - old_log_probs[mask].detach()).exp()
    loss = torch.maximum(-by_token * ratio, -by_token * ratio.clamp(1 - clip, 1 + clip))
    if dual_clip is not None:
        loss = torch.where(by_token < 0, torch.minimum(loss, -by_token * dual_clip), loss)
    return loss.sum() / max(int(mask.sum()), 1)
