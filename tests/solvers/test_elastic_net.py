"""Small elastic nets, by homotopy and by coordinate descent."""

import threading

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet

from subspan.solvers import elastic_net
from subspan.solvers.elastic_net import elastic_nets


def solved(atoms, targets, l1, l2, start=None, present=None, tolerance=1e-12):
    b, s = len(targets), atoms.shape[1]
    start = torch.zeros(b, s, dtype=atoms.dtype) if start is None else start
    present = torch.ones(b, s, dtype=torch.bool) if present is None else present
    linear = (atoms @ targets.unsqueeze(2)).squeeze(2)
    penalties = (torch.full((b,), value, dtype=atoms.dtype) for value in (l1, l2))
    squares = targets.square().sum(1)
    return elastic_nets(atoms @ atoms.mT, linear, *penalties, squares, start, present, tolerance=tolerance)


def problem(b, s, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(b, s, d, dtype=torch.float64, generator=generator), dim=2)
    return atoms, torch.randn(b, d, dtype=torch.float64, generator=generator)


def violation(atoms, targets, c, l1, l2):
    """How far the conditions of optimality are from holding, relative to l1."""
    slack = (atoms @ (targets - (c.unsqueeze(1) @ atoms).squeeze(1)).unsqueeze(2)).squeeze(2) - l2 * c
    at_zero = (slack.abs() - l1).clamp_min(0)
    return float(torch.where(c == 0, at_zero, (slack - l1 * c.sign()).abs()).max()) / l1


@pytest.fixture(params=["homotopy", "coordinate descent"])
def way(request, monkeypatch):
    if request.param != "homotopy":
        monkeypatch.setattr(elastic_net, "_homotopy", lambda: None)
    return request.param


@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.1), (0.05, 0.02), (0.05, 0.0)])
def test_it_is_the_elastic_net_of_scikit_learn(way, l1, l2):
    atoms, targets = problem(7, 18, 30)
    c = solved(atoms, targets, l1, l2)
    for row in range(7):
        model = ElasticNet(
            alpha=(l1 + l2) / 30, l1_ratio=l1 / (l1 + l2), fit_intercept=False, tol=1e-14, max_iter=10**6
        )
        assert c[row] == pytest.approx(model.fit(atoms[row].mT.numpy(), targets[row].numpy()).coef_, abs=1e-5)


@pytest.mark.parametrize("l2", [0.05, 0.0])
def test_the_start_does_not_matter(way, l2):
    atoms, targets = problem(6, 20, 40, seed=1)
    expected = solved(atoms, targets, 0.1, l2)
    start = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for begin in (start, start * (start > 0.5), expected, -expected):
        assert torch.allclose(solved(atoms, targets, 0.1, l2, start=begin), expected, atol=1e-5)


def test_absent_atoms_are_not_there(way):
    atoms, targets = problem(5, 16, 24, seed=3)
    present = torch.rand(5, 16, generator=torch.Generator().manual_seed(4)) < 0.6
    c = solved(atoms, targets, 0.1, 0.01, present=present)
    for row in range(5):
        kept = present[row]
        alone = solved(atoms[row : row + 1, kept], targets[row : row + 1], 0.1, 0.01)
        assert torch.allclose(c[row, kept], alone[0], atol=1e-6)
        assert (c[row, ~kept] == 0).all()


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("l1", [0.5, 1e-2])
def test_more_atoms_than_dimensions_and_copies_of_them(copies, l1):
    pytest.importorskip("numba")
    atoms, targets = problem(60, 30, 8, seed=5)
    if copies:
        atoms[:, 20:] = -atoms[:, :10]
    start = torch.randn(60, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    for begin in (None, start):
        c = solved(atoms, targets, l1, 0.0, start=begin)
        assert violation(atoms, targets, c, l1, 0.0) < 1e-6
        assert ((c != 0).sum(1) <= 8).all()
    c = solved(atoms.float(), targets.float(), l1, 0.0)
    assert violation(atoms, targets, c.double(), l1, 0.0) < 1e-2


def test_what_the_homotopy_leaves_open_is_solved_all_the_same():
    pytest.importorskip("numba")
    atoms, targets = problem(4, 10, 15, seed=7)
    ridge = atoms @ atoms.mT + 0.5 * torch.eye(10, dtype=torch.float64)
    expected = torch.linalg.solve(ridge, (atoms @ targets.unsqueeze(2)).squeeze(2))
    # Without an l1 penalty there is no support to follow; from a start in the middle atoms are put in another order.
    start = torch.zeros(4, 10, dtype=torch.float64)
    start[:, 5] = 1
    assert torch.allclose(solved(atoms, targets, 0.0, 0.5, start=start), expected, atol=1e-5)


def test_threads_work_at_the_same_time(monkeypatch):
    atoms, targets = problem(7, 4, 6, seed=9)
    together, threads, rows = threading.Barrier(3, timeout=20), torch.get_num_threads(), []

    def wait(*parts):
        together.wait()
        rows.append(len(parts[0]))
        parts[-1][:] = True

    monkeypatch.setattr(elastic_net, "_homotopy", lambda: wait)
    try:
        torch.set_num_threads(3)
        solved(atoms, targets, 0.1, 0.01)
    finally:
        torch.set_num_threads(threads)
    assert sorted(rows) == [2, 2, 3]


def test_threads_share_the_rows():
    atoms, targets = problem(5, 12, 20, seed=8)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3, 8):
            torch.set_num_threads(number)
            found.append(solved(atoms, targets, 0.1, 0.01).numpy())
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(found[0], other) for other in found)
