"""`subspan list`, `reproduce`, `models` and `cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .options import AsJson, Seed
from .printing import print_json, print_line, print_table, progress_bar, short


def list_systems(as_json: AsJson = False) -> None:
    """List the systems: name, title, paper, year, room, and how their last recorded reproduction went.

    Examples:

    - `subspan list`

    - `subspan list --json`
    """
    from subspan.reproduce import listing

    entries = listing()
    if as_json:
        print_json(entries)
    else:
        shown = ("name", "room", "year", "main_claim", "checks", "title")
        print_table([{name: entry[name] for name in shown} for entry in entries])


def reproduce(
    names: Annotated[list[str], typer.Argument(metavar="NAME...|all", help="Systems by name, or all.")],
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run, under a minute a system.")] = False,
    results: Annotated[
        Path | None, typer.Option("--results", metavar="DIR", help="Write each record to a folder as NAME.json.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run systems on real data against their baselines and bars. Exits with 1 where a bar does not hold.

    Examples:

    - `subspan reproduce subspacead --quick`

    - `subspan reproduce all --json > results.json`
    """
    from subspan.reproduce import find
    from subspan.reproduce import run as run_protocol

    if results is not None and results.exists() and not results.is_dir():
        raise ValueError(f"--results: {str(results)!r} is not a folder")
    records = []
    for system in find(names):
        with progress_bar(system.name) as progress:
            records.append(run_protocol(system, quick=quick, seed=seed, progress=progress, results=results))
        if not as_json:
            _print_record(records[-1])
    if as_json:
        print_json(records)
    if not all(record["holds"] for record in records):
        raise typer.Exit(1)


def _print_record(record: dict[str, Any]) -> None:
    from subspan.reproduce.protocol import status, verdict

    say = Console(markup=False, emoji=False, highlight=False).print
    say(f"{record['system']}: {status(record)} ({record['seconds']:.0f} s)", style="bold")
    for name in ("claim", "data", "model", "bar"):
        say(f"  {name}: {record[name]}")
    print_table(
        [{"": "ours", record["metric"]: record["ours"]}]
        + [{"": name, record["metric"]: value} for name, value in record["baselines"].items()]
    )
    for check in record["checks"]:
        say(f"  {check['name']}: {short(check['value'])} ({check['metric']}; {check['bar']}): {verdict(check)}")
    for table in record["tables"]:
        say(f"  {table['title']}")
        print_table([dict(zip(table["columns"], row)) for row in table["rows"]])
    for note in record["notes"]:
        say(f"  note: {note}")


def list_models(as_json: AsJson = False) -> None:
    """List the pretrained models, their licences and whether they are installed.

    Example: `subspan models list`
    """
    from subspan.datasets import WEIGHT_PACKAGES, is_installed

    entries = [
        {
            "name": name,
            "installed": is_installed(name),
            "megabytes": package.megabytes,
            "license": package.license,
            "title": package.title,
        }
        for name, package in WEIGHT_PACKAGES.items()
    ]
    if as_json:
        print_json(entries)
    else:
        print_table(entries)


def install_models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Models; all where none is named.")
    ] = None,
) -> None:
    """Install pretrained models, pinned by hash and without the dependencies that they declare.

    Example: `subspan models install minilm`
    """
    from subspan.datasets import WEIGHT_PACKAGES, install

    wanted = names or list(WEIGHT_PACKAGES)
    try:
        install(wanted)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    print_line(f"installed: {', '.join(wanted)}")


def cache_info(as_json: AsJson = False) -> None:
    """Say where the cache is and what it holds.

    Example: `subspan cache info`
    """
    from subspan.datasets import cache_entries, cache_folder

    entries = [
        {
            "kind": entry.kind,
            "megabytes": round(entry.megabytes, 1),
            "folder": entry.key[:16],
            "state": "finished" if entry.finished else "unfinished",
        }
        for entry in cache_entries()
    ]
    total = round(sum(entry["megabytes"] for entry in entries), 1)
    if as_json:
        print_json({"folder": str(cache_folder()), "megabytes": total, "entries": entries})
        return
    print_line(f"{cache_folder()}: {len(entries)} entries, {total} MB")
    print_table(entries)


def cache_clear(
    older_than_days: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0, help="Only entries at least so old.")
    ] = 0.0,
) -> None:
    """Remove what is in the cache and what killed runs left there, but for what a process is making.

    Example: `subspan cache clear --older-than 30`
    """
    from subspan.datasets import clear_cache

    print_line(f"{clear_cache(older_than_days=older_than_days):.1f} MB freed")
