"""trl's trainer for group-relative policies with weights of tokens by their residual (extra: rl)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan.base import require
from subspan.base.modules import evaluation
from subspan.models import Capture

from .resrl import ResidualCredit

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import GRPOTrainer
else:
    GRPOTrainer = require("trl", extra="rl").GRPOTrainer


class ResRLTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose advantages are those of `ResidualCredit`: (b, t), by token.

    States are taken once after each generation, from the policy that is about to be updated, in one pass that ends
    before the last block. An answer counts as right where its weighted reward is above 0.

    Parameters
    ----------
    *args, **options
        Of `trl.GRPOTrainer`.
    credit
        By default `ResidualCredit()`; any object with such an `advantages`.

    Raises
    ------
    ValueError
        Where a process would get part of a prompt's answers.

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
        self.credit = credit or ResidualCredit()
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
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        model: Any = self.model
        if model.training:
            output["advantages"] = self._by_token(output)
        return output

    @torch.no_grad()
    def _by_token(self, output: dict[str, Any]) -> Tensor:
        """Advantages (b, t) of this process's answers, which are whole groups, one after the other."""
        mask = output["completion_mask"].bool() & output.get("tool_mask", output["completion_mask"]).bool()
        count, width = mask.shape
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        present = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        model, states = self.accelerator.unwrap_model(self.model), []
        with evaluation(model), Capture(model, -1, site="input") as seen:
            for rows in torch.arange(count).split(self.args.per_device_train_batch_size):
                seen.run({"input_ids": ids[rows], "attention_mask": present[rows]})
                states.append(seen[seen.names[0]][:, -width - 1 : -1])
        start = self.accelerator.process_index * count
        size: Any = self.num_generations
        groups = torch.arange(count) // size
        right = self._right[start : start + count].to(mask.device)
        return self.credit.advantages(output["advantages"], torch.cat(states), mask, right, groups)
