"""FAISS index files: rows out of them in blocks, and flat ones written as a stream.

A flat index is its header, then the vectors as they are in memory, then (in an IDMap) the ids. Those are read and
written here directly, so that no more than a block is in memory; every other kind is read whole by FAISS itself.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from subspan.base import require
from subspan.base.files import atomic_write
from subspan.base.reading import reading, regular_file
from subspan.base.rows import Parts

_METRICS = {0: "inner", 1: "euclidean"}
# fourcc, d, n, two unused words, is_trained, metric
_HEADER = struct.Struct("<4siqqq?i")
_COUNT = struct.Struct("<Q")
_FLAT = {b"IxFI": 0, b"IxF2": 1}
_ID_MAPS = {b"IxMp": "IndexIDMap", b"IxM2": "IndexIDMap2"}


def open_faiss(path: Path) -> dict[str, Any]:
    """The fields of `Rows` for an index file. Raises ValueError where it is damaged or of an unread kind."""
    direct = _open_flat(path)
    if direct is not None:
        return direct
    with path.open("rb") as stream:
        kind = stream.read(4)
    if kind.startswith(b"IB"):
        raise ValueError(
            f"{str(path)!r} is a binary index, of bits, which no linear map takes; give the vectors that it was made "
            "of as a table or as an index of floats"
        )
    # FAISS's mapped reader lets a cut within the last value of a file pass; the plain one does not.
    index, owner = read_index(path, mapped=False)
    return _describe(index, owner, str(path))


def read_index(path: str | os.PathLike[str], *, mapped: bool = True) -> tuple[Any, Any]:
    """(index as its own class, the object that owns its memory); keep the second as long as the first.

    mapped: the vectors stay in the file until they are touched. Raises ValueError where it is no whole index.
    """
    faiss = require("faiss", extra="index")
    with reading(regular_file(path), problem="is not a whole FAISS index"):
        try:
            owner = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:
            raise OSError(str(error).split(": Error: ")[-1].split(" at /")[0].split("\n")[0][-160:]) from error
    return faiss.downcast_index(owner), owner


# ---------------------------------------------------------------------- flat files


@dataclass(frozen=True)
class FlatFile:
    """Float32 rows of a file, from `offset` on; each read opens the file."""

    path: Path
    offset: int
    shape: tuple[int, int]
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop."""
        width = 4 * self.shape[1]
        rows = np.fromfile(self.path, "<f4", (stop - start) * self.shape[1], offset=self.offset + start * width)
        if len(rows) != (stop - start) * self.shape[1]:
            raise ValueError(f"{str(self.path)!r} was cut off while it was read")
        return rows.reshape(stop - start, self.shape[1])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Rows at these places."""
        taken = np.empty((len(indices), self.shape[1]), np.float32)
        width = 4 * self.shape[1]
        with self.path.open("rb") as stream:
            for place, index in enumerate(indices.tolist()):
                stream.seek(self.offset + index * width)
                taken[place] = np.frombuffer(stream.read(width), "<f4")
        return taken


def _open_flat(path: Path) -> dict[str, Any] | None:
    """The fields for a flat index, with or without an id map, or None where the file is laid out otherwise."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(2 * _HEADER.size + _COUNT.size)
        if len(head) < _HEADER.size + _COUNT.size:
            return None
        id_map = _ID_MAPS.get(head[:4])
        if id_map is not None:
            head = head[_HEADER.size :]
        if len(head) < _HEADER.size + _COUNT.size:
            return None
        fourcc, d, n, _, _, trained, metric = _HEADER.unpack_from(head)
        count = _COUNT.unpack_from(head, _HEADER.size)[0]
        offset = (_HEADER.size if id_map else 0) + _HEADER.size + _COUNT.size
        tail = _COUNT.size + 8 * n if id_map else 0
        whole = d > 0 and n >= 0 and trained and count == n * d and size == offset + 4 * n * d + tail
        if _FLAT.get(fourcc) != metric or not whole:
            return None
        _refuse_empty(n, str(path))
        if id_map:
            stream.seek(offset + 4 * n * d)
            if _COUNT.unpack(stream.read(_COUNT.size))[0] != n:
                return None
            ids = np.fromfile(stream, "<i8", n).astype(np.int64)
        else:
            ids = np.arange(n)
    name = "IndexFlatIP" if metric == 0 else "IndexFlatL2"
    form = f"{name} in {id_map}" if id_map else name
    return {
        "source": str(path),
        "form": form,
        "values": FlatFile(path, offset, (n, d)),
        "ids": ids,
        "metric": _METRICS[metric],
        "numbered": not id_map,
        "details": {"id_map": id_map, "kind": "flat"},
    }


def flat_header(n: int, d: int, metric: str, *, id_map: str | None) -> bytes:
    """What stands before the vectors in the file of a flat index, or of one in an `id_map`."""
    code = {name: number for number, name in _METRICS.items()}[metric]
    fourcc = next(name for name, number in _FLAT.items() if number == code)
    flat = _HEADER.pack(fourcc, d, n, 1 << 20, 1 << 20, True, code) + _COUNT.pack(n * d)
    if id_map is None:
        return flat
    outer = next(name for name, known in _ID_MAPS.items() if known == id_map)
    return _HEADER.pack(outer, d, n, 1 << 20, 1 << 20, True, code) + flat


def flat_tail(ids: np.ndarray, *, id_map: str | None) -> bytes:
    """What stands after the vectors."""
    return b"" if id_map is None else _COUNT.pack(len(ids)) + ids.astype("<i8").tobytes()


def write_faiss(index: Any, target: str | os.PathLike[str]) -> None:
    """Write an index, whole or not at all. Raises OSError, in one line, where the disk is full."""
    faiss = require("faiss", extra="index")
    with atomic_write(target) as temporary:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:
            # FAISS names its own source line and an expression; the system's reason stands last, in brackets.
            reason = re.search(r"\(([^()]*)\)\s*$", str(error))
            raise OSError(reason[1] if reason else " ".join(str(error).split())) from error


def write_pretransform(source: Path, transforms: list[Any], target: str | os.PathLike[str]) -> None:
    """The index of `source` behind transforms (in the order in which they apply), as one IndexPreTransform file.

    The bytes of the index are copied after a header, so nothing of it is held in memory; FAISS reads the result back
    before it gets its name. Raises ValueError where that fails.
    """
    faiss = require("faiss", extra="index")
    if Path(target).exists() and source.samefile(target):
        raise ValueError(f"target: {os.fspath(target)!r} is the index itself, which is never overwritten")
    index, owner = read_index(source)
    inner = faiss.IndexFlat(index.d, index.metric_type)
    wrapper = faiss.IndexPreTransform(inner)
    for transform in reversed(transforms):
        wrapper.prepend_transform(transform)
    n = int(index.ntotal)
    wrapper.ntotal = n
    header = faiss.serialize_index(wrapper).tobytes()[: -len(faiss.serialize_index(inner).tobytes())]
    del index, owner
    with atomic_write(target) as temporary:
        with temporary.open("wb") as stream, source.open("rb") as original:
            stream.write(header)
            shutil.copyfileobj(original, stream, 1 << 24)
        back, owner = read_index(temporary)
        if back.ntotal != n or back.d != transforms[0].d_in:
            raise ValueError(f"{os.fspath(target)!r}: FAISS reads {back.ntotal} vectors of {n} back")
        del back, owner


# ---------------------------------------------------------------------- every other kind


@dataclass(frozen=True)
class _Reconstructed:
    """Rows of an index that numbers its vectors from 0, as FAISS gives them back."""

    index: Any = field(repr=False)
    owner: Any = field(repr=False)
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.index.ntotal), int(self.index.d)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.index.reconstruct_n(start, stop - start)

    def take(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self.index.reconstruct(int(place)) for place in indices])


@dataclass(frozen=True)
class _Lists(Parts):
    """Rows of an inverted file, list by list."""

    index: Any = field(repr=False)
    owner: Any = field(repr=False)
    starts: np.ndarray = field(repr=False)
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.starts[-1]), int(self.index.d)

    def part(self, number: int, rows: np.ndarray) -> np.ndarray:
        faiss = require("faiss", extra="index")
        if isinstance(self.index, faiss.IndexIVFFastScan):
            return self._unpacked(number, rows)
        lists = self.index.invlists
        size, width = lists.list_size(number), lists.code_size
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * width).reshape(size, width)[rows]
        # A standalone code is the number of the list, then the code within it.
        prefix = np.frombuffer(number.to_bytes(self.index.sa_code_size() - width, "little"), np.uint8)
        return self.index.sa_decode(np.hstack([np.broadcast_to(prefix, (len(codes), len(prefix))), codes]))

    def _unpacked(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Rows of a fast-scan list, which interleaves the codes of a block of vectors."""
        faiss = require("faiss", extra="index")
        lists = faiss.downcast_InvertedLists(self.index.invlists)
        count = -(-lists.list_size(number) // lists.n_per_block)
        blocks = faiss.rev_swig_ptr(lists.get_codes(number), count * lists.block_size).reshape(count, -1)
        # FAISS's own decoder of these dereferences what reading a file leaves unset.
        found = self.index.pq.decode(np.stack([lists.packer.unpack_1(blocks, int(row)) for row in rows]))
        return found + self.index.quantizer.reconstruct(number) if self.index.by_residual else found


@dataclass(frozen=True)
class _Undone:
    """Rows behind transforms, which are undone (the least-squares inverse of those that shorten)."""

    stored: Any
    columns: int
    steps: tuple[Callable[[np.ndarray], np.ndarray], ...] = field(repr=False)
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.columns

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._undo(self.stored.read(start, stop))

    def take(self, indices: np.ndarray) -> np.ndarray:
        return self._undo(self.stored.take(indices))

    def _undo(self, rows: np.ndarray) -> np.ndarray:
        for step in self.steps:
            rows = np.ascontiguousarray(step(rows), np.float32)
        return rows


def _describe(index: Any, owner: Any, source: str) -> dict[str, Any]:
    faiss = require("faiss", extra="index")
    _refuse_empty(int(index.ntotal), source)
    if index.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise ValueError(f"{source}: ranks by FAISS metric {index.metric_type}; inner product or L2 is needed")
    metric, columns, total = _METRICS[index.metric_type], int(index.d), int(index.ntotal)
    around, ids, id_map = [], None, None
    chain: list[Any] = []
    while isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform | faiss.IndexRefine):
        around.append(type(index).__name__)
        if isinstance(index, faiss.IndexIDMap):
            id_map, ids = type(index).__name__, faiss.vector_to_array(index.id_map).astype(np.int64)
        elif isinstance(index, faiss.IndexPreTransform):
            chain += [faiss.downcast_VectorTransform(index.chain.at(place)) for place in range(index.chain.size())]
        index = faiss.downcast_index(index.refine_index if isinstance(index, faiss.IndexRefine) else index.index)
    form = " in ".join([type(index).__name__, *reversed(around)])
    details: dict[str, Any] = {"id_map": id_map, "kind": "other"}
    numbered = ids is None
    if isinstance(index, faiss.IndexIVF):
        lists = index.invlists
        sizes = [lists.list_size(number) for number in range(index.nlist)]
        inside = [faiss.rev_swig_ptr(lists.get_ids(number), size).copy() for number, size in enumerate(sizes) if size]
        within = np.concatenate(inside).astype(np.int64) if inside else np.empty(0, np.int64)
        if ids is None:
            # Ids that were counted and ids that were given cannot be told apart: a full count reads as row numbers.
            numbered = np.array_equal(np.sort(within), np.arange(len(within)))
            ids = within
        elif len(within) == len(ids) and within.min() >= 0 and within.max() < len(ids):
            ids = ids[within]
        values: Any = _Lists(index, owner, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
        details |= {"kind": "ivf", "nlist": int(index.nlist), "nprobe": int(index.nprobe)}
    else:
        values = _Reconstructed(index, owner)
        if hasattr(index, "hnsw"):
            details |= {"kind": "hnsw", "m": int(index.hnsw.nb_neighbors(1)), "ef": int(index.hnsw.efConstruction)}
    if values.shape[0] != total or (ids is not None and len(ids) != total):
        raise ValueError(
            f"{source}: {form} counts {total} vectors and holds {values.shape[0]} under "
            f"{total if ids is None else len(ids)} ids; give them as a table, one row an id"
        )
    try:
        if chain:
            values = _Undone(values, columns, tuple(_reverse(transform) for transform in reversed(chain)))
        # One alone first: what FAISS raises among several ends the process.
        values.take(np.array([0]))
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{source}: the vectors of {form} cannot be taken out again; give them as a table (.npy, .parquet), with "
            "--index-ids where their ids are no row numbers"
        ) from error
    storage = faiss.downcast_index(index.storage) if hasattr(index, "storage") else index
    return {
        "source": source,
        "form": form,
        "values": values,
        "ids": np.arange(total) if ids is None else ids,
        "metric": metric,
        "exact": isinstance(storage, faiss.IndexFlat | faiss.IndexIVFFlat) and all(map(_is_undone, chain)),
        "numbered": numbered,
        "details": details,
    }


def _linear(transform: Any) -> tuple[np.ndarray, np.ndarray]:
    """(matrix, bias) of a linear transform."""
    faiss = require("faiss", extra="index")
    matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
    bias = faiss.vector_to_array(transform.b) if transform.have_bias else np.zeros(transform.d_out, np.float32)
    return matrix, bias


def _reverse(transform: Any) -> Callable[[np.ndarray], np.ndarray]:
    faiss = require("faiss", extra="index")
    if not isinstance(transform, faiss.LinearTransform):
        return transform.reverse_transform
    matrix, bias = _linear(transform)
    # The transform's own word on whether it is orthonormal is not kept in files, and wrong for a whitening one.
    inverse = np.linalg.pinv(matrix.astype(np.float64))
    return lambda rows: (rows - bias) @ inverse.T


def _is_undone(transform: Any) -> bool:
    """Whether a transform loses nothing."""
    faiss = require("faiss", extra="index")
    linear = isinstance(transform, faiss.LinearTransform)
    return linear and int(np.linalg.matrix_rank(_linear(transform)[0])) == transform.d_in


def _refuse_empty(n: int, source: str) -> None:
    if n == 0:
        raise ValueError(f"{source}: the index is empty")
