"""The parts of the protocol of low-rank mixtures, in small."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from subspan.geometry.grassmann import random_basis
from subspan.nn.low_rank_mixture import LowRankMixtureDenoiser
from subspan.reproduce import diffusion_subspace_clustering as protocol


def test_errors_do_not_depend_on_order_or_basis():
    truth = random_basis(10, 2, batch=(3,), generator=torch.Generator().manual_seed(0))
    turned = truth[[2, 0, 1]] @ random_basis(2, 2, generator=torch.Generator().manual_seed(1))
    assert protocol.projector_error(turned, truth) < 1e-7
    other = torch.eye(10, dtype=torch.float64)
    pair = torch.stack([other[:, :2], other[:, 2:4]])
    assert protocol.projector_error(pair, torch.stack([other[:, 4:6], other[:, 2:4]])) == pytest.approx(2)


def test_the_loss_is_the_objective_to_rounding():
    assert protocol.identity_gap(3) < 1e-12


def test_planted_rows_lie_in_their_subspaces():
    x, labels, bases = protocol.planted(5, 3, 2, torch.Generator().manual_seed(0), noise=0.0)
    for label in (0, 1):
        own = x[torch.from_numpy(labels == label)]
        torch.testing.assert_close(own @ bases[label] @ bases[label].mT, own)
    assert float((bases[0].mT @ bases[1]).abs().max()) < 1e-12


def test_an_edit_by_nothing_gives_the_picture_and_by_something_moves_along_it():
    basis = torch.eye(16, dtype=torch.float64)[:, :2].unsqueeze(0)
    denoiser = LowRankMixtureDenoiser(basis, floor=0.01).requires_grad_(False)
    picture = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    direction = basis[0, :, 0]
    found = protocol.edited(denoiser, picture, direction, [0.0, 1.0, -1.0], 0.2)
    torch.testing.assert_close(found[0], picture, atol=0.02, rtol=0)
    change = found[1:] - found[0]
    assert float(change[0] @ direction) > 0.9
    torch.testing.assert_close(change[1], -change[0], atol=1e-6, rtol=0)
    off = protocol.edited(denoiser, picture, torch.eye(16, dtype=torch.float64)[:, 7], [0.0, 1.0], 0.2)
    assert float(torch.linalg.vector_norm(off[1] - off[0])) < 0.6 * float(torch.linalg.vector_norm(change[0]))


def test_without_the_data_folder_digits_take_the_place_of_faces(monkeypatch):
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)
    data = protocol.faces(3, 0)
    assert data.name == "digits"
    assert set(data.fit_labels) == set(data.held_labels) == {0, 1, 2}
    assert abs(len(data.fit) - len(data.held)) <= 3
    assert float(data.fit.max()) <= 1
    rows = torch.cat([data.fit, data.held])
    assert len(rows) == sum(np.bincount(np.r_[data.fit_labels, data.held_labels]))


def test_the_diagonal_rival_is_its_own_posterior_mean():
    rows = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[:30] += 4
    rival = protocol._Diagonal(rows, 2, 0)
    assert isinstance(rival.model, GaussianMixture)
    x, sigma = rows[:5] + 0.3, 0.5
    means, spread, share = (
        torch.from_numpy(v) for v in (rival.model.means_, rival.model.covariances_, rival.model.weights_)
    )
    noisy = torch.distributions.Normal(means, (spread + sigma**2).sqrt())
    weight = (noisy.log_prob(x.unsqueeze(1)).sum(-1) + share.log()).softmax(1)
    each = means + spread / (spread + sigma**2) * (x.unsqueeze(1) - means)
    torch.testing.assert_close(rival(x, sigma), (weight.unsqueeze(-1) * each).sum(1))
