"""Kill a piece of work at every point where it touches a file, and see that the next run puts everything right.

Run as a script with the names of jobs (all of them without a name) and how many points of each to try, spread over
the run and its end; it forks a child for each point, so that a kill costs no start-up.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KILLED = 137
# What changes between two runs that do the same: when, how long, and from which row on.
_TIMES = re.compile(
    rb"\"resumed_at\": \d+|\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00)?( UTC)?|\"?seconds\"?: [\d.]+|[\d.]+ s\b"
)
_TOUCHING = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "os.truncate"})

Job = Callable[[], None]


@dataclass
class Point:
    """What a run that was killed left, and the run after it."""

    code: int
    inputs_kept: bool
    torn: list[str]
    code_again: int
    wrong: list[str]
    left: list[str]

    def faults(self) -> list[str]:
        """What is not as it should be."""
        said = [] if self.inputs_kept else ["an input was changed"]
        said += [f"{name} was half written" for name in self.torn]
        said += [] if self.code_again == 0 else [f"the next run ended with {self.code_again}"]
        said += [f"{name} is not as an undisturbed run writes it" for name in self.wrong]
        return said + [f"{name} was left over" for name in self.left]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without what tells the time; folders end in a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name if path.is_file() else f"{name}/"] = _TIMES.sub(b"", path.read_bytes()) if path.is_file() else b""
    return found


def killed_at(point: int, work: Job) -> int:
    """Run `work` in a child that ends at its `point`-th touch of a file; how many there were where that is 0."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        count = 0
        here = os.getcwd()

        def touched() -> None:
            nonlocal count
            count += 1
            if count == point:
                os._exit(KILLED)

        def hook(event: str, arguments: tuple) -> None:
            if event == "open":
                path, _, flags = arguments
                writes = bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else False
                if not writes or not isinstance(path, str) or (path.startswith("/") and not path.startswith(here)):
                    return
                touched()
            elif event in _TOUCHING:
                touched()

        def synced(handle: int, sync: Callable[[int], None] = os.fsync) -> None:
            touched()
            sync(handle)

        code = 1
        try:
            os.fsync = synced
            sys.addaudithook(hook)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
                work()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        if code:
            os.write(2, err.getvalue().encode())
        os.write(writer, str(count).encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        counted = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if point == 0:
        assert code == 0, f"the undisturbed run ended with {code}"
        return int(counted)
    return code


def try_job(name: str, prepare: Job, work: Job, *, points: int | None, finished: str | None = None) -> list[str]:
    """Faults of a job at all of its points or at some; `finished`: a file with whose name the job is done."""
    faults = []
    start = os.getcwd()
    with tempfile.TemporaryDirectory() as parent:

        def fresh(number: int) -> Path:
            folder = Path(parent) / str(number)
            folder.mkdir()
            os.chdir(folder)
            prepare()
            return folder

        whole = fresh(0)
        inputs = contents(whole)
        total = killed_at(0, work)
        expected = contents(whole)
        tried = range(1, total + 1)
        if points is not None and points < total:
            # The names are given at the end: half of the points lie there.
            last = range(total - points // 2 + 1, total + 1)
            tried = sorted({*last, *np.linspace(1, total, points - len(last) + 2, dtype=int)[1:-1].tolist()})
        for number in tried:
            folder = fresh(number)
            code = killed_at(number, work)
            after = contents(folder)
            own = {key for key in after if key in expected and not key.endswith("/")}
            done = finished is not None and (folder / finished).exists()
            code_again = killed_at(10**9, work)  # where all is there it says so, and tidies up
            again = contents(folder)
            found = Point(
                code,
                inputs_kept=all(after.get(key) == inputs[key] for key in inputs if expected.get(key) == inputs[key]),
                torn=sorted(key for key in own if after[key] not in (inputs.get(key), expected[key])),
                code_again=0 if done else code_again,
                wrong=sorted(key for key in expected if again.get(key) != expected[key]),
                left=sorted(again.keys() - expected.keys()),
            )  # fmt: skip
            assert code == KILLED, (name, number, code)
            faults += [f"{name}, point {number} of {total}: {fault}" for fault in found.faults()]
            os.chdir(start)
            shutil.rmtree(folder)
    print(f"{name}: {len(tried)} of {total} points", flush=True)
    return faults


# ---------------------------------------------------------------------- jobs

RNG = np.random.default_rng(0)
LATENT = 2 * RNG.normal(size=(6, 4))[np.arange(120) % 6] + RNG.normal(size=(120, 4))
OLD = LATENT @ RNG.normal(size=(4, 6)) + 0.1 * RNG.normal(size=(120, 6))
NEW = LATENT @ RNG.normal(size=(4, 8)) + 0.1 * RNG.normal(size=(120, 8))


def prepare(*older: str) -> Job:
    """Inputs, and outputs of an earlier run."""

    def work() -> None:
        np.save("old.npy", OLD.astype(np.float32))
        np.save("new.npy", NEW.astype(np.float32))
        for name in older:
            Path(name).write_bytes(b"of an earlier run")

    return work


def prepare_index() -> None:
    """An index, and some outputs of an earlier run."""
    import faiss

    prepare("q.safetensors", "o.txt")()
    index = faiss.IndexFlatIP(OLD.shape[1])
    index.add(OLD.astype(np.float32))
    faiss.write_index(index, "old.faiss")


def command(arguments: str) -> Job:
    """A run of the command line."""

    def work() -> None:
        from subspan import cli

        code = cli.run(arguments.split())
        if code not in (0, 1):  # 1: the upgrade is not good enough
            raise SystemExit(code)

    return work


UPGRADE = (
    "upgrade old.faiss new.npy --method ridge -o q.safetensors -o q.onnx -o q.faiss --wrap w.faiss "
    "--migrate migrated.faiss --backfill-order o.txt --report page.html"
)


def features() -> None:
    """Features in shards, joined; read again."""
    from subspan.datasets import cached_features

    os.environ["SUBSPAN_CACHE"] = os.path.abspath("cache")

    def compute(first: int):
        for start in range(first, 90, 10):
            yield OLD[start : start + 10]

    rows = cached_features(compute, data="rows", shard_rows=20)
    assert np.array_equal(rows, OLD[:90])


def model() -> None:
    """A folder of several files, as of a converted model."""
    from subspan.datasets.cache import entry_folder, whole_folder

    os.environ["SUBSPAN_CACHE"] = os.path.abspath("cache")
    folder = entry_folder("models", "m")
    with whole_folder(folder) as unfinished:
        if unfinished is not None:
            (unfinished / "sub").mkdir()
            for name in ("config.json", "sub/weights", "tokenizer.json"):
                (unfinished / name).write_text(name)
    assert (folder / "sub/weights").read_text() == "sub/weights"


def prepare_cleared() -> None:
    """A cache that holds features and a model."""
    features()
    model()


def clear() -> None:
    """The cache emptied."""
    from subspan.datasets import clear_cache

    os.environ["SUBSPAN_CACHE"] = os.path.abspath("cache")
    clear_cache()


def moments() -> None:
    """Moments with a checkpoint after every batch."""
    from subspan.statistics import fit_moments

    found = fit_moments("old.npy", batch_size=30, checkpoint="part.safetensors", checkpoint_seconds=0)
    found.save("moments.safetensors")


def migration(name: str) -> Job:
    """Stored vectors mapped block by block."""

    def work() -> None:
        from subspan.datasets.index_writing import write_index
        from subspan.datasets.indexes import open_index

        turn = np.linalg.qr(np.arange(36.0).reshape(6, 6) % 7)[0]
        with contextlib.suppress(ValueError) if Path(name).exists() else contextlib.nullcontext():
            write_index(open_index("old.npy"), name, lambda rows: rows @ turn, 6, key="turn", block=50)

    return work


JOBS: dict[str, tuple[Job, Job, str | None]] = {
    "report": (prepare(), command("report old.npy -o page.html --json facts.json"), None),
    "report over older files": (
        prepare("page.html", "facts.json"), command("report old.npy -o page.html --json facts.json"), None
    ),
    "detect": (prepare("scores.csv"), command("detect old.npy -o scores.csv"), None),
    "select": (prepare(), command("select old.npy -m 9 -o chosen.npy"), None),
    "cluster": (prepare("c.npz"), command("cluster old.npy -c 2 -o c.npz --report c.html"), None),
    "shorten": (prepare("m.safetensors"), command("shorten old.npy -k 3 -o s.npy --map m.safetensors"), None),
    "align": (prepare("a.safetensors"), command("align old.npy new.npy -o a.safetensors --apply a.npy"), None),
    "upgrade": (prepare_index, command(UPGRADE), "migrated.faiss"),
    "features": (prepare(), features, None),
    "model": (prepare(), model, None),
    "clear": (prepare_cleared, clear, None),
    "moments": (prepare(), moments, None),
    **{f"migration to {name}": (prepare(), migration(name), None) for name in ("m.faiss", "m.parquet", "m.npy")},
}  # fmt: skip


def import_ahead(names: list[str]) -> None:
    """Import what the jobs import, so that a child need not; only a child runs them, as no thread outlives a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = set(sys.modules)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for name in names:
                with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):
                    os.chdir(folder)
                    JOBS[name][0]()
                    JOBS[name][1]()
        os.write(writer, "\n".join(sorted(sys.modules.keys() - before)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        found = stream.read().split()
    os.waitpid(child, 0)
    for name in found:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def main() -> None:
    """Try the jobs of the command line, print what is wrong, and end with 1 where anything is."""
    import torch

    torch.set_num_threads(1)
    names = sys.argv[2:] or list(JOBS)
    import_ahead(names)
    points = int(sys.argv[1]) or None
    faults = [
        fault for name in names for fault in try_job(name, *JOBS[name][:2], points=points, finished=JOBS[name][2])
    ]
    print("\n".join(faults))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
