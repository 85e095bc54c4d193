"""Few-shot prompts in tokens: where each demonstration's text, the token before its label, and its label stand."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Int
from sklearn.utils import check_random_state
from torch import Tensor

from subspan.base.parameters import Seed
from subspan.models import SegmentTokens

Cut = Literal[
    "text_to_forerunner", "query_to_forerunner", "forerunner_to_label", "label_to_query", "forerunner_to_forerunner"
]
CUTS: tuple[Cut, ...] = get_args(Cut)
"""Edges of the circuit; see `FewShotBatch.edges`."""


class FewShotExample(NamedTuple):
    """Demonstrations and a query, with the names of their labels.

    Attributes
    ----------
    demonstrations
        Pairs of text and label.
    query
        Text.
    label
        What is right for the query.
    """

    demonstrations: tuple[tuple[str, str], ...]
    query: str
    label: str


def draw_examples(
    texts: Sequence[str],
    labels: Sequence[str],
    queries: Sequence[str],
    query_labels: Sequence[str],
    *,
    k: int = 4,
    random_state: Seed = None,
) -> list[FewShotExample]:
    """An example for each query, with k demonstrations drawn at random from a pool that does not hold the query.

    Parameters
    ----------
    texts, labels
        The pool.
    queries, query_labels
        One example each.
    k
        Demonstrations; 0: none.
    random_state
        Seed of the draws.

    Returns
    -------
    list of FewShotExample

    Raises
    ------
    ValueError
        For unequal lengths, and a pool with fewer than k texts.

    Examples
    --------
    >>> from subspan.probe import draw_examples
    >>> draw_examples(["good", "bad"], ["+", "-"], ["fine", "bad"], ["+", "-"], k=1, random_state=0)[1].demonstrations
    (('good', '+'),)
    """
    for name, some, other in (("labels", texts, labels), ("query_labels", queries, query_labels)):
        if len(some) != len(other):
            raise ValueError(f"{name}: {len(some)} are needed, one a text, got {len(other)}")
    random, found = check_random_state(random_state), []
    for query, label in zip(queries, query_labels):
        # The query may stand in the pool, even several times.
        order = [int(i) for i in random.permutation(len(texts)) if texts[i] != query][:k]
        if len(order) < k:
            raise ValueError(f"texts: a pool of at least {k} texts other than the query is needed, got {len(order)}")
        found.append(FewShotExample(tuple((texts[i], labels[i]) for i in order), query, label))
    return found


@dataclass(frozen=True)
class FewShotBatch:
    """Few-shot prompts in tokens, with the positions of their parts; see `FewShotPrompt.build`.

    Attributes
    ----------
    tokens
        Ids, mask, and the piece of each token.
    forerunners, labels
        (b, k): the last token before the label of each demonstration, and the label.
    text, query
        (b,): the last token of the query's text, and the query's own forerunner, where the answer is predicted.
    appended
        (b,): the label after the query, where there is one.
    owners
        (b, k): number of each demonstration's label.
    targets
        (b,): number of the query's label.
    """

    tokens: SegmentTokens
    forerunners: Int[Tensor, "b k"]
    labels: Int[Tensor, "b k"]
    text: Int[Tensor, " b"]
    query: Int[Tensor, " b"]
    appended: Int[Tensor, " b"] | None
    owners: Int[Tensor, "b k"]
    targets: Int[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def k(self) -> int:
        """Demonstrations of each prompt."""
        return self.labels.shape[1]

    @property
    def lengths(self) -> Int[Tensor, " b"]:
        """Tokens of each prompt, special ones counted."""
        return self.tokens.attention_mask.sum(1)

    @property
    def first(self) -> Int[Tensor, " b"]:
        """Position of the first token of each prompt, special ones counted."""
        return self.tokens.attention_mask.argmax(1)

    def edges(self, cut: Cut, *, include_query: bool = False, keep_self: bool = True) -> Bool[Tensor, "b t t"]:
        """The edges (b, query, key) of a step of the circuit, for `cut_attention`.

        Parameters
        ----------
        cut
            "text_to_forerunner": each forerunner ← the tokens of its demonstration before it; "query_to_forerunner":
            the query's forerunner ← all tokens of the query; "forerunner_to_label": each label ← its forerunner;
            "label_to_query": the query's forerunner ← all labels; "forerunner_to_forerunner": each forerunner, the
            query's too, ← those before it.
        include_query
            For "text_to_forerunner": the query's, too.
        keep_self
            A token goes on seeing itself.

        Raises
        ------
        ValueError
            For another name, and without demonstrations.
        """
        if cut not in CUTS:
            raise ValueError(f"cut: one of {', '.join(CUTS)}, got {cut!r}")
        if not self.k and cut != "query_to_forerunner":
            raise ValueError(f"cut: {cut!r} needs prompts with demonstrations, these have none")
        found = torch.zeros(*self.tokens.segment.shape, self.tokens.segment.shape[1], dtype=torch.bool)
        last = self.query.unsqueeze(1)
        if cut == "text_to_forerunner":
            for i in range(self.k + include_query):
                at = self.forerunners[:, i] if i < self.k else self.query
                self._link(found, at, self._span(i))
        elif cut == "query_to_forerunner":
            self._link(found, self.query, self._span(self.k))
        elif cut == "forerunner_to_label":
            found[torch.arange(len(self)).unsqueeze(1), self.labels, self.forerunners] = True
        elif cut == "label_to_query":
            found[torch.arange(len(self)).unsqueeze(1), last, self.labels] = True
        else:
            every = torch.zeros_like(self.tokens.segment, dtype=torch.bool)
            every.scatter_(1, torch.cat([self.forerunners, last], 1), True)
            found = (every.unsqueeze(2) & every.unsqueeze(1)).tril()
        return found & ~torch.eye(found.shape[1], dtype=torch.bool) if keep_self else found

    def _span(self, number: int) -> Bool[Tensor, "b t"]:
        """Tokens from the end of the label before to the forerunner of a demonstration (k: the query), without special
        ones."""
        place = torch.arange(self.tokens.segment.shape[1])
        stop = (self.forerunners[:, number] if number < self.k else self.query).unsqueeze(1)
        start = self.labels[:, number - 1].unsqueeze(1) if number else self.first.unsqueeze(1) - 1
        return (place > start) & (place <= stop) & (self.tokens.segment >= 0)

    def _link(self, found: Tensor, at: Tensor, keys: Tensor) -> None:
        rows = torch.arange(len(self))
        found[rows, at] |= keys & (torch.arange(keys.shape[1]) <= at.unsqueeze(1))

    def random_edges(self, counts: Int[Tensor, " b"], *, random_state: Seed = None) -> Bool[Tensor, "b t t"]:
        """So many edges of each prompt at random, without replacement: of tokens to earlier ones but the first.

        Raises ValueError where a prompt has fewer edges.
        """
        generator = torch.Generator().manual_seed(int(check_random_state(random_state).randint(2**31)))
        present = self.tokens.attention_mask != 0
        seen = present & (torch.arange(present.shape[1]) != self.first.unsqueeze(1))
        possible = (present.unsqueeze(2) & seen.unsqueeze(1)).tril(-1)
        found = torch.zeros_like(possible)
        for row, count in enumerate(counts.tolist()):
            places = possible[row].flatten().nonzero().flatten()
            if count > len(places):
                raise ValueError(f"counts: prompt {row} has {len(places)} edges, {count} are asked for")
            found[row].view(-1)[places[torch.randperm(len(places), generator=generator)[:count]]] = True
        return found


@dataclass(frozen=True)
class FewShotPrompt:
    """A template of few-shot prompts, and the words that stand for labels.

    Parameters
    ----------
    labels
        Words, or a mapping from a data set's labels to words.
    template
        Of a demonstration, with {text} and then {label}, and something between them: its last token before the label
        is the forerunner. Spaces before {label} go with the label. A prompt is all demonstrations one after another,
        and the query's up to its forerunner.
    multi_token
        A label of several tokens is an error, or stands for its first one ("first").

    Raises
    ------
    ValueError
        For a template without its fields or without text before the label, fewer than two labels, or two alike.

    Examples
    --------
    >>> from subspan.probe import FewShotExample, FewShotPrompt
    >>> prompt = FewShotPrompt({"0": "bad", "1": "good"}, "review: {text} label: {label};")
    >>> prompt.text(FewShotExample((("a fine film", "1"),), "dull", "0"))
    'review: a fine film label: good;review: dull label:'
    """

    labels: Mapping[str, str] | Sequence[str]
    template: str = "text: {text} label: {label}\n"
    multi_token: Literal["error", "first"] = "error"

    def __post_init__(self) -> None:
        words = list(self.words.values())
        if len(words) < 2 or len(set(words)) < len(words) or not all(word.strip() for word in words):
            raise ValueError(f"labels: two or more words that differ are needed, got {', '.join(map(repr, words))}")
        parts = self.template.split("{text}")
        if len(parts) != 2 or parts[1].count("{label}") != 1 or "{label}" in parts[0]:
            raise ValueError(f"template: {{text}} and after it {{label}} are needed, once each, got {self.template!r}")
        if not parts[1].partition("{label}")[0].strip():
            raise ValueError(
                f"template: there is no label prefix between {{text}} and {{label}} in {self.template!r}; the token "
                "before the label is where the answer is predicted"
            )
        if self.multi_token not in ("error", "first"):
            raise ValueError(f"multi_token: 'error' or 'first', got {self.multi_token!r}")

    @functools.cached_property
    def words(self) -> dict[str, str]:
        """The word of each label."""
        mapped = self.labels.items() if isinstance(self.labels, Mapping) else ((word, word) for word in self.labels)
        return {str(name): str(word) for name, word in mapped}

    def number(self, label: str) -> int:
        """The number of a label. Raises ValueError for one that is not known."""
        if label not in self.words:
            raise ValueError(f"examples: the label {label!r} is none of {', '.join(self.words)}")
        return list(self.words).index(label)

    def text(self, example: FewShotExample) -> str:
        """A prompt as text."""
        return "".join(piece for piece, _ in self._pieces(example))

    def label_ids(self, tokenizer: Any) -> list[int]:
        """The token with which each label goes on after the template's prefix.

        Raises ValueError for labels of several tokens, unless the first one counts, and for two that share a token.
        """
        example = FewShotExample((), "x", "")
        prompts = [[*self._pieces(example), self._label(label)] for label in self.words]
        tokens = SegmentTokens.from_segments(tokenizer, prompts, padding_side="right")
        found: dict[int, str] = {}
        for row, word in enumerate(self.words.values()):
            ((first, *more),) = self._positions(tokens, "label", row)
            if more and self.multi_token == "error":
                raise ValueError(
                    f"labels: {word!r} has {1 + len(more)} tokens, one is needed; take another word, or "
                    "multi_token='first'"
                )
            number = int(tokens.input_ids[row, first])
            if number in found:
                raise ValueError(f"labels: {found[number]!r} and {word!r} share their token, which tells none of them")
            found[number] = word
        return list(found)

    def build(
        self,
        examples: Sequence[FewShotExample],
        tokenizer: Any,
        *,
        append: Literal["right", "wrong"] | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> FewShotBatch:
        """Prompts in tokens, with the positions of their parts, found by character.

        Parameters
        ----------
        examples
            All with as many demonstrations.
        tokenizer
            A fast one, which says where its tokens are.
        append
            Puts the query's right label at the end, or the next one of all labels ("wrong").
        padding_side
            Positions are those of the padded batch.

        Returns
        -------
        FewShotBatch

        Raises
        ------
        ValueError
            For no examples, empty texts, unknown labels, unequal numbers of demonstrations, and a tokenizer that puts
            the end of the prefix and the label into one token.
        """
        if not examples:
            raise ValueError("examples: at least one is needed")
        k = len(examples[0].demonstrations)
        for number, example in enumerate(examples):
            if len(example.demonstrations) != k:
                raise ValueError(
                    f"examples: all need as many demonstrations, got {k} and, in example {number}, "
                    f"{len(example.demonstrations)}"
                )
            if not all(text.strip() for text in (example.query, *(text for text, _ in example.demonstrations))):
                raise ValueError(f"examples: example {number} has an empty text")
        ids = self.label_ids(tokenizer)
        targets = torch.tensor([self.number(example.label) for example in examples])
        names = list(self.words)
        shift = int(append == "wrong")
        after = [[] if append is None else [self._label(names[(int(t) + shift) % len(names)])] for t in targets]
        prompts = [[*self._pieces(example), *own] for example, own in zip(examples, after)]
        tokens = SegmentTokens.from_segments(tokenizer, prompts, padding_side=padding_side)
        forerunners = torch.tensor([[at[-1] for at in each] for each in self._grouped(tokens, "prefix")])
        texts = torch.tensor([each[-1][-1] for each in self._grouped(tokens, "text")])
        labels = [[at[0] for at in each] for each in self._grouped(tokens, "label")] if k or append else []
        found = torch.tensor(labels) if labels else forerunners[:, :0]
        wanted = forerunners if append else forerunners[:, :k]
        if not torch.equal(found, wanted + 1):
            row = int((found != wanted + 1).any(1).nonzero()[0])
            raise ValueError(
                f"template: in example {row} a label does not begin right after the prefix; the tokenizer joins the "
                "two, put a space or a sign between them"
            )
        self._check_ids(tokens, found, examples, targets, append, ids)
        return FewShotBatch(
            tokens=tokens,
            forerunners=forerunners[:, :k],
            labels=found[:, :k],
            text=texts,
            query=forerunners[:, k],
            appended=found[:, k] if append else None,
            owners=torch.tensor([[self.number(own) for _, own in e.demonstrations] for e in examples]).long(),
            targets=targets,
        )

    def _pieces(self, example: FewShotExample) -> list[tuple[str, str]]:
        """Pieces of a prompt, up to the query's forerunner."""
        before, _, rest = self.template.partition("{text}")
        between, _, after = rest.partition("{label}")
        prefix, found = between.rstrip(), []
        for text, label in example.demonstrations:
            found += [(before, "affix"), (text.strip(), "text"), (prefix, "prefix"), self._label(label)]
            found.append((after, "affix"))
        found += [(before, "affix"), (example.query.strip(), "text"), (prefix, "prefix")]
        return [(piece, role) for piece, role in found if piece]

    def _label(self, label: str) -> tuple[str, str]:
        between = self.template.partition("{text}")[2].partition("{label}")[0]
        self.number(label)
        return between[len(between.rstrip()) :] + self.words[label], "label"

    def _grouped(self, tokens: SegmentTokens, role: str) -> list[list[list[int]]]:
        """Of each prompt and each piece of a role, its positions."""
        return [list(self._positions(tokens, role, row)) for row in range(len(tokens.roles))]

    def _positions(self, tokens: SegmentTokens, role: str, row: int) -> Iterator[list[int]]:
        for number in (place for place, own in enumerate(tokens.roles[row]) if own == role):
            positions = torch.nonzero(tokens.segment[row] == number).flatten().tolist()
            if not positions:
                raise ValueError(f"template: in example {row} a {role} has no token of its own")
            yield positions

    def _check_ids(
        self,
        tokens: SegmentTokens,
        found: Tensor,
        examples: Sequence[FewShotExample],
        targets: Tensor,
        append: str | None,
        ids: Sequence[int],
    ) -> None:
        """The labels' tokens are those that are predicted."""
        shift = int(append == "wrong")
        for row, example in enumerate(examples):
            wanted = [self.number(label) for _, label in example.demonstrations]
            wanted += [(int(targets[row]) + shift) % len(ids)] if append else []
            actual = tokens.input_ids[row, found[row]].tolist()
            for number, token in zip(wanted, actual):
                if token != ids[number]:
                    word = list(self.words.values())[number]
                    raise ValueError(f"template: in example {row} the label {word!r} begins with another token")
