"""`subspan detect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from subspan.base.outputs import Output, Outputs

from .options import (
    RANKS,
    SCORES,
    AsJson,
    Column,
    IdColumn,
    Labels,
    Seed,
    SkipNan,
    Table,
    TextColumn,
    check_inputs,
    parsed_rank,
)
from .printing import print_facts, print_json, print_line, print_table, progress_bar

Fit = Annotated[
    str | None,
    typer.Option("--fit", metavar="GOOD", help="Normal rows or images to fit to, instead of those that are scored."),
]
Rank = Annotated[str | None, typer.Option("--rank", "-k", help=f"{RANKS} By default 0.99.", show_default=False)]
Distance = Annotated[
    Literal["combined", "residual", "mahalanobis", "euclidean", "cosine"] | None,
    typer.Option(
        help="Rows: combined (by default) = in and out of the subspace and from the mean, of standardised columns;"
        " or of columns as they are: residual = outside the subspace, for rows fitted to good ones; mahalanobis,"
        " euclidean = inside it; cosine.",
        show_default=False,
    ),
]
ByLabel = Annotated[bool, typer.Option("--by-label", help="Score each row against the other rows of its own label.")]
LabelErrors = Annotated[
    bool, typer.Option("--label-errors", help="Ask the ten nearest rows of each for its label; score their dissent.")
]
Top = Annotated[int, typer.Option("--top", min=0, help="How many of the highest scores to print.")]
OutputFile = Annotated[Path | None, typer.Option("-o", "--output", help="Write every score: .csv, .json or .npy.")]
Shots = Annotated[
    int | None, typer.Option("--shots", min=1, help="Images: fit to so many good ones only, drawn by --seed.")
]
Rotations = Annotated[
    int | None,
    typer.Option(
        "--rotations",
        min=0,
        help="Images: rotated views of each good one to fit to as well (8 for up to 16 good ones, else none).",
        show_default=False,
    ),
]


Maps = Annotated[
    Path | None,
    typer.Option(
        "--maps", metavar="FOLDER", help="Images: write each test image with its scores over it to this new folder."
    ),
]


def detect(
    table: Table = None,
    fit: Fit = None,
    rank: Rank = None,
    distance: Distance = None,
    labels: Labels = None,
    by_label: ByLabel = False,
    label_errors: LabelErrors = False,
    top: Top = 10,
    output: OutputFile = None,
    shots: Shots = None,
    rotations: Rotations = None,
    maps: Maps = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score rows or images by their distance to the subspace of normal ones: the higher, the stranger.

    Rows: in standard deviations beyond what is usual, whatever the units of the columns; outliers are those more than
    three interquartile ranges above the upper quartile.

    An image folder (or zip) with train/good and test/… (the MVTec AD layout) is scored by patches: fitted to
    train/good, judged on test, with AUROC where there are defects. The threshold is the highest score of good images
    that were left out of a fit: of n of them, one new good image in n + 1 is expected above it.

    Examples:

    - `subspan detect vectors.npy -o scores.csv`

    - `subspan detect new.parquet --fit good.parquet --json`

    - `subspan detect vectors.parquet --labels class --by-label`

    - `subspan detect vectors.parquet --labels class --label-errors -o labels_to_check.csv`

    - `subspan detect bottle/ --shots 4 --rotations 8 --maps bottle_maps`
    """
    outputs = Outputs(Output("-o", output, SCORES), inputs=(table, fit, labels))
    if maps is not None:
        if maps.exists():
            raise ValueError(f"--maps: {str(maps)!r} exists; give a new folder")
        # Only checked: the folder is written whole or not at all by what makes it.
        Outputs(Output("--maps", maps), inputs=(table,))
    check_inputs(table, fit)
    ranked = parsed_rank(rank or "0.99")
    from subspan.datasets import anomaly_folder, is_anomaly_layout

    images = table is not None and is_anomaly_layout(table)
    _check_images(
        images,
        bool(fit or labels or by_label or label_errors or distance),
        bool(shots or rotations is not None or maps is not None),
    )
    _check_labels(label_errors, bool(fit or rank or by_label or distance), by_label and fit is not None)
    from subspan.commands import detect_images, detect_label_errors, detect_rows, read_rows

    reading = {"column": column, "text_column": text_column, "id_column": id_column, "skip_nan": skip_nan}
    with outputs, progress_bar("reading") as progress:
        if images:
            found = detect_images(
                anomaly_folder(str(table)), rank=ranked, shots=shots, rotations=rotations, maps=maps, seed=seed,
                progress=progress,
            )  # fmt: skip
        else:
            data = read_rows(table, labels=labels, progress=progress, **reading)
            good = None if fit is None else read_rows(fit, progress=progress, **reading)
            if label_errors:
                found = detect_label_errors(data, progress=progress)
            else:
                found = detect_rows(
                    data, good, rank=ranked, distance=distance or "combined", by_label=by_label, progress=progress
                )
        facts = {**found.facts, "top": found.highest(top)}
        if output is not None:
            found.write(outputs[output], "score")
            facts["output"] = str(output)
        if maps is not None:
            facts["maps"] = str(maps)
    if as_json:
        print_json(facts)
        return
    print_facts(facts, "top")
    if images and "threshold" not in facts:
        print_line("No threshold: fewer than three good images leave none to be left out.")
    print_table(facts["top"])


def _check_images(images: bool, for_rows: bool, for_images: bool) -> None:
    if images and for_rows:
        raise ValueError(
            "--fit, --labels, --by-label, --label-errors and --distance do not apply to a folder with train/good and "
            "test"
        )
    if not images and for_images:
        raise ValueError("--shots, --rotations and --maps: for a folder with train/good and test only")


def _check_labels(label_errors: bool, for_subspaces: bool, by_label_to_others: bool) -> None:
    if label_errors and for_subspaces:
        raise ValueError(
            "--label-errors: asks the neighbours, so --fit, --rank, --distance and --by-label do not apply"
        )
    if by_label_to_others:
        raise ValueError("--by-label: fits to the rows of each label, so --fit does not apply")
