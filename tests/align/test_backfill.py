from __future__ import annotations

import numpy as np
import pytest
import torch

from subspan.align import backfill_order


def gallery(n: int = 120, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    centers = 10 * torch.eye(4, d, dtype=torch.float64)
    return centers[labels] + torch.randn(n, d, dtype=torch.float64, generator=generator), labels.numpy()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_order_equals_a_literal_argsort(metric):
    rows, labels = gallery()
    distance = []
    for row, label in zip(rows, labels):
        mean = rows[torch.from_numpy(labels == label)].mean(0)
        far = float((row - mean).norm()) if metric == "euclidean" else 1 - float(row @ mean / row.norm() / mean.norm())
        distance.append(far)
    order = backfill_order(rows, labels, metric)
    assert order.tolist() == sorted(range(len(rows)), key=lambda i: -distance[i])


def test_parts_names_and_memory_maps_give_the_same_order(tmp_path):
    rows, labels = gallery()
    expected = backfill_order(rows, labels)
    np.save(tmp_path / "g.npy", rows.numpy())
    for other in (np.load(tmp_path / "g.npy", mmap_mode="r", allow_pickle=False), list(rows.split(50))):
        assert backfill_order(other, np.array(["a", "b", "c", "d"])[labels]).tolist() == expected.tolist()
    # A class of one item lies on its own mean, so it comes last.
    assert backfill_order(torch.cat([rows, rows[:1] + 50]), [*labels.tolist(), 9])[-1] == len(rows)


def test_without_labels_clusters_stand_for_classes():
    rows, labels = gallery()
    found = backfill_order(rows, n_clusters=4)
    assert found.tolist() == backfill_order(rows, n_clusters=4).tolist()
    assert sorted(found.tolist()) == list(range(len(rows)))
    # Well-separated classes are the clusters, up to what a mini-batch leaves of their means.
    place = {int(item): rank for rank, item in enumerate(backfill_order(rows, labels))}
    ranks = np.array([place[int(item)] for item in found])
    assert np.corrcoef(ranks, np.arange(len(rows)))[0, 1] > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1],), "labels"),
        ((None, "hamming"), "metric"),
        (([[0]] * 120,), "labels"),
    ],
)
def test_bad_input_is_named(arguments, message):
    rows, _ = gallery()
    with pytest.raises(ValueError, match=message):
        backfill_order(rows, *arguments)
    with pytest.raises(ValueError, match="NaN"):
        backfill_order(rows * float("nan"))
    with pytest.raises(ValueError, match="only once"):
        backfill_order(iter([rows]))
    with pytest.raises(ValueError, match="n_clusters"):
        backfill_order(rows, n_clusters=500)
