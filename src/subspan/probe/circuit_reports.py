"""How far each step of the in-context circuit is there: encoding, copying to labels, retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from subspan.base.parameters import Seed
from subspan.measures import knn_overlap, paired_bootstrap

from .circuit_reading import CircuitReading
from .retrieval_subspaces import ClassCentroids

THRESHOLD = 5.0
"""Times 1 / (tokens of the prompt): attention above it counts a head as present (Cho et al., 2025)."""


@dataclass(frozen=True)
class EncodeReport:
    """Step 1, by role and layer; see `encode_report`.

    Attributes
    ----------
    roles
        Of the rows of all arrays.
    alignment
        (roles, layers + 1, n): share of each prompt's neighbours that it has in the reference, too.
    unrelated
        The same with a reference that has nothing to do with the prompts, mean over prompts; NaN without one.
    within_class
        The same with the reference's rows exchanged inside each class: what the label alone gives.
    chance
        Of all three: neighbours / (n - 1).
    centroid_accuracy
        Share of prompts whose nearest class mean, of other prompts, is their own class's.
    class_chance
        Share of the commonest class.
    """

    roles: tuple[str, ...]
    alignment: Float[Tensor, "r l1 n"]
    unrelated: Float[Tensor, "r l1"]
    within_class: Float[Tensor, "r l1"]
    chance: float
    centroid_accuracy: Float[Tensor, "r l1"]
    class_chance: float

    def records(self) -> list[dict[str, Any]]:
        """A row a role and layer, for `pandas.DataFrame`."""
        return [
            {
                "layer": layer,
                "role": role,
                "ka": float(self.alignment[i, layer].mean()),
                "ka_std": float(self.alignment[i, layer].std()),
                "ka_chance": self.chance,
                "ka_unrelated": float(self.unrelated[i, layer]),
                "ka_within_class": float(self.within_class[i, layer]),
                "centroid_acc": float(self.centroid_accuracy[i, layer]),
                "chance": self.class_chance,
            }
            for i, role in enumerate(self.roles)
            for layer in range(self.alignment.shape[1])
        ]


def encode_report(
    reading: CircuitReading,
    reference: Any,
    calibration: CircuitReading,
    *,
    unrelated: Any = None,
    neighbours: int = 64,
    random_state: Seed = 0,
) -> EncodeReport:
    """How far states hold what the query says: agreement of neighbours with a text encoder, and class means.

    Parameters
    ----------
    reading
        n prompts.
    reference
        (n, d'): the queries' texts as another encoder sees them.
    calibration
        Other prompts of the same kind: class means are theirs.
    unrelated
        (n, d''): rows that have nothing to do with the prompts, a control.
    neighbours
        Of each row, by cosine; itself is none of them.
    random_state
        Seed of the exchange inside classes.

    Returns
    -------
    EncodeReport

    Raises
    ------
    ValueError
        For as many neighbours as prompts, other numbers of rows, and calibration prompts of one class.

    References
    ----------
    Cho et al. (ICLR 2025), arXiv 2410.04468; Huh et al. (2024), arXiv 2405.07987.

    Examples
    --------
    >>> from subspan.probe import encode_report
    >>> rows = SentenceEncoder(*load_sentence_encoder()).encode(queries)  # doctest: +SKIP
    >>> report = encode_report(circuit.read(examples), rows, circuit.read(others))  # doctest: +SKIP
    >>> pandas.DataFrame(report.records())  # doctest: +SKIP
    """
    n = len(reading)
    if not 1 <= neighbours < n:
        raise ValueError(f"neighbours: from 1 to {n - 1} for {n} prompts, got {neighbours}")
    rows = torch.as_tensor(np.asarray(reference))
    random = np.random.default_rng(random_state if isinstance(random_state, int) else None)
    order = torch.arange(n)
    for number in reading.targets.unique():
        own = (reading.targets == number).nonzero().flatten()
        order[own] = own[torch.from_numpy(random.permutation(len(own)))]
    found, other, within = [], [], []
    for states in reading.states:
        found.append(torch.stack([knn_overlap(layer, rows, neighbours) for layer in states]))
        within.append(torch.stack([knn_overlap(layer, rows[order], neighbours).mean() for layer in states]))
        if unrelated is not None:
            far = torch.as_tensor(np.asarray(unrelated))
            other.append(torch.stack([knn_overlap(layer, far, neighbours).mean() for layer in states]))
    expected = reading.targets.unique().tolist()
    accuracy = [
        ClassCentroids.fit(calibration.role(role), calibration.targets, expected).accuracy(own, reading.targets)
        for role, own in zip(reading.roles, reading.states)
    ]
    alignment = torch.stack(found)
    return EncodeReport(
        roles=reading.roles,
        alignment=alignment,
        unrelated=torch.stack(other) if other else torch.full(alignment.shape[:2], torch.nan),
        within_class=torch.stack(within),
        chance=neighbours / (n - 1),
        centroid_accuracy=torch.stack(accuracy),
        class_chance=float(torch.bincount(reading.targets).max()) / n,
    )


def position_bias(
    states: Mapping[int, Float[Tensor, "l1 n d"]],
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """How much a query's state depends on the number of demonstrations before it.

    Parameters
    ----------
    states
        By the number of demonstrations, states of the same n queries in the same order.

    Returns
    -------
    For every two numbers the mean cosine of the same query, and that of different ones, by layer: close together where
    the number of demonstrations counts more than the query.

    Raises
    ------
    ValueError
        For states of other shapes.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import position_bias
    >>> states = torch.eye(3)[None]
    >>> same, different = position_bias({0: states, 4: 2 * states})[0, 4]
    >>> same.tolist(), different.tolist()
    ([1.0], [0.0])
    """
    shapes = {tuple(each.shape) for each in states.values()}
    if len(shapes) != 1 or len(states) < 2 or next(iter(shapes))[1] < 2:
        raise ValueError(f"states: two or more numbers of demonstrations of the same queries, got shapes {shapes}")
    unit = {k: functional.normalize(each.double(), dim=-1) for k, each in states.items()}
    found, numbers = {}, sorted(unit)
    for place, first in enumerate(numbers):
        for second in numbers[place + 1 :]:
            one, two = unit[first], unit[second]
            same = (one * two).sum(-1)
            n = same.shape[1]
            every = (one.sum(1) * two.sum(1)).sum(-1)
            found[first, second] = (same.mean(1), (every - same.sum(1)) / (n * (n - 1)))
    return found


@dataclass(frozen=True)
class MergeReport:
    """Step 2, by layer and head; see `merge_report`.

    Attributes
    ----------
    counts, wrong_counts, neighbour_counts
        (layers, heads): share of prompts in which the head looks from the query's label back to its forerunner; from a
        wrong label; and from any token to the one before it.
    magnitude, wrong_magnitude
        (layers,): mean over prompts of the largest weight of the layer.
    alignment
        (layers, n): share of neighbours that the state of the label after a block has in common with that of the
        forerunner before it.
    chance
        Of it.
    """

    counts: Float[Tensor, "l h"]
    wrong_counts: Float[Tensor, "l h"]
    neighbour_counts: Float[Tensor, "l h"]
    magnitude: Float[Tensor, " l"]
    wrong_magnitude: Float[Tensor, " l"]
    alignment: Float[Tensor, "l n"]
    chance: float

    def heads(self, share: float = 0.5) -> list[tuple[int, int]]:
        """Copy heads: those present in at least a share of prompts, most present first."""
        return _ranked(self.counts, share)

    def records(self) -> list[dict[str, Any]]:
        """A row a head, for `pandas.DataFrame`."""
        return [
            {
                "layer": layer,
                "head": head,
                "count_right": float(self.counts[layer, head]),
                "count_wrong": float(self.wrong_counts[layer, head]),
                "count_any_token": float(self.neighbour_counts[layer, head]),
                "magnitude": float(self.magnitude[layer]),
            }
            for layer, head in np.ndindex(*self.counts.shape)
        ]


def merge_report(
    reading: CircuitReading,
    wrong: CircuitReading | None = None,
    *,
    neighbours: int = 64,
    threshold: float = THRESHOLD,
) -> MergeReport:
    """Which heads copy from the forerunner to the label after it, and whether they ask which label it is.

    Parameters
    ----------
    reading
        Of prompts with the right label after the query.
    wrong
        Of the same prompts with a wrong one; without it its numbers are NaN.
    neighbours
        For the alignment of states.
    threshold
        Over the number of tokens: the attention from which a head counts.

    Returns
    -------
    MergeReport

    Raises
    ------
    ValueError
        For a reading without labels after the query, and as many neighbours as prompts.

    References
    ----------
    Cho et al. (ICLR 2025), arXiv 2410.04468.

    Examples
    --------
    >>> from subspan.probe import merge_report
    >>> merge_report(circuit.read(examples), circuit.read(examples, append="wrong")).heads()  # doctest: +SKIP
    [(11, 5), (14, 2), (17, 8)]
    """
    if reading.copying is None or (wrong is not None and wrong.copying is None):
        raise ValueError("reading: needs the label after the query; read with append='right' (and 'wrong')")
    if not 1 <= neighbours < len(reading):
        raise ValueError(f"neighbours: from 1 to {len(reading) - 1} prompts, got {neighbours}")
    bar = threshold / reading.lengths.double()[:, None, None]
    missing = torch.full(reading.copying.shape[1:], torch.nan, dtype=torch.float64)
    before, after = reading.role("forerunner")[:-1], reading.role("label")[1:]
    return MergeReport(
        counts=(reading.copying > bar).double().mean(0),
        wrong_counts=missing if wrong is None else _present(wrong.copying, wrong, threshold),
        neighbour_counts=(reading.neighbours > bar).double().mean(0),
        magnitude=reading.copying.amax(2).double().mean(0),
        wrong_magnitude=missing[:, 0] if wrong is None or wrong.copying is None else wrong.copying.amax(2).mean(0),
        alignment=torch.stack([knn_overlap(*pair, neighbours) for pair in zip(before, after)]),
        chance=neighbours / (len(reading) - 1),
    )


def _present(weights: Tensor | None, reading: CircuitReading, threshold: float) -> Tensor:
    assert weights is not None
    return (weights > threshold / reading.lengths.double()[:, None, None]).double().mean(0)


@dataclass(frozen=True)
class RetrievalReport:
    """Step 3, by layer and head; see `retrieval_report`.

    Attributes
    ----------
    induction
        (layers, heads): share of prompts in which the query's forerunner attends to the demonstrations' labels.
    correct_induction
        The same, weights of wrong labels taken off.
    assignment
        (n, layers, heads): share of that attention on the right label.
    average
        (n, layers): of the mean over heads.
    similarity
        (n, layers): the same of cosines between whole states at the forerunners.
    chance
        Mean share of demonstrations that have the query's label.
    """

    induction: Float[Tensor, "l h"]
    correct_induction: Float[Tensor, "l h"]
    assignment: Float[Tensor, "n l h"]
    average: Float[Tensor, "n l"]
    similarity: Float[Tensor, "n l"]
    chance: float

    def heads(self, share: float = 0.5) -> list[tuple[int, int]]:
        """Induction heads: those present with the right label in at least a share of prompts, most present first."""
        return _ranked(self.correct_induction, share)

    def best(self, count: int = 1) -> list[tuple[int, int]]:
        """Heads that assign the right label best, among those present in at least half of the prompts (or all)."""
        quality = self.assignment.mean(0)
        present = self.induction >= 0.5
        quality = torch.where(present, quality, -1.0) if bool(present.any()) else quality
        return _ranked(quality, -2.0)[:count]

    def gain(self, layer: int, head: int) -> tuple[float, float, float]:
        """By how much a head assigns labels better than the mean over its layer's heads, with its 95 % interval."""
        return paired_bootstrap(self.assignment[:, layer, head], self.average[:, layer])

    def records(self) -> list[dict[str, Any]]:
        """A row a head, for `pandas.DataFrame`."""
        return [
            {
                "layer": layer,
                "head": head,
                "induction": float(self.induction[layer, head]),
                "correct_induction": float(self.correct_induction[layer, head]),
                "assignment": float(self.assignment[:, layer, head].mean()),
                "head_average": float(self.average[:, layer].mean()),
                "similarity": float(self.similarity[:, layer].mean()),
                "chance": self.chance,
            }
            for layer, head in np.ndindex(*self.induction.shape)
        ]


def retrieval_report(reading: CircuitReading, *, threshold: float = THRESHOLD) -> RetrievalReport:
    """Which heads look from where the answer is predicted to the demonstrations' labels, and to the right ones.

    Parameters
    ----------
    reading
        Of prompts with demonstrations.
    threshold
        Over the number of tokens: the attention from which a head counts; over the number of labels, too, where that of
        wrong labels is taken off.

    Returns
    -------
    RetrievalReport

    Raises
    ------
    ValueError
        For prompts without demonstrations.

    References
    ----------
    Cho et al. (ICLR 2025), arXiv 2410.04468.

    Examples
    --------
    >>> from subspan.probe import retrieval_report
    >>> retrieval_report(circuit.read(examples)).best(3)  # doctest: +SKIP
    [(11, 5), (14, 2), (17, 8)]
    """
    if not reading.owners.shape[1]:
        raise ValueError("reading: its prompts have no demonstrations, so there is nothing to retrieve")
    right = reading.owners == reading.targets.unsqueeze(1)
    signs = torch.where(right, 1.0, -1.0)[:, None, None]
    classes = reading.logits.shape[1]
    return RetrievalReport(
        induction=_present(reading.retrieval.sum(-1), reading, threshold),
        correct_induction=_present((reading.retrieval * signs).sum(-1), reading, threshold / classes),
        assignment=label_assignment(reading.retrieval, right),
        average=label_assignment(reading.retrieval.mean(2), right),
        similarity=label_assignment(reading.similarity[:, :-1], right),
        chance=float(right.double().mean()),
    )


def label_assignment(weights: Tensor, right: Bool[Tensor, "n k"]) -> Tensor:
    """Share of weights of demonstrations that is on those with the right label.

    Parameters
    ----------
    weights
        (n, …, k).
    right
        Which demonstrations have the query's label.

    Returns
    -------
    Tensor (n, …), double precision; 0 where all weights are.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import label_assignment
    >>> share = label_assignment(torch.tensor([[0.3, 0.1]]), torch.tensor([[True, False]]))
    >>> round(float(share[0]), 3)
    0.75
    """
    mask = right.view(len(right), *[1] * (weights.ndim - 2), -1)
    wide = weights.double()
    # The small number keeps heads that look at no label at 0.
    return (wide * mask).sum(-1) / (wide.sum(-1) + 1e-5)


def _ranked(values: Tensor, least: float) -> list[tuple[int, int]]:
    """Places of the values that are at least so large, largest first."""
    order: Sequence[int] = values.flatten().argsort(descending=True, stable=True).tolist()
    pairs = [divmod(place, values.shape[1]) for place in order]
    return [(layer, head) for layer, head in pairs if float(values[layer, head]) >= least]
