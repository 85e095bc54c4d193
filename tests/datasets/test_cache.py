"""The cache: the same key the same rows, one computation among processes, damage and interruption survived."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from subspan.datasets import cache_entries, cache_folder, cached_features, clear_cache, fingerprint, open_image
from subspan.datasets.cache import KINDS, entry_folder, whole_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Rows:
    """The rows 0, 1, … n − 1 in blocks of 10, which remembers from where it was asked, and may break off."""

    def __init__(self, n: int = 100, break_after: int | None = None) -> None:
        self.n, self.break_after, self.starts = n, break_after, []

    def __call__(self, start: int) -> Iterator[torch.Tensor]:
        self.starts.append(start)
        for first in range(start, self.n, 10):
            if self.break_after is not None and first >= self.break_after:
                raise KeyboardInterrupt
            yield torch.arange(first, min(first + 10, self.n)).float()[:, None].expand(-1, 3)


def expected(n: int = 100) -> np.ndarray:
    return np.arange(n, dtype=np.float32)[:, None].repeat(3, 1)


def test_rows_are_computed_once() -> None:
    compute = Rows()
    first = cached_features(compute, data="texts", shard_rows=30)
    second = cached_features(compute, data="texts", shard_rows=30)
    np.testing.assert_array_equal(first, expected())
    np.testing.assert_array_equal(second, expected())
    assert compute.starts == [0]
    assert isinstance(second, np.memmap)
    assert not second.flags.writeable


def test_another_model_data_or_option_is_another_entry() -> None:
    compute, model = Rows(20), nn.Linear(2, 2)
    for options in (
        {},
        {"data": "a"},
        {"data": "b"},
        {"data": "a", "options": {"layer": 1}},
        {"data": "a", "options": {"layer": 2}},
        {"data": "a", "model": model},
    ):
        cached_features(compute, **options)
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    cached_features(compute, data="a", model=model)
    assert len(compute.starts) == 7
    cached_features(compute, data="a", model=model)
    assert len(compute.starts) == 7


def test_an_interrupted_computation_goes_on_from_its_last_shard(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cached_features(Rows(break_after=70), data=1, shard_rows=20)
    assert sorted(file.name for file in folder.rglob("part-*")) == [f"part-{index:06d}.npy" for index in range(3)]
    assert [entry.finished for entry in cache_entries()] == [False]
    compute = Rows()
    np.testing.assert_array_equal(cached_features(compute, data=1, shard_rows=20), expected())
    assert compute.starts == [60]
    assert sorted(file.name for file in folder.rglob("*") if file.is_file()) == ["entry.json", "features.npy"]


def test_a_failed_computation_goes_on_from_its_last_shard() -> None:
    class Failed(Exception):
        pass

    def failing(start: int) -> Iterator[torch.Tensor]:
        for block in Rows()(start):
            if block[0, 0] >= 70:
                raise Failed
            yield block

    with pytest.raises(Failed):
        cached_features(failing, data=1, shard_rows=20)
    compute = Rows()
    np.testing.assert_array_equal(cached_features(compute, data=1, shard_rows=20), expected())
    assert compute.starts == [60]


def test_a_damaged_shard_and_what_follows_it_are_computed_again(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cached_features(Rows(break_after=70), data=1, shard_rows=20)
    shard = next(folder.rglob("part-000001.npy"))
    shard.write_bytes(shard.read_bytes()[:-7])
    compute = Rows()
    np.testing.assert_array_equal(cached_features(compute, data=1, shard_rows=20), expected())
    assert compute.starts == [20]


@pytest.mark.parametrize("name", ["features.npy", "entry.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "nonsense", "list", "brackets", "missing"])
def test_a_damaged_entry_is_computed_again(folder: Path, name: str, damage: str) -> None:
    cached_features(Rows(), data=1)
    file = next(folder.rglob(name))
    whole = file.read_bytes()
    file.unlink()
    if damage != "missing":
        damaged = {"cut": whole[:-9], "empty": b"", "nonsense": b"\x93NUMPY nonsense {", "list": b"[]",
                   "brackets": b"[" * 100_000}  # fmt: skip
        file.write_bytes(damaged[damage])
    compute = Rows()
    np.testing.assert_array_equal(cached_features(compute, data=1), expected())
    assert compute.starts == [0]


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows \(4,\) follows blocks of rows \(3,\)"):
        cached_features(lambda start: [np.ones((2, 3)), np.ones((2, 4))], data=1)
    with pytest.raises(ValueError, match="no rows were given"):
        cached_features(lambda start: [], data=2)
    with pytest.raises(ValueError, match="numeric rows"):
        cached_features(lambda start: [np.array([object()])], data=3)


def slow_rows(log: Path) -> Callable[[int], Iterator[np.ndarray]]:
    def compute(start: int) -> Iterator[np.ndarray]:
        with log.open("a") as stream:
            stream.write(f"{start}\n")
        for first in range(start, 100, 10):
            time.sleep(0.05)
            yield expected()[first : first + 10]

    return compute


def work(log: Path) -> None:
    np.testing.assert_array_equal(cached_features(slow_rows(log), data="shared", shard_rows=20), expected())


def started(log: Path) -> multiprocessing.Process:
    worker = multiprocessing.get_context("fork").Process(target=work, args=(log,))
    worker.start()
    return worker


def test_of_two_processes_one_computes_and_the_other_waits(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    workers = [started(log) for _ in range(2)]
    for worker in workers:
        worker.join(timeout=100)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert log.read_text() == "0\n"


def test_a_killed_process_leaves_shards_and_no_lock(tmp_path: Path, folder: Path) -> None:
    log = tmp_path / "starts"
    worker = started(log)
    deadline = time.monotonic() + 100
    while not list(folder.rglob("part-000001.npy")):
        assert worker.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.kill()
    worker.join()
    work(log)
    starts = [int(line) for line in log.read_text().split()]
    assert starts[0] == 0
    assert starts[1] >= 40


def fill_half(target: Path) -> None:
    with whole_folder(target) as unfinished:
        (unfinished / "half").touch()
        raise RuntimeError("broken off")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "models" / "m"
    with pytest.raises(RuntimeError, match="broken off"):
        fill_half(target)
    assert not target.exists()
    with whole_folder(target) as unfinished:
        (unfinished / "file").write_text("whole")
        assert not target.exists()
    with whole_folder(target) as unfinished:
        assert unfinished is None
    assert (target / "file").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["m"]


def test_the_cache_can_be_listed_and_cleared(folder: Path) -> None:
    cached_features(Rows(50), data=1, options={"layer": "blocks.3"})
    cached_features(Rows(20), data=2)
    entries = cache_entries()
    assert [entry.kind for entry in entries] == ["features", "features"]
    assert entries[0].options == {"layer": "'blocks.3'"}
    assert entries[0].megabytes > 0
    assert clear_cache(older_than_days=1) == 0
    assert clear_cache() == pytest.approx(sum(entry.megabytes for entry in entries))
    assert cache_entries() == []
    compute = Rows(20)
    cached_features(compute, data=2)
    assert compute.starts == [0]


def fill(kind: str) -> None:
    with whole_folder(entry_folder(kind, "k")) as unfinished:
        assert unfinished is not None
        (unfinished / "weights").write_bytes(bytes(1 << 20))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_listed_and_cleared(folder: Path, kind: str) -> None:
    fill(kind)
    assert [(entry.kind, entry.key, entry.megabytes, entry.finished) for entry in cache_entries()] == [
        (kind, "k", 1, True)
    ]
    assert clear_cache() == 1
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_nothing_is_kept_outside_the_kinds() -> None:
    with pytest.raises(ValueError, match="kind: expected one of features"):
        entry_folder("attic", "k")
    source = Path(__file__).parents[2] / "src" / "subspan"
    code = re.compile(r"^(?! *>>>).*(cache_folder|SUBSPAN_CACHE)", re.MULTILINE)  # examples may
    asking = {
        str(path.relative_to(source)) for path in source.rglob("*.py") if code.search(path.read_text(encoding="utf-8"))
    }
    # The cache itself, and the command that shows where it is; all others ask for the place of an entry.
    assert asking == {"datasets/cache.py", "cli/systems.py"}
    used = {
        kind
        for path in source.rglob("*.py")
        for kind in re.findall(r'(?:entry_folder\(|kept\(\s*\w+,\s*)"([^"]+)"', path.read_text(encoding="utf-8"))
    }
    assert used == set(KINDS)


def test_what_a_process_is_making_is_not_cleared(folder: Path) -> None:
    freed = []

    def compute(start: int) -> Iterator[torch.Tensor]:
        for block in Rows()(start):
            freed.append(clear_cache())
            yield block

    np.testing.assert_array_equal(cached_features(compute, data=1, shard_rows=20), expected())
    assert freed == [0] * 10
    with whole_folder(entry_folder("models", "m")) as unfinished:
        assert unfinished is not None
        (unfinished / "file").write_text("whole")
        assert clear_cache() > 0  # the features
    assert [(entry.kind, entry.key) for entry in cache_entries()] == [("models", "m")]


@pytest.mark.parametrize("kind", KINDS)
def test_what_killed_runs_have_left_is_listed_and_cleared(folder: Path, kind: str) -> None:
    child = os.fork()
    if child == 0:
        with whole_folder(entry_folder(kind, "k")) as unfinished:
            assert unfinished is not None
            (unfinished / "half").write_bytes(bytes(1 << 20))
            os._exit(0)
    os.waitpid(child, 0)
    assert [(entry.kind, entry.key, entry.finished) for entry in cache_entries()] == [(kind, "k", False)]
    assert clear_cache() == pytest.approx(1, abs=0.01)
    assert cache_entries() == []
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_what_a_killed_run_has_left_goes_with_the_next_of_its_kind(folder: Path) -> None:
    child = os.fork()
    if child == 0:
        with whole_folder(entry_folder("models", "a")):
            os._exit(0)
    os.waitpid(child, 0)
    fill_models_b = entry_folder("models", "b")
    with whole_folder(fill_models_b) as unfinished:
        assert unfinished is not None
    assert [path.name for path in (folder / "models").iterdir()] == ["b"]


def test_a_clearing_that_is_killed_leaves_no_half_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill("models")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "rmdir", lambda *_, **__: os._exit(0))
        monkeypatch.setattr(os, "unlink", lambda *_, **__: os._exit(0))
        clear_cache()
    os.waitpid(child, 0)
    assert not entry_folder("models", "k").exists()
    fill("models")
    assert [path.name for path in (folder / "models").iterdir()] == ["k"]


def test_a_full_disk_is_an_error_before_a_map_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"features.npy' cannot be written \(No space left on device\)"):
        cached_features(Rows(), data=1, shard_rows=20)
    monkeypatch.undo()
    monkeypatch.setenv("SUBSPAN_CACHE", str(folder))
    compute = Rows()
    np.testing.assert_array_equal(cached_features(compute, data=1, shard_rows=20), expected())
    assert compute.starts == [100]


def test_the_folder_follows_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == folder
    (tmp_path / "file").touch()
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match="SUBSPAN_CACHE"):
        cache_folder()
    monkeypatch.delenv("SUBSPAN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tmp_path in cache_folder().parents


def test_different_contents_have_different_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    values = [
        None, True, 1, 1.0, "1", b"1", "a", ["a", "b"], ["ab"], [["a"], "b"], {"a": 1}, {"a": 2}, {"b": 1}, (),
        np.arange(4), np.arange(4.0), np.arange(4).reshape(2, 2), torch.arange(4), torch.arange(4, dtype=torch.int32),
        torch.zeros(0), torch.zeros((0, 1)), torch.float32, tmp_path / "a", tmp_path / "b", nn.Linear(1, 1),
        nn.Identity(),
    ]  # fmt: skip
    prints = [fingerprint(value) for value in values]
    assert len(set(prints)) == len(values)
    assert prints == [fingerprint(value) for value in values]
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


@pytest.mark.parametrize("value", [object(), np.array([object()]), open_image])
def test_what_has_no_stable_content_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="no fingerprint"):
        fingerprint(value)


def test_the_description_is_plain_json(folder: Path) -> None:
    cached_features(Rows(20), data=1)
    described = json.loads(next(folder.rglob("entry.json")).read_text())
    assert described == {"shape": [20, 3], "dtype": "float32", "options": {}}
