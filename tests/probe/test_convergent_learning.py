"""Planted correspondences are found; what only the basis hides is told apart from what is not there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import nn

from subspan.probe import ConvergentLearning, layer_moments, mean_agreement
from subspan.statistics import JointMoments

METHODS = ("matching", "semi", "sparse", "rotation", "linear")


def draw(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blocks(n: int = 6000, groups: int = 6, size: int = 4):
    """ReLU units in correlated blocks, and the same blocks rotated inside and shuffled."""
    common = draw(n, groups, 1).repeat_interleave(size, 1)
    x = (draw(n, groups * size, 2) + common).relu()
    turns = [torch.linalg.qr(draw(size, size, 10 + g)).Q for g in range(groups)]
    order = torch.randperm(groups * size, generator=torch.Generator().manual_seed(3))
    return x, (x @ torch.block_diag(*turns))[:, order], order


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_planted_permutation_is_found_whatever_scale_and_offset(noise):
    x = draw(800, 12).relu()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(0.1, 50, 12, dtype=torch.float64)
    y = (x[:, order] + noise * draw(800, 12, 2).abs()) * scale + torch.arange(12)
    model = ConvergentLearning().fit(x, y)
    assert model.signed_
    assert torch.equal(model.matching_.partner, order)
    assert torch.equal(model.semi_matching_.partner, order)
    if noise == 0:
        torch.testing.assert_close(model.matching_.correlation, torch.ones(12, dtype=torch.float64))
        torch.testing.assert_close(model.transform(x), y, atol=1e-8, rtol=0)


@pytest.mark.parametrize("widths", [(5, 5), (4, 6), (6, 4)])
def test_the_matching_is_the_best_of_all_and_never_beats_the_semi_matching(widths):
    p, q = widths
    x = draw(60, p)
    y = x @ draw(p, q, 5) + draw(60, q, 6)
    model = ConvergentLearning(sign="absolute").fit(x, y)
    table = np.abs(np.corrcoef(x.T, y.T)[:p, p:])
    small, large = (table, range(q)) if p <= q else (table.T, range(p))
    best = max(sum(small[i, j] for i, j in enumerate(chosen)) for chosen in itertools.permutations(large, min(p, q)))
    assert float(model.matching_.correlation.abs().sum()) == pytest.approx(best)
    assert int((model.matching_.partner >= 0).sum()) == min(p, q)
    np.testing.assert_allclose(model.semi_matching_.correlation.abs(), table.max(0))
    np.testing.assert_allclose(model.correlations_.abs(), table)


def test_opposite_units_are_partners_only_where_signs_do_not_count():
    x = draw(500, 4)
    y = torch.cat([-x[:, :1], x[:, 1:]], 1) + 0.1 * draw(500, 4, 1)
    assert ConvergentLearning().fit(x, y).matching_.partner.tolist() == [0, 1, 2, 3]
    signed = ConvergentLearning(sign="signed").fit(x, y)
    assert float(signed.semi_matching_.correlation[0]) < 0.2


def test_streams_and_parts_and_moments_are_one():
    x, y = draw(300, 6), draw(300, 4, 1) + draw(300, 1)
    whole = ConvergentLearning("sparse", n_partners=2).fit(x.numpy(), y.numpy())
    stream = ConvergentLearning("sparse", n_partners=2).fit(list(x.split(70)), list(y.split(70)))
    parts = ConvergentLearning("sparse", n_partners=2)
    for a, b in zip(x.split(100), y.split(100)):
        parts.partial_fit(a, b)
    merged = JointMoments(6, 4).update(x[:90], y[:90]) + JointMoments(6, 4).update(x[90:], y[90:])
    made = ConvergentLearning.from_moments(merged, method="sparse", n_partners=2)
    for other in (stream, parts, made):
        torch.testing.assert_close(other.correlations_, whole.correlations_, atol=1e-10, rtol=0)
        torch.testing.assert_close(other.map_.matrix, whole.map_.matrix, atol=1e-9, rtol=0)
    assert isinstance(whole.transform(x.numpy()), np.ndarray)


def test_the_lasso_path_from_moments_is_that_of_the_rows():
    x = draw(400, 8)
    x[:, 1] += x[:, 0]
    y = x[:, :3] @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + draw(400, 1, 1)
    model = ConvergentLearning().fit(x, y)
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    target = ((y - y.mean(0)) / y.std(0, correction=0)).numpy()[:, 0]
    largest = float(model.correlations_.abs().max())
    for penalty in (0.9 * largest, 0.3, 0.05):
        weights = Lasso(alpha=penalty, tol=1e-12, max_iter=100_000).fit(standard, target).coef_
        ((_, partners, explained),) = model.sparse_path([penalty])
        residual = target - standard @ weights
        assert partners == np.count_nonzero(weights)
        assert explained == pytest.approx(1 - residual @ residual / len(residual), abs=1e-6)
    assert model.sparse_path([largest * 1.001])[0][1:] == (0, 0)


def test_few_partners_are_at_most_so_many_and_explain_more_with_more():
    x, y, _ = blocks(2000)
    model = ConvergentLearning().fit(x, y)
    means = []
    for most in (1, 2, 4):
        found = model.sparse_prediction(most)
        assert max(map(len, found.partners)) <= most
        assert [int(n) for n in (found.map.matrix != 0).sum(1)] == [len(part) for part in found.partners]
        means.append(float(model.explained(found.map).mean()))
    assert means[0] < means[1] < means[2]
    assert means[2] > 0.99
    shrunk = model.sparse_prediction(2, refit=False)
    assert float(model.explained(shrunk.map).mean()) < means[1]


@pytest.mark.parametrize("method", METHODS)
def test_explained_variance_from_moments_is_that_of_the_rows(method):
    x, y = draw(200, 5), draw(200, 3, 1)
    y[:, :2] += x[:, :2]
    model = ConvergentLearning(method).fit(x[:120], y[:120])
    held = JointMoments(5, 3).update(x[120:], y[120:])
    error = (y[120:] - model.transform(x[120:])).square().mean(0)
    torch.testing.assert_close(model.explained(method, held), 1 - error / y[120:].var(0, correction=0))
    fitted = model.explained(method)
    if method in ("matching", "semi"):
        found = model.matching_ if method == "matching" else model.semi_matching_
        torch.testing.assert_close(fitted, found.correlation.square())
    assert float(fitted.mean()) <= float(model.explained("linear").mean()) + 1e-9


def test_rotated_blocks_agree_as_subspaces_and_not_as_units():
    x, y, order = blocks()
    model = ConvergentLearning().fit(x, y)
    assert not model.signed_
    groups = model.groups(6)
    for group in groups:
        assert group.parity == 1
        assert set((group.x // 4).tolist()) == set((order[group.y] // 4).tolist())
        assert len(set((group.x // 4).tolist())) == 1
    report = model.report(groups=groups)
    assert report["group agreement"] > 0.9999
    assert report["matching"] < 0.85
    assert report["basis choice"] > 0.15
    assert report["R² of its group"] > 0.9999
    assert report["R² of one partner"] < 0.7
    a, b = groups[0].subspaces()
    assert (a.dim, a.ambient_dim, b.ambient_dim) == (4, 24, 24)
    assert float(a.residual(torch.eye(24, dtype=torch.float64)[groups[0].x]).abs().max()) < 1e-10
    chance = model.random_groups(groups)
    assert [(len(g.x), len(g.y)) for g in chance] == [(4, 4)] * 6
    assert mean_agreement(chance) < 0.7


def test_controls_move_what_they_must_and_nothing_else():
    x, y, _ = blocks(3000)
    y = y.roll(1, 1)
    model = ConvergentLearning().fit(x, x[:, torch.randperm(24)] + 0.3 * y)
    permuted, rotated = model.permuted(), model.rotated()
    assert permuted.matching_.mean() == pytest.approx(model.matching_.mean())
    assert rotated.matching_.mean() < model.matching_.mean() - 0.2
    for other in (permuted, rotated):
        torch.testing.assert_close(other.canonical_correlations(), model.canonical_correlations(), atol=1e-8, rtol=0)
    assert permuted.rotation_similarity() == pytest.approx(model.rotation_similarity())
    assert permuted.moments_.cka() == pytest.approx(model.moments_.cka())


def test_a_rotation_hides_units_that_share_a_strong_direction_too():
    brightness = 3 * draw(4000, 1, 9)
    x = brightness + draw(4000, 12)
    y = torch.cat([5 * x + 0.1 * draw(4000, 12, 1), torch.ones(4000, 1, dtype=torch.float64)], 1)
    y[:, 11] = y[:, 9] - y[:, 10]
    model = ConvergentLearning().fit(x, y)
    rotated = model.rotated()
    assert model.matching_.mean() > 0.9
    assert rotated.matching_.mean() < 0.6
    torch.testing.assert_close(rotated.moments_.cov_yy, model.moments_.cov_yy[:12, :12], atol=1e-6, rtol=1e-9)
    torch.testing.assert_close(
        rotated.canonical_correlations()[:11], model.canonical_correlations()[:11], atol=1e-6, rtol=0
    )
    again = model.rotated(1)
    assert not torch.equal(again.correlations_, rotated.correlations_)
    torch.testing.assert_close(model.rotated().correlations_, rotated.correlations_, atol=0, rtol=0)


def test_dead_units_are_left_out_and_listed():
    x, y = draw(200, 5).relu(), draw(200, 4, 1).relu()
    x[:, 2], y[:, 0] = 0, 7
    model = ConvergentLearning().fit(x, y)
    assert (model.dead_x_.tolist(), model.dead_y_.tolist()) == ([2], [0])
    assert int(model.matching_.partner[0]) == -1
    assert 2 not in model.matching_.partner.tolist()
    assert bool((model.transform(x)[:, 0] == 7).all())
    assert np.isfinite(list(model.report(groups=model.groups(2)).values())).all()
    assert sum(len(group.x) + len(group.y) for group in model.groups(2)) == 7


def network(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 3, 1))


def test_layers_of_several_models_in_one_pass_equal_their_rows():
    models = [network(0, 4), network(1, 4), network(2, 6)]
    images = torch.randn(10, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    found = layer_moments(models, ["1", ("3", "3", "3")], images.split(4))
    assert sorted(found) == [(0, 1), (0, 2), (1, 2)]
    with torch.no_grad():
        rows = [model[:2](images).movedim(1, -1).flatten(0, 2) for model in models]
    expected = JointMoments(4, 6).update(rows[1], rows[2])
    torch.testing.assert_close(found[1, 2][0].joint.scatter, expected.joint.scatter, atol=1e-4, rtol=1e-5)
    assert [m.count for m in found[0, 1]] == [360, 90]
    shifted = layer_moments(models[:2], ["1"], [images], shift=1)[0, 1][0]
    other = JointMoments(4, 4).update(rows[0], rows[1].unflatten(0, (10, 36)).roll(1, 0).flatten(0, 1))
    torch.testing.assert_close(shifted.joint.scatter, other.joint.scatter, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="one size"):
        layer_moments(models[:2], [("1", "3")], [images])
    with pytest.raises(ValueError, match="at least two models"):
        layer_moments(models[:1], ["1"], [images])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: ConvergentLearning("magic").fit(x, y), "method"),
        (lambda x, y: ConvergentLearning(sign="both").fit(x, y), "sign"),
        (lambda x, y: ConvergentLearning(n_partners=0).fit(x, y), "n_partners"),
        (lambda x, y: ConvergentLearning(n_groups=1).fit(x, y), "n_groups"),
        (lambda x, y: ConvergentLearning(power=0).fit(x, y), "power"),
        (lambda x, y: ConvergentLearning().fit(x, y[:-1]), "Y: expected 50 rows"),
        (lambda x, y: ConvergentLearning().fit(x, y * float("nan")), "NaN"),
        (lambda x, y: ConvergentLearning().fit(x, torch.ones_like(y)), "Y: every unit is constant"),
        (lambda x, y: ConvergentLearning().fit(x, y).alignment("magic"), "method"),
        (lambda x, y: ConvergentLearning().fit(x, y).groups(90), "n_groups"),
        (lambda x, y: ConvergentLearning().fit(x, y).sparse_path([0.0]), "penalties"),
        (lambda x, y: ConvergentLearning().fit(x, y).explained("linear", JointMoments(2, 2)), "moments"),
        (lambda x, y: ConvergentLearning().fit(x, y).transform(x[:, :2]), "expected 4 columns"),
    ],
)
def test_bad_input_is_named(call, message):
    x, y = draw(50, 4), draw(50, 3, 1)
    with pytest.raises(ValueError, match=message):
        call(x, y)


def test_fewer_rows_than_units_are_said():
    with pytest.warns(UserWarning, match="by chance"):
        ConvergentLearning().fit(draw(5, 4), draw(5, 3, 1))
