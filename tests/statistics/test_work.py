"""Counted work, so that a change that costs flops or passes is seen without timing anything."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from subspan.detect import SubspaceDetector
from subspan.geometry import Subspace
from subspan.statistics import CovarianceSketch, Moments, fit_moments


def test_an_update_takes_two_thirds_of_the_flops_of_the_plain_product():
    x = torch.randn(4096, 768)
    with FlopCounterMode(display=False) as counted:
        Moments(768).update(x)
    assert counted.get_total_flops() <= 0.70 * (2 * 4096 * 768**2)


def test_weights_cost_no_product_more():
    x, weights = torch.randn(4096, 768), torch.rand(4096)
    with FlopCounterMode(display=False) as counted:
        Moments(768).update(x, weights)
    assert counted.get_total_flops() <= 0.70 * (2 * 4096 * 768**2)


def test_residuals_take_half_the_flops_of_a_reconstruction():
    x = torch.randn(2000, 384, generator=torch.Generator().manual_seed(0))
    subspace = Subspace.fit(x, rank=32)
    with FlopCounterMode(display=False) as counted:
        found = subspace.residual_energy(x)
    assert counted.get_total_flops() <= 1.02 * (2 * 2000 * 384 * 32)
    with FlopCounterMode(display=False) as plain:
        exact = subspace.residual(x).square().sum(-1)
    assert plain.get_total_flops() >= 1.95 * counted.get_total_flops()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


class Rows:
    """Ten batches of 100 rows that can be read again; counts the rows given out, and the batches still alive."""

    def __init__(self):
        self.served = self.alive = self.most = 0

    def __iter__(self):
        for seed in range(10):
            batch = np.random.default_rng(seed).standard_normal((100, 8)) * np.arange(1, 9)
            self.served += 100
            self.alive += 1
            weakref.finalize(batch, self.died)
            self.most = max(self.most, self.alive)
            yield batch

    def died(self):
        self.alive -= 1


def sketch(rows):
    found = CovarianceSketch(8, 4)
    for batch in rows:
        found.update(batch)


@pytest.mark.parametrize(
    ("fit", "passes"),
    [
        (fit_moments, 1),
        (sketch, 1),
        (SubspaceDetector().fit, 2),
        (lambda rows: SubspaceDetector().fit(iter(rows)), 1),
    ],
    ids=["moments", "sketch", "detector and its threshold", "detector of what can be read once"],
)
def test_a_streamed_fit_reads_each_row_no_more_often_than_it_must(fit, passes):
    rows = Rows()
    fit(rows)
    assert rows.served == passes * 1000
    assert rows.most <= 3  # the one in use, the next, and what a loop variable still holds
