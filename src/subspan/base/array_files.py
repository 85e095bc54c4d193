"""Rows in files of arrays: npy, npz, safetensors."""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from .columns import listed
from .reading import check_memory, quoted, reading
from .rows import MAX_UNPACKED_BYTES, SUSPICIOUS_RATIO, UNPACKED_AT_ONCE, Table, entry_arrays, known_name

_MAX_HEADER = 2**20


@dataclass(frozen=True)
class ArrayRows:
    """A matrix in memory, or mapped from a file."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, dimensions)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """As stored."""
        return self.values.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Copy of rows start to stop."""
        return np.array(self.values[start:stop])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Copy of the rows at these places."""
        return np.array(self.values[indices])


def open_npy(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    """The rows of a .npy file, which has one array and no names."""
    for name in (column, *names.values()):
        if name is not None:
            raise ValueError(f"column: {str(source)!r} is a single array without columns, so there is no {name!r}")
    with source.open("rb") as stream:
        shape, dtype = npy_header(stream, str(source))
        expected = stream.tell() + math.prod(shape) * dtype.itemsize
    _check_matrix(shape, dtype, str(source))
    if source.stat().st_size < expected:
        raise ValueError(f"path: {str(source)!r} is cut off: {source.stat().st_size} of {expected} bytes")
    mapped = np.load(source, mmap_mode="r", allow_pickle=False) if math.prod(shape) else np.empty(shape, dtype)
    return Table(source, ArrayRows(mapped))


def npy_header(stream: Any, where: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an .npy stream, which stands at its data afterwards."""
    with reading(where, problem="is not an .npy array"):
        start = stream.read(10)
        version = tuple(start[6:8])
        if start[:6] != b"\x93NUMPY" or version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError("its first bytes are others")
        start += stream.read(2) if version > (1, 0) else b""
        length = int.from_bytes(start[8:], "little")
        if length > _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        # Version 3 is version 2 with names of fields in UTF-8, and the headers of matrices have no fields.
        header = io.BytesIO(start[8:] + stream.read(length))
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(header)
        if any(size < 0 for size in shape):
            raise ValueError(f"shape {shape}")
    return shape, dtype


def _check_matrix(shape: tuple[int, ...], dtype: np.dtype, where: str) -> None:
    if dtype.hasobject:
        raise ValueError(f"path: {where!r} holds pickled Python objects, which are not read; store numbers instead")
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise ValueError(f"path: {where!r} holds {dtype}, real numbers are needed")
    if len(shape) != 2:
        raise ValueError(f"path: {where!r} has shape {shape}; a table (rows, dimensions) is needed")


def open_npz(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    """The rows of one array of a .npz file."""
    headers = npz_headers(source)
    if {"indices", "indptr", "format", "data"} <= headers.keys():
        raise ValueError(f"path: {str(source)!r} is a sparse matrix of SciPy; a table is dense: save X.toarray()")
    if {"adj_indptr", "attr_indptr"} <= headers.keys():
        raise ValueError(f"path: {str(source)!r} is a graph, not a table; `subspan cluster` and read_graph read it")
    chosen = _choose(column, headers, source)
    _check_matrix(*headers[chosen], f"{source}: {chosen}")
    wanted = {kind: known_name(name, headers, source) for kind, name in names.items() if name is not None}
    sizes = sum(math.prod(headers[name][0]) * headers[name][1].itemsize for name in {chosen, *wanted.values()})
    check_memory(sizes, f"path: {str(source)!r}")
    with np.load(source, allow_pickle=False) as archive:
        others = {kind: archive[name] for kind, name in wanted.items()}
        return Table(source, ArrayRows(archive[chosen]), **entry_arrays(others, headers[chosen][0][0], source))


def npz_headers(source: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array, read without unpacking; sizes that do not agree with them are refused."""
    headers: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    with reading(source, problem="is not a whole .npz archive"), zipfile.ZipFile(source) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name in headers:
                raise ValueError(f"path: {str(source)!r} has several arrays called {quoted(name)}")
            with archive.open(entry) as stream:
                shape, dtype = npy_header(stream, f"{source}: {name}")
                declared = stream.tell() + math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and declared != entry.file_size:
                size = f"{entry.file_size} bytes, its shape {shape} makes {declared}"
                raise ValueError(f"path: {str(source)!r} is damaged: {quoted(name)} unpacks to {size}")
            ratio = entry.file_size / max(entry.compress_size, 1)
            if entry.file_size > MAX_UNPACKED_BYTES or (
                entry.file_size > UNPACKED_AT_ONCE and ratio > SUSPICIOUS_RATIO
            ):
                size = f"{entry.file_size} bytes from {entry.compress_size}"
                raise ValueError(f"path: {str(source)!r} is refused: {quoted(name)} would unpack to {size}")
            headers[name] = (shape, dtype)
    return headers


@dataclass(frozen=True)
class _Safetensors:
    """One tensor of a safetensors file; each read opens the file."""

    source: Path
    name: str
    shape: tuple[int, int]
    dtype: np.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        with reading(self.source), safe_open(self.source, framework="pt") as archive:
            return _as_numpy(archive.get_slice(self.name)[start:stop])

    def take(self, indices: np.ndarray) -> np.ndarray:
        with reading(self.source), safe_open(self.source, framework="pt") as archive:
            rows = archive.get_slice(self.name)
            taken = [_as_numpy(rows[int(index) : int(index) + 1]) for index in indices]
        return np.concatenate(taken) if taken else np.empty((0, self.shape[1]), self.dtype)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    numpy_has_it = tensor.dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return (tensor if numpy_has_it else tensor.float()).numpy()


def open_safetensors(source: Path, column: str | None, names: dict[str, str | None]) -> Table:
    """The rows of one tensor of a safetensors file."""
    with safe_open(source, framework="pt") as archive:
        slices = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118
        headers = {name: (tuple(rows.get_shape()), _safetensors_dtype(rows)) for name, rows in slices.items()}
        chosen = _choose(column, headers, source)
        _check_matrix(*headers[chosen], f"{source}: {chosen}")
        others = {
            kind: _as_numpy(archive.get_tensor(known_name(name, headers, source)))
            for kind, name in names.items()
            if name is not None
        }
    (n, d), dtype = headers[chosen]
    return Table(source, _Safetensors(source, chosen, (n, d), dtype), **entry_arrays(others, n, source))


def _safetensors_dtype(rows: Any) -> np.dtype:
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
             "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip
    return np.dtype(kinds.get(rows.get_dtype(), np.float32))


def _choose(column: str | None, headers: dict[str, tuple[tuple[int, ...], np.dtype]], source: Path) -> str:
    """The array that is asked for, or the only table of numbers."""
    if column is not None:
        return known_name(column, headers, source)
    if len(headers) == 1:
        return next(iter(headers))
    fit = [name for name, (shape, dtype) in headers.items() if len(shape) == 2 and dtype.kind in "fiu"]
    if len(fit) != 1:
        have = listed(f"{name} {shape}" for name, (shape, _) in headers.items()) or "nothing"
        raise ValueError(f"column: say which array of {str(source)!r} is the table; it has {have}")
    return fit[0]
