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
    order = backfill_order(rows, labels, metric, order="farthest")
    assert order.tolist() == sorted(range(len(rows)), key=lambda i: -distance[i])


def test_parts_names_and_memory_maps_give_the_same_order(tmp_path):
    rows, labels = gallery()
    expected = backfill_order(rows, labels, order="farthest")
    np.save(tmp_path / "g.npy", rows.numpy())
    for other in (np.load(tmp_path / "g.npy", mmap_mode="r", allow_pickle=False), list(rows.split(50))):
        assert (
            backfill_order(other, np.array(["a", "b", "c", "d"])[labels], order="farthest").tolist()
            == expected.tolist()
        )
    # A class of one item lies on its own mean, so it comes last.
    assert backfill_order(torch.cat([rows, rows[:1] + 50]), [*labels.tolist(), 9], order="farthest")[-1] == len(rows)


def test_without_labels_clusters_stand_for_classes():
    rows, labels = gallery()
    found = backfill_order(rows, order="farthest", n_clusters=4)
    assert found.tolist() == backfill_order(rows, order="farthest", n_clusters=4).tolist()
    assert sorted(found.tolist()) == list(range(len(rows)))
    # Well-separated classes are the clusters, up to what a mini-batch leaves of their means.
    place = {int(item): rank for rank, item in enumerate(backfill_order(rows, labels, order="farthest"))}
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
        backfill_order(rows, *arguments, order="farthest")
    with pytest.raises(ValueError, match="NaN"):
        backfill_order(rows * float("nan"))
    with pytest.raises(ValueError, match="only once"):
        backfill_order(iter([rows]))
    with pytest.raises(ValueError, match="n_clusters"):
        backfill_order(rows, order="farthest", n_clusters=500)
    with pytest.raises(ValueError, match="order: expected"):
        backfill_order(rows, order="random")
    for unused in ({"labels": [0] * 120}, {"n_clusters": 4}, {"queries": rows, "order": "farthest"}):
        with pytest.raises(ValueError, match=f"{next(iter(unused))}: used with order"):
            backfill_order(rows, **unused)
    with pytest.raises(ValueError, match="queries: expected 5 columns"):
        backfill_order(rows, queries=rows[:, :3])
    with pytest.raises(ValueError, match="gallery: needs at least 2"):
        backfill_order(rows[:1])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("given", [True, False])
def test_density_equals_a_literal_mean_over_the_nearest(metric, given):
    rows, _ = gallery()
    queries = gallery(30, seed=1)[0] if given else None

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm()) if metric == "euclidean" else 1 - float(a @ b / a.norm() / b.norm())

    means = []
    for i, row in enumerate(rows):
        others = queries if queries is not None else [other for j, other in enumerate(rows) if j != i]
        means.append(sum(sorted(distance(row, other) for other in others)[:10]) / 10)
    expected = sorted(range(len(rows)), key=lambda i: means[i])
    for form in (rows, list(rows.split(50))):
        assert backfill_order(form, metric=metric, queries=queries).tolist() == expected


def test_density_of_a_large_gallery_is_that_of_a_sample():
    rows, _ = gallery(n=5000)
    found = backfill_order(rows, random_state=1)
    assert found.tolist() == backfill_order(list(rows.split(700)), random_state=1).tolist()
    assert sorted(found.tolist()) == list(range(5000))
    exact = torch.cdist(rows, rows).topk(11, largest=False).values.mean(1)
    ranks = np.empty(5000)
    ranks[found] = np.arange(5000)
    assert np.corrcoef(ranks, exact.argsort().argsort().numpy())[0, 1] > 0.95


def test_density_serves_the_queries_that_come():
    """Items that nobody asks for come last, however crowded they are."""
    rows, labels = gallery()
    queries = gallery(200, seed=2)[0][2::4]
    first = backfill_order(rows, queries=queries)[:30]
    assert (labels[first] == 2).all()
