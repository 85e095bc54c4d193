"""Every arm of a comparison under every seed, and what is said about it: means, gaps, tables."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from subspan.measures import paired_bootstrap

from .protocol import Progress, Table

Arm = TypeVar("Arm", bound=Hashable)


class Column(NamedTuple):
    """A column of `Trials.table`: a statistic over seeds of a fact, rounded to `digits` (None: those of the table)."""

    fact: str = "value"
    of: Callable[[Any], Any] = np.mean
    digits: int | None = None


class Trials(Generic[Arm]):
    """Facts of every arm under every seed, measured once, in the order seed by seed.

    Parameters
    ----------
    arms : iterable
        Names of what is compared (strings, or tuples of what tells them apart).
    seeds : iterable of int
    measure : callable
        Of an arm and a seed: a number (the fact "value"), or a mapping of facts that are numbers.
    where : callable, optional
        Of an arm and a seed: whether the two are run at all.
    progress : callable, optional
        Is told each run, with fractions in `span`.

    Examples
    --------
    >>> trials = Trials(["plain", "ours"], range(2), lambda arm, seed: seed + (arm == "ours"))
    >>> trials.mean("ours"), trials.gap("ours", "plain"), trials.means(but="ours")
    (1.5, 1.0, {'plain': 0.5})
    """

    def __init__(
        self,
        arms: Iterable[Arm],
        seeds: Iterable[int],
        measure: Callable[[Arm, int], float | Mapping[str, float]],
        *,
        where: Callable[[Arm, int], bool] = lambda arm, seed: True,
        progress: Progress | None = None,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        names = list(arms)
        plan = [(arm, seed) for seed in seeds for arm in names if where(arm, seed)]
        self.arms = [name for name in names if any(arm == name for arm, _ in plan)]
        self.runs: dict[Arm, list[dict[str, float]]] = {arm: [] for arm in self.arms}
        for done, (arm, seed) in enumerate(plan):
            if progress is not None:
                said = arm if isinstance(arm, str) else ", ".join(str(part) for part in arm)  # pyright: ignore
                progress(f"{said}, seed {seed}", span[0] + (span[1] - span[0]) * done / len(plan))
            found = measure(arm, seed)
            self.runs[arm].append(dict(found) if isinstance(found, Mapping) else {"value": float(found)})

    def values(self, arm: Arm, fact: str = "value") -> list[float]:
        """A fact of an arm, seed by seed; empty where the arm does not have it."""
        return [run[fact] for run in self.runs[arm] if fact in run]

    def statistic(self, arm: Arm, fact: str, of: Callable[[Any], Any]) -> float:
        """A statistic of a fact over seeds."""
        return float(of(self.values(arm, fact)))

    def mean(self, arm: Arm, fact: str = "value") -> float:
        """The mean of a fact over seeds."""
        return self.statistic(arm, fact, np.mean)

    def means(
        self, fact: str = "value", *, but: Arm | None = None, of: Callable[[Any], Any] = np.mean
    ) -> dict[Arm, float]:
        """The mean (or another statistic) of every arm that has the fact; `but`: without this arm."""
        return {arm: self.statistic(arm, fact, of) for arm in self.arms if arm != but and self.values(arm, fact)}

    def over_sets(self, fact: str = "value", *, of: Callable[[Any], Any] = np.mean) -> dict[Any, float]:
        """Of arms (set, method): for every method the mean over sets of a statistic over seeds."""
        found: dict[Any, list[float]] = {}
        for arm in self.arms:
            found.setdefault(arm[-1], []).append(self.statistic(arm, fact, of))  # pyright: ignore
        return {method: float(np.mean(values)) for method, values in found.items()}

    def gap(self, arm: Arm, other: Arm, fact: str = "value", *, of: Callable[[Any], Any] | None = None) -> float:
        """The mean of one arm less that of another; of (min, max, …): that statistic of the differences by seed."""
        if of is None:
            return self.mean(arm, fact) - self.mean(other, fact)
        return float(of([a - b for a, b in zip(self.values(arm, fact), self.values(other, fact))]))

    def interval(self, arm: Arm, other: Arm, fact: str = "value", *, level: float = 0.95) -> tuple[float, float]:
        """Ends of the bootstrap interval of the mean difference by seed. Raises ValueError for fewer than two seeds."""
        return paired_bootstrap(self.values(arm, fact), self.values(other, fact), level=level)[1:]

    def table(
        self,
        title: str,
        label: str | Sequence[str],
        columns: Mapping[str, str | Column | Mapping[Arm, Any]] | Iterable[str],
        *,
        digits: int = 2,
        arms: Iterable[Arm] | None = None,
    ) -> Table:
        """A row an arm; each column is a fact (its mean), a `Column`, or cells by arm; names alone are facts.

        label: heading of the arm's name, or of the parts of its tuple. A statistic that an arm lacks is None.
        """

        def cell(arm: Arm, column: str | Column | Mapping[Arm, Any]) -> Any:
            if isinstance(column, Mapping):
                return column.get(arm)
            column = Column(column) if isinstance(column, str) else column
            values = self.values(arm, column.fact)
            found = column.of(values) if values else None
            if not isinstance(found, float | np.floating):
                return found
            kept = digits if column.digits is None else column.digits
            return round(float(found), kept) if kept else round(float(found))

        columns = columns if isinstance(columns, Mapping) else {fact: fact for fact in columns}
        labels = [label] if isinstance(label, str) else list(label)
        rows = [
            [*([arm] if isinstance(label, str) else arm), *(cell(arm, column) for column in columns.values())]  # pyright: ignore
            for arm in (self.arms if arms is None else arms)
        ]
        return Table(title, [*labels, *columns], rows)


def spread(fact: str = "value", mean: str = "mean") -> dict[str, Column]:
    """Columns of the mean, the lowest and the highest of a fact."""
    return {mean: Column(fact), "lowest": Column(fact, min), "highest": Column(fact, max)}


def median_and_range(fact: str = "value") -> Column:
    """The median of a fact with its lowest and highest value in brackets, as text."""
    return Column(fact, lambda values: f"{np.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
