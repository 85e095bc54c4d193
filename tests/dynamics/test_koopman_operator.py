"""The operator from moments: least squares, merged and continued fits, inputs, delays, modes, intervals, refusals."""

import numpy as np
import pytest
import torch

from subspan.datasets import Series
from subspan.dynamics import KoopmanOperator, rollout_errors, seasonal_naive

RNG = np.random.default_rng(0)


def rotation(angle, radius=1.0):
    return radius * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def planted(lengths=(60, 35), noise=0.05, inputs=0, seed=0):
    """Trajectories of x' = K x + B u + noise with turning blocks, seen through a well-conditioned matrix."""
    rng = np.random.default_rng(seed)
    core = np.zeros((5, 5))
    core[:2, :2], core[2:4, 2:4], core[4, 4] = rotation(0.4, 0.98), rotation(1.1, 0.9), 0.5
    mix = rng.normal(size=(5, 5)) + 2 * np.eye(5)
    k, b = mix @ core @ np.linalg.inv(mix), rng.normal(size=(5, inputs))
    parts, acts = [], []
    for n in lengths:
        x, u = [rng.normal(size=5)], rng.normal(size=(n, inputs))
        for step in range(n - 1):
            x.append(k @ x[-1] + b @ u[step] + noise * rng.normal(size=5))
        parts.append(np.array(x))
        acts.append(u)
    return k, b, parts, acts


PLAIN = {"fit_intercept": False, "standardize": False}


@pytest.mark.parametrize("standardize", [False, True])
def test_it_is_least_squares_over_all_pairs(standardize):
    k, _, parts, _ = planted()
    before, after = (np.concatenate([x[a:b] for x in parts]) for a, b in ((0, -1), (1, None)))
    expected = np.linalg.lstsq(before, after, rcond=None)[0].T
    model = KoopmanOperator(fit_intercept=False, standardize=standardize).fit(parts)
    np.testing.assert_allclose(model.predict(before)[:, 0], before @ expected.T, atol=1e-6)
    np.testing.assert_allclose(np.sort_complex(model.eigenvalues_), np.sort_complex(np.linalg.eigvals(expected)))
    assert model.pairs_ == 93
    centred = np.linalg.lstsq(np.c_[before, np.ones(93)], after, rcond=None)[0]
    found = KoopmanOperator(standardize=standardize).fit(parts).predict(before)[:, 0]
    np.testing.assert_allclose(found, np.c_[before, np.ones(93)] @ centred, atol=1e-6)
    exact = KoopmanOperator().fit(planted(noise=0.0)[2])
    np.testing.assert_allclose(np.sort_complex(exact.eigenvalues_), np.sort_complex(np.linalg.eigvals(k)), atol=1e-4)


def test_primal_and_dual_ridge_agree():
    x = RNG.normal(size=(6, 9))
    shrink = 0.3 * (x[:-1] ** 2).sum() / 9
    dual = x[:-1].T @ np.linalg.solve(x[:-1] @ x[:-1].T + shrink * np.eye(5), x[1:])
    found = KoopmanOperator(ridge=0.3, **PLAIN).fit(x)
    np.testing.assert_allclose(found.operator_, dual.T, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*roll-outs grow")
@pytest.mark.parametrize("delays", [1, 3])
def test_a_fit_can_be_continued_merged_and_read_in_batches(delays):
    _, _, (x, y), _ = planted()
    whole, both = KoopmanOperator(delays=delays).fit(x), KoopmanOperator(delays=delays).fit([x, y])
    parts = KoopmanOperator(delays=delays)
    for start, stop in ((0, 7), (7, 8), (8, 60)):
        parts.partial_fit(x[start:stop], continues=start > 0)
    streamed = KoopmanOperator(delays=delays).fit(x[start : start + 2] for start in range(0, 60, 2))
    for found in (parts, streamed):
        assert found.pairs_ == whole.pairs_ == 60 - delays
        np.testing.assert_allclose(found.operator_, whole.operator_, atol=1e-8)
    np.testing.assert_allclose(parts.partial_fit(y).operator_, both.operator_, atol=1e-8)
    np.testing.assert_allclose(KoopmanOperator(delays=delays).fit(Series((x, y))).operator_, both.operator_)
    cube = KoopmanOperator(delays=delays).fit(torch.from_numpy(np.stack([x[:35], y])))
    np.testing.assert_allclose(cube.operator_.numpy(), KoopmanOperator(delays=delays).fit([x[:35], y]).operator_)


def test_blocks_of_a_long_trajectory_count_every_pair_once(monkeypatch):
    _, _, parts, acts = planted(inputs=2)
    whole = KoopmanOperator(delays=3).fit(parts, inputs=acts)
    monkeypatch.setattr("subspan.dynamics.trajectories._BLOCK_NUMBERS", 60)
    blocks = KoopmanOperator(delays=3).fit(parts, inputs=acts)
    assert blocks.pairs_ == whole.pairs_
    np.testing.assert_allclose(blocks.operator_, whole.operator_, atol=1e-8)


def test_moments_are_solved_again_without_the_rows():
    _, _, parts, _ = planted()
    model = KoopmanOperator(delays=2).fit(parts)
    other = model.solved(rank=3, ridge=0.1, fit_intercept=False)
    again = KoopmanOperator(3, ridge=0.1, delays=2, fit_intercept=False).fit(parts)
    np.testing.assert_allclose(other.operator_, again.operator_)
    assert (model.rank, model.operator_.shape) == (None, (10, 10))
    with pytest.raises(ValueError, match="depend on delays and lift"):
        model.solved(delays=3)


def test_inputs_are_told_apart_from_the_dynamics():
    k, b, parts, acts = planted((200, 150), noise=0.0, inputs=2)
    model = KoopmanOperator(**PLAIN).fit(parts, inputs=acts)
    np.testing.assert_allclose(model.operator_, k, atol=1e-8)
    np.testing.assert_allclose(model.control_, b, atol=1e-8)
    found = KoopmanOperator().fit(parts, inputs=acts).forecast(parts[0][:50], 20, acts[0][49:69]).mean
    np.testing.assert_allclose(found, parts[0][50:70], atol=1e-8)
    many = model.predict(parts[0][:3], 4, np.stack([acts[0][i : i + 4] for i in range(3)]))
    np.testing.assert_allclose(many[2], parts[0][3:7], atol=1e-8)


def test_delays_see_what_one_channel_hides():
    t = np.arange(200)
    x = (3 + np.cos(0.3 * t) + np.cos(0.7 * t + 1))[:, None]
    model = KoopmanOperator(4, delays=6).fit(x[:150])
    np.testing.assert_allclose(np.unique(np.abs(np.angle(model.eigenvalues_)).round(6)), [0.3, 0.7], atol=1e-5)
    np.testing.assert_allclose(model.forecast(x[:150], 50).mean, x[150:], atol=1e-5)
    period, decay = model.timescales(0.5)
    np.testing.assert_allclose(np.unique(period.round(4)), [np.pi / 0.7, np.pi / 0.3], atol=1e-3)
    assert np.abs(decay).min() > 1e4
    assert model.transform(x).shape == (195, 4)
    phi = model.eigenfunctions(x)
    np.testing.assert_allclose(phi[1:], phi[:-1] * model.eigenvalues_, atol=1e-5)
    # Two cosines of size 1 have as much energy each, shared by the two modes of a pair.
    np.testing.assert_allclose(model.mode_energies_, np.full(4, 0.25), rtol=0.1)


@pytest.mark.parametrize("reduction", ["pca", "regression"])
def test_reduced_rank_keeps_what_moves(reduction):
    x = np.linalg.qr(RNG.normal(size=(12, 3)))[0]
    k = x @ np.diag([0.99, 0.9, 0.7]) @ x.T
    rows = [RNG.normal(size=12) @ x @ x.T]
    for _ in range(80):
        rows.append(k @ rows[-1] + 0.1 * (x @ RNG.normal(size=3)))
    model = KoopmanOperator(3, reduction=reduction, **PLAIN).fit(np.array(rows))
    full = KoopmanOperator(**PLAIN).fit(np.array(rows))
    assert model.operator_.shape == (3, 3)
    np.testing.assert_allclose(model.predict(np.array(rows), 5), full.predict(np.array(rows), 5), atol=1e-6)


def test_a_lift_makes_a_nonlinear_map_linear():
    """x' = 0.9 x, y' = 0.5 y + (0.9² − 0.5) x²: linear in x, y, x²."""
    parts = []
    for start in RNG.normal(size=(4, 2)):
        x = [start]
        for _ in range(25):
            x.append(np.array([0.9 * x[-1][0], 0.5 * x[-1][1] + 0.31 * x[-1][0] ** 2]))
        parts.append(np.array(x))
    model = KoopmanOperator(lift=lambda x: np.c_[x, x[:, 0] ** 2], fit_intercept=False).fit(parts)
    np.testing.assert_allclose(model.eigenvalues_, [0.9, 0.81, 0.5], atol=1e-8)
    np.testing.assert_allclose(model.predict(parts[0][None, :1], 25)[0], parts[0][1:], atol=1e-8)
    with pytest.raises(ValueError, match="lift: gave 3 rows for 26 states"):
        KoopmanOperator(lift=lambda x: x[:3]).fit(parts)


def test_intervals_hold_as_often_as_they_say():
    _, _, parts, _ = planted([40] * 150, noise=0.3, seed=3)
    model = KoopmanOperator().fit(parts[:50])
    inside = []
    for x in parts[50:]:
        told = model.forecast(x[:20], 20, level=0.8)
        inside.append((told.lower <= x[20:]) & (x[20:] <= told.upper))
    assert np.abs(np.mean(inside, axis=(0, 2)) - 0.8).max() < 0.06
    # Of a random walk the variance of the error is that of a step, times the steps.
    walk = RNG.normal(size=(5000, 1)).cumsum(axis=0)
    ratio = KoopmanOperator(fit_intercept=False).fit(walk).deviations(16)[:, 0].numpy() / np.arange(1, 17) ** 0.5
    np.testing.assert_allclose(ratio, 1, atol=0.05)


@pytest.mark.filterwarnings("ignore:.*roll-outs grow")
def test_a_few_rows_do_not_make_intervals_too_narrow():
    models = [KoopmanOperator().fit(RNG.normal(size=(9, 2))) for _ in range(150)]
    found = [float(model.deviations(1).square().mean()) for model in models]
    assert np.mean(found) == pytest.approx(1, abs=0.15)


def test_the_coherent_subspace_is_invariant():
    k, _, parts, _ = planted(noise=0.0)
    model = KoopmanOperator(**PLAIN).fit(parts)
    found = model.coherent_subspace(0.85)
    assert found.dim == 4
    moved = torch.from_numpy(k) @ found.basis
    torch.testing.assert_close(found.project(moved.mT).mT, moved, atol=1e-6, rtol=0)
    values = np.linalg.eigvals((found.basis.mT @ moved).numpy())
    np.testing.assert_allclose(np.sort(np.abs(values)), [0.9, 0.9, 0.98, 0.98], atol=1e-6)
    with pytest.raises(ValueError, match=r"no eigenvalue reaches 2, the largest is 0.98"):
        model.coherent_subspace(2)


def test_unstable_modes_are_named_or_drawn_back():
    x = np.array([np.r_[1.1**i, (rotation(0.5, 1.2) ** 1 @ [1, 0]) * 0 + 0.5**i] for i in range(20)])[:, :2]
    with pytest.warns(UserWarning, match=r"absolute value 1.1, so that roll-outs grow"):
        KoopmanOperator(**PLAIN).fit(x)
    model = KoopmanOperator(clip_spectral_radius=1.0, **PLAIN).fit(x)
    np.testing.assert_allclose(np.sort(np.abs(model.eigenvalues_)), [0.5, 1.0], atol=1e-6)
    turning = [np.array([1.0, 0.0, 1.0])]
    for _ in range(30):
        turning.append(np.r_[rotation(0.5, 1.2) @ turning[-1][:2], 0.9 * turning[-1][2]])
    model = KoopmanOperator(clip_spectral_radius=1.0, **PLAIN).fit(np.array(turning))
    np.testing.assert_allclose(np.abs(model.eigenvalues_), [1, 1, 0.9], atol=1e-6)
    assert np.abs(np.angle(model.eigenvalues_[0])) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda x: KoopmanOperator(delays=60).fit(x), "60 rows has no pair of states of 60 rows; at least 61"),
        (lambda x: KoopmanOperator().fit([x, x[:, :2]]), "2 features"),
        (lambda x: KoopmanOperator().fit(x, inputs=x[:5]), "inputs: expected 60 rows"),
        (lambda x: KoopmanOperator().fit([x, x], inputs=[x]), "inputs: expected 2 trajectories"),
        (lambda x: KoopmanOperator().fit(x, inputs=x).forecast(x, 2), "fitted with 5 inputs, got none"),
        (lambda x: KoopmanOperator().fit(x).forecast(x, 2, x[:2]), "fitted without inputs, got some"),
        (lambda x: KoopmanOperator().fit(x, inputs=x).forecast(x, 2, x), r"expected \(2, 5\) or \(1, 2, 5\)"),
        (lambda x: KoopmanOperator(0.9, reduction="regression").fit(x), "needs a whole number, got 0.9"),
        (lambda x: KoopmanOperator().fit(x).forecast(x, 2, level=1), r"level: must lie in \(0, 1\)"),
        (lambda x: KoopmanOperator().fit(x).predict(x, 0), "n_steps: at least 1"),
        (lambda x: KoopmanOperator(delays=2).fit(x).predict(x), "got a matrix; add an axis"),
        (lambda x: KoopmanOperator(delays=2).fit(x).predict(x[None, :1]), "have 1 rows, at least 2"),
        (lambda x: KoopmanOperator().fit(iter([])), "gave no 2 rows"),
    ],
)
def test_what_does_not_fit_is_said(fit, message):
    with pytest.raises(ValueError, match=message):
        fit(planted()[2][0])


def test_errors_of_rollouts_and_the_naive_forecast():
    x = np.tile(RNG.normal(size=(7, 2)), (9, 1))
    assert rollout_errors(seasonal_naive(7), [x, x[:30]], [1, 10], history=7) == {1: 0.0, 10: 0.0}
    assert rollout_errors(seasonal_naive(1), [x], [7])[7] == 0.0
    assert rollout_errors(lambda h, steps: np.zeros((len(h), steps, 2)) + x.mean(0), [x], [1], starts=63)[1] < 1.01
    fields = RNG.normal(size=(300, 2, 3, 4)) * np.array([1, 10])[:, None, None] + RNG.normal(size=(2, 3, 4))
    fields[:, 1, 0] = 5.0
    told = rollout_errors(
        lambda h, steps: np.zeros((len(h), steps, 2, 3, 4)) + fields.mean(0), [fields], [2], starts=290
    )
    assert told[2] == pytest.approx(1, abs=0.03)
    assert KoopmanOperator(delays=7).fit(x).score(x, n_steps=10) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="none has the 101 rows"):
        rollout_errors(seasonal_naive(1), [x], [100])


def test_eigenvalues_are_those_of_pydmd():
    dmd = pytest.importorskip("pydmd")
    _, _, parts, _ = planted((80,))
    theirs = dmd.DMD(svd_rank=5).fit(parts[0].T)
    ours = KoopmanOperator(**PLAIN).fit(parts[0])
    np.testing.assert_allclose(np.sort_complex(ours.eigenvalues_), np.sort_complex(theirs.eigs), atol=1e-8)
