"""chrF++ against figures of sacrebleu 2.6.0, and what must hold of it."""

import pytest

from subspan.measures import chrf, chrf_scores

TEXTS = ["The cat sat on the mat.", "hello world", '"Quoted" words, and more!', "", "ab"]
REFERENCES = ["A cat was sitting on the mat.", "hello, world!", '"Quoted" words: more.', "nothing", "abc"]
SEVERAL = [(first, second) for first, second in zip(REFERENCES, ["The cat sat here.", "bye", "x", "y", "ab"])]


@pytest.mark.parametrize(
    ("options", "together", "alone"),
    [
        ({}, 48.167434911, [43.388416, 44.253434, 65.374384, 0, 42.424242]),
        ({"words": 0}, 49.062801411, [39.784852, 49.508259, 70.002336, 0, 63.636364]),
        ({"characters": 3, "words": 1, "beta": 1.0}, 63.499189231, [58.636037, 76.844651, 72.915258, 0, 49.122807]),
    ],
)
def test_figures_are_those_of_sacrebleu(options, together, alone):
    assert chrf(TEXTS, REFERENCES, **options) == pytest.approx(together)
    assert chrf_scores(TEXTS, REFERENCES, **options).tolist() == pytest.approx(alone, abs=1e-5)


def test_of_several_references_the_best_counts():
    assert chrf(TEXTS, SEVERAL) == pytest.approx(54.768151972)
    assert chrf_scores(TEXTS, SEVERAL).tolist() == pytest.approx([59.217080, 44.253435, 65.374384, 0, 100], abs=1e-5)


def test_orders_that_a_reference_is_too_short_for_and_marks_before_words():
    assert chrf(["abcdefghijkl", "xyztuvw here"], ["abc", "xyztuv there"]) == pytest.approx(39.187888313)
    assert chrf(["xyz (tuv"], ["xyz tuv here"]) == pytest.approx(25.7658702045)


def test_recall_weighs_more_than_precision_and_spaces_are_no_characters():
    assert chrf(["the cat sat here"], ["the cat"]) > chrf(["the cat"], ["the cat sat here"])
    assert chrf(["thecat"], ["the cat"], words=0) == 100
    assert chrf(["thecat"], ["the cat"]) < 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "references: one or a list for each text is needed, got 1 for 0"),
        ({"texts": "a"}, "references: one or a list"),
        ({"references": [[]]}, "references: text 0 has none"),
        ({"characters": 0}, "characters, words, beta"),
        ({"words": -1}, "characters, words, beta"),
        ({"beta": 0.0}, "characters, words, beta"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        chrf(**{"texts": ["a"], "references": ["a"], **change})
