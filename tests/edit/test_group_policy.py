"""Advantages of groups and the clipped loss against loops of numbers; strategies; inputs that do not fit."""

import math

import pytest
import torch

from subspan.edit import ResidualCredit, Rollouts, clipped_policy_loss, credit_by, group_advantages


def test_the_loss_is_that_of_a_loop_over_tokens():
    draws = torch.Generator().manual_seed(0)
    new, old = (torch.randn(8, 12, generator=draws).mul(0.7) for _ in range(2))
    advantages, mask = torch.randn(8, 12, generator=draws), torch.rand(8, 12, generator=draws) < 0.7
    new, old = (torch.where(mask, each, math.nan) for each in (new, old))
    total, kinds = 0.0, set()
    for i, j in mask.nonzero().tolist():
        ratio, a = math.exp(float(new[i, j] - old[i, j])), float(advantages[i, j])
        gained = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        kept = max(gained, 3.0 * a) if a < 0 else gained
        kinds.add((a < 0, gained != ratio * a, kept != gained))
        total -= kept
    assert len(kinds) == 5  # every clip acts somewhere
    count = int(mask.sum())
    found = clipped_policy_loss(new, old, advantages, mask)
    assert found.item() == pytest.approx(total / count, rel=1e-5)
    assert clipped_policy_loss(new, old, advantages, mask, dual_clip=None).item() > found.item()


def test_the_first_step_is_the_policy_gradient_and_advantages_of_answers_are_spread():
    new = torch.randn(3, 5, requires_grad=True)
    mask, advantages = torch.ones(3, 5, dtype=torch.bool), torch.tensor([1.0, -2.0, 0.0])
    (gradient,) = torch.autograd.grad(clipped_policy_loss(new, new, advantages, mask), new)
    torch.testing.assert_close(gradient, -advantages.unsqueeze(1).expand(3, 5) / 15)
    assert clipped_policy_loss(new, new.detach(), advantages, ~mask).item() == 0


def test_advantages_are_relative_to_the_group():
    rewards = torch.tensor([1.0, 5.0, 0.0, 0.0, 7.0, 5.0])
    found = group_advantages(rewards, ["a", "b", "a", "a", "c", "b"])
    first = torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(found[[0, 2, 3]], (first - first.mean()) / (first.std() + 1e-6))
    assert found[[1, 5]].tolist() == [0, 0]
    assert found[4] == 7  # alone


def test_strategies_give_what_they_are_named_for():
    states = torch.randn(2, 9, 8)
    mask, right = torch.ones(2, 9, dtype=torch.bool), torch.tensor([True, False])
    asked = []
    rollouts = Rollouts(torch.tensor([0.5, -0.5]), mask, right, ["p", "p"], lambda: asked.append(1) or states)
    assert credit_by("grpo")(rollouts).tolist() == [0.5, -0.5]
    assert credit_by("nsr")(rollouts).tolist() == [0, -1]
    assert credit_by("w_reinforce")(rollouts).tolist() == pytest.approx([0.1, -1])
    assert not asked  # states that nobody uses are not computed
    credit = ResidualCredit(rank=2)
    expected = credit.advantages(rollouts.advantages, states, mask, right, ["p", "p"])
    assert torch.equal(credit_by("resrl", credit)(rollouts), expected)
    assert not torch.equal(credit_by("resrl", ResidualCredit(rank=1))(rollouts), expected)
    assert credit_by(lambda found: found.advantages * 3)(rollouts).tolist() == [1.5, -1.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_advantages(torch.ones(3), ["a"]), "rewards: 1 finite ones are needed"),
        (lambda: group_advantages(torch.tensor([math.nan]), ["a"]), "rewards: 1 finite ones"),
        (lambda: clipped_policy_loss(*[torch.ones(2, 3)] * 2, torch.ones(3), torch.ones(2, 3) > 0), "do not fit"),
        (lambda: clipped_policy_loss(*[torch.ones(2, 3)] * 3, torch.ones(2, 2) > 0), "do not fit"),
        (lambda: clipped_policy_loss(*[torch.ones(2, 3)] * 3, torch.ones(2, 3) > 0, clip=1.0), "clip, dual_clip"),
        (lambda: clipped_policy_loss(*[torch.ones(2, 3)] * 3, torch.ones(2, 3) > 0, dual_clip=1.0), "clip, dual_clip"),
        (lambda: credit_by("ppo"), "strategy: 'grpo', 'nsr'"),
        (lambda: credit_by("grpo", ResidualCredit()), "credit: only strategy='resrl'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
