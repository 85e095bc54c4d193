"""Stored collections of vectors behind one interface: rows with their ids, read in blocks, whatever holds them.

FAISS index files, tables (.npy, .safetensors, .parquet, …), folders of such tables as shards, and Qdrant collections.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from subspan.base import read_table
from subspan.base.kinds import INDEXES
from subspan.base.reading import reading, regular_file, text_lines
from subspan.base.rows import Matrix, Parts, text_array
from subspan.base.tables import read_entries, table_columns

from .faiss_files import open_faiss
from .qdrant import is_qdrant, open_qdrant
from .rows import Rows, check_unique

_ID_COLUMNS = ("id", "ids", "_id")
_SHARD_SUFFIXES = (".npy", ".safetensors", ".parquet")


def is_stored(source: str) -> bool:
    """Whether `open_index` alone reads it: a FAISS file, Qdrant, or a folder of tables."""
    path = Path(source)
    if is_qdrant(source) or path.suffix.lower() in INDEXES:
        return True
    return path.is_dir() and any(entry.suffix.lower() in _SHARD_SUFFIXES for entry in path.iterdir())


def open_index(
    source: str | os.PathLike[str] | Any,
    *,
    ids: str | os.PathLike[str] | None = None,
    column: str | None = None,
    id_column: str | None = None,
    label_column: str | None = None,
    collection: str | None = None,
) -> Rows:
    """Open stored vectors: a FAISS file, a table, a folder of tables (shards), or a Qdrant folder, address or client.

    Parameters
    ----------
    source
        Path, address or client.
    ids
        A file with one id a row (.npy of whole numbers or texts, or .txt), for formats that hold none.
    column
        The vectors; of Qdrant a named vector.
    id_column
        Their ids. None: a column named id, else the row numbers.
    label_column
        Their labels, of a table.
    collection
        Which one of Qdrant, where there are several.

    Returns
    -------
    Rows

    Raises
    ------
    ValueError
        In one line, for what is damaged, ragged, empty or ambiguous.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.datasets import open_index
    >>> np.save("stored.npy", np.eye(3, dtype=np.float32))
    >>> rows = open_index("stored.npy")
    >>> rows.shape, rows.norms()
    ((3, 3), (1.0, 1.0))
    """
    if is_qdrant(source):
        if ids is not None or id_column is not None:
            raise ValueError("ids: a Qdrant collection has its own ids")
        opened = Rows(kind="qdrant", **open_qdrant(source, collection, column))
    else:
        path = Path(source)
        if collection is not None:
            raise ValueError(f"collection: {str(path)!r} is no Qdrant folder, address or client")
        if not path.exists():
            raise ValueError(f"{str(path)!r} does not exist")
        if path.is_dir():
            opened = _open_shards(path, column, id_column)
        elif path.suffix.lower() in INDEXES:
            if column is not None or id_column is not None:
                raise ValueError(f"column: {str(path)!r} is a FAISS index without columns")
            opened = Rows(kind="faiss", **open_faiss(path))
        else:
            opened = _open_table(path, column, id_column, label_column)
    if ids is not None:
        opened = _with_ids(opened, Path(ids))
    try:
        check_unique(opened.ids, opened.source)
    except ValueError as error:
        raise ValueError(
            f"{error}: {len(np.unique(opened.ids))} ids for {len(opened)} vectors; number the vectors themselves, and "
            "keep beside which item each is of"
        ) from error
    return opened


def read_ids(path: str | os.PathLike[str]) -> Shaped[np.ndarray, " n"]:
    """Ids of a file, one a row: .npy (whole numbers or texts) or lines of text."""
    source = regular_file(path, "ids")
    with reading(source, "ids"):
        if source.suffix.lower() != ".npy":
            return text_array([line.rstrip("\n") for _, line in text_lines(source)], f"ids: {str(source)!r}")
        names = text_array(read_entries(source, "ids"), f"ids: {str(source)!r}")
        return _whole(names) if np.load(source, allow_pickle=False).dtype.kind in "iu" else names


def _with_ids(opened: Rows, path: Path) -> Rows:
    if not opened.numbered:
        raise ValueError(f"ids: {opened.source} has ids of its own")
    ids = read_ids(path)
    if len(ids) != len(opened):
        raise ValueError(f"ids: {str(path)!r} has {len(ids)} ids for {len(opened)} vectors of {opened.source}")
    # The file has them by row number; an inverted file gives its rows in another order.
    return dataclasses.replace(opened, ids=ids[opened.ids], numbered=False)


# ---------------------------------------------------------------------- tables


def open_table(
    path: str | os.PathLike[str],
    *,
    column: str | None = None,
    id_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
) -> Rows:
    r"""The rows of a file of numbers, under the ids of their column where there is one.

    Parameters
    ----------
    path
        .npy, .npz, .safetensors, .parquet, .arrow, .feather, .csv, .tsv or .jsonl.
    column
        The array of an archive, or the column of vectors. None: the only one that fits, or all numeric columns that are
        neither named here nor ids or counters (a warning names those).
    id_column, label_column, text_column
        Columns, or arrays of an archive, with an entry a row. Ids default to a column called id, else to a counter that
        was left out.

    Returns
    -------
    Rows

    Raises
    ------
    ValueError
        Naming file and line, for what is not readable as numbers, and columns that there are not.

    Examples
    --------
    >>> from pathlib import Path
    >>> from subspan.datasets import open_table
    >>> _ = Path("points.csv").write_text("id,x,y\na,0,1\nb,2,3\n")
    >>> rows = open_table("points.csv", id_column="id")
    >>> rows.ids.tolist(), rows.array().tolist()
    (['a', 'b'], [[0.0, 1.0], [2.0, 3.0]])
    """
    table = read_table(path, column=column, id_column=id_column, label_column=label_column, text_column=text_column)
    source, id_column = os.fspath(path), table.id_column or id_column
    ids: np.ndarray | None = None
    if table.ids is not None:
        ids = text_array(table.ids, f"the ids of {source!r}")
        if id_column is not None and table_columns(path).get(id_column, False):
            ids = _whole(ids)
    return Rows(
        table.values, source=source, ids=ids, kind="table", form=f"{Path(path).suffix.lower()} table",
        labels=None if table.labels is None else text_array(table.labels, f"--labels: of {source!r}"),
        label_name=label_column or "label", texts=table.texts, details={"id_column": id_column},
    )  # fmt: skip


def _open_table(path: Path, column: str | None, id_column: str | None, label_column: str | None = None) -> Rows:
    """The table under the ids of a column that is called so, whatever they are."""
    if id_column is None:
        columns = table_columns(path)
        id_column = next((name for name in _ID_COLUMNS if name in columns and name not in (column, label_column)), None)
    return open_table(path, column=column, id_column=id_column, label_column=label_column)


def _whole(names: np.ndarray) -> np.ndarray:
    """Names of whole numbers as int64, or as they are where one is missing or beyond it."""
    try:
        return names.astype(np.int64)
    except (ValueError, OverflowError):
        return names


@dataclass(frozen=True)
class _Shards(Parts):
    """Tables one after the other."""

    parts: tuple[Matrix, ...]
    starts: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.starts[-1]), self.parts[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def part(self, number: int, rows: np.ndarray) -> np.ndarray:
        return self.parts[number].take(rows)


def _open_shards(folder: Path, column: str | None, id_column: str | None) -> Rows:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SHARD_SUFFIXES and path.is_file())
    files = [path for path in files if not path.name.startswith(".")]
    if not files:
        raise ValueError(f"{str(folder)!r} is a folder without {', '.join(_SHARD_SUFFIXES)} files")
    parts = [_open_table(path, column, id_column) for path in files]
    first = parts[0]
    for part in parts[1:]:
        if part.shape[1] != first.shape[1] or part.dtype != first.dtype:
            raise ValueError(
                f"{part.source}: {part.shape[1]} columns of {part.dtype}, while {first.source} has {first.shape[1]} "
                f"of {first.dtype}; the vectors of one collection must be alike"
            )
        if part.numbered != first.numbered:
            raise ValueError(f"{part.source}: all shards must have ids, or none")
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    values = _Shards(tuple(part.values for part in parts), starts)
    ids = None if first.numbered else np.concatenate([part.ids for part in parts])
    return Rows(values, source=str(folder), ids=ids, kind="shards", form=f"{len(parts)} shards")
