"""TOFU's measures against hand values and the formulas as the benchmark has them."""

import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp

from subspan.measures import AnswerScores, forget_quality, model_utility, rouge_l_recall


def drawn(n=12, choices=False, shift=0.0, seed=0):
    random = np.random.default_rng(seed)
    losses = [random.uniform(0.2, 3, size) for size in (n, n, (n, 5))]
    return AnswerScores(losses[0], losses[1] + shift, losses[2], random.uniform(0.1, 1, n), choices)


@pytest.mark.parametrize(
    ("reference", "said", "expected"),
    [
        ("the cat sat on the mat", "The cat, on a mat!", 4 / 6),
        ("a b c d", "d c b a", 1 / 4),
        ("writers wrote", "writer wrote", 1 / 2),
        ("", "anything", 0),
        ("some", "", 0),
    ],
)
def test_rouge_is_the_longest_common_subsequence_over_the_reference(reference, said, expected):
    assert rouge_l_recall(reference, said) == pytest.approx(expected)


def test_a_stemmer_joins_forms_of_long_words_alone():
    assert rouge_l_recall("writers use his pens", "writer uses hi pen", stem=lambda word: word.rstrip("s")) == 3 / 4


def test_scores_are_the_benchmarks_formulas():
    scores, other = drawn(), drawn(choices=True)
    right, wrong = np.exp(-other.answer), np.exp(-other.perturbed)
    assert scores.probability == pytest.approx(np.exp(-scores.answer).mean())
    assert other.probability == pytest.approx((right / (right + wrong.sum(1))).mean())
    ratios = np.exp(-scores.perturbed).mean(1) / np.exp(-scores.paraphrased)
    assert np.exp(scores.log_truth_ratios) == pytest.approx(ratios)
    assert scores.truth_told == pytest.approx(np.maximum(0, 1 - ratios).mean())
    assert scores.truth_undecided == pytest.approx(np.minimum(ratios, 1 / ratios).mean())
    assert scores.summary(forgotten=True)["truth_ratio"] == scores.truth_undecided
    nine = [value for each in (scores, other, drawn(seed=2)) for value in each.summary().values()]
    assert model_utility([scores, other, drawn(seed=2)]) == pytest.approx(hmean(nine))


def test_answers_that_are_all_but_impossible_are_no_nan():
    gone = AnswerScores(np.full(2, 2000.0), np.full(2, 2000.0), np.array([[1.0, 2], [9000, 9000]]), np.ones(2), True)
    assert gone.probability == pytest.approx(0.5)
    assert gone.truth_told == pytest.approx(0.5)
    assert gone.truth_undecided == pytest.approx(0)
    assert model_utility([drawn(), AnswerScores(np.ones(2), np.ones(2), np.zeros((2, 3)), np.zeros(2))]) == 0
    with pytest.raises(ValueError, match="ROUGE-L"):
        model_utility([AnswerScores(np.ones(2), np.ones(2), np.ones((2, 3)), np.full(2, np.nan))])
    with pytest.raises(ValueError, match="at least one set"):
        model_utility([])


def test_forget_quality_is_of_two_samples_of_truth_ratios():
    a, b, far = drawn(40), drawn(40, seed=1), drawn(40, shift=4.0, seed=1)
    expected = ks_2samp(*(np.exp(each.perturbed.mean(1) - each.paraphrased) for each in (a, b))).pvalue
    assert forget_quality(a, b) == pytest.approx(expected)
    assert forget_quality(a, far) < 1e-6 < expected
