import numpy as np
import pytest
import torch

from subspan.measures import knn_overlap, recall_at_k
from subspan.solvers import largest_product, nearest


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "inner"])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_brute_force(metric, offset):
    rng = np.random.default_rng(0)
    base, queries = rng.standard_normal((60, 5)) + offset, rng.standard_normal((9, 5)) + offset
    if metric == "euclidean":
        score = -((queries[:, None] - base[None]) ** 2).sum(-1)
    elif metric == "inner":
        score = queries @ base.T
    else:
        score = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
            base / np.linalg.norm(base, axis=1, keepdims=True)
        ).T
    order = np.argsort(-score, axis=1)[:, :4]
    values, found = nearest(queries, base, 4, metric=metric)
    np.testing.assert_array_equal(found.numpy(), order)
    best = np.take_along_axis(score, order, 1)
    np.testing.assert_allclose(values.numpy(), -best if metric == "euclidean" else best, rtol=1e-8)


def test_self_is_excluded_and_recall_counts(monkeypatch):
    import subspan.solvers.neighbours as module

    monkeypatch.setattr(module, "_BLOCK", 64)  # forces several chunks
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    _, found = nearest(x, x, 3, exclude=torch.arange(len(x)))
    assert not bool((found == torch.arange(40).unsqueeze(-1)).any())
    _, with_self = nearest(x, x, 4)
    torch.testing.assert_close(with_self[:, 0], torch.arange(40))
    torch.testing.assert_close(with_self[:, 1:], found)
    chosen = torch.tensor([30, 7, 12])
    torch.testing.assert_close(nearest(x[chosen], x, 3, exclude=chosen)[1], found[chosen])
    truth = torch.tensor([[1, 2], [3, 4]])
    torch.testing.assert_close(
        recall_at_k(torch.tensor([[2, 9, 1], [9, 4, 8]]), truth), torch.tensor([1.0, 0.5], dtype=torch.float64)
    )


def test_overlap_is_one_under_rotation_and_chance_for_noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator)
    q = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    assert float(knn_overlap(x, x @ q, 5).mean()) > 0.999
    assert float(knn_overlap(x, torch.randn(300, 8, generator=generator), 5).mean()) < 0.06


def test_errors():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"k: must lie in \[1, 3\], got 4"):
        nearest(x, x, 4, exclude=torch.arange(len(x)))
    with pytest.raises(ValueError, match="metric"):
        nearest(x, x, 1, metric="l1")
    with pytest.raises(ValueError, match="base: expected 2 columns"):
        nearest(x, torch.zeros(3, 5), 1)
    with pytest.raises(ValueError, match="b: expected 4 rows"):
        knn_overlap(x, torch.zeros(3, 2), 1)


@pytest.mark.parametrize(("n", "block"), [(7, 1 << 24), (64, 10), (200, 70), (5000, 1 << 24), (2500, 300)])
@pytest.mark.parametrize("absolute", [False, True])
def test_the_largest_product_over_groups_and_tiles(n, block, absolute):
    generator = torch.Generator().manual_seed(n)
    base, rows = (torch.randn(m, 12, generator=generator, dtype=torch.float64) for m in (n, 530))
    offset = torch.randn(n, generator=generator, dtype=torch.float64)
    exclude = torch.arange(530) % n
    rows[:9] = 3 * base[exclude[:9]]  # nearest to what must be left out
    for shift, out in ((None, None), (offset, None), (None, exclude), (offset, exclude)):
        score = rows @ base.mT + (0 if shift is None else shift)
        score = score.abs() if absolute else score
        if out is not None:
            score[torch.arange(530), out] = -torch.inf
        value, found = largest_product(rows, base, offset=shift, absolute=absolute, exclude=out, block=block)
        assert torch.equal(found, score.argmax(1))
        torch.testing.assert_close(value, score.amax(1))


def test_of_equal_products_the_lowest_index_is_taken():
    base = torch.arange(3.0).repeat(2000).unsqueeze(1)  # 2 is the largest, first at 2, then every third
    assert largest_product(torch.ones(5, 1), base)[1].tolist() == [2] * 5
    exclude = torch.tensor([2, 5, 2, 0, 5999])
    assert largest_product(torch.ones(5, 1), base, exclude=exclude)[1].tolist() == [5, 2, 5, 2, 2]


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "inner"])
@pytest.mark.parametrize("n", [1000, 1024])
def test_neighbours_over_groups_of_columns_are_those_of_the_sorted_scores(metric, n):
    base = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    queries = torch.cat([base[-30:], base[:40]]) + 0.01
    scores = {"euclidean": -torch.cdist(queries, base).square(), "inner": queries @ base.mT}
    scores["cosine"] = scores["inner"] / queries.norm(dim=1, keepdim=True) / base.norm(dim=1)
    expected = scores[metric].sort(dim=1, descending=True)
    values, found = nearest(queries, base, 3, metric=metric)
    assert torch.equal(found, expected.indices[:, :3])
    torch.testing.assert_close(values, expected.values[:, :3] * (-1 if metric == "euclidean" else 1))
    own = nearest(base, base, 3, metric=metric, exclude=torch.arange(len(base)))[1]
    assert not bool((own == torch.arange(n).unsqueeze(1)).any())
