"""Rep4Ex: a planted state out of what bends it, effects of actions beyond those tried, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from subspan.dynamics import ControlFunctionRegressor, Rep4Ex, Rep4ExAutoencoder, Rep4ExLoss
from subspan.geometry import AffineMap, Subspace
from subspan.measures import affine_recovery

pytest.importorskip("lightning")
# Of trainings of two steps.
pytestmark = pytest.mark.filterwarnings("ignore:A. weak actions", "ignore:A. .* never seen")
QUICK = {"max_steps": 2, "hidden": (4,), "random_state": 0, "control": ControlFunctionRegressor("linear")}


def planted(n=3000, seed=0):
    """Bent observations of a state with one dimension, actions, confounded outcomes, the state, and the truth."""
    random = np.random.default_rng(seed)
    a, v = random.uniform(-1, 1, size=(n, 1)), random.normal(size=(n, 1))
    z = 2 * a + v
    x = np.hstack([z, z + np.tanh(2 * z), np.exp(0.7 * z)]) @ np.random.default_rng(7).normal(size=(3, 3)) + 5
    effect = lambda s: 3 * np.tanh(s[:, 0]) + s[:, 0]  # noqa: E731
    y = effect(z) - 4 * v[:, 0] + 0.1 * random.normal(size=n)
    return x, a, y, z, lambda actions: np.array([effect(2 * each + v).mean() for each in actions])


@pytest.fixture(scope="module")
def trained():
    """With the constraint and without, on the same draws."""
    x, a, y, _, _ = planted()
    options = {
        "dim": 1,
        "hidden": (32, 32),
        "max_steps": 250,
        "batch_size": 1024,
        "learning_rate": 5e-3,
        "random_state": 0,
    }
    control = ControlFunctionRegressor("kernel", random_state=0)
    return [Rep4Ex(penalty=penalty, control=control, **options).fit(x, a, y) for penalty in (10.0, 0.0)]


def test_the_constraint_finds_the_state_and_an_autoencoder_alone_bends_it(trained):
    x, _, _, z, _ = planted()
    ours, plain = (affine_recovery(z, model.transform(x)) for model in trained)
    assert ours > 0.96
    assert plain < ours - 0.05
    assert trained[0].invariance_.value < trained[1].invariance_.value / 5
    new_x, new_a, *_ = planted(1000, 1)
    tests = [model.invariance_test(new_x, new_a, random_state=0) for model in trained]
    assert tests[1].p_value == 0.005 < tests[0].p_value
    assert np.isclose(np.var(trained[0].transform(x), ddof=1), 1, atol=1e-3)
    back = trained[0].inverse_transform(trained[0].transform(x))
    assert np.mean((back - x) ** 2) / np.var(x, 0).mean() < 0.01
    assert trained[0].reconstruction_error_ < 0.01


def test_effects_beyond_the_actions_beat_a_plain_regression(trained):
    x, a, y, z, truth = planted()
    model, asked = trained[0], np.array([[1.2], [-1.2]])
    ours = np.abs(model.predict_do(asked) - truth(asked)).max()
    rising = np.polynomial.Polynomial.fit(a[:, 0], y, 5)
    at_x = np.polynomial.Polynomial.fit(z[:, 0], y, 7)  # of y on the state itself: takes confounding for an effect
    assert ours < 0.3
    assert np.abs(rising(asked[:, 0]) - truth(asked)).max() > 4 * ours
    assert np.abs([at_x(2 * each + z - 2 * a).mean() for each in asked] - truth(asked)).max() > 4 * ours
    assert isinstance(model.action_map_, AffineMap)
    assert isinstance(model.subspace_, Subspace)
    noise = z[:500] - 2 * a[:500]
    expected = 3 * np.tanh(z[:500, 0]) + z[:500, 0] - 4 * noise[:, 0]
    assert np.sqrt(np.mean((model.predict(x[:500], a[:500]) - expected) ** 2)) < 0.5
    low, high = model.predict_interval(asked[:1], n_resamples=5, random_state=0)
    assert low[0] < high[0]
    with pytest.warns(UserWarning, match="never seen"):
        model.predict_do([[6.0]])
    assert model.support([[6.0], [0.0]])[0] == 1


def test_terms_of_the_loss():
    x, a = torch.randn(64, 5), torch.rand(64, 2)
    model = Rep4ExAutoencoder((5,), 2, hidden=(4,))
    loss = Rep4ExLoss(3.0, warmup=4)
    loss.invariance.forward = lambda z, a: z.sum() * 0 + 2.0
    assert [loss(model, (x, a), step)["invariance"].item() for step in (0, 2, 4, 9, None)] == [0, 3, 6, 6, 6]
    error = ((model(x)[0].detach() - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert loss(model, (x, a), 0)["reconstruction"].item() == pytest.approx(float(error), rel=1e-5)
    assert list(Rep4ExLoss(0.0)(model, (x, a))) == ["reconstruction"]
    assert [layer.out_features for layer in model.decoder if isinstance(layer, nn.Linear)] == [4, 5]


def test_images_and_networks_of_ones_own():
    random = np.random.default_rng(0)
    a = random.uniform(size=(60, 2))
    images = random.random((60, 1, 8, 8)).astype(np.float32)
    model = Rep4Ex(dim=2, max_steps=2, random_state=0).fit(images, a)
    assert model.transform(images).shape == (60, 2)
    assert model.inverse_transform(model.transform(images)).shape == images.shape
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    decoder = nn.Sequential(nn.Linear(2, 64), nn.Unflatten(1, (1, 8, 8)))
    before = encoder[1].weight.clone()
    own = Rep4Ex(dim=2, encoder=encoder, decoder=decoder, max_steps=2, random_state=0).fit(3 * images - 9, a)
    assert encoder[1].weight.equal(before)
    assert not own.network_.encoder[1].weight.equal(before)
    assert own.inverse_transform(own.transform(3 * images - 9)).shape == images.shape
    with pytest.raises(ValueError, match=r"y: the fit had no outcomes"):
        own.predict_do(a)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_seed_is_the_same_answer_in_the_kind_of_the_rows(dtype):
    x, a, y, _, _ = planted(100)
    x = x.astype(dtype)
    one, other = (Rep4Ex(**QUICK).fit(x, a, y) for _ in range(2))
    assert one.dim_ == 1
    assert one.transform(x).dtype == dtype
    np.testing.assert_array_equal(one.transform(x), other.transform(x))
    np.testing.assert_array_equal(one.predict_do(a), other.predict_do(a))
    tensors = Rep4Ex(**QUICK).fit(torch.from_numpy(x), torch.from_numpy(a), torch.from_numpy(y))
    assert isinstance(tensors.predict(torch.from_numpy(x), torch.from_numpy(a)), torch.Tensor)
    np.testing.assert_allclose(tensors.predict_do(torch.from_numpy(a)).numpy(), one.predict_do(a), rtol=1e-5)


def test_one_scale_for_all_columns_keeps_what_is_large():
    x, a, _, _, _ = planted(100)
    x = x * [1, 10, 100]
    each, common = (Rep4Ex(scaling=scaling, **QUICK).fit(x, a) for scaling in ("columns", "common"))
    np.testing.assert_allclose(each._scale, x.std(0), rtol=1e-5)
    np.testing.assert_allclose(common._scale, np.sqrt((x.std(0) ** 2).mean()), rtol=1e-5)
    assert common.inverse_transform(common.transform(x)).shape == x.shape


def test_all_rows_teach_the_encoder_and_those_with_an_outcome_the_rest():
    x, a, y, _, _ = planted(200)
    y[:150] = np.nan
    model = Rep4Ex(**QUICK).fit(x, a, y)
    whole = Rep4Ex(**QUICK).fit(x, a)
    np.testing.assert_array_equal(model.transform(x), whole.transform(x))
    assert model.control_.n_outcomes_ == 50
    assert not hasattr(whole.fit(x, a, planted(200)[2]).fit(x, a), "control_")


def test_the_number_of_directions_is_what_actions_move():
    random = np.random.default_rng(0)
    a = random.uniform(-1, 1, size=(500, 3))
    x = np.hstack([2 * a[:, :2] + random.normal(size=(500, 2)), random.normal(size=(500, 2))])
    assert Rep4Ex(**QUICK).fit(x, a).dim_ == 2


def test_what_it_warns_of():
    x, a, _, _, _ = planted(200)
    for few, message in (
        (np.sign(a), "2 different actions: every mean is affine"),
        (np.round(2 * a), "5 different actions;"),
    ):
        with pytest.warns(UserWarning, match=message):
            Rep4Ex(**QUICK).fit(x, few)
    one_hot = np.eye(3)[np.digitize(a[:, 0], [-0.3, 0.3])]
    with pytest.warns(UserWarning, match="3 different actions: every mean is affine"):
        assert Rep4Ex(**QUICK).fit(x, one_hot).first_stage_.actions.dim == 2
    with pytest.warns(UserWarning, match="weak actions"):
        Rep4Ex(**{**QUICK, "dim": 1}).fit(np.random.default_rng(0).normal(size=(200, 3)), a)
    flat = nn.Linear(3, 2, bias=False)
    flat.weight.data = torch.tensor([[1.0, 1, 1], [2.0, 2, 2]])
    flat.requires_grad_(False)
    two = np.hstack([a, np.random.default_rng(1).uniform(size=(200, 1))])
    with pytest.warns(UserWarning, match=r"no variance along \(-?0.89, -?0.45\) of 2 dimensions"):
        Rep4Ex(**{**QUICK, "dim": 2, "encoder": flat, "penalty": 0.0}).fit(x, two)


def holed(x):
    return np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"dim": 2}, lambda x, a, y: (x, a, y), "A: has 1 independent columns, and the state 2 dimensions"),
        ({"dim": 2}, lambda x, a, y: (x, np.sign(a), y), "A: 2 different actions span 1, and the state 2 dimensions"),
        ({}, lambda x, a, y: (x, 0 * a + 1, y), "A: is constant"),
        ({}, lambda x, a, y: (x, holed(a), y), "A: 1 of 100 rows contain NaN"),
        ({}, lambda x, a, y: (holed(x), a, y), "X: 1 of 100 rows contain NaN"),
        ({}, lambda x, a, y: (x, a[:-1], y), "A: expected 100 rows, one for each of X, got 99"),
        ({}, lambda x, a, y: (x, a, y[:-1]), "y: expected 100 outcomes"),
        ({}, lambda x, a, y: (x, a, np.where(np.arange(100) < 19, y, np.nan)), "y: 19 known outcomes are too few; 20"),
        ({}, lambda x, a, y: (x[:19], a[:19], y[:19]), r"X: 19 rows of 3 feature\(s\) are too few; 1 latents and 1 a"),
        ({}, lambda x, a, y: (0 * x, a, y), "X: all rows are the same"),
        ({}, lambda x, a, y: (np.zeros((100, 1, 8, 8)) + a[:, :, None, None] ** 2, a, y), "dim: of images it has to"),
        ({"dim": 1}, lambda x, a, y: (np.ones((100, 1, 8, 8)) * a[:, :, None, None], a, y), r"pixels must lie in \[0"),
        ({"dim": 1, "encoder": nn.Linear(3, 2)}, lambda x, a, y: (x, a, y), r"encoder: expected \(100, 1\) latents"),
    ],
)
def test_what_fit_refuses(options, given, message):
    with pytest.raises(ValueError, match=message):
        Rep4Ex(**{**QUICK, **options}).fit(*given(*planted(100)[:3]))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Rep4ExAutoencoder((3, 3), 1), r"input_shape: expected \(p,\) or \(c, h, w\)"),
        (lambda: Rep4ExAutoencoder((3,), 0), "dim: at least 1"),
        (lambda: Rep4ExLoss(-1.0), "penalty: must be 0 or more"),
        (lambda: Rep4ExLoss()(nn.Identity(), (torch.ones(9, 2), torch.rand(9, 1))), "x: all rows of the batch"),
    ],
)
def test_what_the_parts_refuse(made, message):
    with pytest.raises(ValueError, match=message):
        made()
