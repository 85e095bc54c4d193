"""`subspan embed-series`: windows and labels of every kind of file, features of the saved model, pages, refusals."""

import json

import numpy as np
import pyarrow.parquet as parquet
import pytest

from subspan import cli
from subspan.commands.series_features import _apart, _told, cut_windows
from subspan.datasets import read_series
from subspan.represent import FrameViews

pytest.importorskip("lightning")


@pytest.fixture
def walks(tmp_path, monkeypatch):
    """Five series of two channels in one table, walking and then running."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = ["t,id,x,y,activity"]
    for series in range(5):
        for row in range(120):
            kind = int(row >= 60)
            noise = 0.1 * rng.normal(size=2)
            x, y = np.sin((0.4, 1.1)[kind] * row + series) + noise[0], np.cos((0.4, 1.1)[kind] * row) + noise[1]
            lines.append(f"{row},s{series},{x:.5f},{y:.5f},{('walk', 'run')[kind]}")
    (tmp_path / "walks.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(*words):
    return cli.run(["embed-series", *map(str, words)])


def test_windows_are_pieces_of_series_with_their_commonest_label(walks):
    found = cut_windows([walks / "walks.csv"], 40, 30, label="activity")
    series = read_series(walks / "walks.csv", channels=["x", "y"])
    assert found.channels == ("x", "y")
    assert found.columns["start"] == [0, 30, 60] * 5
    assert found.columns["series"] == [f"s{place // 3}" for place in range(15)]
    assert found.labels.tolist() == ["walk", "walk", "run"] * 5  # 30 of 40 rows of the second are walked
    np.testing.assert_allclose(found.x[4], series.trajectories[1][30:70].T, rtol=1e-6)
    assert found.series.tolist() == np.repeat(range(5), 3).tolist()
    with pytest.raises(ValueError, match=r"--window: 200 rows; 0 such windows were found, the longest series has 120"):
        cut_windows([walks / "walks.csv"], 200, 30, channels=["x", "y"])
    (walks / "other.csv").write_text("t,x,activity\n" + "".join(f"{row},{row % 7},walk\n" for row in range(60)))
    with pytest.raises(ValueError, match=r"other.csv: has channels \('x',\), .* has \('x', 'y'\)"):
        cut_windows([walks / "walks.csv", walks / "other.csv"], 40, 30, label="activity")


@pytest.mark.parametrize("each", ["series", "row"])
def test_labels_of_an_archive_are_one_a_series_or_one_a_row(tmp_path, each):
    x, offsets = np.random.default_rng(0).normal(size=(90, 2)), np.array([0, 50, 90])
    y = np.array([3, 5]) if each == "series" else np.repeat([3, 5], [50, 40])
    np.savez(tmp_path / "a.npz", signal=x, offsets=offsets, y=y)
    found = cut_windows([tmp_path / "a.npz"], 20, 20, label="y", array="signal")
    assert found.labels.tolist() == ["3"] * 2 + ["5"] * 2
    with pytest.raises(ValueError, match=r"label: .* has no array 'z'"):
        cut_windows([tmp_path / "a.npz"], 20, 20, label="z", array="signal")
    np.savez(tmp_path / "a.npz", signal=x, offsets=offsets, y=np.arange(7))
    with pytest.raises(ValueError, match="'y' has 7 entries for 2 series of 90 rows"):
        cut_windows([tmp_path / "a.npz"], 20, 20, label="y", array="signal")


def test_a_label_with_rows_left_out_is_refused(walks):
    text = (walks / "walks.csv").read_text().splitlines()
    text[5] = text[5].replace(text[5].split(",")[2], "", 1)
    (walks / "walks.csv").write_text("\n".join(text) + "\n")
    with pytest.raises(ValueError, match="labels do not fit; clean it first"):
        cut_windows([walks / "walks.csv"], 40, 30, label="activity", gaps="cut")
    with pytest.raises(ValueError, match="actvity"):
        cut_windows([walks / "walks.csv"], 40, 30, label="actvity")


def test_what_is_tested_on_is_not_learnt_from(walks):
    whole = cut_windows([walks / "walks.csv"], 20, 10, channels=["x", "y"])
    held, fit, how = _apart(whole, 0)
    assert how == "other series"
    assert not set(whole.series[held]) & set(whole.series[fit])
    assert len(held) + len(fit) == len(whole.x)
    text = [line for line in (walks / "walks.csv").read_text().splitlines() if ",s1," in line or line[0] == "t"]
    (walks / "one.csv").write_text("\n".join(text) + "\n")
    one = cut_windows([walks / "one.csv"], 20, 10, channels=["x", "y"])
    held, fit, how = _apart(one, 0)
    starts = np.array(one.columns["start"])
    assert how == "the last third of each series"
    assert starts[fit].max() + 20 <= starts[held].min()
    assert _told(np.array(["1", "2", "1"]))[1] is False
    numbers, numeric = _told(np.arange(40).astype(str))
    assert numeric
    assert numbers[7] == 7


def test_files_and_page_hold_the_features_of_the_saved_model(walks, capsys):
    words = ("walks.csv", "--window", 24, "--stride", 12, "--epochs", 1, "--width", 2, "--label", "activity")
    outputs = ("-o", "f.npz", "--windows", "w.csv", "--save", "m.safetensors", "--report", "page.html", "--json")
    assert run(*words, *outputs) == 0
    facts = json.loads(capsys.readouterr().out)
    windows = cut_windows([walks / "walks.csv"], 24, 12, label="activity")
    with np.load("f.npz") as found:
        expected = FrameViews.load("m.safetensors").transform(windows.x)
        np.testing.assert_allclose(found["features"], expected, atol=1e-5)
        assert found["start"].tolist() == windows.columns["start"]
        assert found["label"].tolist() == windows.labels.tolist()
    assert (walks / "w.csv").read_text().splitlines()[1] == "0,walks.csv,s0,0,walk"
    assert facts["windows"] == len(windows.x) == facts["probe"]["fit"] + facts["probe"]["held"]
    assert [row["share"] for row in facts["probe"]["rows"]][-1] == 1.0
    assert facts["probe"]["rows"][-1]["spectrum"] > 0.8
    page = (walks / "page.html").read_text()
    assert "activity" in page
    assert "5 % of them" in page.replace("\u202f", " ")
    again = ("walks.csv", "--window", 24, "--stride", 12, "--model", "m.safetensors", "-o", "f.parquet")
    assert run(*again, "--channels", "x,y") == 0
    table = parquet.read_table("f.parquet")
    assert table.column_names[:5] == ["window", "source", "series", "start", "feature_0"]
    np.testing.assert_allclose(table["feature_3"].to_numpy(), expected[:, 3], atol=1e-5)
    assert "features by m.safetensors" in capsys.readouterr().out
    assert run(*again, "--channels", "x") == 2
    assert "--model: m.safetensors is for 2 channels, the series have x" in capsys.readouterr().err


def test_a_stop_in_training_leaves_nothing(walks, monkeypatch, capsys):
    def stop(self, X, y=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(FrameViews, "fit", stop)
    before = sorted(path.name for path in walks.iterdir())
    assert run("walks.csv", "--label", "activity", "--window", 24, "-o", "f.npy", "--save", "m.safetensors") == 130
    assert sorted(path.name for path in walks.iterdir()) == before
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("walks.csv", "-o", "f.csv"), "-o"),
        (("walks.csv", "--model", "none.safetensors"), "--model: no file 'none.safetensors'"),
        (("walks.csv", "--model", "walks.csv", "--save", "m.safetensors"), "--save: --model is saved already"),
        (
            ("walks.csv", "--label", "activity", "--window", 24, "--model", "walks.csv"),
            "is not a readable safetensors file",
        ),
        (("none.csv",), "none.csv"),
    ],
)
def test_what_cannot_be_done_is_one_line(walks, capsys, words, said):
    assert run(*words) != 0
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert said in line
