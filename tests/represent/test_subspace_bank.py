"""The bank answers with what it was given, with means where it was given several, and forgets what it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from subspan.geometry import Subspace
from subspan.geometry.grassmann import random_basis
from subspan.represent import SubspaceBank
from subspan.solvers import leading_eigenspace

DTYPES = (torch.float64, torch.complex128)


def labels(n: int, d: int = 6, r: int = 3, dtype: torch.dtype = torch.float64) -> Subspace:
    variances = torch.rand(n, r, dtype=torch.float64).sort(descending=True).values + 0.1
    return Subspace(random_basis(d, r, batch=(n,), dtype=dtype), variances=variances)


def keys(n: int, q: int = 2) -> Tensor:
    return torch.randn(n, q, dtype=torch.float64)


def same_span(a: Subspace, b: Subspace) -> bool:
    return bool((a.angles(b) < 1e-6).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["covariance", "projector"])
def test_one_pair_comes_back(dtype, reduce):
    held = labels(1, dtype=dtype)
    found = SubspaceBank(3).add(keys(1), held).query(keys(4), reduce=reduce)
    assert found.batch_shape == (4,)
    assert same_span(found, Subspace(held.basis.expand(4, -1, -1)))
    expected = held.variances / held.variances.sum() if reduce == "covariance" else torch.full((1, 3), 1 / 3)
    torch.testing.assert_close(found.variances, expected.expand(4, 3).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["covariance", "projector"])
def test_the_mean_is_that_of_matrices_and_a_gaussian(dtype, reduce):
    held, where, asked = labels(9, dtype=dtype), keys(9), keys(1)
    weights = torch.rand(9, dtype=torch.float64) + 0.5
    found = SubspaceBank(2).add(where, held, weights=weights).query(asked, 5, bandwidth=0.7, reduce=reduce)
    distance = torch.cdist(asked, where)[0]
    near = distance.argsort()[:5]
    shares = held.variances / held.variances.sum(1, keepdim=True)
    shares = torch.full_like(shares, 1 / 3) if reduce == "projector" else shares
    each = (held.basis * shares.unsqueeze(1)) @ held.basis.mH
    pull = weights[near] * torch.exp(-distance[near].square() / (2 * 0.7**2))
    mean = ((pull / pull.sum())[:, None, None] * each[near]).sum(0)
    truth = leading_eigenspace(mean, 2)
    assert same_span(found[0], truth)
    torch.testing.assert_close(found.variances[0], truth.variances)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_planted_subspace_from_noisy_copies(dtype):
    truth = random_basis(16, 3, dtype=dtype)
    noise = 0.1 * torch.randn(400, 16, 3, dtype=dtype)
    copies = Subspace(
        Subspace.span(truth + noise).basis, variances=torch.tensor([3.0, 2.0, 1.0]).double().expand(400, 3)
    )
    found = SubspaceBank(3).add(torch.zeros(400, 1), copies).query([[0.0]], k=400)
    assert float(found[0].angles(Subspace(truth)).max().rad2deg()) < 2
    assert float(copies.angles(Subspace(truth.expand(400, -1, -1))).amax(1).rad2deg().median()) > 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_bases_order_and_scale_change_nothing(dtype):
    held, where, asked = labels(8, dtype=dtype), keys(8), keys(3)
    expected = SubspaceBank(2).add(where, held).query(asked, 4, bandwidth=1.0)
    order = torch.randperm(8)
    phase = torch.ones(8, 1, 1, dtype=dtype) * (torch.exp(1j * keys(8, 1)).unsqueeze(2) if dtype.is_complex else -1)
    other = Subspace(held.basis * phase, variances=1e-12 * held.variances)[order]
    assert same_span(SubspaceBank(2).add(where[order], other).query(asked, 4, bandwidth=1.0), expected)
    # Equal shares leave any basis of a subspace.
    turned = Subspace(held.basis @ random_basis(3, 3, dtype=dtype))
    bank = SubspaceBank(2).add(where, turned)
    assert same_span(bank.query(asked, 4), SubspaceBank(2).add(where, Subspace(held.basis)).query(asked, 4))


def test_complex_and_real_agree():
    held, where, asked = labels(8), keys(8), keys(3)
    as_complex = Subspace(held.basis.to(torch.complex128), variances=held.variances)
    a, b = (SubspaceBank(2).add(where, each).query(asked, 3) for each in (held, as_complex))
    assert same_span(b, a)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "inner"])
def test_far_neighbours_count_less(metric):
    axes = Subspace(torch.eye(2, dtype=torch.float64).unsqueeze(-1))
    bank = SubspaceBank(1, metric=metric).add([[1.0, 0.0], [0.6, 0.8]], axes)
    found = bank.query([[1.0, 0.1]], k=2, bandwidth=0.3)
    assert float(found.variances) > 0.6
    assert float(found.basis[0, 0, 0].abs()) > 0.99


def test_the_prior_answers_alone_and_gives_way():
    prior, held = labels(1)[0], labels(1)
    bank = SubspaceBank(2, prior=prior, prior_weight=0.01)
    assert same_span(bank.query([[0.0]])[0], prior.truncate(2))
    bank.add([[0.0]], held)
    near, far = bank.query([[0.0], [100.0]], bandwidth=1.0)
    assert float(near.angles(held[0].truncate(2)).max()) < 0.05
    assert same_span(far, prior.truncate(2))
    assert same_span(bank.evict(0).query([[0.0]])[0], prior.truncate(2))


def test_more_is_asked_than_is_known():
    line = Subspace(torch.eye(5, dtype=torch.float64)[:, :1].unsqueeze(0), variances=torch.ones(1, 1).double())
    found = SubspaceBank(3).add([[0.0]], line).query([[0.0], [0.0]], k=9)
    torch.testing.assert_close(found.variances, torch.tensor([[1.0, 0, 0]] * 2).double())
    assert torch.equal(found.basis[0], found.basis[1])
    # A direction that only fills up is none of a projector's.
    filled = Subspace(
        torch.eye(5, dtype=torch.float64)[:, :2].unsqueeze(0), variances=torch.tensor([[1.0, 0.0]]).double()
    )
    shares = SubspaceBank(2).add([[0.0]], filled).query([[0.0]], reduce="projector").variances
    torch.testing.assert_close(shares, torch.tensor([[1.0, 0.0]]).double())


def test_memory_grows_and_shrinks():
    held, where = labels(6), keys(6)
    bank = SubspaceBank(3, capacity=4).add(where[:3], held[:3]).add(where[3:], held[3:])
    assert len(bank) == 4
    torch.testing.assert_close(bank.keys, where[2:])
    bank.evict([0, 2])
    torch.testing.assert_close(bank.keys, where[[3, 5]])
    assert same_span(bank.query(where[5:], 1)[0], held[5])
    bank.evict(torch.tensor([True, True]))
    with pytest.raises(ValueError, match="empty and has no prior"):
        bank.query(where)
    with pytest.raises(IndexError):
        bank.evict(0)


def test_blocks_of_queries_change_nothing(monkeypatch):
    bank, asked = SubspaceBank(2).add(keys(7), labels(7)), keys(11)
    whole = bank.query(asked, 3)
    monkeypatch.setattr("subspan.represent.subspace_bank._NUMBERS", 200)
    torch.testing.assert_close(bank.query(asked, 3).basis, whole.basis)


@pytest.mark.parametrize("filled", [True, False])
def test_files(tmp_path: Path, filled):
    bank = SubspaceBank(2, capacity=9, metric="cosine", prior=labels(1, dtype=torch.complex128)[0])
    if filled:
        bank.add(keys(4), labels(4, dtype=torch.complex128), weights=[1.0, 2.0, 3.0, 4.0])
    bank.save(tmp_path / "bank.safetensors")
    other, asked = SubspaceBank.load(tmp_path / "bank.safetensors"), keys(3)
    assert (len(other), other.capacity, other.metric) == (len(bank), 9, "cosine")
    assert torch.equal(other.query(asked, bandwidth=1.0).basis, bank.query(asked, bandwidth=1.0).basis)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda bank: bank.add([[float("nan"), 0.0]], labels(1)), "NaN"),
        (lambda bank: bank.add(keys(1, 3), labels(1)), "keys"),
        (lambda bank: bank.add(keys(2), labels(1)), "expected a batch of 2"),
        (lambda bank: bank.add(keys(1), labels(1, d=7)), "expected 6 dimensions, got 7"),
        (lambda bank: bank.add(keys(1), labels(1, r=2)), "expected 3 directions"),
        (lambda bank: bank.add(keys(1), labels(1, dtype=torch.complex128)), "the bank's are real"),
        (lambda bank: bank.add(keys(1), labels(1), weights=[0.0]), "positive"),
        (lambda bank: bank.add(keys(1), Subspace(labels(1).basis, variances=torch.zeros(1, 3))), "no variance at all"),
        (lambda bank: bank.query(keys(1), bandwidth=0.0), "bandwidth"),
        (lambda bank: bank.query(keys(1), 0), "k: must be"),
        (lambda bank: bank.query(keys(1), reduce="mean"), "reduce"),
        (lambda bank: SubspaceBank(7).add(keys(1), labels(1)), "do not fit 6"),
        (lambda bank: SubspaceBank(0), "n_components"),
        (lambda bank: SubspaceBank(4, prior=labels(1)[0]), "prior"),
        (lambda bank: SubspaceBank(1, prior_weight=0.0), "prior_weight"),
        (lambda bank: SubspaceBank(1, metric="manhattan"), "metric"),
    ],
)
def test_bad_input(fault, words):
    with pytest.raises(ValueError, match=words):
        fault(SubspaceBank(2).add(keys(3), labels(3)))
