"""`subspan report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from subspan.base.files import write_text
from subspan.base.outputs import Output, Outputs

from .options import PAGES, Column, IdColumn, Labels, Seed, SkipNan, Table, TextColumn, check_inputs
from .printing import print_json, print_line, progress_bar


def report(
    table: Table = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="A second embedding of the same rows: can it replace the first?"),
    ] = None,
    labels: Labels = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    json_output: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the facts as JSON too (- for stdout).")
    ] = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
) -> None:
    """Write one page on what is in a set of embeddings and what can be done with it.

    Examples:

    - `subspan report` (the docstrings of this Python's standard library)

    - `subspan report vectors.npy --labels labels.txt -o report.html`

    - `subspan report old.parquet --against new.parquet --json facts.json`

    - `subspan report photos/`

    - `subspan report reviews.csv --text-column review --labels stars`
    """
    facts_file = None if json_output is None or str(json_output) == "-" else json_output
    outputs = Outputs(Output("-o", output, PAGES), Output("--json", facts_file), inputs=(table, against, labels))
    check_inputs(table, against)
    from subspan.commands import describe, read_rows
    from subspan.report import render

    reading = {"column": column, "text_column": text_column, "id_column": id_column, "skip_nan": skip_nan}
    with outputs, progress_bar("reading") as progress:
        data = read_rows(table, labels=labels, progress=progress, **reading)
        other = None if against is None else read_rows(against, progress=progress, **reading)
        facts = describe(data, other, seed=seed, progress=progress)
        progress("writing the page", 1.0)
        write_text(outputs[output], render(facts, data))
        text = json.dumps(facts, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        if facts_file is not None:
            write_text(outputs[facts_file], text)
    if json_output is not None and facts_file is None:
        print_json(facts)
    else:
        print_line(f"{output}: {facts['contents']['rows']} rows × {facts['contents']['columns']} columns")
