"""Merging inside a learnt mask: the mask's moments, gradients by differences, a planted interference, bad input."""

import copy
import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from subspan.models import StateDelta
from subspan.weights import ConcreteMasks, ConcreteMerging, MergedModule, task_arithmetic


def net(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()


@pytest.fixture
def base():
    return net()


@pytest.fixture
def deltas(base):
    return {task: StateDelta.between(base, net(seed)) for task, seed in (("a", 1), ("b", 2))}


def test_a_drawn_mask_has_the_moments_of_a_relaxed_bernoulli_variable():
    masks = ConcreteMasks({"w": (400, 500)}, random_state=0)
    masks.requires_grad_(False)
    raw = masks.gate(masks.logits, masks.generator)
    assert float(raw.mean()) == pytest.approx(0.5, abs=5e-3)
    masks.logits.data.fill_(1.2)
    chance = 1 / (1 + math.exp(-1.2))
    assert float((masks.gate(masks.logits) > 0.5).float().mean()) == pytest.approx(chance, abs=5e-3)
    hard = masks(discrete=True)["w"]
    assert float((hard > 0).float().mean()) == pytest.approx(chance, abs=5e-3)
    assert len(hard.unique()) == 2
    masks.gate.temperature = 1e-3  # towards 0 the relaxed variable is a Bernoulli one
    edges = masks.gate(masks.logits)
    assert float(((edges < 1e-3) | (edges > 1 - 1e-3)).float().mean()) > 0.99
    masks.logits.data.uniform_(-50, 50)
    assert all(bool(value.isfinite().all()) for value in (masks()["w"], masks.eval()()["w"]))


def test_masks_have_mean_one_a_tensor_and_their_gradient_goes_through_it():
    masks = ConcreteMasks({"v": (4,), "w": (3, 2)}, random_state=0).double()
    with torch.no_grad():
        masks.logits.uniform_(-1, 1)
    assert [value.mean().item() for value in masks().values()] == pytest.approx([1.0, 1.0])
    target = torch.randn(10, dtype=torch.float64)

    def loss(logits):
        masks.generator.manual_seed(5)
        found = torch.func.functional_call(masks, {"logits": logits})
        return (torch.cat([value.flatten() for value in found.values()]) * target).sum()

    logits = masks.logits.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(loss, (logits,))
    assert masks.open_share().keys() == {"v", "w"}
    chosen = masks.subspace("w")
    assert chosen.ambient_dim == 6
    assert chosen.indices.tolist() == (masks.logits[4:] > 0).nonzero().flatten().tolist()


def test_merged_weights_are_linear_in_the_coefficients_and_reach_the_expert(base, deltas):
    x = torch.randn(7, 5, dtype=torch.float64)
    merged = MergedModule(base, deltas, coefficients="task", clamp=False)
    ones = torch.ones(1, 1, dtype=torch.float64)
    alone = MergedModule(base, {"a": deltas["a"]}, scaling=1.0)
    torch.testing.assert_close(alone(x), net(1)(x))
    torch.testing.assert_close(merged(x, merged.weights(rates=torch.zeros(2, 1))), base(x))
    torch.testing.assert_close(alone.unloaded(rates=-ones)(x), alone(x, alone.weights(rates=-ones)))
    # What is merged is what an ordinary model with those weights gives.
    torch.testing.assert_close(merged.unloaded()(x), merged(x))
    expected = {n: p + 0.3 * (deltas["a"][n] + deltas["b"][n]) for n, p in base.named_parameters()}
    torch.testing.assert_close(merged(x), torch.func.functional_call(base, expected, (x,)))


@pytest.mark.parametrize("coefficients", ["task", "tensor"])
def test_gradients_of_coefficients_and_masks(base, deltas, coefficients):
    x = torch.randn(4, 5, dtype=torch.float64)
    merged = MergedModule(base, deltas, coefficients=coefficients, clamp=False).double()
    mask = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    rates = merged.coefficients.detach().clone().requires_grad_(True)
    others = {name: torch.ones(shape, dtype=torch.float64) for name, shape in merged.shapes.items()}
    assert rates.shape == (2, 4 if coefficients == "tensor" else 1)
    assert torch.autograd.gradcheck(
        lambda rates, mask: merged(x, merged.weights({**others, "2.weight": mask}, rates)), (rates, mask)
    )


def test_coefficients_outside_of_0_and_1_are_cut_and_have_no_gradient(base, deltas):
    merged = MergedModule(base, deltas, coefficients="task", scaling=0.3)
    merged.coefficients.data[0] = 1.7
    merged(torch.randn(4, 5, dtype=torch.float64)).sum().backward()
    assert merged.used_coefficients()[0].item() == 1.0
    assert float(merged.coefficients.grad[0]) == 0
    assert float(merged.coefficients.grad[1]) != 0
    merged.reset_coefficients()
    assert merged.coefficients.flatten().tolist() == pytest.approx([0.3, 0.3])


def test_running_statistics_are_the_bases_or_the_mean_and_never_masked():
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    experts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        experts.append(copy.deepcopy(base))
        experts[-1].train()(torch.randn(50, 3) + seed)
        nn.init.normal_(experts[-1][0].weight)
    deltas = {str(i): StateDelta.between(base, expert) for i, expert in enumerate(experts)}
    kept = MergedModule(base, deltas)
    assert kept.names == ("0.weight",)
    assert torch.equal(kept.unloaded()[1].running_mean, base[1].running_mean)
    mean = MergedModule(base, deltas, buffers="mean").unloaded()[1]
    torch.testing.assert_close(mean.running_var, (experts[0][1].running_var + experts[1][1].running_var) / 2)
    assert mean.num_batches_tracked == 0


def test_tied_weights_are_merged_once_and_half_precision_stays():
    base = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).bfloat16()
    base[1].weight = base[0].weight
    expert = copy.deepcopy(base)
    expert[0].weight.data += 1
    merged = MergedModule(base, {"t": StateDelta.between(base, expert)}, scaling=0.5)
    assert merged.names == ("0.weight",)
    tokens = torch.tensor([[0, 3]])
    model = merged.unloaded()
    assert model[1].weight is model[0].weight
    assert model[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(merged(tokens), model(tokens))


# ---------------------------------------------------------------------- learning


AGREE = torch.arange(20) < 10


def planted(n=200):
    """Two tasks with one solution on half of the inputs; on the other half their updates nearly cancel."""
    torch.manual_seed(0)
    base = nn.Linear(20, 2, bias=False)
    nn.init.normal_(base.weight, std=0.01)
    solution, quarrel = torch.where(AGREE, torch.randn(20).sign(), 0), torch.where(AGREE, 0, 3 * torch.randn(20))
    experts, loaders, tests = {}, {}, {}
    for task, sign in (("first", 1), ("second", -1)):
        update = 0.5 * solution + sign * quarrel + 0.05 * torch.randn(20)
        expert = copy.deepcopy(base)
        with torch.no_grad():
            expert.weight += torch.stack([update, -update])
        x = torch.randn(n, 20)
        experts[task], tests[task], loaders[task] = expert, (x, (x @ solution < 0).long()), [x]
    return base, experts, loaders, tests


def test_the_mask_finds_where_the_experts_agree():
    base, experts, loaders, tests = planted()
    fitted = ConcreteMerging(steps=80, mask_lr=0.02, random_state=0).fit(base, experts, loaders)
    logits = fitted.mask_.logits.detach().view(2, 20).mean(0)
    assert roc_auc_score(AGREE, logits) > 0.9
    assert fitted.mask_.subspace("weight").indices.remainder(20).lt(10).float().mean() > 0.8
    arithmetic = task_arithmetic([StateDelta.between(base, expert) for expert in experts.values()])
    plain = arithmetic.apply_(copy.deepcopy(base))
    for x, y in tests.values():
        ours, theirs = (nn.functional.cross_entropy(model(x), y) for model in (fitted.merged_model_, plain))
        assert ours.item() < 0.9 * theirs.item()


@pytest.mark.parametrize("base_merge", ["task_arithmetic", "task_wise", "layer_wise"])
def test_every_variant_lowers_the_entropy_and_leaves_the_base_alone(base_merge):
    base, experts, loaders, _ = planted()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    options = {"steps": 60, "tta_steps": 40, "mask_lr": 0.05, "tta_lr": 0.02, "random_state": 0}
    fitted = ConcreteMerging(base_merge, **options).fit(base, experts, loaders)
    again = ConcreteMerging(base_merge, **options).fit(base, experts, loaders)
    losses = [each["loss"] for each in fitted.history_]
    assert len(losses) == (60 if base_merge == "task_arithmetic" else 100)
    # The last stage starts anew from the first coefficients.
    start = 0 if base_merge == "task_arithmetic" else 60
    assert losses[-1] < losses[start] - 0.02
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert base.weight.requires_grad
    assert torch.equal(fitted.merged_model_.weight, again.merged_model_.weight)
    assert set(fitted.coefficients_) == {"first", "second"}
    if base_merge == "task_arithmetic":
        assert fitted.coefficients_["first"].tolist() == pytest.approx([0.3])
    else:
        assert not torch.allclose(fitted.coefficients_["first"], torch.tensor([0.3]))
    expected = fitted.mask_.eval()()["weight"] * (experts["first"].weight - base.weight)
    torch.testing.assert_close(fitted.masked_expert("first").weight, base.weight + expected)


def test_adamerging_is_the_same_without_a_mask():
    base, experts, loaders, _ = planted()
    fitted = ConcreteMerging("task_wise", learn_mask=False, tta_steps=30, tta_lr=0.05).fit(base, experts, loaders)
    assert fitted.mask_ is None
    assert len(fitted.history_) == 30
    rates = fitted.coefficients_
    expected = base.weight + sum(rates[task] * (experts[task].weight - base.weight) for task in experts)
    torch.testing.assert_close(fitted.merged_model_.weight, expected)


def test_the_held_out_mask_with_the_least_entropy_is_kept():
    base, experts, loaders, _ = planted()
    options = {"steps": 40, "mask_lr": 0.5, "random_state": 0, "check_every": 10}
    free = ConcreteMerging(**options).fit(base, experts, loaders)
    # Held-out batches on which what the training finds is worse than the start: the mask of the first look stays.
    holdout = {task: [torch.zeros(4, 20)] for task in experts}
    kept = ConcreteMerging(**options).fit(base, experts, loaders, holdout=holdout)
    first = ConcreteMerging(**{**options, "steps": 10}).fit(base, experts, loaders)
    assert torch.equal(kept.mask_.logits, first.mask_.logits)
    assert not torch.equal(kept.mask_.logits, free.mask_.logits)


def test_predictions_that_become_alike_are_said():
    base = nn.Linear(2, 2, bias=True)
    nn.init.zeros_(base.weight)
    nn.init.zeros_(base.bias)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        expert.weight[0, 0] = 0.1
        expert.bias[0] = 8.0
    loaders = {"t": [torch.randn(20, 2)]}
    options = {"learn_mask": False, "scaling": 0.05, "tta_steps": 60, "tta_lr": 0.02}
    with pytest.warns(UserWarning, match=r"t: the entropy of the mean prediction fell from 0\.\d+ to 0\.\d+"):
        alone = ConcreteMerging("layer_wise", **options).fit(base, {"t": expert}, loaders)
    held = ConcreteMerging("layer_wise", **options, diversity_weight=2.0).fit(base, {"t": expert}, loaders)
    assert held.history_[-1]["t"] > alone.history_[-1]["t"] + 0.1


def test_heads_and_what_the_model_is_given(base):
    experts = {task: net(seed) for task, seed in (("a", 1), ("b", 2))}
    loaders = {task: [{"x": torch.randn(6, 5, dtype=torch.float64), "spare": torch.zeros(6)}] for task in experts}
    heads = {"a": nn.Linear(3, 2).double().requires_grad_(False), "b": lambda features: features[:, :2]}
    fitted = ConcreteMerging(steps=3, random_state=0, exclude=r"2\.").fit(
        base, experts, loaders, heads=heads, forward_fn=lambda model, batch: model(batch["x"])
    )
    assert set(fitted.mask_.shapes) == {"0.weight", "0.bias"}
    assert torch.equal(fitted.merged_model_[2].weight, base[2].weight)


def test_a_task_that_overflows_is_skipped_and_counted(base):
    experts = {task: net(seed) for task, seed in (("a", 1), ("b", 2))}
    loaders = {task: [torch.randn(6, 5, dtype=torch.float64)] for task in experts}
    heads = {"b": lambda features: features * math.inf}
    fitted = ConcreteMerging(steps=2).fit(base, experts, loaders, heads=heads)
    assert [each["skipped"] for each in fitted.history_] == [1, 1]
    assert bool(fitted.merged_model_[0].weight.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loaders": {"a": []}}, "loaders: none for b"),
        ({"loaders": {"a": [], "b": []}}, "loaders: 'a' gives no batch"),
        ({"heads": {"a": lambda f: f[:, 0]}}, r"heads: 'a' must give logits \(n, c\), got \(6,\)"),
        ({"experts": {}}, "deltas: at least one task"),
        ({"experts": {"a": net(1, 7), "b": net(2)}}, "tensors of other shapes"),
        ({"experts": {"a": net(0), "b": net(0)}}, "deltas: all are zero"),
        ({"options": {"temperature": 0}}, "temperature: expected a number > 0"),
        ({"options": {"base_merge": "ties"}}, "base_merge"),
        ({"holdout": {"a": [], "b": []}, "options": {"check_every": 1}}, "holdout: gives no batch"),
    ],
)
def test_bad_input(base, change, message):
    x = [torch.randn(6, 5, dtype=torch.float64)]
    experts = change.get("experts", {"a": net(1), "b": net(2)})
    merging = ConcreteMerging(**{"steps": 2, **change.get("options", {})})
    with pytest.raises(ValueError, match=message):
        merging.fit(
            base,
            experts,
            change.get("loaders", {"a": x, "b": x}),
            heads=change.get("heads"),
            holdout=change.get("holdout"),
        )
