"""Common words by what they are, for questions whose answers stand in the prompt."""

from __future__ import annotations

import numpy as np

from subspan.probe import FewShotExample

_WORDS = {
    "animal": (
        "horse cow dog cat sheep goat lion tiger bear wolf fox deer rabbit mouse rat monkey elephant camel "
        "donkey duck chicken eagle owl snake frog turtle shark whale bee spider"
    ),
    "food": (
        "bread rice cheese butter apple banana orange grape lemon carrot potato onion tomato soup cake pie "
        "honey sugar salt pepper egg milk beef pork ham salad pasta pizza sandwich cookie"
    ),
    "tool": (
        "hammer saw drill knife axe shovel rake wrench screwdriver pliers chisel ladder brush broom needle "
        "scissors rope nail screw hook pump lever file clamp torch bucket mop spade razor tape"
    ),
    "country": (
        "France Spain Italy Germany Poland Greece Turkey Egypt Kenya Nigeria India China Japan Korea Vietnam "
        "Thailand Brazil Peru Chile Mexico Canada Cuba Norway Sweden Finland Denmark Ireland Iran Iraq Nepal"
    ),
}
CATEGORIES: dict[str, tuple[str, ...]] = {name: tuple(words.split()) for name, words in _WORDS.items()}
"""Thirty words of each of four kinds."""


def retrieval_examples(n: int, *, k: int = 8, random_state: int = 0) -> list[FewShotExample]:
    """Prompts of k words with their category, of which the query repeats one; categories come equally often."""
    random = np.random.default_rng(random_state)
    names, found = list(CATEGORIES), []
    for number in range(n):
        labels = random.permutation([names[i % len(names)] for i in range(k)]).tolist()
        words = {name: random.permutation(CATEGORIES[name]).tolist() for name in names}
        shown = tuple((words[label].pop(), label) for label in labels)
        wanted = names[number % len(names)]
        places = [i for i, label in enumerate(labels) if label == wanted]
        query = shown[places[int(random.integers(len(places)))]]
        found.append(FewShotExample(shown, *query))
    return found
