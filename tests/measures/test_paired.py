import numpy as np
import pytest
import torch

from subspan.measures.paired import expected_calibration_error, paired_bootstrap, resampled_means


def test_interval_covers_the_true_difference_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        shared = generator.normal(size=80)
        ours, theirs = shared + 0.3 + 0.5 * generator.normal(size=80), shared
        mean, low, high = paired_bootstrap(ours, theirs, level=0.8, resamples=400, random_state=trial)
        assert low < mean < high
        covered += low < 0.3 < high
    assert 0.72 < covered / 200 < 0.88


def test_scores_of_one_item_are_drawn_together():
    x = np.random.default_rng(0).normal(size=(40, 2))
    means = resampled_means(np.c_[x, x[:, 0] + 2 * x[:, 1]], resamples=300)
    assert means.shape == (300, 3)
    np.testing.assert_allclose(means[:, 2], means[:, 0] + 2 * means[:, 1], atol=1e-12)
    assert means[:, 0].std() == pytest.approx(x[:, 0].std() / 40**0.5, rel=0.15)
    with pytest.raises(ValueError, match="scores"):
        resampled_means(np.array([[np.nan, 1.0]]))


def test_what_the_methods_share_cancels():
    generator = np.random.default_rng(0)
    hard = generator.random(300) < 0.5
    better = hard.copy()
    better[np.flatnonzero(~hard)[:15]] = True
    mean, low, high = paired_bootstrap(better.astype(float), hard.astype(float))
    assert mean == pytest.approx(15 / 300)
    assert 0.02 < low < high < 0.09
    assert paired_bootstrap(hard.astype(float), hard.astype(float)) == (0.0, 0.0, 0.0)


def test_calibration_error_by_hand():
    p = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.4, 0.6], [0.55, 0.45]])
    # One bin per tenth: (0.95, right) and (0.92, wrong) share one, 0.6 right and 0.55 wrong stand apart.
    expected = (abs(1 - 0.95 - 0.92) + abs(1 - 0.6) + 0.55) / 4
    assert expected_calibration_error(p, [0, 1, 1, 1], bins=10) == pytest.approx(expected)
    assert expected_calibration_error(torch.eye(3), [0, 1, 2]) == 0.0
    assert expected_calibration_error(torch.eye(3), [1, 2, 0]) == 1.0


def test_probabilities_that_are_true_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20000, 3, generator=generator).pow(3)
    p = p / p.sum(1, keepdim=True)
    labels = torch.multinomial(p, 1, generator=generator)[:, 0]
    assert expected_calibration_error(p, labels) < 0.02


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="as many items"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="level: must lie"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0], level=1.0)
    with pytest.raises(ValueError, match="sum to 1"):
        expected_calibration_error(np.ones((2, 2)), [0, 1])
    with pytest.raises(ValueError, match="as many as rows"):
        expected_calibration_error(np.eye(2), [0])
