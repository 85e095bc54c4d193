"""What a reproduction states and measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Progress = Callable[[str, float], None]
"""Called with a message and the fraction done in [0, 1]."""


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
    """One effect that must (or, with required=False, may) appear: the measured value against its bar."""

    name: str
    metric: str
    value: float
    bar: str
    holds: bool
    required: bool = True


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


@dataclass(frozen=True)
class Outcome:
    """What a protocol measured: the paper's claim, the setting, our number beside the baselines', and the bar."""

    claim: str
    data: str
    model: str
    metric: str
    ours: float
    baselines: dict[str, float]
    bar: str
    holds: bool
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        numbers = {"ours": self.ours, **self.baselines, **{check.name: check.value for check in self.checks}}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(f"{name}: a measured number must be finite, got {value}")

    @property
    def all_hold(self) -> bool:
        """Whether the main bar and every required check hold."""
        return self.holds and all(check.holds for check in self.checks if check.required)

    def facts(self) -> dict[str, Any]:
        """Everything as JSON values; `holds` is the conjunction of the main bar and the required checks."""
        facts = asdict(self)
        facts["main_bar_holds"] = self.holds
        facts["holds"] = self.all_hold
        return facts


def tally(record: Mapping[str, Any]) -> tuple[bool, int, int]:
    """Whether the main claim of a record holds, how many of its required checks do, and of how many (with it)."""
    held = [record["main_bar_holds"], *(check["holds"] for check in record["checks"] if check["required"])]
    return held[0], sum(held), len(held)


def status(record: Mapping[str, Any]) -> str:
    """How a record turned out, in words."""
    claim, held, checks = tally(record)
    return f"main claim {'yes' if claim else 'no'} · {held} of {checks} checks"
