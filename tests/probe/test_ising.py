from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from subspan.probe import AtomGroups, IsingGraph
from subspan.probe.ising import _Spins, firing

BLOCKS = np.repeat(np.arange(3), 4)
TRUE = np.where(BLOCKS[:, None] == BLOCKS, 0.35, 0.0) - 0.35 * np.eye(12)
FIELDS = np.linspace(-0.4, 0.1, 12)


@cache
def gibbs(n: int = 8000, seed: int = 0) -> np.ndarray:
    """Spins of three blocks, one chain a row, so that rows are independent."""
    random = np.random.default_rng(seed)
    s = random.choice([-1.0, 1.0], (n, 12))
    for _ in range(40):
        for j in range(12):
            p = 1 / (1 + np.exp(-2 * (FIELDS[j] + s @ TRUE[:, j])))
            s[:, j] = np.where(random.random(n) < p, 1, -1)
    return s


def test_planted_blocks_are_recovered() -> None:
    fires = (gibbs() > 0).astype(float)
    graph = IsingGraph().fit(fires)
    inside = (TRUE > 0)[np.triu_indices(12, 1)]
    found = graph.couplings_[np.triu_indices(12, 1)]
    assert (found[inside] > 0.25).all()
    assert np.abs(found[~inside]).max() < 0.03
    assert 18 <= len(graph.edges()) == np.count_nonzero(found) < 30
    assert np.abs(graph.couplings_ - TRUE).max() < 0.1
    assert np.abs(graph.fields_ - FIELDS).max() < 0.15
    assert [entry.penalty for entry in graph.ebic_path_] == sorted((e.penalty for e in graph.ebic_path_), reverse=True)
    assert graph.lambda_ == min(graph.ebic_path_, key=lambda entry: entry.value).penalty
    groups = AtomGroups(ising=graph).fit(fires, np.eye(12))
    assert adjusted_rand_score(BLOCKS, groups.labels_) == 1


def test_independent_spins_have_no_couplings() -> None:
    empty = 0
    for seed in range(40):
        fires = np.random.default_rng(seed).random((1500, 8)) < np.linspace(0.05, 0.6, 8)
        empty += not len(IsingGraph().fit(fires).edges())
    assert empty >= 38


def test_both_solvers_agree_where_there_is_no_penalty() -> None:
    fires = gibbs() > 0
    joint = IsingGraph(lambdas=(1e-6,), tolerance=1e-6, max_iter=2000).fit(fires)
    each = IsingGraph("liblinear").fit(fires)
    assert np.abs(joint.couplings_ - each.couplings_).max() < 0.02
    assert np.abs(joint.fields_ - each.fields_).max() < 0.02
    assert each.lambda_ is None
    assert np.array_equal(each.couplings_, each.couplings_.T)


def test_the_gradient_is_that_of_the_pseudo_likelihood() -> None:
    s = gibbs()[:300]
    spins = _Spins(firing(s > 0))
    random = np.random.default_rng(1)
    couplings = 0.2 * random.normal(size=(12, 12))
    couplings = couplings + couplings.T
    np.fill_diagonal(couplings, 0)
    fields = 0.3 * random.normal(size=12)
    means = s.mean(0)

    def loss(j: np.ndarray, g: np.ndarray) -> float:
        margins = 2 * s * ((s - means) @ j + g)
        return float(np.logaddexp(0, -margins).sum(1).mean())

    value, gradient, slope = spins.loss(couplings, fields)
    assert value == pytest.approx(loss(couplings, fields), rel=1e-5)
    for i, k in ((0, 1), (7, 3), (11, 0), (5, 5)):
        step = np.zeros((12, 12))
        step[i, k] = 1e-5
        numeric = (loss(couplings + step, fields) - loss(couplings - step, fields)) / 2e-5
        assert gradient[i, k] == pytest.approx(numeric, abs=1e-5)
    step = 1e-5 * np.eye(12)[4]
    assert slope[4] == pytest.approx((loss(couplings, fields + step) - loss(couplings, fields - step)) / 2e-5, abs=1e-5)


def test_the_solution_is_optimal() -> None:
    """No symmetric gradient is above λ where a coupling is 0; it is -λ times the sign where it is not."""
    spins = _Spins(firing(gibbs() > 0))
    couplings, fields, _ = spins.fista(np.zeros((12, 12)), spins.independent(), 0.02, 3000, 1e-7)
    _, gradient, slope = spins.loss(couplings, fields)
    gradient = (gradient + gradient.T) / 2
    off = ~np.eye(12, dtype=bool)
    zero = off & (couplings == 0)
    assert np.abs(gradient[zero]).max() < 0.02 + 1e-4
    assert np.abs((gradient + 0.02 * np.sign(couplings))[off & ~zero]).max() < 1e-4
    assert np.abs(slope).max() < 1e-4
    assert 0 < zero.sum() < off.sum()


def test_rare_and_constant_atoms_are_left_out_and_kinds_of_codes_are_alike() -> None:
    fires = (gibbs()[:2000] > 0).astype(np.float32)
    wide = np.concatenate([np.zeros((2000, 1)), fires[:, :5], np.ones((2000, 1)), fires[:, 5:]], 1)
    graph = IsingGraph(lambdas=(0.05,)).fit(wide)
    assert graph.kept_.tolist() == [1, 2, 3, 4, 5, *range(7, 14)]
    for kind in (torch.from_numpy(2.5 * wide), sparse.csr_matrix(wide), wide.astype(bool)):
        assert np.array_equal(IsingGraph(lambdas=(0.05,)).fit(kind).couplings_, graph.couplings_)
    plain = IsingGraph(lambdas=(0.05,)).fit(fires)
    assert np.array_equal(plain.couplings_, graph.couplings_)


@pytest.mark.parametrize("solver", ["fista", "liblinear"])
def test_tiles_shut_each_other_out_though_separable(solver: Any) -> None:
    tiles = np.eye(24).repeat(50, 0)
    graph = IsingGraph(solver, lambdas=(1e-3,)).fit(tiles)
    assert np.isfinite(graph.couplings_).all()
    assert (graph.couplings_[~np.eye(24, dtype=bool)] < 0).all()


def test_bad_input_is_refused() -> None:
    codes = (gibbs()[:200] > 0).astype(float)
    for changed, said in (
        (-codes, "some are negative"),
        (np.where(codes > 0, np.nan, 0), "NaN"),
        (np.ones((200, 12)), "0 of 12 atoms fire in 0.02 to 0.98"),
        (codes[0], r"expected \(n, c\)"),
    ):
        with pytest.raises(ValueError, match=said):
            IsingGraph().fit(changed)
    for options, said in (
        ({"rates": (0.5, 0.1)}, "rates"),
        ({"lambdas": ()}, "lambdas"),
        ({"lambdas": (-1.0,)}, "lambdas"),
        ({"solver": "newton"}, "solver"),
        ({"gamma": -1.0}, "gamma"),
    ):
        with pytest.raises(ValueError, match=said):
            IsingGraph(**options).fit(codes)
