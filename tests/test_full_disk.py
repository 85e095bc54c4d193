"""A disk that is full: one line that names the file, exit code 2, nothing left, everything of the last run in place."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from subspan import cli

resource = pytest.importorskip("resource", reason="a system without limits for processes")

ROWS = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
ROOM = 6000
"""Bytes that a file may have: more than a marker, less than what the verbs write of 400 rows."""

COMMANDS = {
    "report x.npy -o y.html": "y.html", "detect x.npy -o y.csv": "y.csv", "select x.npy -m 0.99 -o y.json": "y.json",
    "cluster x.npy -c 2 -o y.npz": "y.npz", "shorten x.npy -k 6 -o y.npy": "y.npy",
    "shorten x.npy -k 6 -o y.parquet": "y.parquet", "shorten x.npy -k 6 -o y.faiss": "y.faiss",
    "shorten wide.npy -k 40 -o y.npy --map y.safetensors": "y.safetensors",
    "align x.npy x.npy --apply y.npy": "y.npy", "upgrade wide.npy wide.npy --method ridge -o y.faiss": "y.faiss",
    "upgrade wide.npy wide.npy --method ridge -o y.onnx": "y.onnx",
    "upgrade x.faiss x.npy --method ridge --wrap y.faiss": "y.faiss",
    "upgrade ivf.faiss x.npy --method ridge --migrate z.faiss": "z.faiss",
}  # fmt: skip


@pytest.fixture
def little_room() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("arguments", COMMANDS)
@pytest.mark.usefixtures("little_room")
def test_every_verb_says_which_file_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "faiss" in arguments:
        faiss = pytest.importorskip("faiss")
        index = faiss.IndexFlatIP(8)
        index.add(ROWS)
        faiss.write_index(index, "x.faiss")
        inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(8), 8, 4, faiss.METRIC_INNER_PRODUCT)
        inverted.train(ROWS)
        inverted.add(ROWS)
        faiss.write_index(inverted, "ivf.faiss")
    if "onnx" in arguments:
        pytest.importorskip("onnx")
    if "parquet" in arguments:
        pytest.importorskip("pyarrow")
    np.save("x.npy", ROWS)
    np.save("wide.npy", np.random.default_rng(1).normal(size=(400, 48)).astype(np.float32))
    name = COMMANDS[arguments]
    if name.startswith("y"):
        Path(name).write_text("of the last run")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
    code = cli.run(arguments.split())
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{name}' cannot be written (" in err
    assert "File too large" in err or "written" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def feature_rows(start: int) -> Iterator[np.ndarray]:
    for first in range(start, 160, 20):
        yield np.full((20, 256), first, np.float32)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
def test_features_that_do_not_fit_on_the_disk_twice_are_an_error_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspan.datasets import cached_features

    # 160 kB of shards fit, the joined file beside them does not.
    mount = ["mount", "-t", "tmpfs", "-o", "size=240k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no disk can be mounted here")
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "cache"))
    try:
        child = os.fork()  # writing to a map without space ends a process
        if child == 0:
            try:
                cached_features(feature_rows, data=1, shard_rows=40)
            except OSError as error:
                said = str(error).endswith("features.npy' cannot be written (No space left on device)")
                os._exit(0 if said else 3)
            finally:
                os._exit(4)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert code == 0
