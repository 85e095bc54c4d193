"""`subspan select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from subspan.base.outputs import Output, Outputs

from .options import (
    SCORES,
    AsJson,
    Column,
    IdColumn,
    Labels,
    Rank,
    Seed,
    SkipNan,
    Table,
    TextColumn,
    check_inputs,
    parsed_rank,
    parsed_size,
)
from .printing import print_facts, print_json, print_table, progress_bar


def select(
    table: Table = None,
    size: Annotated[
        str, typer.Option("-m", "--size", help="How many rows: a number, or a share of all (0.1).")
    ] = "0.1",
    method: Annotated[
        Literal["leverage", "sample", "medoids", "farthest", "random"],
        typer.Option(help="Highest leverage, drawn by leverage, cluster centres, farthest first, or random."),
    ] = "medoids",
    unique: Annotated[
        bool, typer.Option("--unique", help="Leave copies and near copies (cosine >= 0.99) of earlier rows out.")
    ] = False,
    rank: Rank = "0.9",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the chosen rows: .csv, .json, or .npy (row numbers).")
    ] = None,
    labels: Labels = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Choose a few rows that stand for all: the middles of clusters, or those that span the main subspace.

    What is printed as retention is the share of the data's energy in its main directions (`--rank`) that lies in those
    of the chosen rows: 1 where nothing of them is lost.

    Examples:

    - `subspan select vectors.npy -m 1000 -o chosen.csv`

    - `subspan select pool.parquet -m 0.16 --method sample --json`

    - `subspan select corpus.jsonl --text-column text -m 200 --unique`
    """
    outputs = Outputs(Output("-o", output, SCORES), inputs=(table, labels))
    check_inputs(table)
    ranked = parsed_rank(rank)
    from subspan.commands import read_rows, select_rows

    with outputs, progress_bar("reading") as progress:
        data = read_rows(
            table, labels=labels, column=column, text_column=text_column, id_column=id_column, skip_nan=skip_nan,
            progress=progress,
        )  # fmt: skip
        found = select_rows(
            data, parsed_size(size), method=method, unique=unique, rank=ranked, seed=seed, progress=progress
        )
        facts = dict(found.facts)
        if output is not None:
            found.write(outputs[output], "row")
            facts["output"] = str(output)
    if as_json:
        print_json({**facts, "indices": found.columns["row"]})
        return
    print_facts(facts)
    if output is None:
        shown = {name: values for name, values in found.columns.items() if name != "text"}
        print_table([dict(zip(shown, values)) for values in zip(*shown.values())])
