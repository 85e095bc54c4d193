"""Credit of tokens in reinforcement learning with verified answers: what wrong answers share with right ones is spared.

In a group of answers to one prompt, a token of a wrong answer whose hidden state lies in the principal subspace of the
right answers' states pulls their likelihood down with it; one that lies outside can be punished safely.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from subspan.base.parameters import Count, Positive, Share, check_parameters
from subspan.geometry import Subspace

from .token_credit import Groups, answer_groups, finite

_FEWEST, _FLAT = 4, 1e-5


def quantile_gate(
    scores: Float[Tensor, " n"], low: float = 0.2, high: float = 0.8, floor: float = 0.1
) -> Float[Tensor, " n"]:
    """Scores → weights in [floor, 1]: the floor up to one quantile, 1 from another, a straight line between.

    Parameters
    ----------
    scores
        (n,), at least one.
    low, high
        Quantiles, 0 <= low < high <= 1.
    floor
        The smallest weight, in [0, 1].

    Returns
    -------
    Tensor (n,); (1 + floor) / 2 everywhere where the two quantiles are the same.

    Raises
    ------
    ValueError
        For quantiles that do not ascend, and values out of range.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import quantile_gate
    >>> quantile_gate(torch.arange(6.0), low=0.2, high=0.8, floor=0.1)
    tensor([0.1000, 0.1000, 0.4000, 0.7000, 1.0000, 1.0000])
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low, high: must be quantiles with 0 <= low < high <= 1, got {low} and {high}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: must lie in [0, 1], got {floor}")
    first, last = torch.quantile(scores, torch.tensor([low, high], dtype=scores.dtype, device=scores.device))
    if bool(last - first < _FLAT):
        return torch.full_like(scores, (1 + floor) / 2)
    return floor + (1 - floor) * ((scores - first) / (last - first)).clamp(0, 1)


def length_scaled_reward(
    reward: Float[Tensor, " n"], n_tokens: Any, *, start: int = 3500, end: int = 4096, end_scale: float = 0.7
) -> Float[Tensor, " n"]:
    """Positive rewards times a factor that falls from 1 at `start` tokens to `end_scale` at `end`, and stays there.

    Parameters
    ----------
    reward
        (n,); what is not positive is left as it is.
    n_tokens
        Lengths (n,) of the answers.
    start, end
        In tokens, start < end.
    end_scale
        The last factor.

    Returns
    -------
    Tensor (n,).

    Raises
    ------
    ValueError
        Where start is not below end.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import length_scaled_reward
    >>> length_scaled_reward(torch.tensor([1.0, 1.0, 1.0, -1.0]), [3500, 3798, 5000, 5000])
    tensor([ 1.0000,  0.8500,  0.7000, -1.0000])
    """
    if not start < end:
        raise ValueError(f"start, end: start must be below end, got {start} and {end}")
    lengths = torch.as_tensor(n_tokens).to(reward)
    along = ((lengths - start) / (end - start)).clamp(0, 1)
    return torch.where(reward > 0, reward * (1 - (1 - end_scale) * along), reward)


@dataclass(frozen=True)
class ResidualCredit:
    """Weights of the tokens of wrong answers by their distance to what right answers to the same prompt look like.

    States are normalised without parameters, x → (x - mean) / deviation over d, and centred at the mean of the right
    answers' tokens; e = |(I - VV') x|²/d with V the leading directions of those tokens. Group by group e becomes a
    weight by `quantile_gate`. The advantages of wrong answers are multiplied by it, those of right ones by
    `positive_weight`. Groups without a right or a wrong answer, with fewer than 4 right tokens, or with right tokens
    that are all the same, keep weight 1.

    Weights are per prompt: compute them once on the whole rollout, before batches tear groups apart.

    Parameters
    ----------
    rank
        Directions k of the right answers; at most their tokens less one, and no more than they span.
    max_tokens
        Of a group's right tokens so many are drawn for V.
    quantiles
        Where the gate begins and ends.
    floor
        Smallest weight ξ of a token.
    positive_weight
        Factor λ of the advantages of right answers.
    layer_norm
        Normalise states; off for states that are normalised.
    random_state
        Seed of the draw of tokens.

    Raises
    ------
    ValueError
        For values out of range.

    References
    ----------
    ResRL (2026), arXiv 2605.00380; λ as in W-REINFORCE, Zhu et al. (2025), arXiv 2506.01347.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import ResidualCredit
    >>> plane = torch.zeros(2, 6, 16)
    >>> plane[..., :4] = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    >>> plane[1, 3:, 4:] = 5.0  # the second half of the wrong answer goes elsewhere
    >>> credit = ResidualCredit(rank=4, layer_norm=False)
    >>> mask, right = torch.ones(2, 6, dtype=torch.bool), torch.tensor([True, False])
    >>> credit.weights(plane, mask, right, ["q", "q"])[1].round(decimals=1)
    tensor([0.1000, 0.1000, 0.1000, 1.0000, 1.0000, 1.0000])
    """

    rank: Count = 64
    max_tokens: Count = 4096
    quantiles: tuple[float, float] = (0.2, 0.8)
    floor: Share = 0.1
    positive_weight: Positive = 0.1
    layer_norm: bool = True
    random_state: int = 0

    def __post_init__(self) -> None:
        check_parameters(self)
        quantile_gate(torch.zeros(1), *self.quantiles, self.floor)

    def positive_subspace(self, states: Float[Tensor, "m d"]) -> Subspace | None:
        """Leading directions of normalised states of right tokens about their mean, at most those they span.

        None where all tokens are the same.
        """
        center = states.mean(0)
        rows = states
        if len(rows) > self.max_tokens:
            drawn = np.random.default_rng(self.random_state).permutation(len(rows))[: self.max_tokens]
            rows = rows[torch.from_numpy(drawn).to(rows.device)]
        found = Subspace.from_factor(
            rows - center, mean=center, count=float(len(rows)), rank=min(self.rank, len(rows) - 1, rows.shape[1])
        )
        assert found.spectrum is not None
        sizes = found.spectrum.sqrt()
        least = torch.finfo(sizes.dtype).eps * max(rows.shape) * max(1.0, float(rows.abs().max()))
        spanned = int((sizes > least).sum())
        return found.truncate(min(found.dim, spanned)) if spanned else None

    @torch.no_grad()
    def weights(
        self,
        states: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"],
        positive: Bool[Tensor, " b"],
        groups: Groups,
    ) -> Float[Tensor, "b t"]:
        """Weights (b, t) of tokens, 1 wherever they do not act.

        Parameters
        ----------
        states
            Hidden states (b, t, d) at the positions that predict the tokens, best before the last block: see
            `models.predicting_states` for a causal model.
        mask
            (b, t) tokens that are answers; what lies outside is never read.
        positive
            (b,) answers that the verifier takes for right.
        groups
            (b,) the prompt of each, as any values that can be compared.
        """
        found = torch.ones(mask.shape, dtype=torch.float32, device=states.device)
        for wrong, energy in self.residuals(states, mask, positive, groups):
            found[wrong] = quantile_gate(energy, *self.quantiles, self.floor)
        return found

    def residuals(
        self,
        states: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"],
        positive: Bool[Tensor, " b"],
        groups: Groups,
    ) -> Iterator[tuple[Bool[Tensor, "b t"], Float[Tensor, " n"]]]:
        """Of each group whose tokens can be told apart: where its wrong tokens are, and their e; see `weights`."""
        for right, wrong in answer_groups(mask, positive, groups, states=states):
            if int(right.sum()) < _FEWEST or not bool(wrong.any()):
                continue
            if (space := self.positive_subspace(self._normalized(states[right]))) is not None:
                yield wrong, space.residual_energy(self._normalized(states[wrong])) / states.shape[-1]

    def advantages(
        self,
        advantages: Float[Tensor, " b"] | Float[Tensor, "b t"],
        states: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"],
        positive: Bool[Tensor, " b"],
        groups: Groups,
    ) -> Float[Tensor, "b t"]:
        """Advantages (b, t) of tokens, from those of answers or tokens; see `weights` for the rest."""
        weights = self.weights(states, mask, positive, groups)
        given = advantages.unsqueeze(1) if advantages.ndim == 1 else advantages
        factors = torch.where(positive.unsqueeze(1).to(weights.device), self.positive_weight, weights)
        return given.to(weights.device) * factors

    def _normalized(self, states: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        wide = finite(states, "states")
        return F.layer_norm(wide, wide.shape[-1:]) if self.layer_norm else wide
