"""What a reproduction states and measures.

A protocol is `subspan/reproduce/NAME.py` with `protocol(*, quick, seed, progress) -> Outcome`, 100 to 150 lines, and an
entry in `systems.toml`. It says what is particular to the system; the rest is there:

- `Check.at_least(name, metric, value, bound)`, `at_most`, `above`, `below`, `within`: the text of the bar and the
  verdict come from the same bound. What must hold of every seed or data set is one number, the worst; two conditions
  are two checks. `required=False`: not of the claim, but reported with its verdict. `quick=True`: the quick run is
  large enough to judge it, too; all others are only measured there. What has no bound is a row of a table.
- `Outcome(claim, data, model, metric, ours, baselines, main=check, checks=…)`: the main claim is a check like the
  others; `ours` and `baselines` are the headline numbers, `metric` says of what.
- `Trials(arms, seeds, measure, progress=…)` runs every arm under every seed and gives means, gaps and tables::

      trials = Trials(ARMS, range(seed, seed + 3), lambda arm, seed: {"accuracy": …}, progress=progress)
      trials.mean("ours", "accuracy"); trials.gap("ours", "plain", "accuracy"); trials.means("accuracy", but="ours")
      trials.table("means over seeds", "arm", {"accuracy": "accuracy", "lowest": Column("accuracy", min)})

- `Table.rounded(title, columns, rows, digits)` is any other table; rows may be `facts.items()`.
- `train(model, loss, batches, epochs=…, learning_rate=…, schedule=one_cycle(0.1))` trains an `Objective`: loss(model,
  batch); `shuffled(x, y, batch_size=…, seed=…)` are its batches; `kept(model, kind, key, fit)` keeps the weights in the
  cache folder. No protocol has a training module of its own.
- `materials`: `labelled_images(source)` (real pictures, or digits where the data folder lacks them) with `features()`,
  `text_features`, `labelled_texts`, sentence pairs, small networks, a shared image-text space, a small generator.

Sizes that a quick run changes stand in one NamedTuple with its `QUICK` values, or beside each other:
`epochs, seeds = (1, 1) if quick else (10, 3)`. What is drawn is drawn from `seed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from subspan.base import Progress as Progress


@dataclass(frozen=True)
class System:
    """A published system: its name, title, paper, year, room and main public name."""

    name: str
    title: str
    paper: str
    year: int
    room: str
    public: str

    @property
    def module(self) -> str:
        """The module of `subspan.reproduce` with its protocol."""
        return self.name.replace("-", "_")


@dataclass(frozen=True)
class Check:
    """One effect that must (or, with required=False, may) appear: the measured value against its bar.

    Made by `at_least`, `at_most`, `above`, `below` or `within`, whose bound gives both the bar and the verdict. quick:
    whether a quick run is large enough to judge it. Raises ValueError for a value that is not finite.

    Examples
    --------
    >>> check = Check.at_most("fidelity is kept", "error, tuned over untouched", 1.03, 1.05)
    >>> check.bar, check.holds
    ('<= 1.05', True)
    """

    name: str
    metric: str
    value: float
    bar: str
    holds: bool
    required: bool = True
    quick: bool = False

    def __post_init__(self) -> None:
        _finite(self.name, self.value)

    @classmethod
    def at_least(cls, name: str, metric: str, value: Any, bound: float, **options: bool) -> Check:
        """Holds where the value is the bound or more."""
        return cls(name, metric, float(value), f">= {bound:g}", bool(value >= bound), **options)

    @classmethod
    def at_most(cls, name: str, metric: str, value: Any, bound: float, **options: bool) -> Check:
        """Holds where the value is the bound or less."""
        return cls(name, metric, float(value), f"<= {bound:g}", bool(value <= bound), **options)

    @classmethod
    def above(cls, name: str, metric: str, value: Any, bound: float, **options: bool) -> Check:
        """Holds where the value is more than the bound."""
        return cls(name, metric, float(value), f"> {bound:g}", bool(value > bound), **options)

    @classmethod
    def below(cls, name: str, metric: str, value: Any, bound: float, **options: bool) -> Check:
        """Holds where the value is less than the bound."""
        return cls(name, metric, float(value), f"< {bound:g}", bool(value < bound), **options)

    @classmethod
    def within(cls, name: str, metric: str, value: Any, low: float, high: float, **options: bool) -> Check:
        """Holds where the value lies between the bounds, or on one."""
        return cls(name, metric, float(value), f"{low:g} to {high:g}", bool(low <= value <= high), **options)

    def facts(self, quick: bool) -> dict[str, Any]:
        """As JSON values; `holds` is None where a quick run measures the value and cannot judge it."""
        facts = asdict(self)
        facts["judged"] = facts.pop("quick") or not quick
        return {**facts, "holds": self.holds if facts["judged"] else None}


@dataclass(frozen=True)
class Table:
    """A table of measured numbers; rows are as long as `columns`."""

    title: str
    columns: list[str]
    rows: list[list[Any]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"rows: expected {len(self.columns)} cells in {self.title!r}, got {len(row)}")

    @classmethod
    def rounded(cls, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], digits: int = 4) -> Table:
        """A table whose numbers are rounded, but for whole ones."""
        cells = ([round(float(c), digits) if isinstance(c, float) else c for c in row] for row in rows)
        return cls(title, list(columns), list(cells))


@dataclass(frozen=True)
class Outcome:
    """What a protocol measured: the paper's claim, the setting, our number beside the baselines', and the bar."""

    claim: str
    data: str
    model: str
    metric: str
    ours: float
    baselines: dict[str, float]
    bar: str = ""
    holds: bool = False
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    main: Check | None = None

    def __post_init__(self) -> None:
        for name, value in {"ours": self.ours, **self.baselines}.items():
            _finite(name, value)
        if self.main is not None:
            stated = "" if self.main.metric == self.metric else f"{self.main.metric} "
            measured = "" if self.main.value == self.ours else f" (measured {self.main.value:.4g})"
            object.__setattr__(self, "bar", f"{stated}{self.main.bar}{measured}")
            object.__setattr__(self, "holds", self.main.holds)

    @property
    def all_hold(self) -> bool:
        """Whether the main bar and every required check hold."""
        return self.facts()["holds"]

    def facts(self, *, quick: bool = False) -> dict[str, Any]:
        """Everything as JSON values; `holds` is the conjunction of the main bar and the required checks.

        Of a quick run only what it is large enough to judge counts; the verdict of the others is None.
        """
        main = None if self.main is None else self.main.facts(quick)
        checks = [check.facts(quick) for check in self.checks]
        claim = self.holds if main is None else main["holds"]
        facts = {**asdict(self), "main": main, "checks": checks, "main_bar_holds": claim}
        return {**facts, "holds": all(_verdicts(facts))}


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name}: a measured number must be finite, got {value}")


def _verdicts(record: Mapping[str, Any]) -> list[bool]:
    """Verdicts of the main claim and the required checks, without those that a quick run cannot give."""
    every = [record["main_bar_holds"], *(check["holds"] for check in record["checks"] if check["required"])]
    return [verdict for verdict in every if verdict is not None]


def tally(record: Mapping[str, Any]) -> tuple[bool | None, int, int]:
    """Whether the main claim of a record holds, how many of its required checks do, and of how many (with it).

    The claim is None, and a check is not counted, where a quick run was too small to judge it.
    """
    verdicts = _verdicts(record)
    return record["main_bar_holds"], sum(verdicts), len(verdicts)


def status(record: Mapping[str, Any]) -> str:
    """How a record turned out, in words."""
    claim, held, checks = tally(record)
    words = {True: "yes", False: "no", None: "not judged"}
    return f"main claim {words[claim]} · {held} of {checks} checks"


def verdict(check: Mapping[str, Any]) -> str:
    """How a check of a record turned out, in words."""
    words = {True: "holds", False: "does not hold", None: "too small a run to judge"}
    return words[check["holds"]] + ("" if check["required"] else " (reported)")
