"""What a file is by its name. Light, so that a wrong name is said before anything heavy is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .reading import quoted, regular_file

SEPARATED = (".csv", ".tsv")
LINES = (".jsonl", ".ndjson")
TABLES = (".npy", ".npz", ".safetensors", ".parquet", ".arrow", ".feather", *SEPARATED, *LINES)
TEXTS = (".txt",)
ARCHIVES = (".zip",)
GRAPHS = (".edges", ".edgelist")
INDEXES = (".faiss", ".index", ".ivf", ".hnsw")
PACKED = (*SEPARATED, *LINES, *TEXTS, *GRAPHS)
"""What may be compressed, with .gz behind."""

NOT_READ = {
    **dict.fromkeys(GRAPHS, "an edge list: `subspan cluster` reads it beside --attributes TABLE"),
    **dict.fromkeys(
        (".graphml", ".gml", ".gexf", ".net"),
        "a graph: save its edges as an edge list, a row of attributes for each node as a table",
    ),
    ".mtx": "a sparse matrix: save it densely, as .npy",
    **dict.fromkeys(
        (".txt", ".md"), "a text: its lines are embedded by the command line, or by read_texts and SentenceEncoder"
    ),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".pth", ".joblib"),
        "a pickle, which could run code: save the numbers as .npy or .safetensors",
    ),
    **dict.fromkeys(INDEXES, "a FAISS index: open_index reads it"),
}


def suffix_of(path: str | os.PathLike[str]) -> str:
    """The suffix in lower case; of `x.csv.gz` the one before .gz."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] == [".gz"]:
        inner = suffixes[-2:-1]
        return inner[0] if inner and inner[0] in PACKED else ".gz"
    return suffixes[-1] if suffixes else ""


def check_input(argument: str, suffixes: Iterable[str] = (), *, folders: bool = True) -> None:
    """Refuse what cannot be an input by its name: a path where nothing is, a pipe, or a file of another suffix.

    suffixes: what a file may end in (anything, where there are none). folders: whether it may be one.
    """
    path = Path(argument)
    if not path.exists():
        raise ValueError(f"{quoted(argument, 200)}: there is no such file or folder")
    if path.is_dir():
        if not folders:
            raise ValueError(f"{quoted(argument, 200)} is a folder, a file is needed")
        return
    regular_file(path, "path")
    suffix, known = suffix_of(path), tuple(suffixes)
    if known and suffix not in known:
        what = f"is {NOT_READ[suffix]}" if suffix in NOT_READ else "is no table"
        raise ValueError(f"path: {str(path)!r} {what}; it is not one of {', '.join(known)}")
