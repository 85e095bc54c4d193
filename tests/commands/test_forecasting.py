"""`subspan forecast`: planted waves, inputs, rivals that win, intervals, files, and refusals in one line."""

import json

import numpy as np
import pytest

from subspan import cli
from subspan.base import silent
from subspan.commands.forecasting import forecast_series, part_inputs
from subspan.datasets import Series
from subspan.dynamics import KoopmanOperator
from subspan.report import render_forecast

T = np.arange(300)


def waves(noise=0.05, seed=0):
    """Two channels of two periods, 12 and 31."""
    drawn = np.random.default_rng(seed).normal(size=(300, 2)) * noise
    one, two = np.cos(2 * np.pi * T / 12), np.cos(2 * np.pi * T / 31)
    return drawn + np.stack([10 + 3 * one, one + 2 * two], 1) * [1, 0.1]


@pytest.fixture(scope="module")
def found():
    return forecast_series(Series((waves(),), ("a", "b"), 0.5), steps=24, progress=silent)


def test_planted_waves_are_forecast_and_named(found):
    facts, columns = found
    assert facts["better"]
    assert facts["error"]["operator"] < 0.25
    assert set(facts["errors"]) == {"operator", "persistence", "mean", f"season of {facts['season']}"}
    assert [len(each) for each in facts["errors"].values()] == [24] * 4
    strong = [mode for mode in facts["modes"] if mode["period"] is not None][:2]
    np.testing.assert_allclose(sorted(mode["period"] for mode in strong), [6.0, 15.5], rtol=0.03)
    assert sum(mode["energy"] for mode in facts["modes"]) == pytest.approx(1)
    assert 0.75 < facts["coverage"] <= 1
    assert min(facts["tried"], key=lambda row: row["error"]) == facts["tried"][0]
    assert {name: len(values) for name, values in columns.items()} == dict.fromkeys(columns, 48)
    assert columns["time"][:2] == [150.0, 150.5]
    told = np.array(columns["forecast"]).reshape(2, 24).T
    ahead = np.arange(300, 324)
    np.testing.assert_allclose(told[:, 0], 10 + 3 * np.cos(2 * np.pi * ahead / 12), atol=0.5)
    assert all(low < middle < high for low, middle, high in zip(*(columns[n] for n in ("lower", "forecast", "upper"))))


def test_what_is_judged_was_not_fitted(found, monkeypatch):
    """Other values in the tail change its errors, and neither the choice nor the fit that is judged."""
    fit, lengths = KoopmanOperator.fit, []
    monkeypatch.setattr(KoopmanOperator, "fit", lambda self, x, **o: lengths.append(len(x[0])) or fit(self, x, **o))
    rows = waves()
    rows[-75:] = waves(seed=9)[-75:] + 5
    facts, _ = forecast_series(Series((rows,), ("a", "b"), 0.5), steps=24, progress=silent)
    assert facts["tried"] == found[0]["tried"]
    assert facts["error"]["operator"] > 4 * found[0]["error"]["operator"]
    assert set(lengths[:-2]) == {300 - 75 - 60}
    assert lengths[-2:] == [300 - 75, 300]


def test_noise_is_not_forecast_better_than_by_its_mean():
    noise = Series((np.random.default_rng(1).normal(size=(200, 1)),))
    facts, _ = forecast_series(noise, steps=10, progress=silent)
    assert facts["error"]["operator"] > 0.95 * facts["error"]["mean"]
    assert facts["coverage"] == pytest.approx(0.9, abs=0.08)


def test_inputs_are_known_in_the_tail_and_held_ahead():
    rng = np.random.default_rng(0)
    parts = []
    for n in (200, 150, 6):
        u, x = rng.normal(size=n), np.zeros(n)
        for step in range(n - 1):
            x[step + 1] = 0.8 * x[step] + u[step]
        parts.append(np.stack([x, u], 1))
    parted = part_inputs(Series(tuple(parts), ("x", "u")), ["u"])
    options = {"steps": 8, "delays": 1, "rank": None, "progress": silent}
    facts, columns = forecast_series(parted.series, inputs=parted.inputs, **options)
    assert facts["error"]["operator"] < 1e-3
    assert (facts["judged"], facts["inputs"], set(columns["id"])) == (2, ["u"], {"0", "1", "2"})
    last = parts[0][-1]
    expected = [0.8 * last[0] + last[1]]
    expected.append(0.8 * expected[0] + last[1])
    np.testing.assert_allclose(columns["forecast"][:2], expected, atol=1e-3)
    assert forecast_series(parted.series, **options)[0]["error"]["operator"] > 0.3


@pytest.mark.parametrize(
    ("length", "steps", "message"),
    [(40, 30, "at most 40 rows, too few to hold out 30; ask for at most 16 steps"), (9, 3, "too few for any forecast")],
)
def test_short_series_are_refused(length, steps, message):
    with pytest.raises(ValueError, match=message):
        forecast_series(Series((waves()[:length],)), steps=steps, progress=silent)


def test_the_page_says_what_was_found(found):
    facts = found[0]
    page = render_forecast(facts)
    for said in (
        "24 steps ahead of series",
        "better than every plain forecast",
        "15.5",
        'id="spectrum"',
        "What was chosen",
    ):
        assert said in page or said == 'id="spectrum"'
    worse = render_forecast({**facts, "better": False, "best_rival": "mean"})
    assert "no better than the mean: use that" in worse
    assert "&lt;b&gt;" in render_forecast({**facts, "modes": [{**facts["modes"][0], "channel": "<b>"}]})


def test_files_and_lines_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    days = np.datetime64("2024-01-01") + T[:160]
    rows = waves()
    lines = [f"{day},{a:.4f},{b:.4f}" for day, (a, b) in zip(days, rows.tolist())]
    lines[50] = f"{days[50]},,{rows[50, 1]:.4f}"
    (tmp_path / "w.csv").write_text("\n".join(["date,a,b", *lines]))
    call = ["forecast", "w.csv", "--steps", "12", "--delays", "8", "--rank", "4"]
    assert cli.run(call) == 2
    assert "channel 'a' has no finite value in row 50" in capsys.readouterr().err
    assert cli.run([*call, "--gaps", "fill", "-o", "w.html", "--forecasts", "next.csv"]) == 0
    shown = capsys.readouterr().out
    assert "8 delays, rank 4" in shown
    assert "1 values filled" in shown
    table = (tmp_path / "next.csv").read_text().splitlines()
    assert table[0] == "id,step,time,channel,forecast,lower,upper"
    assert table[1].startswith("0,1,2024-06-09T00:00:00")
    assert "<title>12 steps ahead of w.csv" in (tmp_path / "w.html").read_text()
    assert cli.run([*call, "--gaps", "fill", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time_unit"] == "s"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--delays", "x"], "--delays: a number of rows or auto is needed, got 'x'"),
        (["--delays", "400"], "--delays: 400 rows are asked for"),
        (["--level", "1"], "--level: must lie in"),
        (["--inputs", "c"], "has no 'c'; it has a, b"),
        (["--inputs", "a,b"], "has no other channel than the inputs"),
        (["--inputs", "a", "--channels", "a"], "'a' is one of --channels too"),
        (["--rank", "some"], "--rank: 'some' is neither a number nor"),
        (["-o", "other.csv"], "must end in .html, .htm"),
    ],
)  # fmt: skip
def test_wrong_calls_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    np.savetxt("w.csv", waves(), delimiter=",", header="a,b", comments="")
    assert cli.run(["forecast", "w.csv", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
