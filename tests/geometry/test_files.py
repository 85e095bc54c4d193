"""Files are whole or absent, and what a killed process was writing does not stay."""

import os
import signal
import stat

import pytest
import torch

from subspan.geometry.files import atomic_write, load_arrays, remove_unfinished, save_arrays, temporary_folder


def killed_while_writing(path):
    """Fork a process that dies halfway through a write, by a writer that has a temporary file of its own."""
    child = os.fork()
    if child == 0:
        with atomic_write(path) as unfinished:
            unfinished.write_text("half of")
            (unfinished.parent / ".tmpA1b2C3").write_text("what the writer made beside its file")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


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
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    with pytest.raises(ValueError, match=r"path: the folder .* does not exist"), atomic_write(tmp_path / "no" / "x"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be forked, no folder locked")
@pytest.mark.parametrize("name", ["x.safetensors", "x[1]*.safetensors"])
def test_what_a_killed_process_was_writing_goes_with_the_next_write(tmp_path, name):
    target = tmp_path / name
    save_arrays(target, "moments", {"a": torch.arange(3)})
    for _ in range(2):
        killed_while_writing(target)
        assert len(os.listdir(tmp_path)) == 2  # also the second time: the first left folder is gone
    assert load_arrays(target, "moments")[0]["a"].tolist() == [0, 1, 2]
    save_arrays(target, "moments", {"a": torch.arange(4)})
    assert os.listdir(tmp_path) == [name]


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


def test_a_folder_made_elsewhere_may_be_renamed_into_place(tmp_path):
    with temporary_folder(tmp_path / "model") as unfinished:
        (unfinished / "config.json").write_text("{}")
        unfinished.replace(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(tmp_path / "model") == ["config.json"]
