"""The command line's verbs in their groups, and the options that stand before any verb."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from .auditing import audit
from .clustering import cluster
from .compressing import compress
from .describing import report
from .detecting import detect
from .embedding_series import embed_series
from .forecasting import forecast
from .mapping import align, shorten, upgrade
from .merging import merge
from .probing import probe
from .selecting import select
from .systems import cache_clear, cache_info, install_models, list_models, list_systems, reproduce
from .unlearning import unlearn

app = typer.Typer(
    name="subspan",
    help="Find, measure, use and map subspaces of learned representations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
models = typer.Typer(help="Pretrained models that are installed as packages.", no_args_is_help=True)
cache = typer.Typer(help="The folder of cached features, converted models and trained networks.", no_args_is_help=True)
app.add_typer(models, name="models")
app.add_typer(cache, name="cache")
for verb in (
    report,
    detect,
    select,
    cluster,
    shorten,
    align,
    upgrade,
    merge,
    compress,
    unlearn,
    audit,
    probe,
    forecast,
    embed_series,
):
    app.command()(verb)
app.command("list")(list_systems)
app.command()(reproduce)
models.command("list")(list_models)
models.command("install")(install_models)
cache.command("info")(cache_info)
cache.command("clear")(cache_clear)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"subspan {version('subspan')}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    data: Annotated[
        Path | None,
        typer.Option("--data", envvar="SUBSPAN_DATA", help="Folder of shared data sets.", show_default=False),
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find, measure, use and map subspaces of learned representations."""
    if data is not None:
        if not data.is_dir():
            raise ValueError(f"--data: {str(data)!r} is not a folder")
        os.environ["SUBSPAN_DATA"] = str(data.resolve())
