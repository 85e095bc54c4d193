"""Tables of embeddings in files, read row block by row block where the format allows it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import safe_open

from .array_files import npy_header, npz_headers, open_npy, open_npz, open_safetensors
from .arrow_files import arrow_kinds, open_arrow
from .kinds import LINES, SEPARATED, TABLES, check_input, suffix_of
from .reading import check_memory, reading, regular_file, separated_rows
from .rows import Table, entry_texts
from .text_files import open_json_lines, open_separated


def read_table(
    path: str | os.PathLike[str],
    *,
    column: str | None = None,
    id_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
) -> Table:
    r"""Open a table of embeddings: .npy, .npz, .safetensors, .parquet, .arrow, .feather, .csv, .tsv or .jsonl.

    Parameters
    ----------
    path
        The file.
    column
        The array of an archive, or the column of vectors: lists of numbers, or texts of JSON lists. None: the only one
        that fits, or all numeric columns beside the others named here, without ids, pandas' index, whole numbers that
        only rise, and constant whole numbers (a warning names those).
    id_column, label_column, text_column
        Columns, or one-axis arrays of an archive, with an entry a row; ids default to a column called id, else to one
        of those left out.

    Returns
    -------
    Table

    Raises
    ------
    ValueError
        In one line, for what is missing, cut off, empty, ragged, not numeric, not two-dimensional, pickled, or unpacks
        to far more than it should.

    Examples
    --------
    >>> from pathlib import Path
    >>> from subspan.base import read_table
    >>> _ = Path("rows.csv").write_text("id,x,y\na,1,2\nb,3,4\n")
    >>> table = read_table("rows.csv")
    >>> table.shape, table.ids, table.array().tolist()
    ((2, 2), ('a', 'b'), [[1.0, 2.0], [3.0, 4.0]])
    """
    source = regular_file(path)
    names = {"ids": id_column, "labels": label_column, "texts": text_column}
    check_input(str(source), TABLES, folders=False)
    suffix = suffix_of(source)
    openers: dict[str, Callable[..., Table]] = {
        **dict.fromkeys(SEPARATED, open_separated), **dict.fromkeys(LINES, open_json_lines),
        ".npy": open_npy, ".npz": open_npz, ".safetensors": open_safetensors,
    }  # fmt: skip
    with reading(source, problem=f"is not a whole {suffix} file"):
        table = openers.get(suffix, open_arrow)(source, column, names)
    if 0 in table.shape:
        raise ValueError(f"path: {str(source)!r} is empty: {table.shape[0]} rows of {table.shape[1]} values")
    return table


def table_columns(path: str | os.PathLike[str]) -> dict[str, bool]:
    """Names of the columns or arrays of a file and whether each holds whole numbers, or {} where that cannot be said.

    Of texts, which have no types, none does.
    """
    source, suffix = Path(path), suffix_of(path)
    try:
        if suffix in (".parquet", ".arrow", ".feather"):
            return {name: kind == "integer" for name, kind in arrow_kinds(source).items()}
        if suffix == ".safetensors":
            with safe_open(source, framework="pt") as archive:
                return {name: archive.get_slice(name).get_dtype() == "I64" for name in archive.keys()}  # noqa: SIM118
        if suffix == ".npz":
            return {name: dtype.kind in "iu" for name, (_, dtype) in npz_headers(source).items()}
        if suffix in SEPARATED:
            return dict.fromkeys(next(separated_rows(source, "\t" if suffix == ".tsv" else ","), (0, []))[1], False)
    except ImportError:
        raise
    except Exception:  # the reader of the table says what is wrong with the file
        return {}
    return {}


def read_arrays(path: str | os.PathLike[str], name: str = "path") -> dict[str, np.ndarray]:
    """All arrays of an .npz archive. Raises ValueError for one that is damaged or larger than the memory."""
    source = regular_file(path, name)
    sizes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in npz_headers(source).values())
    check_memory(sizes, f"{name}: {str(source)!r}")
    with reading(source, name), np.load(source, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def read_entries(path: str | os.PathLike[str], name: str = "path") -> tuple[str, ...]:
    """The entries of a one-axis .npy array of texts or whole numbers, as texts. Raises ValueError for another."""
    source = regular_file(path, name)
    with reading(source, name):
        with source.open("rb") as stream:
            shape, dtype = npy_header(stream, str(source))
        if len(shape) != 1 or dtype.kind not in "iubUS":
            what = "pickled objects" if dtype.hasobject else f"{dtype} of shape {shape}"
            raise ValueError(f"{name}: {str(source)!r} holds {what}; one label or id a row is needed")
        values = np.load(source, mmap_mode="r" if math.prod(shape) * dtype.itemsize else None, allow_pickle=False)
        return entry_texts(values, f"{name}: row {{}} of {str(source)!r}")
