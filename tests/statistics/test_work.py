"""Counted work, so that a change that costs flops or passes is seen without timing anything."""

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from subspan.statistics import Moments, fit_moments


def test_an_update_takes_two_thirds_of_the_flops_of_the_plain_product():
    x = torch.randn(4096, 768)
    with FlopCounterMode(display=False) as counted:
        Moments(768).update(x)
    assert counted.get_total_flops() <= 0.70 * (2 * 4096 * 768**2)


def test_a_fit_reads_each_row_once():
    class Rows:
        def __init__(self):
            self.served = 0

        def __iter__(self):
            for seed in range(10):
                self.served += 100
                yield np.random.default_rng(seed).standard_normal((100, 8))

    rows = Rows()
    fit_moments(rows)
    assert rows.served == 1000
