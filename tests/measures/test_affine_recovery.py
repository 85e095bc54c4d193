"""Affine recovery beside a regression by hand, and what it does not change with."""

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from subspan.measures import affine_recovery


def test_it_is_the_share_that_a_regression_explains():
    random = np.random.default_rng(0)
    truth = random.normal(size=(200, 2)) * [1, 100]
    found = np.hstack([truth[:, :1] ** 3, np.tanh(truth[:, 1:]), random.normal(size=(200, 1))])
    by_hand = r2_score(truth, LinearRegression().fit(found, truth).predict(found))
    assert affine_recovery(truth, found) == pytest.approx(by_hand)
    turned = found @ random.normal(size=(3, 3)) + 7
    assert affine_recovery(truth, turned) == pytest.approx(by_hand)
    assert affine_recovery(truth, np.hstack([found, found[:, :1]])) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f: (t, f[1:]), "found: expected 9 rows"),
        (lambda t, f: (t * [1, 0], f), "truth: coordinate 1 is constant"),
        (lambda t, f: (t, f / 0), "found: 9 of 9 rows contain NaN"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_what_it_refuses(change, message):
    rows = np.random.default_rng(0).normal(size=(9, 2))
    with pytest.raises(ValueError, match=message):
        affine_recovery(*change(rows, rows))
