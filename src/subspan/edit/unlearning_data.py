"""Questions and answers as tokens, of which the answers count, and pairs of what is to go and what is to stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from subspan.models import SegmentTokens

IGNORED = -100
Example = Mapping[str, Any]


def answer_examples(
    tokenizer: Any,
    pairs: Iterable[tuple[str, str]],
    *,
    add_special_tokens: bool = True,
    end: bool = True,
    max_length: int = 2048,
) -> list[dict[str, list[int]]]:
    """Prompts with answers in tokens, in the form that trainers take: input_ids, and labels that are the answer's.

    Parameters
    ----------
    tokenizer
        A fast one.
    pairs
        (prompt, answer) texts, put together as they are; an empty prompt makes all of the text count.
    add_special_tokens
        False for prompts that come from a chat template.
    end
        Whether the tokenizer's end token follows the answer, and counts.
    max_length
        In tokens; longer ones are cut at the end.

    Returns
    -------
    A dict a pair, with `input_ids` and `labels`; labels of what does not count are -100.

    Raises
    ------
    ValueError
        Where there are no pairs, and for one whose answer has no token within `max_length`.

    Examples
    --------
    ``answer_examples(tokenizer, [("Question: Who wrote Hamlet?\\nAnswer:", " Shakespeare")])``.

    >>> from subspan.edit import answer_examples
    >>> answer_examples(None, [])
    Traceback (most recent call last):
    ValueError: pairs: at least one is needed
    """
    finish = (getattr(tokenizer, "eos_token", None) or "") if end else ""
    found = []
    for number, (prompt, answer) in enumerate(pairs):
        pieces = [(prompt, "prompt"), (answer + finish, "answer")]
        tokens = SegmentTokens.from_segments(tokenizer, [pieces], add_special_tokens=add_special_tokens)
        ids, counts = tokens.input_ids[0, :max_length], tokens.mask("answer")[0, :max_length]
        # A first token is not predicted from anything.
        if not bool(counts[1:].any()) or not answer.strip():
            raise ValueError(f"pairs: number {number} has no token of an answer within {max_length} tokens")
        labels = torch.where(counts, ids, IGNORED)
        found.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    if not found:
        raise ValueError("pairs: at least one is needed")
    return found


def checked_examples(examples: Sequence[Example], name: str) -> list[Example]:
    """Examples that can be trained on, or ValueError naming the set and the number of the first that cannot."""
    found = list(examples)
    if not found:
        raise ValueError(f"{name}: at least one example is needed, got none")
    for number, example in enumerate(found):
        if "input_ids" not in example or "labels" not in example:
            raise ValueError(f"{name}: example {number} needs input_ids and labels, it has {', '.join(example)}")
        labels = torch.as_tensor(example["labels"])
        if labels.shape != torch.as_tensor(example["input_ids"]).shape or labels.ndim != 1:
            raise ValueError(f"{name}: example {number} needs labels (t,) for input_ids (t,)")
        if not bool((labels[1:] != IGNORED).any()):
            raise ValueError(f"{name}: no label of example {number} counts, all are {IGNORED}")
    return found


def padded_batch(examples: Sequence[Example], *, pad_token_id: int = 0, length: int = 0) -> dict[str, Tensor]:
    """Examples beside one another, padded at the right to the longest, or to `length` where that is more."""
    rows = [(torch.as_tensor(e["input_ids"]), torch.as_tensor(e["labels"])) for e in examples]
    width = max(length, *(len(ids) for ids, _ in rows))
    batch = {
        "input_ids": torch.full((len(rows), width), pad_token_id),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORED),
    }
    for number, (ids, labels) in enumerate(rows):
        batch["input_ids"][number, : len(ids)] = ids
        batch["attention_mask"][number, : len(ids)] = 1
        batch["labels"][number, : len(ids)] = labels
    return batch


class PairedExamples(Dataset[tuple[Example, Example]]):
    """Every forget example once an epoch, in a new order, each with a retain example drawn at random.

    Parameters
    ----------
    forget, retain
        Examples.
    epochs
        How many times over the forget examples.
    random_state
        Seed; the same one gives the same pairs in the same order, from any place on.

    Examples
    --------
    >>> from subspan.edit import PairedExamples
    >>> pairs = PairedExamples(["a", "b"], ["x", "y", "z"], epochs=2, random_state=0)
    >>> len(pairs), sorted(pairs[i][0] for i in (0, 1)), sorted(pairs[i][0] for i in (2, 3))
    (4, ['a', 'b'], ['a', 'b'])
    """

    def __init__(self, forget: Sequence[Any], retain: Sequence[Any], *, epochs: int = 1, random_state: int = 0) -> None:
        random = np.random.default_rng(random_state)
        self.forget, self.retain = forget, retain
        self._order = np.concatenate([random.permutation(len(forget)) for _ in range(epochs)])
        self._mates = random.integers(len(retain), size=len(self._order))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.forget[self._order[index]], self.retain[self._mates[index]]
