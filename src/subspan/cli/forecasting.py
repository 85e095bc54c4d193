"""`subspan forecast`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from subspan.base.outputs import Output, Outputs

from .options import PAGES, AsJson, check_inputs, parsed_rank
from .printing import print_json, print_line, print_table, progress_bar

_SERIES = (".csv", ".tsv", ".npy", ".npz", ".parquet", ".arrow", ".feather")


def forecast(
    series: Annotated[
        str, typer.Argument(metavar="SERIES", help="A row a moment: .csv, .tsv, .parquet, .npy, .npz. See --id.")
    ],
    steps: Annotated[int, typer.Option(min=1, help="How far ahead, in rows.")] = 50,
    delays: Annotated[
        str, typer.Option(metavar="auto|N", help="Rows that make a state: a row and those before it.")
    ] = "auto",
    rank: Annotated[
        str, typer.Option("--rank", "-k", metavar="auto|R", help="Directions kept; a number, a share, or a rule.")
    ] = "auto",
    channels: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="The columns to forecast. Default: all numbers.")
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Columns that act on the others and are not forecast.")
    ] = None,
    time_column: Annotated[
        str | None, typer.Option("--time", metavar="COLUMN", help="Numbers or dates. Default: by name.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option("--id", metavar="COLUMN", help="Tells several trajectories in one table apart.")
    ] = None,
    array: Annotated[
        str | None, typer.Option(help="Of an .npz: the array, or a pattern such as 'run_*', each a trajectory.")
    ] = None,
    channels_first: Annotated[
        bool, typer.Option("--channels-first", help="Arrays are (channels, rows), not (rows, channels).")
    ] = False,
    time_step: Annotated[
        float | None, typer.Option("--time-step", help="Between two rows, where the file does not say it.")
    ] = None,
    gaps: Annotated[
        Literal["refuse", "fill", "cut"], typer.Option(help="Missing values and rows: fill linearly, or cut there.")
    ] = "refuse",
    equally_spaced: Annotated[
        bool, typer.Option("--equally-spaced", help="Take rows as equally spaced, whatever their times are.")
    ] = False,
    level: Annotated[float, typer.Option(help="How often an interval is to hold what comes.")] = 0.9,
    forecasts: Annotated[
        Path | None, typer.Option("--forecasts", help="Write what is forecast: .csv or .json, a row a value.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a page: series, forecasts, modes. .html")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What comes next in a series, how sure is it, and of which oscillations and decays is it made?

    A linear operator (DMD with delays) is fitted in one pass. Delays and rank are chosen by roll-outs on a part that is
    not fitted, and the last quarter (at least --steps rows) judges it beside persistence, the last season and the
    mean, with how often the intervals held. The forecast itself is then fitted to all rows. Inputs are known in what is
    judged; ahead of the end, their last values go on.

    Examples:

    - `python -c "import numpy as np; t = np.arange(400); np.save('wave.npy', np.sin(t / 8) + np.sin(t / 3))"`

    - `subspan forecast wave.npy -o wave.html`

    - `subspan forecast sales.csv --steps 12 --forecasts next.csv`

    - `subspan forecast sensors.parquet --id machine --inputs load,valve --gaps fill --forecasts next.csv`

    - `subspan forecast signals.npz --array 'sig_*' --channels-first --time-step 0.008 --json`
    """
    suffixes = (".csv", ".json")
    outputs = Outputs(Output("-o", output, PAGES), Output("--forecasts", forecasts, suffixes), inputs=(series,))
    check_inputs(series, kinds=_SERIES)
    if not 0 < level < 1:
        raise ValueError(f"--level: must lie in (0, 1), got {level}")
    ranked = rank if rank == "auto" else parsed_rank(rank)
    wanted = _parsed_delays(delays)
    acting, kept = ([] if names is None else names.split(",") for names in (inputs, channels))
    if both := sorted(set(acting) & set(kept)):
        raise ValueError(f"--inputs: {both[0]!r} is one of --channels too")
    from subspan.base.files import write_rows, write_text
    from subspan.commands.forecasting import forecast_series, part_inputs
    from subspan.datasets import read_series
    from subspan.report import render_forecast

    with outputs, progress_bar("reading") as progress:
        read = read_series(
            series, channels=[*kept, *acting] if kept else None, time_column=time_column, id_column=id_column,
            array=array, channels_first=channels_first, time_step=time_step, gaps=gaps, equally_spaced=equally_spaced,
        )  # fmt: skip
        parted = part_inputs(read, acting)
        facts, columns = forecast_series(
            parted.series, steps=steps, delays=wanted, rank=ranked, inputs=parted.inputs, level=level,
            progress=progress,
        )  # fmt: skip
        if forecasts is not None:
            write_rows(outputs[forecasts], columns)
        if output is not None:
            write_text(outputs[output], render_forecast(facts))
    print_json(facts) if as_json else _print_forecast(facts, output, forecasts)


def _parsed_delays(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--delays: a number of rows or auto is needed, got {text!r}")
    return int(text)


def _print_forecast(facts: dict[str, Any], output: Path | None, forecasts: Path | None) -> None:
    many = f"{facts['trajectories']} trajectories, " if facts["trajectories"] > 1 else ""
    filled = f", {facts['filled']} values filled" if facts["filled"] else ""
    print_line(f"{facts['source']}: {many}{facts['rows']} rows of {len(facts['channels'])} channels{filled}")
    rank = "all directions" if facts["rank"] is None else f"rank {facts['rank']}"
    print_line(f"operator: {facts['delays']} delays, {rank} ({facts['dimensions']} dimensions), chosen by roll-outs")
    print_table(_errors(facts))
    rival = facts["best_rival"]
    verdict = "better than" if facts["better"] else "no better than"
    print_line(
        f"error over {facts['steps']} steps, in deviations of a channel, {facts['origins']} forecasts held out: "
        f"{facts['error']['operator']:.3g}, {verdict} {rival} ({facts['error'][rival]:.3g})"
    )
    print_line(f"intervals of {facts['level']:.0%} held {facts['coverage']:.0%} of what came")
    unit = f" ({facts['time_unit']})" if facts["time_unit"] else ""
    print_table(
        [
            {f"period{unit}": "-" if mode["period"] is None else f"{mode['period']:.4g}"}
            | {f"decay time{unit}": "lasts" if mode["decay"] is None else f"{mode['decay']:.4g}"}
            | {"energy": f"{mode['energy']:.1%}", "most in": mode["channel"]}
            for mode in facts["modes"][:8]
        ]
    )
    for what, path in (("page", output), ("forecasts", forecasts)):
        if path is not None:
            print_line(f"{what} {path}")


def _errors(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors at a few steps ahead, a row a forecaster."""
    last = facts["steps"]
    horizons = sorted({1, max(1, last // 4), max(1, last // 2), last})
    return [
        {"error": name} | {f"step {h}": errors[h - 1] for h in horizons} | {"all": facts["error"][name]}
        for name, errors in facts["errors"].items()
    ]
