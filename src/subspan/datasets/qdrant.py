"""Qdrant collections, through their own client: a local folder, the address of a server, or a client in memory.

Points are listed once without their vectors; vectors are then asked for by id, a block at a time. A local folder is
held in memory by its client (and unpickled by it), so only a server keeps a large collection out of this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from subspan.geometry.extras import require

_SCROLL = 10_000
_ASK = 1000
_DISTANCES = {"Cosine": "cosine", "Dot": "inner", "Euclid": "l2"}


def is_qdrant(source: Any) -> bool:
    """Whether `source` is a Qdrant client, a http(s) address, or a folder that a local client wrote."""
    if hasattr(source, "scroll") and hasattr(source, "get_collection"):
        return True
    text = str(source)
    return text.startswith(("http://", "https://")) or (Path(text) / "meta.json").is_file()


def connect(source: Any) -> tuple[Any, str]:
    """(client, what it is called)."""
    if hasattr(source, "scroll"):
        return source, "qdrant"
    client = require("qdrant_client", extra="qdrant").QdrantClient
    text = str(source)
    if text.startswith(("http://", "https://")):
        if not urlsplit(text).hostname:
            raise ValueError(f"{text!r} is no address of a Qdrant server")
        return client(url=text), text
    try:
        return client(path=text), text
    except RuntimeError as error:
        raise ValueError(f"{text}: the folder is in use by another Qdrant client ({error})") from error


def open_qdrant(source: Any, collection: str | None, vector: str | None) -> dict[str, Any]:
    """The fields of `StoredVectors` for a collection and, where it has several, the vector of that name."""
    client, name = connect(source)
    try:
        known = sorted(entry.name for entry in client.get_collections().collections)
    except Exception as error:
        raise ValueError(f"{name}: the Qdrant server does not answer ({type(error).__name__}: {error})") from error
    if collection is None and len(known) == 1:
        collection = known[0]
    if collection is None or collection not in known:
        raise ValueError(f"collection: say which one of {name}: {', '.join(known) or 'it has none'}")
    params = client.get_collection(collection).config.params.vectors
    if isinstance(params, dict):
        if vector is None and len(params) == 1:
            vector = next(iter(params))
        if vector not in params:
            raise ValueError(f"column: say which vector of {collection!r}: {', '.join(params) or 'it has none'}")
        params = params[vector]
    elif vector is not None:
        raise ValueError(f"column: the vectors of {collection!r} have no names, so there is no {vector!r}")
    if params is None:
        raise ValueError(f"collection: {collection!r} has no dense vectors")
    if params.distance.value not in _DISTANCES:
        ranks = ", ".join(_DISTANCES)
        raise ValueError(f"collection: {collection!r} ranks by {params.distance.value}; one of {ranks} is needed")
    points = _list(client, collection)
    if not points:
        raise ValueError(f"collection: {collection!r} is empty")
    values = QdrantRows(client, collection, vector, points, (len(points), params.size))
    whole = all(isinstance(point, int) for point in points)
    return {
        "source": f"{name} ({collection})",
        "form": f"Qdrant collection {collection!r} ({params.distance.value})",
        "values": values,
        "ids": np.array(points, dtype=np.int64 if whole else str),
        "metric": _DISTANCES[params.distance.value],
        "details": {"distance": params.distance.value, "collection": collection},
    }


def _list(client: Any, collection: str) -> list[Any]:
    points: list[Any] = []
    offset = None
    while True:
        found, offset = client.scroll(collection, limit=_SCROLL, offset=offset, with_vectors=False, with_payload=False)
        points += [point.id for point in found]
        if offset is None:
            return points


@dataclass(frozen=True)
class QdrantRows:
    """Vectors of the points of a collection, asked for by id."""

    client: Any = field(repr=False)
    collection: str
    vector: str | None
    points: Sequence[Any] = field(repr=False)
    shape: tuple[int, int] = (0, 0)
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Vectors of the points start to stop."""
        return self._vectors(self.points[start:stop])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Vectors of the points at these places."""
        return self._vectors([self.points[int(place)] for place in indices])

    def payloads(self, start: int, stop: int) -> list[dict[str, Any]]:
        """What is stored beside the vectors."""
        points = self.points[start:stop]
        found = {}
        for first in range(0, len(points), _ASK):
            asked = list(points[first : first + _ASK])
            for point in self.client.retrieve(self.collection, ids=asked, with_payload=True, with_vectors=False):
                found[point.id] = point.payload or {}
        return [found.get(point, {}) for point in points]

    def _vectors(self, points: Sequence[Any]) -> np.ndarray:
        rows = np.empty((len(points), self.shape[1]), np.float32)
        place = {point: row for row, point in enumerate(points)}
        seen = 0
        for first in range(0, len(points), _ASK):
            asked = list(points[first : first + _ASK])
            named = True if self.vector is None else [self.vector]
            for point in self.client.retrieve(self.collection, ids=asked, with_vectors=named, with_payload=False):
                value = point.vector if self.vector is None else (point.vector or {}).get(self.vector)
                if value is None or len(value) != self.shape[1]:
                    raise ValueError(f"collection: point {point.id!r} of {self.collection!r} has no such vector")
                rows[place[point.id]] = value
                seen += 1
        if seen != len(points):
            raise ValueError(f"collection: {self.collection!r} changed while it was read")
        return rows
