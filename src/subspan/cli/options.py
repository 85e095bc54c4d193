"""Arguments and options that several verbs have, and the checks of them that need nothing heavy."""

from __future__ import annotations

from typing import Annotated

import typer

from subspan.base.kinds import ARCHIVES, TABLES, TEXTS, check_input

ROWS = (*TABLES, *TEXTS, *ARCHIVES)
PAGES = (".html", ".htm")
SCORES = (".csv", ".json", ".npy")

Table = Annotated[
    str | None,
    typer.Argument(
        metavar="TABLE|FOLDER",
        help="Embeddings (.npy, .npz, .safetensors, .parquet, .csv), texts (.txt, .jsonl, or .csv with --text-column), "
        "or a folder or zip of images. Left out: the docstrings of this Python's standard library.",
        show_default=False,
    ),
]
Labels = Annotated[
    str | None, typer.Option("--labels", metavar="COLUMN|FILE", help="A label for each row: a column, or a file.")
]
Column = Annotated[
    str | None, typer.Option("--column", help="The column or array with the embeddings, where there are several.")
]
TextColumn = Annotated[str | None, typer.Option("--text-column", help="The column of texts to embed.")]
IdColumn = Annotated[str | None, typer.Option("--id-column", help="The column that names the rows.")]
Collection = Annotated[str | None, typer.Option(help="Which collection of Qdrant, if there are several.")]
SkipNan = Annotated[bool, typer.Option("--skip-nan", help="Leave rows with NaN or infinity out, and say how many.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all sampling.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
RANKS = (
    "Directions to keep: a number, a share of the variance (0.95), or marchenko-pastur, gavish-donoho, effective or "
    "elbow."
)
Rank = Annotated[str, typer.Option("--rank", "-k", help=RANKS)]
RANK_RULES = ("marchenko-pastur", "gavish-donoho", "effective", "elbow")


def parsed_rank(text: str) -> int | float | str:
    """`--rank` as the library takes it."""
    rank = _number(text)
    if rank is None and text not in RANK_RULES:
        raise ValueError(f"--rank: {text!r} is neither a number nor one of {', '.join(RANK_RULES)}")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"--rank: must be at least 1, got {text}")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"--rank: a share of the variance lies in (0, 1], got {text}")
    return text if rank is None else rank


def parsed_size(text: str) -> int | float:
    """`--size` as a number of rows or a share of them."""
    size = _number(text)
    if size is None:
        raise ValueError(f"--size: a number of rows or a share is needed, got {text!r}")
    return size


def _number(text: str) -> int | float | None:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return None


def check_inputs(*names: str | None, kinds: tuple[str, ...] = ROWS) -> None:
    """Refuse inputs that cannot be read by their names, before anything heavy is loaded."""
    for name in names:
        if name is not None and "://" not in name:
            check_input(name, kinds)
