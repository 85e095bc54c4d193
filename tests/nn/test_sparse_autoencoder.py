from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from subspan.nn import ActiveAtoms, SparseAutoencoder

VARIANTS = ("topk", "batchtopk", "matching-pursuit")


def made(variant: Any, *, d: int = 6, n_atoms: int = 20, k: int = 3, **options: Any) -> SparseAutoencoder:
    sae = SparseAutoencoder(d, n_atoms, k, variant=variant, **options).double()
    if sae.encoder is not None and sae.bias is not None:
        with torch.no_grad():
            sae.encoder.normal_()
            sae.bias.normal_(0, 0.3)
    sae.mean += torch.randn(d, dtype=torch.float64)
    sae.scale *= 1.7
    return sae


def slow(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """The training pass with dense codes, by torch's own gradients."""
    inner = (x - sae.mean) / sae.scale
    if sae.encoder is None or sae.bias is None:
        left = inner
        for _ in range(sae.k):
            value, atom = (left @ sae.decoder.T).max(1)
            left = left - value.relu().unsqueeze(1) * sae.decoder[atom]
        return (inner - left) * sae.scale + sae.mean
    products = inner @ sae.encoder.T + sae.bias
    if sae.variant == "topk":
        kept = torch.zeros_like(products).scatter_(1, products.topk(sae.k, 1).indices, 1)
    else:
        kept = products >= products.flatten().topk(sae.k * len(x)).values[-1]
    return (products.relu() * kept) @ sae.decoder * sae.scale + sae.mean


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [5, 40])  # below and above where the pursuit takes the products of the atoms
def test_values_and_gradients_are_those_of_dense_codes(variant: Any, n: int) -> None:
    sae = made(variant).train()
    found = []
    for run in (sae, lambda x: slow(sae, x)):
        x = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = run(x)
        names, parameters = zip(*sae.named_parameters())
        found.append((y, torch.autograd.grad(y.square().sum(), [x, *parameters])))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, ours, theirs in zip(("x", *names), found[0][1], found[1][1]):
        torch.testing.assert_close(ours, theirs, msg=name)
        assert float(theirs.abs().max()) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_are_sparse_in_the_rows_units_and_rebuild_what_forward_gives(variant: Any) -> None:
    sae = made(variant).eval()
    sae.threshold.fill_(0.8)
    x = torch.randn(30, 6, dtype=torch.float64)
    codes = sae.encode(x)
    assert float(codes.min()) == 0
    torch.testing.assert_close(sae.decode(codes), sae(x))
    torch.testing.assert_close(sae.active_atoms(x).decode(sae.decoder), codes @ sae.decoder)
    if variant != "batchtopk":
        assert int((codes > 0).sum(1).max()) <= 3
    else:
        products = (x - sae.mean) / sae.scale @ sae.encoder.T + sae.bias
        assert torch.equal(codes > 0, products > 0.8)
        # A row alone is coded as among others.
        torch.testing.assert_close(sae.encode(x[:1]), codes[:1])


def test_a_batch_shares_its_atoms_and_the_threshold_follows_the_smallest() -> None:
    sae = SparseAutoencoder(8, 32, 4, variant="batchtopk", dead_weight=0)
    x = torch.randn(64, 8) * torch.linspace(0.1, 3, 64).unsqueeze(1)
    active = (sae._coded(x, batchwise=True).dense(32) > 0).sum(1)
    assert int(active.sum()) == 256
    assert int(active[-8:].sum()) > 3 * int(active[:8].sum())
    sae.training_loss(x)
    least = sae._coded(x, batchwise=True).values.min().detach()
    assert float(sae.threshold) == pytest.approx(float(least))
    sae.training_loss(2 * x)
    assert float(sae.threshold) == pytest.approx(float(0.9 * least + 0.1 * 2 * least))


def test_atoms_start_tied_and_stay_of_unit_length() -> None:
    sae = SparseAutoencoder(8, 32, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.encoder, sae.decoder)
    again = SparseAutoencoder(8, 32, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.decoder, again.decoder)
    with torch.no_grad():
        sae.decoder *= 3
    sae.after_step(1)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_the_loss_is_the_error_and_the_gap_of_dead_atoms(loss: Any) -> None:
    sae = SparseAutoencoder(4, 6, 1, loss=loss, dead_weight=0.5)
    with torch.no_grad():
        sae.encoder[5] = -10 * torch.ones(4)  # never fires on positive rows
        sae.encoder[:5] = torch.cat([torch.eye(4), torch.full((1, 4), 0.01)])
    x = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 1.0]])
    sae.training_loss(x)
    # Three of six atoms have fired once at least by now: the second and fourth, and the last two, have not.
    dead = torch.tensor([False, True, False, True, True, True])
    assert torch.equal(sae.dead, dead)
    terms = sae.training_loss(x, step=0, warmup=10)
    products = x @ sae.encoder.T
    gap = (products.max(1).values.unsqueeze(1) - products[:, dead]).relu().mean()
    assert float(terms["dead"]) == pytest.approx(4 * 0.5 * float(gap), rel=1e-5)
    assert float(sae.training_loss(x, step=5, warmup=10)["dead"]) == pytest.approx(2.5 * 0.5 * float(gap), rel=1e-5)
    assert float(sae.training_loss(x, step=99, warmup=10)["dead"]) == pytest.approx(0.5 * float(gap), rel=1e-5)
    error = x - sae(x)
    wanted = error.square().sum(1).mean() if loss == "mse" else error.abs().sum(1).mean()
    assert float(terms["error"]) == pytest.approx(float(wanted), rel=1e-5)
    terms["dead"].backward()
    assert set(sae.encoder.grad.abs().sum(1).nonzero().flatten().tolist()) == {1, 3, 4, 5}


@pytest.mark.parametrize("variant", ["topk", "matching-pursuit"])
def test_lost_atoms_are_aimed_at_the_rows_coded_worst(variant: Any) -> None:
    sae = SparseAutoencoder(4, 6, 1, variant=variant, dead_weight=0)
    axes = torch.eye(4)
    with torch.no_grad():
        sae.decoder.copy_(F.normalize(torch.tensor([[1.0, 0, 0, 0]] * 3 + [[-1.0, 0, 0, 0]] * 3), dim=1))
        if sae.encoder is not None:
            sae.encoder.copy_(sae.decoder)
    x = torch.stack([axes[0], 0.1 * axes[1], 5 * axes[2], 2 * axes[3]])
    sae.training_loss(x)
    sae.after_step(1999)
    assert float(sae.decoder[:, 1:].abs().max()) == 0
    sae.after_step(2000)
    worst = sae.decoder.abs()[sae.firing == 0]
    torch.testing.assert_close(worst[:2], axes[[2, 3]])
    if sae.encoder is not None:
        torch.testing.assert_close(sae.encoder[sae.firing == 0][:2], sae.decoder[sae.firing == 0][:2])


def test_active_atoms_may_repeat_and_rows_may_have_none() -> None:
    active = ActiveAtoms(torch.tensor([0, 2, 2]), torch.tensor([1, 1, 0]), torch.tensor([2.0, 3.0, 4.0]))
    assert active.rows().tolist() == [0, 0, 2]
    assert active.dense(3).tolist() == [[0, 5, 0], [0, 0, 0], [4, 0, 0]]
    torch.testing.assert_close(active.decode(torch.eye(3)), active.dense(3))


def test_statistics_centre_and_scale_rows() -> None:
    sae, x = SparseAutoencoder(3, 8, 2), torch.randn(100, 3) * 5 + 100
    sae.set_statistics(x)
    inner = sae._inner(x)
    assert float(inner.mean(0).abs().max()) < 1e-4
    assert float(inner.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)
    with pytest.raises(ValueError, match="no variance"):
        sae.set_statistics(torch.ones(5, 3))


def test_bad_input_is_refused() -> None:
    for options, said in (
        ({"k": 9}, "k: must lie in"),
        ({"variant": "relu"}, "variant: expected one of"),
        ({"loss": "huber"}, "loss: expected one of"),
        ({"dead_weight": -1.0}, "dead_weight"),
    ):
        with pytest.raises(ValueError, match=said):
            SparseAutoencoder(**{"d": 4, "n_atoms": 8, "k": 2, **options})
    sae = SparseAutoencoder(4, 8, 2)
    with pytest.raises(ValueError, match="expected 4 columns"):
        sae.encode(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="NaN"):
        sae.encode(torch.full((3, 4), torch.nan))
    with pytest.raises(ValueError, match="matching-pursuit"):
        SparseAutoencoder(4, 8, 2, variant="matching-pursuit").save("nowhere")
