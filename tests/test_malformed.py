"""Bad input of every kind: one line on stderr, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from subspan import cli

ROWS = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
Make = Callable[[], object]
CASES: dict[str, tuple[Make, str]] = {}


def case(command: str) -> Callable[[Make], Make]:
    """A malformed input: the function makes it in the working folder, `command` is then run on it."""

    def keep(make: Make) -> Make:
        CASES[make.__name__.replace("_", "-")] = (make, command)
        return make

    return keep


def saved(rows: object, name: str = "x.npy", **options: bool) -> None:
    np.save(name, np.asarray(rows), **options)


def damage(name: str, where: float = 0.5) -> None:
    """Overwrite a part, so that what is packed there no longer unpacks."""
    data = bytearray(Path(name).read_bytes())
    start = int(where * len(data))
    data[start : start + 80] = (b"\xff\x00" * 40)[: len(data[start : start + 80])]
    Path(name).write_bytes(bytes(data))


def with_entry(value: float, row: int = 3) -> np.ndarray:
    rows = ROWS.copy()
    rows[row, 2] = value
    return rows


# ---------------------------------------------------------------------- .npy


@case("report x.npy")
def npy_missing() -> None:
    pass


@case("report x.npy")
def npy_empty_file() -> None:
    Path("x.npy").write_bytes(b"")


@case("report x.npy")
def npy_of_text() -> None:
    Path("x.npy").write_text("these are no numbers\nbut lines\n")


@case("report x.npy")
def npy_truncated_data() -> None:
    saved(ROWS)
    Path("x.npy").write_bytes(Path("x.npy").read_bytes()[:-100])


@case("report x.npy")
def npy_truncated_header() -> None:
    saved(ROWS)
    Path("x.npy").write_bytes(Path("x.npy").read_bytes()[:30])


@case("detect x.npy -o scores.csv")
def npy_of_objects() -> None:
    saved(np.array([[1, "a"], [2, None]], dtype=object), allow_pickle=True)


@case("report x.npy")
def npy_of_strings() -> None:
    saved([["a", "b"], ["c", "d"]])


@case("report x.npy")
def npy_of_complex_numbers() -> None:
    saved(ROWS.astype(np.complex64))


@case("report x.npy")
def npy_structured() -> None:
    saved(np.zeros(40, dtype=[("a", "f4"), ("b", "f4")]))


@case("report x.npy")
def npy_one_axis() -> None:
    saved(ROWS[0])


@case("report x.npy")
def npy_three_axes() -> None:
    saved(ROWS.reshape(40, 4, 2))


@case("report x.npy")
def npy_no_axis() -> None:
    saved(np.float32(3))


@case("report x.npy")
def npy_no_rows() -> None:
    saved(np.empty((0, 8), np.float32))


@case("report x.npy")
def npy_no_columns() -> None:
    saved(np.empty((40, 0), np.float32))


@case("report x.npy")
def npy_header_that_promises_terabytes() -> None:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 8)}
    np.lib.format.write_array_header_1_0(stream, header)
    Path("x.npy").write_bytes(stream.getvalue() + b"\0" * 64)


@case("report x.npy")
def npy_header_with_code() -> None:
    header = b"{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (1, 1)}"
    header += b" " * (118 - len(header)) + b"\n"
    Path("x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 4)


@case("report x.npy")
def npy_is_a_folder() -> None:
    Path("x.npy").mkdir()


@case("report x.npy --column vectors")
def npy_has_no_columns_by_name() -> None:
    saved(ROWS)


# ---------------------------------------------------------------------- values


@case("report x.npy")
def one_nan() -> None:
    saved(with_entry(np.nan))


@case("detect x.npy -o scores.csv")
def one_infinity() -> None:
    saved(with_entry(np.inf))


@case("select x.npy -m 5 -o chosen.csv")
def one_negative_infinity() -> None:
    saved(with_entry(-np.inf))


@case("shorten x.npy --rank 2")
def nan_when_shortening() -> None:
    saved(with_entry(np.nan))


@case("align x.npy y.npy -o map.safetensors")
def nan_in_the_target() -> None:
    saved(ROWS)
    saved(with_entry(np.nan), "y.npy")


@case("report x.npy --skip-nan")
def all_nan() -> None:
    saved(np.full((40, 8), np.nan, np.float32))


@case("report x.npy")
def constant_rows() -> None:
    saved(np.full((40, 8), 3, np.float32))


@case("report x.npy")
def zero_rows() -> None:
    saved(np.zeros((40, 8), np.float32))


@case("detect x.npy -o scores.csv")
def constant_rows_to_detect_in() -> None:
    saved(np.ones((40, 8), np.float32))


@case("select x.npy -m 5 -o chosen.csv")
def constant_rows_to_select_from() -> None:
    saved(np.ones((40, 8), np.float32))


@case("shorten x.npy --center")
def constant_rows_to_shorten() -> None:
    saved(np.ones((40, 8), np.float32))


@case("align x.npy y.npy -o map.safetensors")
def constant_source() -> None:
    saved(np.ones((40, 8), np.float32))
    saved(ROWS, "y.npy")


@case("report x.npy")
def too_few_rows() -> None:
    saved(ROWS[:5])


@case("detect x.npy -o scores.csv")
def a_single_row() -> None:
    saved(ROWS[:1])


@case("report x.npy")
def a_single_column() -> None:
    saved(ROWS[:, :1])


@case("report x.npy")
def values_whose_squares_overflow() -> None:
    saved(ROWS.astype(np.float64) * 1e200)


# ---------------------------------------------------------------------- options


@case("select x.npy -m 41 -o chosen.csv")
def more_selected_than_rows() -> None:
    saved(ROWS)


@case("select x.npy -m 0")
def none_selected() -> None:
    saved(ROWS)


@case("select x.npy -m 1.5")
def a_share_above_one() -> None:
    saved(ROWS)


@case("select x.npy -m some")
def a_size_in_words() -> None:
    saved(ROWS)


@case("detect x.npy --rank 0")
def rank_zero() -> None:
    saved(ROWS)


@case("detect x.npy --rank -2")
def rank_below_zero() -> None:
    saved(ROWS)


@case("shorten x.npy --rank 9")
def rank_above_the_columns() -> None:
    saved(ROWS)


@case("detect x.npy --rank nan")
def rank_nan() -> None:
    saved(ROWS)


@case("shorten x.npy --rank mysterious")
def rank_of_an_unknown_rule() -> None:
    saved(ROWS)


@case("report x.npy -o missing/report.html")
def output_in_a_missing_folder() -> None:
    saved(ROWS)


@case("report x.npy -o report.pdf")
def output_of_another_kind() -> None:
    saved(ROWS)


@case("report x.npy -o out.html")
def output_is_a_folder() -> None:
    saved(ROWS)
    Path("out.html").mkdir()


@case("detect x.npy --by-label")
def by_label_without_labels() -> None:
    saved(ROWS)


@case("report --column vectors")
def column_of_nothing() -> None:
    pass


@case("reproduce no-such-system --quick")
def system_unknown() -> None:
    pass


@case("reproduce")
def no_system_named() -> None:
    pass


@case("models install no-such-model")
def model_unknown() -> None:
    pass


@case("cache clear --older-than -1")
def age_below_zero() -> None:
    pass


@case("--data missing list")
def data_folder_missing() -> None:
    pass


@case("frobnicate x.npy")
def verb_unknown() -> None:
    saved(ROWS)


# ---------------------------------------------------------------------- archives


@case("report x.npz")
def npz_that_is_no_archive() -> None:
    Path("x.npz").write_bytes(b"PK\x03\x04 and then nothing of use")


@case("report x.npz")
def npz_truncated() -> None:
    np.savez("x.npz", a=ROWS)
    Path("x.npz").write_bytes(Path("x.npz").read_bytes()[:-40])


@case("report x.npz")
def npz_of_objects() -> None:
    np.savez("x.npz", a=np.array([{}, []], dtype=object))


@case("report x.npz")
def npz_with_several_tables() -> None:
    np.savez("x.npz", a=ROWS, b=ROWS)


@case("report x.npz --column c")
def npz_without_the_column() -> None:
    np.savez("x.npz", a=ROWS, b=ROWS)


@case("report x.npz")
def npz_without_arrays() -> None:
    with zipfile.ZipFile("x.npz", "w"):
        pass


@case("report x.npz")
def npz_zip_bomb() -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (2**31, 1)})
    with zipfile.ZipFile("x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", stream.getvalue() + bytes(2**20))
        # The directory of the archive, written last, promises two gigabytes from a kilobyte.
        archive.infolist()[0].file_size = len(stream.getvalue()) + 2**31


@case("report x.npz")
def npz_whose_header_lies() -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (40, 8)})
    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.writestr("a.npy", stream.getvalue() + b"\0" * 12)


@case("report x.safetensors")
def safetensors_empty() -> None:
    Path("x.safetensors").write_bytes(b"")


@case("report x.safetensors")
def safetensors_with_an_endless_header() -> None:
    Path("x.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


@case("report x.safetensors")
def safetensors_truncated() -> None:
    from safetensors.numpy import save_file

    save_file({"a": ROWS}, "x.safetensors")
    Path("x.safetensors").write_bytes(Path("x.safetensors").read_bytes()[:-50])


@case("report x.parquet")
def parquet_that_is_none() -> None:
    Path("x.parquet").write_bytes(b"PAR1 and no more PAR1")


def parquet(columns: dict[str, list[object]]) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra tables")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.table(columns), "x.parquet")


@case("report x.parquet")
def parquet_ragged() -> None:
    parquet({"v": [[1.0, 2.0]] * 39 + [[1.0]]})


@case("report x.parquet")
def parquet_with_missing_vectors() -> None:
    parquet({"v": [[1.0, 2.0]] * 39 + [None]})


@case("report x.parquet")
def parquet_of_texts() -> None:
    parquet({"v": ["a", "b"] * 20})


@case("report x.parquet --labels kind")
def parquet_without_the_label_column() -> None:
    parquet({"v": [[1.0, float(i)] for i in range(40)]})


@case("report x.parquet")
def parquet_without_rows() -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra tables")
    import pyarrow.parquet

    schema = arrow.schema([("v", arrow.list_(arrow.float32()))])
    pyarrow.parquet.write_table(schema.empty_table(), "x.parquet")


@case("report x.npz")
def npz_whose_deflate_is_damaged() -> None:
    np.savez_compressed("x.npz", a=ROWS)
    damage("x.npz")


@case("report x.npz")
def npz_of_a_sparse_matrix() -> None:
    from scipy import sparse

    sparse.save_npz("x.npz", sparse.csr_matrix(ROWS))


@case("report x.npz")
def npz_of_a_graph() -> None:
    np.savez("x.npz", adj_indptr=np.arange(3), attr_indptr=np.arange(3))


@case("report x.npy")
def npy_header_with_open_brackets() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': " + b"(" * 67 + b"\n"
    Path("x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 4)


@case("report x.npy --labels y.npy")
def labels_that_are_no_characters() -> None:
    saved(ROWS)
    saved(np.array([0x11_0000 + i for i in range(40)], np.uint32).view("<U1"), "y.npy")


@case("report x.parquet")
def parquet_with_two_columns_of_one_name() -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra tables")
    import pyarrow.parquet

    arrays = [arrow.array(range(40)), arrow.array(range(40))]
    pyarrow.parquet.write_table(arrow.Table.from_arrays(arrays, names=["a", "a"]), "x.parquet")


@case("report x.feather")
def feather_damaged() -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra tables")
    import pyarrow.feather

    pyarrow.feather.write_feather(arrow.table({f"x{i}": ROWS[:, i] for i in range(8)}), "x.feather")
    damage("x.feather", where=0.9)


@case("cluster links.edges --attributes x.npy")
def edges_whose_deflate_is_damaged() -> None:
    saved(ROWS)
    Path("links.edges.gz").write_bytes(gzip.compress(b"".join(b"%d %d\n" % (i % 40, i * i % 40) for i in range(999))))
    damage("links.edges.gz")
    Path("links.edges.gz").rename("links.edges")


@case("cluster links.edges.gz --attributes x.npy")
def packed_edges_whose_deflate_is_damaged() -> None:
    saved(ROWS)
    lines = np.random.default_rng(0).integers(40, size=(999, 2))
    Path("links.edges.gz").write_bytes(gzip.compress(b"".join(b"%d %d\n" % tuple(line) for line in lines)))
    damage("links.edges.gz")


@case("cluster links.edges --attributes x.npy")
def edges_to_a_node_of_5000_digits() -> None:
    saved(ROWS)
    Path("links.edges").write_text("0 1\n1 " + "9" * 5000 + "\n")


@case("cluster links.edges --attributes x.npy --labels names.txt")
def labels_too_few_for_a_graph() -> None:
    saved(ROWS)
    Path("links.edges").write_text("0 1\n1 2\n")
    Path("names.txt").write_text("a\nb\n")


@case("cluster graph.npz --labels kind")
def labels_that_a_graph_has_not() -> None:
    np.savez("graph.npz", **{f"{part}_{name}": values for part in ("adj", "attr") for name, values in
                             {"data": np.ones(1), "indices": np.zeros(1, int), "indptr": np.array([0, 1]),
                              "shape": np.array([1, 1])}.items()})  # fmt: skip


@case("report graph.edges")
def graph_for_a_table() -> None:
    Path("graph.edges").write_text("0 1\n")


@case("report x.npy")
def npy_that_is_a_pipe() -> None:
    os.mkfifo("x.npy")


@case("report x.csv")
def csv_that_is_a_pipe() -> None:
    os.mkfifo("x.csv")


@case("report x.npy --labels names.txt")
def labels_that_are_a_pipe() -> None:
    saved(ROWS)
    os.mkfifo("names.txt")


@case("report pictures.zip")
def zip_that_is_a_pipe() -> None:
    os.mkfifo("pictures.zip")


@case("align x.npy y.npy -o map.safetensors")
def one_row_to_align() -> None:
    saved(ROWS[:1])
    saved(ROWS[:1], "y.npy")


# ---------------------------------------------------------------------- text formats


@case("report x.csv")
def csv_empty() -> None:
    Path("x.csv").write_text("")


@case("report x.csv")
def csv_of_a_header_alone() -> None:
    Path("x.csv").write_text("a,b,c\n")


@case("report x.csv")
def csv_without_a_header() -> None:
    Path("x.csv").write_text("1,2\n3,4\n" * 20)


@case("report x.csv")
def csv_ragged() -> None:
    Path("x.csv").write_text("a,b\n" + "1,2\n" * 20 + "1,2,3\n")


@case("report x.csv")
def csv_with_a_word() -> None:
    Path("x.csv").write_text("a,b\n" + "1,2\n" * 20 + "1,two\n")


@case("report x.csv")
def csv_with_a_gap() -> None:
    Path("x.csv").write_text("a,b\n" + "1,2\n" * 20 + "1,\n")


@case("report x.csv")
def csv_with_nan() -> None:
    Path("x.csv").write_text("a,b\n" + "1,2\n3,5\n" * 20 + "1,nan\n")


@case("report x.csv")
def csv_not_utf8() -> None:
    Path("x.csv").write_bytes(b"a,b\n" + b"1,2\n" * 20 + b"\xff\xfe,2\n")


@case("report x.csv.gz")
def csv_gz_that_is_not_packed() -> None:
    Path("x.csv.gz").write_text("a,b\n1,2\n")


@case("report x.csv.gz")
def csv_gz_truncated() -> None:
    packed = gzip.compress(("a,b\n" + "".join(f"{i},{i * i}\n" for i in range(400))).encode())
    Path("x.csv.gz").write_bytes(packed[: len(packed) // 2])


@case("report x.csv.gz")
def csv_gz_whose_deflate_is_damaged() -> None:
    Path("x.csv.gz").write_bytes(gzip.compress(("a\n" + "\n".join(map(str, ROWS.ravel()))).encode()))
    damage("x.csv.gz")


@case("report x.jsonl.gz")
def jsonl_gz_whose_deflate_is_damaged() -> None:
    Path("x.jsonl.gz").write_bytes(
        gzip.compress("".join(f'{{"text": "{value}"}}\n' for value in ROWS.ravel()).encode())
    )
    damage("x.jsonl.gz")


@case("report x.csv")
def csv_with_two_columns_of_one_name() -> None:
    Path("x.csv").write_text("a,a\n1,2\n3,5\n")


@case("report x.csv")
def csv_with_a_megabyte_in_a_field() -> None:
    Path("x.csv").write_text("a,b\n" + "1,2\n3,5\n" * 20 + "1," + "x" * 2**20 + "\n")


@case("report x.csv --labels kind")
def csv_with_labels_that_steer_the_terminal() -> None:
    Path("x.csv").write_text("a,\x1b[2J\x1b]0;title\x07kind\n" + "1,2\n3,5\n" * 20)


@case("report x.jsonl")
def jsonl_vectors_of_unequal_lengths() -> None:
    Path("x.jsonl").write_text('{"id": 1, "embedding": [0.5, 1]}\n{"id": 2, "embedding": [0.5]}\n')


@case("report x.jsonl")
def jsonl_vectors_of_400_digits() -> None:
    Path("x.jsonl").write_text('{"embedding": [0.5, 1]}\n{"embedding": [0.5, ' + "9" * 400 + "]}\n")


@case("report x.jsonl --text-column text")
def jsonl_with_half_a_character() -> None:
    Path("x.jsonl").write_text('{"text": "\\ud800"}\n')


@case("report x.csv --text-column words")
def csv_without_the_text_column() -> None:
    Path("x.csv").write_text("a,b\n1,2\n")


@case("detect x.npy --shots 3")
def rows_have_no_shots() -> None:
    np.save("x.npy", np.random.default_rng(0).normal(size=(40, 6)))


@case("report x.csv --text-column words --id-column key")
def csv_of_texts_without_the_id_column() -> None:
    Path("x.csv").write_text("id,words\n1,some words\n")


@case("report x.csv --labels kind")
def csv_without_the_label_column() -> None:
    Path("x.csv").write_text("a,b\n" + "1,2\n3,5\n" * 20)


@case("report x.jsonl")
def jsonl_broken() -> None:
    Path("x.jsonl").write_text('{"text": "fine"}\n{"text": \n')


@case("report x.jsonl")
def jsonl_of_lists() -> None:
    Path("x.jsonl").write_text("[1, 2]\n")


@case("report x.jsonl --text-column text")
def jsonl_with_a_number_for_a_text() -> None:
    Path("x.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')


@case("report x.jsonl")
def jsonl_nested_too_deep() -> None:
    Path("x.jsonl").write_text("[" * 100_000 + "\n")


@case("report x.txt")
def txt_empty() -> None:
    Path("x.txt").write_text("")


@case("report x.txt")
def txt_not_utf8() -> None:
    Path("x.txt").write_bytes("latin-1: \xe9\n".encode("latin-1"))


@case("report x.txt --column vectors")
def txt_with_a_column() -> None:
    Path("x.txt").write_text("one\ntwo\n")


@case("report x.jsonl")
def jsonl_with_an_empty_text() -> None:
    Path("x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", " ", "three")))


@case("report x.docx")
def a_format_that_is_not_read() -> None:
    Path("x.docx").write_bytes(b"PK\x03\x04")


# ---------------------------------------------------------------------- labels and pairs


@case("report x.npy --labels names.txt")
def labels_too_few() -> None:
    saved(ROWS)
    Path("names.txt").write_text("a\nb\n")


@case("report x.npy --labels names.npy")
def labels_of_two_axes() -> None:
    saved(ROWS)
    saved(ROWS, "names.npy")


@case("report x.npy --labels names.npy")
def labels_pickled() -> None:
    saved(ROWS)
    saved(np.array([{}] * 40, dtype=object), "names.npy", allow_pickle=True)


@case("report x.npy --labels names.txt")
def labels_all_the_same() -> None:
    saved(ROWS)
    Path("names.txt").write_text("a\n" * 40)


@case("report x.npy --labels names.txt")
def labels_that_do_not_exist() -> None:
    saved(ROWS)


@case("report x.npy --against y.npy")
def against_fewer_rows() -> None:
    saved(ROWS)
    saved(ROWS[:30], "y.npy")


@case("report x.npy --against y.npy")
def against_nothing() -> None:
    saved(ROWS)


@case("report x.npy --against y.npy")
def against_constant_rows() -> None:
    saved(ROWS)
    saved(np.ones((40, 8), np.float32), "y.npy")


@case("align x.npy y.npy -o map.safetensors")
def align_unequal_rows() -> None:
    saved(ROWS)
    saved(ROWS[:30], "y.npy")


@case("align x.npy y.npy --method realign -o map.safetensors")
def realign_unequal_columns() -> None:
    saved(ROWS)
    saved(ROWS[:, :5], "y.npy")


@case("detect x.npy --fit y.npy -o scores.csv")
def detect_with_other_columns() -> None:
    saved(ROWS)
    saved(ROWS[:, :5], "y.npy")


# ---------------------------------------------------------------------- images


def picture(name: str, size: tuple[int, int] = (32, 32)) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra vision")
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    image_module.new("RGB", size, (200, 30, 30)).save(name)


@case("report pictures")
def folder_empty() -> None:
    Path("pictures").mkdir()


@case("report pictures")
def folder_without_images() -> None:
    Path("pictures").mkdir()
    Path("pictures/notes.txt").write_text("no image")


@case("report pictures.zip")
def zip_that_is_none() -> None:
    Path("pictures.zip").write_bytes(b"not a zip archive")


@case("report pictures.zip")
def zip_without_images() -> None:
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        archive.writestr("notes.txt", "no image")


@case("report pictures --text-column caption")
def images_with_a_text_column() -> None:
    picture("pictures/a.png")


@case("detect tiles")
def anomaly_folder_without_good_images() -> None:
    Path("tiles/train/good").mkdir(parents=True)
    picture("tiles/test/crack/a.png")


@case("detect tiles --fit other")
def anomaly_folder_fitted_elsewhere() -> None:
    picture("tiles/train/good/a.png")
    Path("tiles/test").mkdir()


def needs_the_vision_network() -> None:
    from subspan.datasets import is_installed

    if not is_installed("efficientnet-lite0"):
        pytest.skip("the weights of efficientnet-lite0 are not installed (subspan models install efficientnet-lite0)")


@case("report pictures")
def image_broken() -> None:
    needs_the_vision_network()
    for index in range(3):
        picture(f"pictures/{index}.png")
    Path("pictures/1.png").write_bytes(Path("pictures/1.png").read_bytes()[:40])


@case("report pictures")
def image_that_is_a_text() -> None:
    needs_the_vision_network()
    Path("pictures").mkdir()
    Path("pictures/a.jpg").write_text("I am no image")


@case("report pictures")
def image_bomb() -> None:
    needs_the_vision_network()
    image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra vision")
    Path("pictures").mkdir()
    image_module.new("1", (20_000, 20_000)).save("pictures/a.png")


@case("report pictures")
def images_too_few() -> None:
    needs_the_vision_network()
    for index in range(3):
        picture(f"pictures/{index}.png", (16 + index, 40))


# ----------------------------------------------------------------------


def listing() -> dict[str, int]:
    return {str(path): path.stat().st_size for path in sorted(Path().rglob("*"))}


def check(code: int, out: str, err: str, before: dict[str, int]) -> None:
    assert code == 2, (code, err)
    assert out == ""
    assert "Traceback" not in err
    # A shape or type that only the checks of the test run refuse would pass in use.
    assert "Type-check" not in err
    lines = err.splitlines()
    assert len([line for line in lines if line.startswith("subspan: error: ")]) == 1
    # Beside the error only warnings of the program itself, one line each.
    assert all(line.startswith(("subspan: error: ", "subspan: warning: ")) for line in lines)
    assert 20 < len(lines[-1]) < 400
    assert listing() == before
    assert "\x1b" not in err


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_malformed_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, command = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    make()
    before = listing()
    code = cli.run(command.split())
    captured = capsys.readouterr()
    check(code, captured.out, captured.err, before)


def test_a_terminal_that_knows_ascii_alone_and_names_that_are_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of a file steers the terminal, nothing that it cannot show ends the work, files keep what they are."""
    monkeypatch.chdir(tmp_path)
    name = b"caf\xe9 \x1b[2J.csv"
    label = "na\u00efve \u4e2d \x1b[31m:smile:\x9b"
    rows = "".join(f"{label},{','.join(map(str, row))}\n" for row in ROWS)
    Path(os.fsdecode(name)).write_text("id," + ",".join(f"x{i}" for i in range(8)) + "\n" + rows, encoding="utf-8")
    # Both forms in one process, which takes seconds to start.
    twice = "import sys; from subspan.cli import run; run(sys.argv[1:-1]); print('====='); sys.exit(run(sys.argv[1:]))"
    ran = subprocess.run(
        [sys.executable, "-c", twice, "detect", name, "--labels", "id", "--top", "1", "-o", "scores.csv", "--json"],
        capture_output=True, timeout=200, check=False, env={
            **os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C",
            "COLUMNS": "300",
        },
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert b"Traceback" not in ran.stderr
    assert not {0x1B, 0x9B} & set(ran.stdout + ran.stderr)
    assert ran.stdout.isascii()
    words, facts = ran.stdout.decode().split("=====")
    assert ":smile:" in words
    assert json.loads(facts)["top"][0]["label"] == label
    assert label in Path("scores.csv").read_text(encoding="utf-8")
    capsys.readouterr()
    assert cli.run(["report", os.fsdecode(name), "--labels", "\x1b[2J"]) == 2
    assert "caf\\udce9 \\x1b[2J.csv" in capsys.readouterr().err
    assert cli.run(["report", os.fsdecode(name), "-o", "page.html", "--json", "facts.json"]) == 0
    assert "caf\\udce9" in Path("page.html").read_text(encoding="utf-8")
    assert "caf\\\\udce9" in Path("facts.json").read_text(encoding="utf-8")


def test_malformed_input_as_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, command = CASES["npy-empty-file"]
    monkeypatch.chdir(tmp_path)
    make()
    before = listing()
    arguments = [sys.executable, "-m", "subspan", *command.split()]
    environment = {**os.environ, "SUBSPAN_CACHE": str(tmp_path.parent / f"{tmp_path.name}-cache")}
    ran = subprocess.run(
        arguments, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False, env=environment
    )
    check(ran.returncode, ran.stdout, ran.stderr, before)
