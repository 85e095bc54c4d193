from __future__ import annotations

import numpy as np
import pytest
import torch

from subspan.align import cross_modal_report, distance_correlation, relative_coordinates
from subspan.align.spaces.cross_modal import split_queries

SHARED = 6


def planted(n: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, SHARED, dtype=torch.float64, generator=g)
    sides = []
    for d in (30, 24):
        turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=g)).Q
        seen = common + 0.2 * torch.randn(n, SHARED, dtype=torch.float64, generator=g)
        rest = 3 * torch.randn(n, d - SHARED, dtype=torch.float64, generator=g)
        sides.append(torch.cat([seen, rest], 1) @ turn.mT)
    return sides


@pytest.fixture(scope="module")
def report():
    x, y = planted(2200)
    return cross_modal_report(x, y, n_components=(2, 6, 20), n_anchors=(300, 2000), n_queries=200)


def test_the_report_finds_the_planted_subspace(report):
    assert report.chance == {"top1": 0.005, "top5": 0.025, "top10": 0.05, "matching": 0.005}
    assert report.best(subspace="cca")["k"] == SHARED
    inside = report.value(subspace="cca", k=6, method="affine", n_anchors=2000)
    assert inside > 0.9
    assert inside > 2 * report.value(subspace="full", method="affine", n_anchors=2000)
    assert report.value(subspace="pca", k=6, method="affine", n_anchors=2000) < 0.2
    few, many = (report.value(subspace="cca", k=20, method="affine", n_anchors=n) for n in (300, 2000))
    assert few < many < inside
    assert report.cka["cca-6"] > 0.6 > 0.3 > report.cka["full"]
    assert min(report.canonical["held out"][:6]) > 0.8


def test_every_cell_is_there_and_none_that_is_undefined(report):
    cells = {(r["subspace"], r["k"], r["method"], r["n_anchors"], r["direction"]) for r in report.rows}
    assert len(cells) == len(report.rows)
    whole = {c[:3] for c in cells if c[3] == 2000}
    methods = {"none", "affine", "ridge", "local_cka", "relative"}
    assert {m for s, k, m in whole if s == "full"} == methods - {"none"}
    for subspace in ("pca", "cca"):
        assert {(k, m) for s, k, m in whole if s == subspace} == {(k, m) for k in (2, 6, 20) for m in methods}
    assert {c[1] for c in cells if c[3] == 300 and c[0] == "cca"} == {20}
    assert {c[4] for c in cells} == {"x->y", "y->x"}
    with pytest.raises(ValueError, match="no row has"):
        report.value(subspace="ica")
    with pytest.raises(ValueError, match="no row has"):
        report.best(k=7)


def test_shuffled_pairs_are_at_chance(report):
    error = 3 * (report.chance["top5"] / report.n_queries) ** 0.5
    assert report.value(permuted=True) < report.chance["top5"] + error
    assert report.permutation_cka < report.cka["cca-20"]


def test_queries_are_of_groups_of_their_own_and_of_distinct_partners():
    y = torch.arange(300.0).div(3, rounding_mode="floor")[:, None].expand(-1, 2)
    groups = np.arange(300) // 15
    queries, anchors = split_queries(y, 20, groups, np.random.default_rng(0))
    assert not set(groups[queries]) & set(groups[anchors])
    assert len({float(y[i, 0]) for i in queries}) == len(queries) == 20
    queries, anchors = split_queries(y, 50, None, np.random.default_rng(0))
    assert not set(queries) & set(anchors)
    assert len(queries) + len(anchors) == 300
    assert len({float(y[i, 0]) for i in queries}) == 50
    with pytest.raises(ValueError, match="n_queries: 300 rows leave 100 queries"):
        split_queries(y, 120, None, np.random.default_rng(0))


def test_relative_coordinates_are_cosines_with_the_anchors():
    x, _ = planted(20)
    expected = torch.nn.functional.cosine_similarity(x[:5, None], x[None, 5:], dim=-1)
    torch.testing.assert_close(relative_coordinates(x[:5], x[5:]), expected, atol=1e-12, rtol=0)


def test_distance_correlation_is_pearson_over_pairs():
    x, y = (rows[:12] for rows in planted(12))
    a, b = torch.cdist(x, x), torch.cdist(y, y)
    pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
    expected = np.corrcoef([float(a[p]) for p in pairs], [float(b[p]) for p in pairs])[0, 1]
    assert distance_correlation(a, b) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="square"):
        distance_correlation(a, b[:5])
    with pytest.raises(ValueError, match="constant"):
        distance_correlation(a, torch.ones(12, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_anchors": (5,)}, "n_anchors"),
        ({"n_anchors": (10**6,)}, "n_anchors"),
        ({"methods": ("magic",)}, "methods"),
        ({"subspaces": ()}, "subspaces"),
        ({"groups": np.zeros(3)}, "groups"),
        ({"n_queries": 295}, "n_queries"),
    ],
)
def test_bad_input_is_named(options, message):
    x, y = planted(300)
    with pytest.raises(ValueError, match=message):
        cross_modal_report(x, y, **{"n_queries": 50, **options})
    with pytest.raises(ValueError, match="Y: expected 300 rows"):
        cross_modal_report(x, y[:-1])
