import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from processes import in_processes
from subspan.statistics import CrossMoments, GroupedMoments, Moments, batches, fit_moments, is_one_shot, is_stream


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((1000, 7)) + 3


def test_every_source_gives_the_same_moments(rows, tmp_path):
    np.save(tmp_path / "x.npy", rows)
    arrow = pytest.importorskip("pyarrow", reason="Parquet is an optional extra")
    import pyarrow.parquet as parquet

    table = arrow.table({f"c{i}": rows[:, i] for i in range(7)} | {"name": ["a"] * 1000})
    parquet.write_table(table, tmp_path / "columns.parquet", row_group_size=128)
    vectors = arrow.FixedSizeListArray.from_arrays(rows.ravel(), 7)
    parquet.write_table(arrow.table({"id": range(1000), "v": vectors}), tmp_path / "vectors.parquet")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(rows), torch.arange(1000)), batch_size=90
    )
    sources = [
        rows,
        torch.from_numpy(rows),
        tmp_path / "x.npy",
        str(tmp_path / "columns.parquet"),
        tmp_path / "vectors.parquet",
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        loader,
        (rows[i : i + 77] for i in range(0, 1000, 77)),
        [{"x": torch.from_numpy(rows)}],
    ]
    exact = np.cov(rows.T)
    for source in sources:
        found = fit_moments(source, batch_size=64)
        np.testing.assert_allclose(found.covariance().numpy(), exact, rtol=1e-9)
    assert is_stream(loader)
    assert is_stream(tmp_path / "x.npy")
    assert not is_stream(rows)
    assert is_one_shot(iter([rows]))
    assert not is_one_shot(loader)


def test_a_file_is_read_as_the_table_reader_reads_it(rows, tmp_path):
    """Ragged lists are refused, large lists read, an id is no dimension, and no digit of whole numbers is lost."""
    arrow = pytest.importorskip("pyarrow", reason="Parquet is an optional extra")
    import pyarrow.parquet as parquet

    def written(**columns):
        parquet.write_table(arrow.table(columns), tmp_path / "x.parquet", row_group_size=128)
        return tmp_path / "x.parquet"

    lists = arrow.array(rows.tolist(), arrow.large_list(arrow.float64()))
    np.testing.assert_allclose(fit_moments(written(id=range(1000), v=lists)).mean.numpy(), rows.mean(0))
    columns = {f"c{i}": rows[:, i] for i in range(7)}
    with pytest.warns(UserWarning, match=r"left out: 'id' \(an id\)"):
        assert fit_moments(written(id=range(1000), **columns)).mean.shape == (7,)
    ragged = [row[: 7 + (i == 900)] for i, row in enumerate(np.ones((1000, 8)).tolist())]
    with pytest.raises(ValueError, match=r"row 900 of 'v' .* has 8 values, row 0 has 7"):
        fit_moments(written(v=ragged))
    with pytest.raises(ValueError, match=r"'v' .* has 1 values"):
        fit_moments(written(v=[[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]]))
    large = 2**40 + np.arange(40).reshape(10, 4)[:, ::-1] % 7
    np.testing.assert_allclose(fit_moments(written(a=large[:, 0], b=large[:, 1])).mean, large[:, :2].mean(0), rtol=0)
    with pytest.raises(ValueError, match=r"source: '.*x\.parquet' cannot be read \(batch: .*NaN"):
        fit_moments(written(a=[1.0, np.nan], b=[1.0, 2.0]))
    (tmp_path / "x.csv").write_text("a,b\n" + "1.5,2\n3.5,4\n" * 5)
    np.testing.assert_allclose(fit_moments(tmp_path / "x.csv").mean, [2.5, 3])
    rest = list(batches(tmp_path / "x.csv", 4, skip=3))
    assert [len(batch) for batch in rest] == [4, 3]


def test_skipping_rows_across_batches(rows):
    for source in (rows, [rows[:300], rows[300:]]):
        rest = torch.cat(list(batches(source, 128, skip=450)))
        np.testing.assert_array_equal(rest.numpy(), rows[450:])


def test_unreadable_sources_are_named(tmp_path, rows):
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    (tmp_path / "x.txt").write_text("1 2 3")
    for name, message in [
        ("cut.npy", "not an .npy array"),
        ("objects.npy", "pickled"),
        ("x.txt", "is a text"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_moments(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fit_moments(tmp_path / "absent.npy")
    with pytest.raises(ValueError, match="holds no rows"):
        fit_moments(iter([]))
    with pytest.raises(TypeError, match="cannot read rows"):
        fit_moments(3)
    with pytest.raises(TypeError, match="cannot read rows from a Graph; a graph is no table"):
        fit_moments(pytest.importorskip("networkx").path_graph(4))
    with pytest.raises(ValueError, match="columns"):
        fit_moments([rows, rows[:, :3]])


WORKER = """
import sys, time, numpy as np
from subspan.statistics import fit_moments
rows = np.load(sys.argv[1], mmap_mode="r")
pause, seconds = float(sys.argv[4]), float(sys.argv[5])
def slow():
    for start in range(0, len(rows), 50):
        time.sleep(pause)
        yield rows[start:start + 50]
moments = fit_moments(slow(), batch_size=50, checkpoint=sys.argv[2], checkpoint_seconds=seconds)
moments.save(sys.argv[3])
"""


def test_killed_twenty_times_it_resumes_to_the_same_result(tmp_path):
    rows = np.random.default_rng(1).standard_normal((40_000, 6)) + 100
    np.save(tmp_path / "x.npy", rows)
    paths = [str(tmp_path / name) for name in ("x.npy", "part.safetensors", "done.safetensors")]
    # Children are forked from one process that has torch loaded, so that a kill costs no start-up. Until the last kill
    # they wait so long at each of the 800 batches that twenty lives are not enough; the one that is spared does not.
    killer = """
import os, random, signal, sys, time
source, paths = sys.argv[1], sys.argv[2:]
import numpy, torch
from subspan.statistics import fit_moments
torch.set_num_threads(1)
random.seed(0)
kills = 0
while not os.path.exists(paths[2]):
    child = os.fork()
    if child == 0:
        sys.argv = ["worker", *paths, *(["0.02", "0.01"] if kills < 20 else ["0", "3600"])]
        exec(source)
        os._exit(0)
    deadline = time.monotonic() + (random.uniform(0.01, 0.1) if kills < 20 else 3600)
    while time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    else:
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
print(kills)
"""
    run = subprocess.run(
        [sys.executable, "-c", killer, WORKER, *paths], capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == 20
    one = Moments(6)
    for start in range(0, len(rows), 50):
        one.update(rows[start : start + 50])
    done = Moments.load(paths[2])
    assert torch.equal(done.scatter, one.scatter)
    assert torch.equal(done.mean, one.mean)
    assert sorted(os.listdir(tmp_path)) == ["done.safetensors", "x.npy"]


def test_a_foreign_checkpoint_is_refused(tmp_path, rows):
    Moments(7).update(rows).save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="is not of this run"):
        fit_moments(rows, checkpoint=tmp_path / "c.safetensors")


def sources(folder, rows):
    """The same rows as every kind of source that can be resumed."""
    table = pytest.importorskip("pyarrow")
    np.save(folder / "x.npy", rows)
    pytest.importorskip("pyarrow.parquet").write_table(
        table.table({"vector": list(rows)}), folder / "x.parquet", row_group_size=50
    )
    return {
        "array": rows,
        "tensor": torch.from_numpy(rows),
        "map": np.load(folder / "x.npy", mmap_mode="r", allow_pickle=False),
        "npy": folder / "x.npy",
        "parquet": folder / "x.parquet",
        "list": [rows[start : start + 50] for start in range(0, len(rows), 50)],
        "generator": (rows[start : start + 50] for start in range(0, len(rows), 50)),
    }


def stop_after(source, path, monkeypatch, updates=3):
    """Leave a checkpoint of a run that was stopped."""
    update, calls = Moments.update, []

    def counted(self, batch):
        if len(calls) == updates:
            raise KeyboardInterrupt
        calls.append(1)
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Moments, "update", counted)
        with pytest.raises(KeyboardInterrupt):
            fit_moments(source, batch_size=50, checkpoint=path, checkpoint_seconds=0)
    assert path.exists()


@pytest.mark.parametrize("kind", ["array", "tensor", "map", "npy", "parquet", "list", "generator"])
@pytest.mark.parametrize("other", ["other rows", "one batch changed", "fewer rows"])
def test_a_checkpoint_of_other_rows_is_refused(tmp_path, monkeypatch, kind, other):
    rows = np.random.default_rng(0).normal(size=(300, 4))
    path = tmp_path / "c.safetensors"
    stop_after(sources(tmp_path, rows)[kind], path, monkeypatch)
    changed = rows + 40
    if other == "one batch changed":
        changed = rows.copy()
        changed[99] += 1
    if other == "fewer rows":
        changed = rows[:120]
    with pytest.raises(ValueError, match=r"is not of this run .* or its source has changed since; remove it"):
        fit_moments(sources(tmp_path, changed)[kind], batch_size=50, checkpoint=path)
    path.unlink()
    found = fit_moments(sources(tmp_path, changed)[kind], batch_size=50, checkpoint=path)
    np.testing.assert_allclose(found.mean, changed.mean(0))


@pytest.mark.parametrize("kind", ["array", "tensor", "map", "npy", "parquet", "list", "generator"])
def test_stopped_and_resumed_every_source_gives_the_same_bits(tmp_path, monkeypatch, kind):
    rows = np.random.default_rng(0).normal(size=(300, 4))
    path = tmp_path / "c.safetensors"
    whole = fit_moments(sources(tmp_path, rows)[kind], batch_size=50)
    given = sources(tmp_path, rows)
    stop_after(given[kind], path, monkeypatch)
    again = sources(tmp_path, rows) if kind == "generator" else given
    resumed = fit_moments(again[kind], batch_size=50, checkpoint=path)
    assert torch.equal(resumed.scatter, whole.scatter)
    assert torch.equal(resumed.mean, whole.mean)
    assert not path.exists()


def test_all_reduce_over_two_processes(rows):
    exact = torch.from_numpy(np.cov(rows.T))

    def reduce(rank):
        mine = torch.from_numpy(rows)[:130] if rank == 0 else torch.from_numpy(rows)[130:]
        labels = ["a"] * 130 if rank == 0 else ["b"] * 800 + ["a"] * 70
        grouped = GroupedMoments(7).update(mine, labels).all_reduce()
        for moments in (Moments(7).update(mine).all_reduce(), grouped.pooled()):
            torch.testing.assert_close(moments.covariance().to(exact), exact, rtol=1e-6, atol=1e-9)
        cross = CrossMoments(3, 4).update(mine[:, :3], mine[:, 3:]).all_reduce()
        torch.testing.assert_close(cross.covariance().to(exact), exact[:3, 3:], rtol=1e-6, atol=1e-9)

    in_processes(reduce, 2)


def _slow_block(block, path):
    """Delay each block, so that a worker can be killed while it holds some."""
    time.sleep(0.2)
    with open(os.path.join(path, "pids"), "a") as log:
        log.write(f"{os.getpid()}\n")
    return block


@pytest.mark.slow
def test_dask_recomputes_what_a_killed_worker_held(tmp_path, rows):
    distributed = pytest.importorskip("distributed", reason="Dask is an optional extra")
    import dask.array as da

    big = np.tile(rows, (4, 1)) + np.arange(4000)[:, None] * 1e-3
    array = da.from_array(big, chunks=(200, 4)).map_blocks(_slow_block, path=str(tmp_path), dtype=float, meta=big[:0])
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit="2GiB"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        import threading

        before = {info["pid"] for info in client.run(lambda: {"pid": os.getpid()}).values()}
        victim = sorted(before)[0]

        def kill():
            log = tmp_path / "pids"
            while not (log.exists() and log.read_text().count(str(victim)) >= 3):
                time.sleep(0.02)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        found = fit_moments(array)
        killer.join(30)
        after = {info["pid"] for info in client.run(lambda: {"pid": os.getpid()}).values()}
    assert not killer.is_alive()
    assert victim not in after
    executed = (tmp_path / "pids").read_text().split()
    assert len(set(executed)) >= 2
    single = Moments(7).update(big)
    assert found.count == 4000
    torch.testing.assert_close(found.covariance(), single.covariance(), rtol=1e-6, atol=1e-9)
