from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the protocol trains with Lightning")

from subspan.reproduce import matryoshka
from subspan.reproduce.matryoshka import Split

pytestmark = pytest.mark.filterwarnings("ignore")


def planted(n, seed, classes=8, d=160):
    labels = np.arange(n) % classes
    centers = np.random.default_rng(7).standard_normal((classes, d))
    scale = np.linspace(3, 0.4, d)
    x = np.random.default_rng(seed).standard_normal((n, d)) * scale + 1.2 * centers[labels]
    return torch.from_numpy(x.astype(np.float32)), labels


@pytest.fixture(scope="module")
def outcome():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            matryoshka, "picture_split", lambda quick: ("planted", Split(*planted(1600, 0), *planted(240, 1)))
        )
        patch.setattr(matryoshka, "is_installed", lambda name: False)
        patch.setattr(matryoshka, "DIMS", (4, 8, 16, 32, 64, 128))
        patch.setattr(matryoshka, "UNSEEN", (6, 12, 24))
        patch.setattr(matryoshka, "HIDDEN", 64)
        return matryoshka.protocol(quick=True, seed=0, progress=lambda message, fraction: None)


def test_the_protocol_measures_every_arm_and_its_checks_follow(outcome):
    arms = [row[0] for row in outcome.tables[0].rows]
    assert arms[0] == "MRL"
    # Eight classes have at most seven discriminant directions, fewer than the smallest size that is measured.
    assert len(arms) == 10
    assert not any(arm.startswith("LDA") for arm in arms)
    values = [v for row in outcome.tables[0].rows for v in row[1:] if v is not None]
    assert 0 <= min(values) <= max(values) <= 1
    by_arm = {row[0]: row[1:] for row in outcome.tables[0].rows}
    gaps = [a - b for a, b in zip(by_arm["MRL"], by_arm["FF, one model a size"])]
    assert outcome.main.value == pytest.approx(min(gaps), abs=1e-3)
    exact, *cheap = next(table for table in outcome.tables if table.title == "funnel search").rows
    assert all(row[3] < exact[3] for row in cheap)
    assert "funnel" in [check.name for check in outcome.checks]


def test_a_model_is_scored_by_its_own_heads(outcome):
    own, probe = ({row[0]: row[1:] for row in table.rows} for table in outcome.tables[:2])
    assert own["plain, PCA"] == probe["plain, PCA"]
    arms = matryoshka.Pictures(Split(*planted(200, 0), *planted(100, 1)), 1, (4,))
    hardly_trained = arms.model(0, (4,))
    scores = arms.of_model(hardly_trained, (4,))
    assert scores["linear top-1, 4"] == arms.head_accuracies(hardly_trained)[4] < scores["top-1 of a fitted probe, 4"]


def test_too_few_rows_for_a_cheap_funnel_leave_its_check_out():
    exact, funnel = ["exact", 0.5, 0.5, 1000.0], ["funnel", 0.5, 0.4, 200.0]
    assert matryoshka.funnel_checks([exact, funnel]) == []
    (check,) = matryoshka.funnel_checks([exact, ["funnel", 0.5, 0.4, 100.0]])
    assert not check.holds


def test_average_precision_of_neighbours_is_the_loop():
    split = Split(torch.zeros(4, 1), np.array([0, 1, 0, 1]), torch.zeros(2, 1), np.array([0, 1]))
    found = np.array([[0, 1, 2], [0, 1, 3]])
    first, precision = matryoshka.neighbour_scores(found, split)
    assert first == 0.5
    assert precision == pytest.approx(((1 + 2 / 3) / 3 + (1 / 2 + 2 / 3) / 3) / 2)


def test_pair_scores():
    items = torch.eye(12)
    assert matryoshka.pair_scores(items, items) == (1.0, 1.0)
    queries = items.clone()
    queries[0] = torch.tensor([0.5, 1.0, *[0.0] * 10])
    gain, recall = matryoshka.pair_scores(queries, items)
    assert recall == 1.0
    assert gain == pytest.approx((11 + 1 / np.log2(3)) / 12, abs=1e-6)


def test_text_adapters_beat_cutting_on_planted_pairs(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 6, generator=generator)
    sides = [
        torch.cat([1.2 * torch.randn(400, 18, generator=generator), shared + 0.1 * noise], 1)
        for noise in torch.randn(2, 400, 6, generator=generator)
    ]
    monkeypatch.setattr(matryoshka, "code_pairs", lambda count, seed: tuple(sides))
    monkeypatch.setattr(matryoshka, "TEXT_DIMS", (6, 24))
    trials = matryoshka.text_trials(range(1), 400, 60)
    assert trials.gap("adapter, linear", "first m of MiniLM", "nDCG@10, 6") > 0.05
    held = {check.name: check.holds for check in matryoshka.text_checks(trials, 6)}
    assert held == {"text at 6 dimensions, nDCG@10": True, "text at 6 dimensions, recall@10": True}
