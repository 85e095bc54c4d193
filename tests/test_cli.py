"""The command line: what it prints, writes, and exits with."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from subspan import cli
from subspan.cli import options
from subspan.reproduce import Check, Outcome, System
from subspan.reproduce import runner as reproductions


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Ran:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(120, 4)) @ rng.normal(size=(4, 16)) + 0.05 * rng.normal(size=(120, 16))
    rows[17] += 3 * rng.normal(size=16)
    return rows.astype(np.float32)


@pytest.fixture
def table(tmp_path: Path, rows: np.ndarray) -> Path:
    np.save(tmp_path / "table.npy", rows)
    return tmp_path / "table.npy"


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"{'odd' if i % 2 else 'even'}\n" for i in range(120)))
    return path


# ---------------------------------------------------------------------- the command itself


def test_version(run: Callable[..., Ran]) -> None:
    from importlib.metadata import version

    assert run("--version") == Ran(0, f"subspan {version('subspan')}\n", "")


@pytest.mark.parametrize(
    "verb",
    ["report", "detect", "select", "cluster", "shorten", "align", "upgrade", "list", "reproduce", "models list",
     "embed-series", "models install", "cache info", "cache clear"],
)  # fmt: skip
def test_every_verb_has_help_with_an_example(run: Callable[..., Ran], verb: str) -> None:
    ran = run(*verb.split(), "--help")
    assert ran.code == 0
    assert f"subspan {verb}" in " ".join(ran.out.replace("│", " ").split())
    assert "Example" in ran.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["report", "--frob"],
        ["report", "--seed", "-1"],
        ["detect", "--top", "many"],
        ["select", "--method", "guess"],
        ["align", "only-one.npy"],
        ["reproduce"],
        ["reproduce", "nothing-of-that-name"],
        ["models", "install", "nothing-of-that-name"],
        ["--data", "/nowhere/at/all", "list"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run: Callable[..., Ran], arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("subspan: error: ")
    assert ran.err.count("\n") == 1


def test_a_defect_keeps_its_traceback(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspan.reproduce.listing", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("list")


@pytest.mark.parametrize(
    "lines",
    [
        ["--help", "detect --help", "list", "list --json", "models list", "cache info"],
        [
            "detect absent.npy",
            "detect code.py",
            "detect code.py --bogus",
            "detect -k some",
            "select -k 1.5",
            "report absent.npy",
            "report --against absent.npy",
            "cluster absent.edges",
            "shorten absent.faiss",
            "align absent.npy absent.npy",
            "upgrade absent.faiss absent.npy",
            "detect code.py -o out.pdf",
        ],
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "code.py").touch()
    code = f"""
import sys
from subspan import cli
from subspan.cli import options
for line in {lines!r}:
    assert cli.run(line.split()) == (2 if not any(word in line for word in ("help", "list", "info")) else 0), line
    assert "torch" not in sys.modules, line
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=120, cwd=tmp_path)


def test_rules_of_rank_are_those_of_the_library() -> None:
    from subspan.geometry import rank_rule

    for text in (*options.RANK_RULES, "3", "0.5", "1.0"):
        rank_rule(options.parsed_rank(text))
    for text in ("bogus", "0", "1.5", "0.0", "nan"):
        with pytest.raises(ValueError, match="--rank"):
            options.parsed_rank(text)


# ---------------------------------------------------------------------- report


def test_report_writes_page_and_facts(run: Callable[..., Ran], table: Path, labels: Path) -> None:
    ran = run("report", table, "--labels", labels, "-o", "page.html", "--json", "facts.json")
    assert ran.code == 0
    assert ran.err == ""
    facts = json.loads(Path("facts.json").read_text())
    assert (facts["contents"]["rows"], facts["contents"]["columns"]) == (120, 16)
    assert facts["labels"]["name"] == "label"
    assert facts["outliers"]["examples"][0]["row"] == 17
    assert '<section id="labels"' in Path("page.html").read_text()
    assert sorted(os.listdir()) == ["facts.json", "labels.txt", "page.html", "table.npy"]


def test_report_prints_facts_on_request(run: Callable[..., Ran], table: Path) -> None:
    ran = run("report", table, "--json", "-")
    assert json.loads(ran.out)["contents"]["rows"] == 120
    assert Path("report.html").is_file()


def test_report_against_another_embedding(run: Callable[..., Ran], table: Path, rows: np.ndarray) -> None:
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
    np.save("new.npy", rows @ turn)
    ran = run("report", table, "--against", "new.npy", "--json", "-")
    assert json.loads(ran.out)["against"]["verdict"]["answer"] == "yes"


def test_report_reads_every_kind_of_table(run: Callable[..., Ran], rows: np.ndarray) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra tables")
    import pyarrow.parquet as parquet
    from safetensors.numpy import save_file

    names = [f"r{i}" for i in range(len(rows))]
    kinds = ["odd" if i % 2 else "even" for i in range(len(rows))]
    np.savez_compressed("table.npz", vectors=rows)
    save_file({"vectors": rows}, "table.safetensors")
    columns = {"id": names, "kind": kinds, "vector": list(rows)}
    parquet.write_table(arrow.table(columns), "table.parquet", row_group_size=50)
    with Path("table.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "kind", *(f"x{j}" for j in range(16))])
        writer.writerows([name, kind, *map(float, row)] for name, kind, row in zip(names, kinds, rows))
    facts = {}
    for file in ("table.npz", "table.safetensors", "table.parquet", "table.csv"):
        named = ["--id-column", "id", "--labels", "kind"] if file.endswith(("parquet", "csv")) else []
        ran = run("report", file, *named, "--json", "-")
        assert ran.code == 0, ran.err
        facts[file] = json.loads(ran.out)
        assert (facts[file]["labels"] is not None) == bool(named)
    spectra = [found["spectrum"]["variances"] for found in facts.values()]
    for spectrum in spectra[1:]:
        assert spectrum == pytest.approx(spectra[0], rel=1e-4)


def test_rows_with_nan_can_be_left_out(run: Callable[..., Ran], table: Path, rows: np.ndarray, labels: Path) -> None:
    rows[3, 2], rows[9, 0] = np.nan, np.inf
    np.save(table, rows)
    assert run("report", table).code == 2
    ran = run("report", table, "--labels", labels, "--skip-nan", "--json", "-")
    contents = json.loads(ran.out)["contents"]
    assert (contents["rows"], contents["rows_with_nan_left_out"]) == (118, 2)
    # Rows keep their old numbers as names.
    assert "row 18" in Path("report.html").read_text() or "row 17" in Path("report.html").read_text()


def test_a_failed_report_leaves_the_old_page(run: Callable[..., Ran], table: Path) -> None:
    Path("report.html").write_text("old")
    assert run("report", table, "--json", "missing/facts.json").code == 2
    assert run("report", table, "--labels", "no-such-column").code == 2
    assert Path("report.html").read_text() == "old"


# ---------------------------------------------------------------------- detect, select, shorten, align


def test_detect_scores_every_row(run: Callable[..., Ran], table: Path) -> None:
    ran = run("detect", table, "--rank", "4", "-o", "scores.csv", "--json")
    facts = json.loads(ran.out)
    assert facts["rows"] == 120
    assert facts["top"][0]["row"] == 17
    assert facts["top"][0]["outlier"] is True
    with Path("scores.csv").open(newline="") as stream:
        scores = list(csv.DictReader(stream))
    assert len(scores) == 120
    assert max(scores, key=lambda entry: float(entry["score"]))["row"] == "17"


def test_detect_finds_as_many_outliers_as_the_report_that_recommends_it(
    run: Callable[..., Ran], rows: np.ndarray
) -> None:
    rows = rows.copy()
    rows[[5, 90]] *= [[10.0], [30.0]]
    rows[60] = 1.0
    np.save("rows.npy", rows)
    assert run("report", "rows.npy", "-o", "page.html", "--json", "facts.json").code == 0
    reported = json.loads(Path("facts.json").read_text())["outliers"]
    recommended = re.search(r"subspan (detect rows\.npy [^<]*)", Path("page.html").read_text())
    assert recommended is not None
    found = json.loads(run(*recommended.group(1).split(), "--json").out)
    assert found["outliers"] == reported["beyond_fence"] >= 3
    assert [entry["row"] for entry in found["top"][:6]] == [entry["row"] for entry in reported["examples"][:6]]
    assert {entry["row"] for entry in found["top"][:3]} >= {5, 90}


@pytest.mark.parametrize("distance", ["combined", "residual", "mahalanobis", "euclidean", "cosine"])
def test_detect_by_a_distance_of_choice(run: Callable[..., Ran], table: Path, rows: np.ndarray, distance: str) -> None:
    from subspan.detect import SubspaceDetector

    ran = run("detect", table, "--distance", distance, "--rank", "4", "--json", "-o", "scores.npy")
    assert json.loads(ran.out)["distance"] == distance
    expected = SubspaceDetector(4, distance=distance).fit(rows).anomaly_score(rows)
    np.testing.assert_allclose(np.load("scores.npy"), expected, rtol=1e-3, atol=1e-5)


def test_detect_fits_to_other_rows(run: Callable[..., Ran], table: Path, rows: np.ndarray) -> None:
    np.save("good.npy", rows[50:])
    np.save("new.npy", rows[:30])
    ran = run("detect", "new.npy", "--fit", "good.npy", "--rank", "4", "--json", "-o", "scores.npy")
    facts = json.loads(ran.out)
    assert (facts["rows"], facts["fitted_to"]) == (30, 70)
    assert facts["top"][0]["row"] == 17
    assert np.load("scores.npy", allow_pickle=False).argmax() == 17


def test_detect_by_label_finds_a_row_under_the_wrong_label(run: Callable[..., Ran], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(60, 2)) @ rng.normal(size=(2, 12)) for _ in range(2)]
    rows = np.concatenate(parts) + 0.01 * rng.normal(size=(120, 12))
    names = ["a"] * 60 + ["b"] * 60
    names[5] = "b"
    np.save("rows.npy", rows)
    Path("names.txt").write_text("\n".join(names))
    ran = run("detect", "rows.npy", "--labels", "names.txt", "--by-label", "--rank", "2", "--json")
    assert json.loads(ran.out)["top"][0]["row"] == 5


def test_detect_reads_a_folder_of_good_and_defective_images(run: Callable[..., Ran]) -> None:
    from subspan.datasets import is_installed

    image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra vision")
    if not is_installed("efficientnet-lite0"):
        pytest.skip("the weights of efficientnet-lite0 are not installed (subspan models install efficientnet-lite0)")
    rng = np.random.default_rng(0)

    def picture(name: str, *, defect: bool = False) -> None:
        pixels = rng.integers(90, 150, (96, 96), dtype=np.uint8)
        mask = np.zeros((96, 96), dtype=np.uint8)
        if defect:
            pixels[30:60, 40:70], mask[30:60, 40:70] = 250, 255
        for path, values in {
            name: pixels,
            name.replace("test", "ground_truth").replace(".png", "_mask.png"): mask,
        }.items():
            if path == name or defect:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                image_module.fromarray(values).save(path)

    for index in range(3):
        picture(f"tile/train/good/{index}.png")
        picture(f"tile/test/good/{index}.png")
        picture(f"tile/test/blot/{index}.png", defect=True)
    ran = run("detect", "tile", "--shots", "2", "--rotations", "0", "--json", "-o", "scores.csv")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert (facts["images"], facts["fitted_to"]) == (6, 2)
    assert facts["image_auroc"] == 1.0
    assert facts["pixel_auroc"] > 0.9
    assert facts["aupro"] > 0.5
    assert facts["defects_without_mask"] == 0
    assert {entry["type"] for entry in facts["top"][:3]} == {"blot"}
    assert "threshold" not in facts
    Path("tile/ground_truth/blot/1_mask.png").unlink()
    fewer = json.loads(run("detect", "tile", "--shots", "2", "--rotations", "0", "--json").out)
    assert (fewer["defects_without_mask"], fewer["image_auroc"]) == (1, 1.0)
    assert fewer["pixel_auroc"] > 0.9
    ran = run("detect", "tile", "--rotations", "0", "--json", "--maps", "maps")
    facts = json.loads(ran.out)
    assert (facts["held_out_good"], facts["defects_above"], facts["maps"]) == (3, "3 of 3", "maps")
    assert facts["above_threshold"] == sum(entry["score"] > facts["threshold"] for entry in facts["top"])
    pixels = np.asarray(image_module.open("maps/blot/1.png")).astype(int)
    red, green = pixels[..., 0], pixels[..., 1]
    assert (red - green)[30:60, 40:70].mean() > 5 * max(1, (red - green)[:20, :20].mean())
    assert len(list(Path("maps").rglob("*.png"))) == 6
    assert "'maps' exists" in run("detect", "tile", "--maps", "maps").err
    shutil.rmtree("tile/ground_truth")
    none = json.loads(run("detect", "tile", "--shots", "2", "--rotations", "0", "--json").out)
    assert (none["defects_without_mask"], none["image_auroc"]) == (3, 1.0)
    assert "pixel_auroc" not in none


@pytest.mark.parametrize("method", ["leverage", "sample", "medoids", "farthest", "random"])
def test_select_writes_the_chosen_rows(run: Callable[..., Ran], table: Path, method: str) -> None:
    ran = run("select", table, "-m", "12", "--method", method, "--rank", "4", "--json", "-o", "chosen.npy")
    facts = json.loads(ran.out)
    assert len(set(facts["indices"])) == facts["chosen"] == 12
    assert 0 < facts["retention"] <= 1
    assert np.load("chosen.npy", allow_pickle=False).tolist() == facts["indices"]
    if method in ("leverage", "farthest"):
        assert 17 in facts["indices"]


def test_select_leaves_copies_and_near_copies_out(run: Callable[..., Ran], table: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(120, 16)).astype(np.float32)
    rows[30:60] = rows[:30]
    rows[60:70] = 2 * rows[:10] + 1e-3
    np.save(table, rows)
    facts = json.loads(run("select", table, "-m", "1.0", "--unique", "--json").out)
    assert facts["candidates"] == facts["chosen"] == 80
    assert not set(facts["indices"]) & set(range(30, 70))


def test_select_takes_the_way_that_covers_best_by_default(run: Callable[..., Ran], table: Path) -> None:
    default = json.loads(run("select", table, "-m", "12", "--json").out)
    assert default["method"] == "medoids"
    assert (
        default["indices"]
        == json.loads(run("select", table, "-m", "12", "--method", "medoids", "--json").out)["indices"]
    )


def test_shorten_writes_coordinates_and_map(run: Callable[..., Ran], table: Path, rows: np.ndarray) -> None:
    from subspan.geometry import Subspace

    ran = run("shorten", table, "--rank", "4", "-o", "short.npy", "--map", "map.safetensors", "--json")
    assert json.loads(ran.out)["kept"] == 4
    short = np.load("short.npy", allow_pickle=False)
    assert short.shape == (120, 4)
    assert short.dtype == np.float32
    assert short == pytest.approx(Subspace.load("map.safetensors").coordinates(rows).numpy(), abs=1e-4)
    assert (short @ short.T)[:5, :5] == pytest.approx((rows @ rows.T)[:5, :5], rel=0.05, abs=1.0)


def test_align_fits_judges_and_keeps_a_map(run: Callable[..., Ran], table: Path, rows: np.ndarray) -> None:
    from subspan.geometry import AffineMap

    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0].astype(np.float32)
    np.save("new.npy", rows @ turn)
    ran = run("align", table, "new.npy", "-o", "map.safetensors", "--apply", "mapped.npy", "--json")
    facts = json.loads(ran.out)
    assert facts["held_out"]["procrustes"]["recall@1"]["value"] == 1.0
    assert AffineMap.load("map.safetensors").matrix.numpy() == pytest.approx(turn.T, abs=1e-3)
    assert np.load("mapped.npy", allow_pickle=False) == pytest.approx(rows @ turn, abs=1e-2)


def test_align_without_pairs(run: Callable[..., Ran], table: Path, rows: np.ndarray) -> None:
    np.save("images.npy", rows[:70] + 4)
    facts = json.loads(run("align", table, "images.npy", "--method", "realign", "-o", "m.safetensors", "--json").out)
    assert facts["gap_after"] < facts["gap_before"] / 5
    assert Path("m.safetensors").is_file()


# ---------------------------------------------------------------------- systems


SYSTEM = System(name="fake", title="A made-up system", paper="Nobody, 2026", year=2026, room="detect", public="Fake")


def outcome(holds: bool) -> Outcome:
    check = Check(name="effect", metric="score", value=0.5, bar=">= 0.4", holds=True)
    return Outcome("it works", "rows", "none", "score", 0.9, {"other": 0.8}, ">= 0.95", holds, [check])


@pytest.mark.parametrize("holds", [True, False])
def test_reproduce_exits_by_its_bars(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, holds: bool) -> None:
    import types

    seen: dict[str, Any] = {}

    def protocol(*, quick: bool, seed: int, progress: Callable[[str, float], None]) -> Outcome:
        seen.update(quick=quick, seed=seed)
        progress("half", 0.5)
        return outcome(holds)

    monkeypatch.setattr(reproductions, "SYSTEMS", (SYSTEM,))
    monkeypatch.setitem(sys.modules, "subspan.reproduce.fake", types.SimpleNamespace(protocol=protocol))
    ran = run("reproduce", "fake", "--quick", "--seed", "3", "--json", "--results", "out")
    assert ran.code == (0 if holds else 1)
    assert ran.err == ""
    (record,) = json.loads(ran.out)
    assert {
        "system",
        "claim",
        "data",
        "model",
        "metric",
        "ours",
        "baselines",
        "bar",
        "holds",
        "seconds",
        "versions",
    } <= set(record)
    assert (record["holds"], seen) == (holds, {"quick": True, "seed": 3})
    assert Path("out/fake.quick.json").is_file()
    words = run("reproduce", "all")
    assert words.code == ran.code
    assert "it works" in words.out


def test_list_names_every_system(run: Callable[..., Ran]) -> None:
    entries = json.loads(run("list", "--json").out)
    assert [entry["name"] for entry in entries] == [system.name for system in reproductions.SYSTEMS]
    assert {"name", "title", "paper", "year", "room", "main_claim", "checks"} <= set(entries[0])
    words = run("list").out
    assert all(entry["name"] in words for entry in entries)


def test_models_are_listed(run: Callable[..., Ran]) -> None:
    entries = json.loads(run("models", "list", "--json").out)
    assert {"minilm", "smollm2", "efficientnet-lite0"} <= {entry["name"] for entry in entries}


def test_cache_is_shown_and_cleared(run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspan.datasets import cached_features

    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "cache"))
    cached_features(lambda start: [np.ones((100, 100), np.float32)], data="x")
    assert len(json.loads(run("cache", "info", "--json").out)["entries"]) == 1
    assert "1 entries" in run("cache", "info").out
    assert run("cache", "clear").code == 0
    assert json.loads(run("cache", "info", "--json").out)["entries"] == []


# ---------------------------------------------------------------------- as a process


def test_ctrl_c_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    rows = np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.float32, shape=(30_000, 512))
    rng = np.random.default_rng(0)
    for start in range(0, len(rows), 10_000):
        rows[start : start + 10_000] = rng.normal(size=(10_000, 512))
    rows.flush()
    process = subprocess.Popen(
        [sys.executable, "-c", _TELLING_WHEN_IT_WORKS, "report", "big.npy"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "subspan: stopped"
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == ["big.npy"]


# Interrupting the imports would prove nothing, so the process says when the rows are being read. Tests that were
# started in the background of a shell inherit that Ctrl-C is ignored; a user's terminal does not.
_TELLING_WHEN_IT_WORKS = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import subspan.commands.description as facts
from subspan import cli
from subspan.cli import options
survey = facts.survey
def telling(*arguments, **options):
    print("working", flush=True)
    return survey(*arguments, **options)
facts.survey = telling
sys.exit(cli.run(sys.argv[1:]))
"""


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m subspan list --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    # 141 = 128 + SIGPIPE; 0 where all was written before the reader left.
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode in (0, 141)
    assert ran.stderr == ""


def test_align_names_only_what_it_has(run: Callable[..., Ran], rows: np.ndarray) -> None:
    np.save("short.npy", rows[:-1])
    np.save("whole.npy", rows)
    ran = run("align", "short.npy", "whole.npy")
    assert ran.code == 2
    assert "--" not in ran.err.removeprefix("subspan: error: ")
    holes = rows.copy()
    holes[4, 0] = np.nan
    np.save("holes.npy", holes)
    assert "--skip-nan" in run("align", "whole.npy", "holes.npy").err
    ran = run("align", "whole.npy", "holes.npy", "--skip-nan", "--json")
    assert json.loads(ran.out)["held_out"]["procrustes"]["recall@1"]["value"] > 0.9


def test_label_errors_are_what_the_report_finds(run: Callable[..., Ran]) -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(300) % 3
    np.save("rows.npy", (np.eye(3, 12)[truth] * 4 + rng.normal(size=(300, 12)) * 0.5).astype("f4"))
    wrong = rng.choice(300, 9, replace=False)
    given = truth.copy()
    given[wrong] = (truth[wrong] + 1) % 3
    Path("labels.txt").write_text("\n".join(map(str, given)), encoding="utf-8")
    ran = run("detect", "rows.npy", "--labels", "labels.txt", "--label-errors", "-o", "check.csv", "--json")
    with open("check.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    found = [int(row["row"]) for row in table if row["suspect"] == "True"]
    assert sorted(found) == sorted(wrong.tolist())
    assert all(int(table[row]["suggested"]) == truth[row] for row in wrong)
    assert json.loads(ran.out)["suspects"] == 9
    page = run("report", "rows.npy", "--labels", "labels.txt", "--json", "facts.json")
    assert page.code == 0
    assert json.loads(Path("facts.json").read_text(encoding="utf-8"))["labels"]["suspects_found"] == 9
    assert "--label-errors -o labels_to_check.csv" in Path("report.html").read_text(encoding="utf-8")


def test_shorten_counts_and_measures_as_the_report_does(run: Callable[..., Ran]) -> None:
    from subspan.datasets import load

    np.save("digits.npy", load("digits")["x"].reshape(1797, 64)[:900].astype("f4"))
    facts = json.loads(run("report", "digits.npy", "--json", "-").out)
    curve = {point["dims"]: point["recall"] for point in facts["shortening"]["curves"]["pca"]}
    found = json.loads(run("shorten", "digits.npy", "-k", "48", "--json").out)
    assert [entry["columns"] for entry in found["curve"]] == [size for size in curve if size <= 48]
    for entry in found["curve"]:
        assert entry["pca"]["recall"] == pytest.approx(curve[entry["columns"]], abs=2e-3)
    assert facts["shortening"]["smallest"]["pca"]["95%"] <= 48
    for rank in ("0.95", "marchenko-pastur"):
        named = {"0.95": "95% of the variance"}.get(rank, rank)
        assert (
            json.loads(run("shorten", "digits.npy", "-k", rank, "--json").out)["kept"]
            == facts["spectrum"]["ranks"][named]
        )


@pytest.mark.parametrize("verb", ["detect", "detect --rank 2", "select", "shorten", "align --method realign whole.npy"])
@pytest.mark.parametrize("name", ["one.npy", "constant.npy", "cut.npy"])
def test_an_error_begins_with_what_the_user_named(run: Callable[..., Ran], table: Path, verb: str, name: str) -> None:
    np.save("whole.npy", np.load(table))
    np.save("one.npy", np.load(table)[:1])
    np.save("constant.npy", np.ones((30, 16), np.float32))
    Path("cut.npy").write_bytes(table.read_bytes()[:200])
    ran = run(*verb.split(), name)
    if (name, verb) != ("constant.npy", "select"):  # any row stands for all
        assert ran.code == 2
        assert re.match(rf"subspan: error: ('?{name}'?|--rank)\b", ran.err.splitlines()[-1]), ran.err
        assert "X: " not in ran.err


def test_without_arguments_there_is_help_and_no_error(run: Callable[..., Ran]) -> None:
    ran = run()
    assert ran.code == 2
    assert "Usage" in ran.out + ran.err
    assert "error" not in ran.err
