"""Variational probes against Monte Carlo and planted directions; erasure; a penalty that follows drifting states."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from subspan.edit import (
    SubspaceDecoupling,
    VariationalLinear,
    VariationalProbe,
    dominant_subspace,
    leace,
    variety_report,
)
from subspan.geometry import Subspace
from subspan.nn import Objective
from subspan.nn.training import quiet_trainer
from subspan.statistics import GroupedMoments

FAST = {"epochs": 15, "learning_rate": 0.05, "batch_size": 150}


def varieties(n=400, d=12, groups=3, shift=3.0, seed=0):
    """Rows of a few varieties, apart in the first dimensions alone."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % groups
    x = rng.normal(size=(n, d)).astype(np.float32)
    x[:, :groups] += shift * np.eye(groups, dtype=np.float32)[y]
    return x, np.array(["abcdef"[i] for i in y])


# ---------------------------------------------------------------------- the probe


def test_divergences_are_those_of_sampled_variables():
    torch.manual_seed(0)
    layer = VariationalLinear(6, 4).double()
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * 0.3 - (3.5 if "variance" in name else 0.0))
    prior = torch.distributions.Normal(0, 1)
    parts = {}
    for name in ("weight", "bias"):
        log_variance = getattr(layer, f"{name}_log_variance").clamp(max=math.log(0.04) if name == "weight" else 99)
        posterior = torch.distributions.Normal(getattr(layer, f"{name}_mean"), (log_variance / 2).exp())
        drawn = posterior.sample((50_000,))
        parts[name] = (posterior.log_prob(drawn) - prior.log_prob(drawn)).mean(0).sum()
    gates = 0.0
    for alpha in layer.log_alpha().exp().tolist():  # Molchanov et al. (2017): their approximation, term by term
        gates -= 0.63576 / (1 + math.exp(-(1.8732 + 1.48695 * math.log(alpha)))) - 0.5 * math.log1p(1 / alpha) - 0.63576
    assert layer.kl().item() == pytest.approx((parts["weight"] + parts["bias"]).item() + gates, rel=1e-2)
    # Nothing is said by what is its prior.
    with torch.no_grad():
        layer.weight_mean.zero_(), layer.bias_mean.zero_(), layer.bias_log_variance.zero_()
    layer.largest = 0.0
    with torch.no_grad():
        layer.weight_log_variance.zero_()
    assert layer.kl().item() == pytest.approx(gates, abs=1e-6)


def test_drawn_logits_have_the_moments_of_the_variables():
    torch.manual_seed(0)
    layer = VariationalLinear(5, 3).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 - (4.0 if "variance" in name else 0.0))
    x = torch.randn(5, dtype=torch.float64)
    drawn = layer(x.expand(200_000, 5))
    z, w = layer.gate_mean, layer.weight_mean
    variances = [
        layer.gate_log_variance.exp(),
        layer.weight_log_variance.clamp(max=math.log(0.04)).exp(),
        layer.bias_log_variance.exp(),
    ]
    of_z, of_w, of_b = variances
    second = x.square() * ((z.square() + of_z) * (w.square() + of_w) - (z * w).square())
    torch.testing.assert_close(drawn.mean(0), layer.eval()(x.unsqueeze(0))[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(drawn.var(0), second.sum(1) + of_b, rtol=2e-2, atol=0)


def test_random_labels_cost_what_labels_cost_and_planted_ones_less():
    x, y = varieties()
    planted = VariationalProbe(**FAST).fit(x, y)
    random = VariationalProbe(**FAST).fit(x, np.random.default_rng(1).permutation(y))
    alone = len(y) * math.log2(3)
    assert planted.code_length_ < 0.6 * alone
    assert random.code_length_ > 0.95 * alone
    assert planted.compression_ == pytest.approx(alone / planted.code_length_)
    assert 0 < planted.kl_ < planted.code_length_
    assert planted.score(x, y) > 0.9
    assert planted.predict_proba(x).sum(1) == pytest.approx(1.0)
    # Dimensions that say nothing have the noisier gates.
    assert planted.gates_[:3].max() < planted.gates_[3:].min()
    again = VariationalProbe(**FAST).fit(torch.from_numpy(x), y)
    assert np.array_equal(again.coef_, planted.coef_)
    # The unit of the states does not decide, unless it is asked for.
    assert VariationalProbe(**FAST).fit(x / 256, y).code_length_ == pytest.approx(planted.code_length_, rel=1e-4)
    assert VariationalProbe(**FAST, scale=False).fit(x / 256, y).code_length_ > 1.3 * planted.code_length_


def test_classes_with_few_rows_count_alike_where_that_is_asked_for():
    x, y = varieties(n=600, groups=2, shift=1.2)
    rare = np.flatnonzero(y == "b")[30:]
    x, y = np.delete(x, rare, 0), np.delete(y, rare)  # 300 to 30
    plain, balanced = (VariationalProbe(**FAST, class_weight=kind).fit(x, y) for kind in (None, "balanced"))
    found = [np.mean(probe.predict(x)[y == "b"] == "b") for probe in (plain, balanced)]
    assert found[1] > found[0] + 0.2
    assert plain.score(x, y) == np.mean(plain.predict(x) == y)
    assert balanced.score(x, y) == pytest.approx((found[1] + np.mean(balanced.predict(x)[y == "a"] == "a")) / 2)
    assert plain.chance(y) == pytest.approx((10 / 11, (10 / 11 / 11 / 330) ** 0.5))
    assert balanced.chance(y) == pytest.approx((0.5, (0.25 / 300 + 0.25 / 30) ** 0.5 / 2))
    # Labels are still coded as often as they are there.
    assert balanced.code_length_ > plain.code_length_
    with pytest.raises(ValueError, match="class_weight: expected"):
        VariationalProbe(class_weight="even").fit(x, y)


def test_a_probe_goes_on_from_another():
    x, y = varieties()
    first = VariationalProbe(**FAST).fit(x, y)
    same = VariationalProbe(**{**FAST, "epochs": 1, "learning_rate": 1e-9}).fit(x, y, start=first)
    assert same.coef_ == pytest.approx(first.coef_, abs=1e-4)
    further = VariationalProbe(**{**FAST, "epochs": 1}).fit(x, y, start=first)
    assert further.code_length_ < VariationalProbe(**{**FAST, "epochs": 1}).fit(x, y).code_length_
    for rows, labels in ((x[:, :5], y), (x, np.where(y == "a", "z", y))):
        with pytest.raises(ValueError, match=r"start: a probe of .* dimensions is needed, got one of"):
            VariationalProbe(**FAST).fit(rows, labels, start=first)


def test_the_dominant_subspace_is_the_planted_one():
    x, y = varieties(n=900, shift=5.0)
    probe = VariationalProbe(epochs=30, learning_rate=0.05, batch_size=150).fit(x, y)
    found = dominant_subspace(probe, "a", energy=1.0)
    planted = torch.zeros(12, 2)
    planted[:3] = torch.tensor([[1.0, 1], [-1, 0], [0, -1]])
    assert found.dim == 2
    assert math.degrees(float(found.angles(Subspace.span(planted)).max())) < 8
    assert dominant_subspace(VariationalProbe(epochs=1, batch_size=900).fit(x, y == "a"), True).dim == 1
    with pytest.raises(ValueError, match="dominant: 'z' is none of the classes"):
        dominant_subspace(probe, "z")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros(20)}, "y: at least two classes"),
        ({"y": np.zeros(3)}, "y: expected 20 labels"),
        ({"x": np.full((20, 2), np.nan)}, "X"),
        ({"options": {"epochs": 0}}, "epochs: expected an integer >= 1"),
        ({"options": {"held_out": 2.0}}, "held_out"),
    ],
)
def test_a_probe_refuses_what_it_cannot_use(change, message):
    x, y = change.get("x", np.ones((20, 2))), change.get("y", np.arange(20) % 2)
    with pytest.raises(ValueError, match=message):
        VariationalProbe(**change.get("options", {})).fit(x, y)


# ---------------------------------------------------------------------- the diagnosis


class Halves(nn.Module):
    """Two layers: one that keeps what tells varieties apart, and one that loses it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x, attention_mask=None):
        return self.layers[1](self.layers[0](x)[..., 4:])


def test_the_diagnosis_finds_where_varieties_are_and_which_are_near():
    x, y = varieties(n=240, groups=4, shift=0.0)
    # On one axis "a" and "b" lie against each other, on another "c" and "d".
    for place, (axis, side) in enumerate([(0, 4), (0, -4), (1, 4), (1, -4)]):
        x[y == "abcd"[place], axis] += side
    tokens = torch.from_numpy(x).unsqueeze(1) + 0.1 * torch.randn(len(x), 3, 12)
    tokens[:, 2] = math.nan  # padding
    mask = torch.tensor([[1, 1, 0]]).expand(len(x), 3)
    batches = [{"x": tokens[s : s + 90], "attention_mask": mask[s : s + 90]} for s in range(0, len(x), 90)]
    options = {"layers": ["layers.0", "layers.1"], "settings": {**FAST, "epochs": 10, "batch_size": 50}}
    found = variety_report(Halves(), batches, y, "a", **options)
    assert [(r.layer, r.variety) for r in found] == [(f"layers.{i}", v) for i in (0, 1) for v in "abcd"]
    kept, lost = found[:4], found[4:]
    assert all(r.accuracy > r.chance + 0.1 and r.compression > 1.3 * r.compression_shuffled for r in kept)
    assert all(r.compression < 1.15 * r.compression_shuffled for r in lost)
    assert kept[0].angle is None
    assert kept[1].angle < 35
    assert min(kept[2].angle, kept[3].angle, lost[1].angle) > 50
    assert [r.chance for r in kept] == pytest.approx([0.75] * 4, abs=0.1)
    every = variety_report(
        Halves(), batches[:1], y[:90], "a", pool="mean", drop_tokens=1, layers="layers.0", settings={"epochs": 1}
    )
    assert len(every) == 4
    two = variety_report(Halves(), batches[:1], y[:90] == "a", True, layers="layers.0", settings={"epochs": 1})
    assert [r.angle for r in two] == [None, None]
    with pytest.raises(ValueError, match="labels: 'z' and at least one other"):
        variety_report(Halves(), batches, y, "z", **options)
    with pytest.raises(ValueError, match="labels: 3 for 240 samples"):
        variety_report(Halves(), batches, y[:3], "a", **options)


# ---------------------------------------------------------------------- erasure


def test_erasure_takes_out_what_is_linear_and_moves_least():
    x, y = varieties()
    x = x.astype(np.float64) @ np.random.default_rng(2).normal(size=(12, 12))
    moments = GroupedMoments(12).update(x, y)
    erased = leace(moments).map(torch.from_numpy(x))
    after = GroupedMoments(12).update(erased, y)
    assert float((after.means - after.pooled().mean).abs().max()) < 1e-8
    torch.testing.assert_close(leace(moments).matrix @ leace(moments).matrix, leace(moments).matrix)
    # An orthogonal projection that removes the same differences moves rows further.
    plain = Subspace.span((moments.means - moments.pooled().mean).mT[:, :2])
    moved = (torch.from_numpy(x) - erased).square().sum(1).mean()
    assert float(moved) < float(plain.project(torch.from_numpy(x) - moments.pooled().mean).square().sum(1).mean())
    with pytest.raises(ValueError, match="one mean already"):
        leace(GroupedMoments(2).update(torch.tensor([[1.0, 2], [3, 4], [1, 2], [3, 4]]), [0, 0, 1, 1]))
    with pytest.raises(ValueError, match="at least two groups"):
        leace(GroupedMoments(2).update(torch.ones(3, 2), [0, 0, 0]))


# ---------------------------------------------------------------------- the penalty


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 4))


@pytest.fixture
def data():
    x, y = varieties()
    return torch.from_numpy(x), y


def test_the_penalty_is_the_mean_length_in_the_subspace(data):
    x, y = data
    model = network()
    with SubspaceDecoupling(model, "0", [x], y, "a", weight=0.5, relative=False, settings=FAST) as decoupling:
        model(x[:7])
        states = model[0](x[:7])
        expected = 0.5 * (states @ decoupling.subspace_.basis).norm(dim=1).mean()
        model(x[:7])
        found = decoupling.penalty()
        torch.testing.assert_close(found, expected)
        found.backward()
        assert bool(model[0].weight.grad.any())
    assert not model[0]._forward_hooks
    with SubspaceDecoupling(model, "0", [x], y, "a", settings=FAST) as decoupling:
        model(x)
        once = decoupling.penalty()
        model[0].weight.data *= 3
        model[0].bias.data *= 3
        model(x)
        torch.testing.assert_close(decoupling.penalty(), once)  # relative to the length of the states
        # Of chosen states alone.
        others = torch.from_numpy(y != "a")
        some = decoupling.penalty(others)
        model(x[others])
        torch.testing.assert_close(decoupling.penalty(), some)


def test_training_leaves_the_subspace_and_estimates_follow_the_steps(data):
    x, y = data
    options = {"settings": {**FAST, "epochs": 8}, "weight": 1.0, "every": 10}

    def trained(**more):
        model = network()
        with SubspaceDecoupling(model, "0", [x], y, "a", **{**options, **more}) as decoupling:
            loss = decoupling.added_to(lambda model, batch: model(batch).square().mean() * 1e-3)
            objective = Objective(model, loss, learning_rate=3e-3, after_step=lambda _, step: decoupling.step(step))
            with quiet_trainer(max_epochs=1) as trainer:
                trainer.fit(objective, DataLoader([x] * 25, batch_size=None))
            model(x)
            return decoupling, decoupling.penalty().item()

    online, last = trained()
    assert [each.step for each in online.history_] == [0, 10, 20]
    assert online.history_[0].angle is None
    assert all(each.angle is not None for each in online.history_[1:])
    with SubspaceDecoupling(network(), "0", [x], y, "a", **options) as start:
        start.model(x)
        assert last < 0.8 * start.penalty().item()
    fixed, _ = trained(kind="fixed")
    assert [each.step for each in fixed.history_] == [0]
    random, _ = trained(kind="random")
    assert random.subspace_.dim == online.subspace_.dim
    assert float(random.subspace_.overlap(online.subspace_)) < 0.7


def test_shrinkage_is_the_penalty_on_all_directions(data):
    x, y = data
    model = network()
    options = {"settings": FAST, "weight": 0.5, "relative": False, "kind": "shrinkage"}
    with SubspaceDecoupling(model, "0", [x], y, "a", **options) as decoupling:
        model(x)
        torch.testing.assert_close(decoupling.penalty(), 0.5 * model[0](x).norm(dim=1).mean())


def test_what_the_probe_before_says_of_states_that_have_moved(data):
    x, y = data
    model = network()
    with SubspaceDecoupling(model, "0", [x], y, "a", settings=FAST, every=5) as decoupling:
        decoupling.step(5)
        with torch.no_grad():
            model[0].weight.copy_(-model[0].weight)
        decoupling.step(10)
    first, same, moved = decoupling.history_
    assert first.accuracy_before is None
    assert same.accuracy_before == first.accuracy
    assert moved.accuracy > 0.8
    assert moved.accuracy_before < 0.4


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(12, 16), nn.Linear(16, 4), reentrant

    def forward(self, x):
        x = x.requires_grad_(self.training)
        return self.last(torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=self.reentrant))


def test_checkpointed_layers_are_seen_once_and_with_gradients_or_refused(data):
    x, y = data
    torch.manual_seed(0)
    model = Checkpointed(False)
    with SubspaceDecoupling(model, "first", [x.clone()], y, "a", settings=FAST) as decoupling:
        model.train()(x.clone())
        states = decoupling._states
        decoupling.penalty().backward()  # in which the layer runs again
        assert decoupling._states is states
        assert bool(model.first.weight.grad.any())
    model = Checkpointed(True)
    with SubspaceDecoupling(model, "first", [x.clone()], y, "a", settings=FAST) as decoupling:
        model.train()(x.clone())
        with pytest.raises(ValueError, match="checkpoint activations with use_reentrant=False"):
            decoupling.penalty()
        model(x.clone()).sum().backward()  # what is seen in the second run comes too late
        with pytest.raises(ValueError, match="checkpoint activations with use_reentrant=False"):
            decoupling.penalty()


def test_a_probe_at_chance_is_said_and_penalises_nothing(data):
    x, _ = data
    labels = np.random.default_rng(0).permutation(np.arange(len(x)) % 2)
    model = network()
    decoupling = SubspaceDecoupling(model, "0", [x], labels, 1, settings={"epochs": 1})
    with pytest.warns(UserWarning, match="step 0: the probe is at chance"):
        decoupling.__enter__()
    model(x)
    assert float(decoupling.penalty()) == 0
    assert decoupling.subspace_ is None
    assert not decoupling.history_[0].active
    decoupling.__exit__(None, None, None)


@pytest.mark.parametrize("pool", ["rows", "mean"])
def test_padding_of_a_transformer_is_never_seen(pool):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaModel(config).eval()
    ids = torch.randint(5, 40, (40, 9))
    ids[20:] = 3 + ids[20:] % 2
    labels = ["new"] * 20 + ["old"] * 20
    found = []
    for side in ("none", "right", "left"):
        pad, ones = torch.full((40, 3), 7), torch.ones(40, 9, dtype=torch.int64)
        parts = {"none": [ids], "right": [ids, pad], "left": [pad, ids]}[side]
        masks = {"none": [ones], "right": [ones, pad * 0], "left": [pad * 0, ones]}[side]
        mask = torch.cat(masks, 1)
        batch = {
            "input_ids": torch.cat(parts, 1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(0),
        }
        options = {"pool": pool, "settings": {"epochs": 30, "learning_rate": 0.05, "batch_size": 360, "held_out": 0.0}}
        with SubspaceDecoupling(model, -1, [batch], labels, "old", probe="ovr", **options) as decoupling:
            model(**batch)
            found.append((decoupling.subspace_.basis.abs(), decoupling.penalty().detach()))
    for basis, penalty in found[1:]:
        torch.testing.assert_close(basis, found[0][0], atol=1e-3, rtol=0)
        torch.testing.assert_close(penalty, found[0][1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dominant": "z"}, "labels: 'z' and at least one other are needed"),
        ({"labels": ["a"] * 400}, "labels: 'a' and at least one other"),
        ({"labels": ["a", "b"]}, "labels: 2 for other than so many samples"),
        ({"every": 0}, "every: expected an integer >= 1"),
        ({"kind": "none"}, "kind"),
    ],
)
def test_a_context_is_not_entered_with(data, options, message):
    x, y = data
    model = network()
    given = {"labels": y, "dominant": "a", "settings": {"epochs": 1}, **options}
    with pytest.raises(ValueError, match=message), SubspaceDecoupling(model, "0", [x], **given):
        pass
    assert not model[0]._forward_hooks
