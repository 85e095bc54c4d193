from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from subspan.geometry import Subspace
from subspan.probe import capture_curve
from subspan.probe.capture_curves import chord_elbow

ANGLE = torch.arange(240, dtype=torch.float64) * 2 * torch.pi / 240
CIRCLE = torch.stack([ANGLE.cos(), ANGLE.sin(), *[torch.zeros(240)] * 6], 1)
SIGNED = torch.cat([torch.eye(8)[:2], -torch.eye(8)[:2]]).double()
CODES = (CIRCLE @ SIGNED.T).relu()
PLAIN: dict[str, Any] = {"outlier": None, "controls": 0}


def manifold(n: int = 120, d: int = 12, c: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points, atoms of other lengths, and codes of which half are 0."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64) * torch.linspace(3, 0.1, d) + 5
    atoms = torch.randn(c, d, generator=draw, dtype=torch.float64) * torch.linspace(0.5, 2, c).unsqueeze(1)
    return x, atoms, torch.randn(n, c, generator=draw, dtype=torch.float64).relu() + 0.1 * (x @ atoms.T).relu()


def test_a_circle_needs_two_directions_and_four_atoms() -> None:
    geometric = capture_curve(CIRCLE, SIGNED, max_atoms=4)
    assert geometric.explained[1] == pytest.approx(1)
    assert geometric.atoms_needed() == 2
    assert geometric.compactness() == 1
    chosen = Subspace.span(SIGNED[geometric.order[:2]].T)
    assert float(torch.rad2deg(chosen.angles(Subspace.fit(CIRCLE, rank=2)).max())) < 0.1
    statistical = capture_curve(CIRCLE, SIGNED, CODES, method="statistical", max_atoms=4)
    assert sorted(statistical.order) == [0, 1, 2, 3]
    assert statistical.explained[2] < 0.9 < statistical.explained[3] == pytest.approx(1)
    assert statistical.compactness() == 2


def test_the_geometric_curve_projects_on_the_whole_span() -> None:
    x, atoms, _ = manifold()
    curve = capture_curve(x, atoms, max_atoms=10, **PLAIN)
    rows = x - x.mean(0)
    chosen: list[int] = []
    for atom, share in zip(curve.order, curve.explained):
        space = Subspace.span(atoms[chosen].T) if chosen else None
        left = rows if space is None else space.residual(rows)
        score = (left @ atoms.T).square().sum(0) / atoms.square().sum(1)
        assert int(score.argmax()) == atom
        chosen.append(int(atom))
        rest = Subspace.span(atoms[chosen].T).residual(rows)
        assert share == pytest.approx(1 - float(rest.square().sum() / rows.square().sum()))


def test_the_statistical_curve_takes_contributions_as_they_are() -> None:
    x, atoms, codes = manifold()
    curve = capture_curve(x, atoms, codes, method="statistical", max_atoms=40, **PLAIN)
    left, used = x - x.mean(0), codes - codes.mean(0)
    total, free = left.square().sum(), set(range(40))
    for atom, share in zip(curve.order, curve.explained):
        after = {j: float((left - used[:, j : j + 1] * atoms[j]).square().sum()) for j in free}
        best = min(after, key=lambda j: after[j])
        assert best == atom
        assert after[best] < float(left.square().sum())
        left = left - used[:, atom : atom + 1] * atoms[atom]
        free.remove(int(atom))
        assert share == pytest.approx(1 - float(left.square().sum() / total))
    # It ends where nothing is gained any more.
    assert len(curve.order) < 40
    assert min(float((left - used[:, j : j + 1] * atoms[j]).square().sum()) for j in free) >= float(
        left.square().sum()
    ) * (1 - 1e-9)


def test_the_affine_curve_is_least_squares_with_a_constant() -> None:
    x, atoms, codes = manifold()
    target = x[:, :3] @ torch.randn(3, 7, dtype=torch.float64)
    curve = capture_curve(x, atoms, codes, method="affine", target=target, max_atoms=9, **PLAIN)
    assert curve.order.tolist() == capture_curve(x, atoms, max_atoms=9, **PLAIN).order.tolist()
    for n in range(1, 10):
        design = torch.cat([codes[:, curve.order[:n]], torch.ones(len(x), 1)], 1)
        rest = target - design @ torch.linalg.lstsq(design, target).solution
        wanted = 1 - float(rest.square().sum() / (target - target.mean(0)).square().sum())
        assert curve.explained[n - 1] == pytest.approx(wanted)
    assert capture_curve(CIRCLE, SIGNED, CODES, method="affine", max_atoms=4).explained[-1] == pytest.approx(1)
    scaled = capture_curve(x, atoms, 3 * codes + 7, method="affine", target=target, max_atoms=9, **PLAIN)
    np.testing.assert_allclose(scaled.explained, curve.explained)


def test_pca_is_the_upper_bound_and_reached_by_its_own_axes() -> None:
    x, atoms, _ = manifold()
    curve = capture_curve(x, atoms, max_atoms=12, outlier=None)
    assert np.all(curve.explained <= curve.pca + 1e-9)
    assert np.all(curve.random_dictionary <= curve.pca + 1e-9)
    values = torch.linalg.svdvals(x - x.mean(0)).square()
    np.testing.assert_allclose(curve.pca, (values.cumsum(0) / values.sum()).numpy())
    axes = torch.linalg.svd(x - x.mean(0))[2]
    np.testing.assert_allclose(capture_curve(x, axes, max_atoms=12, **PLAIN).explained, curve.pca, atol=1e-6)
    # More random atoms to choose from hold more than a basis has, and both hold all in the end.
    assert curve.random_dictionary[0] > curve.random_orthonormal[0]
    assert curve.random_dictionary[-1] == pytest.approx(1) == curve.random_orthonormal[-1]


def test_controls_are_means_of_random_draws_and_follow_the_seed() -> None:
    x, atoms, _ = manifold()
    one, two, again = (capture_curve(x, atoms, max_atoms=8, random_state=seed) for seed in (0, 1, 0))
    assert np.array_equal(one.random_dictionary, again.random_dictionary)
    assert not np.array_equal(one.random_dictionary, two.random_dictionary)
    assert np.array_equal(one.explained, two.explained)
    assert len(capture_curve(x, atoms, max_atoms=8, controls=0).random_dictionary) == 0


def test_what_must_work_works() -> None:
    x, atoms, codes = manifold()
    whole = capture_curve(x, atoms, max_atoms=12, **PLAIN)
    # Dead atoms are never chosen; copies add nothing.
    dead = torch.cat([torch.zeros(3, 12), atoms, atoms])
    curve = capture_curve(x, dead, max_atoms=20, **PLAIN)
    np.testing.assert_allclose(curve.explained, whole.explained)
    assert len(curve.order) == 12
    assert curve.order.min() >= 3
    first = capture_curve(x, atoms, codes, method="statistical", max_atoms=40, **PLAIN).order[0]
    silent = codes * (torch.arange(40) != first)
    assert first not in capture_curve(x, atoms, silent, method="statistical", max_atoms=40, **PLAIN).order
    aside = torch.eye(8).double()[5:]  # no atom has any part in the circle
    for method in ("geometric", "affine", "statistical"):
        assert len(capture_curve(CIRCLE, aside, CODES[:, :3], method=method, max_atoms=3, **PLAIN).explained) == 0
    constant = capture_curve(torch.ones(20, 12), atoms, max_atoms=5)
    assert len(constant.order) == len(constant.explained) == constant.elbow == 0
    assert constant.atoms_needed() is None is constant.compactness()
    half = capture_curve(x.half(), atoms.half(), max_atoms=12, **PLAIN)
    np.testing.assert_allclose(half.explained, whole.explained, atol=1e-2)
    assert len(capture_curve(x, atoms, max_atoms=12, explained=0.8, **PLAIN).order) == whole.atoms_needed(0.8)


def test_points_far_out_are_left_out() -> None:
    x, atoms, _ = manifold()
    with_sink = torch.cat([x, 100 * x[:1]])
    curve = capture_curve(with_sink, atoms, max_atoms=6, controls=0)
    assert curve.kept.tolist() == [True] * 120 + [False]
    np.testing.assert_allclose(curve.explained, capture_curve(x, atoms, max_atoms=6, **PLAIN).explained)
    assert capture_curve(CIRCLE, SIGNED, max_atoms=2).kept.all()


def test_the_elbow_is_farthest_from_the_chord() -> None:
    assert chord_elbow(np.array([0.0, 0.6, 0.9, 0.95, 1.0])) == 3
    assert chord_elbow(np.array([0.3])) == 1


def test_bad_input_is_refused() -> None:
    x, atoms, codes = manifold()
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((x[:9], atoms), {}, "X: 10 points"),
        ((x, atoms[:, :5]), {}, "decoder: expected 12 columns"),
        ((x, atoms), {"max_atoms": 41}, "max_atoms: must lie in"),
        ((x, atoms), {"explained": 0.0}, "explained"),
        ((x, atoms), {"method": "other"}, "method"),
        ((x, atoms), {"method": "statistical"}, "codes: are needed"),
        ((x, atoms, codes[:, :39]), {}, r"codes: codes \(n, 40\)"),
        ((x, atoms, codes[1:]), {}, "codes: 120 rows"),
        ((x, atoms, codes), {"method": "affine", "target": x[1:]}, "target: 120 rows"),
        ((x * torch.nan, atoms), {}, "NaN"),
        ((x, atoms, codes * torch.nan), {}, "NaN"),
    ]
    for arguments, options, said in cases:
        with pytest.raises(ValueError, match=said):
            capture_curve(*arguments, **{"max_atoms": 8, **options})
