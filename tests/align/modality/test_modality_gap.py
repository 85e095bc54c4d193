from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from subspan.align import ModalityGap, cosine_divergence, mixing_rate
from subspan.align.modality.modality_gap import js_divergence
from subspan.geometry import Subspace


def planted(n: int = 20_000, d: int = 12, k: int = 4, seed: int = 0):
    """Pairs whose shared part lives in the first k axes, with known biases and residuals."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    shared = torch.cat([normal(n, k), torch.zeros(n, d - k, dtype=torch.float64)], 1)
    inside = torch.tensor([0.3, 0.0, 0.0, 0.1], dtype=torch.float64)
    outside = torch.zeros(d - k, dtype=torch.float64)
    outside[1] = 0.5
    bias = torch.cat([inside, outside])
    residual = torch.zeros(n, d, dtype=torch.float64)
    residual[:, :k] = 0.2 * normal(n, k)
    residual[:, k:] = 0.01 * normal(n, d - k)
    residual[:, k] = 0.1 * normal(n) + 0.5 * residual[:, 0]
    return shared + bias + residual, shared, bias


def test_a_planted_gap_is_taken_apart():
    x, y, bias = planted()
    gap = ModalityGap(rank=4).fit(x, y)
    table = gap.table_
    assert table["gap"] == pytest.approx(float(bias.norm()), rel=0.02)
    assert table["principal bias"] == pytest.approx(math.hypot(0.3, 0.1), rel=0.03)
    assert table["orthogonal bias"] == pytest.approx(0.5, rel=0.02)
    assert table["principal residual trace"] == pytest.approx(4 * 0.04, rel=0.05)
    assert table["orthogonal residual trace"] == pytest.approx(0.01 + 0.25 * 0.04 + 7e-4, rel=0.05)
    assert table["orthogonal residual angle of the bias"] == pytest.approx(math.pi / 2, abs=0.05)
    assert table["orthogonal residual coupling norm"] == pytest.approx(0.5, rel=0.05)
    assert table["orthogonal residual coupling R²"] == pytest.approx(0.01 / (0.02 + 7e-4), rel=0.05)
    assert table["principal residual condition"] < 1.2
    torch.testing.assert_close(gap.principal_bias_ + gap.orthogonal_bias_, (x - y).mean(0), atol=1e-12, rtol=0)


def test_the_parts_do_not_depend_on_the_basis_of_the_frame():
    x, y, _ = planted(n=500)
    first = ModalityGap(rank=4).fit(x, y)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    second = ModalityGap(frame=Subspace(first.subspace_.basis @ turn)).fit(x, y)
    for name, value in first.table_.items():
        assert second.table_[name] == pytest.approx(value, abs=1e-9), name


def test_a_frame_that_is_the_whole_space_leaves_nothing_outside():
    x, y, _ = planted(n=200)
    table = ModalityGap(rank=12).fit(x, y).table_
    assert table["orthogonal bias"] < 1e-12
    assert table["orthogonal residual trace"] == 0


def test_gradient_leakage_is_bounded_by_the_angle_of_the_frames():
    frame = Subspace(torch.eye(6, dtype=torch.float64)[:, :2])
    x, y = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0)).double()
    gap = ModalityGap(frame=frame).fit(x, y)
    tilt = 0.3
    basis = frame.basis.clone()
    basis[0, 0], basis[3, 0] = math.cos(tilt), math.sin(tilt)
    current = Subspace(basis)
    inside = torch.randn(40, 2, dtype=torch.float64) @ basis.mT
    leakage, bound = gap.gradient_leakage(inside, current)
    assert gap.frame_angle(current) == pytest.approx(tilt, abs=1e-9)
    assert bound == pytest.approx(math.sin(tilt), abs=1e-9)
    assert 0 < leakage <= bound
    assert gap.gradient_leakage(basis[:, :1].mT, current)[0] == pytest.approx(bound, abs=1e-12)
    assert gap.gradient_leakage(frame.basis.mT, current)[0] < 1e-12
    with pytest.raises(ValueError, match="zero"):
        gap.gradient_leakage(torch.zeros(1, 6, dtype=torch.float64), current)


def test_mixing_is_one_half_for_one_cloud_and_zero_for_two():
    rows = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)).double()
    assert mixing_rate(rows[:1000], rows[1000:], 10) == pytest.approx(0.5, abs=0.02)
    away = torch.tensor([30.0, 0, 0, 0, 0], dtype=torch.float64)
    assert mixing_rate(rows[:1000] + away, rows[1000:] - away, 10) == 0
    by_hand = mixing_rate(np.array([[1.0, 0], [0, 1]]), np.array([[1.0, 0.1], [0.1, 1]]), 1)
    assert by_hand == 1


def test_divergence_of_cosines():
    rows = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)).double()
    assert cosine_divergence(rows, 5 * rows) < 1e-12
    assert cosine_divergence(rows[:1500], rows[1500:]) < 1e-3
    assert cosine_divergence(rows, rows + 100) == pytest.approx(math.log(2), abs=0.02)
    with pytest.raises(ValueError, match="Y: zero rows"):
        cosine_divergence(rows, torch.zeros(5, 8).double())


def test_js_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.0, 0.5, 0.5]).double()
    assert js_divergence(p, q) == pytest.approx(0.5 * math.log(2), abs=1e-12)
    assert js_divergence(p, p) == 0


def test_bad_input_is_named():
    x = torch.randn(10, 4).double()
    with pytest.raises(ValueError, match="Y: expected 4 columns"):
        ModalityGap().fit(x, x[:, :3])
    with pytest.raises(ValueError, match="y: expected 10 rows"):
        ModalityGap().fit(x, x[:5])
    with pytest.raises(ValueError, match="frame"):
        ModalityGap(frame=Subspace.random(5, 2)).fit(x, x)
    with pytest.raises(NotFittedError):
        ModalityGap().frame_angle(Subspace.random(4, 2))
    with pytest.raises(ValueError, match="X: 1 of"):
        ModalityGap.gap(torch.tensor([[float("nan"), 1.0]]), x[:, :2])
    assert ModalityGap.gap(x, x + 1) == pytest.approx(2)
