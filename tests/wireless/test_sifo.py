"""The network sees a set and phase-free labels, starts as a Gaussian mean, and learns; the estimator holds a memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning", reason="pretraining uses Lightning (extra: train)")

from subspan.datasets import ChannelSite, street_canyon
from subspan.geometry import Subspace
from subspan.geometry.grassmann import random_basis
from subspan.solvers import leading_eigenspace
from subspan.wireless import (
    CaptureLoss,
    InContextSubspaceRegressor,
    Memory,
    SiFo,
    channel_covariance,
    channel_subspaces,
    probing_beams,
    rsrp,
)
from subspan.wireless.sifo import Episodes
from subspan.wireless.sifo_network import label_covariances, lost_energy

GRID = (4, 2)
BEAMS = probing_beams(GRID)
KINDS = [False, True]


def dtype(is_complex: bool) -> torch.dtype:
    return torch.complex64 if is_complex else torch.float32


def labels(n: int, d: int = 6, r: int = 3, is_complex: bool = False) -> Subspace:
    variances = torch.rand(n, r).sort(descending=True).values + 0.1
    return Subspace(random_basis(d, r, batch=(n,), dtype=dtype(is_complex)), variances=variances)


def network(is_complex: bool = False, **options: object) -> InContextSubspaceRegressor:
    made = InContextSubspaceRegressor(6, 2, 3, is_complex=is_complex, width=16, bandwidth=1.0, scale=1.0, **options)
    # Away from its start, where attention is a Gaussian alone.
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("is_complex", KINDS)
def test_order_phases_and_scale_of_the_memory_change_nothing(is_complex):
    made, asked, where, held = (
        network(is_complex),
        torch.randn(5, 3),
        torch.randn(9, 3),
        labels(9, is_complex=is_complex),
    )
    expected = made.requires_grad_(False)(asked, where, held)
    order = torch.randperm(9)
    phase = torch.exp(2j * torch.pi * torch.rand(9, 1, 1)) if is_complex else -torch.ones(9, 1, 1)
    other = Subspace(held.basis * phase, variances=7 * held.variances)[order]
    found = made(asked, where[order], other)
    assert float(found.angles(expected).max()) < 1e-3
    torch.testing.assert_close(found.variances, expected.variances, atol=1e-4, rtol=1e-3)
    changed = made(asked, where, labels(9, is_complex=is_complex))
    assert float(changed.angles(expected).max()) > 0.02


@pytest.mark.parametrize("is_complex", KINDS)
def test_it_starts_as_a_gaussian_mean_and_a_prior(is_complex):
    made = InContextSubspaceRegressor(6, 2, 3, is_complex=is_complex, width=16, bandwidth=1.5, prior_weight=0.2)
    with torch.no_grad():
        made.addition.weight.zero_()
    asked, where, held = torch.randn(4, 3), torch.randn(7, 3), labels(7, is_complex=is_complex)
    memory = Memory(where, label_covariances(held))
    pull = torch.exp(-torch.cdist(asked, where).square() / (2 * 1.5**2))
    total = pull.sum(1) + 0.2
    mean = torch.einsum("mn,nde->mde", pull.to(memory.covariances), memory.covariances) + 0.2 * made.prior
    torch.testing.assert_close(made.covariance(asked, memory), mean / total[:, None, None], atol=1e-5, rtol=1e-4)
    alone = made.covariance(asked)
    torch.testing.assert_close(alone, made.prior.expand_as(alone))


def test_real_labels_are_a_case_of_complex_ones():
    real, other = network(), network(is_complex=True)
    state = {name: value for name, value in real.state_dict().items() if not name.startswith("addition")}
    other.load_state_dict({**other.state_dict(), **{n: v.to(other.state_dict()[n]) for n, v in state.items()}})
    with torch.no_grad():
        for made in (real, other):
            made.addition.weight.zero_()
            made.addition.bias.zero_()
    asked, where, held = torch.randn(4, 3), torch.randn(7, 3), labels(7)
    as_complex = Subspace(held.basis.to(torch.complex64), variances=held.variances)
    torch.testing.assert_close(
        other(asked, where, as_complex).projector, real(asked, where, held).projector + 0j, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("is_complex", KINDS)
def test_labels_are_read_as_energies_along_the_frame(is_complex):
    frame, held = torch.randn(9, 6, dtype=dtype(is_complex)), labels(4, is_complex=is_complex)
    made = InContextSubspaceRegressor(6, 2, 3, frame=frame, is_complex=is_complex, width=16)
    each = ((frame.conj() @ held.basis).abs().square() * held.variances[:, None]).sum(-1)
    torch.testing.assert_close(made.energies(label_covariances(held)), each / each.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_the_gradient_of_the_captured_energy_is_that_of_differences(kind):
    def hermitian(x: torch.Tensor) -> torch.Tensor:
        return x @ x.mH

    start, truth = torch.randn(2, 5, 5, dtype=kind), hermitian(torch.randn(2, 5, 5, dtype=kind))
    assert torch.autograd.gradcheck(lambda x: lost_energy(hermitian(x), truth, 2), start.requires_grad_())


def test_a_prediction_without_a_gap_is_taught_by_energies_alone():
    flat = torch.diag_embed(torch.tensor([[0.26, 0.25002, 0.25, 0.23998], [0.5, 0.3, 0.15, 0.05]])).requires_grad_()
    truth = torch.ones(2, 4, 4) / 4
    (gradient,) = torch.autograd.grad(lost_energy(flat, truth, 2), flat)
    assert bool((gradient[0] == 0).all())
    assert bool(gradient[1].abs().max() > 0)


@pytest.mark.parametrize("is_complex", KINDS)
def test_it_learns_what_neighbours_cannot_tell(is_complex):
    # The subspace follows from the key in every world; each memory is of one far away.
    basis = random_basis(6, 3, batch=(1,), dtype=dtype(is_complex))[0]
    keys = torch.eye(3)[torch.arange(90) % 3] + 0.1 * torch.randn(90, 3)
    truth = torch.einsum("di,ei->ide", basis, basis.conj())[torch.arange(90) % 3]
    made = InContextSubspaceRegressor(6, 1, 3, is_complex=is_complex, width=16, bandwidth=1.0, scale=1.0)
    optimizer, loss = torch.optim.Adam(made.parameters(), lr=1e-2), CaptureLoss()
    for _ in range(40):
        optimizer.zero_grad()
        value, terms = loss(made, (keys, truth, keys[:2] + 9, truth[:2]))
        value.backward()
        optimizer.step()
    assert float(terms["lost"]) < 0.1
    assert float(made(keys).captured_energy(truth).mean()) > 0.9


def test_episodes_ask_about_others_than_they_show():
    site = Memory(torch.arange(40.0)[:, None], torch.eye(2).expand(40, 2, 2))
    episodes = list(Episodes([site], 50, queries=8, largest=16, seed=0))
    sizes = [len(keys) for _, _, keys, _ in episodes]
    assert (min(sizes), max(sizes) <= 16, max(sizes) > 8) == (0, True, True)
    assert all(not set(asked[:, 0].tolist()) & set(held[:, 0].tolist()) for asked, _, held, _ in episodes)
    again = Episodes([site], 50, queries=8, largest=16, seed=0)[7]
    assert torch.equal(again[0], episodes[7][0])
    assert not torch.equal(Episodes([site], 50, queries=8, largest=16, seed=1)[7][0], again[0])


# ---------------------------------------------------------------------- the estimator


def measured(site: ChannelSite) -> tuple[torch.Tensor, Subspace]:
    return rsrp(site.channels, BEAMS, gains=site.gains), channel_subspaces(site.channels, 4)


@pytest.fixture(scope="module")
def here() -> ChannelSite:
    return street_canyon(users=160, grid=GRID, random_state=9)


@pytest.fixture(scope="module")
def models() -> dict[str, SiFo]:
    torch.manual_seed(0)
    sites = [measured(street_canyon(users=80, grid=GRID, random_state=seed)) for seed in range(3)]
    options = {
        "n_components": 2,
        "width": 16,
        "episodes": 40,
        "queries": 16,
        "largest_memory": 40,
        "learning_rate": 3e-3,
        "random_state": 0,
    }
    bank = SiFo(method="bank", **options).pretrain(sites)
    chosen = {"bandwidth": bank.bandwidth_, "prior_weight": bank.prior_weight_}
    return {"bank": bank, "in-context": SiFo(method="in-context", **options, **chosen).pretrain(sites)}


@pytest.mark.parametrize("method", ["bank", "in-context"])
def test_a_memory_helps_and_is_all_that_a_site_changes(models, here, method):
    model, (powers, found) = models[method].forget(), measured(here)
    truth = channel_covariance(here.channels[100:])
    before = model.predict(powers[100:])
    state = {n: v.clone() for n, v in model.network_.state_dict().items()} if model.network_ else {}
    for start in (0, 50):
        model.calibrate(powers[start : start + 50], found[start : start + 50])
    after = model.predict(powers[100:])
    gain = after.captured_energy(truth).mean() - before.captured_energy(truth).mean()
    assert float(gain) > 0.02
    assert len(model.memory_) == 100
    assert all(torch.equal(v, state[n]) for n, v in (model.network_.state_dict() if model.network_ else {}).items())
    assert float((after.variances.sum(-1) - after.captured_energy(truth)).abs().mean()) < 0.25
    again = model.forget().predict(powers[100:])
    torch.testing.assert_close(again.basis, before.basis)


def test_the_prior_is_the_mean_of_the_sites(models, here):
    found = models["bank"].forget().predict(measured(here)[0][:2])
    sites = [street_canyon(users=80, grid=GRID, random_state=seed) for seed in range(3)]
    mean = torch.stack([label_covariances(measured(site)[1]).mean(0) for site in sites]).mean(0)
    assert float(found[0].angles(leading_eigenspace(mean, 2)).max()) < 1e-3


def test_one_wrong_label_does_little(models, here):
    powers, found = measured(here)
    truth = channel_covariance(here.channels[100:])
    for model in models.values():
        clean = model.forget().calibrate(powers[:100], found[:100]).predict(powers[100:])
        wrong = Subspace.random(8, 4, batch=(1,), dtype=torch.complex64)
        basis = torch.cat([wrong.basis, found.basis[1:100]])
        other = model.forget().calibrate(powers[:100], Subspace(basis, variances=found.variances[:100]))
        lost = clean.captured_energy(truth) - other.predict(powers[100:]).captured_energy(truth)
        assert float(lost.mean()) < 0.02


def test_a_bank_needs_no_pretraining_and_a_network_does(here):
    powers, found = measured(here)
    assert SiFo(n_components=2, method="bank").calibrate(powers[:3], found[:3]).predict(powers[3:5]).batch_shape == (2,)
    capped = SiFo(n_components=2, method="bank", capacity=4).calibrate(powers[:6], found[:6])
    assert len(capped.memory_) == 4
    with pytest.raises(ValueError, match="call pretrain first"):
        SiFo(method="in-context").predict(powers)
    with pytest.raises(ValueError, match="empty"):
        SiFo(method="bank").predict(powers)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda p, f: SiFo().pretrain([]), "at least one"),
        (lambda p, f: SiFo().pretrain([(p, f), (p[:, :3], f)]), "equal numbers of beams"),
        (lambda p, f: SiFo().pretrain([(p[:5], f)]), "rows of powers"),
        (lambda p, f: SiFo(n_components=9).pretrain([(p, f)]), "at most 8"),
        (lambda p, f: SiFo(method="nearest"), "method"),
        (lambda p, f: SiFo(bandwidth=0.0), "bandwidth"),
        (lambda p, f: SiFo().calibrate(p * torch.nan, f), "NaN"),
        (lambda p, f: SiFo(n_components=2, method="bank").calibrate(p, f).predict(p[:, :3]), "keys"),
        (lambda p, f: InContextSubspaceRegressor(4, 5, 2), "n_components"),
        (lambda p, f: InContextSubspaceRegressor(4, 2, 2, width=18), "multiple of 4"),
        (lambda p, f: InContextSubspaceRegressor(4, 2, 2, frame=torch.eye(3)), "frame"),
        (lambda p, f: network()(p[:, :3], p[:, :3]), "both or neither"),
        (lambda p, f: network()(p[:, :3], p[:, :2], f), "3 columns"),
        (lambda p, f: network()(p[:, :3], p[:, :3], f), r"expected \(160, 6, r\)"),
        (lambda p, f: network()(p[:, :3], p[:3, :3], labels(3, is_complex=True)), "is_complex=True"),
        (lambda p, f: label_covariances(Subspace(f.basis, variances=0 * f.variances)), "no variance at all"),
    ],
)
def test_bad_input(here, fault, words):
    with pytest.raises(ValueError, match=words):
        fault(*measured(here))
