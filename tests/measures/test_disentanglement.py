"""Scores of latents that are the factors, that mix them, and that know nothing of them."""

import numpy as np
import pytest

from subspan.measures import dci_score, factor_vae_score


def data(n, seed, turn=False, latents=3):
    random = np.random.default_rng(seed)
    factors = {name: random.integers(5, size=n) for name in "abc"}
    rows = np.column_stack([factors["c"], factors["a"], factors["b"]]).astype(float)
    rows = rows + 0.01 * random.standard_normal(rows.shape)
    if turn:
        rows = rows - (rows - 2).sum(1, keepdims=True) * 2 / 3  # a reflection that mixes all three alike
    return np.column_stack([rows, np.zeros(n)])[:, : max(3, latents)], factors


def test_latents_that_are_the_factors_have_full_scores_and_turned_ones_not():
    aligned, turned = ((data(800, 0, t), data(400, 1, t)) for t in (False, True))
    good, bad = dci_score(*aligned), dci_score(*turned)
    assert min(good[:3]) > 0.99
    assert good.importance.argmax(0).tolist() == [1, 2, 0]
    assert bad.disentanglement < 0.6
    assert bad.completeness < 0.6
    assert factor_vae_score(*aligned, n_votes=300) == 1
    assert factor_vae_score(*turned, n_votes=300) < 1
    # The unit of a latent decides nothing.
    wide = tuple((rows * [100, 1, 0.01], factors) for rows, factors in aligned)
    assert factor_vae_score(*wide, n_votes=300) == 1
    noise = np.random.default_rng(3).standard_normal((800, 3))
    blind = dci_score((noise, aligned[0][1]), (noise[:400], aligned[1][1]))
    assert 0 <= blind.informativeness < 0.05  # worse than the mean is no information, not less than none
    assert factor_vae_score((noise, aligned[0][1]), (noise[:400], aligned[1][1]), n_votes=300) < 0.55


def test_dci_is_the_entropy_of_importances():
    found = dci_score(data(400, 0, True), data(200, 1, True), n_estimators=5)
    share = found.importance / found.importance.sum(1, keepdims=True)
    entropy = -(share * np.log(share)).sum(1) / np.log(3)
    weight = found.importance.sum(1) / found.importance.sum()
    assert found.disentanglement == pytest.approx(((1 - entropy) * weight).sum())
    share = found.importance / found.importance.sum(0)
    weight = found.importance.sum(0) / found.importance.sum()
    assert found.completeness == pytest.approx(((1 + (share * np.log(share)).sum(0) / np.log(3)) * weight).sum())


def test_latents_that_do_not_vary_have_no_vote():
    assert factor_vae_score(data(400, 0, latents=4), data(200, 1, latents=4), n_votes=200) == 1
    assert dci_score(data(400, 0, latents=4), data(200, 1, latents=4)).disentanglement > 0.99
    rows, factors = data(100, 0)
    with pytest.raises(ValueError, match="no latent varies"):
        factor_vae_score((0 * rows, factors), (rows, factors))
    with pytest.raises(ValueError, match="share a value"):
        factor_vae_score((rows, {**factors, "a": np.arange(100)}), (rows, factors))


def test_wrong_factors_are_refused():
    rows, factors = data(50, 0)
    for wrong, message in (
        ({"a": factors["a"]}, "at least 2"), ({**factors, "a": rows[:, 0]}, "whole numbers"),
        ({**factors, "d": factors["a"]}, "factors"), ({**factors, "a": factors["a"][:9]}, "50 whole"),
    ):  # fmt: skip
        for score in (dci_score, factor_vae_score):
            with pytest.raises(ValueError, match=message):
                score((rows, factors), (rows, wrong))
