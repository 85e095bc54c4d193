"""What the command line shows: lines, tables and JSON on stdout, a progress bar and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from subspan.base.reading import UNPRINTABLE, printable

if TYPE_CHECKING:
    from subspan.base import Progress


def say(message: str) -> None:
    """A line on stderr."""
    print(f"subspan: {message}", file=sys.stderr, flush=True)


def short_line(message: str) -> str:
    """One line, of which the middle is left out where it is longer than any that is meant."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= 2000 else f"{line[:1500]}...{line[-480:]}"


def print_line(message: str) -> None:
    """A line on stdout, in which nothing of a file steers the terminal."""
    print(printable(message))


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A progress bar on stderr, or silence where that is no terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda message, fraction: bar.update(task, description=message, completed=fraction)


def print_json(value: Any) -> None:
    """JSON whose control characters are escapes, as is all that is not ASCII where stdout cannot show it."""
    ascii_only = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    text = json.dumps(value, ensure_ascii=ascii_only, indent=1, allow_nan=False)
    print(UNPRINTABLE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text))


def short(value: Any) -> str:
    """A value in a table: four digits of a number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_facts(facts: dict[str, Any], *left_out: str) -> None:
    """Facts by name in one line."""
    shown = {name: value for name, value in facts.items() if name not in left_out}
    print_line(", ".join(f"{name.replace('_', ' ')} {short(value)}" for name, value in shown.items()))


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line a row, under the names of the first one's entries."""
    if not rows:
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, value in rows[0].items():
        justify = "right" if isinstance(value, int | float) else "left"
        table.add_column(printable(name).replace("_", " "), justify=justify, no_wrap=name == "name")
    for row in rows:
        table.add_row(*(printable(short(value)) for value in row.values()))
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000  # a line a row, for whatever reads it
    console.print(table)
