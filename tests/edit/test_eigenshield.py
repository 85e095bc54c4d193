"""EigenShield: the spiked model recovered, scores and quantile in closed form, the filter as a map and as a hook."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from subspan.edit import (
    EigenShield,
    NoSpikesError,
    RobustSpikes,
    SpikeFilter,
    conformal_quantile,
    gaussian_blur,
    jpeg,
    pgd,
    random_noise,
    typos,
)
from subspan.geometry import MarchenkoPastur, random_matrix

pytestmark = pytest.mark.filterwarnings("ignore:.*rows for .* columns:UserWarning")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spiked(n: int, d: int, spikes: list[float], seed: int = 0, sigma: float = 1.0) -> torch.Tensor:
    """Rows with population variances `spikes` along the first axes and sigma^2 along the rest."""
    x = sigma * torch.randn(n, d, generator=generator(seed), dtype=torch.float64)
    x[:, : len(spikes)] *= torch.tensor(spikes, dtype=torch.float64).sqrt() / sigma
    return x


def pairs(n: int = 2000, d: int = 20, attacked: tuple[int, ...] = (1, 3), seed: int = 0):
    """Six planted spikes, and a perturbation of standard deviation 3 along the axes of some of them."""
    z = spiked(n, d, [60.0, 50.0, 40.0, 30.0, 20.0, 10.0], seed)
    noise = torch.zeros_like(z)
    noise[:, list(attacked)] = 3 * torch.randn(n, len(attacked), generator=generator(seed + 1), dtype=torch.float64)
    return z, z + noise


# ---------------------------------------------------------------------- the spectrum


def test_pure_noise_has_no_spikes():
    rule = MarchenkoPastur(confidence=0.99, minimum=0)
    found, sigma2 = [], []
    for seed in range(100):
        x = spiked(400, 100, [], seed, sigma=2.0)
        values = torch.linalg.eigvalsh(x.T @ x / 400).flip(0).numpy()
        found.append(rule(values, 400, 100))
        sigma2.append(rule.noise(values, 400, 100))
    assert np.mean(np.array(found) == 0) >= 0.95
    assert np.median(sigma2) == pytest.approx(4.0, rel=0.02)
    with pytest.raises(NoSpikesError, match="edge"):
        RobustSpikes(rank=rule).fit(x, x)


def test_planted_spikes_obey_the_spiked_model():
    z = spiked(4000, 1000, [5.0, 3.0, 2.0, 1.3])
    found = RobustSpikes(alpha=0.01).fit(z, z + 0.1)
    assert found.edge_ == pytest.approx(2.25, rel=0.02)
    assert found.spikes_.dim == 3  # 1.3 lies under the threshold 1.5
    np.testing.assert_allclose(found.report_["eigenvalue"], [5.3125, 3.375, 2.5], rtol=0.05)
    np.testing.assert_allclose(found.report_["debiased"], [5.0, 3.0, 2.0], rtol=0.07)
    cosine2 = found.spikes_.basis[:3].square().diagonal()
    np.testing.assert_allclose(cosine2, [0.926, 0.833, 0.60], atol=0.05)
    np.testing.assert_allclose(found.report_["expected_cosine2"], cosine2, atol=0.06)


@pytest.mark.parametrize("gamma", [0.1, 0.25, 1.0, 3.0])
def test_debiasing_inverts_the_bias(gamma):
    threshold = random_matrix.bbp_threshold(gamma, 0.7)
    spikes = threshold * np.array([1.01, 1.5, 4.0, 100.0])
    np.testing.assert_allclose(
        random_matrix.bbp_inverse(random_matrix.bbp_forward(spikes, gamma, 0.7), gamma, 0.7), spikes, rtol=1e-9
    )


@pytest.mark.parametrize(("n", "d"), [(800, 200), (400, 400), (300, 600)])
def test_density_fit_finds_the_noise_level(n, d):
    x = spiked(n, d, [200.0, 100.0], sigma=3.0)
    values = torch.linalg.eigvalsh(x.T @ x / n).flip(0).numpy()
    assert MarchenkoPastur("density").noise(values, n, d) == pytest.approx(9.0, rel=0.02)


def test_more_columns_than_rows_is_the_transposed_problem():
    x = spiked(150, 600, [80.0, 40.0], sigma=1.5)
    values = torch.linalg.eigvalsh(x @ x.T / 150).flip(0).numpy()
    transposed = random_matrix.noise_variance(values * 150 / 600, 600, 150, refine=0)
    assert random_matrix.noise_variance(values, 150, 600, refine=0) == pytest.approx(transposed, rel=1e-9)
    edge = random_matrix.spike_edge(150, 600, transposed)
    assert edge == pytest.approx(random_matrix.spike_edge(600, 150, transposed) * 600 / 150, rel=1e-9)
    found = RobustSpikes().fit(x, x + 0.5)
    assert found.spikes_.dim == 2
    assert found.sigma2_ == pytest.approx(2.25, rel=0.1)


def test_constant_and_dependent_columns_do_not_distort_the_noise_level():
    z, perturbed = pairs()
    alone = RobustSpikes().fit(z, perturbed)
    pad = torch.full((len(z), 30), 7.0, dtype=torch.float64)
    wide = RobustSpikes().fit(torch.cat([z, pad], 1), torch.cat([perturbed, pad], 1))
    rotation = torch.linalg.qr(torch.randn(30, 20, generator=generator(), dtype=torch.float64)).Q
    dependent = RobustSpikes().fit(z @ rotation.T, perturbed @ rotation.T)
    for other in (wide, dependent):
        assert other.sigma2_ == pytest.approx(alone.sigma2_, rel=1e-6)
        np.testing.assert_allclose(other.rbns_, alone.rbns_, rtol=1e-6)


def test_spectrum_report_compares_densities():
    z = spiked(3000, 600, [9.0])
    report = RobustSpikes().fit(z, z + 0.1).spectrum_report(bins=40)
    width = np.diff(report["bin_edges"])
    observed, law = np.array(report["noise_density"]), np.array(report["marchenko_pastur_density"])
    assert (observed * width).sum() == pytest.approx(1.0)
    assert (law * width).sum() == pytest.approx(1.0, abs=0.02)
    assert np.abs((observed - law) * width).sum() < 0.15
    assert report["spikes"]["kept"] == [True]


# ---------------------------------------------------------------------- scores and quantile


def test_energy_score_is_the_ratio_of_variances():
    z, perturbed = pairs(n=20000)
    found = RobustSpikes(alpha=0.45).fit(z, perturbed)
    np.testing.assert_allclose(found.rbns_[[1, 3]], [9 / 50, 9 / 30], rtol=0.06)
    assert found.rbns_[[0, 2, 4, 5]].max() < 1e-3
    assert found.kept_.tolist() == [True, False, True, False, True, True]
    # On the attacked axes nothing is left; elsewhere only what the estimation error of the directions leaves.
    removed = (found.transform(z) - found.transform(perturbed)).square().sum(1).mean()
    assert removed < 0.01 * (perturbed - z).square().sum(1).mean()


def test_energy_score_equals_its_definition_on_rows():
    z, perturbed = pairs(n=300)
    spectrum = spiked(500, 20, [60.0, 50.0, 40.0, 30.0, 20.0, 10.0], seed=9) + 2.0
    found = RobustSpikes().partial_fit(spectrum).partial_fit(z, perturbed)
    u, center = found.spikes_.basis, spectrum.mean(0)
    torch.testing.assert_close(found.spikes_.center, center)
    direct = ((perturbed - z) @ u).square().mean(0) / ((z - center) @ u).square().mean(0)
    np.testing.assert_allclose(found.rbns_, direct, rtol=1e-9)


@pytest.mark.parametrize("nonconformity", ["spectral", "alignment"])
def test_scores_without_pairs_find_the_disturbed_spike(nonconformity):
    z = spiked(3000, 30, [60.0, 30.0, 15.0])
    other = spiked(1500, 30, [60.0, 30.0, 15.0], seed=5)
    other[:, 2] *= 0.05  # the third spike is gone
    found = RobustSpikes(nonconformity, alpha=0.4).fit(z, other)
    assert found.rbns_.argmax() == 2
    assert found.rbns_[2] > 0.9
    assert found.rbns_[:2].max() < 0.2


def test_bootstrap_finds_the_unstable_spikes_and_is_seeded():
    z = spiked(1000, 100, [60.0, 12.0, 11.5, 2.2])
    first = RobustSpikes("bootstrap", random_state=3).fit(z)
    again = RobustSpikes("bootstrap", random_state=3).fit(z)
    np.testing.assert_array_equal(first.rbns_, again.rbns_)
    assert first.rbns_[0] < 0.05
    assert first.rbns_[3] > 5 * first.rbns_[0]


def test_any_function_scores():
    z, perturbed = pairs()
    found = RobustSpikes(lambda spikes, pairs: torch.arange(float(spikes.dim)), alpha=0.5).fit(z, perturbed)
    assert found.kept_.tolist() == [True] * 4 + [False] * 2
    with pytest.raises(ValueError, match="expected 6 values"):
        RobustSpikes(lambda spikes, pairs: torch.zeros(2)).fit(z, perturbed)
    with pytest.raises(ValueError, match="NaN"):
        RobustSpikes(lambda spikes, pairs: torch.full((spikes.dim,), math.nan)).fit(z, perturbed)


def test_kinds_are_averaged_or_maximised():
    z, first = pairs(attacked=(0,))
    _, second = pairs(attacked=(4,))
    kinds = {"first": first, "second": second}
    mean, largest = RobustSpikes().fit(z, kinds), RobustSpikes(reduce="max").fit(z, kinds)
    stacked = np.stack([mean.rbns_by_kind_["first"], mean.rbns_by_kind_["second"]])
    np.testing.assert_allclose(mean.rbns_, stacked.mean(0))
    np.testing.assert_allclose(largest.rbns_, stacked.max(0))


@pytest.mark.parametrize("m", [1, 2, 5, 9, 19])
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.2, 0.5, 0.9, 0.99])
def test_conformal_quantile_keeps_the_stated_number(m, alpha):
    scores = torch.rand(m, generator=generator(m), dtype=torch.float64)
    kept = int((scores <= conformal_quantile(scores, alpha)).sum())
    exact = -((-(m + 1) * (100 - round(100 * alpha))) // 100)
    assert kept == min(m, exact)


def test_ties_stay_together():
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])
    assert int((scores <= conformal_quantile(scores, 0.6)).sum()) == 4


def test_smallest_alpha_is_the_projector_onto_all_spikes():
    z, perturbed = pairs()
    found = RobustSpikes(alpha=1e-6).fit(z, perturbed)
    assert found.correlational_ is None
    spikes = found.spikes_
    torch.testing.assert_close(found.transform(z), spikes.center + (z - spikes.center) @ spikes.projector)
    unbounded = RobustSpikes(threshold=math.inf).fit(z, perturbed)
    torch.testing.assert_close(found.transform(z), unbounded.transform(z))


def test_absolute_threshold():
    z, perturbed = pairs()
    assert RobustSpikes(threshold=0.05).fit(z, perturbed).kept_.tolist() == [True, False, True, False, True, True]
    with pytest.raises(NoSpikesError, match="none of the 6 spikes"):
        RobustSpikes(threshold=1e-9).fit(z, perturbed)


# ---------------------------------------------------------------------- the filter


def test_filter_is_an_affine_projector():
    z, perturbed = pairs()
    found = RobustSpikes(alpha=0.3).fit(z + 5.0, perturbed + 5.0)
    once = found.transform(z)
    torch.testing.assert_close(found.transform(once), once)
    torch.testing.assert_close(found.transform(found.subspace_.center.unsqueeze(0))[0], found.subspace_.center)
    assert found.subspace_.dim + found.correlational_.dim == found.spikes_.dim


def test_removes_exactly_the_energy_along_the_removed_spikes():
    z, perturbed = pairs()
    found = RobustSpikes(space="spikes", alpha=0.3).fit(z, perturbed)
    fragile = found.correlational_.basis
    change = perturbed - z
    left = found.transform(perturbed) - found.transform(z)
    torch.testing.assert_close(left.square().sum(), change.square().sum() - (change @ fragile).square().sum())
    assert float(found.transform(z) @ fragile[:, 0] @ torch.ones(len(z), dtype=z.dtype)) == pytest.approx(
        float(len(z) * found.subspace_.center @ fragile[:, 0]), abs=1e-8
    )


def test_strength_norm_and_linear_form():
    z, perturbed = pairs()
    whole = RobustSpikes().fit(z, perturbed).transform(z)
    half = RobustSpikes(strength=0.5).fit(z, perturbed).transform(z)
    torch.testing.assert_close(half, (z + whole) / 2)
    kept = RobustSpikes(keep_norm=True).fit(z, perturbed).transform(z)
    torch.testing.assert_close(kept.norm(dim=1), z.norm(dim=1))
    torch.testing.assert_close(nn.functional.cosine_similarity(kept, whole), torch.ones(len(z), dtype=z.dtype))
    linear = RobustSpikes(center=False).fit(z + 3.0, perturbed + 3.0)
    torch.testing.assert_close(linear.transform(2 * z), 2 * linear.transform(z))
    assert linear.spikes_.dim == 7  # the mean is a direction like any other


def test_tokens_masks_and_dtypes():
    z, perturbed = pairs(n=1200)
    found = RobustSpikes().fit(z.reshape(20, 60, 20), perturbed.reshape(20, 60, 20))
    tokens = z[:24].reshape(2, 3, 4, 20)
    torch.testing.assert_close(found.transform(tokens).reshape(24, 20), found.transform(z[:24]))
    np.testing.assert_array_equal(found.transform(tokens.numpy()), found.transform(tokens).numpy())
    mask = torch.tensor([1, 1, 0, 1])
    masked = found.filter_(tokens, mask)
    torch.testing.assert_close(masked[..., 2, :], tokens[..., 2, :])
    torch.testing.assert_close(masked[..., 3, :], found.transform(tokens)[..., 3, :])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        half = RobustSpikes().fit(z.to(dtype), perturbed.to(dtype))
        assert half.subspace_.basis.dtype == torch.float64
        filtered = half.transform(z.to(dtype))
        assert filtered.dtype == dtype
        error = (filtered.double() - found.transform(z)).norm() / found.transform(z).norm()
        assert error < {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}[dtype]


def test_residual_score_alarms():
    z, perturbed = pairs()
    found = RobustSpikes(alpha=0.45).fit(z, perturbed)
    clean, attacked = found.residual_score(z), found.residual_score(z + 20 * found.correlational_.basis[:, 0])
    assert bool(((clean >= 0) & (clean <= 1)).all())
    assert attacked.mean() > clean.mean() + 0.2
    assert found.residual_score(found.subspace_.center.unsqueeze(0)) == 0
    outside = z - found.transform(z)
    torch.testing.assert_close(clean, outside.square().sum(1) / (z - found.subspace_.center).square().sum(1))


def test_filter_exports():
    z, perturbed = pairs()
    found = RobustSpikes(keep_norm=True).fit(z.float(), perturbed.float()).filter_.float()
    tokens = z[:12].float().reshape(3, 4, 20)
    exported = torch.export.export(found, (tokens,)).module()
    torch.testing.assert_close(exported(tokens), found(tokens))


def test_single_spike_and_repeated_eigenvalues():
    z = spiked(1000, 20, [50.0])
    assert RobustSpikes().fit(z, z + 0.1).kept_.tolist() == [True]
    # Eight exactly equal spikes.
    corners = torch.cat([torch.eye(8), -torch.eye(8)]).double().repeat(40, 1) * 30
    rows = torch.cat([corners, 0.1 * torch.randn(640, 24, generator=generator(), dtype=torch.float64)], 1)
    found = RobustSpikes().fit(rows, rows + 0.01 * torch.randn(rows.shape, generator=generator(2), dtype=torch.float64))
    assert found.spikes_.dim == 8
    assert bool(torch.isfinite(found.transform(rows)).all())


# ---------------------------------------------------------------------- streams and scikit-learn


def test_streams_equal_arrays():
    z, perturbed = pairs(n=1000)
    whole = RobustSpikes().fit(z, perturbed)
    streamed = RobustSpikes().fit(iter(z.split(130)), iter(perturbed.split(130)))
    stepwise = RobustSpikes()
    for rows, changed in zip(z.split(90), perturbed.split(90)):
        stepwise.partial_fit(rows, changed)
    numpy = RobustSpikes().fit(z.numpy(), perturbed.numpy())
    for other in (streamed, stepwise, numpy):
        np.testing.assert_allclose(other.rbns_, whole.rbns_, rtol=1e-8)
        torch.testing.assert_close(other.subspace_.projector, whole.subspace_.projector)
    assert isinstance(numpy.transform(z.numpy()), np.ndarray)


def test_partial_fit_waits_until_there_is_enough():
    z, perturbed = pairs()
    found = RobustSpikes().partial_fit(z)
    assert not hasattr(found, "filter_")
    assert hasattr(found.partial_fit(z[:50], perturbed[:50]), "filter_")


def test_set_output_names_the_columns():
    pandas = pytest.importorskip("pandas", reason="set_output is checked on data frames")
    z, _ = pairs(n=200)
    frame = pandas.DataFrame(z.numpy(), columns=[f"c{i}" for i in range(20)])
    found = RobustSpikes("bootstrap").set_output(transform="pandas").fit(frame)
    assert list(found.transform(frame).columns) == list(frame.columns)


def test_warns_about_few_rows():
    z, perturbed = pairs(n=60)
    with pytest.warns(UserWarning, match="60 rows for 20 columns"):
        RobustSpikes().fit(z, perturbed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"nonconformity": "magic"}, "nonconformity"),
        ({"threshold": "median"}, "threshold"),
        ({"threshold": -1.0}, "threshold"),
        ({"threshold": math.nan}, "threshold"),
        ({"reduce": "sum"}, "reduce"),
        ({"space": "bulk"}, "space"),
        ({"on_empty": "ignore"}, "on_empty"),
        ({"strength": 1.5}, "strength"),
        ({"resamples": 1}, "resamples"),
        ({"rank": "magic"}, "rank"),
    ],
)
def test_refuses_parameters(options, message):
    z, perturbed = pairs(n=50)
    with pytest.raises(ValueError, match=message):
        RobustSpikes(**options).fit(z, perturbed)


def test_refuses_data():
    z, perturbed = pairs(n=50)
    broken = z.clone()
    broken[3, 4] = math.nan
    cases = [
        ((z, None), "needs perturbed rows"),
        ((z, perturbed[:40]), "needs no pairs"),
        ((z, perturbed[:, :10]), "columns|shape"),
        ((z[:7], perturbed[:7]), "at least 8 rows"),
        ((broken, perturbed), "NaN"),
        ((z, broken), "NaN"),
        ((torch.ones(50, 20), torch.ones(50, 20)), "variance is zero"),
        ((iter(z.split(10)), iter(perturbed.split(25))), "shape|rows"),
        ((iter(z.split(10)), iter(perturbed[:40].split(10))), "as many rows"),
        ((iter(()), iter(())), "no rows"),
    ]
    for (x, y), message in cases:
        with pytest.raises(ValueError, match=message):
            RobustSpikes().fit(x, y)
    found = RobustSpikes().fit(z, perturbed)
    with pytest.raises(ValueError, match="20"):
        found.transform(z[:, :10])


def test_no_spikes_may_mean_no_change():
    noise = spiked(400, 40, [])
    found = RobustSpikes(rank=MarchenkoPastur(confidence=0.999), on_empty="identity").fit(noise, noise + 0.1)
    torch.testing.assert_close(found.transform(noise), noise)
    assert found.subspace_ is None
    assert found.residual_score(noise).max() == 0


# ---------------------------------------------------------------------- inside a model


class Tokens(nn.Module):
    """A model with a tuple output of tokens, a feature map and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 12)
        self.encoder = Pair()
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        hidden, _ = self.encoder(self.stem(x))
        return self.head(hidden.mean(1))


class Pair(nn.Module):
    def forward(self, hidden):
        return hidden + 0.1 * hidden.sin(), None


def token_batches(count: int = 6):
    scale = torch.tensor([9.0, 6.0, 3.0, 0.1, 0.1, 0.1])
    return [torch.randn(8, 5, 6, generator=generator(i)) * scale for i in range(count)]


def test_shield_filters_inside_and_leaves_no_trace():
    model = Tokens().eval()
    x = token_batches()[0]
    before, hooks = model(x), [len(m._forward_hooks) for m in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    shield = EigenShield(model, "encoder", alpha=0.4)
    with pytest.raises(RuntimeError, match="calibrate first"):
        shield.__enter__()
    shield.calibrate(token_batches(), lambda batch: batch + 0.3 * batch.sin(), spectrum=token_batches(8))
    with shield:
        inside = model(x)
        with pytest.raises(RuntimeError, match="already"):
            shield.__enter__()
    hidden, _ = model.encoder(model.stem(x))
    torch.testing.assert_close(inside, model.head(shield.to_module()(hidden).mean(1)))
    assert float((inside - before).abs().max()) > 1e-4
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), shield:
        raise ZeroDivisionError
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_shield_equals_the_estimator_on_its_states():
    model = Tokens().eval()
    batches = token_batches()
    shield = EigenShield(model, "stem", rank=3).calibrate(
        batches, {"up": lambda b: b * 1.1, "shift": lambda b: b + 0.2}
    )
    states = model.stem(torch.cat(batches)).detach()
    kinds = {
        "up": model.stem(torch.cat(batches) * 1.1).detach(),
        "shift": model.stem(torch.cat(batches) + 0.2).detach(),
    }
    direct = RobustSpikes(rank=3).fit(states, kinds)
    np.testing.assert_allclose(shield.spikes["stem"].rbns_, direct.rbns_, rtol=1e-4)
    assert shield.report()["stem"]["spikes"]["kept"] == direct.kept_.tolist()


def test_shield_without_an_attack_and_calibrated_only_outside():
    model = Tokens().eval()
    shield = EigenShield(model, "stem", rank=3, nonconformity="bootstrap", random_state=0).calibrate(token_batches())
    assert shield.spikes["stem"].rbns_.shape == (3,)
    with shield, pytest.raises(RuntimeError, match="outside"):
        shield.calibrate(token_batches())
    with pytest.raises(ValueError, match="needs perturbed rows"):
        EigenShield(model, "stem").calibrate(token_batches())


def test_shield_at_several_layers_and_on_maps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(40, 3, 12, 12, generator=generator())
    shield = EigenShield(model, ["0", "2"], rank=3)
    shield.calibrate(images.split(8), lambda batch: random_noise(batch, eps=0.05, generator=generator()))
    with pytest.raises(ValueError, match="one of 0, 2"):
        shield.to_module()
    with shield:
        found = model(images)
    first = shield.to_module("0")(model[0](images).movedim(1, -1)).movedim(-1, 1)
    second = shield.to_module("2")(model[2](model[1](first)).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(found, model[4](model[3](second)))


class Embedded(nn.Module):
    """A model that takes token numbers and a mask, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.block = nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask):
        return self.block(self.embedding(input_ids)) * attention_mask.unsqueeze(-1)


def test_masked_tokens_are_left_out_of_the_statistics():
    model = Embedded().eval()
    ids = torch.randint(0, 50, (12, 9), generator=generator())
    mask = (torch.arange(9) < 6).long().expand(12, 9).clone()
    batch = {"input_ids": ids, "attention_mask": mask}
    swapped = {"input_ids": (ids + 1) % 50, "attention_mask": mask}
    shield = EigenShield(model, "block", rank=4, alpha=0.5).calibrate([batch], lambda _: swapped)
    spikes = shield.spikes["block"].spikes_
    assert spikes.count == 12 * 6
    torch.testing.assert_close(spikes.center.float(), model.block(model.embedding(ids[:, :6])).flatten(0, 1).mean(0))


def test_gradients_go_through_the_installed_filter():
    model = Tokens().eval()
    x = token_batches()[0]
    shield = EigenShield(model, "encoder", alpha=0.4).calibrate(token_batches(), lambda batch: batch * 1.2)
    y = torch.zeros(8, dtype=torch.long)
    with shield:
        attacked = pgd(model, x, y, eps=0.5, clip=None, generator=generator())
        loss = nn.functional.cross_entropy
        assert loss(model(attacked), y) > loss(model(x), y)


# ---------------------------------------------------------------------- perturbations


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_stays_in_the_ball_and_raises_the_loss(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.rand(16, 3, 8, 8, generator=generator())
    y = model(x).argmax(1)
    eps = {"linf": 0.05, "l2": 1.0}[norm]
    attacked = pgd(model, x, y, eps=eps, norm=norm, generator=generator())
    change = (attacked - x).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert float(size.max()) <= eps * (1 + 1e-5)
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
    noise = random_noise(x, eps=eps, norm=norm, generator=generator())
    loss = nn.functional.cross_entropy
    assert loss(model(attacked), y) > loss(model(noise), y) + 0.1
    unlabelled = pgd(model, x, eps=eps, norm=norm, generator=generator())
    torch.testing.assert_close(unlabelled, attacked)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stopping_when_wrong_does_not_change_success():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    x = torch.rand(64, 3, 4, 4, generator=generator())
    y = torch.randint(0, 3, (64,), generator=generator())
    passes = []
    counted = lambda z: passes.append(len(z)) or model(z)  # noqa: E731
    early = pgd(counted, x, y, eps=0.05, stop_when_wrong=True, generator=generator())
    assert sum(passes) < 10 * 64
    late = pgd(model, x, y, eps=0.05, generator=generator())
    torch.testing.assert_close(model(early).argmax(1) != y, model(late).argmax(1) != y)


def test_pgd_refuses():
    x = torch.rand(2, 3)
    for options, message in (({"eps": -1.0}, "eps"), ({"eps": 0.1, "steps": 0}, "steps")):
        with pytest.raises(ValueError, match=message):
            pgd(nn.Linear(3, 2), x, **options)
    with pytest.raises(ValueError, match="clip"):
        pgd(nn.Linear(3, 2), x + 2, eps=0.1)


def test_noise_is_as_large_as_an_attack():
    x = torch.full((5, 3, 8, 8), 0.5)
    signs = random_noise(x, eps=0.1, generator=generator())
    torch.testing.assert_close((signs - x).abs(), torch.full_like(x, 0.1))
    ball = random_noise(x, eps=0.7, norm="l2", generator=generator())
    torch.testing.assert_close((ball - x).flatten(1).norm(dim=1), torch.full((5,), 0.7))


def test_blur_equals_scipy_and_keeps_constants():
    ndimage = pytest.importorskip("scipy.ndimage")
    image = torch.rand(2, 3, 20, 24, generator=generator(), dtype=torch.float64)
    ours = gaussian_blur(image, sigma=1.5)
    theirs = ndimage.gaussian_filter(image.numpy(), sigma=(0, 0, 1.5, 1.5), mode="mirror", truncate=5 / 1.5)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    constant = torch.full((1, 3, 9, 9), 0.3)
    torch.testing.assert_close(gaussian_blur(constant), constant)


def test_jpeg_is_attacked_through_its_straight_gradient():
    pytest.importorskip("PIL", reason="JPEG needs Pillow, from the extra 'vision'")
    image = gaussian_blur(torch.rand(2, 3, 32, 32, generator=generator()), sigma=2.0).requires_grad_(True)
    fine, coarse = jpeg(image, quality=95), jpeg(image, quality=10)
    assert (fine - image).abs().mean() < (coarse - image).abs().mean() < 0.1
    gradient = torch.autograd.grad((3 * coarse).sum(), image)[0]
    torch.testing.assert_close(gradient, torch.full_like(image, 3.0))
    assert (jpeg(image, quality=1) - image).abs().mean() > (coarse - image).abs().mean()
    for quality in (0, 96):
        with pytest.raises(ValueError, match="quality: must lie in"):
            jpeg(image, quality=quality)


def test_typos():
    text = "The quick brown fox jumps over 12 lazy dogs."
    rng = np.random.default_rng
    assert typos(text, rate=0.0) == text
    assert typos(text, rate=0.3, generator=rng(1)) == typos(text, rate=0.3, generator=rng(1)) != text
    assert sorted(typos(text, rate=0.5, kinds=["swap"], generator=rng(0))) == sorted(text)
    assert len(typos(text, rate=1.0, kinds=["drop"], generator=rng(0))) == sum(not c.isalpha() for c in text)
    assert typos("aB", rate=1.0, kinds=["repeat"]) == "aaBB"
    assert typos("q m", rate=1.0, kinds=["neighbour"]) == "w n"
    with pytest.raises(ValueError, match="kinds"):
        typos(text, kinds=["spell"])
    with pytest.raises(ValueError, match="rate"):
        typos(text, rate=2.0)


def test_filter_module_repr_and_state():
    found = SpikeFilter(torch.eye(4)[:, :2], torch.ones(4), strength=0.5)
    again = SpikeFilter(torch.eye(4)[:, 2:], strength=0.5)
    again.load_state_dict(found.state_dict())
    z = torch.randn(3, 4, generator=generator())
    torch.testing.assert_close(again(z), found(z))
    assert "r=2" in repr(found)
