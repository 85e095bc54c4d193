"""Series from files of every form: what is read is what was written, and what is wrong is said in one line."""

import numpy as np
import pytest

from subspan.datasets import Series, read_series

WALK = np.random.default_rng(0).normal(size=(12, 2)).cumsum(axis=0)


def table(path, times=None, ids=None, values=WALK, delimiter=","):
    names = [name for name, column in (("time", times), ("run", ids)) if column is not None] + ["x", "y"]
    columns = [column for column in (times, ids) if column is not None]
    lines = [delimiter.join(names)]
    for row, moment in enumerate(values.tolist()):
        fields = [str(column[row]) for column in columns] + ["" if v != v else repr(v) for v in moment]
        lines.append(delimiter.join(fields))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".npy", ".npz", ".parquet", ".feather"])
def test_every_form_gives_the_same_values(tmp_path, suffix):
    path = tmp_path / f"walk{suffix}"
    if suffix in (".csv", ".tsv"):
        table(path, delimiter="\t" if suffix == ".tsv" else ",")
    elif suffix in (".npy", ".npz"):
        np.save(path, WALK) if suffix == ".npy" else np.savez(path, walk=WALK, y=np.arange(3))
    else:
        arrow = pytest.importorskip("pyarrow")
        whole = arrow.table({"x": WALK[:, 0], "y": WALK[:, 1]})
        if suffix == ".parquet":
            pytest.importorskip("pyarrow.parquet").write_table(whole, path, row_group_size=5)
        else:
            pytest.importorskip("pyarrow.feather").write_feather(whole, path)
    series = read_series(path)
    np.testing.assert_array_equal(series.trajectories[0], WALK)
    assert (series.lengths, series.time_step, len(series.channels)) == ((12,), 1.0, 2)
    assert isinstance(series.trajectories[0].base, np.memmap) == (suffix == ".npy")
    assert [block.shape for _, _, block in series.batches(5)] == [(5, 2), (5, 2), (2, 2)]


def test_trajectories_of_a_long_table_keep_their_order_when_mixed(tmp_path):
    ids, times = np.array(["b", "a", "b"] * 4), np.repeat(np.arange(8), 2)[:12] * 0.5
    times = np.array([np.flatnonzero(np.flatnonzero(ids == name) == row)[0] * 0.5 for row, name in enumerate(ids)])
    series = read_series(table(tmp_path / "long.csv", times, ids), id_column="run")
    assert (series.ids, series.lengths, series.time_step) == (("b", "a"), (8, 4), 0.5)
    np.testing.assert_array_equal(series.trajectories[1], WALK[ids == "a"])
    assert series.times_after(1, 2).tolist() == [2.0, 2.5]
    assert series.between(-2, 0).lengths == (2, 2)


def test_archives_of_many_trajectories(tmp_path):
    packed, many = tmp_path / "packed.npz", tmp_path / "many.npz"
    np.savez(packed, signal=WALK, offsets=[0, 5, 12], channels=["ax", "ay"], fs=50)
    series = read_series(packed)
    assert (series.lengths, series.channels, series.time_step) == ((5, 7), ("ax", "ay"), 0.02)
    np.savez(many, run_1=WALK.T, run_2=WALK[:4].T, other=np.eye(3))
    series = read_series(many, array="run_*", channels_first=True)
    assert (series.ids, series.lengths) == (("run_1", "run_2"), (12, 4))
    np.save(tmp_path / "cube.npy", WALK.reshape(3, 4, 2))
    assert read_series(tmp_path / "cube.npy").lengths == (4, 4, 4)
    np.savez(packed, signal=WALK, offsets=[0, 5, 11])
    with pytest.raises(ValueError, match=r"offsets of .* do not rise from 0 to its 12 rows"):
        read_series(packed)


@pytest.mark.parametrize(
    ("dates", "step", "unit", "next_but_one"),
    [
        (np.datetime64("2023-01-31T06", "us") + np.arange(12) * np.timedelta64(1, "h"), 3600.0, "s", "2023-01-31T19"),
        ([f"{2023 + m // 12}-{m % 12 + 1:02}-15" for m in range(12)], 1.0, "month", "2024-02-15"),
        ([str(np.datetime64("2023-01") + m + 1) + "-01" for m in range(12)], 1.0, "month", "2024-03-01"),
        ([str((np.datetime64("2023-02") + m).astype("M8[D]") - 1) for m in range(12)], 1.0, "month", "2024-02-29"),
    ],
)  # fmt: skip
def test_dates_and_months_are_equal_steps(tmp_path, dates, step, unit, next_but_one):
    series = read_series(table(tmp_path / "dated.csv", dates))
    assert (series.time_step, series.time_unit) == (step, unit)
    assert str(series.times_after(0, 2)[1]).startswith(next_but_one)


def test_gaps_are_filled_or_cut(tmp_path):
    holed = WALK.copy()
    holed[3, 1] = holed[0, 0] = np.nan
    times = np.array([0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13])
    path = table(tmp_path / "holes.csv", times, values=holed)
    whole = read_series(path, gaps="fill")
    assert (whole.lengths, whole.filled) == ((14,), 6)
    found = whole.trajectories[0]
    np.testing.assert_allclose(found[3, 1], (WALK[2, 1] + WALK[4, 1]) / 2)
    np.testing.assert_allclose(found[6:8], WALK[5] + np.outer([1 / 3, 2 / 3], WALK[6] - WALK[5]))
    assert found[0, 0] == WALK[1, 0]
    cut = read_series(path, gaps="cut")
    assert (cut.lengths, cut.ids[0]) == ((2, 2, 6), "0 part 1")
    np.testing.assert_array_equal(cut.trajectories[2], WALK[6:])
    assert cut.times[1].tolist() == [4, 5]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("x,y\n1,2\n3,\n", {}, "channel 'y' has no finite value in row 1 of '0' in .* \\(1 values in all\\)"),
        ("x,y\n1,inf\n3,4\n", {}, "channel 'y' has no finite value in row 0"),
        ("x,y\n1,2\n3,4\n", {"gaps": "drop"}, "gaps: expected 'refuse', 'fill' or 'cut', got 'drop'"),
        ("x,y\n,2\n,3\n", {"gaps": "fill"}, "channel 'x' of '0' in .* has no value at all"),
        ("x,y\n1,2\n,3\n2,\n", {"gaps": "cut"}, "no two rows on end"),
        ("t,x\n0,1\n1,2\n3,4\n4,5\n", {}, "1 rows of '0' in .* are missing, the first before row 2 \\(3.0\\)"),
        ("t,x\n0,1\n1,2\n2.4,4\n3.4,5\n", {}, "irregularly: the step before row 2 of '0' is 1.4, the usual one 1"),
        ("t,x\n0,1\n1,2\n0,4\n", {}, "do not rise: 1.0 is followed by 0.0 in row 2 .*need an id column"),
        ("t,x\nsoon,1\nlater,2\n", {}, "row 0 of column 't' .* has 'soon', a number or an ISO date"),
        ("x,city\n1,Rome\n2,Bonn\n", {}, "line 2 of .* has 'Rome' in column 'city'; name texts as the time or id"),
        ("x,y\n1,2\n", {}, "trajectory '0' of .* has 1 row; 2 are needed"),
        ("id,x\na,2\nb,3\n", {}, "each of the 2 ids .* has one row"),
        ("x,y\n1,2\n1,2\n", {}, "constant in every channel: 'x', 'y'"),
        ("x,y\n1,2,3\n", {}, "line 2 of .* has 3 fields, the header has 2"),
        ("1,2\n3,4\n", {}, "no header line"),
        ("x,y\n1,2\n3,4\n", {"channels": ["z"]}, "has no 'z'; it has x, y"),
        ("t\n1\n2\n", {}, "no column of numbers beside time and id"),
        ("x,y\n1,2\n3,4\n", {"array": "x"}, "is a table, which has columns"),
        ("x,y\n1,2\n3,4\n", {"time_step": 0.0}, "time_step: must be > 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, text, options, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_series(tmp_path / "bad.csv", **options)
    assert "\n" not in str(caught.value)


def test_rows_may_be_taken_as_equally_spaced_and_constant_channels_are_named(tmp_path):
    (tmp_path / "odd.csv").write_text("t,x,y,,\n0,1,7,0,0\n1,2,7,1,0\n9,1,7,2,0\n".replace(",,", ",Unnamed: 0,z"))
    with pytest.warns(UserWarning, match="constant channels: 'y', 'z'"):
        series = read_series(tmp_path / "odd.csv", equally_spaced=True)
    assert (series.channels, series.time_step) == (("x", "y", "z"), 1.0)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"a": WALK, "b": WALK}, {}, "say which array of .* a \\(12, 2\\), b \\(12, 2\\)"),
        ({"a": WALK, "b": WALK[:, :1]}, {"array": "*"}, "have \\[1, 2\\] channels"),
        ({"a": WALK}, {"array": "c"}, "say which array"),
        ({"a": WALK}, {"time_column": "t"}, "holds arrays without columns"),
        ({"a": np.array(["x", "y"])}, {"array": "a"}, "say which array"),
    ],
)
def test_archives_that_do_not_fit(tmp_path, arrays, options, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_series(tmp_path / "bad.npz", **options)


def test_series_of_arrays_check_their_names():
    with pytest.raises(ValueError, match="holds no trajectory"):
        Series(())
    with pytest.raises(ValueError, match="of one width are needed"):
        Series((WALK, WALK[:, :1]))
    with pytest.raises(ValueError, match="channels: 1 names for 2"):
        Series((WALK,), channels=("x",))


def test_nulls_and_timestamps_of_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    days = np.datetime64("2024-01-01", "us") + np.arange(12) * np.timedelta64(1, "D")
    columns = {"when": days, "n": [1, None, *range(3, 13)], "run": [1.0] * 6 + [2.0] * 6}
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), tmp_path / "n.parquet", row_group_size=4)
    series = read_series(tmp_path / "n.parquet", time_column="when", id_column="run", gaps="fill")
    assert (series.ids, series.time_step, series.channels) == (("1", "2"), 86400.0, ("n",))
    assert series.trajectories[0][:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"'when' of .* holds no numbers; name texts as the time or id column"):
        read_series(tmp_path / "n.parquet")
