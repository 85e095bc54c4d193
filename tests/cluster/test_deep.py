"""Deep subspace clusterers: planted subspaces, stages, what ends them, networks that are given, bad input."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import nn

from subspace_clusters import union_of_subspaces

pytest.importorskip("lightning", reason="deep clusterers train with Lightning (extra: train)")

from subspan.cluster import DeepSubspaceClustering, DSCNetClustering
from subspan.cluster.deep_training import DSCNetModule, SelfExpressionModule, StructureModule
from subspan.geometry import Subspace
from subspan.nn.autoencoders import LinearAutoencoder


def images(*, seed=0):
    """Three kinds of 8 x 8 pictures, each a random mixture of three templates of its own."""
    random = np.random.default_rng(seed)
    templates = random.random((3, 3, 64)) * (random.random((3, 3, 64)) < 0.3)
    rows = [random.random((20, 3)) @ part for part in templates]
    return np.vstack(rows).reshape(60, 8, 8), np.repeat(np.arange(3), 20)


SHORT = {"encoder": "linear", "pretrain_steps": 3, "max_steps": 25, "n_init": 1, "hidden": (8, 4)}


def test_planted_subspaces_are_found_and_labels_are_not_looked_at():
    x, labels, _ = union_of_subspaces(n=30)
    options = {"encoder": "linear", "retain": 4, "rank": 4, "max_steps": 150, "random_state": 0}
    model = DeepSubspaceClustering(3, **options).fit(x, labels)
    assert adjusted_rand_score(labels, model.labels_) == 1
    assert set(model.n_steps_) == {"pretrain", "express", "structure"}
    assert model.n_steps_["structure"] < 100
    steps, modularities = zip(*model.looks_)
    assert steps[:2] == (50, 100)
    assert model.n_steps_["express"] == steps[-1] <= 150
    assert max(modularities) > 0.6
    assert len(model.history_) == model.n_steps_["express"]
    assert (np.diag(model.representation_) == 0).all()
    assert abs(model.affinity_ - model.affinity_.T).max() == 0
    assert isinstance(model.subspaces_, Subspace)
    assert (model.predict(x) == model.labels_).mean() > 0.95
    shuffled = np.random.default_rng(1).permutation(labels)
    again = DeepSubspaceClustering(3, **options).fit(torch.from_numpy(x), shuffled)
    assert isinstance(again.labels_, torch.Tensor)
    assert (again.labels_.numpy() == model.labels_).all()
    np.testing.assert_array_equal(again.representation_, model.representation_)


def test_a_network_that_is_given_is_not_trained_and_gives_its_layers():
    x, labels, _ = union_of_subspaces(n=30)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(30, 40, bias=False), nn.Linear(40, 35, bias=False), nn.Dropout(0.5))
    before = [parameter.clone() for parameter in network.parameters()]
    given = {"retain": 4, "rank": 4, "max_steps": 100, "random_state": 0}
    model = DeepSubspaceClustering(3, encoder=network, **given).fit(x)
    assert adjusted_rand_score(labels, model.labels_) == 1
    assert "pretrain" not in model.n_steps_
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))
    assert network.training
    assert model.subspaces_.basis.shape[-2] == 30 + 40 + 35 + 35
    one = DeepSubspaceClustering(3, encoder=network, layers=["0"], **given).fit(x)
    assert one.subspaces_.basis.shape[-2] == 40
    assert adjusted_rand_score(labels, one.labels_) == 1
    identity = DeepSubspaceClustering(3, encoder=nn.Identity(), layers="last", **given).fit(x)
    assert adjusted_rand_score(labels, identity.labels_) == 1


def test_pictures_of_one_and_of_several_channels():
    x, labels = images()
    small = {"channels": (4,), "kernels": (3,), "retain": 3, "max_steps": 120, "random_state": 0}
    model = DeepSubspaceClustering(3, **small).fit((x * 255).astype(np.uint8))
    assert adjusted_rand_score(labels, model.labels_) > 0.8
    assert model.predict((x[:5] * 255).astype(np.uint8)).shape == (5,)
    with pytest.raises(ValueError, match=r"expected items of shape \(1, 8, 8\)"):
        model.predict(np.ones((2, 8, 9)))
    coloured = np.stack([x, 0.5 * x], axis=1)
    few = {**small, "pretrain_steps": 5, "max_steps": 30, "stages": ("express",)}
    found = DeepSubspaceClustering(3, **few).fit(coloured)
    assert set(found.n_steps_) == {"express"}
    dsc = DSCNetClustering(3, channels=(4,), kernels=(3,), expression_weight=10.0, max_steps=150, dim=2, random_state=0)
    assert adjusted_rand_score(labels, dsc.fit(x).labels_) > 0.8


def test_the_look_with_the_largest_modularity_is_kept_without_labels():
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="nothing to express"):
        SelfExpressionModule(20)
    # Numbers that rise to the third look and fall from there: two looks on, three back.
    numbers, seen = iter([1.0, 2.0, 3.0, 2.5, 2.9, 3.0, 1.0, 2.0, 4.0]), []

    def look(c):
        seen.append(c.clone())
        return next(numbers)

    model = DeepSubspaceClustering(2)
    module = SelfExpressionModule(20, fixed=x, look=look, every=4)
    assert model._train(module, x, 100) == 8 * 4
    assert [step for step, _ in module.looks] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert torch.equal(module.coefficients(), seen[-1])
    module.restore()
    assert torch.equal(module.coefficients(), seen[2])
    # The last steps are looked at, whole looks or not.
    few = SelfExpressionModule(20, fixed=x, look=lambda c: float(len(seen)), every=4)
    model._train(few, x, 6)
    few.restore()
    assert [step for step, _ in few.looks] == [4, 6]


def test_the_fit_goes_back_to_the_look_that_is_kept(monkeypatch):
    x, _, _ = union_of_subspaces(n=8)
    options = {"stages": ("express",), "retain": 4, "look_every": 4, "random_state": 0}
    found = []
    for steps in (4, 8):
        values = iter([3.0, 1.0])
        monkeypatch.setattr("subspan.cluster.deep.modularity", lambda affinity, labels, values=values: next(values))
        found.append(DeepSubspaceClustering(3, **{**SHORT, **options, "max_steps": steps}).fit(x))
    short, long = found
    assert long.looks_ == [(4, 3.0), (8, 1.0)]
    np.testing.assert_array_equal(long.representation_, short.representation_)
    assert all(torch.equal(a, b) for a, b in zip(long.encoder_.parameters(), short.encoder_.parameters()))
    assert len(long.history_) == 8


def test_stage_two_descends_the_self_expression_and_the_reconstruction():
    torch.manual_seed(0)
    items = torch.rand(12, 9)
    network = LinearAutoencoder([9, 5, 3])
    module = SelfExpressionModule(12, fixed=nn.functional.normalize(items), autoencoder=network, layers=(0, 1))
    with torch.no_grad():
        module.c.copy_(0.1 * torch.randn(12, 12))
    module.training_loss(items).backward()
    c = module.c.detach() - torch.diag(module.c.detach().diagonal())
    found = network.encode(items)
    layers = [nn.functional.normalize(layer) for layer in (items, *found)]
    error = sum((z - c @ z).square().sum() / z.square().sum() for z in layers)
    whole = error + (network.decode(found[-1]) - items).square().sum() / items.square().sum()
    assert module.history == [pytest.approx(float(error))]
    # The decoder is moved by the reconstruction alone, the encoder by both.
    parameters = list(network.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(whole, parameters)):
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(parameter.grad, gradient)


def test_structure_takes_affinity_away_between_clusters_alone():
    random = torch.Generator().manual_seed(0)
    c = torch.rand(6, 6, generator=random)
    c.fill_diagonal_(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    seen = []

    def cluster(current, before):
        seen.append(before)
        return labels

    model = DeepSubspaceClustering(2, structure_steps=50)
    module = StructureModule(c, cluster)
    steps = model._train(module, torch.zeros(6, 1), 50)
    assert steps == 11
    assert seen[0] is None
    within = labels.unsqueeze(1) == labels
    assert torch.equal(module.coefficients()[within], c[within])
    off = ~within
    assert (module.coefficients()[off] < c[off]).all()


def test_affine_rows_have_a_constant_as_large_as_rows_typically_are():
    x = 3 + 5 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    model = DeepSubspaceClustering(2, encoder=nn.Identity(), affine=True)
    points = model._points(model._items(x, reset=True))
    lengths = (x - x.mean(0)).norm(dim=1)
    torch.testing.assert_close(points[:, -1] / points[:, :-1].norm(dim=1), lengths.square().mean().sqrt() / lengths)


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({}, np.full((6, 4), np.nan), "NaN"),
        ({"n_clusters": 1}, np.eye(1, 6), "minimum of 2 is required"),
        ({"n_clusters": 7}, np.eye(6), "7 clusters asked for of n_samples = 6"),
        ({"retain": 6}, np.eye(6), "retain: must be below n_samples = 6"),
        ({"retain": 0}, np.eye(6), "retain: expected an integer >= 1"),
        ({}, np.vstack([np.zeros((2, 6)), np.eye(6)]), r"2 rows are zero .*rows 0, 1"),
        ({}, np.zeros((6, 6)), "all values are zero"),
        ({"encoder": "conv"}, np.eye(6), "takes images"),
        ({"encoder": "no"}, np.eye(6), "encoder: expected 'conv'"),
        ({"layers": "first"}, np.eye(6), "layers: 'all' or 'last'"),
        ({"stages": ("pretrain",)}, np.eye(6), "'express' among them"),
        ({"stages": ("express", "pretrain")}, np.eye(6), "in this order"),
        ({"max_steps": 0}, np.eye(6), "max_steps"),
        ({"look_every": 0}, np.eye(6), "look_every"),
        ({"learning_rate": 0}, np.eye(6), "learning_rate"),
        ({"affine": True}, np.ones((6, 3)), "all rows are the same"),
        ({"encoder": nn.Linear(3, 3), "layers": "absent"}, np.eye(6), "no layer 'absent'"),
    ],
)
def test_bad_input(options, x, message):
    model = DeepSubspaceClustering(**{"n_clusters": 2, "encoder": "linear", "retain": 3, **options})
    with pytest.raises(ValueError, match=message):
        model.fit(x)


def test_dsc_net_descends_its_three_terms():
    torch.manual_seed(0)
    items = torch.rand(12, 9)
    network = LinearAutoencoder([9, 5, 3])
    module = DSCNetModule(12, network, coefficient_weight=0.7, expression_weight=0.3)
    with torch.no_grad():
        module.c.copy_(0.1 * torch.randn(12, 12))
    module.training_loss(items).backward()
    z = network.encode(items)[-1]
    error = (z - module.c @ z).square().sum()
    rest = (items - network.decode(module.c @ z)).square().sum()
    parameters = list(module.parameters())
    whole = rest / 2 + 0.7 * module.c.square().sum() + 0.3 * error / 2
    assert module.history == [pytest.approx(float(error / z.square().sum()))]
    for parameter, gradient in zip(parameters, torch.autograd.grad(whole, parameters)):
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(parameter.grad, gradient)


def test_dsc_net_needs_a_decoder():
    with pytest.raises(ValueError, match="needs one with a decoder"):
        DSCNetClustering(2, encoder=nn.Identity()).fit(np.eye(6))


def test_copies_are_said():
    x, _, _ = union_of_subspaces(n=5)
    model = DeepSubspaceClustering(3, retain=4, random_state=0, **SHORT)
    with pytest.warns(UserWarning, match="3 rows repeat others"):
        model.fit(np.vstack([x, x[:3]]))
