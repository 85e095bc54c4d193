"""`subspan upgrade`: figures, files, and one line for every input that cannot be used."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subspan import cli

faiss = pytest.importorskip("faiss", reason="faiss comes with the extra index")
arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra index")

N, OLD, NEW = 600, 16, 24


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


RNG = np.random.default_rng(0)
LATENT = 2 * RNG.normal(size=(12, 8))[np.arange(N) % 12] + RNG.normal(size=(N, 8))
OLD_ROWS = unit(LATENT @ RNG.normal(size=(8, OLD)) + 0.1 * RNG.normal(size=(N, OLD)))
NEW_ROWS = unit(LATENT @ RNG.normal(size=(8, NEW)) + 0.1 * RNG.normal(size=(N, NEW)))
IDS = RNG.permutation(9000)[:N]
SAMPLE = RNG.permutation(N)[:400]


def write_index(rows: np.ndarray = OLD_ROWS, ids: np.ndarray = IDS, name: str = "old.faiss") -> None:
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(rows.shape[1]))
    index.add_with_ids(rows, ids)
    faiss.write_index(index, name)


def write_sample(rows: np.ndarray | None = None, ids: np.ndarray | None = None, name: str = "new.parquet") -> None:
    import pyarrow.parquet as parquet

    rows = NEW_ROWS[SAMPLE] if rows is None else rows
    ids = IDS[SAMPLE] if ids is None else ids
    parquet.write_table(arrow.table({"id": ids, "kind": SAMPLE[: len(ids)] % 12, "vector": list(rows)}), name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Any:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_everything_that_an_upgrade_writes(run: Callable[..., Any]) -> None:
    pytest.importorskip("onnx", reason="onnx comes with the extra onnx")
    from subspan.align import UpgradeMap
    from subspan.report import render_upgrade

    write_index()
    write_sample()
    original = Path("old.faiss").read_bytes()
    code, out, err = run(
        "upgrade", "old.faiss", "new.parquet", "--method", "ridge", "--target", "0.5", "--json", "-o", "q.safetensors",
        "-o", "q.onnx", "-o", "q.faiss", "--wrap", "wrapped.faiss", "--migrate", "migrated.faiss",
        "--backfill-order", "order.txt", "--report", "page.html",
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads(out)
    retrieval = {name: entry["value"] for name, entry in facts["retrieval"].items()}
    assert retrieval["new/new"] == 1
    assert retrieval["new/old mapped"] > 2 * retrieval["new/old unmapped"]
    assert abs(retrieval["new/old mapped"] - retrieval["old/old"]) < 0.15
    assert facts["verdict"]["answer"] == "map queries"
    assert not facts["own_queries"]
    assert Path("old.faiss").read_bytes() == original
    # The wrapped index and the adapter give the same answers to new queries, and those are the right ones.
    adapter = UpgradeMap.load("q.safetensors")
    mapped = adapter.transform(NEW_ROWS[:50])
    wrapped = faiss.read_index("wrapped.faiss")
    old = faiss.read_index("old.faiss")
    found = wrapped.search(NEW_ROWS[:50], 5)[1]
    assert (found == old.search(np.ascontiguousarray(mapped, np.float32), 5)[1]).mean() > 0.98
    assert (found[:, 0] == IDS[:50]).mean() > 0.5
    migrated = faiss.read_index("migrated.faiss")
    assert (migrated.d, migrated.ntotal) == (NEW, N)
    answers = migrated.search(NEW_ROWS[:50], 10)[1]
    assert np.mean([IDS[i] in answers[i] for i in range(50)]) > 0.8
    # Items come first, once mapped, that lie nearest to the new vectors of the sample.
    vectors = np.stack([migrated.index.reconstruct(i) for i in range(N)])
    distances = np.linalg.norm(vectors[:, None] - NEW_ROWS[SAMPLE], axis=2)
    near = np.sort(distances, axis=1)[:, :10].mean(axis=1)
    place = {int(item): rank for rank, item in enumerate(Path("order.txt").read_text().split())}
    assert sorted(place) == sorted(IDS.tolist())
    ranks = [place[int(item)] for item in faiss.vector_to_array(migrated.id_map)]
    assert np.corrcoef(ranks, near.argsort().argsort())[0, 1] > 0.999
    page = Path("page.html").read_text(encoding="utf-8")
    assert "Map the queries and keep the index" in page
    assert "not in the index" not in page
    assert "3 more of the sample are not in the index, and left out" in render_upgrade({**facts, "left_out": 3})
    assert "http://" not in page.split("<script>")[0]
    curve = facts["backfill"]["curves"]["ordered"]
    assert [point["share"] for point in curve] == pytest.approx(np.arange(11) / 10)
    assert curve[-1]["value"] == 1
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession("q.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"embeddings": NEW_ROWS[:9]})[0] == pytest.approx(mapped[:9], abs=1e-4)


def test_given_queries_labels_and_a_table(run: Callable[..., Any]) -> None:
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"id": IDS, "vector": list(OLD_ROWS)}), "old.parquet")
    write_sample()
    np.save("q_new.npy", NEW_ROWS[:80])
    np.save("q_old.npy", OLD_ROWS[:80])
    Path("q_kinds.txt").write_text("".join(f"{i % 12}\n" for i in range(80)))
    code, out, err = run(
        "upgrade", "old.parquet", "new.parquet", "--method", "procrustes", "--queries-new", "q_new.npy",
        "--queries-old", "q_old.npy", "--labels", "kind", "--query-labels", "q_kinds.txt", "--json",
    )  # fmt: skip
    assert code in (0, 1), err
    facts = json.loads(out)
    assert facts["queries"] == 80
    assert facts["own_queries"]
    assert facts["metric"] == "cosine"
    assert 0.3 < facts["retrieval"]["new/new"]["value"] < 1
    assert facts["retrieval"]["new/old mapped"]["value"] > facts["retrieval"]["new/old unmapped"]["value"]


def test_a_hopeless_upgrade_exits_with_1(run: Callable[..., Any]) -> None:
    write_index()
    write_sample(unit(np.random.default_rng(9).normal(size=(400, NEW))))
    code, out, _ = run("upgrade", "old.faiss", "new.parquet", "--method", "procrustes")
    assert code == 1
    assert "re-embed: Embed everything anew." in out


def test_dry_run_checks_and_writes_nothing(run: Callable[..., Any]) -> None:
    write_index()
    write_sample()
    before = sorted(path.name for path in Path().iterdir())
    code, out, _ = run("upgrade", "old.faiss", "new.parquet", "--migrate", "m.faiss", "--dry-run")
    assert code == 0
    assert "would write migrated index: m.faiss" in out
    assert sorted(path.name for path in Path().iterdir()) == before


def test_fewer_anchors_than_dimensions_is_said(run: Callable[..., Any]) -> None:
    rng = np.random.default_rng(4)
    write_index(unit(LATENT @ rng.normal(size=(8, 200)) + 0.1 * rng.normal(size=(N, 200))))
    write_sample(NEW_ROWS[SAMPLE[:100]], IDS[SAMPLE[:100]])
    code, out, err = run("upgrade", "old.faiss", "new.parquet", "--json")
    assert code in (0, 1)
    facts = json.loads(out)
    assert facts["few_pairs"]
    assert "fewer than the 200 dimensions" in err
    # Ten of thirty items are a third by chance, so a difference is asked for.
    assert facts["retrieval"]["new/old mapped"]["value"] > facts["retrieval"]["new/old unmapped"]["value"] + 0.2


def test_shorten_an_index_and_its_curve(run: Callable[..., Any]) -> None:
    write_index()
    code, out, err = run("shorten", "old.faiss", "--rank", "8", "-o", "short.faiss", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["kept"] == 8
    assert facts["curve"][-1]["pca"]["recall"] > 0.8
    assert facts["curve"][-1]["pca"]["recall"] > facts["curve"][-1]["prefix"]["recall"]
    short = faiss.read_index("short.faiss")
    assert (short.d, short.ntotal) == (8, N)
    assert (short.search(short.reconstruct(int(IDS[5]))[None], 1)[1] == IDS[5]).all()
    code, out, _ = run("shorten", "old.faiss", "--method", "prefix", "--rank", "8", "-o", "cut.parquet", "--json")
    assert code == 0
    from subspan.datasets.indexes import open_index

    cut = open_index("cut.parquet")
    np.testing.assert_allclose(cut.take(cut.positions(IDS)), unit(OLD_ROWS[:, :8]), atol=1e-6)


def _killed_at(number: int, arguments: list[str]) -> None:
    """The command in this process, which is killed when it is about to give its `number`-th output its name."""
    renamed, replace = iter(range(9)), Path.replace

    def replaced(self: Path, target: Path) -> Path:
        if Path(target).name in ("m.faiss", "page.html", "order.txt") and next(renamed) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = replaced  # pyright: ignore
    cli.run(arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_what_a_kill_between_the_names_leaves_is_finished_by_the_same_command(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspan.commands import upgrading as upgrade_run

    write_index()
    write_sample()
    arguments = ["upgrade", "old.faiss", "new.parquet", "--method", "procrustes"]
    # Measured once: only what is written then is looked at.
    found, assess = [], upgrade_run.assess
    monkeypatch.setattr(upgrade_run, "assess", lambda *a, **b: found.append(assess(*a, **b)) or found[0])
    run(*arguments)
    monkeypatch.setattr(upgrade_run, "assess", lambda *_, **__: found[0])
    outputs = ["m.faiss", "order.txt", "page.html"]
    arguments += ["--migrate", "m.faiss", "--backfill-order", "order.txt", "--report", "page.html"]
    for number in range(3):
        process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(number, arguments))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert sum(Path(name).exists() for name in outputs) == number
        assert not Path("m.faiss").exists()
    code, _, err = run(*arguments)
    assert code in (0, 1), err
    assert sorted(os.listdir()) == sorted([*outputs, "new.parquet", "old.faiss"])
    assert faiss.read_index("m.faiss").ntotal == N
    assert "</html>" in Path("page.html").read_text(encoding="utf-8")


def recall_of(rows: np.ndarray, queries: np.ndarray, truth: np.ndarray, metric: str = "inner") -> float:
    """Recall@10 where each query is the row of its number, which it may not find."""
    index = (faiss.IndexFlatL2 if metric == "euclidean" else faiss.IndexFlatIP)(rows.shape[1])
    index.add(np.ascontiguousarray(rows, np.float32))
    found = index.search(np.ascontiguousarray(queries, np.float32), 11)[1]
    found = np.stack([line[line != number][:10] for number, line in enumerate(found)])
    return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth)]))


def neighbours(rows: np.ndarray) -> np.ndarray:
    scores = rows @ rows.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1)[:, :10]


@pytest.mark.parametrize(
    ("form", "metric"), [("Flat", "inner"), ("SQ8", "inner"), ("SQ8", "euclidean"), ("PQ8x4", "inner")]
)
def test_migrated_vectors_are_of_unit_length_where_the_new_ones_are(
    form: str, metric: str, run: Callable[..., Any]
) -> None:
    """Codes of unit vectors are not quite of unit length; nor would be what they are mapped to."""
    index = faiss.index_factory(OLD, form, faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT)
    index.train(OLD_ROWS)
    index.add(OLD_ROWS)
    faiss.write_index(index, "old.faiss")
    write_sample(ids=SAMPLE)
    asked = ["--method", "ridge", "--migrate", "m.faiss", "--json"]
    asked += ["--metric", "cosine"] if form in ("Flat", "SQ8") else []
    code, out, err = run(
        "upgrade", "old.faiss", "new.parquet", "--method", "ridge", "--migrate", "m.faiss", *asked, "--json"
    )
    assert code in (0, 1), err
    facts = json.loads(out)
    written = faiss.read_index("m.faiss")
    rows = written.reconstruct_n(0, N)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert written.metric_type == index.metric_type
    # What is printed is of held-out items; the map that was written was fitted to them too.
    judged = SAMPLE[np.sort(np.random.default_rng(0).permutation(len(SAMPLE))[: facts["searched"]])]
    recall = recall_of(rows[judged], NEW_ROWS[judged], neighbours(NEW_ROWS[judged]), metric)
    assert facts["retrieval"]["new/migrated"]["value"] == pytest.approx(recall, abs=0.05)
    assert recall > 0.8


def test_a_table_ranked_by_cosine_is_migrated_to_an_index_that_ranks_so(run: Callable[..., Any]) -> None:
    lengths = np.exp(np.random.default_rng(5).normal(size=(N, 1)))
    np.save("old.npy", (OLD_ROWS * lengths).astype(np.float32))
    np.save("new.npy", (NEW_ROWS * lengths[::-1]).astype(np.float32))
    code, out, err = run(
        "upgrade", "old.npy", "new.npy", "--method", "ridge", "--metric", "cosine", "--migrate", "m.faiss", "--json"
    )
    assert code in (0, 1), err
    assert json.loads(out)["metric"] == "cosine"
    rows = faiss.read_index("m.faiss").reconstruct_n(0, N)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    code, out, _ = run("shorten", "old.npy", "--rank", "8", "-o", "s.faiss", "--json")
    rows = faiss.read_index("s.faiss").reconstruct_n(0, N)
    assert recall_of(rows, rows, neighbours(OLD_ROWS)) == pytest.approx(
        json.loads(out)["curve"][-1]["pca"]["recall"], abs=2e-3
    )


@pytest.mark.parametrize("metric", ["inner", "euclidean"])
@pytest.mark.parametrize("unit_length", [True, False])
@pytest.mark.parametrize("method", ["pca", "prefix"])
def test_the_printed_recall_is_that_of_the_shortened_index(
    metric: str, unit_length: bool, method: str, run: Callable[..., Any]
) -> None:
    rows = OLD_ROWS if unit_length else OLD_ROWS * (1 + np.arange(N, dtype=np.float32)[:, None] / N)
    index = (faiss.IndexFlatL2 if metric == "euclidean" else faiss.IndexFlatIP)(OLD)
    index.add(rows)
    faiss.write_index(index, "old.faiss")
    code, out, err = run("shorten", "old.faiss", "--method", method, "--rank", "6", "-o", "short.faiss", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["metric"], facts["unit_length"]) == (metric, unit_length)
    written = faiss.read_index("short.faiss")
    assert written.metric_type == index.metric_type
    short = written.reconstruct_n(0, N)
    whole = index.search(rows, 11)[1]
    truth = np.stack([line[line != number][:10] for number, line in enumerate(whole)])
    assert recall_of(short, short, truth, metric) == pytest.approx(facts["curve"][-1][method]["recall"], abs=2e-3)
    assert np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5) == unit_length


# ---------------------------------------------------------------------- bad input

Make = Callable[[], object]
CASES: dict[str, tuple[Make, str, str]] = {}


def case(command: str, message: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        CASES[make.__name__.replace("_", "-")] = (make, command, message)
        return make

    return keep


def both() -> None:
    write_index()
    write_sample()


case("upgrade old.faiss new.parquet --migrate old.faiss", "never overwritten")(both)
CASES["output-is-the-sample"] = (both, "upgrade old.faiss new.parquet --migrate new.parquet", "never overwritten")
CASES["metric-of-another"] = (both, "upgrade old.faiss new.parquet --queries-old new.parquet", "need --queries-new")
CASES["no-faiss-network"] = (both, "upgrade old.faiss new.parquet --method mlp --wrap w.faiss", "use linear")
CASES["unknown-method"] = (both, "upgrade old.faiss new.parquet --method magic", "--method: one of")
CASES["two-outputs-of-one-name"] = (
    both,
    "upgrade old.faiss new.parquet -o a.onnx --wrap a.onnx",
    "is the file of -o too",
)
CASES["wrong-suffix"] = (both, "upgrade old.faiss new.parquet --migrate out.xyz", "must end in")
CASES["missing-folder"] = (both, "upgrade old.faiss new.parquet --report nowhere/r.html", "does not exist")
CASES["column-of-none"] = (both, "upgrade old.faiss new.parquet --column nowhere", "has no 'nowhere'")
CASES["npy-without-ids"] = (both, "upgrade old.faiss new.parquet --migrate out.npy", "holds no ids")


@case("upgrade old.faiss new.npy", "400 rows without ids")
def mismatched_rows() -> None:
    write_index()
    np.save("new.npy", NEW_ROWS[SAMPLE])


@case("upgrade old.faiss new.npy --sample-ids ids.npy", "ids for")
def sample_ids_of_another_length() -> None:
    write_index()
    np.save("new.npy", NEW_ROWS[SAMPLE])
    np.save("ids.npy", IDS[:30])


@case("upgrade old.faiss new.parquet", "occurs more than once")
def repeated_ids_in_the_sample() -> None:
    write_index()
    write_sample(ids=np.concatenate([IDS[SAMPLE[:1]], IDS[SAMPLE[:-1]]]))


@case("upgrade old.faiss new.parquet", "occurs more than once")
def repeated_ids_in_the_index() -> None:
    write_index(ids=np.concatenate([IDS[:1], IDS[:-1]]))
    write_sample()


@case("upgrade old.faiss new.parquet", "ids are not in old.faiss")
def unknown_ids() -> None:
    write_index()
    write_sample(ids=IDS[SAMPLE] + 100_000)


@case("upgrade old.faiss new.parquet --metric cosine", "unit length")
def cosine_claimed_for_vectors_of_any_length() -> None:
    write_index(3 * OLD_ROWS * (1 + np.arange(N, dtype=np.float32)[:, None]))
    write_sample()


@case("upgrade old.faiss new.parquet --metric euclidean", "ranks by inner")
def index_of_another_metric() -> None:
    write_index(3 * OLD_ROWS * (1 + np.arange(N, dtype=np.float32)[:, None]))
    write_sample()


@case("upgrade old.faiss new.parquet --migrate m.faiss", "contains NaN")
def nan_in_the_index() -> None:
    rows = OLD_ROWS.copy()
    rows[7, 3] = np.nan
    write_index(rows)
    write_sample()


@case("upgrade old.faiss new.parquet -o q.safetensors", "contains NaN")
def nan_in_the_sample() -> None:
    rows = NEW_ROWS[SAMPLE].copy()
    rows[7, 3] = np.inf
    write_index()
    write_sample(rows)


@case("upgrade old.faiss new.parquet", "not a whole FAISS index")
def truncated_index() -> None:
    both()
    Path("old.faiss").write_bytes(Path("old.faiss").read_bytes()[:-100])


@case("upgrade old.faiss new.parquet", "not a whole FAISS index")
def an_index_that_is_a_text() -> None:
    both()
    Path("old.faiss").write_text("no index, but lines of text\n" * 20)


@case("upgrade shards new.parquet", "must be alike")
def dimensions_that_change_between_shards() -> None:
    write_sample()
    Path("shards").mkdir()
    np.save("shards/a.npy", OLD_ROWS)
    np.save("shards/b.npy", OLD_ROWS[:, :9])


@case("upgrade shards new.parquet", "must be alike")
def dtypes_that_change_between_shards() -> None:
    write_sample()
    Path("shards").mkdir()
    np.save("shards/a.npy", OLD_ROWS)
    np.save("shards/b.npy", OLD_ROWS.astype(np.float64))


@case("upgrade old.faiss new.parquet", "at least 60")
def too_few_pairs() -> None:
    write_index()
    write_sample(NEW_ROWS[SAMPLE[:20]], IDS[SAMPLE[:20]])


@case("upgrade old.faiss new.parquet", "nothing to map")
def constant_sample() -> None:
    write_index()
    write_sample(np.ones((400, NEW), np.float32))


@case("upgrade old.faiss new.parquet --queries-new q.npy", "columns")
def queries_of_another_encoder() -> None:
    both()
    np.save("q.npy", OLD_ROWS[:9])


@case("shorten old.faiss -o old.faiss --rank 4", "never overwritten")
def shorten_onto_itself() -> None:
    write_index()


@case("shorten old.faiss --method prefix -o s.faiss", "number of columns")
def prefix_by_a_share() -> None:
    write_index()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(name: str, run: Callable[..., Any]) -> None:
    make, command, message = CASES[name]
    make()
    before = {str(path): path.stat().st_size for path in sorted(Path().rglob("*"))}
    code, out, err = run(*command.split())
    assert (code, out) == (2, ""), err
    assert "Type-check" not in err
    errors = [line for line in err.splitlines() if line.startswith("subspan: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert len(errors[0]) < 400
    assert {str(path): path.stat().st_size for path in sorted(Path().rglob("*"))} == before
