"""`subspan compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from subspan.base.outputs import Output, Outputs

from .options import AsJson
from .printing import print_facts, print_json, print_table, progress_bar


def compress(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder of transformers with safetensors weights.")],
    ratio: Annotated[float, typer.Option(help="Share of the bits of the linear layers to save.")] = 0.2,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the compressed checkpoint to this new folder.")
    ] = None,
    solver: Annotated[
        Literal["procrustes", "ksvd", "mod", "rocket", "svd", "2:4", "round"],
        typer.Option(help="A dictionary with sparse codes (the first four), a low rank, a mask, or rounding."),
    ] = "procrustes",
    allocation: Annotated[
        Literal["uniform", "errors"], typer.Option(help="The same share for all layers, or by what each would lose.")
    ] = "uniform",
    text: Annotated[
        Path | None, typer.Option(help="Calibration texts (.txt, .jsonl, .csv); else docstrings of Python's library.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each sequence.")] = 256,
    exclude: Annotated[str | None, typer.Option(help="Regular expression of layers that stay as they are.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, its size and time, and stop.")] = False,
    top: Annotated[int, typer.Option("--top", min=0, help="How many layers to list, the worst first.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Put the linear layers of a checkpoint into fewer bits on data, without training.

    Beside the weights: the factors, a table of the layers, a card, and `report.html`. Of a causal model the perplexity
    on text that follows the calibration is measured before, after, and by rounding each number to as many bits, which
    costs nothing and is hard to beat. Error: relative change of a layer's outputs on the calibration texts. Embeddings
    and head stay as they are.

    Examples:

    - `subspan compress smollm2 --ratio 0.3 --plan`

    - `subspan compress smollm2 --ratio 0.3 --text wiki.txt -o small`
    """
    if output is not None and output.exists():
        raise ValueError(f"-o: {str(output)!r} exists; give a new folder")
    if output is None and not plan:
        raise ValueError("-o: give a new folder, or --plan")
    # Only checked: the folder is written whole or not at all by what makes it.
    Outputs(Output("-o", output), inputs=(model, *([] if text is None else [text])))
    if not model.is_dir():
        raise ValueError(f"MODEL: {str(model)!r} is not a folder")
    if not 0 < ratio < 1:
        raise ValueError(f"--ratio: in (0, 1), got {ratio}")
    from subspan.commands.compressing import Compression
    from subspan.report import render_compression

    job = Compression(model, ratio, solver, allocation, exclude, text, sequences, tokens)
    rows: list[dict[str, Any]] = []
    if plan or output is None:
        facts = job.plan()
    else:
        with progress_bar("compressing") as progress:
            facts = {**job.run(output, progress, render_compression), "output": str(output)}
        rows = sorted(facts.pop("layers"), key=lambda row: -row["error"])
    if as_json:
        print_json({**facts, "layers": rows})
        return
    print_facts(facts)
    print_table(rows[:top])
