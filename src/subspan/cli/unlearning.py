"""`subspan unlearn`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from subspan.base.outputs import Output, Outputs

from .options import AsJson
from .printing import print_facts, print_json, print_table, progress_bar

_RECORDS = "question and answer (or prompt and completion, or text) a record: .jsonl, .csv"


def unlearn(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder of a causal language model of transformers.")
    ],
    forget: Annotated[Path, typer.Option("--forget", help=f"What is to be forgotten; {_RECORDS}.")],
    retain: Annotated[Path, typer.Option("--retain", help="What is to be kept, of the same kind and form.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the adapter, or checkpoint, to this new folder.")
    ] = None,
    method: Annotated[
        Literal["reglu", "fila", "lora", "null-space", "gradient-difference", "npo", "simnpo"],
        typer.Option(help="Start and loss of the update. In our record fila lost less of what is kept than reglu."),
    ] = "reglu",
    merged: Annotated[
        bool, typer.Option("--merged", help="Write the whole checkpoint with changed weights, not an adapter.")
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="Of the update.")] = 32,
    epochs: Annotated[int, typer.Option(min=1, help="Times over the answers to forget.")] = 5,
    learning_rate: Annotated[float, typer.Option(help="The largest one.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs of texts a pass.")] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Passes a step.")] = 8,
    beta: Annotated[
        float | None, typer.Option(help="Weight of what is kept against what is forgotten, in the start (0.7).")
    ] = None,
    orthogonality: Annotated[
        float | None, typer.Option(help="Weight of the penalty on directions of what is kept (reglu 0.5, else 0).")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Ask by 'Question: …' even where the tokenizer has a chat template.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of draws and orders.")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, its size and time, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a language model forget some answers and keep the others, by an adapter that plain peft loads.

    Figures before and after, in `report.html` too: probabilities of the answers, how much of the forgotten ones is
    still said, and the same with the model in 4 bits and after a little tuning on other texts, which should bring
    nothing back. A tenth of what is kept (64 at most) is held out. A run that was killed goes on when called again.

    Examples:

    - `subspan unlearn smollm2 --forget forget.jsonl --retain retain.jsonl --plan`

    - `subspan unlearn smollm2 --forget forget.jsonl --retain retain.jsonl -o adapter`

    - `subspan unlearn smollm2 --forget f.jsonl --retain r.jsonl --method npo --merged -o unlearned`
    """
    if output is not None and output.exists():
        raise ValueError(f"-o: {str(output)!r} exists; give a new folder")
    if output is None and not plan:
        raise ValueError("-o: give a new folder, or --plan")
    # Only checked: the folder is written whole or not at all by what makes it.
    Outputs(Output("-o", output), inputs=(model, forget, retain))
    if not model.is_dir():
        raise ValueError(f"MODEL: {str(model)!r} is not a folder")
    from subspan.commands.unlearning import Unlearning, figure_rows
    from subspan.report import render_unlearning

    options = {
        "rank": rank, "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size,
        "accumulate": accumulate, "beta": beta, "orthogonality": orthogonality, "random_state": seed,
    }  # fmt: skip
    job = Unlearning(model, forget, retain, method, merged, plain, options)
    rows: list[dict[str, Any]] = []
    if plan or output is None:
        facts = job.plan()
    else:
        with progress_bar("unlearning") as progress:
            facts = {**job.run(output, progress, render_unlearning), "output": str(output)}
        rows = figure_rows(facts.pop("figures"))
    if as_json:
        print_json({**facts, "figures": rows})
        return
    print_facts({name: value for name, value in facts.items() if not isinstance(value, list)})
    print_table(rows)
