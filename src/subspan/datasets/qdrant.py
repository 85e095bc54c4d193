"""Qdrant collections: a folder of its local mode, the address of a server, or a client in memory.

Points are listed once; vectors are then asked for by id, a block at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from subspan.base import require

from .qdrant_folder import Point, QdrantFolder, point_id

_ASK = 1000
_DISTANCES = {"Cosine": "cosine", "Dot": "inner", "Euclid": "euclidean"}


def is_qdrant(source: Any) -> bool:
    """Whether `source` is a Qdrant client, a http(s) address, or a folder that a local client wrote."""
    if hasattr(source, "scroll") and hasattr(source, "get_collection"):
        return True
    text = str(source)
    return text.startswith(("http://", "https://")) or (Path(text) / "meta.json").is_file()


class _Client:
    """Collections as a client gives them."""

    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"{self.name}: the Qdrant server does not answer ({reason})") from error

    def origin(self, collection: str) -> dict[str, Any]:
        return {}

    def collections(self) -> list[str]:
        with self._asking():
            return sorted(entry.name for entry in self.client.get_collections().collections)

    def schema(self, collection: str) -> tuple[dict[str, Any], dict[str, Any]]:
        with self._asking():
            params = self.client.get_collection(collection).config.params.model_dump(mode="json")
        vectors = params["vectors"] or {}
        return {"": vectors} if "size" in vectors else vectors, params.get("sparse_vectors") or {}

    def points(self, collection: str, vector: str) -> tuple[list[Any], list[Any]]:
        having: list[Any] = []
        missing: list[Any] = []
        offset = None
        while True:
            with self._asking():
                found, offset = self.client.scroll(
                    collection, limit=_ASK, offset=offset, with_vectors=[vector] if vector else True,
                    with_payload=False,
                )  # fmt: skip
            for point in found:
                there = _by_name(point.vector).get(vector) is not None
                (having if there else missing).append(point_id(point.id))
            if offset is None:
                return having, missing

    def fetch(self, collection: str, ids: Sequence[Any], only: str | None) -> Iterator[tuple[Any, Point]]:
        named = [only] if only else True
        for first in range(0, len(ids), _ASK):
            asked = list(ids[first : first + _ASK])
            with self._asking():
                found = self.client.retrieve(collection, ids=asked, with_vectors=named, with_payload=only is None)
            for point in found:
                yield point_id(point.id), (_by_name(point.vector), point.payload or {})


def _by_name(vectors: Any) -> dict[str, Any]:
    return vectors if isinstance(vectors, dict) else {} if vectors is None else {"": vectors}


def _connect(source: Any) -> _Client | QdrantFolder:
    if hasattr(source, "scroll"):
        return _Client(source, "qdrant")
    text = str(source)
    if not text.startswith(("http://", "https://")):
        return QdrantFolder(Path(text))
    if not urlsplit(text).hostname:
        raise ValueError(f"{text!r} is no address of a Qdrant server")
    return _Client(require("qdrant_client", extra="qdrant").QdrantClient(url=text), text)


def open_qdrant(source: Any, collection: str | None, vector: str | None) -> dict[str, Any]:
    """The fields of `Rows` for a collection and, where it has several, the vector of that name.

    Its rows are the points that have such a vector.
    """
    store = _connect(source)
    known = store.collections()
    if collection is None and len(known) == 1:
        collection = known[0]
    if collection is None or collection not in known:
        raise ValueError(f"collection: say which one of {store.name}: {', '.join(known) or 'it has none'}")
    dense, sparse = store.schema(collection)
    name = _vector(collection, vector, dense, sparse)
    params = dense[name]
    if params["distance"] not in _DISTANCES:
        ranks = ", ".join(_DISTANCES)
        raise ValueError(f"collection: {collection!r} ranks by {params['distance']}; one of {ranks} is needed")
    points, others = store.points(collection, name)
    if not points:
        what = f"has no point with a vector{f' {name!r}' if name else ''}" if others else "is empty"
        raise ValueError(f"collection: {collection!r} {what}")
    values = QdrantRows(store, collection, name, dense, sparse, points, others, (len(points), params["size"]))
    whole = all(isinstance(point, int) for point in points)
    form = f"Qdrant collection {collection!r} ({params['distance']})"
    if others:
        form += f", beside {len(others)} points without {repr(name) if name else 'a vector'}"
    return {
        "source": f"{store.name} ({collection})",
        "form": form,
        "values": values,
        "ids": np.array(points, dtype=np.uint64 if whole else str),
        "metric": _DISTANCES[params["distance"]],
        "details": {"distance": params["distance"], "collection": collection, **store.origin(collection)},
    }


def _vector(collection: str, asked: str | None, dense: dict[str, Any], sparse: dict[str, Any]) -> str:
    """Name of the vector that is meant, "" where vectors have none."""
    usable = [name for name, params in dense.items() if not params.get("multivector_config")]
    choice = ", ".join(repr(name) for name in usable) or "it has none"
    if asked is None and len(usable) == 1:
        return usable[0]
    if asked in usable and asked:
        return asked
    if (asked or "") in dense and (asked or "") not in usable:
        raise ValueError(
            f"column: {asked or 'the vector'!r} of {collection!r} is a multivector, several rows a point, which no map "
            f"of one takes; write their means into a table, or name another vector ({choice})"
        )
    if asked in sparse or not dense:
        raise ValueError(
            f"column: {asked or ', '.join(sparse)!r} of {collection!r} is sparse, and maps are of dense vectors; name "
            f"one ({choice})"
        )
    if asked is not None and list(dense) == [""]:
        raise ValueError(f"column: the vectors of {collection!r} have no names, so there is no {asked!r}")
    raise ValueError(f"column: say which vector of {collection!r} ({choice})")


@dataclass(frozen=True)
class QdrantRows:
    """Vectors of the points of a collection, asked for by id.

    vector: their name, "" for none. dense, sparse: parameters of all vectors of the collection by name. points: ids of
    the rows. others: ids of points without such a vector.
    """

    store: _Client | QdrantFolder = field(repr=False)
    collection: str
    vector: str
    dense: dict[str, Any] = field(repr=False)
    sparse: dict[str, Any] = field(repr=False)
    points: Sequence[Any] = field(repr=False)
    others: Sequence[Any] = field(repr=False)
    shape: tuple[int, int] = (0, 0)
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Vectors of the points start to stop."""
        return self._vectors(self.points[start:stop])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Vectors of the points at these places."""
        return self._vectors([self.points[int(place)] for place in indices])

    def whole(self, points: Sequence[Any]) -> list[Point]:
        """All vectors and the payload of each of these points."""
        return self._found(points, None)

    def _found(self, points: Sequence[Any], only: str | None) -> list[Point]:
        found = dict(self.store.fetch(self.collection, points, only))
        try:
            return [found[point] for point in points]
        except KeyError:
            raise ValueError(f"collection: {self.collection!r} changed while it was read") from None

    def _vectors(self, points: Sequence[Any]) -> np.ndarray:
        rows = np.empty((len(points), self.shape[1]), np.float32)
        for row, (vectors, _) in enumerate(self._found(points, self.vector)):
            try:
                rows[row] = np.asarray(vectors[self.vector], np.float32).reshape(self.shape[1])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"collection: point {points[row]!r} of {self.collection!r} has no vector of {self.shape[1]} numbers"
                ) from error
        if self.dense[self.vector]["distance"] == "Cosine":
            # A server keeps them so, a folder as they came.
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return rows
