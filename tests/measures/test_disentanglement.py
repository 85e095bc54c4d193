"""Scores of latents that are the factors, that mix them, and that know nothing of them."""

import numpy as np
import pytest

from subspan.geometry import Blocks
from subspan.measures import block_leakage, dci_score, factor_vae_score


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


def test_factors_that_are_not_chosen_count_as_one():
    fit, test = data(800, 0), data(400, 1)
    # Two factors in two latents that mix them: told apart not well, as one factor without fault.
    (rows, factors), (held, held_factors) = fit, test
    turn = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    mixed = [(np.column_stack([x[:, 0], x[:, 1:] @ turn]), f) for x, f in ((rows, factors), (held, held_factors))]
    every = factor_vae_score(*mixed, n_votes=400)
    assert every < 0.9
    assert factor_vae_score(*mixed, chosen=["c"], n_votes=400) == 1
    assert factor_vae_score(*mixed, chosen=["a"], n_votes=400) < 0.95
    assert factor_vae_score(*mixed, chosen=["a", "b", "c"], n_votes=400) == every
    with pytest.raises(ValueError, match=r"chosen: there are no factors \['d'\]"):
        factor_vae_score(fit, test, chosen=["d"])


def test_a_planted_copy_is_found_in_the_block_that_holds_it_and_in_a_length():
    random = np.random.default_rng(0)

    def drawn(n):
        factors = {name: random.integers(3, size=n) for name in "ab"}
        angle, length = 2 * np.pi * factors["a"] / 3, 1 + factors["b"]
        block = np.column_stack([np.cos(angle), np.sin(angle)]) * length[:, None]
        residual = np.column_stack([factors["a"] + 0.01 * random.normal(size=n), random.normal(size=n)])
        return np.hstack([residual, block]) + 0.01 * random.normal(size=(n, 4)), factors

    found = block_leakage(drawn(600), drawn(300), Blocks({"rest": 2, "none": 0, "a": 2}))
    assert list(found) == ["rest", "|rest|", "a", "|a|"]
    assert found["rest"]["a"].score > 0.95
    assert abs(found["rest"]["b"].score - found["rest"]["b"].chance) < 0.12
    assert found["a"]["a"].score > 0.95
    assert found["|a|"]["b"].score > 0.95  # hidden where directions do not show it
    assert abs(found["|a|"]["a"].score - found["|a|"]["a"].chance) < 0.12
    fit, test = drawn(50), drawn(50)
    with pytest.raises(ValueError, match="test: must have the factors of fit, 'a', 'b'"):
        block_leakage(fit, (test[0], {"a": test[1]["a"]}), Blocks({"rest": 4}))
    with pytest.raises(ValueError, match="expected 5 columns"):
        block_leakage(fit, test, Blocks({"rest": 5}))
