"""The closed forms of the low-rank mixture against dense Gaussians, automatic derivatives, and exact expectations."""

from __future__ import annotations

import math

import pytest
import torch

from subspan.geometry.grassmann import random_basis
from subspan.nn.denoising import denoising_loss, edm_weight, flow, noise_levels
from subspan.nn.low_rank_mixture import LowRankMixtureDenoiser, hard_assignment_energy, hard_denoising_loss

N, K, D = 12, 3, 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(floor: float = 0.05, **options) -> LowRankMixtureDenoiser:
    g = generator()
    spread = 0.5 + torch.rand(K, D, dtype=torch.float64, generator=g)
    means = torch.randn(K, N, dtype=torch.float64, generator=g)
    share = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    bases = random_basis(N, D, batch=(K,), generator=g)
    return LowRankMixtureDenoiser(bases, variances=spread, means=means, weights=share, floor=floor, **options)


def rows(n: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, N, dtype=torch.float64, generator=generator(seed))


def dense(model: LowRankMixtureDenoiser) -> tuple[torch.Tensor, torch.Tensor]:
    u, floor = model.bases, model.floor.view(-1, 1, 1)
    eye = torch.eye(N, dtype=torch.float64)
    inside = (u * model.log_variances.exp().unsqueeze(1)) @ u.mT
    return inside + floor * (eye - u @ u.mT), eye


@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 30.0])
def test_posterior_mean_density_and_score_are_those_of_the_dense_mixture(floor, sigma):
    model, x = mixture(floor), rows()
    covariance, eye = dense(model)
    noisy = torch.distributions.MultivariateNormal(model.means, covariance + sigma**2 * eye)
    joint = noisy.log_prob(x.unsqueeze(1)) + model.log_weights
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * eye)
    each = model.means + torch.einsum("kij,bkj->bki", gain, x.unsqueeze(1) - model.means)
    expected = torch.einsum("bk,bki->bi", joint.softmax(1), each)
    torch.testing.assert_close(model(x, sigma), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(model.log_density(x, sigma), joint.logsumexp(1), atol=1e-9, rtol=0)
    torch.testing.assert_close(model.responsibilities(x, sigma), joint.softmax(1), atol=1e-10, rtol=0)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.log_density(leaf, sigma).sum(), leaf)
    torch.testing.assert_close(model.score(x, sigma), gradient, atol=1e-9, rtol=0)


def test_the_jacobian_is_the_posterior_covariance_over_the_noise_and_of_low_rank():
    model, x, sigma = mixture(0.0), rows(1), 0.7
    model.requires_grad_(False)
    jacobian = torch.func.jacrev(lambda row: model(row.unsqueeze(0), sigma)[0])(x[0])
    covariance, eye = dense(model)
    inner = covariance - covariance @ torch.linalg.inv(covariance + sigma**2 * eye) @ covariance
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * eye)
    means = model.means + torch.einsum("kij,kj->ki", gain, x - model.means)
    w = model.responsibilities(x, sigma)[0]
    centre = w @ means
    total = torch.einsum("k,kij->ij", w, inner) + torch.einsum("k,ki,kj->ij", w, means - centre, means - centre)
    torch.testing.assert_close(jacobian, total / sigma**2, atol=1e-9, rtol=0)
    torch.testing.assert_close(jacobian, jacobian.mT, atol=1e-10, rtol=0)
    values = torch.linalg.eigvalsh(jacobian)
    assert float(values[0].detach()) > -1e-10
    assert int((values > 1e-9).sum()) <= K * D + K - 1


def test_limits_of_the_noise():
    model, x = mixture(0.0), rows()
    near = model(x, 1e-7)
    nearest = model.responsibilities(x, 0.0).argmax(1)
    centred = x - model.means[nearest]
    u = model.bases[nearest]
    projected = model.means[nearest] + torch.einsum("bnd,bmd,bm->bn", u, u, centred)
    torch.testing.assert_close(near, projected, atol=1e-6, rtol=0)
    far = model(x, 1e6)
    torch.testing.assert_close(far, (model.log_weights.exp() @ model.means).expand_as(far), atol=1e-4, rtol=0)
    assert torch.equal(model(x, 0.0), x)
    each = torch.tensor([0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 9.0], dtype=torch.float64)
    apart = torch.cat([model(row.unsqueeze(0), float(s)) for row, s in zip(x, each)])
    torch.testing.assert_close(model(x, each), apart)


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_rows_without_noise_pass_their_gradient_on_as_it_is(floor):
    model = mixture(floor, learn_all=True)
    x, sigma = rows().requires_grad_(), torch.tensor([0.0, 0.5, 0.0, 1.0, 0.0, 0.2, 0.0], dtype=torch.float64)
    model(x, sigma).sum().backward()
    assert bool((x.grad[sigma == 0] == 1).all())
    assert bool(x.grad.isfinite().all())
    noisy = mixture(floor, learn_all=True)
    noisy(rows()[sigma > 0], sigma[sigma > 0]).sum().backward()
    for ours, theirs in zip(model.parameters(), noisy.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_half_precision_is_summed_in_single():
    model = mixture(0.05).float()
    x = rows().float()
    for dtype in (torch.float16, torch.bfloat16):
        found = model(x.to(dtype), 0.01)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), model(x.to(dtype).float(), 0.01), atol=0.05, rtol=0.02)


def expected_loss(x: torch.Tensor, bases: torch.Tensor, sigma: float) -> torch.Tensor:
    """The expectation over noise, exactly: the error is quadratic in it, so 2n points ±√n e_i integrate it."""
    best = torch.einsum("bn,knd->bkd", x, bases).square().sum(-1).argmax(1)
    u = bases[best]
    points = math.sqrt(N) * torch.cat([torch.eye(N, dtype=x.dtype), -torch.eye(N, dtype=x.dtype)])
    noisy = x.unsqueeze(1) + sigma * points
    denoised = torch.einsum("bnd,bmd,bpm->bpn", u, u, noisy) / (1 + sigma**2)
    return (denoised - x.unsqueeze(1)).square().sum(-1).mean()


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 3.0])
def test_the_weight_of_a_noise_level_is_one_over_the_variance_of_both(sigma_data):
    sigma = torch.tensor([0.01, 0.3, 50.0], dtype=torch.float64)
    torch.testing.assert_close(edm_weight(sigma, sigma_data), 1 / sigma_data**2 + 1 / sigma**2)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 2.0, 50.0])
def test_the_hard_denoising_loss_is_the_objective_of_k_subspaces(sigma):
    x = rows(40)
    candidates = [random_basis(N, D, batch=(K,), generator=generator(seed)).requires_grad_(True) for seed in range(4)]
    a = 1 / (1 + sigma**2)
    constant = x.square().sum(1).mean() + a**2 * sigma**2 * D
    for bases in candidates:
        loss, energy = hard_denoising_loss(x, bases, sigma), hard_assignment_energy(x, bases).mean()
        torch.testing.assert_close(loss, expected_loss(x, bases, sigma), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(loss, constant - (2 * a - a**2) * energy, atol=1e-12, rtol=1e-12)
        (first,), (second,) = (torch.autograd.grad(value, bases) for value in (loss, energy))
        torch.testing.assert_close(first, -(2 * a - a**2) * second, atol=1e-12, rtol=1e-12)


def test_the_hard_denoiser_is_the_one_the_loss_is_of():
    bases, sigma = random_basis(N, D, batch=(K,), generator=generator()), 0.05
    x = torch.einsum("knd,bkd->kbn", bases, torch.randn(30, K, D, dtype=torch.float64, generator=generator(2)))
    model = LowRankMixtureDenoiser(bases, hard=True)
    noise = torch.randn(K * 30, N, dtype=torch.float64, generator=generator(3))
    clean = x.flatten(0, 1)
    drawn = denoising_loss(model, clean, torch.full((len(clean),), sigma, dtype=torch.float64), noise) * N
    assert float(drawn.detach()) == pytest.approx(float(hard_denoising_loss(clean, bases, sigma)), rel=0.25)


def test_gradient_descent_of_the_hard_loss_reaches_the_planted_subspaces():
    bases = random_basis(N, D, batch=(K,), generator=generator())
    x = torch.einsum("knd,bkd->bkn", bases, torch.randn(60, K, D, dtype=torch.float64, generator=generator(2)))
    model = LowRankMixtureDenoiser(bases + 0.15 * torch.randn(K, N, D, dtype=torch.float64, generator=generator(4)))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        hard_denoising_loss(x.flatten(0, 1), model.bases, 0.5).backward()
        optimizer.step()
    sines = torch.linalg.matrix_norm(bases - model.bases @ (model.bases.mT @ bases), 2)
    assert float(sines.detach().max()) < 1e-2


def test_samples_along_the_flow_have_the_covariance_of_the_mixture_and_the_flow_runs_back():
    basis = random_basis(N, D, batch=(1,), generator=generator())
    model = LowRankMixtureDenoiser(basis)
    start = 20 * torch.randn(1500, N, dtype=torch.float64, generator=generator(1))
    with torch.no_grad():
        found = flow(model, start, noise_levels(25, smallest=0.01, largest=20.0))
        torch.testing.assert_close(found.mT.cov(), basis[0] @ basis[0].mT, atol=0.2, rtol=0)
        x = found[:5] + 0.1 * rows(5)
        up = torch.linspace(0.1, 2, 30)
        back = flow(model, flow(model, x, up), up.flip(0))
    torch.testing.assert_close(back, x, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LowRankMixtureDenoiser(torch.randn(2, 3, 4)), "bases"),
        (lambda: LowRankMixtureDenoiser(torch.randn(2, 4, 3), variances=torch.zeros(2, 3)), "variances"),
        (lambda: LowRankMixtureDenoiser(torch.randn(2, 4, 3), weights=torch.tensor([1.0, -1.0])), "weights"),
        (lambda: LowRankMixtureDenoiser(torch.randn(2, 4, 3), floor=-1.0), "floor"),
        (lambda: mixture()(rows()[:, :3], 1.0), "rows of 12"),
        (lambda: mixture()(rows(), -1.0), "sigma"),
        (lambda: mixture()(rows(), float("nan")), "sigma"),
        (lambda: mixture()(rows(), torch.ones(3)), "one a row"),
        (lambda: mixture().score(rows(), 0.0), "positive"),
        (lambda: mixture(0.0).log_density(rows()), "no density"),
        (lambda: hard_denoising_loss(rows(), random_basis(N, D, batch=(K,)), -1.0), "sigma"),
        (lambda: noise_levels(1), "steps"),
        (lambda: flow(mixture(), rows(), torch.tensor([0.0, 1.0])), "levels"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
