"""Folders of Qdrant's local mode, read row by row without its client, which would execute what their pickles ask for.

Such a folder is `meta.json` and, for each collection, an SQLite table with a pickled point a row. A pickle names
classes that its reader is to make objects of, so whoever writes one decides what is executed. Here it can name two, and
gets an object that keeps what it is given and does nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sqlite3
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from subspan.base.reading import reading

Point = tuple[dict[str, Any], dict[str, Any]]
"""Vectors by name ("" where they have none), and the payload."""
_MODULE = "qdrant_client.http.models.models"
_ASK = 500


class _Stored:
    """Stands for a point or a sparse vector."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields: dict[str, Any] = dict(state["__dict__"])


class _Reader(pickle.Unpickler):
    """Reads pickles of points; ValueError for one that asks for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == _MODULE and name in ("PointStruct", "SparseVector"):
            return _Stored
        raise ValueError(
            f"a row asks for {module}.{name}, which may be made to execute anything; of a folder that is your own, put "
            "the points into a server and give its address"
        )


class QdrantFolder:
    """The collections of a folder. Nothing is held open or changed."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._rows: dict[str, dict[Any, int]] = {}
        with reading(folder, "path", "is no folder of Qdrant's local mode"):
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self._configs: dict[str, Any] = dict(meta["collections"])
            self._files = {name: folder / "collection" / name / "storage.sqlite" for name in self._configs}
            for file in self._files.values():
                if not file.resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"the collection {file.parent.name!r} lies elsewhere")

    def collections(self) -> list[str]:
        """Their names."""
        return sorted(self._configs)

    def origin(self, collection: str) -> dict[str, Any]:
        """The file that holds a collection, by whose time a change is known."""
        return {"file": str(self._files[collection])}

    def schema(self, collection: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters of the dense vectors by name ("" for vectors without one), and of the sparse ones."""
        config = self._configs[collection]
        vectors = config.get("vectors") or {}
        return {"": vectors} if "size" in vectors else vectors, config.get("sparse_vectors") or {}

    def points(self, collection: str, vector: str) -> tuple[list[Any], list[Any]]:
        """Ids of the points with and without a vector of that name: whole numbers in order, then UUIDs."""
        rows, having = {}, set()
        with self._table(collection) as table:
            # Clients of earlier versions left a row for each spelling of a UUID; the last written is the point.
            for rowid, value in table.execute("SELECT rowid, point FROM points ORDER BY rowid DESC"):
                name, (vectors, _) = _decoded(value)
                if name not in rows:
                    rows[name] = rowid
                    if vectors.get(vector) is not None:
                        having.add(name)
        self._rows[collection] = rows
        ids = sorted(rows, key=lambda name: (isinstance(name, str), name))
        return [name for name in ids if name in having], [name for name in ids if name not in having]

    def fetch(self, collection: str, ids: Sequence[Any], only: str | None) -> Iterator[tuple[Any, Point]]:
        """The points of these ids that are still there, in any order; a server would give but the vector `only`."""
        rows = [self._rows[collection][name] for name in ids]
        with self._table(collection) as table:
            for first in range(0, len(rows), _ASK):
                part = rows[first : first + _ASK]
                marks = ",".join("?" * len(part))
                for (value,) in table.execute(f"SELECT point FROM points WHERE rowid IN ({marks})", part):
                    yield _decoded(value)

    def check(self) -> QdrantFolder:
        """ValueError where a row of any collection asks for what is not known: before a client opens the folder."""
        for collection in self._configs:
            self.points(collection, "")
        return self

    @contextlib.contextmanager
    def _table(self, collection: str) -> Iterator[sqlite3.Connection]:
        file = self._files[collection]
        with reading(self.name, "path", f"holds a collection {collection!r} that cannot be read"):
            if not file.is_file():
                raise ValueError("it has no storage.sqlite; one of a client before 1.1.7 must be opened with it once")
            address = f"file:{urllib.request.pathname2url(str(file.resolve()))}?mode=ro"
            with contextlib.closing(sqlite3.connect(address, uri=True)) as table:
                table.execute("PRAGMA trusted_schema = OFF")
                yield table


def point_id(name: Any) -> Any:
    """An id in one spelling: UUIDs in lower case with dashes, whole numbers and other texts as they are."""
    if not isinstance(name, str):
        return name
    try:
        return str(uuid.UUID(name))
    except ValueError:
        return name


def _decoded(value: bytes) -> tuple[Any, Point]:
    try:
        point = _Reader(io.BytesIO(value)).load().fields
        name, vectors, payload = point["id"], point["vector"], point.get("payload") or {}
        if isinstance(vectors, list):
            vectors = {"": vectors}
        if type(name) not in (int, str) or not isinstance(vectors, dict) or not isinstance(payload, dict):
            raise TypeError("its parts are of the wrong kinds")
        plain = {key: one.fields if isinstance(one, _Stored) else one for key, one in vectors.items()}
    except ValueError as error:
        if str(error).startswith("a row asks for"):
            raise
        raise ValueError(f"a row is no point: {error}") from error
    except Exception as error:
        raise ValueError(f"a row is no point: {type(error).__name__}") from error
    return point_id(name), (plain, payload)
