"""What `subspan select` chooses is what the methods choose, in the order of the data."""

import numpy as np
import pytest

from subspan.commands import select_rows
from subspan.datasets import Rows
from subspan.select import LeverageSelector
from subspan.select.baselines import k_center, k_medoids, random_rows

X = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
CHOOSE = {
    "leverage": lambda: LeverageSelector(7, rank=0.9, strategy="top", random_state=3).fit(X).indices_,
    "sample": lambda: LeverageSelector(7, rank=0.9, strategy="sample", random_state=3).fit(X).indices_,
    "medoids": lambda: k_medoids(X, 7, random_state=3),
    "farthest": lambda: k_center(X, 7, random_state=3),
    "random": lambda: random_rows(60, 7, random_state=3),
}


@pytest.mark.parametrize("method", CHOOSE)
def test_every_method_is_the_one_it_says(method):
    found = select_rows(Rows(X), 7, method=method, rank=0.9, seed=3)
    assert found.columns["row"] == sorted(np.asarray(CHOOSE[method]()).tolist())
    others = [sorted(np.asarray(choose()).tolist()) for name, choose in CHOOSE.items() if name != method]
    assert found.columns["row"] not in others
    assert ("leverage" in found.columns) == (method in ("leverage", "sample"))
