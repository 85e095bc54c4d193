"""AST-Probe: the subspace of a model's states in which the syntax tree of code can be read (arXiv 2206.11719)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.utils import check_random_state
from torch import Tensor

from subspan.base.parameters import Count, NonNegative, Positive, Seed, check_parameters
from subspan.geometry import Subspace

from .structural import Constraint, ProbeReading, StructuralProbe, mean_cross_entropy, pairwise_rank_loss
from .syntax_trees import SyntaxTree, TreeTuple, tree_score, tree_to_tuple, tuple_to_tree
from .tree_states import TokenStates

# Of torch's plateau schedule: what counts as better.
_BETTER = 1 - 1e-4


class LayerScore(NamedTuple):
    """Means over snippets in one layer; see `ASTProbe.layer_scores`.

    Attributes
    ----------
    layer
        Its number.
    precision, recall, f1
        As in `TreeScore`.
    """

    layer: int
    precision: float
    recall: float
    f1: float


class Epoch(NamedTuple):
    """Losses of an epoch by layer; see `ASTProbe`.

    Attributes
    ----------
    training
        Means over the epoch, with the penalty.
    validation
        After the epoch, without it.
    """

    training: tuple[float, ...]
    validation: tuple[float, ...]


@dataclass(eq=False, repr=False)
class ASTProbe:
    """Finds an orthogonal projection in which syntax trees can be read from states, in one layer or many at once.

    In z = P'h, |z' - z|² between neighbours has the order of the heights in the tree, z' - z tells the label of their
    lowest common node, and z the label of a token. Layers are trained together by one optimizer, each with its own
    rate: it falls to a tenth after an epoch without a gain on the validation part, and the best epoch is kept. States
    are divided by one number a layer, the root mean square of differences between neighbours.

    Parameters
    ----------
    rank
        Dimensions of the subspace; of the one given, where there is one.
    constraint
        "soft": penalty `orthogonality` · |P'P - I|²; "stiefel": orthonormal at every step.
    orthogonality
        Weight of the penalty.
    learning_rate
        Of Adam.
    batch_size
        Snippets.
    max_epochs
        At most so many.
    patience
        Epochs without a gain after which a layer is left as it is.
    subspace
        Of this one, which is not trained, only the labels are learnt: transfer, or a random one as control.
    random_state
        Seed of the start and the order.

    Attributes
    ----------
    subspace_ : Subspace
        Of the layer with the highest F1 on the validation part.
    subspaces_ : Subspace
        Of all layers, a batch.
    layer_ : int
        Number of that layer.
    layers_ : tuple of int
    labels_, unary_labels_ : tuple of str
        Between tokens, of tokens.
    orthogonality_defect_ : (l,)
        |P'P - I| of each layer.
    scale_ : (l,)
        What states are divided by.
    probe_ : StructuralProbe
    history_ : list of Epoch

    Raises
    ------
    ValueError
        In `fit`, for values out of range, numbers of tokens that differ, states that are not finite, and trees of one
        token alone.

    References
    ----------
    Hernández López et al., AST-Probe (ASE 2022), arXiv 2206.11719.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import ASTProbe, code_trees
    >>> sources = [f"{a} = {b}({c})" for a in "abcd" for b in "efgh" for c in "ijkl"]
    >>> trees = code_trees(sources, parser="ast").trees
    >>> states = [torch.nn.functional.one_hot(torch.arange(6), 8).float() for _ in trees]
    >>> probe = ASTProbe(rank=4, learning_rate=0.02, batch_size=8, random_state=0).fit(states, trees)
    >>> probe.score(states, trees), probe.subspace_.dim
    (1.0, 4)
    >>> print(probe.predict(states[:1])[0])
    (Module (Assign (Name 0) 1 (Call (Name 2) 3 (Name 4) 5)))
    """

    # `fit` checks the values: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    rank: Count = 128
    constraint: Constraint = "soft"
    orthogonality: NonNegative = 5.0
    learning_rate: Positive = 1e-3
    batch_size: Count = 32
    max_epochs: Count = 20
    patience: Count = 5
    subspace: Subspace | None = None
    random_state: Seed = None

    def fit(
        self,
        features: TokenStates | Sequence[Tensor],
        trees: Sequence[SyntaxTree],
        validation: tuple[TokenStates | Sequence[Tensor], Sequence[SyntaxTree]] | None = None,
    ) -> ASTProbe:
        """Learn from states and trees.

        Parameters
        ----------
        features
            `TokenStates`, or of each tree states (t, d), or (layers, t, d).
        trees
            One a snippet.
        validation
            The same, not learnt from. Default: a tenth of the snippets, drawn at random.
        """
        check_parameters(self)
        states, trees = _checked(features, trees)
        random = check_random_state(self.random_state)
        if validation is None:
            order = random.permutation(len(trees)).tolist()
            if len(order) < 2:
                raise ValueError("features: two snippets are needed, one of them for validation")
            cut = max(1, len(order) // 10)
            held = _chosen(states, order[:cut]), [trees[i] for i in order[:cut]]
            states, trees = _chosen(states, order[cut:]), [trees[i] for i in order[cut:]]
        else:
            held = _checked(*validation)
        tuples = [tree_to_tuple(tree) for tree in trees]
        self.labels_ = _vocabulary(label for each in tuples for label in each.labels)
        self.unary_labels_ = _vocabulary(label for each in tuples for label in each.unary)
        if not self.labels_:
            raise ValueError("trees: of one token each; there is nothing between tokens to learn")
        self.layers_ = states.layers
        self.scale_ = _step_size(states)
        self._train(self._part(states, tuples), self._part(held[0], [tree_to_tuple(tree) for tree in held[1]]), random)
        self.subspaces_ = self.probe_.subspaces()
        gram = self.probe_.matrix().detach()
        defect = gram.mT @ gram - torch.eye(gram.shape[-1])
        self.orthogonality_defect_ = torch.linalg.matrix_norm(defect).numpy()
        best = int(np.argmax([score.f1 for score in self.layer_scores(*held)]))
        self.layer_, self.subspace_ = self.layers_[best], self.subspaces_[best]
        return self

    def predict(
        self,
        features: TokenStates | Sequence[Tensor],
        *,
        layer: int | None = None,
        tokens: Sequence[Sequence[str]] | None = None,
    ) -> list[SyntaxTree]:
        """The tree of each snippet, read from one layer (default: the best one); its tokens are numbers if not given.

        Raises ValueError for a layer that was not learnt, and states of other widths or layers.
        """
        states = self._own(features)
        number = self.layer_ if layer is None else layer
        if number not in self.layers_:
            raise ValueError(f"layer: of {', '.join(map(str, self.layers_))}, got {layer}")
        (trees,) = self._decoded(states, [self.layers_.index(number)])
        if tokens is None:
            return trees
        if len(tokens) != len(trees):
            raise ValueError(f"tokens: of {len(trees)} snippets are needed, got {len(tokens)}")
        return [SyntaxTree(tuple(own), tree.nodes) for own, tree in zip(tokens, trees)]

    def score(
        self, features: TokenStates | Sequence[Tensor], trees: Sequence[SyntaxTree], *, layer: int | None = None
    ) -> float:
        """Mean F1 over snippets, of one layer (default: the best one)."""
        predicted = self.predict(features, layer=layer)
        if len(predicted) != len(trees):
            raise ValueError(f"trees: {len(predicted)} are needed, one a snippet, got {len(trees)}")
        return float(np.mean([tree_score(true, guess).f1 for true, guess in zip(trees, predicted)]))

    def layer_scores(self, features: TokenStates | Sequence[Tensor], trees: Sequence[SyntaxTree]) -> list[LayerScore]:
        """Mean precision, recall and F1 over snippets, of every layer."""
        means = self.snippet_scores(features, trees).mean(1)
        return [LayerScore(layer, *map(float, row)) for layer, row in zip(self.layers_, means)]

    def snippet_scores(
        self, features: TokenStates | Sequence[Tensor], trees: Sequence[SyntaxTree]
    ) -> Float[np.ndarray, "l n 3"]:
        """Precision, recall and F1 of every snippet in every layer, for intervals and paired tests."""
        states, trees = _checked(self._own(features), trees)
        every = self._decoded(states, range(len(self.layers_)))
        return np.array([[tree_score(true, guess) for true, guess in zip(trees, found)] for found in every])

    # ------------------------------------------------------------------ training

    def _train(self, part: _Part, held: _Part, random: np.random.RandomState) -> None:
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        layers, _, d = part.states.shape
        self.probe_ = probe = StructuralProbe(
            d,
            self.rank if self.subspace is None else self.subspace.dim,
            labels=len(self.labels_),
            unary=len(self.unary_labels_),
            layers=layers,
            constraint=self.constraint,
            subspace=self.subspace,
            generator=generator,
        )
        parameters = list(probe.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        rate, waited = torch.ones(layers), torch.zeros(layers)
        lowest, plateau = (torch.full((layers,), torch.inf) for _ in range(2))
        best = [parameter.detach().clone() for parameter in parameters]
        self.history_ = []
        for _ in range(self.max_epochs):
            total = torch.zeros(layers)
            for batch in part.batches(self.batch_size, torch.randperm(len(part), generator=generator)):
                loss = _losses(probe, batch) + self.orthogonality * probe.penalty()
                optimizer.zero_grad()
                loss.sum().backward()
                before = [parameter.detach().clone() for parameter in parameters]
                optimizer.step()
                with torch.no_grad():
                    # A step of Adam is as long as its rate, so a share of it is a step at a lower rate.
                    for parameter, old in zip(parameters, before):
                        parameter.copy_(old.lerp(parameter, rate.view(-1, 1, 1)))
                total += loss.detach() * len(batch)
            with torch.no_grad():
                batches = held.batches(self.batch_size, torch.arange(len(held)))
                found = torch.stack([_losses(probe, batch) * len(batch) for batch in batches]).sum(0) / len(held)
            if not bool(torch.isfinite(found).all()):
                raise ValueError("learning_rate: the loss is not finite; take a lower one")
            self.history_.append(Epoch(tuple((total / len(part)).tolist()), tuple(found.tolist())))
            gained = (found < lowest) & (rate > 0)
            with torch.no_grad():
                for parameter, kept in zip(parameters, best):
                    kept[gained] = parameter[gained]
            lowest = torch.where(gained, found, lowest)
            waited = torch.where(gained, 0, waited + 1)
            rate = torch.where(found < plateau * _BETTER, rate, rate / 10)
            plateau = torch.minimum(plateau, found)
            rate[waited >= self.patience] = 0
            if not bool(rate.any()):
                break
        with torch.no_grad():
            for parameter, kept in zip(parameters, best):
                parameter.copy_(kept)
        probe.requires_grad_(False)

    # ------------------------------------------------------------------ reading

    def _part(self, states: TokenStates, tuples: Sequence[TreeTuple]) -> _Part:
        between = {label: number for number, label in enumerate(self.labels_)}
        own = {label: number for number, label in enumerate(self.unary_labels_)}
        return _Part(
            states.states,
            states.lengths,
            self.scale_,
            torch.tensor([height for each in tuples for height in each.distances]),
            torch.tensor([between.get(label, -1) for each in tuples for label in each.labels], dtype=torch.long),
            torch.tensor([own.get(label, -1) for each in tuples for label in each.unary], dtype=torch.long),
        )

    def _own(self, features: TokenStates | Sequence[Tensor]) -> TokenStates:
        states = _states(features)
        if not hasattr(self, "probe_"):
            raise ValueError("fit: the probe has learnt nothing yet; call fit first")
        expected = (len(self.layers_), self.probe_.projection.shape[1])
        if (len(states.states), states.states.shape[2]) != expected:
            raise ValueError(f"features: {expected[0]} layers of {expected[1]} columns, got {states.states.shape[::2]}")
        return states

    @torch.no_grad()
    def _decoded(self, states: TokenStates, places: Sequence[int]) -> list[list[SyntaxTree]]:
        """Trees of every snippet, by layer."""
        nothing = torch.zeros(0)
        part = _Part(states.states, states.lengths, self.scale_, nothing, nothing, nothing)
        trees: list[list[SyntaxTree]] = [[] for _ in places]
        for batch in part.batches(self.batch_size, torch.arange(len(part))):
            reading = self.probe_(batch.states, batch.neighbours)
            lengths = batch.lengths.tolist()
            steps = [length - 1 for length in lengths]
            rows = (
                reading.distances.split(steps, 1),
                reading.labels.argmax(-1).split(steps, 1),
                reading.unary.argmax(-1).split(lengths, 1),
            )
            for distances, labels, unary in zip(*rows):
                for found, place in zip(trees, places):
                    found.append(
                        tuple_to_tree(
                            distances[place].tolist(),
                            [self.labels_[number] for number in labels[place].tolist()],
                            [self.unary_labels_[number] for number in unary[place].tolist()],
                        )
                    )
        return trees


class _Batch(NamedTuple):
    """Rows of some snippets, one after another, and what is true of them."""

    states: Float[Tensor, "l n d"]
    lengths: Int[Tensor, " b"]
    neighbours: Int[Tensor, " m"]
    heights: Tensor
    labels: Tensor
    unary: Tensor

    def __len__(self) -> int:
        return len(self.lengths)


class _Part:
    """Snippets with their targets, which are empty where there are none."""

    def __init__(
        self, states: Tensor, lengths: Tensor, scale: np.ndarray, heights: Tensor, labels: Tensor, unary: Tensor
    ) -> None:
        self.states, self.lengths = states, lengths
        self.scale = torch.from_numpy(scale).view(-1, 1, 1)
        self.heights, self.labels, self.unary = heights, labels, unary
        self.starts = lengths.cumsum(0) - lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def batches(self, size: int, order: Tensor) -> Iterator[_Batch]:
        for chosen in order.split(size):
            lengths = self.lengths[chosen]
            rows = _ranges(self.starts[chosen], lengths)
            # Before a snippet there is one gap less for each snippet before it.
            gaps = _ranges(self.starts[chosen] - chosen, lengths - 1)
            last = lengths.cumsum(0) - 1
            neighbours = torch.ones(len(rows), dtype=torch.bool)
            neighbours[last] = False
            targets = (self.heights, self.labels, self.unary)
            if len(self.unary):
                targets = (self.heights[gaps], self.labels[gaps], self.unary[rows])
            yield _Batch(self.states[:, rows].float() / self.scale, lengths, neighbours.nonzero().flatten(), *targets)


def _ranges(starts: Int[Tensor, " n"], lengths: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
    """The numbers from each start on, as many as the length, one after another."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def _losses(probe: StructuralProbe, batch: _Batch) -> Float[Tensor, " l"]:
    """The loss of each layer without the penalty; the order of distances is no part of it where P is given."""
    reading: ProbeReading = probe(batch.states, batch.neighbours)
    total = mean_cross_entropy(reading.labels, batch.labels) + mean_cross_entropy(reading.unary, batch.unary)
    if probe.frozen:
        return total
    gaps = batch.lengths - 1
    mask: Bool[Tensor, "b t"] = torch.arange(int(gaps.max())) < gaps.unsqueeze(1)
    predicted = reading.distances.new_zeros(len(reading.distances), *mask.shape)
    predicted[:, mask] = reading.distances
    true = torch.zeros(mask.shape, dtype=batch.heights.dtype)
    true[mask] = batch.heights
    return total + pairwise_rank_loss(predicted, true, mask)


def _vocabulary(labels: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(labels))


def _step_size(states: TokenStates) -> Float[np.ndarray, " l"]:
    """Root mean square of the entries of differences between neighbouring tokens, by layer."""
    inside = torch.ones(states.states.shape[1], dtype=torch.bool)
    inside[states.lengths.cumsum(0) - 1] = False
    sizes = torch.stack([layer.float().diff(dim=0)[inside[:-1]].square().mean().sqrt() for layer in states.states])
    return torch.where(sizes > 0, sizes, 1).numpy()


def _chosen(states: TokenStates, order: Sequence[int]) -> TokenStates:
    """Some of the snippets, in an order."""
    chosen = torch.as_tensor(order)
    starts = (states.lengths.cumsum(0) - states.lengths)[chosen]
    rows = _ranges(starts, states.lengths[chosen])
    kept = tuple(states.kept[i] for i in order)
    return TokenStates(states.states[:, rows], states.lengths[chosen], states.layers, kept)


def _states(features: TokenStates | Sequence[Tensor]) -> TokenStates:
    if not isinstance(features, TokenStates):
        every = [each.unsqueeze(0) if each.ndim == 2 else each for each in features]
        if not every:
            raise ValueError("features: at least one snippet is needed")
        for number, each in enumerate(every):
            if each.ndim != 3 or each.shape[::2] != every[0].shape[::2] or not each.shape[1]:
                raise ValueError(
                    f"features: snippet {number} has the shape {tuple(each.shape)}, (layers, tokens, d) with "
                    f"{tuple(every[0].shape[::2])} layers and columns is needed"
                )
        lengths = torch.tensor([each.shape[1] for each in every])
        numbers = tuple(range(len(every[0]))), tuple(range(len(every)))
        features = TokenStates(torch.cat(every, 1), lengths, *numbers)
    if not bool(features.states.isfinite().all()):
        bad = next(number for number, each in enumerate(features) if not bool(each.isfinite().all()))
        raise ValueError(f"features: snippet {bad} contains NaN or infinity")
    return features


def _checked(
    features: TokenStates | Sequence[Tensor], trees: Sequence[SyntaxTree]
) -> tuple[TokenStates, list[SyntaxTree]]:
    """States and their trees. Raises ValueError where they do not fit."""
    states, listed = _states(features), list(trees)
    if len(states) != len(listed):
        raise ValueError(f"trees: {len(states)} are needed, one a snippet, got {len(listed)}")
    for number, (length, tree) in enumerate(zip(states.lengths.tolist(), listed)):
        if length != len(tree):
            raise ValueError(f"features: {len(tree)} rows are needed for tree {number}, one a token, got {length}")
    return states, listed
