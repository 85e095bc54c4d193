"""The parts of the protocol of MLC, in small."""

from __future__ import annotations

import numpy as np
import torch

from subspan.geometry.grassmann import random_basis
from subspan.measures import clustering_accuracy
from subspan.reproduce import mlc
from subspan.solvers.spectral import spectral_labels


def test_every_second_row_of_the_odd_classes_goes():
    truth = np.repeat(np.arange(4), 10)
    np.testing.assert_array_equal(np.bincount(truth[mlc.imbalanced(truth)]), [10, 5, 10, 5])


def test_the_subspace_tool_finds_subspaces():
    bases = random_basis(30, 5, batch=(3,), generator=torch.Generator().manual_seed(0))
    z = torch.randn(3, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = torch.nn.functional.normalize((z @ bases.mT).flatten(0, 1), dim=1)
    truth = np.repeat(np.arange(3), 40)
    assert clustering_accuracy(truth, mlc.subspace_tool(rows, 3, 0)) == 1
    found = mlc.rivals(rows, 3, 0)
    assert set(found) == {"k-means", "spectral, 10 neighbours", "K-subspaces"}
    labels = spectral_labels(mlc.elastic_net_affinity(rows, 3), 3, random_state=0)
    assert clustering_accuracy(truth, labels) == 1
    assert all(len(labels) == 120 for labels in found.values())
