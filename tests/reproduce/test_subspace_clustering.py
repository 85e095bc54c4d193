"""The parts of the subspace clustering protocol, and the protocol in small."""

import numpy as np
import pytest

from subspan.reproduce import subspace_clustering


def planted():
    random = np.random.default_rng(0)
    rows = [random.normal(size=(25, 3)) @ np.linalg.qr(random.normal(size=(15, 3)))[0].T for _ in range(3)]
    return subspace_clustering.Pictures("planted", np.vstack(rows), np.repeat(np.arange(3), 25), 3)


def test_methods_are_scored_and_seeds_round_the_same_affinity():
    methods = subspace_clustering.methods(3, 3)
    ours, means = (subspace_clustering.Runs(planted(), methods[name]) for name in ("EnSC", "k-means"))
    first, second = ours(0), ours(1)
    assert first["accuracy"] == second["accuracy"] == 1
    assert first["FDE"] == pytest.approx(0, abs=1e-3)
    assert "processor s" not in second
    by_means = means(0)
    assert by_means["accuracy"] < 0.9
    assert "FDE" not in by_means
    assert "processor s" in means(1)


def test_pictures_are_scaled_rows(shared_data):
    for name, count, width in (("orl", 400, 1024), ("usps", 50, 256), ("mnist10k", 50, 784)):
        pictures = subspace_clustering.pictures(name, 50, 0)
        assert pictures.x.shape == (count, width)
        assert 0 <= pictures.x.min() < pictures.x.max() <= 1
        assert len(pictures.y) == count


def test_without_a_data_folder_the_digits_are_taken(monkeypatch):
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)
    pictures = subspace_clustering.pictures("digits", 100, 0)
    assert pictures.x.shape == (100, 64)
    assert pictures.x.max() == 1
