"""Sparse codes against scikit-learn and their conditions; dictionary steps against the error that none may raise."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp

from subspan.solvers import sparse_coding
from subspan.solvers.sparse_coding import (
    SparseCodes,
    coding_error,
    ksvd_step,
    mod_step,
    omp,
    procrustes_step,
    simultaneous_omp,
    top_s,
)


def unit(n, d, seed=0, dtype=torch.float64):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x / x.norm(dim=1, keepdim=True)).to(dtype)


# Many of few atoms go by the Gram matrix, in torch or compiled, few of many by a basis.
GRAM, COMPILED, BASIS = (30, 20, 12), (31, 20, 12), (80, 10, 3)
SIZES = pytest.mark.parametrize(("k", "d", "s"), [GRAM, COMPILED, BASIS])


@pytest.fixture(autouse=True)
def _ways(request, monkeypatch):
    """Each size goes the way that it stands for."""
    size = request.node.callspec.params.get("k") if hasattr(request.node, "callspec") else None
    taken, ways = [], {30: "_gram_pursuit", 31: "_compiled_pursuit", 80: "pursue"}
    if size not in ways:
        yield
        return
    monkeypatch.setattr(sparse_coding, "_WORTH_COMPILING", 0 if size == 31 else float("inf"))
    if size == 31:
        pytest.importorskip("numba")
    for way in ways.values():
        run = getattr(sparse_coding, way)
        monkeypatch.setattr(
            sparse_coding, way, lambda *given, run=run, way=way, **options: taken.append(way) or run(*given, **options)
        )
    yield
    assert ways[size] in taken


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pursuit_is_that_of_scikit_learn(k, d, s, dtype):
    x, atoms = 3 * unit(200, d, 1, dtype), unit(k, d, 2, dtype)
    done = []
    codes = omp(x, atoms, s, progress=done.append)
    assert codes.values.dtype == dtype
    assert done[-1] == 1
    expected = orthogonal_mp(atoms.double().mT.numpy(), x.double().mT.numpy(), n_nonzero_coefs=s).T
    same = (np.isin(codes.dense().numpy(), 0) == (expected == 0)).all(1)
    assert same.mean() > (0.999 if dtype == torch.float64 else 0.95)
    exact = 1e-10 if dtype == torch.float64 else 1e-3
    np.testing.assert_allclose(codes.dense()[same].double(), expected[same], atol=exact)
    left = (x - codes.decode(atoms)) @ atoms.mT
    assert float(left.gather(1, codes.indices).abs().max()) < 1e-2 * exact + 1e-12


@SIZES
def test_pursuit_stops_where_nothing_is_left(k, d, s):
    atoms = unit(k, d, 2)
    atoms[1] = atoms[0]
    planted = torch.zeros(3, k, dtype=torch.float64)
    planted[0, [4]], planted[1, [0, 5]] = 2.0, torch.tensor([4.0, -1.0], dtype=torch.float64)
    codes = omp(planted @ atoms, atoms, s, tolerance=1e-12)
    assert (codes.values != 0).sum(1).tolist() == [1, 2, 0]
    torch.testing.assert_close(codes.dense(), planted, atol=1e-7, rtol=0)
    # A duplicate of what is chosen, and nothing else, is left for a dictionary of two equal atoms.
    same = omp(atoms[:1] + atoms[4:5], atoms[:2].repeat(3, 1), 2)
    assert (same.values != 0).sum() == 1


@SIZES
def test_pursuit_stops_at_the_tolerance(k, d, s):
    x, atoms = unit(50, d, 1), unit(k, d, 2)
    errors = torch.stack([(x - omp(x, atoms, m).decode(atoms)).square().sum(1) for m in range(1, s)])
    codes = omp(x, atoms, s, tolerance=0.3)
    assert torch.equal((codes.values != 0).sum(1), (errors > 0.3).sum(0) + 1)


@pytest.mark.parametrize("worth", [0, float("inf")])
def test_near_atoms_are_fitted_to_the_digits_there_are(monkeypatch, worth):
    monkeypatch.setattr(sparse_coding, "_WORTH_COMPILING", worth)
    base = unit(1, 24, 1).repeat(18, 1) + 0.1 * unit(18, 24, 2)
    atoms, x = base / base.norm(dim=1, keepdim=True), unit(40, 24, 3)
    found = omp(x.float(), atoms.float(), 14)
    left = (x - SparseCodes(found.indices, found.values.double(), 18).decode(atoms.float().double())) @ atoms.mT
    assert float(left.gather(1, found.indices).abs().max()) < 1e-5


def test_threads_share_the_rows_of_compiled_pursuit(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(sparse_coding, "_WORTH_COMPILING", 0)
    x, atoms, threads = unit(7, 20, 1), unit(30, 20, 2), torch.get_num_threads()
    expected = omp(x, atoms, 12)
    torch.set_num_threads(3)
    try:
        found = omp(x, atoms, 12)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values)


def test_choosing_all_atoms_is_least_squares_and_of_orthonormal_ones_top_s():
    x, atoms = unit(9, 12, 1), unit(5, 12, 2)
    solved = torch.linalg.lstsq(atoms.mT, x.mT).solution.mT
    torch.testing.assert_close(omp(x, atoms, 5).dense(), solved)
    basis = torch.linalg.qr(atoms.mT)[0].mT
    for s in (1, 3):
        torch.testing.assert_close(top_s(x, basis, s).dense(), omp(x, basis, s).dense())
        assert (top_s(x, basis, s).values.abs().min(1).values >= (x @ basis.mT).abs().sort(1).values[:, -s]).all()


def test_pursuit_of_all_rows_together_is_greedy_and_finds_what_was_planted():
    atoms = unit(40, 60, 2)
    x = unit(30, 3, 3) @ atoms[[7, 21, 35]]
    order, share = simultaneous_omp(x, atoms, 10)
    assert sorted(order.tolist()) == [7, 21, 35]
    assert float(share[-1]) == pytest.approx(1)
    noisy = x + 0.1 * unit(30, 60, 5)
    order, share = simultaneous_omp(noisy, atoms, 6)
    for m in range(6):
        basis = torch.linalg.qr(atoms[order[:m]].mT)[0]
        residual = noisy - noisy @ basis @ basis.mT
        assert int((residual @ atoms.mT).square().sum(0).argmax()) == int(order[m])
        taken = 1 - residual.square().sum() / noisy.square().sum()
        assert float(taken) == pytest.approx(float(share[m - 1]) if m else 0, abs=1e-12)
    assert len(simultaneous_omp(noisy, atoms, 6, explained=0.5)[0]) == int((share < 0.5).sum()) + 1


@pytest.mark.parametrize("step", [partial(ksvd_step, n_power=1), mod_step])
def test_a_step_never_raises_the_error_and_keeps_supports_and_lengths(step):
    x, atoms = unit(60, 8, 1), unit(14, 8, 2)
    codes = omp(x, atoms, 3)
    codes = SparseCodes(codes.indices, torch.where(codes.indices == 5, 0, codes.values), 14)  # no row uses atom 5
    errors = [float(coding_error(x, codes, atoms))]
    for _ in range(6):
        atoms, found = step(x, codes, atoms)
        assert torch.equal(found.indices, codes.indices)
        assert torch.equal(found.values == 0, codes.values == 0)
        torch.testing.assert_close(atoms.norm(dim=1), torch.ones(14, dtype=torch.float64))
        codes = found
        errors.append(float(coding_error(x, codes, atoms)))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_ksvd_fits_each_atom_by_the_leading_singular_pair_and_replaces_those_unused():
    x, atoms = unit(40, 6, 1), unit(2, 6, 2)
    codes = SparseCodes(torch.zeros(40, 1, dtype=torch.int64), unit(40, 1, 3), 2)  # all rows use atom 0, none atom 1
    new, found = ksvd_step(x, codes, atoms, n_power=300)
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    assert float((new[0] @ vh[0]).abs()) == pytest.approx(1)
    assert float(coding_error(x, found, new)) == pytest.approx(float(s[1:].square().sum()))
    residual = x - found.decode(new)
    worst = residual[residual.norm(dim=1).argmax()]
    torch.testing.assert_close(new[1], worst / worst.norm())


def test_mod_is_least_squares_in_all_atoms():
    x, atoms = unit(60, 8, 1), unit(14, 8, 2)
    codes = omp(x, atoms, 3)
    new, found = mod_step(x, codes, atoms)
    gradient = found.dense().mT @ (x - found.decode(new))
    assert float(gradient.abs().max()) < 1e-12


def test_procrustes_and_top_s_descend_and_recover_an_orthonormal_dictionary():
    planted = torch.linalg.qr(unit(8, 8, 5))[0].mT
    sparse = torch.zeros(400, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(6)
    for row in sparse:
        row[torch.randperm(8, generator=generator)[:2]] = torch.randn(2, dtype=torch.float64, generator=generator)
    x = sparse @ planted
    atoms = torch.linalg.svd(x, full_matrices=False)[2]
    errors = []
    for _ in range(40):
        codes = top_s(x, atoms, 2)
        errors.append(float(coding_error(x, codes, atoms)))
        atoms = procrustes_step(x, codes)
        errors.append(float(coding_error(x, codes, atoms)))
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    torch.testing.assert_close(atoms @ atoms.mT, torch.eye(8, dtype=torch.float64))
    assert float((atoms @ planted.mT).abs().amax(1).min()) > 0.99


def test_ksvd_recovers_a_planted_dictionary():
    planted, generator = unit(12, 8, 5), torch.Generator().manual_seed(6)
    sparse = torch.zeros(300, 12, dtype=torch.float64)
    for row in sparse:
        row[torch.randperm(12, generator=generator)[:2]] = torch.randn(2, dtype=torch.float64, generator=generator)
    x = sparse @ planted
    atoms = unit(12, 8, 9)
    for _ in range(25):
        atoms, _ = ksvd_step(x, omp(x, atoms, 2), atoms)
    assert float(((planted @ atoms.mT).abs().amax(1) > 0.99).double().mean()) > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, a: omp(x, a, 0), "n_nonzero"),
        (lambda x, a: omp(x, a, 5), r"\[1, 4\]"),
        (lambda x, a: omp(x, 2 * a, 2), "unit length"),
        (lambda x, a: omp(x * float("nan"), a, 2), "x"),
        (lambda x, a: top_s(x[:, :3], a, 2), "3 columns"),
        (lambda x, a: simultaneous_omp(x, a, 8), "n_atoms"),
        (lambda x, a: simultaneous_omp(0 * x, a, 2), "zero"),
        (lambda x, a: procrustes_step(x, omp(x, a, 2)), "orthonormal"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(unit(5, 4), unit(6, 4, 1))
