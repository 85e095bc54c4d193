"""`subspan embed-series`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from subspan.base.outputs import Output, Outputs

from .options import PAGES, AsJson, Seed, check_inputs
from .printing import print_json, print_line, print_table, progress_bar

_SERIES = (".csv", ".tsv", ".npy", ".npz", ".parquet", ".arrow", ".feather")
_LEAST = 16


Files = Annotated[
    list[str], typer.Argument(metavar="FILE…", help="A row a moment: .csv, .tsv, .parquet, .npy, .npz. See --id.")
]
Window = Annotated[int, typer.Option(min=_LEAST, help="Rows of a window.")]
Stride = Annotated[int | None, typer.Option(min=1, help="Rows from one window to the next. Default: half a window.")]
Label = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="What a first look tries to read from the features. Never learnt from."),
]
Model = Annotated[Path | None, typer.Option(metavar="SAVED", help="Use what --save wrote, and train nothing.")]
Save = Annotated[Path | None, typer.Option(help="Write the trained model: .safetensors.")]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, help="Passes over the windows. Default: 30, of few windows more.", show_default=False),
]
Width = Annotated[int, typer.Option(min=2, help="Of the encoders; features are 12 times as many.")]
PerWindow = Annotated[
    bool, typer.Option("--per-window", help="Level and strength of a window count for nothing (pulse, sound).")
]
Channels = Annotated[
    str | None, typer.Option(metavar="A,B,…", help="The columns to read. Default: all numbers but the label.")
]
TimeColumn = Annotated[str | None, typer.Option("--time", metavar="COLUMN", help="Numbers or dates. Default: by name.")]
IdColumn = Annotated[
    str | None, typer.Option("--id", metavar="COLUMN", help="Tells several series in one table apart.")
]
Array = Annotated[str | None, typer.Option(help="Of an .npz: the array, or a pattern such as 'run_*', each a series.")]
ChannelsFirst = Annotated[
    bool, typer.Option("--channels-first", help="Arrays are (channels, rows), not (rows, channels).")
]
Gaps = Annotated[
    Literal["refuse", "fill", "cut"], typer.Option(help="Missing values and rows: fill linearly, or cut there.")
]
EquallySpaced = Annotated[
    bool, typer.Option("--equally-spaced", help="Take rows as equally spaced, whatever their times are.")
]
OutputFile = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Write the features: .npy alone, .npz or .parquet with their windows."),
]
WindowTable = Annotated[Path | None, typer.Option("--windows", help="Write where each window was cut: .csv or .json.")]
Page = Annotated[Path | None, typer.Option("--report", help="Write a page: a map, and what is read. .html")]


def embed_series(
    files: Files,
    window: Window = 128,
    stride: Stride = None,
    label: Label = None,
    model: Model = None,
    save: Save = None,
    epochs: Epochs = None,
    width: Width = 16,
    per_window: PerWindow = False,
    channels: Channels = None,
    time_column: TimeColumn = None,
    id_column: IdColumn = None,
    array: Array = None,
    channels_first: ChannelsFirst = False,
    gaps: Gaps = "refuse",
    equally_spaced: EquallySpaced = False,
    output: OutputFile = None,
    table: WindowTable = None,
    page: Page = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Features of windows of sensor series, learnt without labels, for a classifier that has few of them.

    Windows are seen in time, as a spectrum and as a scalogram, and encoders learn which views belong together; nothing
    is augmented. With --label a linear probe says what the features tell in series that it did not learn from, beside
    the plain spectrum and the samples, which may be better.

    Examples:

    - `subspan embed-series walks.csv --window 128 -o features.npy --report walks.html`

    - `subspan embed-series day1.parquet day2.parquet --id watch --label activity -o features.parquet`

    - `subspan embed-series watch_har.npz --array signal --label y --window 200 --save views.safetensors`

    - `subspan embed-series new.csv --model views.safetensors -o new.npz --json`
    """
    inputs: tuple[Any, ...] = (*files, model)
    outputs = Outputs(
        Output("-o", output, (".npy", ".npz", ".parquet")), Output("--windows", table, (".csv", ".json")),
        Output("--save", save, (".safetensors",)), Output("--report", page, PAGES), inputs=inputs,
    )  # fmt: skip
    check_inputs(*files, kinds=_SERIES)
    if model is not None and save is not None:
        raise ValueError("--save: --model is saved already")
    if model is not None and not model.is_file():
        raise ValueError(f"--model: no file {str(model)!r}")
    from subspan.base.files import write_rows, write_text
    from subspan.commands.series_features import cut_windows, embed_windows, write_features
    from subspan.report import render_series

    with outputs, progress_bar("reading") as progress:
        windows = cut_windows(
            [Path(name) for name in files], window, stride or max(1, window // 2), label=label,
            channels=None if channels is None else channels.split(","), time_column=time_column, id_column=id_column,
            array=array, channels_first=channels_first, gaps=gaps, equally_spaced=equally_spaced,
        )  # fmt: skip
        features, facts = embed_windows(
            windows, model=model, save=None if save is None else outputs[save], epochs=epochs, width=width,
            per_window=per_window, seed=seed, progress=progress,
        )  # fmt: skip
        facts = {"source": ", ".join(Path(name).name for name in files), "label": label, **facts}
        if output is not None:
            write_features(outputs[output], features, windows.columns)
        if table is not None:
            write_rows(outputs[table], windows.columns)
        if page is not None:
            write_text(outputs[page], render_series(facts))
    named = {"output": output, "windows_table": table, "model_saved": save, "report": page}
    facts |= {name: str(path) for name, path in named.items() if path is not None}
    print_json(facts) if as_json else _print_series(facts)


def _print_series(facts: dict[str, Any]) -> None:
    many = f"{facts['windows']} windows of {facts['length']} rows and {len(facts['channels'])} channels"
    print_line(f"{facts['source']}: {many}, from {facts['series']} series")
    if facts["model"] is None:
        said = f"{facts['features']} features, learnt in {facts['epochs']} epochs"
        print_line(f"{said}; 99 % of their variance is in {facts['dimensions']} directions")
    else:
        print_line(f"{facts['features']} features by {facts['model']}")
    probe = facts["probe"]
    if probe is not None and probe["told"] is None:
        print_line(f"{facts['label']}: not read, {probe['reason']}")
    elif probe is not None:
        print_line(f"{facts['label']}, {probe['told']} of a linear probe in {probe['how']} ({probe['held']} windows):")
        print_table(
            [
                {"labels": f"{row['share']:.0%}", "windows": row["windows"]}
                | {name: row[name] for name in ("features", "spectrum", "samples")}
                for row in probe["rows"]
            ]
        )
    for what in ("output", "windows_table", "model_saved", "report"):
        if what in facts:
            print_line(f"{what.replace('_', ' ')} {facts[what]}")
