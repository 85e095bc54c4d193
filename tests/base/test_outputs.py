"""Outputs are no inputs and not each other, under whatever names, before anything is done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from subspan.base.outputs import Output, Outputs


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("x.npy").write_text("rows")
    Path("shards").mkdir()
    Path("shards/0.npy").write_text("rows")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("output", ["x.npy", "./x.npy", "shards/../x.npy", "link.npy", "hard.npy", "absolute"])
def test_an_output_that_is_an_input_is_refused_under_any_name(folder: Path, output: str) -> None:
    Path("link.npy").symlink_to("x.npy")
    os.link("x.npy", "hard.npy")
    path = folder / "x.npy" if output == "absolute" else Path(output)
    before = names(folder)
    with pytest.raises(ValueError, match=r"^-o: .* is input, which is never overwritten; choose another name"):
        Outputs(Output("-o", path), inputs=("label", None, "x.npy", "http://localhost:6333", "a\0b"))
    assert names(folder) == before


def test_case_does_not_matter_where_the_file_system_ignores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.path.samefile
    monkeypatch.setattr(os.path, "samefile", lambda one, other: real(str(one).lower(), str(other).lower()))
    with pytest.raises(ValueError, match="is input"):
        Outputs(Output("-o", Path("X.npy")), inputs=("x.npy",))


@pytest.mark.parametrize("output", ["shards/1.npy", "shards/below/../1.parquet", "linked/1.npy", "shards/1"])
def test_an_output_in_a_folder_that_is_read_is_refused(output: str) -> None:
    Path("linked").symlink_to("shards")
    with pytest.raises(ValueError, match=r"lies in 'shards', which is input; choose another place"):
        Outputs(Output("-o", Path(output)), inputs=("shards",))


def test_pages_and_tables_may_lie_beside_the_images_that_they_are_about() -> None:
    for name in ("shards/report.html", "shards/scores.csv", "beside.npy"):
        Outputs(Output("-o", Path(name)), inputs=("shards",))
    with pytest.raises(ValueError, match="which is input"):
        Outputs(Output("--json", Path("shards/meta.json")), inputs=("shards",))


@pytest.mark.parametrize("other", ["y.npy", "./y.npy", "Y.npy", "shards/../y.npy", "link.npy"])
def test_two_outputs_that_are_one_file_are_refused(other: str) -> None:
    Path("link.npy").symlink_to("y.npy")
    with pytest.raises(ValueError, match=r"^--map: .* is the file of -o too"):
        Outputs(Output("-o", Path("y.npy")), Output("--map", Path(other)), inputs=("x.npy",))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (Output("-o", Path("y.txt"), (".csv", ".json")), "-o: 'y.txt' must end in .csv, .json"),
        (Output("-o", Path("no/y.csv")), "-o: the folder 'no' does not exist"),
        (Output("-o", Path("shards")), "-o: 'shards' is a folder"),
        (Output("-o", Path("shards/0.npy"), overwrite=False), "-o: 'shards/0.npy' exists; remove it"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(folder: Path, output: Output, said: str) -> None:
    before = names(folder)
    with pytest.raises(ValueError, match=said):
        Outputs(output)
    assert names(folder) == before


def test_places_that_must_not_be_written_to_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = {Path("shards"), Path("x.npy")}
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in locked)
    for name, said in (("shards/y.npy", "the folder 'shards' cannot be written to"), ("x.npy", "'x.npy' cannot be")):
        with pytest.raises(ValueError, match=said):
            Outputs(Output("-o", Path(name)))


def test_what_was_not_asked_for_is_not_written(folder: Path) -> None:
    before = names(folder)
    with Outputs(Output("-o", Path("y.csv")), Output("--report", None)) as outputs:
        outputs[Path("y.csv")].write_text("a")
    assert names(folder) == sorted([*before, "y.csv"])
    with Outputs(Output("-o", Path("z.csv"))):
        pass
    assert names(folder) == sorted([*before, "y.csv"])


def test_outputs_come_together_or_not_at_all() -> None:
    def run(text: str, error: bool) -> None:
        with Outputs(Output("-o", Path("y.csv")), Output("--report", Path("z.html"))) as outputs:
            for name in ("y.csv", "z.html"):
                outputs[Path(name)].write_text(text)
                assert Path(name).exists() == error
            if error:
                raise ValueError(f"{outputs[Path('z.html')]}: is broken")

    run("first", error=False)
    with pytest.raises(ValueError, match=r"^z\.html: is broken"):
        run("second", error=True)
    assert [Path(name).read_text() for name in ("y.csv", "z.html")] == ["first", "first"]


def test_a_second_run_with_the_same_output_is_refused(folder: Path) -> None:
    with (
        Outputs(Output("-o", Path("y.csv"))) as outputs,
        pytest.raises(ValueError, match=r"y\.csv' is being written by another process"),
        Outputs(Output("-o", Path("y.csv"))),
    ):
        pass
    assert outputs
    assert "y.csv" not in names(folder)
