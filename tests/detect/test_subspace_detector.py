"""The row detector: planted subspaces, identities, the published formulas, streams, thresholds, scikit-learn."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspan.detect import SubspaceDetector, subspace_score
from subspan.geometry import Subspace, oas_shrinkage
from subspan.measures import auroc
from subspan.statistics import Moments

PUBLISHED = ["residual", "mahalanobis", "cosine", "euclidean"]
DISTANCES = ["combined", *PUBLISHED]


def official(x, rank):
    """Mean, components and eigenvalues as the published code forms them: float64, two passes, searchsorted + 1."""
    x = x.astype(np.float64)
    mean = x.sum(0) / len(x)
    covariance = (x - mean).T @ (x - mean) / (len(x) - 1)
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(-values)
    values, vectors = values[order], vectors[:, order]
    if isinstance(rank, float):
        rank = int(np.searchsorted(np.cumsum(values) / values.sum(), rank)) + 1
    rank = min(rank, x.shape[1])
    return mean, vectors[:, :rank], values[:rank]


def official_score(x, model, distance, drop_k, eps=1e-6):
    mean, components, values = model
    z = (x - mean) @ components
    if distance in ("mahalanobis", "euclidean"):
        weights = 1 / (values[drop_k:] + eps) if distance == "mahalanobis" else np.ones(len(values) - drop_k)
        return np.einsum("ij,jk,ik->i", z[:, drop_k:], np.diag(weights), z[:, drop_k:])
    z = z.copy()
    z[:, :drop_k] = 0
    rebuilt = z @ components.T + mean
    if distance == "residual":
        return ((x - rebuilt) ** 2).sum(1)
    # The published code adds 1e-6 to lengths, whatever their unit; it only matters for rows at the origin.
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, rebuilt)]
    return 1 - np.clip((unit[0] * unit[1]).sum(1), -1, 1)


@pytest.mark.parametrize("distance", PUBLISHED)
@pytest.mark.parametrize("drop_k", [0, 2])
@pytest.mark.parametrize("rank", [0.9, 0.99, 5])
def test_parity_with_the_published_formulas(distance, drop_k, rank):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 12)) * np.linspace(3, 0.1, 12) + 1.5
    new = rng.standard_normal((50, 12)) * 2
    epsilon = 1e-6 / x.var(0, ddof=1).mean()
    detector = SubspaceDetector(rank, distance=distance, drop_k=drop_k, epsilon=epsilon).fit(x)
    model = official(x, rank)
    assert detector.subspace_.dim == model[1].shape[1]
    np.testing.assert_allclose(
        detector.anomaly_score(new), official_score(new, model, distance, drop_k), rtol=1e-9, atol=1e-11
    )


def test_dropping_every_direction_leaves_the_distance_to_the_mean_or_nothing():
    x = np.random.default_rng(0).standard_normal((100, 6))
    with pytest.warns(UserWarning, match="leaves none"):
        residual = SubspaceDetector(3, distance="residual", drop_k=3).fit(x)
    np.testing.assert_allclose(residual.anomaly_score(x), ((x - x.mean(0)) ** 2).sum(1), rtol=1e-10)
    with pytest.warns(UserWarning, match="leaves none"):
        inside = SubspaceDetector(3, distance="euclidean", drop_k=5).fit(x)
    assert not inside.anomaly_score(x).any()


def test_rank_one_keeps_every_direction_and_warns():
    x = np.random.default_rng(1).standard_normal((300, 7))
    with pytest.warns(UserWarning, match="residual is zero"):
        detector = SubspaceDetector(1.0, distance="residual").fit(x)
    assert detector.subspace_.dim == 7 == official(x, 1.0)[1].shape[1]
    assert detector.anomaly_score(x).max() < 1e-24


def test_a_planted_subspace_is_found(planted):
    drawn = planted(5000, 64, 8, noise=0.05, offset=3.0)
    detector = SubspaceDetector(8, distance="residual").fit(drawn.data)
    assert math.degrees(float(detector.subspace_.angles(Subspace(drawn.basis)).max())) < 3
    exact = planted(5000, 64, 8, noise=0.0, offset=3.0)
    assert SubspaceDetector(0.999999).fit(exact.data).subspace_.dim == 8


@settings(max_examples=25)
@given(seed=st.integers(0, 1000))
def test_pythagoras_and_independence_of_the_basis(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 9, dtype=torch.float64, generator=generator) + 2
    subspace = Subspace.fit(x, rank=4)
    z, residual = subspace.coordinates(x), subspace_score(subspace, x)
    torch.testing.assert_close((x - subspace.center).square().sum(-1), z.square().sum(-1) + residual)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator)).Q
    turned = Subspace(subspace.basis @ rotation, center=subspace.center)
    torch.testing.assert_close(subspace_score(turned, x), residual)
    flipped = Subspace(-subspace.basis, center=subspace.center)
    torch.testing.assert_close(subspace_score(flipped, x), residual)
    assert float(subspace_score(subspace, subspace.embed(z)).max()) < 1e-24


def test_any_stream_gives_the_subspace_of_a_dense_decomposition(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 20)) * np.linspace(3, 0.1, 20) + 100
    values = np.linalg.svd(x - x.mean(0), full_matrices=False)
    dense = values.Vh[:6].T @ values.Vh[:6]
    np.save(tmp_path / "x.npy", x)
    cuts = np.sort(rng.choice(np.arange(1, 3000), 11, replace=False))
    chunks = np.split(x, cuts)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(x)), 700)
    parts = SubspaceDetector(6, distance="residual")
    for chunk in chunks:
        parts.partial_fit(chunk)
    merged = Moments(20)
    for chunk in reversed(chunks):
        merged = Moments(20).update(chunk) + merged
    found = {
        "array": SubspaceDetector(6, distance="residual").fit(x).subspace_,
        "generator": SubspaceDetector(6, distance="residual").fit(chunk for chunk in chunks).subspace_,
        "file": SubspaceDetector(6, distance="residual").fit(str(tmp_path / "x.npy")).subspace_,
        "loader": SubspaceDetector(6, distance="residual").fit(loader).subspace_,
        "partial_fit": parts.subspace_,
        "merged": merged.subspace(6),
    }
    for name, subspace in found.items():
        assert float((subspace.projector - torch.from_numpy(dense)).abs().max()) < 1e-10, name


def test_dask_arrays_are_reduced_block_by_block():
    dask_array = pytest.importorskip("dask.array", reason="needs dask")
    x = np.random.default_rng(0).standard_normal((500, 8)) * np.linspace(2, 0.1, 8)
    streamed = SubspaceDetector(3).fit(dask_array.from_array(x, chunks=(90, 5)))
    torch.testing.assert_close(streamed.subspace_.projector, SubspaceDetector(3).fit(x).subspace_.projector)
    assert streamed.offset_ == pytest.approx(SubspaceDetector(3).fit(x).offset_)


def test_partial_fit_continues_after_fit():
    x = np.random.default_rng(0).standard_normal((300, 8)) * np.linspace(2, 0.1, 8)
    both = SubspaceDetector(3).fit(x[:200]).partial_fit(x[200:])
    torch.testing.assert_close(both.subspace_.projector, SubspaceDetector(3).fit(x).subspace_.projector)
    with pytest.raises(ValueError, match="begin with a clone"):
        SubspaceDetector(2).fit(x[:5]).partial_fit(x)


@pytest.mark.parametrize("distance", ["combined", "residual"])
def test_fewer_rows_than_columns(distance):
    x = np.random.default_rng(0).standard_normal((20, 300))
    detector = SubspaceDetector(0.9, distance=distance).fit(x)
    assert detector.subspace_.dim < 20
    assert detector.anomaly_score(x + 5).min() > detector.anomaly_score(x).max()


def test_fewer_rows_than_columns_leave_no_residual():
    x = np.random.default_rng(0).standard_normal((20, 300))
    with pytest.warns(UserWarning, match="residual is zero"):
        full = SubspaceDetector(1.0, distance="residual").fit(x)
    assert full.anomaly_score(x).max() < 1e-20 < full.anomaly_score(x + 1).min()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_in_torch_out(dtype, planted):
    x = planted(200, 10, 3, noise=0.1).data.to(dtype)
    detector = SubspaceDetector(3).fit(x)
    scores = detector.anomaly_score(x)
    assert isinstance(scores, torch.Tensor)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    assert set(detector.predict(x).tolist()) == {1, -1}
    wide = SubspaceDetector(3).fit(x.double()).anomaly_score(x.double())
    torch.testing.assert_close(scores.double(), wide, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("distance", ["combined", "residual"])
def test_float32_keeps_its_digits_far_from_the_origin(planted, distance):
    x = planted(2000, 16, 4, noise=0.05, offset=1e3).data
    exact = SubspaceDetector(4, distance=distance).fit(x).anomaly_score(x)
    rounded = SubspaceDetector(4, distance=distance).fit(x.float()).anomaly_score(x.float())
    # Rows near 1000 are stored to 6e-5 in float32, against residuals of 0.05 a column.
    torch.testing.assert_close(rounded.double(), exact, rtol=0.02, atol=1e-2 if distance == "combined" else 1e-4)


def test_the_threshold_counts_training_rows_and_holds_on_new_ones():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 20)) * np.linspace(2, 0.2, 20)
    detector = SubspaceDetector(8, contamination=0.05).fit(x[:2000])
    assert (detector.predict(x[:2000]) == -1).mean() == pytest.approx(0.05, abs=1e-3)
    assert (detector.predict(x[2000:]) == -1).mean() == pytest.approx(0.05, abs=0.02)
    detector.calibrate(x[2000:], 0.2)
    assert (detector.predict(x[2000:]) == -1).mean() == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("distance", ["combined", "residual", "mahalanobis", "euclidean"])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_gaussian_limit_of_a_stream_is_the_quantile_of_gaussian_rows(distance, mixed):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40_000, 20)) * np.linspace(2, 0.2, 20)
    if mixed:
        x = x @ rng.standard_normal((20, 20))
    detector = SubspaceDetector(8, distance=distance, contamination=0.05).fit(iter([x[:20_000]]))
    assert (detector.predict(x[20_000:]) == -1).mean() == pytest.approx(0.05, abs=0.01)


def test_no_limit_is_known_for_the_cosine_of_a_stream():
    x = np.random.default_rng(0).standard_normal((200, 6))
    detector = SubspaceDetector(2, distance="cosine").fit(iter([x]))
    with pytest.raises(ValueError, match="calibrate"):
        detector.predict(x)
    assert (detector.calibrate(x, 0.1).predict(x) == -1).sum() == 20


@pytest.mark.parametrize("distance", DISTANCES)
def test_saved_and_read_again(tmp_path, distance):
    x = np.random.default_rng(0).standard_normal((100, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
    detector = SubspaceDetector(0.8, distance=distance, drop_k=1).fit(x)
    detector.save(tmp_path / "model.safetensors")
    again = SubspaceDetector.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.score_samples(x), detector.score_samples(x))
    np.testing.assert_array_equal(again.predict(x), detector.predict(x))
    assert again.get_params() == detector.get_params()


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SubspaceDetector.load(path)
    Subspace.fit(torch.randn(20, 4), rank=2).save(path)
    with pytest.raises(ValueError, match="holds subspace, expected SubspaceDetector"):
        SubspaceDetector.load(path)


def with_nan():
    x = np.ones((10, 4)) + np.eye(10, 4)
    x[3, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("settings_", "x", "message"),
    [
        ({"rank": 0.0}, np.eye(5), "ratio must lie in"),
        ({"rank": 1.5}, np.eye(5), "ratio must lie in"),
        ({"rank": 0}, np.eye(5), "at least 1"),
        ({"rank": "most"}, np.eye(5), "unknown rule"),
        ({"distance": "manhattan"}, np.eye(5), "distance"),
        ({"drop_k": -1}, np.eye(5), "drop_k"),
        ({"contamination": 0.7}, np.eye(5), "contamination"),
        ({"contamination": "most"}, np.eye(5), "contamination"),
        ({"epsilon": -1.0}, np.eye(5), "epsilon"),
        ({"rank": 5, "strict": True}, np.eye(5), "span at most 4"),
        ({}, np.ones((10, 4)), "total variance is zero"),
        ({}, torch.from_numpy(with_nan()), "1 of 10 rows"),
        ({}, iter([with_nan()]), "1 of 10 rows"),
        ({}, iter([]), "no rows"),
        ({}, np.ones((1, 4)), "minimum of 2"),
    ],
)
def test_refusals(settings_, x, message):
    with pytest.raises(ValueError, match=message):
        SubspaceDetector(**settings_).fit(x)


def test_a_direction_without_variance_is_not_divided_by():
    flat = Subspace(torch.eye(4)[:, :2], variances=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="no variance to divide by"):
        subspace_score(flat, torch.ones(3, 4), "mahalanobis", epsilon=0)
    assert torch.isfinite(subspace_score(flat, torch.zeros(3, 4), "cosine")).all()


def test_an_integer_rank_is_capped_with_a_warning():
    with pytest.warns(UserWarning, match="more than the"):
        detector = SubspaceDetector(9).fit(np.random.default_rng(0).standard_normal((5, 6)))
    assert detector.subspace_.dim == 4


# ---------------------------------------------------------------------------- strange rows among those fitted to


def unit_rows(n=400, d=48):
    """Rows of unit length around a common mean, as embeddings are."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d)) * np.linspace(2, 0.2, d) + 0.5
    return x / np.linalg.norm(x, axis=1, keepdims=True)


STRANGE = {
    "ten times as long": lambda row: 10 * row,
    "thirty times as long": lambda row: 30 * row,
    "constant": np.ones_like,
    "other columns": lambda row: row[::-1],
    "minus": lambda row: -row,
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("rank", [0.9, 0.99])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [30, 400])
def test_a_row_that_is_plainly_strange_scores_highest(kind, rank, dtype, n):
    x = unit_rows()[:n].astype(dtype)
    x[7] = STRANGE[kind](x[7])
    detector = SubspaceDetector(rank, contamination="fence").fit(x)
    assert int(np.argmax(detector.anomaly_score(x))) == 7
    assert detector.predict(x)[7] == -1 or n == 30


@pytest.mark.parametrize(("n", "d", "rank"), [(300, 12, 0.9), (300, 12, 1.0), (25, 60, 0.9)])
def test_the_combined_distance_written_out(n, d, rank):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) * np.geomspace(0.1, 10, d) + 3
    new = x[:10] * rng.uniform(0.5, 2, (10, d))
    mean, scale = x.mean(0), x.std(0, ddof=1)
    correlation = np.cov(((x - mean) / scale).T)
    values, vectors = np.linalg.eigh(correlation)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    k = min(int(np.searchsorted(np.cumsum(values) / values.sum(), rank)) + 1, n - 1, d)
    weight = oas_shrinkage(torch.from_numpy(correlation), n)
    assert 0.01 < weight < 0.9
    outside = values[k:].sum() / max(1, min(n - 1, d) - k)
    shrunk = [(1 - weight) * value + weight for value in (values[:k], outside)]

    def roots(rows):
        z = (rows - mean) / scale @ vectors
        left = np.square(z[:, k:]).sum(1)
        return np.cbrt([(np.square(z[:, :k]) / shrunk[0]).sum(1) + left / shrunk[1], np.square(z).sum(1)])

    low, middle, high = np.quantile(roots(x), (0.25, 0.5, 0.75), axis=1)
    expected = ((roots(new).T - middle) / ((high - low) / 1.3489795)).max(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector = SubspaceDetector(rank).fit(x)
    assert detector.subspace_.dim == k
    np.testing.assert_allclose(detector.anomaly_score(new), expected, rtol=1e-6)


def test_malignant_cases_among_benign_ones_score_high():
    from sklearn.datasets import load_breast_cancer

    x, benign = load_breast_cancer(return_X_y=True)
    chosen = np.r_[np.flatnonzero(benign == 1), np.flatnonzero(benign == 0)[:20]]
    scores = SubspaceDetector().fit(x[chosen]).anomaly_score(x[chosen])
    assert auroc(scores, benign[chosen] == 0) > 0.94
    assert (
        auroc(SubspaceDetector(distance="residual").fit(x[chosen]).anomaly_score(x[chosen]), benign[chosen] == 0) < 0.9
    )


def test_strange_rows_do_not_change_what_is_usual():
    x = unit_rows()
    x[:60] = np.ones(48)
    usual = SubspaceDetector().fit(x).anomaly_score(x)[60:]
    assert 0.5 < usual.std() < 2
    assert abs(np.median(usual)) < 1


def test_a_crowd_of_strange_rows_does_not_hide_itself():
    x = unit_rows()
    x[:20] = np.ones(48) + 0.01 * x[:20]
    for source in (x, torch.from_numpy(x), iter([x[:200], x[200:]])):
        scores = np.asarray(SubspaceDetector().fit(source).anomaly_score(x))
        assert scores[:20].min() > scores[20:].max()


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_common_unit_decides_nothing(distance):
    x = unit_rows()
    for unit in (1e-9, 1e-3, 1e6):
        scores = [SubspaceDetector(distance=distance).fit(x * u).anomaly_score(x * u) for u in (1.0, unit)]
        if distance in ("residual", "euclidean"):
            scores[1] /= unit**2
        np.testing.assert_allclose(scores[1], scores[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n", [30, 400])
def test_units_of_columns_decide_nothing(n):
    x = unit_rows()[:n]
    units = np.geomspace(1e-5, 1e5, 48)
    expected = SubspaceDetector().fit(x)
    for source in (lambda rows: rows, lambda rows: iter([rows])):
        scaled = SubspaceDetector().fit(source(x * units))
        plain = SubspaceDetector().fit(source(x))
        np.testing.assert_allclose(scaled.anomaly_score(x * units), plain.anomaly_score(x), rtol=1e-6, atol=1e-8)
    assert expected.scale_.shape == (48,)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_differs_in_a_column_that_was_constant_is_strange(constant, dtype):
    x = unit_rows().astype(dtype)
    x[:, 3] = constant
    detector = SubspaceDetector(contamination="fence").fit(x)
    new = x[:5].copy()
    new[2, 3] += 1
    scores = detector.anomaly_score(new)
    assert int(np.argmax(scores)) == 2
    assert detector.predict(new)[2] == -1
    assert scores[[0, 1, 3, 4]].max() < 5


def test_scores_count_standard_deviations_beyond_the_usual():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, 12))
    # The larger of two: they are the same where columns are alone, and correlate where they are mixed.
    for rows, most in ((x, 1.3), (x @ rng.standard_normal((12, 12)), 5)):
        scores = SubspaceDetector(contamination="fence").fit(rows).anomaly_score(rows)
        assert -1e-9 < np.median(scores) < 0.4
        for level in (2.0, 3.0):
            assert 0.7 < (scores > level).mean() / (math.erfc(level / 2**0.5) / 2) < most


@pytest.mark.parametrize("distance", ["combined", "residual", "mahalanobis"])
def test_the_fence_leaves_normal_rows_in_and_strange_ones_out(distance):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 20)) * np.linspace(2, 0.5, 20)
    clean = SubspaceDetector(8, distance=distance, contamination="fence").fit(x)
    assert not (clean.predict(x) == -1).any()
    streamed = SubspaceDetector(8, distance=distance, contamination="fence").fit(iter([x]))
    assert streamed.offset_ == pytest.approx(clean.offset_, rel=0.1)
    x[:5] *= np.linspace(8, 12, 5)[:, None]
    assert (SubspaceDetector(8, distance=distance, contamination="fence").fit(x).predict(x[:5]) == -1).all()


def test_a_float32_row_beyond_every_square_is_found_or_refused():
    x = unit_rows().astype(np.float32)
    x[3] = 1e30
    for distance in DISTANCES:
        scores = SubspaceDetector(distance=distance).fit(x).anomaly_score(x)
        assert np.isfinite(scores).all()
    assert int(np.argmax(SubspaceDetector().fit(x).anomaly_score(x))) == 3
    with pytest.raises(ValueError, match="overflow"):
        SubspaceDetector().fit(x.astype(np.float64) * 1e150)
