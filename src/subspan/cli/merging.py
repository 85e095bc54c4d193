"""`subspan merge`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from subspan.base.outputs import Output, Outputs

from .options import AsJson
from .printing import print_facts, print_json, print_table, progress_bar

_FOLDER = "a folder with safetensors weights"


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help=f"What the experts were tuned from: {_FOLDER}.")],
    experts: Annotated[list[Path], typer.Argument(metavar="EXPERT...", help=f"One or more, each {_FOLDER}.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the merged checkpoint to this new folder.")
    ] = None,
    method: Annotated[
        Literal["average", "task-arithmetic", "ties", "dare", "tsv", "iso-c", "iso-cts"],
        typer.Option(help="Sums (the first four), or singular vectors that are made orthogonal or equally strong."),
    ] = "tsv",
    scaling: Annotated[
        float | None, typer.Option(help="Factor of the merged update: 0.3 for task-arithmetic and dare, else 1.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="ties: share of each update that is kept (0.2).")] = None,
    drop: Annotated[float | None, typer.Option(help="dare: share of each update that is dropped (0.9).")] = None,
    common_share: Annotated[
        float | None, typer.Option(help="iso-cts: share of the directions that all experts share (0.8).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="dare: seed of the draws (0).")] = None,
    overlaps: Annotated[
        bool, typer.Option(help="Show how the experts' updates overlap, matrix by matrix, before merging.")
    ] = True,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, its size and time, and stop.")] = False,
    top: Annotated[int, typer.Option("--top", min=0, help="How many matrices to list by their overlap.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Make several fine-tuned checkpoints of one base into one, tensor by tensor, in the memory of a few tensors.

    Overlap: how far the directions that two experts write to are the same, as mean squared cosine of principal angles;
    beside it what random directions of the same number would give. Where it is far above chance the experts quarrel, or
    agree: `ties`, `tsv` and `iso-cts` are made for that; where it is at chance, sums do.

    Examples:

    - `subspan merge llama-base llama-math llama-code --plan`

    - `subspan merge llama-base llama-math llama-code -o merged`

    - `subspan merge base one two three --method ties --density 0.3 -o merged --no-overlaps`
    """
    if output is not None and output.exists():
        raise ValueError(f"-o: {str(output)!r} exists; give a new folder")
    # Only checked: the folder is written whole or not at all by what makes it.
    Outputs(Output("-o", output), inputs=(base, *experts))
    for name, path in (("BASE", base), *(("EXPERT", path) for path in experts)):
        if not path.is_dir():
            raise ValueError(f"{name}: {str(path)!r} is not a folder")
    from subspan.commands.merging import Merge, overlap_facts
    from subspan.report import render_merge

    options = {
        "scaling": scaling, "density": density, "drop": drop, "common_share": common_share, "random_state": seed,
    }  # fmt: skip
    job = Merge(base, tuple(experts), method, options)
    facts = job.plan()
    rows: list[dict[str, object]] = []
    if not plan:
        with progress_bar("reading") as progress:
            if overlaps and len(experts) > 1:
                started = time.perf_counter()
                rows = job.overlaps(progress)
                facts |= overlap_facts(rows) | {"overlap_seconds": time.perf_counter() - started}
            if output is not None:
                started = time.perf_counter()
                facts |= job.run(output, progress, lambda made: render_merge({**made, "overlaps": rows}))
                facts |= {"merge_seconds": time.perf_counter() - started, "output": str(output)}
    if as_json:
        print_json({**facts, "overlaps": rows})
        return
    print_facts(facts)
    print_table(rows[:top])
