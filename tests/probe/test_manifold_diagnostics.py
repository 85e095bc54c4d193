from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from subspan.probe import manifold_diagnostics, tuning_curves

ANGLE = torch.arange(240) * 2 * torch.pi / 240
CIRCLE = torch.stack([ANGLE.cos(), ANGLE.sin()], 1)


def test_support_and_spread_are_those_of_a_double_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(70, 4, generator=draw)
    codes = (torch.randn(70, 9, generator=draw) - torch.linspace(-2, 3, 9)).relu()
    found = manifold_diagnostics(codes, points, min_points=5)

    def mean_distance(rows: Any) -> float:
        return float(np.mean([float((points[i] - points[j]).norm()) for i, j in itertools.combinations(rows, 2)]))

    wanted = {}
    for atom in range(9):
        rows = codes[:, atom].nonzero().flatten().tolist()
        if len(rows) >= 7:
            wanted[atom] = mean_distance(rows) / mean_distance(range(70))
    assert found.support.tolist() == list(wanted)
    assert 2 < len(wanted) < 9
    np.testing.assert_allclose(found.spreads, list(wanted.values()), rtol=1e-5)
    assert found.spread in found.spreads
    assert found.co_firing == pytest.approx(float((codes[:, list(wanted)] > 0).float().mean()))


def test_regimes() -> None:
    signed = (CIRCLE @ torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, -1]])).relu()
    assert manifold_diagnostics(signed, CIRCLE).regime == "capture"
    tiles = torch.eye(24).repeat_interleave(10, 0)
    shattered = manifold_diagnostics(tiles[:, :24], CIRCLE, min_points=0)
    assert (len(shattered.support), shattered.spread, shattered.regime) == (0, 0.0, "shatter")
    wide = torch.eye(8).repeat_interleave(30, 0)
    found = manifold_diagnostics(wide, CIRCLE, min_points=30)
    assert len(found.support) == 8
    assert found.spread < 0.3
    assert found.regime == "shatter"
    many = (CIRCLE @ torch.stack([ANGLE[::12].cos(), ANGLE[::12].sin()])).relu()
    diluted = manifold_diagnostics(many, CIRCLE)
    assert len(diluted.support) == 20
    assert diluted.regime == "dilution"
    assert manifold_diagnostics(many, CIRCLE, dim=10).regime == "capture"


def test_rows_of_other_manifolds_do_not_count() -> None:
    codes, active = torch.rand(240, 3), torch.arange(240) < 60
    found = manifold_diagnostics(codes, CIRCLE, active)
    alone = manifold_diagnostics(codes[:60], CIRCLE[:60])
    np.testing.assert_allclose(found.spreads, alone.spreads)
    one = torch.ones(240, 2)
    assert manifold_diagnostics(one, torch.ones(240, 2)).spread == 0


def test_tuning_is_the_mean_by_value_smoothed_and_scaled() -> None:
    labels = [3, 1, 2, 1, 3, 2]
    codes = torch.tensor([[9.0, 1], [1, 5], [3, 2], [3, 7], [7, 1], [3, 2]])
    found = tuning_curves(codes, labels, [0, 1], sigma=0)
    assert found.labels == [1, 2, 3]
    assert found.atoms.tolist() == [1, 0]
    np.testing.assert_allclose(found.curves, [[1, 0.2, 0], [0, 1 / 6, 1]])
    line = torch.zeros(41, 1)
    line[20] = 1
    smooth = tuning_curves(line, range(41), [0], sigma=3).curves[0]
    assert smooth[23] == pytest.approx(np.exp(-0.5), abs=1e-3)
    assert tuning_curves(line, range(41), []).curves.shape == (0, 41)


def test_one_bump_is_told_from_two() -> None:
    at = torch.arange(60.0).unsqueeze(1)
    bump = lambda *peaks: sum((-(at - peak).square() / 18).exp() for peak in peaks)  # noqa: E731
    codes = torch.cat([bump(10), bump(10, 45), torch.zeros(60, 1), bump(59)], 1)
    found = tuning_curves(codes, range(60), [0, 1, 2, 3])
    assert dict(zip(found.atoms.tolist(), found.unimodal().tolist())) == {0: True, 1: False, 2: False, 3: True}


def test_bad_input_is_refused() -> None:
    codes = torch.rand(240, 3)
    for call, said in (
        (lambda: manifold_diagnostics(codes[1:], CIRCLE), "codes: 240 rows"),
        (lambda: manifold_diagnostics(codes, CIRCLE, torch.arange(240)), "active: 240 booleans"),
        (lambda: manifold_diagnostics(codes, CIRCLE, torch.arange(240) < 5), "points: 10 points"),
        (lambda: manifold_diagnostics(codes, CIRCLE * torch.nan), "NaN"),
        (lambda: tuning_curves(codes, range(7), [0]), "labels: 240"),
        (lambda: tuning_curves(codes, [1] * 240, [0]), "labels: two values"),
        (lambda: tuning_curves(codes, range(240), [3]), "atoms: must lie in"),
        (lambda: tuning_curves(codes, range(240), [0], sigma=-1.0), "sigma"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
