"""Stored vectors: every kind gives its rows under their ids, and is written whole, resumed, or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subspan.base.files import Target, written_together
from subspan.datasets.index_writing import write_index
from subspan.datasets.indexes import open_index, read_ids

faiss = pytest.importorskip("faiss", reason="faiss comes with the extra index")

N, D = 900, 16
ROWS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
IDS = np.random.default_rng(1).permutation(5000)[:N]
TURN = np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))[0][:, :12].astype(np.float32)


def turned(rows: np.ndarray) -> np.ndarray:
    return rows @ TURN


def build(factory: str, path: Path) -> Path:
    index = faiss.index_factory(D, factory)
    index.train(ROWS)
    if "IDMap" in factory or "IVF" in factory:
        index.add_with_ids(ROWS, IDS)
    else:
        index.add(ROWS)
    faiss.write_index(index, str(path))
    return path


EXACT = ["Flat", "IDMap,Flat", "IDMap2,Flat", "IVF4,Flat", "HNSW8", "IDMap,HNSW8", "OPQ4,Flat", "OPQ4,IVF4,Flat"]
EXACT += ["IDMap,OPQ4,HNSW8", "IDMap2,IVF4,Flat", "PCAW16,Flat", "PQ4x4,RFlat"]
CODES = ["SQ8", "IVF4,SQ8", "IDMap,PQ4x4", "OPQ4,IVF4,PQ4x4", "PCAR8,IVF4,SQ8", "PCAW8,Flat", "IVF4,PQ4x4fs", "PQ4x4fs"]
CODES += ["IVF4,PQ4x4fsr", "L2norm,IVF4,Flat", "PCA8,HNSW8"]
FASTEST = (
    "Flat",
    "IDMap2,Flat",
    "IVF4,Flat",
    "IDMap,HNSW8",
    "IVF4,SQ8",
    "OPQ4,IVF4,PQ4x4",
    "IVF4,PQ4x4fs",
    "PCA8,HNSW8",
)


@pytest.mark.parametrize("factory", EXACT + CODES)
def test_a_faiss_index_gives_its_rows_under_their_ids(factory: str, tmp_path: Path) -> None:
    opened = open_index(build(factory, tmp_path / "x.faiss"))
    with_ids = "IDMap" in factory or "IVF" in factory
    places = opened.positions(IDS if with_ids else np.arange(N))
    error = np.abs(opened.take(places) - ROWS).max()
    assert opened.shape == (N, D)
    assert opened.metric == "euclidean"
    assert opened.exact == (factory in EXACT)
    assert error < 1e-4 if factory in EXACT else 1e-4 < error < 4
    blocks = np.concatenate([rows for _, rows in opened.blocks(77)])
    np.testing.assert_allclose(blocks[places], opened.take(places), atol=1e-6)


@pytest.mark.parametrize("factory", FASTEST)
def test_a_migrated_faiss_index_answers_as_exact_search_does(factory: str, tmp_path: Path) -> None:
    source = open_index(build(factory, tmp_path / "x.faiss"))
    before = (tmp_path / "x.faiss").read_bytes()
    facts = write_index(source, tmp_path / "y.faiss", turned, 12, key="turn")
    back = open_index(tmp_path / "y.faiss")
    np.testing.assert_allclose(back.take(back.positions(source.ids)), turned(source.take(np.arange(N))), atol=1e-5)
    assert facts["verified"]["agreement"] > 0.9
    index = faiss.read_index(str(tmp_path / "y.faiss"))
    assert type(faiss.downcast_index(index)).__name__ == facts["form"].split(" in ")[-1]
    assert (tmp_path / "x.faiss").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["x.faiss", "y.faiss"]


@pytest.mark.parametrize("shortened", [False, True])
def test_rows_behind_transforms_are_undone(shortened: bool, tmp_path: Path) -> None:
    """A map in front of an id map, as `upgrade --wrap` writes it: rows come back under their ids."""
    inner = faiss.IndexIDMap2(faiss.IndexFlatIP(9 if shortened else D))
    matrix = np.random.default_rng(3).normal(size=(D, inner.d)).astype(np.float32)
    shift = np.arange(inner.d, dtype=np.float32)
    inner.add_with_ids(ROWS @ matrix + shift, IDS)
    linear = faiss.LinearTransform(D, inner.d, True)
    faiss.copy_array_to_vector(np.ascontiguousarray(matrix.T).ravel(), linear.A)
    faiss.copy_array_to_vector(shift, linear.b)
    linear.is_trained = True
    wrapped = faiss.IndexPreTransform(inner)
    wrapped.prepend_transform(linear)
    wrapped.prepend_transform(faiss.NormalizationTransform(D, 2.0))
    faiss.write_index(wrapped, str(tmp_path / "x.faiss"))
    opened = open_index(tmp_path / "x.faiss")
    assert opened.form == "IndexFlatIP in IndexIDMap2 in IndexPreTransform"
    kept = ROWS @ matrix @ np.linalg.pinv(matrix)
    np.testing.assert_allclose(opened.take(opened.positions(IDS)), kept, atol=2e-4)
    assert not opened.exact


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IDMap,HNSW8"])
@pytest.mark.parametrize("metric", ["inner", "euclidean"])
def test_a_written_index_ranks_as_its_source(factory: str, metric: str, tmp_path: Path) -> None:
    kind = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(D, factory, kind)
    index.train(ROWS)
    index.add(ROWS) if factory == "Flat" else index.add_with_ids(ROWS, IDS)
    if "IVF" in factory:
        index.nprobe = 3
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    write_index(open_index(tmp_path / "x.faiss"), tmp_path / "y.faiss", turned, 12, key="turn")
    written = faiss.read_index(str(tmp_path / "y.faiss"))
    assert written.metric_type == kind
    assert getattr(written, "nprobe", None) == getattr(index, "nprobe", None)


def test_ids_that_were_removed_are_not_there(tmp_path: Path) -> None:
    index = faiss.index_factory(D, "IVF4,Flat")
    index.train(ROWS)
    index.add_with_ids(ROWS, IDS)
    index.remove_ids(IDS[:50].astype(np.int64))
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    opened = open_index(tmp_path / "x.faiss")
    assert len(opened) == N - 50
    place, known = opened.look_up(IDS)
    assert known.tolist() == [False] * 50 + [True] * (N - 50)
    np.testing.assert_array_equal(opened.take(place[known]), ROWS[50:])


def refused(path: Path, what: str) -> None:
    if what == "bits":
        bits = faiss.IndexBinaryFlat(D)
        bits.add(np.packbits(ROWS > 0, axis=1))
        faiss.write_index_binary(bits, str(path))
        return
    index = faiss.index_factory(D, {"LSH of ITQ": "ITQ8,LSH", "dedup": "IVF4,FlatDedup"}.get(what, "IDMap,Flat"))
    rows = np.concatenate([ROWS[:800], ROWS[:100]]) if what == "dedup" else ROWS
    index.train(rows)
    if what == "repeated":
        index.add_with_ids(rows, IDS // 3 * 3)
    else:
        index.add(rows)
    faiss.write_index(index, str(path))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("bits", "binary index, of bits, .* give the vectors that it was made of"),
        ("LSH of ITQ", "cannot be taken out again; give them as a table"),
        ("dedup", "counts 900 vectors and holds 800 under 800 ids; give them as a table"),
        ("repeated", r"occurs more than once: \d+ ids for 900 vectors; number the vectors themselves"),
    ],
)
def test_an_index_whose_vectors_cannot_be_had_is_refused_with_what_would_be_right(
    what: str, message: str, tmp_path: Path
) -> None:
    refused(tmp_path / "x.faiss", what)
    with pytest.raises(ValueError, match=message) as error:
        open_index(tmp_path / "x.faiss")
    assert "x.faiss" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["fixed", "variable", "columns"])
def test_a_parquet_table_keeps_its_ids_and_other_columns(kind: str, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    columns: dict[str, object] = {"id": IDS, "title": [f"item {name}" for name in IDS]}
    if kind == "columns":
        del columns["title"]
        columns |= {f"v{j}": ROWS[:, j] for j in range(D)}
    elif kind == "fixed":
        columns["vector"] = arrow.FixedSizeListArray.from_arrays(arrow.array(ROWS.reshape(-1)), D)
    else:
        columns["vector"] = list(ROWS)
    parquet.write_table(arrow.table(columns), tmp_path / "x.parquet", row_group_size=200)
    source = open_index(tmp_path / "x.parquet")
    assert source.ids.dtype == np.int64
    write_index(source, tmp_path / "y.parquet", turned, 12, key="turn")
    back = open_index(tmp_path / "y.parquet")
    np.testing.assert_array_equal(back.ids, IDS)
    np.testing.assert_allclose(back.take(np.arange(N)), turned(ROWS), atol=1e-5)
    if kind != "columns":
        assert parquet.read_table(tmp_path / "y.parquet")["title"].to_pylist() == columns["title"]


def test_a_large_row_group_is_read_in_blocks(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"id": IDS, "vector": list(ROWS)}), tmp_path / "x.parquet", row_group_size=500)
    opened = open_index(tmp_path / "x.parquet")
    for size, start in ((70, 0), (70, 140), (333, 666), (2000, 0)):
        blocks = list(opened.blocks(size, start=start))
        assert [first for first, _ in blocks] == list(range(start, N, size))
        assert all(len(rows) == size for _, rows in blocks[:-1])
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), ROWS[start:])
    chosen = np.array([899, 3, 500, 499])
    np.testing.assert_array_equal(opened.take(chosen), ROWS[chosen])


def test_text_ids_and_shards(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    folder = tmp_path / "shards"
    folder.mkdir()
    for part, (start, stop) in enumerate([(0, 400), (400, N)]):
        table = arrow.table({"id": [f"doc-{i}" for i in IDS[start:stop]], "vector": list(ROWS[start:stop])})
        parquet.write_table(table, folder / f"part-{part}.parquet")
    opened = open_index(folder)
    assert opened.form == "2 shards"
    np.testing.assert_array_equal(opened.take(opened.positions(np.array([f"doc-{IDS[500]}"])))[0], ROWS[500])
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in opened.blocks(150)]), ROWS)
    write_index(opened, tmp_path / "y.parquet", turned, 12, key="turn")
    assert open_index(tmp_path / "y.parquet").ids[7] == f"doc-{IDS[7]}"
    with pytest.raises(ValueError, match="whole numbers"):
        write_index(opened, tmp_path / "y.faiss", turned, 12, key="turn")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_plain_tables(suffix: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS.astype(np.float16))
    source = open_index(tmp_path / "x.npy")
    write_index(source, tmp_path / f"y{suffix}", turned, 12, key="turn")
    back = open_index(tmp_path / f"y{suffix}")
    np.testing.assert_allclose(back.take(np.arange(N)), turned(ROWS.astype(np.float16).astype(np.float32)), atol=1e-5)


def test_ids_of_a_separate_file_go_into_safetensors(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    np.save(tmp_path / "ids.npy", IDS)
    source = open_index(tmp_path / "x.npy", ids=tmp_path / "ids.npy")
    with pytest.raises(ValueError, match=r"\.npy holds no ids"):
        write_index(source, tmp_path / "y.npy", turned, 12, key="turn")
    write_index(source, tmp_path / "y.safetensors", turned, 12, key="turn")
    np.testing.assert_array_equal(open_index(tmp_path / "y.safetensors").ids, IDS)


def test_qdrant_keeps_points_and_payloads(tmp_path: Path) -> None:
    client = pytest.importorskip("qdrant_client", reason="qdrant-client comes with the extra qdrant")
    from qdrant_client import models

    rows, ids = ROWS[:60], IDS[:60].tolist()
    store = client.QdrantClient(path=str(tmp_path / "x"))
    store.create_collection("a", vectors_config=models.VectorParams(size=D, distance=models.Distance.COSINE))
    store.upsert("a", models.Batch(ids=ids, vectors=rows.tolist(), payloads=[{"n": i} for i in ids]))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    source = open_index(store)
    assert source.metric == "cosine"
    np.testing.assert_allclose(source.take(source.positions(IDS[:60])), unit, atol=1e-5)
    write_index(source, tmp_path / "y", turned, 12, key="turn", block=16)
    store.close()
    back = open_index(tmp_path / "y")
    mapped = turned(unit)
    expected = mapped / np.linalg.norm(mapped, axis=1, keepdims=True)
    found = back.take(back.positions(IDS[:60]))
    np.testing.assert_allclose(found / np.linalg.norm(found, axis=1, keepdims=True), expected, atol=1e-5)
    assert back.values.whole([ids[7]])[0][1] == {"n": ids[7]}  # pyright: ignore
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_a_disk_that_is_full_for_qdrant_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("qdrant_client", reason="qdrant-client comes with the extra qdrant")
    from qdrant_client import models

    store = client.QdrantClient(path=str(tmp_path / "x"))
    store.create_collection("a", vectors_config=models.VectorParams(size=D, distance=models.Distance.DOT))
    store.upsert("a", models.Batch(ids=[1, 2, 3], vectors=ROWS[:3].tolist(), payloads=[{}, {}, {}]))
    store.close()

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(client.QdrantClient, "upsert", full)
    with pytest.raises(OSError, match=r"y' cannot be written \(database or disk is full\)"):
        write_index(open_index(tmp_path / "x"), tmp_path / "y", turned, 12, key="turn")
    assert os.listdir(tmp_path) == ["x"]


def _slowly(source: Path, target: Path) -> None:
    def slow(rows: np.ndarray) -> np.ndarray:
        time.sleep(0.02)
        return turned(rows)

    write_index(open_index(source), target, slow, 12, key="turn", block=30)


@pytest.mark.parametrize("record", ["[]", "3", "{}", '{"key": "x", "rows": "all"}', "[" * 100_000, ""])
def test_a_record_of_progress_that_is_none_counts_no_rows(tmp_path: Path, record: str) -> None:
    from subspan.datasets.index_writing import _recorded_rows

    (tmp_path / "progress.json").write_text(record)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _recorded_rows(tmp_path / "progress.json", "x") == 0


def test_ids_of_files(tmp_path: Path) -> None:
    np.save(tmp_path / "large.npy", np.array([1, 2**64 - 1], dtype=np.uint64))
    assert read_ids(tmp_path / "large.npy").tolist() == ["1", "18446744073709551615"]
    np.save(tmp_path / "texts.npy", np.array(["007", "8"]))
    assert read_ids(tmp_path / "texts.npy").tolist() == ["007", "8"]
    np.save(tmp_path / "numbers.npy", np.array([7, 8], dtype=np.int32))
    assert read_ids(tmp_path / "numbers.npy").dtype == np.int64
    (tmp_path / "ids.txt").write_text("\ufeffa\nb\u2028c\n", encoding="utf-8")
    assert read_ids(tmp_path / "ids.txt").tolist() == ["a", "b\u2028c"]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {"id": pyarrow.array([1, 2**64 - 1], pyarrow.uint64()), "v": [[1.0, 2.0], [3.0, 4.0]]}
    parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    assert open_index(tmp_path / "x.parquet").ids.tolist() == ["1", "18446744073709551615"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_migration_killed_ten_times_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    source, target = build("IDMap2,Flat", tmp_path / "x.faiss"), tmp_path / "y.faiss"
    write_index(open_index(source), tmp_path / "whole.faiss", turned, 12, key="turn", block=30)

    def recorded() -> str:
        return next((record.read_text() for record in tmp_path.glob(".y.faiss.*/progress.json")), "")

    processes = multiprocessing.get_context("fork")
    reached = []
    rng = np.random.default_rng(3)
    for _ in range(10):
        before = recorded()
        process = processes.Process(target=_slowly, args=(source, target))
        process.start()
        limit = time.monotonic() + 60
        while recorded() in ("", before) and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.03)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not target.exists()
        reached.append(json.loads(recorded())["rows"])
    assert reached == sorted(reached)
    assert len(set(reached)) > 5
    facts = write_index(open_index(source), target, turned, 12, key="turn", block=30)
    assert facts["resumed_at"] == reached[-1] > 0
    assert target.read_bytes() == (tmp_path / "whole.faiss").read_bytes()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_run_with_another_map_does_not_resume(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)

    def stopped(rows: np.ndarray) -> np.ndarray:
        if rows[0, 0] == ROWS[300, 0]:
            raise KeyboardInterrupt
        return turned(rows)

    source = open_index(tmp_path / "x.npy")
    with pytest.raises(KeyboardInterrupt):
        write_index(source, tmp_path / "y.npy", stopped, 12, key="one", block=100)
    with pytest.warns(UserWarning, match="another map"):
        facts = write_index(source, tmp_path / "y.npy", lambda rows: 2 * turned(rows), 12, key="two", block=100)
    assert facts["resumed_at"] == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npy", allow_pickle=False), 2 * turned(ROWS), atol=1e-5)


@pytest.mark.parametrize("changed", ["a.npy", "b.npy", "c.npy"])
@pytest.mark.parametrize("time_kept", [True, False])
def test_a_shard_that_changed_meanwhile_is_not_resumed(tmp_path: Path, changed: str, time_kept: bool) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for place, name in enumerate(("a.npy", "b.npy", "c.npy")):
        np.save(shards / name, ROWS[200 * place : 200 * (place + 1)])

    def stopped(rows: np.ndarray) -> np.ndarray:
        if rows[0, 0] == ROWS[300, 0]:
            raise KeyboardInterrupt
        return turned(rows)

    with pytest.raises(KeyboardInterrupt):
        write_index(open_index(shards), tmp_path / "y.npy", stopped, 12, key="one", block=100)
    before = (shards / changed).stat()
    rows = np.load(shards / changed, allow_pickle=False) + 1
    np.save(shards / changed, rows)
    if time_kept:
        os.utime(shards / changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    source = open_index(shards)
    with pytest.warns(UserWarning, match="of other vectors"):
        facts = write_index(source, tmp_path / "y.npy", turned, 12, key="one", block=100)
    assert facts["resumed_at"] == 0
    wanted = np.concatenate([np.load(shards / name, allow_pickle=False) for name in ("a.npy", "b.npy", "c.npy")])
    np.testing.assert_allclose(np.load(tmp_path / "y.npy", allow_pickle=False), turned(wanted), atol=1e-5)


def test_what_a_run_writes_beside_its_shards_does_not_keep_it_from_resuming(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    (tmp_path / "out").mkdir()

    def run(transform: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        with written_together([Target(tmp_path / "page.html")]):
            return write_index(open_index(tmp_path), tmp_path / "out" / "y.npy", transform, 12, key="one", block=100)

    def stopped(rows: np.ndarray) -> np.ndarray:
        if rows[0, 0] == ROWS[300, 0]:
            raise KeyboardInterrupt
        return turned(rows)

    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    assert run(turned)["resumed_at"] == 300


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)

    def broken(rows: np.ndarray) -> np.ndarray:
        mapped = turned(rows)
        mapped[rows[:, 0] == ROWS[500, 0]] = np.nan
        return mapped

    with pytest.raises(ValueError, match="id '500' is mapped to NaN"):
        write_index(open_index(tmp_path / "x.npy"), tmp_path / "y.npy", broken, 12, key="k", block=100)
    assert os.listdir(tmp_path) == ["x.npy"]


def test_a_faulty_write_is_noticed_when_read_back(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    calls = iter(range(100))

    def drifting(rows: np.ndarray) -> np.ndarray:
        return turned(rows) * (1 + next(calls))

    with pytest.raises(ValueError, match="do not come back"):
        write_index(open_index(tmp_path / "x.npy"), tmp_path / "y.npy", drifting, 12, key="k", block=300)
    assert os.listdir(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("factory", ["Flat", "IDMap,Flat", "IVF4,Flat", "HNSW8"])
def test_a_truncated_index_is_refused(factory: str, tmp_path: Path) -> None:
    path = build(factory, tmp_path / "x.faiss")
    whole = path.read_bytes()
    for cut in (3, 60, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match="not a whole FAISS index"):
            open_index(path)


def test_the_original_and_what_exists_are_not_overwritten(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    source = open_index(tmp_path / "x.npy")
    os.symlink(tmp_path / "x.npy", tmp_path / "link.npy")
    for name, message in (("x.npy", "original"), ("link.npy", "original")):
        with pytest.raises(ValueError, match=message):
            write_index(source, tmp_path / name, turned, 12, key="k")
    (tmp_path / "there.npy").write_text("x")
    with pytest.raises(ValueError, match="exists"):
        write_index(source, tmp_path / "there.npy", turned, 12, key="k")


def test_shards_must_be_alike(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    np.save(tmp_path / "b.npy", ROWS[:, :8])
    with pytest.raises(ValueError, match="8 columns of float32"):
        open_index(tmp_path)
    np.save(tmp_path / "b.npy", ROWS.astype(np.float64))
    with pytest.raises(ValueError, match="of float64"):
        open_index(tmp_path)
