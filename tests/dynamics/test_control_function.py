"""Control functions on a state that is seen: two-stage least squares, planted effects, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chi2

from subspan.dynamics import ControlFunctionRegressor, first_stage
from subspan.geometry import Subspace


def planted(n=2000, d=2, p=3, seed=0, bent=False):
    """State, actions, confounded outcomes, and the effect of an action."""
    random = np.random.default_rng(seed)
    a, v = random.uniform(-1, 1, size=(n, p)), random.normal(size=(n, d))
    matrix = 2 * np.linalg.qr(np.random.default_rng(7).normal(size=(p, p)))[0][:d]
    z = a @ matrix.T + v + 1
    effect = (lambda s: 2 * np.sin(s[..., 0]) + 0.3 * s[..., -1] ** 2) if bent else lambda s: s @ np.arange(1.0, d + 1)
    y = effect(z) - 3 * v[:, 0] + (np.cos(v[:, -1]) - np.exp(-0.5)) * bent + 0.1 * random.normal(size=n)
    return z, a, y, lambda actions: np.array([effect(matrix @ each + v + 1).mean() for each in actions])


def two_stages(z, a, y):
    """Slope and constant of two-stage least squares, and the fitted mean of z."""
    ones = np.ones((len(a), 1))
    first = np.linalg.lstsq(np.hstack([a, ones]), z, rcond=None)[0]
    fitted = np.hstack([np.hstack([a, ones]) @ first, ones])
    theta = np.linalg.lstsq(fitted, y, rcond=None)[0]
    return lambda actions: (
        np.hstack([np.hstack([actions, np.ones((len(actions), 1))]) @ first, np.ones((len(actions), 1))]) @ theta
    )


def quietly(function, *args, **options):
    with pytest.warns(UserWarning, match="never seen"):
        return function(*args, **options)


def test_linear_functions_are_two_stage_least_squares():
    z, a, y, _ = planted()
    model = ControlFunctionRegressor("linear").fit(z, a, y)
    asked = np.array([[0.3, -0.2, 0.1], [0.0, 0.5, 0.5]])
    np.testing.assert_allclose(model.predict_do(asked), two_stages(z, a, y)(asked), atol=1e-8)
    residual = (
        z
        - np.hstack([a, np.ones((len(a), 1))]) @ np.linalg.lstsq(np.hstack([a, np.ones((len(a), 1))]), z, rcond=None)[0]
    )
    design = np.hstack([z, residual, np.ones((len(z), 1))])
    np.testing.assert_allclose(
        model.predict(z[:50], a[:50]), (design @ np.linalg.lstsq(design, y, rcond=None)[0])[:50], atol=1e-8
    )
    turned = z @ np.array([[1.0, 100.0], [3.0, -2.0]]) + 5
    again = ControlFunctionRegressor("linear").fit(turned, a, y)
    np.testing.assert_allclose(again.predict_do(asked), model.predict_do(asked), atol=1e-6)
    np.testing.assert_allclose(again.predict(turned[:5], a[:5]), model.predict(z[:5], a[:5]), atol=1e-6)


def test_kernel_functions_find_a_bent_effect_beyond_the_actions_and_a_plain_regression_does_not():
    z, a, y, truth = planted(3000, bent=True)
    asked = 1.5 * np.vstack([np.eye(3), -np.eye(3)])
    model = ControlFunctionRegressor("kernel", random_state=0).fit(z, a, y)
    assert np.mean((model.predict_do(asked) - truth(asked)) ** 2) < 0.02
    # A regression of y on the state alone, even one that knows the shapes, takes what moves both for an effect.
    design = lambda s: np.hstack([s, np.sin(s), s**2, np.ones((len(s), 1))])  # noqa: E731
    weights = np.linalg.lstsq(design(z), y, rcond=None)[0]
    reached = [model.first_stage_.map.map(each).numpy() + model._noise.numpy() for each in asked]
    assert np.mean((np.array([(design(s) @ weights).mean() for s in reached]) - truth(asked)) ** 2) > 2


@pytest.mark.parametrize("outcome", ["mlp", "kernel", "linear"])
def test_effects_are_means_over_rows_wherever_constants_fell(outcome):
    if outcome == "mlp":
        pytest.importorskip("lightning")
    z, a, y, _ = planted(300)
    model = ControlFunctionRegressor(outcome, max_steps=3, random_state=0).fit(z, a, y)
    asked, noise = torch.tensor([[0.1, 0.2, -0.3], [0.4, 0.0, 0.2]], dtype=torch.float64), model._noise
    means = model.first_stage_.map.map(asked)
    loop = [float((model._effects.outcome(mean + noise) + model._effects.control(noise)).mean()) for mean in means]
    np.testing.assert_allclose(model.predict_do(asked.numpy()), loop, rtol=1e-9)
    before, one = model.predict_do(asked.numpy()), model.predict(z[:9], a[:9])
    effects = model._effects
    model._effects = type(effects)(lambda x: effects.outcome(x) - 7, lambda x: effects.control(x) + 7)
    np.testing.assert_allclose(model.predict_do(asked.numpy()), before, rtol=1e-9)
    np.testing.assert_allclose(model.predict(z[:9], a[:9]), one, rtol=1e-9)
    again = ControlFunctionRegressor(outcome, max_steps=3, random_state=0).fit(z, a, y)
    np.testing.assert_allclose(again.predict_do(asked.numpy()), before, rtol=1e-9)


def test_rows_without_an_outcome_still_say_how_actions_move_the_state():
    z, a, y, _ = planted()
    y[::3] = np.nan
    model = ControlFunctionRegressor("linear").fit(z, a, y)
    assert model.n_outcomes_ == np.isfinite(y).sum()
    np.testing.assert_allclose(model.first_stage_.map.matrix, first_stage(*map(torch.from_numpy, (z, a))).map.matrix)
    known = np.isfinite(y)
    v = z - a @ model.first_stage_.map.matrix.numpy().T - model.first_stage_.map.bias.numpy()
    weights = np.linalg.lstsq(np.hstack([z, v, np.ones((len(z), 1))])[known], y[known], rcond=None)[0]
    mean = model.first_stage_.map.bias.numpy()
    assert model.predict_do(np.zeros((1, 3)))[0] == pytest.approx(mean @ weights[:2] + weights[-1], abs=1e-8)


def test_the_interval_is_as_wide_as_the_estimate_varies():
    asked = np.array([[0.5, 0.5, 0.5]])
    varies = np.std([two_stages(*planted(400, seed=seed)[:3])(asked)[0] for seed in range(1, 200)])
    model = ControlFunctionRegressor("linear").fit(*planted(400)[:3])
    low, high = model.predict_interval(asked, n_resamples=60, random_state=0)
    assert low[0] < model.predict_do(asked)[0] < high[0]
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * varies, rel=0.3)
    narrow = model.predict_interval(asked, level=0.5, n_resamples=60, random_state=0)
    assert low[0] < narrow.low[0] < narrow.high[0] < high[0]


def test_the_first_stage_counts_the_directions_that_actions_move():
    z, a, _, _ = planted(400, d=1)
    found = first_stage(*map(torch.from_numpy, (z, a)))
    told = np.hstack([a, np.ones((400, 1))])
    left = z - told @ np.linalg.lstsq(told, z, rcond=None)[0]
    share = 1 - (left**2).sum() / ((z - z.mean()) ** 2).sum()
    assert found.correlations[0] ** 2 == pytest.approx(share)
    assert found.f_statistic == pytest.approx(share / 3 / ((1 - share) / 396))
    assert found.p_value == pytest.approx(chi2.sf(-(400 - 1 - 5 / 2) * np.log(1 - share), 3))
    random = np.random.default_rng(0)
    v = random.normal(size=(4000, 3))
    a = random.uniform(-1, 1, size=(4000, 3))
    directions = np.array([[1.0, 0, 0], [1.0, 1.0, 0]])
    found = first_stage(torch.from_numpy(a[:, :2] @ directions * 3 + v), torch.from_numpy(a))
    assert found.subspace.dim == 2
    assert float(found.subspace.overlap(Subspace.span(directions.T))) > 0.99
    assert found.weak
    assert found.p_value > 0.01
    nothing = [
        first_stage(torch.from_numpy(random.normal(size=(100, 2))), torch.from_numpy(a[:100])).p_value
        for _ in range(80)
    ]
    assert 0.4 < np.mean(nothing) < 0.75  # of the smaller of two correlations, which is cautious
    assert first_stage(torch.from_numpy(v), torch.from_numpy(a)).subspace.dim == 1


def test_support_is_what_was_seen_and_the_directions_that_were_varied():
    z, a, y, _ = planted(2000)
    model = ControlFunctionRegressor("linear").fit(z, a, y)
    inside, edge, far = model.support(np.array([[0.0, 0, 0], [1.5, 1.5, 1.5], [9, 9, 9]]))
    assert inside < 0.05 < edge < 0.9 < far == 1
    quietly(model.predict_do, [[9.0, 9, 9]])
    tied = np.hstack([a[:, :2], a[:, :1] + a[:, 1:2]])
    z, y = z - a @ np.linalg.lstsq(a, z, rcond=None)[0] + 2 * a[:, :2], y
    model = ControlFunctionRegressor("linear").fit(z, tied, y)
    assert model.support([[0.5, 0.1, 0.6], [0.5, 0.1, 0.0]]).tolist()[1] == 1
    assert model.support([[0.5, 0.1, 0.6]])[0] < 0.1


def test_kinds_of_input():
    z, a, y, _ = planted(300, d=1, p=1)
    plain = ControlFunctionRegressor("linear").fit(z, a[:, 0], y)
    other = ControlFunctionRegressor("linear").fit(torch.from_numpy(z), pd.DataFrame(a[:, :1]), pd.Series(y))
    asked = plain.predict_do(np.array([0.1, 0.2]))
    np.testing.assert_allclose(asked, other.predict_do(torch.tensor([[0.1], [0.2]], dtype=torch.float64)).numpy())
    assert isinstance(other.predict(torch.from_numpy(z[:3]).float(), a[:3, 0]), torch.Tensor)
    assert other.predict(torch.from_numpy(z[:3]).float(), a[:3, 0]).dtype == torch.float32


def holed(x):
    return np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda z, a, y: (z, a[:, 0], y), "A: has 1 independent columns, and the state 2 dimensions"),
        (lambda z, a, y: (z, np.sign(a[:, :1]), y), "A: 2 different actions span 1, and the state 2 dimensions"),
        (lambda z, a, y: (z, 0 * a + 3, y), "A: is constant; actions must vary"),
        (lambda z, a, y: (z, holed(a), y), "A: 1 of 300 rows contain NaN"),
        (lambda z, a, y: (holed(z), a, y), "X: 1 of 300 rows contain NaN"),
        (lambda z, a, y: (z, a[1:], y), "A: expected 300 rows, one for each of X, got 299"),
        (lambda z, a, y: (z, a, y[1:]), "y: expected 300 outcomes, one for each row of X, got 299"),
        (lambda z, a, y: (z, a, None), "the target y is None"),
        (lambda z, a, y: (z, a, y + np.inf), "y: contains infinity"),
        (lambda z, a, y: (z, a, np.where(np.arange(300) < 49, y, np.nan)), "y: 49 known outcomes are too few; 50"),
        (lambda z, a, y: (z, a, 0 * y), "y: all outcomes are the same"),
    ],
)
def test_what_fit_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        ControlFunctionRegressor("linear").fit(*given(*planted(300)[:3]))


def test_what_predictions_refuse_and_warn_of():
    z, a, y, _ = planted(300)
    model = ControlFunctionRegressor("linear").fit(z, a, y)
    for asked, message in ((a[:, :2], "A: expected 3 columns"), (holed(a), "A: 1 of 300 rows contain NaN")):
        with pytest.raises(ValueError, match=message):
            model.predict_do(asked)
    with pytest.raises(ValueError, match="A: expected 4 rows"):
        model.predict(z[:4], a[:3])
    for options, message in (({"level": 1.0}, "level: must lie in"), ({"n_resamples": 1}, "n_resamples: at least 2")):
        with pytest.raises(ValueError, match=message):
            model.predict_interval(a[:1], **options)
    with pytest.warns(UserWarning, match="weak actions"):
        ControlFunctionRegressor("linear").fit(np.random.default_rng(0).normal(size=z.shape), a, y)
