"""The parts of the subspace clustering protocol, and the protocol in small."""

import numpy as np
import pytest

from subspan.reproduce import subspace_clustering
from subspan.solvers.spectral import spectral_labels


def planted():
    random = np.random.default_rng(0)
    rows = [random.normal(size=(25, 3)) @ np.linalg.qr(random.normal(size=(15, 3)))[0].T for _ in range(3)]
    return subspace_clustering.Pictures("planted", np.vstack(rows), np.repeat(np.arange(3), 25), 3)


def test_a_row_of_the_table_is_measured():
    pictures = planted()
    methods = subspace_clustering._methods(3, 3)
    accuracy, cells = subspace_clustering._scored(pictures, methods["EnSC"], [0, 1])
    assert accuracy == 1
    assert cells[0] == "1.000 [1.000, 1.000]"
    assert cells[4] == "0.000"
    by_means, cells = subspace_clustering._scored(pictures, methods["k-means"], [0, 1])
    assert by_means < 0.9
    assert cells[4:6] == ["", ""]


def test_seeds_round_the_same_affinity():
    pictures = planted()
    model = subspace_clustering._methods(3, 3)["LSR"](0).fit(pictures.x)
    again = spectral_labels(model.affinity_, 3, random_state=0)
    assert (model.labels_ == again).all()


def test_pictures_are_scaled_rows(shared_data):
    for name, count, width in (("orl", 400, 1024), ("usps", 50, 256), ("mnist10k", 50, 784)):
        pictures = subspace_clustering._pictures(name, 50, 0)
        assert pictures.x.shape == (count, width)
        assert 0 <= pictures.x.min() < pictures.x.max() <= 1
        assert len(pictures.y) == count


def test_without_a_data_folder_the_digits_are_taken(monkeypatch):
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)
    pictures = subspace_clustering._pictures("digits", 100, 0)
    assert pictures.x.shape == (100, 64)
    assert pictures.x.max() == 1


@pytest.mark.slow
def test_the_protocol_in_small():
    outcome = subspace_clustering.protocol(quick=True, seed=0, progress=lambda message, fraction: None)
    assert outcome.holds
