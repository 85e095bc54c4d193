"""Rival weights of tokens: against gradients of a real layer, and token by token."""

import math

import pytest
import torch
from torch.nn import functional as F

from subspan.edit import entropy_mask, head_interference, hidden_reward_weights, reinforce_advantages

D, V = 6, 9


def answers(seed=0, b=5, t=7):
    """States, errors, mask, right answers and prompts: two of them, the second with right answers alone."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(b, t, D, generator=generator)
    head = torch.randn(V, D, generator=generator)
    targets = torch.randint(V, (b, t), generator=generator)
    errors = (states @ head.T).softmax(-1) - F.one_hot(targets, V)
    mask = torch.rand(b, t, generator=generator) < 0.8
    mask[:, 0] = True
    return states, errors, mask, torch.tensor([True, False, True, False, True]), ["q", "q", "q", "q", "p"]


def test_entropy_keeps_the_top_share_of_what_counts():
    entropies, mask = torch.arange(20.0).view(2, 10), torch.ones(2, 10, dtype=torch.bool)
    mask[1, 5:] = False
    kept = entropy_mask(entropies, mask, top=0.2)
    assert kept.nonzero().tolist() == [[1, 2], [1, 3], [1, 4]]
    assert not bool(entropy_mask(entropies, torch.zeros_like(mask)).any())


def test_interference_is_the_product_of_the_gradients():
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 9, bias=False)
    x, y = torch.randn(2, 6), torch.tensor([3, 5])
    gradients, errors = [], []
    for row, target in zip(x, y):
        logits = head(row)
        head.zero_grad()
        torch.nn.functional.cross_entropy(logits, target).backward()
        gradients.append(head.weight.grad.clone())
        errors.append(logits.softmax(-1).detach() - torch.nn.functional.one_hot(target, 9))
    found = head_interference(x[:1], errors[0].unsqueeze(0), x[1:], errors[1].unsqueeze(0))
    torch.testing.assert_close(found[0, 0], (gradients[0] * gradients[1]).sum())


def reference(states, errors, mask, positive, threshold, spared):
    """NTHR of the first prompt by gradients of the output layer, formed token by token."""

    def gradients(row):
        return [torch.outer(errors[row, j], states[row, j]) for j in range(mask.shape[1]) if mask[row, j]]

    right = {row: gradients(row) for row in range(4) if positive[row]}
    pull = sum(sum(each) for each in right.values())
    least = min(sum(float((g * pull).sum()) for g in each) / len(each) for each in right.values())
    weights = torch.ones(mask.shape)
    for row in (row for row in range(4) if not positive[row]):
        for j in range(mask.shape[1]):
            if mask[row, j] and float((torch.outer(errors[row, j], states[row, j]) * pull).sum()) > threshold * least:
                weights[row, j] = spared
    return weights


@pytest.mark.parametrize(("threshold", "seed"), [(1.0, 0), (0.2, 1), (-0.5, 2)])
def test_spared_are_the_tokens_whose_gradient_pulls_right_answers_down(threshold, seed):
    states, errors, mask, positive, groups = answers(seed)
    expected = reference(states, errors, mask, positive, threshold, 0.0)
    assert (threshold == 1) == bool((expected == 1).all()) or bool((expected == 0).any())
    poisoned = torch.where(mask.unsqueeze(-1), states, math.nan)
    found = hidden_reward_weights(poisoned, errors, mask, positive, groups, threshold=threshold, spared=0.0)
    assert torch.equal(found, expected)


def test_as_much_is_spared_as_the_group_is_sure():
    states, errors, mask, positive, groups = answers(1)
    options = {"threshold": 0.2}
    even = hidden_reward_weights(states, errors, mask, positive, groups, **options)
    assert set(even.unique().tolist()) == {0.0, 1.0}  # two of four are right
    fewer = [0, 1, 3]
    uneven = hidden_reward_weights(states[fewer], errors[fewer], mask[fewer], positive[fewer], "qqq", **options)
    assert {round(w, 5) for w in uneven.unique().tolist()} == {round(1 / 3, 5), 1.0}
    alone = hidden_reward_weights(states[4:], errors[4:], mask[4:], positive[4:], ["p"], threshold=-9.0)
    assert bool((alone == 1).all())


def test_advantages_without_a_baseline():
    right = torch.tensor([True, False])
    assert reinforce_advantages(right, positive_weight=0).tolist() == [0, -1]
    assert reinforce_advantages(right, positive_weight=1, negative_weight=0).tolist() == [1, 0]


def test_bad_input():
    states, errors, mask, positive, groups = answers()
    with pytest.raises(ValueError, match="positive_weight: must be 0 or more"):
        reinforce_advantages(positive, positive_weight=-1)
    with pytest.raises(ValueError, match="top"):
        entropy_mask(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), top=0.0)
    with pytest.raises(ValueError, match="spared"):
        hidden_reward_weights(states, errors, mask, positive, groups, spared=2.0)
    with pytest.raises(ValueError, match=r"states, errors, mask, positive, groups: .* do not fit"):
        hidden_reward_weights(states, errors, mask, positive, groups[:-1])
    errors[1, 0] = math.inf
    with pytest.raises(ValueError, match="errors: NaN or infinity"):
        hidden_reward_weights(states, errors, mask, positive, groups)
