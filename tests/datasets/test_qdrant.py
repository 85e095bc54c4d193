"""Qdrant collections: every vector and payload is kept, ids have one spelling, and a folder executes nothing."""

from __future__ import annotations

import json
import sqlite3
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subspan import cli
from subspan.datasets.index_writing import write_index
from subspan.datasets.indexes import open_index

client = pytest.importorskip("qdrant_client", reason="qdrant-client comes with the extra qdrant")
from qdrant_client import models  # noqa: E402

N, D = 90, 8
ROWS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
IDS = [str(uuid.UUID(int=(i + 1) << 100 | 0xABC)) for i in range(N)]
TURN = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0][:, :5].astype(np.float32)


def turned(rows: np.ndarray) -> np.ndarray:
    return rows @ TURN


def several(folder: Path | None, *, unnamed: bool = False) -> Any:
    """A collection with a dense vector, another one, a multivector and a sparse one; some points have but a part."""
    store = client.QdrantClient(":memory:") if folder is None else client.QdrantClient(path=str(folder))
    text = models.VectorParams(size=D, distance=models.Distance.COSINE)
    many = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    dense = {
        "text": text,
        "image": models.VectorParams(size=3, distance=models.Distance.DOT),
        "tokens": models.VectorParams(size=2, distance=models.Distance.DOT, multivector_config=many),
    }
    words = {"words": models.SparseVectorParams(modifier=models.Modifier.IDF)}
    store.create_collection("c", vectors_config=text if unnamed else dense, sparse_vectors_config=words)
    points = []
    for i, name in enumerate(IDS):
        vectors: dict[str, Any] = {"words": models.SparseVector(indices=[i], values=[0.5])}
        if i % 10:
            vectors["" if unnamed else "text"] = ROWS[i].tolist()
        if i % 3 and not unnamed:
            vectors |= {"image": [1.0, i, 0.5], "tokens": [[1.0, 0.0], [0.5, 0.25]]}
        points.append(models.PointStruct(id=name, vector=vectors, payload={"k": i, "deep": {"a": [None, "ü"]}}))
    store.upsert("c", points)
    return store


@pytest.mark.parametrize("unnamed", [False, True])
@pytest.mark.parametrize("held", ["folder", "client"])
def test_a_migrated_collection_keeps_all_that_is_not_mapped(held: str, unnamed: bool, tmp_path: Path) -> None:
    store = several(tmp_path / "x" if held == "folder" else None, unnamed=unnamed)
    before = {point.id: point for point in store.scroll("c", limit=N, with_vectors=True)[0]}
    if held == "folder":
        store.close()
    name = "" if unnamed else "text"
    source = open_index(str(tmp_path / "x") if held == "folder" else store, column=name or None)
    assert len(source) == 81
    assert f"beside 9 points without {name!r}" in source.form or unnamed
    unit = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    np.testing.assert_allclose(source.take(source.positions(np.array(IDS[1:10]))), unit[1:10], atol=1e-6)
    write_index(source, tmp_path / "y", turned, 5, key="turn", block=20)
    written = client.QdrantClient(path=str(tmp_path / "y"))
    params = written.get_collection("c").config.params
    expected = models.VectorParams(size=5, distance=models.Distance.COSINE)
    if unnamed:
        assert params.vectors == expected
    else:
        assert list(params.vectors) == ["text", "image", "tokens"]
        assert params.vectors["text"] == expected
        assert params.vectors["tokens"].multivector_config.comparator == "max_sim"
    assert params.sparse_vectors["words"].modifier == "idf"
    after = {point.id: point for point in written.scroll("c", limit=N, with_vectors=True)[0]}
    written.close()
    assert after.keys() == before.keys()
    for i, point in enumerate(IDS):
        assert after[point].payload == before[point].payload
        old, new = before[point].vector, after[point].vector
        assert new.keys() == old.keys()
        for other in old.keys() - {name}:
            assert new[other] == old[other]
        if i % 10:
            mapped = turned(unit[i : i + 1])[0]
            # A local client gives cosine vectors back as they were written, or at unit length.
            found = np.array(new[name]) / np.linalg.norm(new[name])
            np.testing.assert_allclose(found, mapped / np.linalg.norm(mapped), atol=1e-5)


def test_a_column_of_the_collection_need_not_be_one_of_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    monkeypatch.chdir(tmp_path)
    several(tmp_path / "x").close()
    some = [i for i in range(N) if i % 10]
    for name in ("vector", "text"):
        table = arrow.table({"id": [IDS[i].upper() for i in some], name: list(ROWS[some]), "other": list(ROWS[some])})
        parquet.write_table(table if name == "text" else table.drop_columns("other"), "new.parquet")
        assert cli.run(["upgrade", "x", "new.parquet", "--column", "text", "--dry-run"]) == 0, capsys.readouterr().err
        assert "81 pairs" in capsys.readouterr().out


def test_one_uuid_has_many_spellings(tmp_path: Path) -> None:
    several(tmp_path / "x").close()
    source = open_index(tmp_path / "x", column="text")
    known = np.array(IDS[1:9])
    for spelled in (known, np.char.upper(known), np.char.replace(known, "-", ""), np.char.add("urn:uuid:", known)):
        assert source.ids[source.positions(spelled)].tolist() == known.tolist()
    with pytest.raises(ValueError, match="occurs more than once"):
        source.positions(np.array([IDS[1], IDS[1].upper()]))


def test_ids_beyond_int64_are_read_and_written(tmp_path: Path) -> None:
    store = client.QdrantClient(path=str(tmp_path / "x"))
    store.create_collection("c", vectors_config=models.VectorParams(size=D, distance=models.Distance.DOT))
    ids = [2**64 - 1 - i for i in range(60)] + [5]
    store.upsert("c", [models.PointStruct(id=name, vector=ROWS[i].tolist()) for i, name in enumerate(ids)])
    store.close()
    source = open_index(tmp_path / "x")
    np.testing.assert_array_equal(source.take(source.positions(np.array([2**64 - 3, 5], np.uint64))), ROWS[[2, 60]])
    write_index(source, tmp_path / "y", turned, 5, key="turn")
    assert open_index(tmp_path / "y").ids.tolist() == source.ids.tolist()
    for metric in ("inner", "euclidean", "cosine"):
        write_index(source, tmp_path / metric, turned, 5, key="turn", metric=metric)
        assert open_index(tmp_path / metric).metric == metric


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (None, "say which vector of 'c' .'text', 'image'."),
        ("nothing", "say which vector of 'c' .'text', 'image'."),
        ("tokens", "'tokens' of 'c' is a multivector, several rows a point.*'text', 'image'"),
        ("words", "'words' of 'c' is sparse, and maps are of dense vectors; name one .'text', 'image'."),
    ],
)
def test_what_no_map_takes_is_said_with_what_can_be_done(column: str | None, message: str, tmp_path: Path) -> None:
    several(tmp_path / "x").close()
    with pytest.raises(ValueError, match=message):
        open_index(tmp_path / "x", column=column)


def test_a_folder_is_neither_changed_nor_locked(tmp_path: Path) -> None:
    store = several(tmp_path / "x")
    before = {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert len(open_index(tmp_path / "x", column="text")) == 81  # while its own client has it open
    store.close()
    assert {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()} == before


def plant(folder: Path, row: bytes) -> None:
    with sqlite3.connect(folder / "collection" / "c" / "storage.sqlite") as table:
        table.execute("UPDATE points SET point = ? WHERE rowid = 7", (row,))
    table.close()


MALICIOUS = {
    "system": b"cposix\nsystem\n(S'touch planted'\ntR.",
    "eval": b"cbuiltins\neval\n(S\"open('planted', 'w')\"\ntR.",
    "inside": b"\x80\x04}\x8c\x01ac" + b"posix\nsystem\n(S'touch planted'\ntRs.",
    "of the right module": b"cqdrant_client.http.models.models\nos.system\n(S'touch planted'\ntR.",
    "dotted": b"\x80\x04\x8c\x21qdrant_client.http.models.models\x8c\x12PointStruct.__new__\x93.",
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("row", MALICIOUS.values(), ids=MALICIOUS.keys())
def test_a_planted_row_is_refused_and_not_executed(
    row: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    several(tmp_path / "x").close()
    plant(tmp_path / "x", row)
    np.save("new.npy", ROWS)
    assert cli.run(["upgrade", "x", "new.npy", "--column", "text"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a row" in error
    assert not (tmp_path / "planted").exists()


def test_a_planted_unfinished_folder_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run is resumed in a folder that a client opens, and clients unpickle."""
    monkeypatch.chdir(tmp_path)
    several(tmp_path / "x").close()
    source = open_index(tmp_path / "x", column="text")

    def stopped(rows: np.ndarray) -> np.ndarray:
        if len(list(tmp_path.rglob("storage.sqlite"))) > 1 and rows[0, 0] == source.take(np.array([60]))[0, 0]:
            raise KeyboardInterrupt
        return turned(rows)

    with pytest.raises(KeyboardInterrupt):
        write_index(source, tmp_path / "y", stopped, 5, key="turn", block=20)
    unfinished = next(path for path in tmp_path.rglob("storage.sqlite") if "x" not in path.parts)
    plant(unfinished.parent.parent.parent, MALICIOUS["system"])
    with pytest.raises(ValueError, match=r"a row asks for posix\.system"):
        write_index(source, tmp_path / "y", turned, 5, key="turn", block=20)
    assert not (tmp_path / "planted").exists()


def damaged(folder: Path, what: str) -> None:
    file = folder / "collection" / "c" / "storage.sqlite"
    if what == "meta.json":
        (folder / "meta.json").write_text("{")
    elif what == "another meta.json":
        (folder / "meta.json").write_text(json.dumps({"name": "dataset"}))
    elif what == "no table":
        file.unlink()
    elif what == "cut off":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif what == "no database":
        file.write_text("no database\n" * 500)
    elif what == "lies elsewhere":
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({"collections": {"../../other": meta["collections"]["c"]}}))
    else:
        rows = {"cut row": b"\x80\x04\x95", "number": b"K\x01.", "empty row": b"", "text": b"no pickle"}
        plant(folder, rows[what])


@pytest.mark.parametrize(
    "what",
    ["meta.json", "another meta.json", "no table", "cut off", "no database", "lies elsewhere", "cut row", "number",
     "empty row", "text"],
)  # fmt: skip
def test_a_damaged_folder_is_named_in_one_line(what: str, tmp_path: Path) -> None:
    several(tmp_path / "x").close()
    damaged(tmp_path / "x", what)
    with pytest.raises(ValueError, match=str(tmp_path / "x")) as error:
        open_index(tmp_path / "x", column="text")
    assert "\n" not in str(error.value)
