"""Gates: their chances in training are the formulas, evaluation is deterministic, and gradients flow."""

import math

import pytest
import torch

from subspan.nn.gates import ConcreteGate, StochasticGate, TopKGate

N = 20_000
ALL = {
    "concrete": ConcreteGate(0.5),
    "hard concrete": ConcreteGate(2 / 3, stretch=(-0.1, 1.1)),
    "rounded": ConcreteGate(0.5, hard=True),
    "stochastic": StochasticGate(0.5),
    "top-k": TopKGate(2),
}


def draws(gate, logits, seed=0):
    return gate.train()(logits.expand(N, -1), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ALL)
def test_a_seed_decides_in_training_nothing_is_left_to_chance_in_evaluation(name):
    gate, logits = ALL[name].train(), torch.tensor([-1.0, 0.0, 0.5, 2.0], requires_grad=True)
    first, second, other = (gate(logits, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(draws(gate, logits, 0), draws(gate, logits, 1))
    assert other.shape == logits.shape
    assert bool(((first >= 0) & (first <= 1)).all())
    draws(gate, logits).mul(torch.tensor([1.0, 2.0, 3.0, 5.0])).sum().backward()
    assert bool(torch.isfinite(logits.grad).all())
    assert bool((logits.grad != 0).all())
    quiet = gate.eval()(logits)
    assert torch.equal(quiet, gate(logits))
    assert bool((quiet.diff() >= 0).all())
    assert gate(logits.detach().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["concrete", "hard concrete", "rounded", "stochastic"])
def test_the_chance_of_an_open_gate_is_what_is_said(name):
    gate, logits = ALL[name], torch.tensor([-2.0, -0.7, 0.0, 0.4, 1.5])
    drawn = draws(gate, logits)
    limit = 0.5 if name in ("concrete", "rounded") else 0.0
    said = gate.expected_open(logits)
    error = 4 * (said * (1 - said) / N).sqrt()
    assert bool(((drawn > limit).float().mean(0) - said).abs().le(error).all())
    assert bool(said.diff().gt(0).all())


def test_relaxed_bernoulli_tends_to_bernoulli_and_never_overflows():
    logits = torch.tensor([-50.0, math.log(0.25), 0.0, 50.0], requires_grad=True)
    cold = draws(ConcreteGate(0.01), logits)
    assert float(((cold > 0.01) & (cold < 0.99)).float().mean()) < 0.03
    torch.testing.assert_close(cold.mean(0), torch.tensor([0.0, 0.2, 0.5, 1.0]), atol=0.012, rtol=0)
    warm = draws(ConcreteGate(0.5), logits)
    torch.testing.assert_close(warm[:, 2].mean(), torch.tensor(0.5), atol=0.01, rtol=0)
    warm.sum().backward()
    assert bool(torch.isfinite(logits.grad).all())


def test_the_gradient_is_that_of_the_same_draw_moved():
    logits = torch.tensor([-0.3, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    for gate in (ConcreteGate(0.7).train(), ConcreteGate(0.7, stretch=(-0.1, 1.1)).train(), StochasticGate().train()):
        assert torch.autograd.gradcheck(lambda x, gate=gate: gate(x, torch.Generator().manual_seed(3)), logits)


def test_stretched_gates_are_exactly_closed_or_open_at_times():
    drawn = draws(ALL["hard concrete"], torch.zeros(1))
    closed, open_ = (drawn == 0).float().mean(), (drawn == 1).float().mean()
    assert float(closed) == pytest.approx(float(open_), abs=0.02)
    assert float(closed) == pytest.approx(1 - float(ALL["hard concrete"].expected_open(torch.zeros(1))), abs=0.02)


def test_top_k_takes_exactly_k_by_the_chances_of_drawing_without_replacement():
    logits = torch.tensor([0.0, math.log(2.0), math.log(3.0)])
    drawn = draws(TopKGate(2), logits)
    assert torch.equal(drawn.sum(-1), torch.full((N,), 2.0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    # Chance that the first (share 1/6) is among two drawn one after the other.
    expected = 1 / 6 + 2 / 6 * (1 / 4) + 3 / 6 * (1 / 3)
    assert float(drawn[:, 0].mean()) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / N) ** 0.5)
    assert torch.equal(draws(TopKGate(3), logits), torch.ones(N, 3))


def test_the_gradient_of_top_k_is_that_of_drawing_softly_without_replacement():
    logits = torch.tensor([[1.2, 0.0, -0.4, 0.7]], requires_grad=True)
    first = torch.softmax(logits / 0.5, -1)
    soft = first + torch.softmax(logits / 0.5 + torch.log(1 - first), -1)
    worth = torch.tensor([3.0, 0.0, -1.0, 2.0])
    (expected,) = torch.autograd.grad((soft * worth).sum(), logits)
    gate = TopKGate(2, temperature=0.5).eval()
    (found,) = torch.autograd.grad((gate(logits) * worth).sum(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(soft.sum(), torch.tensor(2.0))


def test_bad_settings_are_named():
    for make, named in (
        (lambda: ConcreteGate(0.0), "temperature"),
        (lambda: ConcreteGate(stretch=(0.1, 1.1)), "stretch"),
        (lambda: StochasticGate(-1.0), "sigma"),
        (lambda: TopKGate(0), "k"),
        (lambda: TopKGate(2, temperature=0.0), "temperature"),
        (lambda: TopKGate(5)(torch.zeros(4)), "logits"),
    ):
        with pytest.raises(ValueError, match=named):
            make()
