"""Syntax trees as labelled spans, their exact form in three rows of numbers and labels, and how alike two trees are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

EMPTY = "<empty>"
"""Label of what binarisation adds, and of tokens without a label of their own."""
SEPARATOR = "<sep>"
"""Between the labels of nodes that cover the same tokens."""
BAD_ROOT = "<bad-root>"
"""Label of a root that was predicted to be no node."""


class Constituent(NamedTuple):
    """A node of a tree: its label, and the tokens that it covers.

    Attributes
    ----------
    label
        Its kind.
    start, stop
        It covers the tokens [start, stop).
    """

    label: str
    start: int
    stop: int


@dataclass(frozen=True)
class SyntaxTree:
    """An ordered tree over tokens, as the spans of its nodes.

    Parameters
    ----------
    tokens
        The leaves.
    nodes
        (label, start, stop) of every inner node, the outer before the inner and the left before the right; of nodes
        that cover the same tokens the order says which is above.

    Raises
    ------
    ValueError
        For no tokens, spans that cross or are out of order, several tokens without a root, and labels that hold a
        reserved word ("<empty>", "<sep>").

    Examples
    --------
    >>> from subspan.probe import SyntaxTree
    >>> tree = SyntaxTree(("a", "+", "1"), (("sum", 0, 3), ("name", 0, 1), ("number", 2, 3)))
    >>> print(tree)
    (sum (name a) + (number 1))
    """

    # Plain tuples and lists are taken too: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    tokens: tuple[str, ...]
    nodes: tuple[Constituent, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "nodes", tuple(Constituent(*node) for node in self.nodes))
        count = len(self.tokens)
        if not count:
            raise ValueError("tokens: a tree has at least one")
        if count > 1 and (not self.nodes or self.nodes[0][1:] != (0, count)):
            raise ValueError(f"nodes: the first must be the root, over all {count} tokens")
        open_nodes = [(0, count)]
        for label, start, stop in self.nodes:
            if not label or EMPTY in label or SEPARATOR in label:
                raise ValueError(f"nodes: a label is a text without {EMPTY} and {SEPARATOR}, got {label!r}")
            while open_nodes and open_nodes[-1][1] <= start < stop:
                open_nodes.pop()
            outer = open_nodes[-1] if open_nodes else (0, 0)
            if not outer[0] <= start < stop <= outer[1]:
                raise ValueError(f"nodes: ({label!r}, {start}, {stop}) is empty, crosses another or is out of order")
            open_nodes.append((start, stop))

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def __str__(self) -> str:
        """In brackets."""
        before: list[list[str]] = [[] for _ in self.tokens]
        after = [0] * len(self.tokens)
        for label, start, stop in self.nodes:
            before[start].append(f"({label} ")
            after[stop - 1] += 1
        leaves = zip(before, self.tokens, after)
        return " ".join("".join(labels) + token + ")" * closing for labels, token, closing in leaves)


class TreeTuple(NamedTuple):
    """A tree of n tokens as three rows; see `tree_to_tuple`.

    Attributes
    ----------
    distances
        n - 1 heights of the lowest common node of neighbouring tokens, in the binary tree; only their order counts.
    labels
        n - 1 labels of that node.
    unary
        n labels of the tokens themselves.
    """

    distances: tuple[float, ...]
    labels: tuple[str, ...]
    unary: tuple[str, ...]


def tree_to_tuple(tree: SyntaxTree) -> TreeTuple:
    """The binary form of a tree as heights and labels between neighbouring tokens, and labels of tokens.

    Nodes over the same tokens become one whose label is joined by "<sep>"; over one token, the token's label. Of more
    than two children the first stands on the left, and the others under a node "<empty>" on the right, and so on.

    Parameters
    ----------
    tree
        Any.

    Returns
    -------
    TreeTuple, which `tuple_to_tree` turns back into the same tree.

    References
    ----------
    Hernández López et al. (ASE 2022), arXiv 2206.11719, after Shen et al. (ACL 2018).

    Examples
    --------
    >>> from subspan.probe import SyntaxTree, tree_to_tuple
    >>> tree = SyntaxTree(("a", "+", "1"), (("sum", 0, 3), ("name", 0, 1), ("number", 2, 3)))
    >>> tree_to_tuple(tree)
    TreeTuple(distances=(2, 1), labels=('sum', '<empty>'), unary=('name', '<empty>', 'number'))
    """
    count = len(tree)
    distances, labels, unary = [0] * (count - 1), [EMPTY] * (count - 1), [EMPTY] * count
    # What begins at a token: where the largest finished node there ends, and its height.
    stop_of, height_of = list(range(1, count + 1)), [0] * count
    for label, start, stop in reversed(_merged(tree.nodes)):
        if stop - start == 1:
            unary[start] = label
            continue
        children = [start]
        while stop_of[children[-1]] < stop:
            children.append(stop_of[children[-1]])
        height = height_of[children[-1]]
        for left, right in zip(children[-2::-1], children[:0:-1]):
            height = max(height_of[left], height) + 1
            distances[right - 1] = height
        labels[children[1] - 1] = label
        stop_of[start], height_of[start] = stop, height
    return TreeTuple(tuple(distances), tuple(labels), tuple(unary))


def _merged(nodes: Sequence[Constituent]) -> list[Constituent]:
    """Nodes over the same tokens as one, with joined labels."""
    found: list[Constituent] = []
    for node in nodes:
        if found and found[-1][1:] == node[1:]:
            found[-1] = found[-1]._replace(label=f"{found[-1].label}{SEPARATOR}{node.label}")
        else:
            found.append(node)
    return found


def tuple_to_tree(
    distances: Sequence[float], labels: Sequence[str], unary: Sequence[str], tokens: Sequence[str] | None = None
) -> SyntaxTree:
    """The tree of heights and labels: tokens are parted at the largest height, the first of equal ones, and so on.

    Parameters
    ----------
    distances, labels
        n - 1 numbers of any size, and labels; nodes "<empty>" are left out.
    unary
        n labels.
    tokens
        n; default: their numbers.

    Returns
    -------
    SyntaxTree; a root that would be "<empty>" is "<bad-root>".

    Raises
    ------
    ValueError
        For rows whose lengths do not fit, and distances that are not finite.

    Examples
    --------
    >>> from subspan.probe import tuple_to_tree
    >>> print(tuple_to_tree([2, 1], ["sum", "<empty>"], ["name", "<empty>", "number"], ["a", "+", "1"]))
    (sum (name a) + (number 1))
    """
    count = len(unary)
    if len(distances) != count - 1 or len(labels) != count - 1:
        raise ValueError(
            f"distances, labels: {count - 1} of each belong to {count} tokens, got {len(distances)} and {len(labels)}"
        )
    heights = np.asarray(distances, dtype=np.float64)
    if not np.isfinite(heights).all():
        raise ValueError("distances: contain NaN or infinity")
    nodes: list[Constituent] = []
    waiting = [(0, count)]
    while waiting:
        start, stop = waiting.pop()
        if stop - start == 1:
            label = unary[start]
        else:
            split = start + int(heights[start : stop - 1].argmax())
            label = labels[split]
            waiting += [(split + 1, stop), (start, split + 1)]
            if label == EMPTY and (start, stop) == (0, count):
                label = BAD_ROOT
        if label != EMPTY:
            nodes += [Constituent(part, start, stop) for part in label.split(SEPARATOR)]
    return SyntaxTree(tuple(map(str, range(count))) if tokens is None else tuple(tokens), tuple(nodes))


class TreeScore(NamedTuple):
    """How much of a tree was found; see `tree_score`.

    Attributes
    ----------
    precision, recall
        Share of the predicted nodes that are true, and of the true nodes that are predicted.
    f1
        Their harmonic mean.
    """

    precision: float
    recall: float
    f1: float


def tree_score(
    true: SyntaxTree, predicted: SyntaxTree, *, duplicates: Literal["once", "published"] = "once"
) -> TreeScore:
    """Precision, recall and F1 of the labelled spans of a predicted tree.

    Parameters
    ----------
    true, predicted
        Trees over the same tokens.
    duplicates
        Of equal spans with equal labels (a call inside of nothing but a call): each true one counts "once"; the
        published code counts every predicted one that is among the true, so that a recall may exceed 1.

    Returns
    -------
    TreeScore; 0 where one of the trees has no nodes and the other has.

    Raises
    ------
    ValueError
        For trees of different lengths.

    Examples
    --------
    >>> from subspan.probe import SyntaxTree, tree_score
    >>> true = SyntaxTree(("f", "(", ")"), (("call", 0, 3), ("name", 0, 1), ("arguments", 1, 3)))
    >>> tree_score(true, SyntaxTree(("f", "(", ")"), (("call", 0, 3), ("name", 2, 3)))).f1
    0.4
    """
    if len(true) != len(predicted):
        raise ValueError(f"predicted: a tree over {len(true)} tokens is needed, got {len(predicted)}")
    real, guessed = Counter(true.nodes), Counter(predicted.nodes)
    if not real or not guessed:
        return TreeScore(*[float(not real and not guessed)] * 3)
    found = sum(count if duplicates == "published" else min(count, real[node]) for node, count in guessed.items()
                if node in real)  # fmt: skip
    precision, recall = found / guessed.total(), found / real.total()
    return TreeScore(precision, recall, 2 * precision * recall / (precision + recall) if found else 0.0)


def label_recall(pairs: Iterable[tuple[SyntaxTree, SyntaxTree]]) -> dict[str, tuple[float, int]]:
    """Of each label, the share of its true nodes that were found, and their number, the commonest first.

    Parameters
    ----------
    pairs
        True and predicted trees.

    Returns
    -------
    dict from label to (recall, count).

    Examples
    --------
    >>> from subspan.probe import SyntaxTree, label_recall
    >>> true = SyntaxTree(("f", "(", ")"), (("call", 0, 3), ("name", 0, 1), ("arguments", 1, 3)))
    >>> label_recall([(true, SyntaxTree(("f", "(", ")"), (("call", 0, 3),)))])
    {'call': (1.0, 1), 'name': (0.0, 1), 'arguments': (0.0, 1)}
    """
    found: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for true, predicted in pairs:
        real, guessed = Counter(true.nodes), Counter(predicted.nodes)
        for node, count in real.items():
            total[node.label] += count
            found[node.label] += min(count, guessed[node])
    return {label: (found[label] / count, count) for label, count in total.most_common()}


def right_branching(trees: Sequence[SyntaxTree], lengths: Iterable[int]) -> list[SyntaxTree]:
    """Trees that know nothing of their tokens: right-branching, with the commonest labels of given trees.

    Parameters
    ----------
    trees
        To take labels from: of the root, between tokens and of tokens.
    lengths
        Numbers of tokens.

    Returns
    -------
    list of SyntaxTree, one a length.

    Raises
    ------
    ValueError
        For no trees.

    Examples
    --------
    >>> from subspan.probe import SyntaxTree, right_branching
    >>> tree = SyntaxTree(("f", "(", ")"), (("call", 0, 3), ("name", 0, 1), ("arguments", 1, 3)))
    >>> print(right_branching([tree], [4])[0])
    (call 0 (call 1 (call 2 3)))
    """
    if not trees:
        raise ValueError("trees: at least one is needed")
    tuples = [tree_to_tuple(tree) for tree in trees]
    roots = Counter(each.labels[int(np.argmax(each.distances))] for each in tuples if each.labels)
    inner = Counter(label for each in tuples for label in each.labels)
    own = Counter(label for each in tuples for label in each.unary).most_common(1)[0][0]
    root, label = (counts.most_common(1)[0][0] if counts else EMPTY for counts in (roots, inner))
    return [
        tuple_to_tree(range(count - 1, 0, -1), ([root] + [label] * count)[: count - 1], [own] * count)
        for count in lengths
    ]


def permuted_trees(trees: Iterable[SyntaxTree], generator: np.random.Generator) -> list[SyntaxTree]:
    """Trees with the same heights and labels in another order: what a probe must not be able to learn from states.

    Parameters
    ----------
    trees
        Any.
    generator
        Of the orders.

    Returns
    -------
    list of SyntaxTree over the same tokens.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.probe import SyntaxTree, permuted_trees
    >>> tree = SyntaxTree(("f", "(", ")"), (("call", 0, 3), ("name", 0, 1), ("arguments", 1, 3)))
    >>> print(permuted_trees([tree], np.random.default_rng(0))[0])
    (call f (arguments (name () )))
    """
    found = []
    for tree in trees:
        distances, labels, unary = tree_to_tuple(tree)
        between, own = generator.permutation(len(labels)), generator.permutation(len(unary))
        rows = [distances[i] for i in between], [labels[i] for i in between], [unary[i] for i in own]
        found.append(tuple_to_tree(*rows, tree.tokens))
    return found
