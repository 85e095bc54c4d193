"""Tables from every format give the same rows; every malformed file is one clear ValueError."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from subspan.base import FiniteCheck, array_files, read_table

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


def write_json_lines(folder: Path, values: np.ndarray) -> dict:
    rows = [{"id": i, "kind": label, "embedding": row.tolist()} for i, (label, row) in enumerate(zip(LABELS, values))]
    (folder / "t.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return {"path": folder / "t.jsonl.gz", "label_column": "kind", "id_column": "id"}


def write_json_texts(folder: Path, values: np.ndarray) -> dict:
    texts = [json.dumps(row.tolist()) for row in values]
    parquet.write_table(pyarrow.table({"id": range(N), "vector": texts, "label": LABELS}), folder / "t.parquet")
    return {"path": folder / "t.parquet", "label_column": "label", "id_column": "id"}


WRITERS = [
    write_npy, write_npy_columns_first, write_npz, write_safetensors, write_parquet, write_parquet_columns,
    write_json_texts, write_feather, write_csv, write_csv_gz, write_csv_of_lists, write_json_lines,
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


COLUMNS = {
    "pandas' nameless index": ({"": range(N)}, "", "an index"),
    "an index written twice": ({"Unnamed: 0": range(N)}, "Unnamed: 0", "an index"),
    "an index out of order": ({"__index_level_0__": [*range(5, N), *range(5)]}, "__index_level_0__", "an index"),
    "an id by name": ({"ID": [7 * i % N for i in range(N)]}, "ID", "an id"),
    "whole numbers that rise": ({"product": range(10**9, 10**9 + N)}, "product", "whole numbers that only rise"),
    "a constant": ({"version": [3] * N}, None, "one whole number in every row"),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_name_or_count_rows_are_no_dimensions(
    tmp_path: Path, values: np.ndarray, case: str, suffix: str
) -> None:
    extra, id_column, why = COLUMNS[case]
    table = pyarrow.table({**extra, **{f"x{j}": values[:, j] for j in range(D)}})
    path = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        rows = [",".join(table.column_names), *(",".join(map(str, row.values())) for row in table.to_pylist())]
        path.write_text("\n".join(rows))
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, table.to_pylist())))
    else:
        parquet.write_table(table, path, row_group_size=7)
    with pytest.warns(UserWarning, match=why):
        found = read_table(path)
    np.testing.assert_array_equal(found.array(), values)
    assert found.ids == (None if id_column is None else tuple(map(str, extra[id_column])))
    assert found.id_column == id_column


def test_a_table_of_whole_numbers_keeps_what_could_be_a_dimension(tmp_path: Path) -> None:
    """Rising in few rows, constant among whole numbers, or all that there is: such columns stay."""
    for text, shape in [
        ("a,b\n1,2\n3,5\n4,9\n", (3, 2)),
        ("a,b\n" + "".join(f"{i},0\n" for i in [3, 1, 2] * 4), (12, 2)),
        ("a,b\n" + "".join(f"{i},{i * i}\n" for i in range(12)), (12, 2)),
        ("a,b\n" + "".join(f"{i}.0,1.0\n" for i in range(12)), (12, 2)),
    ]:
        (tmp_path / "t.csv").write_text(text)
        assert read_table(tmp_path / "t.csv").shape == shape
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{i},{i * i % 7}\n" for i in range(12)))
    with pytest.warns(UserWarning, match="'a'"):
        assert read_table(tmp_path / "t.csv").shape == (12, 1)


def test_ids_that_are_repeated_name_no_rows(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": 1, "v": [1, 2.5]}\n{"id": 1, "v": [3, 4]}\n')
    found = read_table(tmp_path / "t.jsonl")
    assert (found.ids, found.id_column, found.shape) == (None, None, (2, 2))
    assert read_table(tmp_path / "t.jsonl", id_column="id").ids == ("1", "1")


def test_numbers_beyond_float32_stay_finite_in_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1e300,2\n3,4\n")
    found = read_table(tmp_path / "t.csv")
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found.array(), [[1e300, 2], [3, 4]])


def test_labels_of_bytes_are_texts(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.ones((2, 3)), y=np.array(["é".encode(), b"b"]))
    assert read_table(tmp_path / "t.npz", label_column="y").labels == ("é", "b")


def test_a_table_larger_than_the_memory_is_refused_when_it_is_wanted_whole(tmp_path: Path) -> None:
    with (tmp_path / "t.npy").open("wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 1000)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.truncate(stream.tell() + 4 * 10**12)
    with pytest.raises(ValueError, match=r"t\.npy' takes .* GiB, this machine has"):
        read_table(tmp_path / "t.npy").array()


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


def damaged(data: bytes) -> bytes:
    """With its middle overwritten: the checks of deflate fail, not those of the container."""
    middle = len(data) // 2
    return data[:middle] + b"\xff\x00" * 40 + data[middle + 80 :]


def npy_header(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def parquet_of_two_a() -> bytes:
    stream = io.BytesIO()
    arrays = [pyarrow.array([1.0]), pyarrow.array([2.0])]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=["a", "a"]), stream)
    return stream.getvalue()


def feather_bytes(columns: dict) -> bytes:
    stream = io.BytesIO()
    feather.write_feather(pyarrow.table(columns), stream)
    return stream.getvalue()


def feather_with_wild_offsets() -> bytes:
    """Texts whose offsets lead out of their buffer."""
    offsets = struct.pack("<4i", 0, 3, 6, 9)
    stream = io.BytesIO()
    table = pyarrow.table({"x": [1.5, 2.5, 3.5], "y": ["abc", "def", "ghi"]})
    feather.write_feather(table, stream, compression="uncompressed")
    assert stream.getvalue().count(offsets) == 1
    return stream.getvalue().replace(offsets, struct.pack("<4i", 0, 2**30, 2**30 + 1, 2**31 - 1))


NOISE = np.random.default_rng(0).standard_normal((40, 30))
NUMBERS = "\n".join(["a", *map(str, NOISE.ravel())]).encode()
MEGABYTE = b"x" * 2**20
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
    "safetensors, not one": ("t.safetensors", b"hello, this is text", {}, "not a whole .safetensors"),
    "safetensors, cut off": (
        "t.safetensors",
        safetensors_bytes('{"x":{"dtype":"F32","shape":[4,3],"data_offsets":[0,48]}}', b"\0" * 10),
        {},
        "not a whole .safetensors",
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
    "arrow, no rows": ("t.arrow", feather_bytes({"a": pyarrow.array([], "float32")}), {}, "is empty"),
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
    "csv, a broken list": ("t.csv", b'v\n"[1, 2"\n', {"column": "v"}, "line 2 .* is not JSON"),
    "csv.gz, cut off": ("t.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 999)[:-12], {}, "is broken"),
    "csv.gz, not packed": ("t.csv.gz", b"a,b\n1,2\n", {}, "is broken"),
    "npy, open brackets": ("t.npy", npy_header(b"{'descr': '<f4', 'shape': " + b"(" * 300), {}, "not an .npy array"),
    "npy, deep brackets": ("t.npy", npy_header(b"(" * 9000 + b")" * 9000), {}, "not an .npy array"),
    "npy, negative shape": ("t.npy", MATRIX.replace(b"(4, 3), } ", b"(-4, 3), }"), {}, "not an .npy array"),
    "npy, an endless header": ("t.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99, {}, "header of 4294967295"),
    "npz, damaged": ("t.npz", damaged(npz_with({"x.npy": npy_bytes(NOISE)})), {}, "not a whole .npz|Error -3"),
    "npz, labels that are no characters": (
        "t.npz",
        npz_with({"x.npy": MATRIX, "y.npy": npy_bytes(np.array(["a"] * 4)).replace(b"a\0\0\0", b"\0\0\x11\x7f")}),
        {"label_column": "y"},
        "not a whole .npz",
    ),
    "npz, a sparse matrix": (
        "t.npz",
        npz_with({f"{name}.npy": MATRIX for name in ("indices", "indptr", "format", "data", "shape")}),
        {},
        "is a sparse matrix of SciPy; a table is dense",
    ),
    "npz, a graph": ("t.npz", npz_with({"adj_indptr.npy": MATRIX, "attr_indptr.npy": MATRIX}), {}, "is a graph, not"),
    "parquet, two columns of one name": ("t.parquet", parquet_of_two_a(), {}, "several columns called 'a'"),
    "csv, two columns of one name": ("t.csv", b"a,a\n1,2\n", {}, "several columns called 'a'"),
    "csv, two lists": ("t.csv", b'v,w\n"[1]","[2]"\n', {}, "choose one of v, w"),
    "csv, only an id": ("t.csv", b"id\n1\n2\n", {}, "no numeric column beside id"),
    "csv, a megabyte in a field": ("t.csv", b"a,b\n1," + MEGABYTE + b"\n", {}, "b of .* is not numeric"),
    "csv, a megabyte in a later field": (
        "t.csv",
        b"a,b\n1,2\n1," + MEGABYTE + b"\n",
        {},
        r"'x+\.\.\.x+' in column",
    ),
    "csv, a megabyte in a name": ("t.csv", b"a," + MEGABYTE + b"\n1,2\n", {"column": "c"}, r"it has a, x+\.\.\.x+"),
    "csv.gz, damaged": (
        "t.csv.gz",
        damaged(gzip.compress(NUMBERS)),
        {},
        "is broken",
    ),
    "jsonl, empty": ("t.jsonl", b"\n", {}, "holds no rows"),
    "jsonl, no object": ("t.jsonl", b"[1, 2]\n", {}, "line 1 .* is a JSON list, an object is needed"),
    "jsonl, deep brackets": ("t.jsonl", b'{"v": ' + b"[" * 10**5, {}, "line 1 .* is not JSON"),
    "jsonl, 400 digits": ("t.jsonl", b'{"v": [' + b"9" * 400 + b"]}\n", {}, "line 1 .* a number that no float holds"),
    "jsonl, 400 digits in a number": (
        "t.jsonl",
        b'{"v": ' + b"9" * 400 + b"}\n",
        {},
        r"line 1 .* has 9+\.\.\.9+ in column",
    ),
    "jsonl, ragged": ("t.jsonl", b'{"v": [1, 2]}\n{"v": [1]}\n', {}, "line 2 .* has 1 values, the first has 2"),
    "jsonl, a gap": ("t.jsonl", b'{"v": [1, 2]}\n{"w": [1]}\n', {}, "line 2 .* has no 'v'"),
    "jsonl, null": ("t.jsonl", b'{"v": [1, 2]}\n{"v": [1, null]}\n', {}, "line 2 .* a list of numbers is needed"),
    "jsonl, half a character": (
        "t.jsonl",
        b'{"v": [1, 2], "y": "\\ud800"}\n',
        {"label_column": "y"},
        r"row 0 of the labels .* holds the code point U\+D800",
    ),
    "feather, damaged": ("t.feather", feather_with_wild_offsets(), {"label_column": "y"}, "larger than values array"),
    "an edge list": ("t.edges", b"0 1\n", {}, "is an edge list: `subspan cluster` reads it"),
    "a text": ("t.txt", b"hello\n", {}, "is a text: its lines are embedded"),
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
    monkeypatch.setattr(array_files, "UNPACKED_AT_ONCE", 2**20)
    np.savez_compressed(tmp_path / "t.npz", x=np.zeros((2**10, 2**10), np.float32))
    with pytest.raises(ValueError, match="is refused"):
        read_table(tmp_path / "t.npz")


def test_numbered_headers_and_columns_called_a_label(tmp_path):
    lines = ["0,1,label", *(f"{i / 7},{i * i / 3},{i % 3}" for i in range(30))]
    (tmp_path / "labelled.csv").write_text("\n".join(lines), encoding="utf-8")
    with pytest.warns(UserWarning, match="label"):
        assert read_table(tmp_path / "labelled.csv").shape == (30, 2)
    assert read_table(tmp_path / "labelled.csv", label_column="label").shape == (30, 2)
    bare = ["0,1", *(f"{i / 7},{i * i / 3}" for i in range(30))]
    (tmp_path / "bare.csv").write_text("\n".join(bare), encoding="utf-8")
    assert read_table(tmp_path / "bare.csv").shape == (30, 2)
    (tmp_path / "headless.csv").write_text("\n".join(bare[1:]), encoding="utf-8")
    with pytest.raises(ValueError, match="no header line"):
        read_table(tmp_path / "headless.csv")
