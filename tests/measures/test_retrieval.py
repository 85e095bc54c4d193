"""Retrieval by label against brute force, and the compatibility numbers built on it."""

import numpy as np
import pytest
import torch

from subspan.measures import (
    average_accuracy,
    average_compatibility,
    backfill_curve,
    common_prefix,
    compatibility_matrix,
    retrieval_scores,
    template_gallery,
)

# The matrix printed by the authors of the d-simplex classifier for seven models (query model a row).
PRINTED = [
    [0.58892],
    [0.597, 0.6156],
    [0.6305, 0.65276, 0.69314],
    [0.63336, 0.65298, 0.70626, 0.72374],
    [0.65006, 0.67872, 0.70754, 0.72114, 0.73828],
    [0.6408, 0.67188, 0.71166, 0.72712, 0.74704, 0.76194],
    [0.6314, 0.6635, 0.72096, 0.73496, 0.75232, 0.76652, 0.77164],
]


def brute_force(queries, gallery, query_labels, gallery_labels, metric, exclude_self, k):
    hits, precisions = [], []
    for i, q in enumerate(queries):
        items = [j for j in range(len(gallery)) if not (exclude_self and i == j)]

        def score(j, q=q):
            if metric == "euclidean":
                return -((q - gallery[j]) ** 2).sum()
            product = q @ gallery[j]
            return product if metric == "inner" else product / np.linalg.norm(q) / np.linalg.norm(gallery[j])

        ranked = sorted(items, key=lambda j: -score(j))
        relevant = [gallery_labels[j] == query_labels[i] for j in ranked]
        if not any(relevant):
            continue
        hits.append(relevant.index(True) + 1)
        terms = [sum(relevant[: r + 1]) / (r + 1) for r in range(len(ranked)) if relevant[r] and (k is None or r < k)]
        precisions.append(sum(terms) / (sum(relevant) if k is None else k))
    return hits, precisions


@pytest.mark.parametrize("metric", ["cosine", "inner", "euclidean"])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("k", [None, 5])
def test_equals_brute_force(metric, exclude_self, k, monkeypatch):
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((50, 6)), rng.integers(0, 7, 50)
    labels[0] = 99
    other = rows if exclude_self else rng.standard_normal((40, 6))
    names = labels if exclude_self else rng.integers(0, 7, 40)
    monkeypatch.setattr("subspan.measures.retrieval._BLOCK", 300)  # several chunks
    found = retrieval_scores(rows, other, labels, names, metric=metric, exclude_self=exclude_self, k=k)
    hits, precisions = brute_force(rows, other, labels, names, metric, exclude_self, k)
    assert found.first_hit.tolist() == hits
    np.testing.assert_allclose(found.average_precision, precisions)
    assert 0 not in found.queries
    assert found.cmc(3) == pytest.approx(np.mean(np.array(hits) <= 3))
    assert found.mean_average_precision == pytest.approx(np.mean(precisions))


def test_ties_count_against_the_query():
    collapsed = torch.ones(10, 4)
    labels = torch.arange(10) % 2
    found = retrieval_scores(collapsed, collapsed, labels, labels, exclude_self=True)
    assert found.first_hit.tolist() == [6] * 10
    assert found.cmc(1) == 0


def test_names_as_labels_and_unequal_width():
    a, b = common_prefix(torch.eye(4), torch.eye(4)[:, :3])
    assert a.shape == b.shape == (4, 3)
    found = retrieval_scores(torch.eye(3), torch.eye(3), ["x", "y", "z"], ["x", "y", "z"])
    assert found.cmc() == found.mean_average_precision == 1


def test_templates_are_unit_class_means():
    rng = np.random.default_rng(1)
    rows, labels = rng.standard_normal((30, 5)), np.array(["b", "a", "c"] * 10)
    templates, classes = template_gallery(rows, labels)
    assert classes.tolist() == ["a", "b", "c"]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    mean = unit[labels == "b"].mean(0)
    np.testing.assert_allclose(templates[1], mean / np.linalg.norm(mean), atol=1e-12)
    with pytest.raises(ValueError, match="no mean direction"):
        template_gallery(np.array([[1.0, 0], [-1, 0]]), [0, 0])


def test_compatibility_of_the_printed_matrix():
    matrix = np.full((7, 7), np.nan)
    for row, values in enumerate(PRINTED):
        matrix[row, : row + 1] = values
    assert average_compatibility(matrix) == pytest.approx(20 / 21)
    assert 100 * average_accuracy(matrix) == pytest.approx(68.899, abs=1e-3)
    assert average_compatibility(np.nan_to_num(matrix)) == pytest.approx(20 / 21)
    assert average_compatibility([[0.5, 0], [0.5, 0.6]]) == 0  # ties fail


def test_compatibility_matrix_of_better_and_better_models():
    rng = np.random.default_rng(2)
    centres, labels = rng.standard_normal((6, 8)), np.arange(60) % 6
    models = [centres[labels] + noise * rng.standard_normal((60, 8)) for noise in (2.0, 1.0, 0.2)]
    matrix = compatibility_matrix(models, models, labels, labels, exclude_self=True)
    direct = retrieval_scores(models[2], models[0], labels, labels, exclude_self=True)
    assert matrix[2, 0] == direct.cmc()
    assert np.isnan(matrix[0, 1])
    assert np.all(np.diff(np.diag(matrix)) > 0)
    assert average_compatibility(matrix) == 1
    ap = compatibility_matrix(models, models, labels, labels, exclude_self=True, measure="map")
    assert ap[1, 0] == retrieval_scores(models[1], models[0], labels, labels, exclude_self=True).mean_average_precision


def test_backfill_curve():
    rng = np.random.default_rng(3)
    centres, labels = rng.standard_normal((5, 6)), np.arange(50) % 5
    new = centres[labels] + 0.1 * rng.standard_normal((50, 6))
    old = centres[labels] + 2.0 * rng.standard_normal((50, 6))
    order = rng.permutation(50)
    curve = backfill_curve(new, old, new, order, labels, labels, exclude_self=True)
    assert curve.scores[0] == retrieval_scores(new, old, labels, labels, exclude_self=True).cmc()
    assert curve.scores[-1] == retrieval_scores(new, new, labels, labels, exclude_self=True).cmc()
    half = old.copy()
    half[order[:25]] = new[order[:25]]
    assert curve.scores[5] == retrieval_scores(new, half, labels, labels, exclude_self=True).cmc()
    same = backfill_curve(new, new, new, order, labels, labels, exclude_self=True, measure="map")
    assert same.area == pytest.approx(same.scores[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gallery": np.ones((4, 2))}, "columns"),
        ({"query_labels": [0]}, "query_labels"),
        ({"gallery_labels": [7, 7, 7, 7]}, "no query"),
        ({"metric": "dot"}, "metric"),
        ({"k": 9}, "k:"),
        ({"queries": np.full((4, 3), np.nan)}, "NaN"),
    ],
)
def test_bad_input(change, message):
    given = {
        "queries": np.eye(4, 3),
        "gallery": np.eye(4, 3),
        "query_labels": [0, 1, 2, 3],
        "gallery_labels": [0, 1, 2, 3],
    }
    with pytest.raises(ValueError, match=message):
        retrieval_scores(**{**given, **change})


def test_bad_matrices_and_orders():
    with pytest.raises(ValueError, match="square"):
        average_accuracy(np.ones((2, 3)))
    with pytest.raises(ValueError, match="lower triangular"):
        average_compatibility(np.ones((2, 2)))
    with pytest.raises(ValueError, match="NaN"):
        average_accuracy([[np.nan, 0], [1, 1]])
    with pytest.raises(ValueError, match="permutation"):
        backfill_curve(np.eye(3), np.eye(3), np.eye(3), [0, 0, 1], [0, 1, 2], [0, 1, 2])
    with pytest.raises(ValueError, match="shares"):
        backfill_curve(np.eye(3), np.eye(3), np.eye(3), [0, 2, 1], [0, 1, 2], [0, 1, 2], shares=[1, 0])
