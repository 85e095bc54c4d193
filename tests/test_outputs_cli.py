"""What every verb writes: never onto what it reads, together or not at all, and nothing is left of a run that fails."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from subspan import cli
from subspan.base.outputs import Output, Outputs
from subspan.commands import columns

FILES = {
    "x.npy": np.arange(24.0).reshape(8, 3), "good.npy": np.arange(15.0).reshape(5, 3), "labels.npy": np.arange(8),
    "ids.npy": np.arange(8), "x.safetensors": b"", "x.csv": b"a,b\n1,2\n", "labels.csv": b"label\n1\n",
    "labels.json": b"[]", "links.csv": b"0 1\n", "words.csv": b"1,2\n", "x.parquet": b"", "old.faiss": b"",
    "new.parquet": b"", "ids.txt": b"1\n", "queries.parquet": b"", "queries.txt": b"", "shards/a.npy": b"",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    for name, content in FILES.items():
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        else:
            np.save(name, content)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def refused(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    before = contents(folder)
    assert cli.run(arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert contents(folder) == before
    return err


@pytest.mark.parametrize(
    "arguments",
    [
        "report x.npy --json x.npy", "report x.npy --against good.npy --json good.npy",
        "report x.npy --labels labels.npy --json labels.npy",
        "detect x.npy -o x.npy", "detect x.npy --fit good.npy -o good.npy", "detect x.csv -o x.csv",
        "detect x.npy --labels labels.npy -o labels.npy",
        "select x.npy -o x.npy", "select x.npy --labels labels.csv -o labels.csv",
        "cluster x.csv -o x.csv", "cluster x.npy --labels labels.csv -o labels.csv",
        "cluster links.csv --attributes words.csv -o words.csv",
        "cluster links.csv --attributes words.csv -o links.csv",
        "shorten x.npy -o x.npy", "shorten x.safetensors --map x.safetensors", "shorten old.faiss -o old.faiss",
        "align x.npy good.npy --apply x.npy", "align x.npy good.npy --apply good.npy",
        "align x.safetensors good.npy -o x.safetensors", "align x.npy x.safetensors -o x.safetensors",
        "upgrade old.faiss new.parquet --wrap old.faiss", "upgrade old.faiss new.parquet --migrate old.faiss",
        "upgrade old.faiss new.parquet --migrate new.parquet", "upgrade old.faiss new.parquet -o old.faiss",
        "upgrade old.faiss x.safetensors -o x.safetensors",
        "upgrade x.npy new.parquet --index-ids ids.npy --backfill-order ids.npy",
        "upgrade x.npy new.parquet --sample-ids ids.txt --backfill-order ids.txt",
        "upgrade x.npy new.parquet --labels ids.txt --backfill-order ids.txt",
        "upgrade x.npy new.parquet --query-labels queries.txt --backfill-order queries.txt",
        "upgrade x.npy new.parquet --queries-new queries.parquet --migrate queries.parquet",
        "upgrade x.npy new.parquet --queries-old queries.parquet --migrate queries.parquet",
    ],
)  # fmt: skip
def test_an_output_that_is_an_input_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert "is input, which is never overwritten; choose another name" in refused(folder, capsys, arguments)


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_a_link_to_an_input_is_one(folder: Path, capsys: pytest.CaptureFixture[str], link: str) -> None:
    (os.symlink if link == "symbolic" else os.link)("x.npy", "other.npy")
    assert "-o: 'other.npy' is input" in refused(folder, capsys, "detect x.npy -o other.npy")


@pytest.mark.parametrize(
    "arguments",
    ["shorten shards -o shards/short.npy", "upgrade shards new.parquet --migrate shards/new.npy",
     "detect shards -o shards/../shards/scores.npy"],
)  # fmt: skip
def test_an_output_among_shards_that_are_read_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert "lies in 'shards', which is input; choose another place" in refused(folder, capsys, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        "report x.npy -o page.html --json page.html", "cluster x.npy -o both.csv --report both.csv",
        "shorten x.npy -o both.safetensors --map ./both.safetensors", "align x.npy good.npy -o both --apply both",
        "upgrade old.faiss new.parquet -o a.faiss --wrap a.faiss",
        "upgrade old.faiss new.parquet -o a.faiss -o a.faiss",
        "upgrade old.faiss new.parquet --wrap a.faiss --migrate A.faiss",
        "upgrade x.npy new.parquet --migrate a.npy --backfill-order a.npy",
    ],
)  # fmt: skip
def test_two_outputs_that_are_one_file_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert " is the file of " in refused(folder, capsys, arguments)


ROWS = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)


def fail(*_: object, **__: object) -> None:
    raise ValueError("late")


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ("report x.npy -o old.html --json old.json", "subspan.cli.describing.write_text"),
        ("detect x.npy -o old.csv", "subspan.commands.columns.write_rows"),
        ("select x.npy -o old.npy", "subspan.commands.columns.write_array"),
        ("cluster x.npy -c 2 -o old.csv --report old.html", "subspan.report.render_clusters"),
        ("shorten x.npy --rank 2 -o old.npy --map old.safetensors", "subspan.datasets.index_writing.verify"),
        ("align x.npy x.npy -o old.safetensors --apply old.npy", "subspan.cli.mapping.write_array"),
        ("upgrade x.npy x.npy -o old.safetensors --migrate new.npy --backfill-order old.txt --report old.html",
         "subspan.report.render_upgrade"),
    ],
)  # fmt: skip
def test_a_run_that_fails_late_leaves_all_of_the_last_and_nothing_of_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, last: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", ROWS)
    for suffix in (".html", ".json", ".csv", ".npy", ".safetensors", ".txt"):
        Path(f"old{suffix}").write_text(f"of the last run{suffix}")
    monkeypatch.setattr(last, fail)
    assert refused(tmp_path, capsys, arguments) == "subspan: error: late\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_facts_may_go_into_a_pipe_and_devices_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", ROWS)
    os.mkfifo("scores.csv")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(Path("scores.csv").read_text()))
    reader.start()
    assert cli.run(["detect", "x.npy", "-o", "scores.csv"]) == 0
    reader.join()
    assert read[0].splitlines()[0] == "row,score,outlier"
    assert stat.S_ISFIFO(os.stat("scores.csv").st_mode)
    before = os.lstat("/dev/null")
    assert cli.run(["report", "x.npy", "--json", "/dev/null"]) == 0
    assert os.lstat("/dev/null").st_ino == before.st_ino
    assert sorted(os.listdir()) == ["report.html", "scores.csv", "x.npy"]
    capsys.readouterr()


def test_of_two_runs_with_one_output_the_second_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", ROWS)
    codes: list[int] = []
    inner: Callable[..., None] = columns.write_rows

    def while_written(*arguments: object) -> None:
        codes.append(cli.run(["detect", "x.npy", "-o", "y.csv"]))
        inner(*arguments)

    monkeypatch.setattr(columns, "write_rows", while_written)
    assert cli.run(["detect", "x.npy", "-o", "y.csv"]) == 0
    assert codes == [2]
    assert "y.csv' is being written by another process" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["x.npy", "y.csv"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be forked")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_asked_to_end_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    number = getattr(signal, name)

    def work() -> int:
        with Outputs(Output("-o", tmp_path / "y.csv")) as outputs:
            outputs[tmp_path / "y.csv"].write_text("half")
            os.kill(os.getpid(), number)
            time.sleep(60)
        return 0

    child = os.fork()
    if child == 0:
        signal.signal(number, signal.SIG_DFL)
        monkeypatch.setattr("subspan.cli.running.run", work)
        try:
            cli.main()
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    assert os.listdir(tmp_path) == []
