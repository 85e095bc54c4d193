"""Deep subspace clusterers: planted subspaces, stages, what ends them, networks that are given, bad input."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from subspace_clusters import check_estimator_but_clustering, union_of_subspaces

pytest.importorskip("lightning", reason="deep clusterers train with Lightning (extra: train)")

from subspan.cluster import DeepSubspaceClustering, DSCNetClustering
from subspan.cluster.deep_training import SelfExpressionModule, StructureModule, settled
from subspan.geometry import Subspace


def images(*, seed=0):
    """Three kinds of 8 x 8 pictures, each a random mixture of three templates of its own."""
    random = np.random.default_rng(seed)
    templates = random.random((3, 3, 64)) * (random.random((3, 3, 64)) < 0.3)
    rows = [random.random((20, 3)) @ part for part in templates]
    return np.vstack(rows).reshape(60, 8, 8), np.repeat(np.arange(3), 20)


SHORT = {"encoder": "linear", "pretrain_steps": 3, "max_steps": 25, "n_init": 1, "hidden": (8, 4)}


@pytest.mark.slow
@parametrize_with_checks([DeepSubspaceClustering(3, retain=5, affine=True, structure_steps=3, **SHORT)])
def test_scikit_learn_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check(estimator)


@pytest.mark.slow
def test_scikit_learn_checks_of_dsc_net():
    # Its clustering check wants blobs in the plane told apart, which are no subspaces, and there is no constant to add.
    check_estimator_but_clustering(DSCNetClustering(3, expression_weight=10.0, **SHORT))


def test_planted_subspaces_are_found_and_labels_are_not_looked_at():
    x, labels, _ = union_of_subspaces(n=30)
    options = {"encoder": "linear", "retain": 4, "rank": 4, "random_state": 0}
    model = DeepSubspaceClustering(3, **options).fit(x, labels)
    assert adjusted_rand_score(labels, model.labels_) == 1
    assert set(model.n_steps_) == {"pretrain", "express", "structure"}
    assert model.n_steps_["structure"] < 100
    assert 20 < model.n_steps_["express"] < 700
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
    model = DeepSubspaceClustering(3, encoder=network, retain=4, rank=4, random_state=0).fit(x)
    assert adjusted_rand_score(labels, model.labels_) == 1
    assert "pretrain" not in model.n_steps_
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))
    assert network.training
    assert model.subspaces_.basis.shape[-2] == 30 + 40 + 35 + 35
    one = DeepSubspaceClustering(3, encoder=network, layers=["0"], retain=4, rank=4, random_state=0).fit(x)
    assert one.subspaces_.basis.shape[-2] == 40
    assert adjusted_rand_score(labels, one.labels_) == 1
    identity = DeepSubspaceClustering(3, encoder=nn.Identity(), layers="last", retain=4, random_state=0).fit(x)
    assert adjusted_rand_score(labels, identity.labels_) == 1


def test_pictures_of_one_and_of_several_channels():
    x, labels = images()
    small = {"channels": (4,), "kernels": (3,), "retain": 3, "max_steps": 200, "random_state": 0}
    model = DeepSubspaceClustering(3, **small).fit((x * 255).astype(np.uint8))
    assert adjusted_rand_score(labels, model.labels_) > 0.8
    assert model.predict((x[:5] * 255).astype(np.uint8)).shape == (5,)
    with pytest.raises(ValueError, match=r"expected items of shape \(1, 8, 8\)"):
        model.predict(np.ones((2, 8, 9)))
    coloured = np.stack([x, 0.5 * x], axis=1)
    few = {**small, "pretrain_steps": 5, "max_steps": 30, "stages": ("express",)}
    found = DeepSubspaceClustering(3, **few).fit(coloured)
    assert set(found.n_steps_) == {"express"}
    dsc = DSCNetClustering(3, channels=(4,), kernels=(3,), expression_weight=10.0, max_steps=300, dim=2, random_state=0)
    assert adjusted_rand_score(labels, dsc.fit(x).labels_) > 0.8


def test_the_end_is_found_without_labels():
    assert not settled([1.0] * 10, 0.02)
    assert settled([1.0] * 11, 0.02)
    assert not settled([1.0] * 11, 0)
    assert not settled([1 - 0.01 * i for i in range(11)], 0.02)
    assert settled([1 - 0.001 * i for i in range(11)], 0.02)
    # A swing ends where it began, but it is no end.
    assert not settled([1 + 0.1 * np.sin(i) for i in range(11)], 0.5)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="nothing to express"):
        SelfExpressionModule(20)
    easy = DeepSubspaceClustering(2, encoder=nn.Identity(), retain=3, target=0.5, tol=0, random_state=0).fit(x)
    hard = DeepSubspaceClustering(2, encoder=nn.Identity(), retain=3, tol=0, target=0, max_steps=200, random_state=0)
    assert easy.n_steps_["express"] < hard.fit(x).n_steps_["express"] == 200
    assert easy.history_[-1] < 0.5**2 <= easy.history_[-2]


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


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({}, np.full((6, 4), np.nan), "NaN"),
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
        ({"tol": -1}, np.eye(6), "tol, target"),
        ({"learning_rate": 0}, np.eye(6), "learning_rate"),
        ({"affine": True}, np.ones((6, 3)), "all rows are the same"),
        ({"encoder": nn.Linear(3, 3), "layers": "absent"}, np.eye(6), "no layer 'absent'"),
    ],
)
def test_bad_input(options, x, message):
    model = DeepSubspaceClustering(**{"n_clusters": 2, "encoder": "linear", "retain": 3, **options})
    with pytest.raises(ValueError, match=message):
        model.fit(x)


def test_dsc_net_needs_a_decoder():
    with pytest.raises(ValueError, match="needs one with a decoder"):
        DSCNetClustering(2, encoder=nn.Identity()).fit(np.eye(6))


def test_copies_are_said():
    x, _, _ = union_of_subspaces(n=5)
    model = DeepSubspaceClustering(3, retain=4, random_state=0, **SHORT)
    with pytest.warns(UserWarning, match="3 rows repeat others"):
        model.fit(np.vstack([x, x[:3]]))
