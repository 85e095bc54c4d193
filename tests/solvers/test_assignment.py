from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from subspan.solvers import assign


def test_the_matching_has_the_best_total_of_all():
    scores = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    best = max(itertools.permutations(range(6)), key=lambda order: sum(scores[i, j] for i, j in enumerate(order)))
    assert assign(scores).tolist() == list(best)
    least = min(itertools.permutations(range(6)), key=lambda order: sum(scores[i, j] for i, j in enumerate(order)))
    assert assign(scores.numpy(), maximize=False).tolist() == list(least)


def test_rows_without_a_partner_get_none():
    scores = torch.tensor([[3.0, 0.0], [5.0, 1.0], [4.0, 9.0]])
    assert assign(scores).tolist() == [-1, 0, 1]
    assert assign(scores.mT).tolist() == [1, 2]


def test_ties_do_not_favour_the_order_of_the_columns():
    assert assign(torch.zeros(50, 50), random_state=None).tolist() == list(range(50))
    shuffled = assign(torch.zeros(50, 50))
    assert sorted(shuffled.tolist()) == list(range(50))
    assert (shuffled == torch.arange(50)).sum() < 10


def test_nan_is_refused():
    with pytest.raises(ValueError, match="scores: 1 of 2 rows"):
        assign(np.array([[1.0, np.nan], [0.0, 1.0]]))
