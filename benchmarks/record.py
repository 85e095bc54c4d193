"""What every benchmark shares: two clocks, the machine by name, a printed table, and the record that the docs show."""

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


class Timing(NamedTuple):
    """Seconds on the wall and of the processor (all threads) of one run."""

    seconds: float
    processor: float


def timed(function: Callable[[], object], repeats: int = 3, *, warm: bool = True) -> Timing:
    """The run with the least processor time of several, after one to warm up.

    Processor time, since it does not count the turns that other programs had on a machine that is shared.
    """
    if warm:
        function()
    runs = []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        function()
        runs.append(Timing(time.perf_counter() - wall, time.process_time() - processor))
    return min(runs, key=lambda run: run.processor)


def by_turns(functions: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Least processor seconds of each, measured by turns after one round to warm up.

    For things that differ by less than a shared machine does from one minute to the next.
    """
    for function in functions.values():
        function()
    found = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            found[name] = min(found[name], timed(function, repeats=1, warm=False).processor)
    return found


def peak() -> float:
    """Largest resident memory of this process so far, MiB.

    From the kernel's own mark where there is one: `ru_maxrss` of a new process begins at its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 1024


def processor_name() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Record:
    """A benchmark's tables and targets: printed as they come, written with --json."""

    def __init__(self, name: str, setting: str) -> None:
        import torch

        self.facts: dict[str, Any] = {
            "benchmark": name,
            "setting": setting,
            "machine": f"{processor_name()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "load": [round(os.getloadavg()[0], 1)],
            "versions": {key: version(key) for key in ("subspan", "torch", "numpy", "scikit-learn")},
            "tables": [],
            "targets": [],
            "notes": [],
        }
        print(f"machine: {self.facts['machine']}, {self.facts['threads']} threads, load {self.facts['load'][0]}")
        print(setting)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Keep and print a table; numbers are shown with three digits."""
        self.facts["tables"].append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in [columns, *rows]]
        widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
        print(f"\n{title}")
        for row in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())

    def target(self, what: str, measured: float, least: float | None = None, most: float | None = None) -> None:
        """Keep and print whether a measured number lies within its bounds; a miss is recorded, not hidden."""
        holds = (least is None or measured >= least) and (most is None or measured <= most)
        bound = f"at least {least:g}" if least is not None else f"at most {most:g}"
        self.facts["targets"].append(
            {"target": what, "bound": bound, "measured": float(measured), "holds": bool(holds)}
        )
        print(f"target: {what}, {bound}: {measured:.3g} ({'holds' if holds else 'does not hold'})")

    def note(self, text: str) -> None:
        """Keep and print a sentence."""
        self.facts["notes"].append(text)
        print(text)

    def save(self, path: Path | None) -> None:
        """Write the record as JSON where a path is given, with the load at the end too."""
        self.facts["load"].append(round(os.getloadavg()[0], 1))
        if path is not None:
            path.write_text(json.dumps(self.facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option that every benchmark has."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the record that docs/benchmarks.md shows")
    return made
