"""Token credit by the residual to right answers: planted planes, an independent reference, groups and masks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspan.edit import ResidualCredit, length_scaled_reward, quantile_gate

D, K = 24, 4


def rollouts(seed=0, b=6, t=12, groups=2):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(b, t, D, generator=generator, dtype=torch.float64)
    mask = torch.rand(b, t, generator=generator) < 0.8
    mask[:, 0] = True
    positive = torch.tensor([i % 3 != 0 for i in range(b)])
    return states, mask, positive, [i % groups for i in range(b)]


def reference(states, mask, positive, groups, rank=5, low=0.2, high=0.8, floor=0.1):
    """The published steps, token by token."""
    weights = torch.ones(mask.shape)
    for group in set(groups):
        mine = [i for i, each in enumerate(groups) if each == group]

        def tokens(wanted, mine=mine):
            picked = [(i, j) for i in mine if bool(positive[i]) == wanted for j in range(mask.shape[1]) if mask[i, j]]
            rows = [states[i, j].float() for i, j in picked]
            return picked, [(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in rows]

        (right, rows), (wrong, others) = tokens(True), tokens(False)
        if len(right) < 4 or not wrong:
            continue
        x = torch.stack(rows)
        mean = x.mean(0)
        v = torch.linalg.svd(x - mean, full_matrices=False).Vh[: min(rank, len(x) - 1)].T
        energy = []
        for row in others:
            left = (row - mean) - v @ (v.T @ (row - mean))
            energy.append(float(left @ left) / D)
        first, last = torch.quantile(torch.tensor(energy), torch.tensor([low, high])).tolist()
        for (i, j), e in zip(wrong, energy):
            flat = last - first < 1e-5
            z = min(1.0, max(0.0, (e - first) / max(last - first, 1e-6)))
            weights[i, j] = (1 + floor) / 2 if flat else floor + (1 - floor) * z
    return weights


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_the_published_steps(seed):
    given_ = rollouts(seed)
    torch.testing.assert_close(ResidualCredit(rank=5).weights(*given_), reference(*given_), atol=1e-5, rtol=0)


def test_a_planted_plane_is_spared_and_what_lies_outside_is_not():
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0))).Q
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, 40, K, generator=generator) @ basis[:, :K].T
    states[1, 20:] = torch.randn(20, D - K, generator=generator) @ basis[:, K:].T
    mask = torch.ones(2, 40, dtype=torch.bool)
    credit = ResidualCredit(rank=K, layer_norm=False)
    space = credit.positive_subspace(states[0])
    expected = (states[1] - states[0].mean(0)) @ basis[:, K:]
    torch.testing.assert_close(space.residual_energy(states[1]), expected.square().sum(1), atol=1e-4, rtol=1e-4)
    assert float(space.residual_energy(states[0]).max()) < 1e-5
    weights = credit.weights(states, mask, torch.tensor([True, False]), ["q", "q"])
    assert weights[1, :20].allclose(torch.tensor(0.1), atol=1e-4)
    assert float(weights[1, 20:].min()) > 0.3
    assert float(weights[1].max()) == 1
    assert bool((weights[0] == 1).all())


def test_what_must_not_matter_does_not():
    states, mask, positive, groups = rollouts()
    credit = ResidualCredit(rank=5)
    weights = credit.weights(states, mask, positive, groups)
    # The scale of the states, and what stands outside of the mask.
    poisoned = torch.where(mask.unsqueeze(-1), 7 * states, math.nan)
    torch.testing.assert_close(credit.weights(poisoned, mask, positive, groups), weights, atol=1e-4, rtol=0)
    # Other groups, and their names.
    first = [i for i, group in enumerate(groups) if group == 0]
    alone = credit.weights(states[first], mask[first], positive[first], ["a-uuid"] * len(first))
    torch.testing.assert_close(alone, weights[first], atol=1e-6, rtol=0)
    as_tensor = credit.weights(states, mask, positive, torch.tensor(groups))
    assert torch.equal(as_tensor, weights)
    # A rotation, after the normalisation.
    turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    plain = ResidualCredit(rank=5, layer_norm=False)
    torch.testing.assert_close(
        plain.weights(states @ turn, mask, positive, groups),
        plain.weights(states, mask, positive, groups),
        atol=1e-4,
        rtol=0,
    )
    half = credit.weights(states.bfloat16(), mask, positive, groups)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, weights, atol=0.05, rtol=0)


def test_groups_that_say_nothing_keep_weight_one():
    states, mask, positive, _ = rollouts(b=3)
    credit = ResidualCredit()
    for right in (torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)):
        assert bool((credit.weights(states, mask, right, [0, 0, 0]) == 1).all())
    few = mask.clone()
    few[positive] = False
    few[positive.nonzero()[0], :3] = True  # three right tokens
    assert bool((credit.weights(states, few, positive, [0, 0, 0]) == 1).all())
    empty = credit.weights(states[:0], mask[:0], positive[:0], [])
    assert empty.shape == (0, 12)


def test_repeated_tokens_span_no_more_than_they_do():
    states = torch.randn(2, 30, D, generator=torch.Generator().manual_seed(0))
    states[0] = states[0, :2].repeat(15, 1)  # two different right tokens: a line about their mean
    assert ResidualCredit(rank=20).positive_subspace(states[0]).dim == 1
    states[0] = states[0, :1]
    assert ResidualCredit(rank=20).positive_subspace(states[0]) is None
    weights = ResidualCredit().weights(states, torch.ones(2, 30, dtype=torch.bool), torch.tensor([True, False]), "qq")
    assert bool((weights == 1).all())


def test_a_rank_as_wide_as_the_states_leaves_nothing_to_tell_tokens_by():
    states, mask, positive, groups = rollouts(t=60)
    weights = ResidualCredit(rank=D, layer_norm=False).weights(states, mask, positive, groups)
    wrong = mask & ~positive.unsqueeze(1)
    assert weights[wrong].allclose(torch.tensor(0.55))


def test_advantages_are_weighted_and_right_answers_turned_down():
    states, mask, positive, groups = rollouts()
    credit = ResidualCredit(rank=5, positive_weight=0.2)
    given_ = torch.where(positive, 1.0, -2.0)
    found = credit.advantages(given_, states, mask, positive, groups)
    assert bool((found[positive] == 0.2).all())
    torch.testing.assert_close(found[~positive], -2 * credit.weights(states, mask, positive, groups)[~positive])
    per_token = credit.advantages(given_.unsqueeze(1).expand(-1, 12), states, mask, positive, groups)
    assert torch.equal(per_token, found)


def test_many_tokens_are_drawn_with_the_seed():
    states, mask, positive, groups = rollouts(t=200)
    few = [ResidualCredit(rank=3, max_tokens=20, random_state=seed) for seed in (0, 0, 1)]
    found = [credit.weights(states, mask, positive, groups) for credit in few]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.floats(0, 1))
def test_the_gate_is_monotone_and_stays_between_its_ends(scores, floor):
    x = torch.tensor(scores, dtype=torch.float64)
    weights = quantile_gate(x, 0.25, 0.75, floor)
    assert floor - 1e-9 <= float(weights.min()) <= float(weights.max()) <= 1 + 1e-9
    order = x.argsort()
    assert bool((weights[order].diff() >= -1e-9).all())
    assert len(weights[x == x[0]].unique()) == 1


def test_a_large_residual_bounds_the_interference():
    states, *_ = rollouts(b=1, t=40)
    credit = ResidualCredit(rank=K, layer_norm=False)
    rows = states[0].float()
    space = credit.positive_subspace(rows)
    right = space.basis @ torch.randn(K, 30)  # in the directions of the right answers
    x = rows - space.center
    room = x.square().sum(1) - space.residual_energy(rows)
    assert bool(((x @ right) ** 2 <= room.unsqueeze(1) * right.square().sum(0) * (1 + 1e-4)).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"floor": 1.5}, "floor"),
        ({"quantiles": (0.8, 0.2)}, "low, high"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"positive_weight": -1.0}, "positive_weight"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ResidualCredit(**options)


def test_bad_input():
    states, mask, positive, groups = rollouts()
    credit = ResidualCredit()
    with pytest.raises(ValueError, match="do not fit"):
        credit.weights(states, mask, positive, groups[:-1])
    broken = states.clone()
    broken[int(mask.nonzero()[0, 0]), int(mask.nonzero()[0, 1]), 0] = math.nan
    with pytest.raises(ValueError, match="states: NaN"):
        credit.weights(broken, mask, positive, groups)
    with pytest.raises(ValueError, match="start must be below end"):
        length_scaled_reward(torch.ones(2), [1, 2], start=5, end=5)


@pytest.mark.parametrize(("length", "factor"), [(10, 1.0), (3500, 1.0), (3798, 0.85), (4096, 0.7), (5000, 0.7)])
def test_lengths_scale_what_is_right(length, factor):
    assert length_scaled_reward(torch.tensor([2.0]), [length]).item() == pytest.approx(2 * factor)
    assert length_scaled_reward(torch.tensor([-2.0]), [length]).item() == -2
