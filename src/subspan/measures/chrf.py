"""How much of the characters and words of references texts have: chrF and chrF++."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Float

# Of each order: n-grams of the text, of the reference, and those that they share.
_Counts = Float[np.ndarray, "orders 3"]


def chrf(
    texts: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    characters: int = 6,
    words: int = 2,
    beta: float = 2.0,
) -> float:
    """The F-score of n-grams of characters and words of all texts together, 0 to 100; with two orders of words chrF++.

    Precisions and recalls are means over the orders; n-grams of characters go over spaces, which are left out, and a
    mark at an end of a word is a word.

    Parameters
    ----------
    texts
        (n,) such as translations by a model.
    references
        (n,) what they should have been: a text or several, of which the one with the best score counts.
    characters, words
        Longest n-grams; no words (0) is chrF.
    beta
        How many times recall weighs what precision does.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        For none, another number of references than of texts, and orders or a weight out of range.

    References
    ----------
    Popović (2015), chrF; Popović (2017), chrF++.

    Examples
    --------
    >>> from subspan.measures import chrf
    >>> round(chrf(["the cat sat"], ["the cat sat down"]), 1), chrf(["the cat"], [["a cat", "the cat"]])
    (68.4, 100.0)
    """
    counts = _checked(texts, references, characters, words, beta)
    return _score(np.sum([_best(own, beta) for own in counts], axis=0), beta)


def chrf_scores(
    texts: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    characters: int = 6,
    words: int = 2,
    beta: float = 2.0,
) -> Float[np.ndarray, " n"]:
    """`chrf` of each text alone, for means with intervals and paired comparisons.

    Parameters
    ----------
    texts, references, characters, words, beta
        As in `chrf`.

    Returns
    -------
    array (n,), 0 to 100.

    Raises
    ------
    ValueError
        As `chrf`.

    Examples
    --------
    >>> from subspan.measures import chrf_scores
    >>> chrf_scores(["the cat", "dog"], ["the cat", "xyz"]).tolist()
    [100.0, 0.0]
    """
    counts = _checked(texts, references, characters, words, beta)
    return np.array([_score(_best(own, beta), beta) for own in counts])


def _checked(
    texts: Sequence[str], references: Sequence[str | Sequence[str]], characters: int, words: int, beta: float
) -> list[list[_Counts]]:
    """Counts of each text beside each of its references."""
    if isinstance(texts, str) or not len(texts) or len(texts) != len(references):
        raise ValueError(f"references: one or a list for each text is needed, got {len(references)} for {len(texts)}")
    if characters < 1 or words < 0 or not 0 < beta < float("inf"):
        raise ValueError(
            f"characters, words, beta: at least 1, at least 0 and positive, got {characters}, {words}, {beta}"
        )
    found = []
    for number, (text, given) in enumerate(zip(texts, references)):
        several = [given] if isinstance(given, str) else list(given)
        if not several:
            raise ValueError(f"references: text {number} has none")
        own = _ngrams(text, characters, words)
        found.append([_counts(own, _ngrams(other, characters, words)) for other in several])
    return found


def _ngrams(text: str, characters: int, words: int) -> list[Counter[tuple[str, ...]]]:
    parts = text.split()
    pieces = list(chain.from_iterable(_pieces(part) for part in parts))
    kinds = [("".join(parts), order) for order in range(1, characters + 1)]
    kinds += [(pieces, order) for order in range(1, words + 1)]
    return [Counter(tuple(units[at : at + n]) for at in range(len(units) - n + 1)) for units, n in kinds]


def _pieces(word: str) -> list[str]:
    """A word and the mark at its end, else the one at its start."""
    if len(word) > 1 and word[-1] in string.punctuation:
        return [word[:-1], word[-1]]
    if len(word) > 1 and word[0] in string.punctuation:
        return [word[0], word[1:]]
    return [word]


def _counts(own: list[Counter[tuple[str, ...]]], wanted: list[Counter[tuple[str, ...]]]) -> _Counts:
    # An order that the reference is too short for does not count against the text.
    return np.array(
        [(a.total() if b else 0, b.total(), sum(min(n, b[gram]) for gram, n in a.items())) for a, b in zip(own, wanted)]
    ).astype(float)


def _best(counts: list[_Counts], beta: float) -> _Counts:
    return max(counts, key=lambda each: _score(each, beta))


def _score(counts: _Counts, beta: float) -> float:
    own, wanted, shared = counts[(counts[:, 0] > 0) & (counts[:, 1] > 0)].T
    if not shared.any():
        return 0.0
    precision, recall = (shared / own).mean(), (shared / wanted).mean()
    return float(100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall))
