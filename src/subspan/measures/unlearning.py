"""What a language model still knows: TOFU's probability, ROUGE-L, truth ratio, model utility and forget quality."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float


def rouge_l_recall(reference: str, said: str, *, stem: Callable[[str], str] | None = None) -> float:
    """Share of a reference's words that a text has in the same order (longest common subsequence).

    Parameters
    ----------
    reference, said
        Texts; words are runs of a-z and 0-9 in lower case.
    stem
        Of words longer than three letters, such as ``nltk.PorterStemmer().stem``, which TOFU takes; None: none.

    Returns
    -------
    float
        In [0, 1]; 0 where the reference has no word.

    References
    ----------
    Lin (2004), ROUGE.

    Examples
    --------
    >>> from subspan.measures import rouge_l_recall
    >>> rouge_l_recall("The author is Basil Mahfouz.", "Basil is the author, Mahfouz says")
    0.6
    """
    wanted, given = (_words(text, stem) for text in (reference, said))
    before = [0] * (len(given) + 1)
    for word in wanted:
        row = [0]
        for place, other in enumerate(given):
            row.append(before[place] + 1 if word == other else max(row[-1], before[place + 1]))
        before = row
    return before[-1] / len(wanted) if wanted else 0.0


def _words(text: str, stem: Callable[[str], str] | None) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return words if stem is None else [stem(word) if len(word) > 3 else word for word in words]


@dataclass(frozen=True)
class AnswerScores:
    """What a model makes of one set of questions with right and perturbed answers.

    Attributes
    ----------
    answer
        (n,) mean loss (nats a token) of the right answers.
    paraphrased
        (n,) of the right answers in other words, or as they are.
    perturbed
        (n, p) of wrong answers in the same words.
    rouge
        (n,) ROUGE-L recall of what the model says; NaN where that was not asked.
    choices
        Whether the probability is that among right and wrong answers, as for TOFU's authors and world facts.
    """

    answer: Float[np.ndarray, " n"]
    paraphrased: Float[np.ndarray, " n"]
    perturbed: Float[np.ndarray, "n p"]
    rouge: Float[np.ndarray, " n"]
    choices: bool = False

    @property
    def probability(self) -> float:
        """Mean of exp(-loss) of the right answers, or of its share of that of all choices."""
        if not self.choices:
            return float(np.exp(-self.answer).mean())
        gaps = self.answer[:, None] - self.perturbed
        return float((1 / (1 + np.exp(np.minimum(gaps, 700)).sum(1))).mean())

    @property
    def log_truth_ratios(self) -> Float[np.ndarray, " n"]:
        """Log of the mean likelihood of wrong answers over that of the paraphrased right one, question by question."""
        return np.logaddexp.reduce(-self.perturbed, axis=1) - np.log(self.perturbed.shape[1]) + self.paraphrased

    @property
    def truth_told(self) -> float:
        """Mean of max(0, 1 - truth ratio): 1 where the model tells the truth from errors surely. Of what is kept."""
        return float(np.maximum(0, -np.expm1(np.minimum(self.log_truth_ratios, 0))).mean())

    @property
    def truth_undecided(self) -> float:
        """Mean of min(R, 1/R) of the truth ratio R: 1 where the model cannot tell. Of what is forgotten."""
        return float(np.exp(-np.abs(self.log_truth_ratios)).mean())

    def summary(self, *, forgotten: bool = False) -> dict[str, float]:
        """probability, rouge and truth ratio (of forgotten ones `truth_undecided`)."""
        truth = self.truth_undecided if forgotten else self.truth_told
        return {"probability": self.probability, "rouge": float(self.rouge.mean()), "truth_ratio": truth}


def model_utility(kept: Iterable[AnswerScores]) -> float:
    """Harmonic mean of probability, ROUGE-L and truth ratio over sets that a model should have kept.

    Parameters
    ----------
    kept
        TOFU: of the retained authors, of real authors, and of world facts: nine numbers.

    Returns
    -------
    float
        In [0, 1]; 0 where one of them is.

    Raises
    ------
    ValueError
        Where there is no set, or a number is NaN.

    References
    ----------
    Maini et al.: TOFU, a task of fictitious unlearning for LLMs (2024), arXiv 2401.06121.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import AnswerScores, model_utility
    >>> zero, wrong = np.zeros(2), np.full((2, 3), np.log(2.0))
    >>> round(model_utility([AnswerScores(zero, zero, wrong, np.ones(2))]), 4)
    0.75
    """
    numbers = np.array([value for scores in kept for value in scores.summary().values()])
    if not len(numbers) or np.isnan(numbers).any():
        raise ValueError("kept: at least one set is needed, with ROUGE-L of all its answers")
    return float(len(numbers) / (1 / numbers).sum()) if bool((numbers > 0).all()) else 0.0


def forget_quality(unlearned: AnswerScores, retained: AnswerScores) -> float:
    """p-value of a test that truth ratios on forgotten questions are those of a model that never saw them.

    Two-sample Kolmogorov-Smirnov, of the likelihood of the paraphrased answer over the geometric mean of the wrong
    ones'. High: the models cannot be told apart by it.

    Parameters
    ----------
    unlearned
        Of the forget set.
    retained
        Of the same set, by a model trained without it.

    Returns
    -------
    float

    References
    ----------
    TOFU (arXiv 2401.06121).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import AnswerScores, forget_quality
    >>> losses = np.linspace(1.0, 2.0, 40)
    >>> scores = AnswerScores(losses, losses, losses[:, None] + 1, losses)
    >>> moved = AnswerScores(losses, losses + 3, losses[:, None] + 1, losses)
    >>> forget_quality(scores, scores), forget_quality(moved, scores) < 1e-6
    (1.0, True)
    """
    from scipy.stats import ks_2samp

    ratios = [np.exp(each.perturbed.mean(1) - each.paraphrased) for each in (unlearned, retained)]
    found: Any = ks_2samp(*ratios)
    return float(found.pvalue)
