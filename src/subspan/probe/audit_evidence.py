"""What an audit of a subspace reads off models, and the shares and intervals that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from subspan.measures import resampled_means

Scores = Float[np.ndarray, " n"]
# Of the largest score: changes below it are those of arithmetic in single precision.
_ROUNDING = 1e-5
Verdict = Literal["specific", "not specific", "no evidence"]

# Of a projection that keeps a share of a behaviour's change: how much of it the subspace carries.
_CARRIED: dict[str, Callable[[Any], Any]] = {
    "same": lambda kept: kept,
    "orth": lambda kept: 1 - kept,
    "opp": lambda kept: -kept,
}


class Change(NamedTuple):
    """How far a tuned model has moved a behaviour from the aligned one.

    Attributes
    ----------
    tuned, behaviour
        Their names.
    aligned, full
        Mean score of the aligned model and of the tuned one.
    low, high
        Interval of full - aligned.
    moved
        Whether the interval leaves out 0, and the change is more than rounding: only then is there something of which
        a projection could keep a share.
    """

    tuned: str
    behaviour: str
    aligned: float
    full: float
    low: float
    high: float
    moved: bool


class Arm(NamedTuple):
    """One projection: its share of the directions, the kind of subspace, the random draw, and the mode."""

    fraction: float
    kind: str
    draw: int
    mode: str


class Reading(NamedTuple):
    """A behaviour of a model with a projected update.

    Attributes
    ----------
    tuned, behaviour
        Their names.
    fraction
        Of the directions.
    kind
        "topk", or that of a control.
    draw
        Number of the random draw.
    mode
        "same", "orth" or "opp", as in `projected_update`.
    directions
        Their sum over tensors.
    energy_kept, cosine, cosine_to_reference
        As in `ProjectedUpdate`.
    score
        Mean over prompts.
    carried
        Share of the behaviour's change that the subspace carries: what the part inside keeps ("same"), or what is
        missing without it ("orth").
    """

    tuned: str
    behaviour: str
    fraction: float
    kind: str
    draw: int
    mode: str
    directions: int
    energy_kept: float
    cosine: float
    cosine_to_reference: float
    score: float
    carried: float


class Selectivity(NamedTuple):
    """How much more of one behaviour than of the others a subspace carries, less the same of a control.

    Attributes
    ----------
    behaviour
        Its name.
    fraction
        Of the directions.
    control
        What it is compared with.
    estimate, low, high
        With the interval, at the level of all comparisons together.
    """

    behaviour: str
    fraction: float
    control: str
    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class AuditReport:
    """What an audit found; see `SubspaceAudit`.

    Attributes
    ----------
    verdict
        "specific", "not specific" or "no evidence".
    reason
        Why, in a sentence.
    changes, readings, selectivities
        What it rests on.
    """

    verdict: Verdict
    reason: str
    changes: tuple[Change, ...]
    readings: tuple[Reading, ...]
    selectivities: tuple[Selectivity, ...]

    def curves(self) -> dict[str, dict[str, dict[float, float]]]:
        """Behaviour → kind → fraction → share carried, over tuned models, modes and draws: what one plots.

        The mean is weighted by how far each tuning has moved the behaviour.
        """
        moves = {(row.tuned, row.behaviour): abs(row.full - row.aligned) for row in self.changes}
        sums: dict[str, dict[str, dict[float, tuple[float, float]]]] = {}
        for row in self.readings:
            weight = moves[row.tuned, row.behaviour]
            by_fraction = sums.setdefault(row.behaviour, {}).setdefault(row.kind, {})
            total, weights = by_fraction.get(row.fraction, (0.0, 0.0))
            by_fraction[row.fraction] = total + weight * row.carried, weights + weight
        return {
            behaviour: {
                kind: {fraction: total / weights for fraction, (total, weights) in by_fraction.items()}
                for kind, by_fraction in by_kind.items()
            }
            for behaviour, by_kind in sums.items()
        }

    def columns(self) -> dict[str, list[Any]]:
        """The readings as columns by name, ready for any library's data frame."""
        return {name: [getattr(row, name) for row in self.readings] for name in Reading._fields}

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


class Evidence:
    """Scores by projection, and what follows from them for the prompts as they are and for each bootstrap draw.

    metrics: behaviour → function of a model. tail: what each end of an interval leaves out.
    """

    def __init__(
        self,
        metrics: Mapping[str, Callable[[nn.Module], Any]],
        aligned: nn.Module,
        *,
        n_random: int,
        resamples: int,
        random_state: int,
        tail: float,
    ) -> None:
        self.metrics, self.tail = metrics, tail
        self.resamples, self.random_state = resamples, random_state
        self.aligned: dict[str, Scores] = {}
        self.aligned |= {behaviour: self._read(aligned, behaviour) for behaviour in metrics}
        self.full: dict[tuple[str, str], Scores] = {}
        self.scores: dict[tuple[str, str], dict[Arm, Scores]] = {}
        self.changes: list[Change] = []
        # One and the same for all behaviours; the first row has every draw once.
        drawn = np.random.default_rng(random_state).integers(n_random, size=(resamples, n_random))
        self._draws = np.concatenate([np.arange(n_random)[None], drawn])

    @property
    def moved(self) -> list[str]:
        """Behaviours that some tuning has moved."""
        return [each for each in self.aligned if any(each == behaviour for _, behaviour in self.full)]

    def read_whole(self, model: nn.Module, tuned: str) -> None:
        """Every behaviour of a tuned model, and whether it is another than before."""
        for behaviour, before in self.aligned.items():
            after = self._read(model, behaviour)
            means = self._means(behaviour, [before, after])
            low, high = self._interval(means[:, 1] - means[:, 0])
            change, scale = abs(means[0, 1] - means[0, 0]), max(np.abs(before).max(), np.abs(after).max())
            moved = (low > 0 or high < 0) and bool(change > _ROUNDING * scale)
            self.changes.append(Change(tuned, behaviour, float(means[0, 0]), float(means[0, 1]), low, high, moved))
            if moved:
                self.full[tuned, behaviour] = after
                self.scores[tuned, behaviour] = {}

    def read(self, model: nn.Module, tuned: str, arm: Arm) -> Iterator[tuple[str, float, float]]:
        """(behaviour, mean score, share carried) of those that this tuning has moved."""
        for (name, behaviour), full in self.full.items():
            if name == tuned:
                scores = self._read(model, behaviour)
                self.scores[name, behaviour][arm] = scores
                start, end = self.aligned[behaviour].mean(), full.mean()
                yield (
                    behaviour,
                    float(scores.mean()),
                    float(_CARRIED[arm.mode]((scores.mean() - start) / (end - start))),
                )

    def carried(self, behaviour: str, fraction: float, kind: str) -> Float[np.ndarray, " r"]:
        """Share that subspaces of a kind carry, over tuned models, modes and draws: first as it is.

        Of several tuned models the changes are added up: one that has hardly moved the behaviour says little of it.
        """
        whole: Any = 0.0
        kept: Any = 0.0
        arms: list[Arm] = []
        for (tuned, name), by_arm in self.scores.items():
            if name == behaviour:
                arms = [arm for arm in by_arm if (arm.fraction, arm.kind) == (fraction, kind)]
                means = self._means(name, [self.aligned[name], self.full[tuned, name], *(by_arm[arm] for arm in arms)])
                gone = (means[:, 1:] - means[:, :1]) * np.sign(means[0, 1] - means[0, 0])
                whole, kept = whole + gone[:, :1], kept + gone[:, 1:]
        parts = []
        for mode in dict.fromkeys(arm.mode for arm in arms):
            chosen = [place for place, arm in enumerate(arms) if arm.mode == mode]
            shares = _CARRIED[mode](kept[:, chosen] / whole)
            drawn = self._draws if len(chosen) > 1 else np.zeros((len(shares), 1), dtype=int)
            parts.append(np.take_along_axis(shares, drawn, axis=1).mean(1))
        return np.mean(parts, axis=0)

    def selectivities(self, fraction: float, controls: Sequence[str]) -> Iterator[Selectivity]:
        """Of every behaviour beside the others, and beside every control."""
        kinds = ["topk", *controls]
        shares = {kind: {each: self.carried(each, fraction, kind) for each in self.moved} for kind in kinds}
        for behaviour in self.moved:
            others = [each for each in self.moved if each != behaviour]
            more = {
                kind: shares[kind][behaviour] - np.mean([shares[kind][each] for each in others], axis=0)
                for kind in kinds
            }
            for control in controls:
                found = more["topk"] - more[control]
                yield Selectivity(behaviour, fraction, control, float(found[0]), *self._interval(found))

    def _interval(self, found: Float[np.ndarray, " r"]) -> tuple[float, float]:
        low, high = np.quantile(found[1:], [self.tail, 1 - self.tail])
        return float(low), float(high)

    def _means(self, behaviour: str, columns: Sequence[Scores]) -> Float[np.ndarray, "r m"]:
        """Means of scores of the same prompts: as they are, then of each bootstrap draw, the same at every call."""
        scores = np.stack(columns, axis=1)
        seed = self.random_state + 1 + list(self.metrics).index(behaviour)
        drawn = resampled_means(scores, resamples=self.resamples, random_state=seed)
        return np.concatenate([scores.mean(0, keepdims=True), drawn])

    def _read(self, model: nn.Module, behaviour: str) -> Scores:
        given = self.metrics[behaviour](model)
        values = given.detach().double().cpu() if isinstance(given, Tensor) else given
        scores = np.atleast_1d(np.asarray(values, dtype=float))
        if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
            raise ValueError(f"metrics: {behaviour!r} must give a finite number, or finite numbers (n,), one a prompt")
        before = self.aligned.get(behaviour, scores)
        if len(before) != len(scores):
            raise ValueError(
                f"metrics: {behaviour!r} gave {len(before)} numbers for the aligned model, now {len(scores)}"
            )
        return scores
