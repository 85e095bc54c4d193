"""Files are whole or absent, together where they are several, and what a killed process was writing does not stay."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from pathlib import Path

import pytest
import torch
from jaxtyping import Int

from subspan.base.files import Target, atomic_write, empty, remove_unfinished, temporary_folder, written_together
from subspan.base.saved import save_arrays, saved_object

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be forked, no folder locked")


def killed(work) -> None:
    """Fork a process that dies in the midst of `work`, which kills it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_writing(path: Path, **options: bool) -> None:
    def work() -> None:
        with written_together([Target(path, **options)]) as (unfinished,):
            unfinished.write_text("half of")
            (unfinished.parent / ".tmpA1b2C3").write_text("what the writer made beside its file")
            (unfinished.parent / "sub").mkdir()
            die()

    killed(work)


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "x.txt"

    def interrupted():
        with atomic_write(path) as unfinished:
            unfinished.write_text("half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []
    with atomic_write(path) as unfinished:
        unfinished.write_text("all of it")
        assert list(tmp_path.rglob("x.txt")) == []
        assert unfinished.suffix == path.suffix  # some writers go by it
    assert os.listdir(tmp_path) == ["x.txt"]
    assert path.read_text() == "all of it"
    with pytest.raises(ValueError, match=r"path: the folder .* does not exist"), atomic_write(tmp_path / "no" / "x"):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_rights_of_any_new_one_and_an_older_one_keeps_its_own(tmp_path, umask):
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.touch()
    old.chmod(0o640)
    before = os.umask(umask)
    try:
        for path in (old, new):
            with atomic_write(path) as unfinished:
                unfinished.touch(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE(old.stat().st_mode) == 0o640


def test_no_other_thread_sees_another_umask(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "umask", lambda mask: calls.append(mask) or 0)
    save_arrays(tmp_path / "x.safetensors", "moments", {"a": torch.arange(3)})
    with atomic_write(tmp_path / "x.txt") as unfinished:
        unfinished.touch()
    assert calls == []


@FORKS
@pytest.mark.parametrize("name", ["x.safetensors", "x[1]*.safetensors", "x" * 230 + ".safetensors"])
def test_what_a_killed_process_was_writing_goes_with_the_next_write(tmp_path, name):
    target = tmp_path / name
    save_arrays(target, "moments", {"a": torch.arange(3)})
    for _ in range(2):
        killed_while_writing(target)
        assert len(os.listdir(tmp_path)) == 2  # also the second time: the first left folder is gone
    with saved_object(target, "moments", {"a": Int[torch.Tensor, "3"]}) as (arrays, _):
        assert arrays["a"].tolist() == [0, 1, 2]
    save_arrays(target, "moments", {"a": torch.arange(4)})
    assert os.listdir(tmp_path) == [name]


@FORKS
def test_what_is_left_goes_with_the_next_write_of_anything_beside_it(tmp_path):
    killed_while_writing(tmp_path / "a.txt")
    with atomic_write(tmp_path / "b.txt") as unfinished:
        unfinished.touch()
    assert os.listdir(tmp_path) == ["b.txt"]


@pytest.mark.parametrize(
    "name", [".x.csv.original", ".x.csv.subspan-original", ".x.csv.subspan-abcdefgh", ".x.csv.unfinished"]
)
def test_folders_of_the_user_stay_however_they_are_named(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "kept").write_text("mine")
    with atomic_write(tmp_path / "x.csv") as unfinished:
        unfinished.touch()
    assert (tmp_path / name / "kept").read_text() == "mine"


@FORKS
def test_a_link_named_like_a_left_folder_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    killed_while_writing(elsewhere / "x.csv")
    (left,) = elsewhere.iterdir()
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / left.name).symlink_to(left)
    with atomic_write(beside / "x.csv") as unfinished:
        unfinished.touch()
    assert (left / "unfinished.csv").exists()


def test_what_a_living_process_is_writing_stays(tmp_path):
    target, other = tmp_path / "x.txt", tmp_path / "x.txt.old"
    with atomic_write(target) as first, atomic_write(other) as beside:
        first.write_text("first")
        beside.write_text("beside")
        remove_unfinished(target)
        with atomic_write(target) as second:
            second.write_text("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first"
    assert other.read_text() == "beside"
    assert sorted(os.listdir(tmp_path)) == ["x.txt", "x.txt.old"]


def test_what_must_be_written_by_one_is_refused_to_a_second(tmp_path):
    with (
        written_together([Target(tmp_path / "x.txt")]),
        pytest.raises(ValueError, match="written by another process"),
        written_together([Target(tmp_path / "x.txt")]),
    ):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("waits", [1, 4])
def test_a_second_that_finds_the_first_at_its_end_goes_on(tmp_path, monkeypatch, waits):
    with contextlib.ExitStack() as first:
        first.enter_context(written_together([Target(tmp_path / "x.txt")]))
        waited = []
        monkeypatch.setattr(
            "subspan.base.files.time.sleep", lambda _: waited.append(1) or (len(waited) == waits and first.close())
        )
        with written_together([Target(tmp_path / "x.txt")]) as (unfinished,):
            unfinished.write_text("second")
    assert len(waited) == waits
    assert (tmp_path / "x.txt").read_text() == "second"


def test_of_many_that_start_at_once_one_goes_on(tmp_path):
    done, refused, start = [], [], threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        try:
            with written_together([Target(tmp_path / "x.txt")]) as (unfinished,):
                unfinished.write_text(str(number))
                done.append(number)
                finished.wait(20)
        except ValueError:
            refused.append(number)
            if len(refused) == 3:
                finished.set()

    finished = threading.Event()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) <= 1
    assert len(done) + len(refused) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"] * len(done)


def test_a_folder_may_be_made_and_renamed_into_place(tmp_path):
    with temporary_folder(tmp_path / "model") as unfinished:
        made = unfinished / "made"
        made.mkdir()
        (made / "config.json").write_text("{}")
        made.replace(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(tmp_path / "model") == ["config.json"]


@FORKS
def test_what_can_be_resumed_is_handed_on_until_it_is_spoilt(tmp_path):
    path = tmp_path / "x.npy"
    killed_while_writing(path, resumable=True)
    with atomic_write(tmp_path / "other.txt") as unfinished:
        unfinished.touch()

    found = []

    def run(error: BaseException, *, spoilt: bool = False) -> None:
        with written_together([Target(path, resumable=True)]) as (unfinished,):
            found.append(unfinished.read_text() if unfinished.exists() else "nothing")
            if spoilt:
                empty(unfinished.parent)
            else:
                unfinished.write_text(found[-1] + "!")
            raise error

    # An error before the work began is no reason to lose it; one in the midst of it is, and what it began itself goes.
    for error, spoilt in (
        (KeyboardInterrupt(), False),
        (ValueError(), False),
        (ValueError(), True),
        (OSError(), False),
    ):
        with pytest.raises(type(error)):
            run(error, spoilt=spoilt)
    assert found == ["half of", "half of!", "half of!!", "nothing"]
    assert sorted(os.listdir(tmp_path)) == ["other.txt"]


@FORKS
def test_what_could_be_resumed_goes_where_the_same_file_is_written_anew(tmp_path):
    killed_while_writing(tmp_path / "x.npy", resumable=True)
    with atomic_write(tmp_path / "x.npy") as unfinished:
        assert not unfinished.exists()
        unfinished.touch()
    assert os.listdir(tmp_path) == ["x.npy"]


# ---------------------------------------------------------------------- several files


def write_both(folder: Path, text: str, error: BaseException | None = None) -> None:
    with written_together([Target(folder / "a.txt"), Target(folder / "b.txt", resumable=True)]) as (a, b):
        a.write_text(f"a {text}")
        b.write_text(f"b {text}")
        if error is not None:
            raise error


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_an_error_leaves_everything_of_the_last_run_and_nothing_of_this(tmp_path):
    write_both(tmp_path, "first")
    with pytest.raises(KeyError):
        write_both(tmp_path, "second", KeyError())
    assert contents(tmp_path) == {"a.txt": "a first", "b.txt": "b first"}
    write_both(tmp_path, "third")
    assert contents(tmp_path) == {"a.txt": "a third", "b.txt": "b third"}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_where_the_second_cannot_be_renamed_the_first_is_put_back(tmp_path, monkeypatch, before, links):
    if before:
        write_both(tmp_path, "first")
    replace = os.replace

    def failing(source, target):
        if Path(target) == tmp_path / "b.txt" and "unfinished" in str(source):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    def without(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "replace", failing)
    if not links:
        monkeypatch.setattr(os, "link", without)
    with pytest.raises(OSError, match="No space left"):
        write_both(tmp_path, "second")
    assert contents(tmp_path) == ({"a.txt": "a first", "b.txt": "b first"} if before else {})


@FORKS
def test_killed_between_two_names_the_resumable_one_is_still_there_to_be_resumed(tmp_path):
    def work() -> None:
        replace, calls = os.replace, []

        def counted(source, target):
            replace(source, target)
            calls.append(target)
            die()

        os.replace = counted
        write_both(tmp_path, "first")

    killed(work)
    assert (tmp_path / "a.txt").read_text() == "a first"
    assert not (tmp_path / "b.txt").exists()
    with written_together([Target(tmp_path / "b.txt", resumable=True)]) as (b,):
        assert b.read_text() == "b first"
    assert contents(tmp_path) == {"a.txt": "a first", "b.txt": "b first"}


# ---------------------------------------------------------------------- what is no regular file


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "latest.txt").symlink_to(tmp_path / "runs" / "3.txt")
    with atomic_write(tmp_path / "latest.txt") as unfinished:
        unfinished.write_text("3")
    assert (tmp_path / "latest.txt").is_symlink()
    assert (tmp_path / "runs" / "3.txt").read_text() == "3"


@FORKS
def test_into_a_pipe_the_bytes_are_put(tmp_path):
    pipe = tmp_path / "facts.json"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with atomic_write(pipe) as unfinished:
        unfinished.write_text("{}")
    reader.join()
    assert read == ["{}"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["facts.json"]


@pytest.mark.skipif(not Path("/dev/stdout").is_symlink(), reason="a system without /dev/stdout as a link")
@pytest.mark.parametrize("device", ["/dev/null", "/dev/stdout"])
def test_devices_are_never_replaced(device):
    before = os.lstat(device)
    with atomic_write(device) as unfinished:
        unfinished.write_text("")
    after = os.lstat(device)
    assert (before.st_mode, before.st_ino, before.st_rdev) == (after.st_mode, after.st_ino, after.st_rdev)


def test_a_socket_is_refused(tmp_path, monkeypatch):
    import socket

    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s")
        with pytest.raises(ValueError, match="'s' is no regular file"), atomic_write("s"):
            pass


# ---------------------------------------------------------------------- full disks


def test_errors_name_the_file_and_not_the_temporary_one(tmp_path):
    def full(path: Path) -> None:
        with atomic_write(path):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"x.txt' cannot be written \(No space left on device\)"):
        full(tmp_path / "x.txt")

    def nested(path: Path) -> None:
        with written_together([Target(path), Target(tmp_path / "y.txt")]) as (first, _):
            full(first)

    with pytest.raises(OSError, match=r"No space") as caught:
        nested(tmp_path / "x.txt")
    assert str(caught.value) == f"{str(tmp_path / 'x.txt')!r} cannot be written (No space left on device)"
    assert os.listdir(tmp_path) == []
