from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError

from subspan.align import C3, BlockwiseCovariance, MeanShift, ProjectedAffine, ReAlign
from subspan.base import normalize_rows
from subspan.geometry import power_law_exponent
from subspan.measures.neighbours import knn_overlap
from subspan.statistics import Moments
from subspan.statistics.spread import Spread

pytestmark = pytest.mark.filterwarnings("ignore:.*rows are few:UserWarning")


def modality(n: int, d: int = 64, *, exponent: float, offset: float, seed: int) -> torch.Tensor:
    """Unit rows around an offset along one random direction, with a power-law spectrum in random directions."""
    generator = torch.Generator().manual_seed(1000 + seed)
    directions = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    variances = torch.arange(1, d + 1, dtype=torch.float64) ** -exponent
    center = offset * directions[:, d // 2]
    rows = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return normalize_rows(center + rows * (variances / variances.sum()).sqrt() @ directions.mT)


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    return modality(1500, exponent=1.3, offset=0.7, seed=1)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return modality(1200, exponent=1.8, offset=1.2, seed=2)


def official(text: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The four passes of the published operator, written from its formulas: means in float32, traces about them."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    text, image = unit(text.astype(np.float64)), unit(image.astype(np.float64))
    mu_text, mu_image = (x.mean(0).astype(np.float32).astype(np.float64) for x in (text, image))
    trace_text, trace_image = ((x - m) ** 2 for x, m in ((text, mu_text), (image, mu_image)))
    scale = np.sqrt(trace_image.sum(1).mean() / (trace_text.sum(1).mean() + 1e-10))
    projected = unit((text - mu_text) * scale + mu_image)
    drifted = projected.mean(0)
    return unit(projected - drifted + mu_image), {"scale": scale, "mu_hat": drifted}


def test_anchor_gives_the_target_mean_exactly(texts, images):
    affine = ReAlign(("anchor",), normalize=False).fit(texts, images)
    torch.testing.assert_close(affine.transform(texts).mean(0), images.mean(0), atol=1e-13, rtol=0)


def test_trace_gives_the_target_trace_exactly_and_leaves_the_spectrum_in_shape(texts, images):
    model = ReAlign(("anchor", "trace"), normalize=False).fit(texts, images)
    mapped = model.transform(texts)
    spread = Spread(64).update(mapped)
    assert spread.trace == pytest.approx(Spread(64).update(images).trace, rel=1e-9)
    before, after = (torch.linalg.eigvalsh(Moments(64).update(x).covariance()) for x in (texts, mapped))
    torch.testing.assert_close(after / after.sum(), before / before.sum(), atol=1e-12, rtol=0)
    torch.testing.assert_close(after, model.scale_**2 * before, atol=1e-12, rtol=0)


def test_on_unit_rows_the_trace_and_the_scale_follow_from_the_means(texts, images):
    model = ReAlign().fit(texts, images)
    for name, trace in (("mean_source_", model.trace_source_), ("mean_target_", model.trace_target_)):
        assert trace == pytest.approx(1 - np.sum(getattr(model, name) ** 2), abs=1e-12)
    from_means = math.sqrt((1 - np.sum(model.mean_target_**2)) / (1 - np.sum(model.mean_source_**2)))
    assert model.scale_ == pytest.approx(from_means, rel=1e-9)
    affine = (texts.numpy() - model.mean_source_) * model.scale_ + model.mean_target_
    assert np.mean(np.sum(affine**2, axis=1)) == pytest.approx(1, abs=1e-9)


def test_source_equal_to_target_is_the_identity(texts):
    model = ReAlign().fit(texts, texts.flip(0))
    torch.testing.assert_close(model.transform(texts), texts, atol=1e-8, rtol=0)


def test_official_mode_equals_the_published_four_passes(texts, images):
    expected, statistics = official(texts.numpy(), images.numpy())
    model = ReAlign(official=True).fit(texts.numpy(), images.numpy())
    assert model.scale_ == pytest.approx(statistics["scale"], rel=1e-14)
    np.testing.assert_allclose(model.drift_[0] + model.mean_target_, statistics["mu_hat"], atol=1e-15)
    np.testing.assert_allclose(model.transform(texts.numpy()), expected, atol=1e-14)
    assert np.abs(ReAlign().fit(texts, images).transform(texts).numpy() - expected).max() < 1e-7
    assert np.array_equal(model.mean_source_, model.mean_source_.astype(np.float32))


def test_phantom_drift_of_two_points_is_exact():
    side = 0.4
    rows = torch.tensor([[1.0, side], [1.0, -side]], dtype=torch.float64)
    mean = ProjectedAffine(torch.ones((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64), rows[:0])(rows)
    assert float(mean.mean(0)[0]) == pytest.approx(1 / math.sqrt(1 + side**2), abs=1e-15)


def test_phantom_drift_of_a_gaussian_follows_the_second_order_formula():
    d, length = 5, 2.0
    generator = torch.Generator().manual_seed(0)
    direction = normalize_rows(torch.randn(1, d, dtype=torch.float64, generator=generator))[0]
    root = torch.randn(d, d, dtype=torch.float64, generator=generator)
    noise = torch.randn(200_000, d, dtype=torch.float64, generator=generator) @ root
    noise = torch.cat([noise, -noise])
    errors = []
    for size in (0.05, 0.025):
        rows = length * direction + size * noise
        sigma = size**2 * noise.mT @ noise / len(noise)
        drift = normalize_rows(rows).mean(0) - direction
        along = sigma @ direction
        formula = (-along - direction * sigma.trace() / 2 + 1.5 * direction * (direction @ along)) / length**2
        errors.append(float(torch.linalg.vector_norm(drift - formula)))
        assert errors[-1] < 0.2 * float(torch.linalg.vector_norm(formula))
        tangential = drift - direction * (drift @ direction)
        assert float(tangential.norm()) > 0.3 * float(drift.norm())
    # Odd orders cancel in the symmetric sample, so halving the noise divides the error by 16.
    assert errors[1] < errors[0] / 12


def test_the_drift_has_no_tangential_part_for_isotropic_noise():
    noise = torch.randn(100_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    signs = torch.tensor([[a, b, c] for a in (1, -1) for b in (1, -1) for c in (1, -1)], dtype=torch.float64)
    symmetric = (noise[:, None, :] * signs).reshape(-1, 3)
    drift = normalize_rows(symmetric + torch.tensor([1.0, 0.0, 0.0])).mean(0) - torch.tensor([1.0, 0.0, 0.0])
    assert float(drift[1:].norm()) < 1e-12 < abs(float(drift[0]))


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_what_is_left_is_at_most_the_drift_of_the_projection(seed):
    texts = modality(400, 12, exponent=1.0, offset=0.5, seed=seed)
    images = modality(300, 12, exponent=1.5, offset=1.0, seed=seed + 1)
    model = ReAlign().fit(texts, images)
    assert model.gap_after_ <= np.linalg.norm(model.drift_[0]) + 1e-12


def test_more_centroid_rounds_contract_the_gap(texts, images):
    gaps = [ReAlign(n_centroid=rounds).fit(texts, images).gap_after_ for rounds in (1, 2, 4, 8)]
    assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(gaps))


def test_each_step_brings_the_gap_down_by_an_order():
    texts = modality(20_000, 128, exponent=1.3, offset=0.55, seed=3)
    images = modality(20_000, 128, exponent=1.8, offset=0.75, seed=4)
    raw = ReAlign().fit(texts, images).gap_before_
    steps = [("anchor",), ("anchor", "trace"), ("anchor", "trace", "centroid")]
    anchor, trace, full = (ReAlign(taken).fit(texts, images).gap_after_ for taken in steps)
    assert raw > 5 * anchor
    assert anchor > 3 * trace
    assert trace > 1.5 * full
    assert raw > 300 * full


def test_geometry_is_kept_by_realign_and_not_by_the_blockwise_map(texts, images):
    exponent = {}
    kept = {}
    for model in (ReAlign(), BlockwiseCovariance(), C3(0.05, random_state=0)):
        mapped = model.fit(texts, images).transform(texts)
        name = type(model).__name__
        spectrum = torch.linalg.eigvalsh(Moments(64).update(mapped).covariance()).flip(0)
        exponent[name] = float(power_law_exponent(spectrum, last=40))
        kept[name] = float(knn_overlap(texts[:1500], mapped[:1500], 10).mean())
    spectrum = torch.linalg.eigvalsh(Moments(64).update(texts).covariance()).flip(0)
    original = float(power_law_exponent(spectrum, last=40))
    assert abs(exponent["ReAlign"] - original) < 0.03
    assert exponent["C3"] < original - 0.1
    assert kept["ReAlign"] > 0.75
    assert kept["ReAlign"] > 2 * kept["BlockwiseCovariance"]


def test_blockwise_matches_the_covariance_within_each_block(texts, images):
    model = BlockwiseCovariance(rank=8, ridge=0.0, normalize=False, n_centroid=0).fit(texts, images)
    got = Moments(64).update(model.transform(texts)).covariance()
    wanted = Moments(64).update(images).covariance()
    u = model.subspace_.basis
    v = model.subspace_.complement().basis
    for block in (u, v):
        torch.testing.assert_close(block.mT @ got @ block, block.mT @ wanted @ block, atol=1e-10, rtol=0)
    assert float((u.mT @ (got - wanted) @ v).abs().max()) > 1e-6


def test_parts_batches_and_generators_give_one_answer(texts, images, tmp_path):
    whole = ReAlign(n_centroid=2).fit(texts, images)
    np.save(tmp_path / "texts.npy", texts.numpy())
    streamed = ReAlign(n_centroid=2).fit(tmp_path / "texts.npy", [images[:7], images[7:900], images[900:]])
    parts = ReAlign(n_centroid=2)
    for rows in images.split(501):
        parts.partial_fit(Y=rows)
    for rows in texts.split(333):
        parts.partial_fit(rows)
    parts.finalize(list(texts.split(77)))
    for other in (streamed, parts):
        for name in ("mean_source_", "mean_target_", "scale_", "drift_", "gap_after_"):
            np.testing.assert_allclose(getattr(other, name), getattr(whole, name), atol=1e-13)
    once = ReAlign().partial_fit(texts, images).finalize(iter(texts.split(100)))
    np.testing.assert_allclose(once.drift_, ReAlign().fit(texts, images).drift_, atol=1e-13)
    assert math.isnan(once.gap_after_)


def test_float32_rows_are_summed_in_float64(texts, images):
    exact = ReAlign().fit(texts, images)
    single = ReAlign().fit(texts.float().repeat(30, 1), images.float())
    np.testing.assert_allclose(single.mean_source_, exact.mean_source_, atol=2e-9)
    assert single.gap_after_ == pytest.approx(exact.gap_after_, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_go_in_and_come_out(texts, images, dtype):
    model = ReAlign().fit(texts, images)
    expected = model.transform(texts)
    result = model.transform(texts.to(dtype))
    assert result.dtype == dtype
    np.testing.assert_allclose(result.double(), expected, atol=2e-3 if dtype is torch.float16 else 2e-2)


def test_zero_rows_count_for_nothing_and_stay_zero(texts, images):
    padded = torch.cat([texts, torch.zeros(500, 64, dtype=texts.dtype)])
    model, clean = ReAlign().fit(padded, images), ReAlign().fit(texts, images)
    np.testing.assert_allclose(model.drift_, clean.drift_, atol=1e-14)
    mapped = model.transform(padded)
    assert bool((mapped[-500:] == 0).all())
    assert model.n_source_ == len(texts)


def test_a_row_that_a_step_would_annihilate_skips_it():
    drift = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    operator = ProjectedAffine(torch.ones((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64), drift)
    row = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(operator(row)[0], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert float(operator(row)[1].norm()) == pytest.approx(1)


def test_a_centred_target_works(texts):
    images = torch.randn(3000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    images = normalize_rows(torch.cat([images, -images]))
    model = ReAlign().fit(texts, images)
    assert model.gap_after_ < model.gap_before_ / 10


def test_the_module_is_the_map_and_survives_a_file(texts, images, tmp_path):
    for model in (ReAlign(n_centroid=2), BlockwiseCovariance()):
        model.fit(texts, images)
        module = model.to_module(dtype=torch.float64)
        torch.testing.assert_close(module(texts), model.transform(texts), atol=1e-14, rtol=0)
        module.save(tmp_path / "map.safetensors")
        loaded = ProjectedAffine.load(tmp_path / "map.safetensors")
        assert torch.equal(loaded(texts), module(texts))
    assert not list(module.parameters())
    (tmp_path / "map.txt").write_text("no")
    with pytest.raises(ValueError, match=r"map\.txt"):
        ProjectedAffine.load(tmp_path / "map.txt")


def test_c3_noise_is_reproducible_and_of_the_given_size(texts, images):
    quiet = MeanShift().fit(texts, images).transform(texts)
    noisy = C3(0.05, random_state=3).fit(texts, images)
    assert np.array_equal(noisy.transform(texts.numpy()), noisy.transform(texts.numpy()))
    exact = C3(0.05, random_state=3, normalize=False).fit(texts, images).transform(texts)
    shift = MeanShift(normalize=False).fit(texts, images).transform(texts)
    assert float((exact - shift).std()) == pytest.approx(0.05, rel=0.02)
    torch.testing.assert_close(C3(0.0, random_state=0).fit(texts, images).transform(texts), quiet)


# ---------------------------------------------------------------------- refusals and warnings


def test_mapping_twice_or_mapping_images_is_refused(texts, images):
    model = ReAlign().fit(texts, images)
    once = model.transform(texts)
    for rows in (once, images, once[:50]):
        with pytest.raises(ValueError, match="already"):
            model.transform(rows)


def test_other_domains_and_other_lengths_are_warned_of(texts, images):
    model = ReAlign().fit(texts, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.transform(texts[:200])
        model.transform(modality(500, exponent=1.3, offset=0.7, seed=1)[:1])
    other = modality(500, exponent=1.3, offset=0.7, seed=77)
    with pytest.warns(UserWarning, match="another domain"):
        model.transform(other)
    with pytest.warns(UserWarning, match="not of unit length"):
        model.transform(3 * texts)
    with pytest.warns(UserWarning, match="rows are few"):
        ReAlign().fit(texts[:100], images)


def test_the_map_is_refused_before_it_is_known(texts, images):
    with pytest.raises(NotFittedError, match="fit first"):
        ReAlign().transform(texts)
    started = ReAlign().partial_fit(texts, images)
    with pytest.raises(NotFittedError, match="finalize"):
        started.transform(texts)
    with pytest.raises(ValueError, match="once more"):
        started.finalize()
    started.finalize(texts)
    started.partial_fit(texts)
    with pytest.raises(NotFittedError, match="finalize"):
        started.transform(texts)
    ReAlign(("anchor", "trace")).partial_fit(texts, images).finalize().transform(texts)


def _nan(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[3:5, 1] = float("nan")
    return x


@pytest.mark.parametrize("kind", [ReAlign, MeanShift, C3, BlockwiseCovariance])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :5], y), "Y: expected 5 columns"),
        (lambda x, y: (_nan(x), y), "X: 2 of .* rows contain NaN"),
        (lambda x, y: (x, _nan(y).numpy()), "Y: 2 of .* rows contain NaN"),
        (lambda x, y: (x[:1], y), "X: needs at least 2 rows"),
        (lambda x, y: (x, torch.zeros_like(y)), "Y: needs at least 2 rows"),
        (lambda x, y: (iter([x]), y), "X: a generator"),
        (lambda x, y: (x[:, :1], y[:, :1]), "1 feature"),
        (lambda x, y: (x[0], y), "X: expected 2 dimensions|batch: expected 2|source: expected 2"),
    ],
)
def test_bad_input_is_named(texts, images, kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind().fit(*change(texts, images))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ReAlign(("trace",)), "steps"),
        (ReAlign(()), "steps"),
        (ReAlign(n_centroid=0), "n_centroid"),
        (C3(-1.0), "sigma"),
        (BlockwiseCovariance(ridge=-1.0), "ridge"),
        (BlockwiseCovariance(n_centroid=-1), "n_centroid"),
    ],
)
def test_bad_parameters_are_named(texts, images, model, message):
    with pytest.raises(ValueError, match=message):
        model.fit(texts, images)


def test_a_constant_source_is_refused(images):
    for kind in (ReAlign, BlockwiseCovariance):
        with pytest.raises(ValueError, match="X: the rows are constant"):
            kind().fit(torch.full((50, 64), 0.3), images)
        with pytest.raises(ValueError, match="Y: the rows are constant"):
            kind().fit(images, torch.full((50, 64), 0.3))


def test_spread_merges_to_the_moments(texts):
    whole = Moments(64).update(texts)
    merged = sum((Spread(64).update(part) for part in texts.split(123)), Spread(64))
    torch.testing.assert_close(merged.mean, whole.mean, atol=1e-14, rtol=0)
    assert merged.trace == pytest.approx(float(whole.scatter.trace()) / len(texts), rel=1e-12)
    with pytest.raises(ValueError, match="dimension"):
        merged + Spread(3)
    with pytest.raises(ValueError, match="no rows"):
        _ = Spread(3).trace
