"""Facts of a report: planted truths come out, and the sampled answers equal the exact ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from subspan.base import silent
from subspan.commands import describe
from subspan.commands import description as facts
from subspan.commands.survey import first_copies, measure, survey
from subspan.datasets import Rows
from subspan.geometry import effective_rank


def embeddings(rows: np.ndarray, **known: Any) -> Rows:
    return Rows(rows, name="planted", argument="planted.npy", **known)


def planted_rows(n: int = 600, d: int = 24, k: int = 5, noise: float = 0.05, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(d, k)))[0]
    return rng.normal(size=(n, k)) * np.linspace(3, 2, k) @ basis.T + noise * rng.normal(size=(n, d))


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    rows = planted_rows()
    rows[7] = rows[3]
    rows[8] = rows[3]
    rows[11] = rows[4] * (1 + 1e-4)
    rows[20] = 0
    rows[42] += 2 * rng.normal(size=rows.shape[1])
    labels = np.array(["odd" if i % 2 else "even" for i in range(len(rows))])
    return describe(embeddings(rows, labels=labels))


def test_facts_are_json(described: dict[str, Any]) -> None:
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert {"contents", "spectrum", "shortening", "outliers", "subset", "labels", "against"} <= set(described)
    assert described["against"] is None


def test_contents_counts_what_was_planted(described: dict[str, Any]) -> None:
    contents = described["contents"]
    assert (contents["rows"], contents["columns"]) == (600, 24)
    assert contents["duplicate_rows"] == 2
    assert contents["largest_duplicate_group"] == {"count": 3, "row": 3}
    assert contents["zero_rows"] == 1
    near = contents["near_duplicates"]
    assert near["share_with_exact_copy"] * near["sampled_rows"] == pytest.approx(3)
    assert [4, 11] in [pair["rows"] for pair in contents["near_duplicates"]["pairs"]]
    assert not contents["unit_norm"]


def test_mean_cosine_is_that_of_all_pairs() -> None:
    rows = planted_rows(50) + 0.7
    contents = describe(embeddings(rows))["contents"]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[np.triu_indices(50, 1)]
    assert contents["mean_cosine"] == pytest.approx(pairs.mean(), abs=1e-9)
    second = (rows**2).sum(1).mean()
    assert contents["mean_share_of_energy"] == pytest.approx((rows.mean(0) ** 2).sum() / second, abs=1e-9)


def test_negative_zero_equals_zero() -> None:
    rows = planted_rows(30)
    rows[1] = rows[0]
    rows[0, 0], rows[1, 0] = 0.0, -0.0
    assert first_copies(embeddings(rows))[:3].tolist() == [0, 0, 2]


def test_spectrum_finds_the_planted_rank(described: dict[str, Any]) -> None:
    rows = planted_rows(2000, 40, 6)
    spectrum = describe(embeddings(rows))["spectrum"]
    assert spectrum["ranks"]["marchenko-pastur"] == 6
    assert spectrum["ranks"]["elbow"] == 6
    assert spectrum["noise_variance"] == pytest.approx(0.05**2, rel=0.1)
    variances = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    assert spectrum["variances"] == pytest.approx(variances, rel=1e-6)
    low, high = spectrum["effective_rank"]["interval"]
    assert low < spectrum["effective_rank"]["value"] < high


def test_effective_rank_interval_is_as_wide_as_that_of_resampled_rows() -> None:
    import torch

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1500, 12)) * np.linspace(2, 0.5, 12)
    data = embeddings(rows)
    seen = survey(data, progress=silent)
    interval = facts.effective_rank_interval(measure(data, seen, progress=silent).block_energy, seed=0)
    resampled = []
    for _ in range(400):
        drawn = rows[rng.integers(len(rows), size=len(rows))]
        values = np.linalg.eigvalsh(np.cov(drawn.T))[::-1].copy()
        resampled.append(float(effective_rank(torch.from_numpy(values))))
    low, high = np.quantile(resampled, (0.025, 0.975))
    assert (interval[1] - interval[0]) == pytest.approx(high - low, rel=0.25)


def test_shortening_recall_is_that_of_brute_force() -> None:
    rows = planted_rows(400, 16, 16, noise=0.2, seed=3)
    shortening = describe(embeddings(rows))["shortening"]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def neighbours(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        similarity = x @ x.T
        np.fill_diagonal(similarity, -np.inf)
        return np.argsort(-similarity, axis=1)[:, :10]

    directions = np.linalg.svd(rows, full_matrices=False)[2].T
    truth = neighbours(unit)
    for name, short in (("pca", unit @ directions[:, :8]), ("prefix", unit[:, :8])):
        found = neighbours(short)
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth)])
        point = next(point for point in shortening["curves"][name] if point["dims"] == 8)
        assert point["recall"] == pytest.approx(recall, abs=0.01)
    assert shortening["curves"]["pca"][-1] == {"dims": 16, "recall": 1.0, "interval": [1.0, 1.0]}


def test_prefix_wins_where_the_first_columns_hold_everything() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(500, 8)), 1e-3 * rng.normal(size=(500, 24))], axis=1)
    smallest = describe(embeddings(rows))["shortening"]["smallest"]
    assert smallest["prefix"]["95%"] == 8
    assert smallest["pca"]["95%"] == 8


def test_outliers_are_found_and_measured(described: dict[str, Any]) -> None:
    outliers = described["outliers"]
    assert outliers["examples"][0]["row"] == 42
    assert outliers["beyond_fence"] >= 1
    rows = planted_rows(300)
    data = embeddings(rows)
    measured = measure(data, survey(data, progress=silent), progress=silent)
    assert measured.leverage == pytest.approx(measured.main.leverage(rows).numpy(), rel=1e-6)


def test_subset_covers_what_it_says(described: dict[str, Any]) -> None:
    subset = described["subset"]
    assert len(subset["selected"]) == subset["size"] == 12
    assert subset["methods"]["leverage"]["labels_met"] == 1.0
    assert 0 < subset["methods"]["random"]["energy_retained"] <= 1 + 1e-9
    # The rows chosen farthest first leave no row as far off as random ones do.
    far = {name: entry["distance_to_nearest"]["max"] for name, entry in subset["methods"].items()}
    assert far["farthest"] <= far["random"]
    middle = {name: entry["distance_to_nearest"]["median"] for name, entry in subset["methods"].items()}
    assert middle[subset["best"]] == min(middle.values())
    # The nine shown of the twelve chosen are those that stand for most.
    stands_for = [entry["stands_for"] for entry in subset["examples"]]
    assert stands_for == sorted(stands_for, reverse=True)
    assert 600 * 9 / 12 <= sum(stands_for) <= 600


def test_energy_retained_is_the_retention_of_the_selection_room() -> None:
    from subspan.select import rank_rows, retention

    rows = planted_rows(800, 30, 20, noise=0.1)
    data = embeddings(rows)
    leverage = measure(data, survey(data, progress=silent), progress=silent).leverage
    assert describe(data)["subset"]["methods"]["leverage"]["energy_retained"] == pytest.approx(
        retention(rows, rank_rows(leverage)[:16], 0.9), abs=1e-6
    )


def test_labels_see_classes_on_their_own_subspaces() -> None:
    rng = np.random.default_rng(0)
    d, k, count = 32, 4, 150
    shared = np.linalg.qr(rng.normal(size=(d, 12)))[0]
    blocks = [rng.normal(size=(count, k)) @ shared[:, 4 * i : 4 * i + k].T for i in (0, 1, 1)]
    rows = np.concatenate([block + 5 * rng.normal(size=d) for block in blocks]) + 0.01 * rng.normal(size=(450, d))
    labels = np.repeat(["a", "b", "c"], count)
    found = describe(embeddings(rows, labels=labels))["labels"]
    assert found["neighbours_with_same_label"]["share"] == pytest.approx(1.0, abs=0.01)
    assert found["neighbours_with_same_label"]["chance"] == pytest.approx(1 / 3)
    alike = found["subspaces"]["most_alike"][0]
    assert alike["labels"] == ["b", "c"]
    overlap = np.array(found["subspaces"]["overlap"])
    assert np.diag(overlap) == pytest.approx(1.0)
    assert overlap == pytest.approx(overlap.T)
    a, b, c = (found["subspaces"]["labels"].index(name) for name in "abc")
    assert overlap[b, c] > overlap[a, b] + 0.2
    assert 0 < found["variance_between_classes"] < 1


def test_mislabelled_rows_are_suspects() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(100, 8)) + 6, rng.normal(size=(100, 8)) - 6])
    labels = np.repeat(["up", "down"], 100)
    labels[5] = "down"
    found = describe(embeddings(rows, labels=labels))["labels"]
    assert [(entry["row"], entry["neighbours_say"]) for entry in found["suspects"]] == [(5, "up")]


def test_same_seed_same_facts() -> None:
    rows = planted_rows(300)
    first, second = (describe(embeddings(rows), seed=3) for _ in range(2))
    for name in ("created", "seconds"):
        del first[name], second[name]
    assert first == second


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4", np.float64])
def test_memory_maps_of_any_float_are_read(tmp_path: Any, dtype: Any) -> None:
    rows = planted_rows(200).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r", allow_pickle=False)
    found, expected = describe(embeddings(mapped)), describe(embeddings(planted_rows(200)))
    assert found["spectrum"]["ranks"]["elbow"] == expected["spectrum"]["ranks"]["elbow"]
    assert found["contents"]["mean_cosine"] == pytest.approx(expected["contents"]["mean_cosine"], abs=1e-2)


def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = planted_rows(300)
    whole = describe(embeddings(rows))
    monkeypatch.setattr("subspan.datasets.rows._BLOCK_BYTES", 24 * 4 * 37)
    parts = describe(embeddings(rows))
    assert parts["spectrum"]["variances"] == pytest.approx(whole["spectrum"]["variances"])
    assert parts["outliers"]["scores"] == pytest.approx(whole["outliers"]["scores"])
    assert parts["contents"]["duplicate_rows"] == whole["contents"]["duplicate_rows"]


def test_a_sample_is_searched_in_when_there_are_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspan.commands.survey.BASE_ROWS", 150)
    found = describe(embeddings(planted_rows(600), labels=np.repeat(["a", "b"], 300)))
    assert found["shortening"]["searched_rows"] == 150
    assert max(found["subset"]["selected"]) < 600


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (planted_rows(10), "at least 20 rows, got 10"),
        (planted_rows(30)[:, :1], "at least 2 columns, got 1"),
        (np.ones((30, 4)), "all rows are equal"),
        (np.where(np.arange(120).reshape(30, 4) == 8, np.nan, 1.0), "1 of 30 rows contain NaN or infinity .*row 2"),
    ],
)
def test_rows_that_say_nothing_are_refused(rows: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe(embeddings(rows))


def test_one_label_is_refused() -> None:
    with pytest.raises(ValueError, match="one value only"):
        describe(embeddings(planted_rows(30), labels=np.repeat("a", 30)))


def test_labels_must_be_one_a_row() -> None:
    with pytest.raises(ValueError, match="labels: 3 entries for 30 rows"):
        embeddings(planted_rows(30), labels=np.repeat("a", 3))


def test_more_columns_than_rows_work() -> None:
    found = describe(embeddings(planted_rows(40, 100, 5)))
    assert len(found["spectrum"]["variances"]) == 39
    assert found["outliers"]["rank"] <= 10
