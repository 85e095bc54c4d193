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
        patch.setattr(matryoshka, "_HIDDEN", 64)
        return matryoshka.protocol(quick=True, seed=0, progress=lambda message, fraction: None)


def test_the_protocol_measures_every_arm_and_its_checks_follow(outcome):
    arms = [row[0] for row in outcome.tables[0].rows]
    assert arms[0] == "MRL"
    # Eight classes have at most seven discriminant directions, fewer than the smallest size that is measured.
    assert len(arms) == 10
    assert not any(arm.startswith("LDA") for arm in arms)
    values = [v for row in outcome.tables[0].rows for v in row[1:] if v is not None]
    assert 0 <= min(values) <= max(values) <= 1
    for check in outcome.checks:
        bound = float(check.bar.split()[1])
        expected = {">=": check.value >= bound, "<=": check.value <= bound, ">": check.value > bound}
        assert check.holds == expected[check.bar.split()[0]]
    assert outcome.holds == outcome.checks[0].holds
    exact, *cheap = next(table for table in outcome.tables if table.title == "funnel search").rows
    assert all(row[3] < exact[3] for row in cheap)
    assert "funnel" in [check.name for check in outcome.checks]


def test_a_model_is_scored_by_its_own_heads(outcome):
    own, probe = ({row[0]: row[1:] for row in table.rows} for table in outcome.tables[:2])
    assert own["plain, PCA"] == probe["plain, PCA"]
    arms = matryoshka.Pictures(Split(*planted(200, 0), *planted(100, 1)), 0, 1, (4,))
    model = arms.model((4,))
    arms.add_model("hardly trained", model, (4,))
    by_head, by_probe, *_ = arms.scores["hardly trained"][4]
    assert by_head == arms.head_accuracies(model)[4] < by_probe


def test_too_few_rows_for_a_cheap_funnel_leave_its_check_out():
    exact, funnel = ["exact", 0.5, 0.5, 1000.0], ["funnel", 0.5, 0.4, 200.0]
    assert matryoshka._funnel_checks([exact, funnel]) == []
    (check,) = matryoshka._funnel_checks([exact, ["funnel", 0.5, 0.4, 100.0]])
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
    rows = {(row[0], row[1]): row[2] for row in matryoshka.text_table(range(1), 400, 60)}
    assert len(rows) == 10
    assert rows["adapter, linear", 6] > rows["first m of MiniLM", 6] + 0.05
