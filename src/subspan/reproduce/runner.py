"""Finding, running and recording reproductions."""

from __future__ import annotations

import importlib
import json
import os
import platform
import time
import tomllib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from .protocol import Outcome, Progress, System, tally

SYSTEMS = tuple(
    System(name, **facts)
    for name, facts in tomllib.loads(
        resources.files("subspan.reproduce").joinpath("systems.toml").read_text(encoding="utf-8")
    ).items()
)
"""Every system with a protocol, as `systems.toml` describes them."""

_PACKAGES = ("subspan", "torch", "numpy", "scipy", "scikit-learn", "transformers")


def find(names: Iterable[str]) -> list[System]:
    """Systems by name; "all" stands for every one. Raises ValueError for an unknown name."""
    known = {system.name: system for system in SYSTEMS}
    wanted: list[System] = []
    for name in names:
        if name != "all" and name not in known:
            near = get_close_matches(name, known, n=3)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"name: unknown system {name!r}; {meant}`subspan list` has all {len(known)}")
        wanted += [s for s in (SYSTEMS if name == "all" else [known[name]]) if s not in wanted]
    if not wanted:
        raise ValueError("name: give one or more systems, or all; `subspan list` has them")
    return wanted


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the machine in words."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["python"] = platform.python_version()
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    return found


def run(
    system: System, *, quick: bool = False, seed: int = 0, progress: Progress | None = None, results: Path | None = None
) -> dict[str, Any]:
    """Run one protocol and return its record; with `results` it is written there as NAME.json (quick: NAME.quick.json).

    The record holds system, claim, data, model, metric, ours, baselines, bar, holds, seconds and versions, and beside
    them the checks, tables, notes, seed and whether it was the quick form.
    """
    protocol: Callable[..., Outcome] = importlib.import_module(f"subspan.reproduce.{system.module}").protocol
    started = time.perf_counter()
    outcome = protocol(quick=quick, seed=seed, progress=progress or _silent)
    record = {
        "system": system.name,
        **outcome.facts(quick=quick),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
        "quick": quick,
        "seed": seed,
    }
    if results is not None:
        # Here and not above: the list of systems needs no torch.
        from subspan.base.files import atomic_write

        results.mkdir(parents=True, exist_ok=True)
        with atomic_write(results / f"{system.name}{'.quick' if quick else ''}.json") as path:
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _silent(message: str, fraction: float) -> None:
    """Swallow progress."""


def recorded(name: str) -> dict[str, Any] | None:
    """The record of the full run that came with the package, or None where there is none."""
    file = resources.files("subspan.reproduce").joinpath("results", f"{name}.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def listing() -> list[dict[str, Any]]:
    """One entry a system: name, title, paper, year, room, public name, and how its recorded run turned out."""
    entries = []
    for system in SYSTEMS:
        record = recorded(system.name)
        claim, held, checks = tally(record) if record else (None, 0, 0)
        entries.append(
            {
                "name": system.name,
                "title": system.title,
                "paper": system.paper,
                "year": system.year,
                "room": system.room,
                "public": f"subspan.{system.room}.{system.public}",
                "main_claim": {True: "yes", False: "no", None: "not recorded"}[claim],
                "checks": f"{held} of {checks}",
            }
        )
    return entries
