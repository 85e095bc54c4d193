from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from subspan.measures import jackknife, mutual_information
from subspan.statistics import JointMoments


def test_independent_columns_give_zero_and_gaussian_ones_their_formula():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(40_000, 2, generator=generator), torch.randn(40_000, 2, generator=generator)
    rho = 0.8
    y = torch.stack([rho * x[:, 0] + math.sqrt(1 - rho**2) * noise[:, 0], noise[:, 1]], 1)
    found = mutual_information(x, y, bins=40)
    truth = -0.5 * math.log(1 - rho**2)
    assert float(found[0, 0]) == pytest.approx(truth, rel=0.05)
    assert float(found[:, 1].abs().max()) < 2e-3


def test_silence_has_a_bin_of_its_own_and_the_sum_is_the_literal_one():
    rows = np.random.default_rng(0).normal(size=(500, 3)).clip(0)
    found = mutual_information(rows, rows[:, ::-1].copy() + rows[:, :1], bins=4)
    a, b = rows[:, 1], (rows[:, ::-1] + rows[:, :1])[:, 2]

    def codes(values):
        loud = values >= 1e-6
        edges = np.sort(values[loud])[np.round(np.array([0.25, 0.5, 0.75]) * (loud.sum() - 1)).astype(int)]
        return np.where(loud, 1 + np.searchsorted(edges, values, side="right"), 0)

    first, second = codes(a), codes(b)
    cells = len(set(zip(first, second)))
    bias = (len(set(first)) + len(set(second)) - cells - 1) / 1000
    assert float(found[1, 2]) == pytest.approx(mutual_info_score(first, second) + bias)


def test_bad_input_is_named():
    x = torch.randn(20, 2)
    with pytest.raises(ValueError, match="expected 20 rows"):
        mutual_information(x, x[:-1])
    with pytest.raises(ValueError, match="bins"):
        mutual_information(x, x, bins=50)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    rows = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks = [JointMoments(1, 1).update(row[None, :1], row[None, 1:]) for row in rows]
    estimate, error = jackknife(blocks, lambda moments: float(moments.mean_x))
    assert estimate == pytest.approx(float(rows[:, 0].mean()))
    assert error == pytest.approx(float(rows[:, 0].std() / 30**0.5))
    with pytest.raises(ValueError, match="at least 2"):
        jackknife(blocks[:1], lambda moments: 0.0)
