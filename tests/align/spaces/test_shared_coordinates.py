"""The coordinates that two spaces share, through the aligner: how many, how true, and what is said of few anchors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA

from paired_spaces import SHARED, Q, planted
from subspan.align import SubspaceAligner
from subspan.geometry import Subspace


def test_correlations_are_those_of_scikit_learn(data):
    x, y = (rows[:600, :8] for rows in data[:2])
    x = torch.cat([x[:, :4], y[:, :4] + x[:, 4:]], 1)
    model = SubspaceAligner(4, shrinkage=0.0).fit(x, y)
    a, b = CCA(4, max_iter=20_000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    theirs = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(4)]
    np.testing.assert_allclose(model.canonical_correlations_, theirs, atol=1e-6)


def test_the_shared_row_space_is_recovered(data):
    x, y, *_, basis = data
    model = SubspaceAligner(SHARED, shrinkage=0.0).fit(x, y)
    degrees = torch.rad2deg(model.subspace_x_.angles(Subspace.span(basis)))
    assert float(degrees.max()) < 5
    torch.testing.assert_close(model.subspace_x_.center, x.mean(0))
    assert model.subspace_y_.basis.shape == (Q, SHARED)


@pytest.mark.parametrize(("subspace", "private"), [("cca", 4.0), ("svcca", 1.0)])
def test_cross_validation_counts_the_shared_dimensions(subspace, private):
    # 99 % of the variance must hold the shared dimensions for "svcca" to see them.
    x, y, _ = planted(4200, private=private)
    model = SubspaceAligner("cv", subspace=subspace).fit(x[:4000], y[:4000])
    assert model.n_components_ == SHARED
    assert model.score(x[4000:], y[4000:]) > 0.95
    assert (model.held_out_correlations_[:SHARED] > 0.8).all()
    assert abs(model.held_out_correlations_[SHARED:]).max() < 0.2


def test_a_pair_counts_where_its_held_out_correlation_is_three_standard_errors_above_nothing():
    generator = torch.Generator().manual_seed(0)
    n, d = 4000, 40
    strength = torch.cat([torch.linspace(0.5, 0.1, 8), torch.linspace(0.09, 0, d - 8)]).double()
    x, noise = (torch.randn(n, d, dtype=torch.float64, generator=generator) for _ in range(2))
    model = SubspaceAligner("cv", shrinkage=0.0).fit(x, strength * x + (1 - strength.square()).sqrt() * noise)
    curve = model.held_out_correlations_

    def leading(errors):
        return int((curve > errors / n**0.5).cumprod().sum())

    assert model.n_components_ == leading(3)
    # So near to the threshold that a little more or less would count otherwise.
    assert leading(4) < leading(3) < leading(2)


def test_independent_spaces_have_nothing_to_find():
    x, _, _ = planted(3300, 1)
    _, y, _ = planted(3300, 2)
    model = SubspaceAligner(10).fit(x[:3000], y[:3000])
    assert abs(model.held_out_correlations_).mean() < 0.05
    assert SubspaceAligner("cv").fit(x[:3000], y[:3000]).n_components_ == 1
    # 5 of 300, and three standard errors.
    assert model.score(x[3000:], y[3000:]) < 5 / 300 + 3 * (5 / 300 / 300) ** 0.5


def test_shrinkage_rescues_few_anchors():
    x, y, _ = planted(420, private=1.0)
    with pytest.warns(UserWarning, match="anchors are few"):
        raw = SubspaceAligner(SHARED, shrinkage=0.0).fit(x[:60], y[:60])
    assert raw.canonical_correlations_[0] > 0.95
    shrunk = SubspaceAligner(SHARED, shrinkage=0.5).fit(x[:60], y[:60])
    assert shrunk.score(x[60:], y[60:]) > raw.score(x[60:], y[60:])
    few = SubspaceAligner(SHARED, shrinkage="auto").fit(x[:30], y[:30])
    assert np.isfinite(few.similarity(x[60:].numpy(), y[60:].numpy())).all()


def test_over_fitted_correlations_are_said(data):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SubspaceAligner(20, shrinkage=0.0).fit(data[0][:100], data[1][:100])
        SubspaceAligner(SHARED, shrinkage=0.0).fit(data[0], data[1])
    texts = [str(one.message) for one in caught]
    assert sum("over-fitted" in text for text in texts) == 1
    assert sum("anchors are few" in text for text in texts) == 1


def test_scale_weighs_pairs_by_their_correlation(data):
    x, y, *_ = data
    white, weighed = (SubspaceAligner(10, "cosine", scale=scale).fit(x, y) for scale in ("whiten", "rho"))
    rho = torch.from_numpy(white.canonical_correlations_)
    sign = torch.sign((white.transform_x(x) * weighed.transform_x(x)).sum(0))
    torch.testing.assert_close(weighed.transform_x(x), white.transform_x(x) * rho * sign, atol=1e-9, rtol=0)


def test_truncation_is_the_smaller_fit(data):
    x, y, new_x, new_y, _ = data
    for subspace in ("cca", "pca", "svcca"):
        large = SubspaceAligner(12, subspace=subspace).fit(x, y)
        for method in ("affine", "local_cka", "cosine"):
            small = SubspaceAligner(4, method, subspace, direction="y->x").fit(x, y)
            cut = large.truncate(4, method=method, direction="y->x")
            torch.testing.assert_close(cut.similarity(new_x, new_y), small.similarity(new_x, new_y), atol=1e-8, rtol=0)
    assert large.truncate(4).get_params()["n_components"] == 4
    with pytest.raises(ValueError, match=r"n_components: must lie in \[1, 12\]"):
        large.truncate(13)
    with pytest.raises(ValueError, match="shrinkage"):
        large.truncate(4, shrinkage=0.5)
    with pytest.raises(ValueError, match="all coordinates"):
        SubspaceAligner(subspace=None).fit(x, y).truncate(3)


def test_constant_and_repeated_columns_are_dropped(data):
    x, y, new_x, new_y, _ = data

    def padded(rows):
        return torch.cat([rows, rows[:, :3], torch.full((len(rows), 1), 2.0, dtype=torch.float64)], 1)

    for subspace in ("cca", None):
        plain = SubspaceAligner(6, subspace=subspace, shrinkage=0.0).fit(x, y)
        wide = SubspaceAligner(6, subspace=subspace, shrinkage=0.0).fit(padded(x), y)
        torch.testing.assert_close(
            wide.similarity(padded(new_x), new_y), plain.similarity(new_x, new_y), atol=1e-7, rtol=0
        )
