"""Where a model keeps a property of texts: in which layers, in how many dimensions, and whether beyond the words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.model_selection import cross_val_predict
from sklearn.utils import check_random_state
from torch import Tensor

from subspan.base import Progress, check_finite, silent
from subspan.base.parameters import Bounds, Count, Seed, check_parameters
from subspan.geometry import Subspace
from subspan.measures import make_probe, resampled_means
from subspan.models import TextStates

from .linear_readings import (
    Folds,
    HeldOut,
    Target,
    filters_and_patterns,
    folds_of,
    read_by_rank,
    read_held_out,
    shuffled,
    standardised,
    target_of,
)
from .update_comparison import Estimate

Way = Callable[[Tensor, Target], Callable[[Tensor], Tensor]]
"""From states and what is read of them to what takes it out of other states."""
_MOST_RANDOM = 256


class LayerReading(NamedTuple):
    """How well a property is read in one layer; see `PropertyProbe`.

    Attributes
    ----------
    layer
        Its number.
    score, low, high
        Share of texts right, or R², of texts not learnt from, with its interval.
    shuffled
        The same with the labels at other texts.
    """

    layer: int
    score: float
    low: float
    high: float
    shuffled: float


class RankReading(NamedTuple):
    """How well a property is read in some dimensions of the best layer; see `PropertyProbe`.

    Attributes
    ----------
    rank
        Dimensions.
    score, low, high
        In the most telling ones; None where no linear reading has so many.
    random
        In as many random ones, mean over draws.
    shuffled
        In the most telling ones for labels at other texts.
    """

    rank: int
    score: float | None
    low: float | None
    high: float | None
    random: float
    shuffled: float | None


class ErasedReading(NamedTuple):
    """What is still read of the best layer after something was taken out; see `PropertyProbe.erased`.

    Attributes
    ----------
    name
        What is read.
    way
        What was taken out.
    score, low, high
        Of a linear probe that is learnt anew.
    chance
        Without looking at the states.
    neighbours
        Of the ten nearest neighbours; None for numbers, and where a half has one text of a class.
    """

    name: str
    way: str
    score: float
    low: float
    high: float
    chance: float
    neighbours: float | None


@dataclass(eq=False, repr=False)
class PropertyProbe:
    """Finds in which layers, and in how many of their dimensions, a property of texts can be read linearly.

    All layers are read together, in texts that were not learnt from. A finding stands when it is above shuffled labels
    and the commonest one, and it is the model's own when it is above the words: the better of the mean over the words
    as they go into the first block, and of that layer at the place that is read. The score of the finding is that of
    the layer which the other folds choose, so that the choice of the best of many does not flatter it.

    Parameters
    ----------
    numeric
        The property is a number (R² is reported), not a class (share right).
    folds
        In which texts are held out; each class needs as many texts.
    shuffles
        Draws of labels at other texts.
    draws
        Random subspaces of each size.
    random_state
        Seed of folds and draws.

    Attributes
    ----------
    verdict_ : str
        "kept", "in the words" or "not found".
    reason_ : str
        In words and numbers.
    score_ : Estimate
        Of the layer chosen by the other folds.
    chance_, shuffled_ : float
        Of the commonest class (0 for numbers), and with labels at other texts.
    words_, beyond_words_ : Estimate
        Of the words alone, and how much the finding is above them.
    layers_ : list of LayerReading
    layer_, first_layer_, last_layer_ : int
        The best layer, and the ends of the run around it in which none is clearly below it.
    ranks_ : list of RankReading
        Of the best layer.
    rank_ : int
        The fewest dimensions that are not clearly below all.
    subspace_ : Subspace
        Of the best layer: first the dimensions that read the property, most telling first, then those in which states
        differ with it. Without the whole no linear probe reads it.
    coordinates_ : dict of str to (k,) list
        Mean coordinates in it of each class; for numbers how far one standard deviation more moves them.
    shrinkage_ : float

    Raises
    ------
    ValueError
        In `fit`, for one class, classes of fewer texts than folds, NaN, and other numbers of texts and values.

    References
    ----------
    Alain & Bengio (2017), linear probes; Hewitt & Liang (2019), control tasks; Belrose et al. (2023), LEACE: without
    the differences of class means no linear classifier tells the classes.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import TextStates
    >>> from subspan.probe import PropertyProbe
    >>> generator = torch.Generator().manual_seed(0)
    >>> states, labels = torch.randn(3, 200, 8, generator=generator), torch.arange(200) % 2
    >>> states[2, :, 5] += 4 * labels
    >>> probe = PropertyProbe().fit(TextStates(states, states[0], (0, 1, 2), tuple(range(200))), labels)
    >>> probe.verdict_, probe.layer_, probe.rank_
    ('kept', 2, 1)
    """

    # `fit` checks the values: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    numeric: bool = False
    folds: Count = 5
    shuffles: Count = 3
    draws: Count = 5
    random_state: Seed = 0

    def fit(self, states: TextStates, values: Any, *, progress: Progress = silent) -> PropertyProbe:
        """Learn from the states of texts and a label or number of each."""
        check_parameters(self)
        if self.folds not in Bounds(least=2):
            raise ValueError(f"folds: at least 2, got {self.folds}")
        check_finite(states.states, "states")
        target = self._target(states, values)
        random = check_random_state(self.random_state)
        self.target_ = target
        folds = folds_of(target, self.folds, random)
        others = [shuffled(target, random) for _ in range(self.shuffles)]
        progress("reading all layers", 0.0)
        held = read_held_out(torch.cat([states.words.unsqueeze(0), states.states]), [target, *others], folds)
        self.shrinkage_ = held.shrinkage
        best = self._layers(states, held, folds)
        progress("reading by rank", 0.6)
        own = states.states[best]
        self._ranks(own, target, others, folds, random)
        self.subspace_ = property_subspace(own, target, self.shrinkage_)
        self.coordinates_ = self._coordinates(own, target)
        self._judge(states)
        return self

    def erased(
        self,
        states: Float[Tensor, "n d"],
        ways: Mapping[str, Way],
        others: Mapping[str, Target] | None = None,
    ) -> list[ErasedReading]:
        """What probes that are learnt anew read of the best layer's states when the property was taken out of them.

        What takes it out is learnt on one half of the texts and tried on the other, then the other way round; the
        probes are learnt on the half that it is tried on. "nothing", "subspace" (as `subspace_`) and "random
        subspace" (as large) are tried beside `ways`; `others`: what else is read.
        """
        random = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        size, width = self.subspace_.dim, states.shape[1]

        def found(rows: Tensor, target: Target) -> Callable[[Tensor], Tensor]:
            return _without(property_subspace(rows, target, self.shrinkage_))

        def drawn(rows: Tensor, _: Target) -> Callable[[Tensor], Tensor]:
            space = Subspace.random(width, size, generator=generator, dtype=torch.float32)
            return _without(Subspace(space.basis, center=rows.mean(0)))

        every: dict[str, Way] = {"nothing": lambda *_: lambda rows: rows, "subspace": found, **ways}
        every["random subspace"] = drawn
        read = {"": self.target_, **(others or {})}
        halves = folds_of(self.target_, 2, random)
        result: list[ErasedReading] = []
        for way, learn in every.items():
            changed = torch.empty_like(states)
            for half in range(2):
                learnt, tried = halves.split(half)
                changed[tried] = learn(states[learnt], self.target_.rows(learnt))(states[tried]).to(changed)
            parts = [self._read_half(changed, read, halves.split(half)[1], random) for half in range(2)]
            for place, name in enumerate(read):
                losses, bases, constant = (torch.cat([part[i][place] for part in parts]) for i in range(3))
                near = None
                if read[name].names:
                    shares = [_neighbours(changed, read[name], halves.split(half)[1]) for half in range(2)]
                    known = [share for share in shares if share is not None]
                    near = float(np.mean(known)) if len(known) == 2 else None
                chance = float(1 - constant.mean() / bases.mean())
                result.append(ErasedReading(name, way, *_estimate(losses, bases), chance, near))
        return result

    def _read_half(
        self, states: Tensor, read: Mapping[str, Target], rows: Tensor, random: np.random.RandomState
    ) -> tuple[Tensor, Tensor, Tensor]:
        targets = [target.rows(rows) for target in read.values()]
        # Every target has folds of its own classes.
        found = [
            read_held_out(
                states[rows].unsqueeze(0), [each], folds_of(each, self.folds, random), shrinkages=[self.shrinkage_]
            )
            for each in targets
        ]
        losses, bases, constant = zip(*((held.losses[0, 0], held.bases[0], held.constant[0]) for held in found))
        return torch.stack(losses), torch.stack(bases), torch.stack(constant)

    def _target(self, states: TextStates, values: Any) -> Target:
        given = values.tolist() if hasattr(values, "tolist") else list(values)
        if len(given) != states.states.shape[1]:
            raise ValueError(f"values: {states.states.shape[1]} are needed, one a text, got {len(given)}")
        target = target_of(given, numeric=self.numeric)
        if self.numeric:
            if len(given) < 4 * self.folds:
                raise ValueError(f"values: {4 * self.folds} are the fewest for {self.folds} folds, got {len(given)}")
            return target
        counts = torch.bincount(target.values, minlength=len(target.names)).tolist()
        few = [f"{name!r} ({count})" for name, count in zip(target.names, counts) if count < self.folds]
        if few:
            raise ValueError(f"labels: {self.folds} texts a class are needed, fewer have {', '.join(few[:5])}")
        return target

    def _layers(self, states: TextStates, held: HeldOut, folds: Folds) -> int:
        """Scores of all layers, the best one, and the controls; returns the place of the best."""
        layers = held.losses.shape[1] - 1
        scores = held.scores()[1:]
        best = int(scores.argmax())
        parts = torch.stack([_fold_scores(held, folds, number) for number in range(folds.count)])
        chosen = [int((parts.sum(0) - parts[number]).argmax()) for number in range(folds.count)]
        selected = torch.stack([held.losses[0, 1 + chosen[number], row] for row, number in enumerate(folds.part)])
        words = 0
        if states.layers[0] == 0 and float(scores[0]) > float(held.scores()[0]):
            words = 1
        columns = [held.bases[0], *held.losses[0], selected, held.losses[1:].mean(0)[1 + best], held.bases[1:].mean(0)]
        columns.append(held.constant[0])
        rows = torch.stack(columns, 1).numpy()
        means = np.vstack([rows.mean(0), resampled_means(rows)])
        score = 1 - means[:, 1 : 3 + layers] / means[:, :1]
        noise = 1 - means[:, 3 + layers] / means[:, 4 + layers]
        constant = 1 - means[:, 5 + layers] / means[:, 0]
        self.chance_, self.shuffled_ = float(constant[0]), float(noise[0])
        self.score_ = _interval(score[:, -1])
        self.words_ = _interval(score[:, words])
        self.beyond_words_ = _interval(score[:, -1] - score[:, words])
        self._beyond_chance = min(_interval(score[:, -1] - floor).low for floor in (noise, constant))
        noisy = torch.stack([held.scores(row) for row in range(1, len(held.losses))]).mean(0)
        self.layers_ = [
            LayerReading(number, *_interval(score[:, 1 + place]), float(noisy[1 + place]))
            for place, number in enumerate(states.layers)
        ]
        order = sorted(range(layers), key=lambda place: states.layers[place])
        near = [_interval(score[:, 1 + best] - score[:, 1 + place]).low <= 0 for place in order]
        first = last = order.index(best)
        while first > 0 and near[first - 1]:
            first -= 1
        while last + 1 < layers and near[last + 1]:
            last += 1
        self.layer_ = states.layers[best]
        self.first_layer_, self.last_layer_ = states.layers[order[first]], states.layers[order[last]]
        return best

    def _ranks(
        self,
        states: Float[Tensor, "n d"],
        target: Target,
        others: Sequence[Target],
        folds: Folds,
        random: np.random.RandomState,
    ) -> None:
        """Scores by the number of dimensions, beside random ones and shuffled labels."""
        width = min(states.shape)
        most = min(target.rank, width)
        own = [rank for rank in range(1, most + 1) if rank <= 8 or rank % 4 == 0 or rank == most]
        bases = read_held_out(states[:, :1].unsqueeze(0), [target], folds, shrinkages=[1.0]).bases[0]
        losses = read_by_rank(states, target, folds, own, self.shrinkage_)
        rows = torch.cat([bases.unsqueeze(1), losses.mT], 1).numpy()
        means = np.vstack([rows.mean(0), resampled_means(rows)])
        score = 1 - means[:, 1:] / means[:, :1]
        noise = torch.stack([read_by_rank(states, each, folds, own, self.shrinkage_) for each in others]).mean((0, 2))
        enough = [_interval(score[:, -1] - score[:, place]).low <= 0 for place in range(len(own))]
        self.rank_ = own[enough.index(True)]
        z = standardised(states.unsqueeze(0))[0]
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        powers = [1 << power for power in range(width.bit_length()) if 1 << power <= min(width, _MOST_RANDOM)]
        self.ranks_ = []
        for rank in sorted({*own, *powers}):
            spaces = Subspace.random(z.shape[1], min(rank, z.shape[1]), batch=(self.draws,), generator=generator)
            drawn = read_held_out(z @ spaces.basis.float(), [target], folds, shrinkages=[self.shrinkage_])
            place = own.index(rank) if rank in own else None
            random_score = float(drawn.scores().mean())
            if place is None:
                self.ranks_.append(RankReading(rank, None, None, None, random_score, None))
            else:
                by_noise = float(1 - noise[place] / bases.mean())
                self.ranks_.append(RankReading(rank, *_interval(score[:, place]), random_score, by_noise))

    def _coordinates(self, states: Float[Tensor, "n d"], target: Target) -> dict[str, list[float]]:
        z = self.subspace_.coordinates(states)
        if not target.names:
            y = target.values - target.values.mean()
            slope = z.mT.double() @ y / y.square().sum() * y.square().mean().sqrt()
            return {"one standard deviation more": slope.tolist()}
        return {name: z[target.values == code].mean(0).tolist() for code, name in enumerate(target.names)}

    def _judge(self, states: TextStates) -> None:
        kind = "R²" if self.numeric else "right"
        layers = f"layer {self.first_layer_}"
        if self.last_layer_ > self.first_layer_:
            whole = self.last_layer_ == max(states.layers)
            layers = f"layer {self.first_layer_} on" if whole else f"layers {self.first_layer_} to {self.last_layer_}"
        where = f"from {layers}" if layers.endswith("on") else f"in {layers}"
        beside = next(row for row in self.ranks_ if row.rank == self.rank_)
        dims = "1 dimension" if self.rank_ == 1 else f"{self.rank_} dimensions"
        shown = f"{self.score_.value:.2f} {kind} ({self.score_.low:.2f} to {self.score_.high:.2f})"
        random = "1 random dimension gives" if self.rank_ == 1 else f"{self.rank_} random dimensions give"
        controls = (
            f"{random} {beside.random:.2f}, shuffled labels {self.shuffled_:.2f}, "
            f"the words alone {self.words_.value:.2f}"
        )
        if not self.numeric:
            controls += f", the commonest label {self.chance_:.2f}"
        if self._beyond_chance <= 0:
            self.verdict_ = "not found"
            self.reason_ = f"no layer reads it above chance: {shown} in texts held out; {controls}"
        elif self.beyond_words_.low <= 0:
            self.verdict_ = "in the words"
            self.reason_ = f"not found beyond the words themselves: {shown} in texts held out; {controls}"
        else:
            self.verdict_ = "kept"
            self.reason_ = f"kept {where}, in {dims}: {shown} in texts held out; {controls}"


def property_subspace(states: Float[Tensor, "n d"], target: Target, shrinkage: float) -> Subspace:
    """First what reads a target, most telling directions first, then the rest of how states differ with it.

    Without the second part a probe would find again, in directions that its filters leave, what differs in the mean.

    Parameters
    ----------
    states
        (n, d) of one layer.
    target
        What is read.
    shrinkage
        Weight in (0, 1] of the columns' own variances in the covariance.

    Returns
    -------
    Subspace of at most twice as many dimensions as `target.rank`, around the mean of the states.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import property_subspace, target_of
    >>> states, labels = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
    >>> states[:, 1] += 5 * labels
    >>> bool(property_subspace(states, target_of(labels), 0.3).basis[1, 0].abs() > 0.9)
    True
    """
    filters, patterns = filters_and_patterns(states, target, shrinkage)
    reading = Subspace.span(filters).basis
    rest = patterns - reading @ (reading.mT @ patterns)
    left, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    room = states.shape[1] - reading.shape[1]
    basis = torch.cat([reading, left[:, : min(room, int((sizes > 1e-6).sum()))]], 1)
    return Subspace(basis, center=states.double().mean(0)).to(torch.float32)


def _without(space: Subspace) -> Callable[[Tensor], Tensor]:
    """Rows with the coordinates of the subspace's centre."""
    assert space.center is not None
    center = space.center.float()
    return lambda rows: space.residual(rows) + center


def _interval(values: Float[np.ndarray, " r"]) -> Estimate:
    """The first value, with the 95 % interval of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))


def _estimate(losses: Float[Tensor, " n"], bases: Float[Tensor, " n"]) -> Estimate:
    rows = torch.stack([losses, bases], 1).numpy()
    means = np.vstack([rows.mean(0), resampled_means(rows)])
    return _interval(1 - means[:, 0] / means[:, 1])


def _fold_scores(held: HeldOut, folds: Folds, number: int) -> Float[Tensor, " l"]:
    """Of each layer how little is lost in one fold."""
    return -held.losses[0, 1:, folds.split(number)[1]].sum(1)


def _neighbours(states: Float[Tensor, "n d"], target: Target, rows: Tensor) -> float | None:
    """Share of a half's texts that their nearest neighbours in it tell right; None where a class has one text there."""
    own = states[rows] - states[rows].mean(0)
    codes = target.values[rows].numpy()
    probe = make_probe("knn", n_neighbors=min(10, len(codes) // 2))
    folds = min(5, int(np.unique(codes, return_counts=True)[1].min()))
    if folds < 2:
        return None
    return float(np.mean(np.asarray(cross_val_predict(probe, own.numpy(), codes, cv=folds)) == codes))
