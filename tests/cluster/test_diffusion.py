"""Planted subspaces are found; the likelihood rises; too few rows fail as the theory says."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from subspan.cluster import KSubspaces, LowRankMixtureDiffusion
from subspan.cluster.diffusion import shape_interaction_labels
from subspan.geometry.grassmann import random_basis
from subspan.solvers import assign

THEORY = {"covariance": "identity", "center": False, "floor": 0.0}


def low_rank(rows: int, *, n: int = 24, k: int = 2, d: int = 4, noise: float = 0.01, seed: int = 0):
    """`rows` of each of k orthogonal d-dimensional subspaces of R^n."""
    generator = torch.Generator().manual_seed(seed)
    bases = random_basis(n, k * d, generator=generator).reshape(n, k, d).movedim(1, 0)
    z = torch.randn(k, rows, d, dtype=torch.float64, generator=generator)
    x = (z @ bases.mT).flatten(0, 1)
    x = x + noise * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    return x, torch.arange(k).repeat_interleave(rows).numpy(), bases


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest projector distance under the best pairing of components."""
    gaps = torch.cdist((found @ found.mT).flatten(1), (truth @ truth.mT).flatten(1))
    return float(gaps.gather(1, assign(gaps, maximize=False).unsqueeze(1)).max())


@pytest.mark.parametrize("options", [{}, {"init": "lsr"}, {"method": "hard", **THEORY}])
def test_planted_subspaces_and_their_rows_are_found(options):
    x, labels, bases = low_rank(60)
    model = LowRankMixtureDiffusion(2, 4, random_state=0, **options).fit(x.numpy())
    assert adjusted_rand_score(labels, model.labels_) == 1
    assert error(model.subspaces_.basis, bases) < 0.05
    np.testing.assert_array_equal(model.predict(x.numpy()), model.labels_)
    assert (np.diff(model.objective_) >= -1e-9).all()
    assert model.subspaces_.batch_shape == (2,)


def test_the_diffusion_loss_finds_them_too():
    pytest.importorskip("lightning")
    x, labels, bases = low_rank(60)
    options = {"method": "diffusion", "epochs": 8, "random_state": 0, **THEORY}
    model = LowRankMixtureDiffusion(2, 4, **options).fit(x)
    assert adjusted_rand_score(labels, model.labels_) == 1
    assert error(model.subspaces_.basis, bases) < 0.3


def test_too_few_rows_fail_and_enough_succeed():
    found = {}
    for rows in (3, 6, 8):
        errors = []
        for seed in range(5):
            x, _, bases = low_rank(rows, seed=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = LowRankMixtureDiffusion(2, 4, method="hard", random_state=0, **THEORY).fit(x)
            errors.append(error(model.subspaces_.basis, bases))
        found[rows] = errors
    assert min(found[3]) > 0.5
    assert np.mean(np.array(found[8]) < 0.5) >= 0.8
    # One subspace, N < d rows: the bound sqrt(2 (d - N)) is met with equality up to the noise.
    x, _, bases = low_rank(2, k=1)
    with pytest.warns(UserWarning, match="not determined"):
        model = LowRankMixtureDiffusion(1, 4, method="hard", random_state=0, **THEORY).fit(x)
    assert error(model.subspaces_.basis, bases) == pytest.approx(2, abs=0.15)


def test_one_component_is_principal_component_analysis():
    x = low_rank(40, k=1)[0] * torch.linspace(1, 3, 24) + 5
    model = LowRankMixtureDiffusion(1, 3, random_state=0).fit(x)
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(x))
    top = vectors.flip(1)[:, :3]
    torch.testing.assert_close(model.subspaces_.projector[0], top @ top.mT, atol=1e-9, rtol=0)
    torch.testing.assert_close(model.denoiser_.floor[0], values.flip(0)[3:].mean())
    shrunk = values.flip(0)[:3] / (values.flip(0)[:3] + 0.25)
    rest = float(model.denoiser_.floor[0] / (model.denoiser_.floor[0] + 0.25))
    gain = (top * shrunk) @ top.mT + rest * (torch.eye(24) - top @ top.mT)
    torch.testing.assert_close(model.denoise(x, 0.5), x.mean(0) + centred @ gain, atol=1e-8, rtol=0)


def test_the_start_is_exact_without_noise_and_rotations_change_nothing():
    x, labels, _ = low_rank(30, noise=0.0, k=3)
    assert adjusted_rand_score(labels, shape_interaction_labels(x, 3, 4, random_state=0)) == 1
    turn = random_basis(24, 24, generator=torch.Generator().manual_seed(5))
    noisy = x + 0.1 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    first = LowRankMixtureDiffusion(3, 4, random_state=0).fit(noisy)
    second = LowRankMixtureDiffusion(3, 4, random_state=0).fit(noisy @ turn.mT)
    assert adjusted_rand_score(first.labels_, second.labels_) == 1
    torch.testing.assert_close(
        second.denoise(noisy @ turn.mT, 0.3), first.denoise(noisy, 0.3) @ turn.mT, atol=1e-4, rtol=0
    )


def test_hard_low_rank_mixtures_are_k_subspaces():
    x = torch.nn.functional.normalize(low_rank(40, noise=0.1, k=3)[0], dim=1)
    model = LowRankMixtureDiffusion(3, 4, method="hard", random_state=0, **THEORY).fit(x)
    rival = KSubspaces(3, 4, init="lsr", random_state=0).fit(x)
    assert adjusted_rand_score(rival.labels_, model.labels_) == 1
    assert error(rival.subspaces_.basis, model.subspaces_.basis) < 1e-5


def test_samples_come_from_the_mixture():
    x = low_rank(80, noise=0.1)[0] + 2
    model = LowRankMixtureDiffusion(2, 4, random_state=0).fit(x)
    drawn, labels = model.sample(4000)
    assert abs(float(model.score(drawn)) - model.score(x.numpy())) < 2
    again = LowRankMixtureDiffusion(2, 4, init=labels, random_state=0).fit(drawn)
    assert error(again.subspaces_.basis, model.subspaces_.basis) < 0.15
    np.testing.assert_allclose(model.predict_proba(drawn).sum(1), 1)


def test_empty_components_are_seeded_anew():
    x, _, _ = low_rank(40)
    options = {"method": "hard", "random_state": 0}
    model = LowRankMixtureDiffusion(2, 4, init=np.zeros(80, int), **options).fit(x)
    assert set(model.labels_.tolist()) == {0, 1}
    assert model.objective_[-1] > LowRankMixtureDiffusion(1, 4, **options).fit(x).objective_[-1]


def test_the_likelihood_fit_has_one_floor_and_the_hard_fit_one_a_component():
    generator = torch.Generator().manual_seed(0)
    x = low_rank(60, noise=0.0)[0]
    x[:60] += 0.05 * torch.randn(60, 24, dtype=torch.float64, generator=generator)
    x[60:] += 0.3 * torch.randn(60, 24, dtype=torch.float64, generator=generator)
    soft, hard = (LowRankMixtureDiffusion(2, 4, method=m, random_state=0).fit(x).denoiser_ for m in ("em", "hard"))
    assert hard.floor.max() > 10 * hard.floor.min()
    assert torch.equal(soft.floor[0], soft.floor[1])
    # What the components leave of the variance, together, over all that it is spread on.
    share = soft.responsibilities(x)
    left = (share * soft.residual_energy(x)).sum() / (len(x) * 20)
    torch.testing.assert_close(soft.floor[0], left, rtol=0.02, atol=0)


def test_the_best_of_several_random_starts_is_kept():
    x, _, _ = low_rank(40)
    options = {"method": "hard", "init": "random", "random_state": 0}
    one, ten = (LowRankMixtureDiffusion(2, 4, n_init=n, **options).fit(x).objective_[-1] for n in (1, 10))
    planned = LowRankMixtureDiffusion(2, 4, method="hard", random_state=0).fit(x).objective_[-1]
    assert one <= ten <= planned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method"),
        ({"covariance": "full"}, "covariance"),
        ({"n_components": 99}, "n_components"),
        ({"n_components": True}, "n_components"),
        ({"rank": 24}, "rank"),
        ({"rank": 0}, "rank"),
        ({"floor": -1.0}, "floor"),
        ({"floor": 0}, "unbounded"),
        ({"init": "magic"}, "init"),
        ({"init": np.full(80, 7)}, "init"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankMixtureDiffusion(**{"n_components": 2, "rank": 4, **options}).fit(low_rank(40)[0])


def test_bad_rows_are_named():
    x = low_rank(10)[0]
    with pytest.raises(ValueError, match="NaN"):
        LowRankMixtureDiffusion(2, 4).fit(x * float("nan"))
    with pytest.raises(ValueError, match="constant"):
        LowRankMixtureDiffusion(2, 4).fit(torch.ones(20, 24))
    model = LowRankMixtureDiffusion(2, 4, random_state=0).fit(x)
    with pytest.raises(ValueError, match="expected 24 columns"):
        model.predict(x[:, :3])
    with pytest.raises(ValueError, match="at least 1"):
        model.sample(0)
