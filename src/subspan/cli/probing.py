"""`subspan probe`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from subspan.base.outputs import Output, Outputs

from .options import AsJson, Seed
from .printing import print_facts, print_json, print_line, print_table, progress_bar


def probe(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder of transformers, or an installed model (smollm2, minilm).")
    ],
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts and what is read of them: .csv, .tsv, .jsonl, .parquet. Else Python's docstrings."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column of classes.")] = None,
    value: Annotated[str | None, typer.Option(help="Or the column of numbers.")] = None,
    order: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Words of --value from least to most: low,medium,high.")
    ] = None,
    text_column: Annotated[str | None, typer.Option("--text-column", help="The column of texts.")] = None,
    span: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="A word or part of each text: its tokens are read, not all.")
    ] = None,
    code: Annotated[
        bool, typer.Option("--code", help="Read the syntax trees of Python functions (--texts: of your own code).")
    ] = False,
    other: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Also say what erasing costs these classes.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="0,6,12 or 0-30:3", help="0 goes into the first block. Default: all.")
    ] = None,
    pool: Annotated[Literal["mean", "last"], typer.Option(help="Over the tokens that are read.")] = "mean",
    max_texts: Annotated[int, typer.Option(min=40, help="Texts that are read, drawn in proportion.")] = 600,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens of a text that are read.")] = 128,
    neutral: Annotated[
        Path | None, typer.Option(help="Texts (.txt, .jsonl, .csv) whose perplexity erasing should not change.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write page, subspace and eraser to this new folder.")
    ] = None,
    skip_nan: Annotated[
        bool, typer.Option("--skip-nan", help="Leave records with something missing out, and say how many.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be read, its size and time, and stop.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Where does a model keep a property: in which layers, in how many dimensions, and what does erasing it cost?

    All layers are read in one pass, by linear probes on texts that they did not learn from, beside the words alone,
    shuffled labels, random dimensions and the commonest label: these decide the verdict. The folder (-o) has the page,
    the subspace, and the map that erases the property and moves states least. States are kept in the cache: another
    column of the same file takes no second pass, and a run that was stopped goes on.

    Examples:

    - `subspan probe smollm2` (docstrings of the standard library, by module)

    - `subspan probe MODEL --texts reviews.csv --label stars -o stars`

    - `subspan probe MODEL --texts reviews.csv --value stars --other product`

    - `subspan probe MODEL --texts senses.jsonl --label sense --span word --pool last`

    - `subspan probe MODEL --code --layers 0-30:6 -o syntax`
    """
    if output is not None and output.exists():
        raise ValueError(f"-o: {str(output)!r} exists; give a new folder")
    files = [path for path in (texts, neutral) if path is not None]
    # Only checked: the folder is written whole or not at all by what makes it.
    Outputs(Output("-o", output), inputs=(model, *files))
    for option, path in (("--texts", texts), ("--neutral", neutral)):
        if path is not None and not path.is_file():
            raise ValueError(f"{option}: {str(path)!r} is not a file")
    columns = {
        "label": label, "value": value, "order": tuple(order.split(",")) if order else (), "span": span,
        "text_column": text_column, "others": tuple(other or ()), "skip_nan": skip_nan,
    }  # fmt: skip
    if texts is None or code:
        for name, given in columns.items():
            if given and not (name == "text_column" and texts is not None):
                why = "--code reads syntax trees alone" if code else "needs --texts"
                raise ValueError(f"--{name.replace('_', '-').replace('others', 'other')}: {why}")
    if order and value is None:
        raise ValueError("--order: needs --value, the column whose words it orders")
    numbers = None if layers is None else parsed_layers(layers)
    from subspan.commands.probing import Probing
    from subspan.commands.probing_code import CodeProbing
    from subspan.report import render_probe

    job: Any
    if code:
        job = CodeProbing(model, texts, text_column, numbers, max_texts, neutral, seed)
    else:
        job = Probing(model, texts, columns, numbers, pool, max_texts, max_tokens, neutral, seed)
    if plan:
        facts = job.plan()
        print_json(facts) if as_json else print_facts(facts)
        return
    with progress_bar("probing") as progress:
        facts = job.run(output, progress, render_probe)
    if output is not None:
        facts["output"] = str(output)
    print_json(facts) if as_json else _print_probe(facts)


def parsed_layers(text: str) -> tuple[int, ...]:
    """`--layers`: numbers and ranges, a step behind a colon."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(-?\d+)(?:-(\d+)(?::(\d+))?)?", part.strip())
        if match is None or match[3] == "0":
            raise ValueError(f"--layers: numbers (0,6,12) or ranges (0-30:3) are needed, got {part.strip()!r}")
        first = int(match[1])
        found += [first] if match[2] is None else range(first, int(match[2]) + 1, int(match[3] or 1))
    if not found:
        raise ValueError(f"--layers: {text!r} names none")
    return tuple(found)


def _print_probe(facts: dict[str, Any]) -> None:
    print_line(f"{facts['property']} in {facts['model']}: {facts['reason']}")
    said = [f"{count} {reason}" for reason, count in facts["left_out"].items()]
    if facts["cut"]:
        said.append(f"{facts['cut']} read in part, to {facts['max_tokens']} tokens")
    print_line("; ".join([f"{facts['texts']} texts", *said]))
    print_table(
        [
            {"layer": row["layer"], "score": row["score"], "low": row["low"], "high": row["high"]}
            | ({} if row["shuffled"] is None else {"shuffled": row["shuffled"]})
            for row in facts["layers"]
        ]
    )
    print_table(
        [
            {"dimensions": row["rank"], "score": "" if row["score"] is None else f"{row['score']:.4g}"}
            | {"random": row["random"], "shuffled": "" if row["shuffled"] is None else f"{row['shuffled']:.4g}"}
            for row in facts["ranks"]
        ]
    )
    print_table(
        [
            {"taken out": row["way"], "read": row["name"] or facts["property"], "score": row["score"]}
            | {"chance": row["chance"]}
            for row in facts["erased"]
        ]
    )
    if facts["perplexity"]:
        shown = ", ".join(f"without {way} {number:.4g}" for way, number in facts["perplexity"].items())
        print_line(f"perplexity of neutral text: {shown}")
    if "output" in facts:
        print_line(f"page {facts['output']}/report.html")
