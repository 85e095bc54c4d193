"""Tables from every format give the same rows; every malformed file is one clear ValueError."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from subspan.datasets import FiniteCheck, read_table
from subspan.datasets import tables as module

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
feather = pytest.importorskip("pyarrow.feather")
parquet = pytest.importorskip("pyarrow.parquet")

N, D = 23, 5


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)


LABELS = [f"class {i % 3}" for i in range(N)]


def arrow_table(values: np.ndarray, *, as_lists: bool = True) -> pyarrow.Table:
    if as_lists:
        columns = {"vector": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), D)}
    else:
        columns = {f"x{j}": values[:, j] for j in range(D)}
    return pyarrow.table({**columns, "label": LABELS, "id": list(range(N))})


def csv_text(values: np.ndarray) -> str:
    header = ",".join(["label", *(f"x{j}" for j in range(D))])
    return "\n".join([header, *(f"{label},{','.join(map(str, row))}" for label, row in zip(LABELS, values))]) + "\n"


def write_npy(folder: Path, values: np.ndarray) -> dict:
    np.save(folder / "t.npy", values)
    return {"path": folder / "t.npy"}


def write_npy_columns_first(folder: Path, values: np.ndarray) -> dict:
    np.save(folder / "t.npy", np.asfortranarray(values))
    return {"path": folder / "t.npy"}


def write_npz(folder: Path, values: np.ndarray) -> dict:
    np.savez_compressed(folder / "t.npz", x=values, y=np.array(LABELS))
    return {"path": folder / "t.npz", "label_column": "y"}


def write_safetensors(folder: Path, values: np.ndarray) -> dict:
    save_file({"x": torch.from_numpy(values), "other": torch.ones(3)}, folder / "t.safetensors")
    return {"path": folder / "t.safetensors"}


def write_parquet(folder: Path, values: np.ndarray) -> dict:
    parquet.write_table(arrow_table(values), folder / "t.parquet", row_group_size=7)
    return {"path": folder / "t.parquet", "label_column": "label", "id_column": "id"}


def write_parquet_columns(folder: Path, values: np.ndarray) -> dict:
    parquet.write_table(arrow_table(values, as_lists=False), folder / "t.parquet", row_group_size=7)
    return {"path": folder / "t.parquet", "label_column": "label", "id_column": "id"}


def write_feather(folder: Path, values: np.ndarray) -> dict:
    feather.write_feather(arrow_table(values), folder / "t.feather", chunksize=7)
    return {"path": folder / "t.feather", "label_column": "label", "column": "vector"}


def write_csv(folder: Path, values: np.ndarray) -> dict:
    (folder / "t.csv").write_text(csv_text(values))
    return {"path": folder / "t.csv", "label_column": "label"}


def write_csv_gz(folder: Path, values: np.ndarray) -> dict:
    (folder / "t.csv.gz").write_bytes(gzip.compress(csv_text(values).encode()))
    return {"path": folder / "t.csv.gz", "label_column": "label"}


def write_csv_of_lists(folder: Path, values: np.ndarray) -> dict:
    rows = "".join(f'{label}\t"{list(map(float, row))}"\n' for label, row in zip(LABELS, values))
    (folder / "t.tsv").write_text("label\tvector\n" + rows)
    return {"path": folder / "t.tsv", "label_column": "label", "column": "vector"}


WRITERS = [
    write_npy, write_npy_columns_first, write_npz, write_safetensors, write_parquet, write_parquet_columns,
    write_feather, write_csv, write_csv_gz, write_csv_of_lists,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, values: np.ndarray, write: Callable[..., dict]) -> None:
    options = write(tmp_path, values)
    table = read_table(**options)
    assert table.shape == (N, D)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table.array(), values)
    batches = list(table.batches(6))
    assert [len(batch) for batch in batches] == [6, 6, 6, 5]
    np.testing.assert_array_equal(np.concatenate(batches), values)
    picked = [22, 0, 7, 7, -1]
    np.testing.assert_array_equal(table.rows(picked), values[picked])
    assert table.rows([]).shape == (0, D)
    if "label_column" in options:
        assert table.labels == tuple(LABELS)
    if "id_column" in options:
        assert table.ids == tuple(map(str, range(N)))
    with pytest.raises(IndexError, match="from 0 to 22"):
        table.rows([23])


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        (np.float64, np.float64),
        (np.float16, np.float32),
        (np.int32, np.float32),
        (np.uint8, np.float32),
        (">f4", np.float32),
    ],
)
def test_dtypes(tmp_path: Path, dtype: object, given: type) -> None:
    np.save(tmp_path / "t.npy", np.arange(6).reshape(3, 2).astype(dtype))
    array = read_table(tmp_path / "t.npy").array()
    assert array.dtype == given
    np.testing.assert_array_equal(array, np.arange(6).reshape(3, 2))


def test_bfloat16_safetensors(tmp_path: Path) -> None:
    save_file({"x": torch.eye(3, dtype=torch.bfloat16)}, tmp_path / "t.safetensors")
    np.testing.assert_array_equal(read_table(tmp_path / "t.safetensors").rows([2, 0]), np.eye(3)[[2, 0]])


def test_an_npy_file_is_mapped_not_read(tmp_path: Path) -> None:
    """A sparse file of 40 GB opens, and its last rows are read, at once."""
    path = tmp_path / "large.npy"
    with path.open("wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10_000_000, 1000)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.truncate(stream.tell() + 10_000_000 * 1000 * 4)
    assert read_table(path).rows([9_999_999]).sum() == 0


def test_values_that_are_not_finite_are_counted_and_placed(values: np.ndarray) -> None:
    values[9, 2], values[9, 3], values[20, 0] = np.nan, np.inf, -np.inf
    check = FiniteCheck([values[:8], values[8:16], values[16:]])
    np.testing.assert_array_equal(np.concatenate(list(check)), values)
    assert (check.n_values, check.n_rows, check.first_row) == (3, 2, 9)
    clean = FiniteCheck([values[:2]])
    assert len(list(clean)) == 1
    assert (clean.n_values, clean.first_row) == (0, None)


def npy_bytes(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def npz_with(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def parquet_bytes(columns: dict) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def safetensors_bytes(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


MATRIX = npy_bytes(np.ones((4, 3)))
HUGE = MATRIX.replace(b"(4, 3), }" + b" " * 9, b"(4000000000, 3), }")

MALFORMED: dict[str, tuple[str, bytes, dict, str]] = {
    "npy, empty file": ("t.npy", b"", {}, "not an .npy array"),
    "npy, not one": ("t.npy", b"hello, this is text", {}, "not an .npy array"),
    "npy, header cut off": ("t.npy", MATRIX[:20], {}, "not an .npy array"),
    "npy, data cut off": ("t.npy", MATRIX[:-8], {}, "is cut off"),
    "npy, header declares more": ("t.npy", HUGE, {}, "is cut off"),
    "npy, objects": ("t.npy", npy_bytes(np.array([[1, "a"]], dtype=object), allow_pickle=True), {}, "pickled"),
    "npy, a bare pickle": ("t.npy", b"\x80\x04K\x01.", {}, "not an .npy array"),
    "npy, texts": ("t.npy", npy_bytes(np.array([["a", "b"]])), {}, "real numbers"),
    "npy, complex": ("t.npy", npy_bytes(np.ones((2, 2), complex)), {}, "real numbers"),
    "npy, records": ("t.npy", npy_bytes(np.zeros(3, dtype=[("a", "f4")])), {}, "real numbers"),
    "npy, one axis": ("t.npy", npy_bytes(np.ones(3)), {}, r"has shape \(3,\)"),
    "npy, three axes": ("t.npy", npy_bytes(np.ones((2, 2, 2))), {}, "rows, dimensions"),
    "npy, scalar": ("t.npy", npy_bytes(np.float32(1)), {}, r"has shape \(\)"),
    "npy, no rows": ("t.npy", npy_bytes(np.ones((0, 3))), {}, "is empty: 0 rows"),
    "npy, no columns": ("t.npy", npy_bytes(np.ones((3, 0))), {}, "is empty"),
    "npy, with a column": ("t.npy", MATRIX, {"label_column": "y"}, "without columns"),
    "npz, not one": ("t.npz", b"PK nonsense", {}, "not a whole .npz"),
    "npz, cut off": ("t.npz", npz_with({"x.npy": MATRIX})[:-30], {}, "not a whole .npz"),
    "npz, no arrays": ("t.npz", npz_with({}), {}, "it has nothing"),
    "npz, not arrays": ("t.npz", npz_with({"x.txt": b"hello"}), {}, "not an .npy array"),
    "npz, shape and size disagree": ("t.npz", npz_with({"x.npy": MATRIX[:-8]}), {}, "is damaged"),
    "npz, objects": (
        "t.npz",
        npz_with({"x.npy": npy_bytes(np.array([[None]], dtype=object), allow_pickle=True)}),
        {},
        "pickled",
    ),
    "npz, several tables": ("t.npz", npz_with({"a.npy": MATRIX, "b.npy": MATRIX}), {}, r"it has a \(4, 3\), b"),
    "npz, wrong column": ("t.npz", npz_with({"a.npy": MATRIX}), {"column": "b"}, "has no 'b'; it has a"),
    "npz, labels of another length": (
        "t.npz",
        npz_with({"x.npy": MATRIX, "y.npy": npy_bytes(np.ones(3))}),
        {"label_column": "y"},
        r"labels .* have shape \(3,\), one a row \(4\)",
    ),
    "safetensors, not one": ("t.safetensors", b"hello, this is text", {}, "not a whole safetensors"),
    "safetensors, cut off": (
        "t.safetensors",
        safetensors_bytes('{"x":{"dtype":"F32","shape":[4,3],"data_offsets":[0,48]}}', b"\0" * 10),
        {},
        "not a whole safetensors",
    ),
    "safetensors, one axis": (
        "t.safetensors",
        safetensors_bytes('{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        {},
        "has shape",
    ),
    "parquet, not one": ("t.parquet", b"hello, this is text", {}, "not a whole .parquet"),
    "parquet, cut off": ("t.parquet", parquet_bytes({"a": [1.0, 2.0]})[:-20], {}, "not a whole .parquet"),
    "parquet, ragged": ("t.parquet", parquet_bytes({"v": [[1.0, 2.0], [3.0]]}), {}, "row 1 of 'v' .* has 1 values"),
    "parquet, an empty row": ("t.parquet", parquet_bytes({"v": [[1.0], None]}), {}, "row 1 of 'v' .* is empty"),
    "parquet, an empty value": ("t.parquet", parquet_bytes({"v": [[1.0], [None]]}), {}, "row 1 .* empty value"),
    "parquet, an empty cell": ("t.parquet", parquet_bytes({"a": [1.0, None]}), {}, "row 1 of 'a' .* is empty"),
    "parquet, only texts": ("t.parquet", parquet_bytes({"a": ["x"]}), {}, "no numeric column; it has a"),
    "parquet, two lists": ("t.parquet", parquet_bytes({"a": [[1.0]], "b": [[1.0]]}), {}, "choose one of a, b"),
    "parquet, column of texts": ("t.parquet", parquet_bytes({"a": ["x"]}), {"column": "a"}, "lists of numbers"),
    "parquet, wrong column": ("t.parquet", parquet_bytes({"a": [1.0]}), {"label_column": "y"}, "has no 'y'"),
    "parquet, no rows": ("t.parquet", parquet_bytes({"a": pyarrow.array([], "float32")}), {}, "is empty"),
    "arrow, not one": ("t.arrow", b"ARROW1 nonsense", {}, "not a whole .arrow"),
    "csv, empty": ("t.csv", b"", {}, "holds no rows"),
    "csv, header only": ("t.csv", b"a,b\n", {}, "holds no rows"),
    "csv, no header": ("t.csv", b"1,2\n3,4\n", {}, "no header line"),
    "csv, ragged": ("t.csv", b"a,b\n1,2\n3\n", {}, "line 3 .* has 1 fields"),
    "csv, a word": ("t.csv", b"a,b\n1,2\n3,x\n", {}, "line 3 .* 'x' in column 'b'"),
    "csv, a column of words": ("t.csv", b"a,b\nx,2\n", {}, "a of .* is not numeric; name it"),
    "csv, only words": ("t.csv", b"a,b\nx,y\n", {}, "no numeric column"),
    "csv, wrong column": ("t.csv", b"a,b\n1,2\n", {"label_column": "c"}, "has no 'c'; it has a, b"),
    "csv, not UTF-8": ("t.csv", b"a,b\n1,2\n\xff\xfe,2\n", {}, "not UTF-8"),
    "csv, an open quote": ("t.csv", b'a,b\n1,"2\n', {}, "is broken|unexpected end"),
    "csv, lists of two lengths": ("t.csv", b'v\n"[1, 2]"\n"[3]"\n', {"column": "v"}, "line 3 .* has 1 values"),
    "csv, a broken list": ("t.csv", b'v\n"[1, 2"\n', {"column": "v"}, "a number is needed"),
    "csv.gz, cut off": ("t.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 999)[:-12], {}, "is broken"),
    "csv.gz, not packed": ("t.csv.gz", b"a,b\n1,2\n", {}, "is broken"),
    "another format": ("t.pkl", b"\x80\x04K\x01.", {}, "is not one of"),
}


@pytest.mark.parametrize("case", MALFORMED, ids=str)
def test_a_malformed_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    name, data, options, message = MALFORMED[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        read_table(tmp_path / name, **options).array()
    assert "\n" not in str(raised.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_table(tmp_path / "no.npy")
    with pytest.raises(ValueError, match="is a folder"):
        read_table(tmp_path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UNPACKED_AT_ONCE", 2**20)
    np.savez_compressed(tmp_path / "t.npz", x=np.zeros((2**10, 2**10), np.float32))
    with pytest.raises(ValueError, match="is refused"):
        read_table(tmp_path / "t.npz")
