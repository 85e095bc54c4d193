from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from paired_spaces import SHARED, P, Q, planted
from subspan.align import SubspaceAligner
from subspan.align.spaces.plato_3d_text import pair_score
from subspan.measures import kernel_cka, local_kernel_cka
from subspan.statistics import JointMoments

# ---------------------------------------------------------------------- identities


def test_least_squares_after_unregularised_cca_is_the_diagonal_of_the_correlations(data):
    x, y, *_ = data
    model = SubspaceAligner(10, shrinkage=0.0).fit(x, y)
    between = model.map_x_ @ model.coordinates_[0].inverse()
    rho = torch.from_numpy(model.canonical_correlations_)
    torch.testing.assert_close(between.matrix, torch.diag(rho), atol=1e-10, rtol=0)
    z = model.coordinates_[0].map(x)
    torch.testing.assert_close(model.transform_x(x), z * rho, atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.cov(z.mT), torch.eye(10, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("direction", ["x->y", "y->x"])
def test_the_affine_map_is_least_squares_on_the_rows(data, direction):
    x, y, *_ = data
    model = SubspaceAligner(10, shrinkage=0.3, direction=direction).fit(x, y)
    a, b = (side.map(rows) for side, rows in zip(model.coordinates_, (x, y)))
    source, target = (a, b) if direction == "x->y" else (b, a)
    design = torch.cat([source, torch.ones(len(source), 1, dtype=torch.float64)], 1)
    expected = design @ torch.linalg.lstsq(design, target).solution
    found = model.transform_x(x) if direction == "x->y" else model.transform_y(y)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def literal_local_cka(anchors_x, anchors_y, u, v):
    """CKA of the anchors with one pair appended, by n × n kernels and the trace formula."""
    n = len(anchors_x) + 1
    k = torch.cat([anchors_x, u[None]]) @ torch.cat([anchors_x, u[None]]).mT
    m = torch.cat([anchors_y, v[None]]) @ torch.cat([anchors_y, v[None]]).mT
    h = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(a, b):
        return torch.trace(a @ h @ b @ h) / (n - 1) ** 2

    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


@pytest.mark.parametrize("subspace", ["cca", None])
def test_local_cka_is_the_kernel_formula(subspace):
    x, y, _ = planted(207)
    model = SubspaceAligner(5, "local_cka", subspace).fit(x[:200], y[:200])
    scores = model.similarity(x[200:], y[200:])
    a, b = (side.map(rows) for side, rows in zip(model.coordinates_, (x, y)))
    for i in range(7):
        for j in range(7):
            expected = literal_local_cka(a[:200], b[:200], a[200 + i], b[200 + j])
            assert abs(float(scores[i, j] - expected)) < 1e-10


def test_local_cka_is_computed_in_double_precision_from_single_precision_moments():
    x, y, _ = planted(300)
    single = JointMoments(P, Q, dtype=torch.float32).update(x.float(), y.float())
    assert single.local_cka(x[:3].float(), y[:4].float()).dtype == torch.float64
    with pytest.raises(ValueError, match="expected 48 columns, got 36"):
        single.local_cka(y[:3], y[:3])


def test_the_kernel_form_has_the_gaussian_of_the_median_distance():
    x, y, _ = planted(43)
    anchors, queries = (x[:40], y[:40]), (x[40:], y[40:42])
    linear = local_kernel_cka(*anchors, *queries, kernel="linear")
    torch.testing.assert_close(linear, JointMoments(P, Q).update(*anchors).local_cka(*queries), atol=1e-12, rtol=0)
    gaussian = local_kernel_cka(*anchors, *queries)

    def gram(rows):
        squared = torch.cdist(rows, rows).square()
        width = torch.median(squared[~torch.eye(len(rows), dtype=torch.bool)])
        return torch.exp(-squared / (2 * width))

    h = torch.eye(41, dtype=torch.float64) - 1 / 41
    for i in range(3):
        for j in range(2):
            k, m = gram(torch.cat([x[:40], x[40 + i : 41 + i]])), gram(torch.cat([y[:40], y[40 + j : 41 + j]]))
            k, m = h @ k @ h, h @ m @ h
            assert float(gaussian[i, j]) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), abs=1e-9)
    assert kernel_cka(x, y) == pytest.approx(JointMoments(P, Q).update(x, y).cka(), abs=1e-12)
    model = SubspaceAligner(5, "local_cka", kernel="rbf").fit(x[:40], y[:40])
    a, b = (side.map(rows) for side, rows in zip(model.coordinates_, (x, y)))
    torch.testing.assert_close(
        model.similarity(x[40:], y[40:]), local_kernel_cka(a[:40], b[:40], a[40:], b[40:]), atol=1e-12, rtol=0
    )


def test_chunks_give_the_alignment_of_the_whole(data):
    x, y, new_x, new_y, _ = data
    whole = SubspaceAligner(10).fit(x, y)
    chunked = SubspaceAligner(10)
    for a, b in zip(x.tensor_split(7), y.tensor_split(7)):
        chunked.partial_fit(a, b)
    torch.testing.assert_close(chunked.similarity(new_x, new_y), whole.similarity(new_x, new_y), atol=1e-9, rtol=0)
    np.testing.assert_allclose(chunked.held_out_correlations_, whole.held_out_correlations_, atol=1e-9)
    streamed = SubspaceAligner(10).fit(list(x.split(999)), list(y.split(999)))
    torch.testing.assert_close(streamed.similarity(new_x, new_y), whole.similarity(new_x, new_y), atol=1e-9, rtol=0)


def test_more_anchors_after_use_change_the_alignment(data):
    x, y, new_x, new_y, _ = data
    model = SubspaceAligner(10).fit(x[:500], y[:500])
    before = model.similarity(new_x, new_y)
    model.partial_fit(x[500:], y[500:])
    whole = SubspaceAligner(10).fit(x, y).similarity(new_x, new_y)
    assert float((before - whole).abs().max()) > 1e-3
    torch.testing.assert_close(model.similarity(new_x, new_y), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["affine", "local_cka", "cosine", "procrustes"])
def test_rotation_scale_and_shift_of_an_input_change_nothing_without_shrinkage(data, method):
    x, y, new_x, new_y, _ = data
    turn = 3.7 * torch.linalg.qr(torch.randn(P, P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    plain = SubspaceAligner(6, method, shrinkage=0.0).fit(x, y).similarity(new_x, new_y)
    moved = SubspaceAligner(6, method, shrinkage=0.0).fit(x @ turn - 40, y).similarity(new_x @ turn - 40, new_y)
    torch.testing.assert_close(moved, plain, atol=1e-8, rtol=0)


# ---------------------------------------------------------------------- the planted truth


def test_the_common_subspace_aligns_where_the_full_spaces_do_not(data):
    x, y, new_x, new_y, _ = data
    for method in ("affine", "local_cka", "cosine"):
        model = SubspaceAligner(SHARED, method).fit(x, y)
        assert model.score(new_x, new_y) > 0.95
        assert model.score(new_x, new_y, "matching") > 0.9
    for method, most in (("affine", 0.3), ("local_cka", 0.2)):
        assert SubspaceAligner(subspace=None, method=method).fit(x, y).score(new_x, new_y) < most
        # The dominant directions are the private ones.
        assert SubspaceAligner(SHARED, method, "pca").fit(x, y).score(new_x, new_y) < 0.15


def test_procrustes_is_an_isometry_of_the_coordinates(data):
    x, y, *_ = data
    model = SubspaceAligner(10, "procrustes", "pca").fit(x, y)
    between = model.map_x_ @ model.coordinates_[0].inverse()
    assert between.orthogonality_defect < 1e-9


@pytest.mark.parametrize("k", [12, "cv"])
def test_anchors_added_to_a_copy_count_once_and_leave_the_original(data, k):
    x, y, *_ = data
    model = SubspaceAligner(k).fit(x[:2000], y[:2000])
    cut = model.truncate(4)
    cut.partial_fit(x[2000:], y[2000:])
    assert model.moments_.count == 2000
    assert cut.moments_.count == 4000
    whole = SubspaceAligner(4).fit(x, y)
    np.testing.assert_allclose(cut.canonical_correlations_, whole.canonical_correlations_, atol=1e-9)
    np.testing.assert_allclose(cut.held_out_correlations_, whole.held_out_correlations_, atol=1e-9)


# ---------------------------------------------------------------------- use


def test_similarity_is_the_cosine_of_the_coordinates(data):
    x, y, new_x, new_y, _ = data
    model = SubspaceAligner(8).fit(x, y)
    a, b = model.transform_x(new_x), model.transform_y(new_y[:50])
    expected = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    torch.testing.assert_close(model.similarity(new_x, new_y[:50]), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["affine", "local_cka"])
def test_retrieval_in_both_directions(data, method):
    x, y, new_x, new_y, _ = data
    for direction in ("x->y", "y->x"):
        model = SubspaceAligner(SHARED, method, direction=direction).fit(x, y)
        scores, found = (
            model.retrieve(new_x[:20], new_y, 3) if direction == "x->y" else model.retrieve(new_x, new_y[:20], 3)
        )
        table = model.similarity(new_x, new_y)
        table = (table if direction == "x->y" else table.mT)[:20]
        torch.testing.assert_close(scores, table.topk(3).values, atol=1e-9, rtol=0)
        assert float((found == torch.arange(20)[:, None]).any(1).double().mean()) > 0.9
        assert model.score(new_x, new_y, "top3") == pytest.approx(
            float((model.retrieve(new_x, new_y, 3)[1] == torch.arange(200)[:, None]).any(1).double().mean())
        )


def test_matching_is_one_to_one_and_undoes_a_shuffle(data):
    x, y, new_x, new_y, _ = data
    model = SubspaceAligner(SHARED).fit(x, y)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    found = model.match(new_x, new_y[order])
    assert sorted(found.tolist()) == list(range(200))
    assert float((order[found] == torch.arange(200)).double().mean()) > 0.9
    fewer = model.match(new_x.numpy(), new_y[:150].numpy())
    assert isinstance(fewer, np.ndarray)
    assert (fewer == -1).sum() == 50


def test_equal_scores_do_not_count_as_found():
    assert pair_score(torch.zeros(20, 20), "top5") == 0
    assert pair_score(torch.zeros(20, 20), "matching") < 0.5
    assert pair_score(torch.eye(20), "top1") == pair_score(torch.eye(20), "matching") == 1


def test_numpy_and_torch_as_given_and_single_precision(data):
    x, y, new_x, new_y, _ = data
    model = SubspaceAligner(SHARED).fit(x.float().numpy(), y.to(torch.bfloat16).float().numpy())
    double = SubspaceAligner(SHARED).fit(x, y)
    scores = model.similarity(new_x.half().float().numpy(), new_y.numpy())
    assert isinstance(scores, np.ndarray)
    assert scores.dtype == np.float64
    assert np.abs(scores - double.similarity(new_x, new_y).numpy()).mean() < 0.02
    assert isinstance(model.similarity(new_x, new_y), torch.Tensor)


@pytest.mark.parametrize("method", ["affine", "local_cka"])
@pytest.mark.parametrize("subspace", ["cca", None])
def test_files_hold_the_alignment(data, tmp_path, method, subspace):
    x, y, new_x, new_y, _ = data
    model = SubspaceAligner(np.int64(6), method, subspace).fit(x, y)
    model.save(tmp_path / "a.safetensors")
    back = SubspaceAligner.load(tmp_path / "a.safetensors")
    torch.testing.assert_close(back.similarity(new_x, new_y), model.similarity(new_x, new_y), atol=1e-12, rtol=0)
    assert json.dumps(back.get_params()) == json.dumps({**model.get_params(), "n_components": 6})
    if subspace:
        np.testing.assert_array_equal(back.canonical_correlations_, model.canonical_correlations_)
        assert float(back.subspace_x_.angles(model.subspace_x_).max()) < 1e-6
    with pytest.raises(ValueError, match="read from a file"):
        back.partial_fit(x, y)
    with pytest.raises(NotFittedError, match="file"):
        _ = back.moments_
    model.subspace_x_.save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="holds subspace"):
        SubspaceAligner.load(tmp_path / "s.safetensors")


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, lambda x, y: (x, y[:-1]), "Y: expected 100 rows"),
        ({}, lambda x, y: (x[:2], y[:2]), "at least 3 pairs"),
        ({}, lambda x, y: (x, y * float("nan")), "Y: 100 of .* rows contain NaN"),
        ({}, lambda x, y: (x * float("inf"), y), "X: 100 of .* rows contain NaN or inf"),
        ({}, lambda x, y: (torch.ones_like(x), y), "X: the rows are constant"),
        ({}, lambda x, y: (x, None), "requires y"),
        ({"n_components": 37}, lambda x, y: (x, y), "n_components: the anchors give at most 36"),
        ({"n_components": 20}, lambda x, y: (x[:15], y[:15]), "at most 14"),
        ({"n_components": 5}, lambda x, y: (x[:, :4], y), "at most 4"),
        ({"n_components": 0}, lambda x, y: (x, y), "n_components: expected an integer"),
        ({"n_components": "cv", "subspace": "pca"}, lambda x, y: (x, y), "'cv' counts canonical pairs"),
        ({"n_components": "cv"}, lambda x, y: (x[:6], y[:6]), "'cv' needs at least 10"),
        ({"method": "magic"}, lambda x, y: (x, y), "method"),
        ({"subspace": "ica"}, lambda x, y: (x, y), "subspace"),
        ({"shrinkage": 1.5}, lambda x, y: (x, y), "shrinkage"),
        ({"shrinkage": "oas"}, lambda x, y: (x, y), "shrinkage"),
        ({"direction": "both"}, lambda x, y: (x, y), "direction"),
        ({"kernel": "poly"}, lambda x, y: (x, y), "kernel"),
        ({"scale": "none"}, lambda x, y: (x, y), "scale"),
        ({"alpha": -1.0}, lambda x, y: (x, y), "alpha"),
    ],
)
def test_bad_anchors_and_parameters_are_named(data, options, change, message):
    x, y = (rows[:100] for rows in data[:2])
    with pytest.raises(ValueError, match=message):
        SubspaceAligner(**{"n_components": 4, **options}).fit(*change(x, y))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, x, y: m.similarity(x[:, :3], y), "X: expected 48 columns"),
        (lambda m, x, y: m.similarity(x, y[:, :3]), "Y: expected 36 columns"),
        (lambda m, x, y: m.similarity(x, y * float("nan")), "Y: 20 of 20 rows"),
        (lambda m, x, y: m.match(x[:1], y), "at least 2 rows"),
        (lambda m, x, y: m.score(x, y[:7]), "as many queries"),
        (lambda m, x, y: m.score(x, y, "top"), "metric"),
        (lambda m, x, y: m.score(x, y, "map"), "metric"),
        (lambda m, x, y: m.retrieve(x, y, 21), "k: must lie"),
        (lambda m, x, y: m.truncate(method="cosine").retrieve(x, y, 0), "k: must lie"),
    ],
)
def test_bad_queries_are_named(data, use, message):
    model = SubspaceAligner(4, "local_cka").fit(data[0], data[1])
    with pytest.raises(ValueError, match=message):
        use(model, data[2][:20], data[3][:20])


def test_what_cannot_be_compared_is_said(data):
    x, y, *_ = data
    with pytest.raises(ValueError, match="equal numbers of coordinates, here 48 and 36"):
        SubspaceAligner(subspace=None, method="cosine").fit(x, y).similarity(x[:3], y[:3])
    rows = torch.zeros(5001, 4)
    with pytest.raises(ValueError, match=r"at most 5000 anchors, got 5001"):
        SubspaceAligner(2, "local_cka", kernel="rbf").fit(rows, rows)
    with pytest.raises(ValueError, match="too many for kernel matrices"):
        local_kernel_cka(torch.zeros(5001, 2), torch.zeros(5001, 2), torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="'rbf' needs all anchors"):
        SubspaceAligner(2, "local_cka", kernel="rbf").fit(x[:50], y[:50]).save("never.safetensors")
    with pytest.raises(NotFittedError):
        SubspaceAligner().similarity(x, y)
    with pytest.raises(NotFittedError):
        _ = SubspaceAligner().canonical_correlations_
    with pytest.raises(AttributeError, match="no canonical correlations"):
        _ = SubspaceAligner(4, subspace="pca").fit(x, y).canonical_correlations_
    again = clone(SubspaceAligner(4, "local_cka"))
    assert again.method == "local_cka"
