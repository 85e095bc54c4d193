"""trl's trainer for group-relative policies with advantages by token (extra: rl)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan.base import require
from subspan.base.modules import evaluation
from subspan.models import Capture

from .group_policy import Credit, Rollouts, credit_by
from .resrl import ResidualCredit

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import GRPOTrainer
else:
    GRPOTrainer = require("trl", extra="rl").GRPOTrainer


class GroupPolicyTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose advantages come from a strategy, of answers (b,) or of tokens (b, t).

    A strategy that asks for hidden states gets them once after each generation, from the policy that is about to be
    updated, in one pass that ends before the last block. An answer counts as right where its weighted reward is
    above 0.

    Parameters
    ----------
    *args, **options
        Of `trl.GRPOTrainer`.
    strategy
        As in `credit_by`: "grpo", "nsr", "w_reinforce", "resrl", or a function of `Rollouts`.
    credit
        Of "resrl".

    Raises
    ------
    ValueError
        Where a process would get part of a prompt's answers, and for an unknown strategy.

    References
    ----------
    ResRL (2026), arXiv 2605.00380; Zhu et al. (2025), arXiv 2506.01347.

    Examples
    --------
    >>> from subspan.edit.grpo import GroupPolicyTrainer
    >>> trainer = GroupPolicyTrainer(
    ...     model, reward_funcs=verifier, train_dataset=prompts, args=config, strategy="w_reinforce"
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self, *args: Any, strategy: str | Credit = "grpo", credit: ResidualCredit | None = None, **options: Any
    ) -> None:
        self.strategy = credit_by(strategy, credit)
        super().__init__(*args, **options)
        given: Any = self.args
        share = given.per_device_train_batch_size * given.steps_per_generation
        if share % self.num_generations:
            raise ValueError(
                f"args: a process gets {share} answers a generation (per_device_train_batch_size × "
                f"steps_per_generation), which does not hold whole groups of {self.num_generations}"
            )

    def _calculate_rewards(self, *args: Any) -> Tensor:
        found = super()._calculate_rewards(*args)
        self._right = (found * self.reward_weights.to(found.device)).nansum(1) > 0
        self._scored = ~found.isnan().all(1)
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        model: Any = self.model
        if model.training:
            rollouts, scored = self._rollouts(output)
            found = self.strategy(rollouts)
            output["advantages"] = torch.where(scored if found.ndim == 1 else scored.unsqueeze(1), found, 0.0)
        return output

    def _rollouts(self, output: dict[str, Any]) -> tuple[Rollouts, Tensor]:
        """This process's answers, which are whole groups, one after the other; and which of them have a reward."""
        mask = output["completion_mask"].bool() & output.get("tool_mask", output["completion_mask"]).bool()
        count, size = len(mask), int(self.num_generations)  # pyright: ignore
        start = self.accelerator.process_index * count
        right, scored = (each[start : start + count].to(mask.device) for each in (self._right, self._scored))
        groups = torch.arange(count) // size
        given = output["advantages"], mask & scored.unsqueeze(1), right, groups
        return Rollouts(*given, lambda: self._states(output)), scored

    @torch.no_grad()
    def _states(self, output: dict[str, Any]) -> Tensor:
        """States (b, t, d) before the last block, where each token of an answer is predicted."""
        count, width = output["completion_ids"].shape
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        present = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        model, states = self.accelerator.unwrap_model(self.model), []
        with evaluation(model), Capture(model, -1, site="input") as seen:
            for rows in torch.arange(count).split(self.args.per_device_train_batch_size):
                seen.run({"input_ids": ids[rows], "attention_mask": present[rows]})
                states.append(seen[seen.names[0]][:, -width - 1 : -1])
        return torch.cat(states)


class ResRLTrainer(GroupPolicyTrainer):
    """`GroupPolicyTrainer` with strategy="resrl": advantages (b, t) by `ResidualCredit`.

    Parameters
    ----------
    *args, **options
        Of `trl.GRPOTrainer`.
    credit
        By default `ResidualCredit()`.

    Raises
    ------
    ValueError
        As in `GroupPolicyTrainer`.

    References
    ----------
    ResRL (2026), arXiv 2605.00380.

    Examples
    --------
    >>> from subspan.edit.grpo import ResRLTrainer
    >>> trainer = ResRLTrainer(model, reward_funcs=verifier, train_dataset=prompts, args=config)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, *args: Any, credit: ResidualCredit | None = None, **options: Any) -> None:
        super().__init__(*args, strategy="resrl", credit=credit, **options)
